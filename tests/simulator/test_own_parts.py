"""What a user's own code raises while it is used as a part of a run: the client or the part is named, and the history is kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sumus
from tests.simulating import simulated

WORK = sumus.sgd(lr=0.1, batch_size=4)


def with_rules(**changes: Any) -> sumus.ClientWork:
    return replace(WORK, rules=replace(WORK.rules, **changes))


SERVER = sumus.optimizers.sgd(1.0)
MEAN = sumus.fedavg(WORK).aggregator


def people(scale_of_last: float = 1.0) -> dict[int, Any]:
    inputs = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
    labels = (inputs.sum(1) > 0).astype("int64")
    return {who: (inputs * (scale_of_last if who == 3 else 1.0), labels) for who in range(4)}


def raising(*given: Any, **named: Any) -> Any:
    return {}["a mistake"]


def after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for so many calls; then it raises."""
    seen: list[int] = []

    def counted(*given: Any) -> Any:
        seen.append(1)
        return function(*given) if len(seen) <= calls else raising()

    return counted


def run(algorithm: sumus.Algorithm, net: Callable[[], Any] = lambda: nn.Linear(4, 2), **options: Any) -> sumus.History:
    task = sumus.Task(net, options.pop("loss", sumus.losses.cross_entropy))
    return simulated(task, algorithm, options.pop("people", people()), **{"rounds": 2, "progress": False, **options})


def rule(**changes: Any) -> sumus.ClientWork:
    return replace(WORK, optimizer=replace(WORK.optimizer, **changes))


def whole(**changes: Any) -> sumus.Algorithm:
    return replace(sumus.fedavg(WORK), aggregator=replace(MEAN, **changes))


PARTS: dict[str, tuple[Callable[[], sumus.Algorithm], str]] = {
    "correct": (lambda: sumus.fedavg(with_rules(correct=raising)), "client [0-3]: correct of custom"),
    "a correction of another shape": (
        lambda: sumus.fedavg(with_rules(correct=lambda grads, *_: {name: torch.zeros(7, 7) for name in grads})),
        "client [0-3]: update of sgd",
    ),
    "a correction that is nothing": (
        lambda: sumus.fedavg(with_rules(correct=lambda *_: None)),
        "client [0-3]: correct of",
    ),
    "the rule's init": (lambda: sumus.fedavg(rule(init=raising)), "client [0-3]: init of custom"),
    "the rule's update": (lambda: sumus.fedavg(rule(update=raising)), "client [0-3]: update of custom"),
    "a rule that gives a number": (
        lambda: sumus.fedavg(rule(update=lambda *_: (3.0, ()))),
        "client [0-3]: update of custom.*made the leaf `weight` a float",
    ),
    "a rule that sums a leaf up": (
        lambda: sumus.fedavg(rule(update=lambda grad, state, param, *_: (param.sum(), ()))),
        r"client [0-3]: .*`weight` a Tensor of shape torch.Size\(\[\]\), and the leaf is of shape \(2, 4\)",
    ),
    "a client's first state": (lambda: sumus.fedavg(with_rules(init=raising)), "client [0-3]: init of custom"),
    "finish": (lambda: sumus.fedavg(with_rules(finish=raising)), "client [0-3]: finish of custom"),
    "parts that are none": (
        lambda: sumus.fedavg(with_rules(finish=lambda *_: ({"params": 3}, {}))),
        "client [0-3]: finish of",
    ),
    "a schedule": (lambda: sumus.fedavg(replace(WORK, lr=sumus.schedules.Schedule(at=raising))), "the rate of custom"),
    "a rate that is nothing": (
        lambda: sumus.fedavg(replace(WORK, lr=sumus.schedules.Schedule(at=lambda _: None))),  # pyright: ignore[reportArgumentType]
        "the rate of custom",
    ),
    "a rate that is NaN": (
        lambda: sumus.fedavg(replace(WORK, lr=sumus.schedules.Schedule(at=lambda _: float("nan")))),
        "the learning rate of round 1",
    ),
    "a transform on the device": (
        lambda: sumus.fedavg(WORK, update=sumus.Transform(apply=raising)),
        "client [0-3]: apply of custom",
    ),
    "a link of a chain": (
        lambda: sumus.fedavg(WORK, update=sumus.chain(sumus.clip_by_global_norm(1.0), sumus.Transform(apply=raising))),
        r"client [0-3]: apply of custom\(\) failed",
    ),
    "a transform on the server": (
        lambda: sumus.fedavg(WORK, update=sumus.Transform(invert=raising)),
        "invert of custom",
    ),
    "the server's update": (
        lambda: sumus.fedavg(WORK, server=sumus.ServerOptimizer(init=SERVER.init, update=raising)),
        "update of custom",
    ),
    "the mean": (lambda: whole(combine=raising), "combine of custom"),
    "a centre": (lambda: whole(centre=raising), "centre of custom"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_raises_is_named(part: str) -> None:
    make, words = PARTS[part]
    with pytest.raises(sumus.SumusError, match=words) as error:
        run(make())
    assert len(error.value.history.rounds) == 0


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (lambda: sumus.fedavg(WORK, update=sumus.Transform(layout=raising)), "layout of custom"),
        (
            lambda: sumus.fedavg(WORK, server=sumus.ServerOptimizer(init=raising, update=SERVER.update)),
            "init of custom",
        ),
        (
            lambda: sumus.fedavg(
                WORK, server=sumus.ServerOptimizer(init=SERVER.init, update=SERVER.update, release=raising)
            ),
            "release of custom",
        ),
    ],
)
def test_a_part_that_raises_before_the_first_round_is_named_too(
    algorithm: Callable[[], sumus.Algorithm], words: str
) -> None:
    with pytest.raises(sumus.SumusError, match=words):
        run(algorithm())


@pytest.mark.parametrize("executor", ["autograd", "sequential", "vectorized:2"])
def test_a_part_that_raises_later_keeps_the_rounds_before(executor: str) -> None:
    late = replace(WORK, lr=sumus.schedules.Schedule(at=lambda number: [0.1, 0.1][number]))
    with pytest.raises(sumus.UsageError, match="the rate of custom.*IndexError") as error:
        run(sumus.fedavg(late), rounds=5, executor=executor)
    assert len(error.value.history.rounds) == 2
    assert error.value.checkpoint is not None


def test_in_another_process_it_is_the_same() -> None:
    late = with_rules(finish=after(3, WORK.rules.finish))
    with pytest.raises(sumus.UsageError, match="client [0-3]: finish of custom.*KeyError") as error:
        run(sumus.fedavg(late), rounds=5, workers=2)
    assert error.value.history is not None


def test_an_error_that_is_not_sumus_own_keeps_the_history_too() -> None:
    class Odd(sumus.Population):
        def sent(self, results: Any) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as error:
        run(sumus.fedavg(WORK), people=Odd(range(4), people().__getitem__))
    assert len(error.value.history.rounds) == 0  # pyright: ignore[reportAttributeAccessIssue]


# ── numbers that no leaf holds ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("executor", ["autograd", "sequential", "vectorized:2"])
@pytest.mark.parametrize(
    "work",
    [
        sumus.sgd(lr=1e200, batch_size=4),
        sumus.sgd(lr=1e200, momentum=0.9, batch_size=4),
        sumus.sgd(lr=0.1, weight_decay=1e200, batch_size=4),
        sumus.sgd(lr=0.1, clip_norm=1e200, batch_size=4),
        sumus.adam(lr=1e200, batch_size=4),
    ],
    ids=repr,
)
def test_a_number_that_the_models_dtype_does_not_hold_is_said_of_the_client(
    work: sumus.ClientWork, executor: str
) -> None:
    with pytest.raises(sumus.SumusError, match="client [0-3]: (a local step of sgd.*float32|the update is not finite)"):
        run(sumus.fedavg(work), executor=executor)


# ── the model and its loss ───────────────────────────────────────────────────────────────────────────────────────────


class Reentrant(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(torch.relu, super().forward(inputs), use_reentrant=True)


class Fussy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.large = bool((values.abs() > 50).any())
        return values * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 1 / 0 if ctx.large else grads[0]


class Large(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return Fussy.apply(super().forward(inputs))


class Overwritten(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        squashed = torch.sigmoid(super().forward(inputs))
        squashed.add_(1)  # the backward pass needs what it was
        return squashed


class Hooked(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        if outputs.requires_grad:
            outputs.register_hook(raising)
        return outputs


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize(
    ("net", "words"),
    [(Reentrant, "use_reentrant"), (Overwritten, "inplace operation"), (Hooked, "a mistake")],
)
def test_a_backward_pass_that_fails_names_the_client(net: Callable[..., Any], words: str) -> None:
    with pytest.raises(sumus.TaskError, match=f"client [0-3]: the backward pass .*{words}") as error:
        run(sumus.fedavg(WORK), lambda: net(4, 2))
    assert len(error.value.history.rounds) == 0


def test_a_backward_pass_that_fails_for_one_client_names_that_one_and_keeps_the_rounds_before() -> None:
    with pytest.raises(sumus.TaskError, match="client 3: the backward pass .*ZeroDivisionError") as error:
        run(sumus.fedavg(WORK), lambda: Large(4, 2), people=people(1000.0), pacing=sumus.Pacing(cohort=1), rounds=20)
    assert 0 < len(error.value.history.rounds) < 20


def test_the_gradient_that_a_work_asks_for_is_guarded_too() -> None:
    with pytest.raises(sumus.TaskError, match="client 3: the backward pass"):
        run(sumus.scaffold(WORK, option=1), lambda: Large(4, 2), people=people(1000.0))


def test_central_data_that_the_model_does_not_take_is_named() -> None:
    class Picky(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) / (1 if len(inputs) < 20 else raising())

    central = (np.zeros((40, 4), "float32"), np.zeros(40, "int64"))
    with pytest.raises(sumus.TaskError, match=r"Evaluation\(central=\): the model or its loss failed"):
        run(sumus.fedavg(WORK), lambda: Picky(4, 2), evaluate=sumus.Evaluation(central=central))


# ── sparse gradients ─────────────────────────────────────────────────────────────────────────────────────────────────


class Words(nn.Module):
    def __init__(self, kind: str, sparse: bool) -> None:
        super().__init__()
        self.words = getattr(nn, kind)(11, 4, sparse=sparse)
        self.out = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.words(inputs)
        return self.out(found if found.dim() == 2 else found.mean(1))


ALGORITHMS: dict[str, Callable[[], sumus.Algorithm]] = {
    "sgd": lambda: sumus.fedavg(WORK),
    "momentum": lambda: sumus.fedavg(sumus.sgd(lr=0.1, momentum=0.9, nesterov=True)),
    "decay": lambda: sumus.fedavg(sumus.sgd(lr=0.1, weight_decay=0.01)),
    "clip": lambda: sumus.fedavg(sumus.sgd(lr=0.1, clip_norm=0.1)),
    "adam": lambda: sumus.fedavg(sumus.adam(lr=0.01)),
    "adamw": lambda: sumus.fedavg(sumus.adamw(lr=0.01)),
    "fedprox": lambda: sumus.fedprox(WORK, mu=0.1),
    "scaffold": lambda: sumus.scaffold(WORK),
    "scaffold, by the whole gradient": lambda: sumus.scaffold(WORK, option=1),
    "feddyn": lambda: sumus.feddyn(WORK, alpha=0.1),
    "fednova": lambda: sumus.fednova(WORK),
}


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sparse_gradients_give_what_dense_ones_give(algorithm: str, kind: str) -> None:
    draw = np.random.default_rng(0)
    readers = {who: (draw.integers(0, 11, (10, 3)), draw.integers(0, 2, 10)) for who in range(2)}
    sparse, dense = (
        run(ALGORITHMS[algorithm](), lambda sparse=sparse: Words(kind, sparse), people=readers, rounds=1)
        for sparse in (True, False)
    )
    for name, leaf in dense.model.items():  # the order in which rows are added up is another
        torch.testing.assert_close(sparse.model[name], leaf, rtol=0, atol=1e-6)
