"""What a run reports: a figure that is no number has a name, and figures that a batch or a second reading changes are said to."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import sumus
from tests.simulating import simulated

X = np.random.default_rng(0).normal(size=(12, 4)).astype("f4")
Y = (X.sum(1) > 0).astype("i8")
PEOPLE = dict.fromkeys(range(4), (X, Y))


def measured_on(people: Any, metrics: Any = None, loss: Any = sumus.losses.cross_entropy, **more: Any) -> sumus.History:
    task = sumus.Task(more.pop("model", lambda: nn.Linear(4, 2)), loss, metrics or {})
    work = more.pop("work", sumus.sgd(lr=0.1))
    evaluate = more.pop("evaluate", sumus.Evaluation(seen=len(people)))
    return simulated(task, sumus.fedavg(work), people, more.pop("rounds", 1), evaluate=evaluate, progress=False, **more)


# ── NaN ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def over_known(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over known targets, 0/0 where a batch has none; its gradient stays finite."""
    return functional.cross_entropy(outputs, targets, ignore_index=-100).expand(len(outputs))


@pytest.mark.parametrize("way", [{}, {"through": "wire"}, {"workers": 2}, {"edge_groups": 2}], ids=str)
def test_a_loss_that_is_nan_names_its_client_whichever_way_it_trains(way: dict[str, Any]) -> None:
    people = {**PEOPLE, 3: (X, np.full(12, -100))}
    with pytest.raises(sumus.SumusError, match=r"client 3.*metrics\[loss\]"):
        measured_on(people, loss=over_known, **way)
    if "workers" in way:
        return
    assert math.isfinite(measured_on(PEOPLE, loss=over_known, **way).rounds[0].loss)


def hits(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(-1) == targets).double() / (targets >= 0).double().mean()


@pytest.mark.parametrize("way", [{}, {"through": "wire"}], ids=str)
@pytest.mark.parametrize("source", ["seen", "unseen"])
def test_nan_of_one_client_is_named_in_an_evaluation_and_is_its_worst(source: str, way: dict[str, Any]) -> None:
    unknown = (X, np.full(12, -100))
    people = {**PEOPLE, "eve": unknown} if source == "seen" else PEOPLE
    evaluate = (
        sumus.Evaluation(seen=5) if source == "seen" else sumus.Evaluation(unseen={"ann": (X, Y), "eve": unknown})
    )
    history = measured_on(people, {"hits": hits}, evaluate=evaluate, **way)
    spread = history.spreads[source]["hits"]
    assert (spread.worst_client, math.isnan(spread.worst), math.isnan(history.metrics["hits"])) == ("eve", True, True)
    assert [note for note in history.notes if "'hits' is NaN on client 'eve'" in note]
    assert math.isfinite(history.metrics["loss"])


def test_nan_of_central_data_is_named_and_reaches_no_target() -> None:
    evaluate = sumus.Evaluation(central=(X, np.full(12, -100)), target={"hits": 0.0})
    history = measured_on(PEOPLE, {"hits": hits}, evaluate=evaluate, rounds=2)
    assert (len(history.rounds), history.stopped) == (2, "rounds")
    assert [note for note in history.notes if "'hits' is NaN on the central held-out data" in note]


def test_many_nans_are_not_many_notes() -> None:
    people = {k: (X, np.full(12, -100)) for k in range(20)}
    history = measured_on(people, {"hits": hits}, evaluate=sumus.Evaluation(seen=20), rounds=2)
    assert 0 < len(history.notes) <= 10


# ── counts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def counting(sums: Callable[[torch.Tensor], torch.Tensor], counts: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda outputs, targets: (sums(targets.double()), counts(targets.double()))


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (counting(torch.ones_like, lambda t: 0.2 + 0.5 * t), r"metric 'own' counts 0\.\d predictions for an example"),
        (counting(torch.ones_like, lambda t: -torch.ones_like(t)), "counts -1 predictions"),
        (counting(torch.ones_like, lambda t: t + math.nan), "counts nan predictions"),
        (counting(torch.ones_like, lambda t: t + math.inf), "counts inf predictions"),
        (counting(torch.ones_like, torch.zeros_like), "returned sums of .* all its counts are 0"),
        (counting(torch.ones_like, lambda t: t[:1]), r"returned \(1,\) for a batch"),
        (lambda o, t: o.double().sum(1) * 1j, "complex numbers"),
        (lambda o, t: o, r"returned \(2, 2\) for a batch of 2"),
        (lambda o, t: 0.5, "returned float"),
    ],
)
def test_what_no_metric_can_count_is_refused(metric: Any, said: str) -> None:
    with pytest.raises(sumus.TaskError, match=said):
        measured_on(PEOPLE, {"own": metric})


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64])
def test_whole_counts_of_any_dtype_are_counted(dtype: torch.dtype) -> None:
    def of_ones(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ((outputs.argmax(-1) == targets) & (targets == 1)).to(dtype), (targets == 1).to(dtype)

    history = measured_on(PEOPLE, {"recall": of_ones}, work=sumus.sgd(lr=0.0))
    model = nn.Linear(4, 2)
    model.load_state_dict(history.model)
    found = model(torch.from_numpy(X)).argmax(-1).numpy()
    assert history.metrics["recall"] == pytest.approx((found == 1)[Y == 1].mean())


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def contrastive(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Each example against the others of its batch."""
    z = functional.normalize(outputs, dim=1)
    return functional.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")


def centred(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - outputs.mean(0)).square().sum(1)


def spread_over(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """By mistake: outputs (B, 1) less targets (B,) are (B, B)."""
    return (outputs[:, :1] - targets).square().mean(1)


def ranked(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs[:, 0].argsort().argsort().double() / len(outputs)


@pytest.mark.parametrize("loss", [contrastive, centred, spread_over])
def test_a_loss_within_a_batch_is_measured_in_batches_of_the_asked_size_or_said_to_be_another(loss: Any) -> None:
    people = {k: (np.tile(X, (10, 1)), np.tile(Y, 10)) for k in range(2)}
    work = sumus.sgd(lr=0.0, batch_size=8)
    plain = measured_on(people, loss=loss, work=work)
    assert [note for note in plain.notes if "training uses batches of 8, but evaluation uses batches of 512" in note]
    asked = measured_on(people, loss=loss, work=work, evaluate=sumus.Evaluation(seen=2, batch_size=8))
    assert not asked.notes
    assert asked.metrics["loss"] == pytest.approx(asked.rounds[0].loss, rel=0.15)


def test_a_metric_within_a_batch_is_said_to_be_one_and_a_plain_one_is_not() -> None:
    history = measured_on(PEOPLE, {"rank": ranked})
    assert [note for note in history.notes if "compares the examples of a batch" in note]
    assert not measured_on(PEOPLE, {"accuracy": sumus.metrics.accuracy}).notes
    drawn = measured_on(PEOPLE, {"luck": lambda outputs, targets: torch.rand(len(outputs))})
    assert not [note for note in drawn.notes if "compares the examples" in note]
    normed = measured_on(
        PEOPLE, model=lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    )
    assert not [note for note in normed.notes if "compares the examples" in note]


@pytest.mark.parametrize("size", [0, -1, 2.5, "8"])
def test_an_evaluation_measures_at_least_one_example_at_once(size: Any) -> None:
    with pytest.raises(sumus.SumusError, match="batch_size"):
        sumus.Evaluation(seen=1, batch_size=size)


# ── views ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Views(torch.utils.data.Dataset[Any]):
    """A random view of an example at each access, as torchvision's transforms give."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return X[index] + np.random.normal(size=4).astype("f4"), Y[index]


def noisy(inputs: Any, targets: Any) -> Any:
    return inputs + np.random.normal(size=inputs.shape).astype("f4"), targets


@pytest.mark.parametrize("kind", ["items", "loader", "preparation"])
def test_random_views_are_said_to_be_drawn_once(kind: str) -> None:
    people = {
        "items": lambda: sumus.Population.from_dataset(Views(), by=[0] * 12),
        "loader": lambda: sumus.Population([0], lambda client: noisy(X, Y)),
        "preparation": lambda: {0: (X, Y)},
    }[kind]()
    task = sumus.Task(
        lambda: nn.Linear(4, 2), sumus.losses.cross_entropy, prepare=noisy if kind == "preparation" else None
    )
    history = sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=0.1)), people, 1, out=sumus.Output(progress=False))
    assert [note for note in history.notes if "client 0 gives different examples each time it is read" in note]


def test_views_that_a_model_draws_are_new_each_time_and_need_no_note() -> None:
    seen = set[float]()

    class Noisy(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            inputs = inputs + torch.randn_like(inputs) if self.training else inputs
            seen.update(inputs[:, 0].tolist() if self.training else [])
            return super().forward(inputs)

    history = measured_on(
        PEOPLE, model=lambda: Noisy(4, 2), work=sumus.sgd(lr=0.1, epochs=3), rounds=2, executor="autograd"
    )
    assert len(seen) >= 12 * 3 * 2
    assert not [note for note in history.notes if "each time it is read" in note]


# ── a personal parameter that nothing trains ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("executor", ["autograd", "sequential"])
def test_a_personal_parameter_without_a_gradient_stays_as_it_was(executor: str) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        model[0].requires_grad_(False)
        return model

    task = sumus.Task(net, sumus.losses.cross_entropy, leaves={"0.*": "personal"})
    history = sumus.simulate(
        task, sumus.fedavg(sumus.sgd(lr=0.1)), PEOPLE, 2, compute=executor, out=sumus.Output(progress=False)
    )
    assert torch.equal(history.model["0.weight"], net()[0].weight)
    frozen = sumus.Task(net, sumus.losses.cross_entropy)
    other = sumus.simulate(
        frozen, sumus.fedavg(sumus.sgd(lr=0.1)), PEOPLE, 2, compute=executor, out=sumus.Output(progress=False)
    )
    assert torch.equal(history.model["1.weight"], other.model["1.weight"])
