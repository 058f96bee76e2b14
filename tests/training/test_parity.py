"""Parity: however clients are trained, captured or stacked, each gets what autograd gives it, one client after the other.

The reference is the sequential executor by autograd, which `test_sequential.py` holds to torch's own optimizers. In float64
the others may differ from it by rounding alone, 1e-9 over five steps. In float32 a step may lie four times as far from the
exact one (the same step in float64) as autograd's does.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sumus
from sumus.aggregate import BUFFERS
from sumus.algorithms.feddyn import dynamic
from sumus.algorithms.fednova import normalized
from sumus.algorithms.fedprox import prox
from sumus.algorithms.scaffold import control
from sumus.executors.executor import ClientAssignment, Executor, Trained
from sumus.executors.sequential import SequentialExecutor
from sumus.executors.vectorized import VectorizedExecutor
from sumus.metrics import IGNORED
from sumus.rng import key
from sumus.training import losses
from sumus.training.program import Program
from sumus.types import Broadcast, Tree
from sumus.work import ClientRules, ClientWork, adam_rule

Examples = tuple[Tensor, Tensor]
Make = Callable[[Program, ClientWork], Executor]

FEATURES, LENGTH, SIDE, WORDS, CLASSES = 6, 3, 6, 11, 3
BATCH, STEPS = 4, 5
SIZES = (8, 17, 2, 3)
"""Whole batches, a batch of one at the end, two clients below a batch; in no order. One stack takes them all."""


# ── the models ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Residual(nn.Module):
    """A convolutional block around which its input flows, with group norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(2, channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(2, channels),
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(images + self.body(images))


class Recurrent(nn.Module):
    """The last output of a recurrent layer, read out."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.out = nn.Linear(width, CLASSES)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.out(self.layer(sequences)[0][:, -1])


class Encoder(nn.Module):
    """Torch's own transformer layer; with dropout it is in `test_noise.py`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(FEATURES, 2, 8, dropout=0.0, batch_first=True)
        self.out = nn.Linear(FEATURES, CLASSES)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.out(self.layer(sequences).mean(1))


class Attention(nn.Module):
    """Causal self-attention by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.mixed = nn.Linear(FEATURES, 3 * FEATURES)
        self.out = nn.Linear(FEATURES, CLASSES)

    def forward(self, sequences: Tensor) -> Tensor:
        mixed = self.mixed(self.norm(sequences)).view(*sequences.shape[:2], 3, 2, FEATURES // 2)
        query, keys, values = mixed.transpose(1, 3).unbind(2)
        seen = functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
        return self.out(sequences + seen.transpose(1, 2).flatten(2)).mean(1)


class Averaged(nn.Module):
    """The mean of a text's word vectors, read out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 4, padding_idx=0)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.embed(words).mean(1))


class Tied(nn.Module):
    """Predicts each next word; words go in and come out by the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, WORDS, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(words))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


def resnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), Residual(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, CLASSES))


def factored() -> nn.Module:
    """Two layers and nothing between: the gradient of each is a product with the other."""
    return nn.Sequential(nn.Linear(FEATURES, 4, bias=False), nn.Linear(4, CLASSES))


def floats(*shape: int) -> Callable[[int, int], Examples]:
    def examples(count: int, seed: int) -> Examples:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(count, *shape, generator=draw), torch.randint(0, CLASSES, (count,), generator=draw)

    return examples


def texts(count: int, seed: int) -> Examples:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, n, (count, *k), generator=draw) for n, k in ((WORDS, (LENGTH,)), (CLASSES, ())))  # pyright: ignore


def next_words(count: int, seed: int) -> Examples:
    """The last target of each text is padding, and of every third text all of them."""
    draw = torch.Generator().manual_seed(seed)
    words, targets = (torch.randint(0, WORDS, (count, LENGTH), generator=draw) for _ in range(2))
    targets[:, -1] = IGNORED
    targets[2::3] = IGNORED
    return words, targets


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Examples]]] = {
    "mlp": (mlp, floats(FEATURES)),
    "factored": (factored, floats(FEATURES)),
    "cnn": (cnn, floats(2, SIDE, SIDE)),
    "group-norm resnet": (resnet, floats(2, SIDE, SIDE)),
    "gru": (lambda: Recurrent(nn.GRU(FEATURES, 4, batch_first=True), 4), floats(LENGTH, FEATURES)),
    "lstm": (lambda: Recurrent(nn.LSTM(FEATURES, 4, batch_first=True), 4), floats(LENGTH, FEATURES)),
    "two-way gru": (
        lambda: Recurrent(nn.GRU(FEATURES, 3, bidirectional=True, batch_first=True), 6),
        floats(LENGTH, FEATURES),
    ),
    "attention": (Attention, floats(LENGTH, FEATURES)),
    "embedding": (Averaged, texts),
    "tied": (Tied, next_words),
    "dropout": (with_dropout, floats(FEATURES)),
    "transformer": (Encoder, floats(LENGTH, FEATURES)),
}

LEAVES: dict[str, Mapping[str, Any]] = {
    "all shared": {},
    "frozen": {"0.*": "frozen"},
    "personal": {"2.*": "personal"},
    "frozen and personal": {"0.weight": "frozen", "2.bias": "personal"},
}


def sgd(**options: Any) -> ClientWork:
    return sumus.sgd(0.1, **{"steps": STEPS, "batch_size": BATCH, **options})


WORKS: dict[str, ClientWork] = {
    "sgd": sgd(),
    "momentum": sgd(momentum=0.9),
    "nesterov": sgd(momentum=0.9, nesterov=True),
    "decay": sgd(momentum=0.5, weight_decay=0.1),
    "clip": sgd(clip_norm=0.2),
    "nesterov, decay, clip": sgd(momentum=0.9, nesterov=True, weight_decay=0.1, clip_norm=0.2),
    "adam": sumus.adam(0.01, steps=STEPS, batch_size=BATCH, eps=1e-4, weight_decay=0.1),
    "adamw, clip": sumus.adamw(0.01, steps=STEPS, batch_size=BATCH, weight_decay=0.1, clip_norm=0.2),
    "fedprox": prox(sgd(momentum=0.9), mu=0.5),
    "fedprox, adam": prox(sumus.adam(0.01, steps=STEPS, batch_size=BATCH, eps=1e-4), mu=0.5),
    "scaffold 1": control(sgd(momentum=0.9), option=1),
    "scaffold 2": control(sgd(), option=2),
    "fednova": normalized(sgd(momentum=0.9)),
    "feddyn": dynamic(sgd(momentum=0.9), alpha=0.1),
}
"""A bias of attention's keys has no gradient but rounding. Adam with eps = 1e-8 makes steps of 1e-11 of that, decay or a prox
term makes gradients of these, and two steps later they are as large as any: a larger eps keeps rounding what it is."""

AUTOGRAD: Make = SequentialExecutor


def captured(program: Program, work: ClientWork) -> SequentialExecutor:
    return SequentialExecutor(program, work, captured=True)


def by_onednn(program: Program, work: ClientWork) -> SequentialExecutor:
    return SequentialExecutor(program, work, captured=True, onednn=True)


def stacked(stack: int) -> Make:
    return lambda program, work: VectorizedExecutor(program, work, stack=stack)


EXECUTORS: dict[str, Make] = {"captured": captured} | {f"stack of {k}": stacked(k) for k in (1, 2, 4, 8)}
FLOAT32: dict[str, Make] = {"captured": captured, "onednn": by_onednn, "stack of 4": stacked(4)}

OF_EVERY_MODEL = ("sgd", "nesterov, decay, clip", "adam", "scaffold 2")
OF_EVERY_WORK = ("dropout", "gru", "tied")
PAIRS = list(dict.fromkeys([*product(MODELS, OF_EVERY_MODEL), *product(OF_EVERY_WORK, WORKS)]))
"""Each model with some works, and each work with some models."""


# ── training some clients ────────────────────────────────────────────────────────────────────────────────────────────


def program_of(model: str, dtype: torch.dtype = torch.float64, leaves: Mapping[str, Any] | None = None) -> Program:
    """Drawn in float32 whatever the dtype, so that the same model is there in both."""

    def make() -> nn.Module:
        torch.manual_seed(1)
        return MODELS[model][0]().to(dtype)

    return Program(sumus.Task(make, losses.cross_entropy, leaves=leaves or {}))


def clients_of(model: str, sizes: Iterable[int] = SIZES, dtype: torch.dtype = torch.float64) -> dict[str, Examples]:
    clients: dict[str, Examples] = {}
    for number, count in enumerate(sizes):
        inputs, targets = MODELS[model][1](count, number)
        clients[f"{number}: {count}"] = (inputs.to(dtype) if inputs.is_floating_point() else inputs), targets
    return clients


def tree_like(tree: Tree, seed: object) -> Tree:
    """Numbers of the size of a small gradient."""
    draw = np.random.default_rng(list(key(seed)))
    return {name: (0.05 * draw.standard_normal(leaf.shape)).astype(leaf.dtype) for name, leaf in tree.items()}


def broadcast_of(program: Program, work: ClientWork) -> Broadcast:
    """The initial model, and a control variate that is not zero where the work takes one."""
    params = {name: program.initial[name] for name in program.shared}
    buffers = {name: program.initial[name] for name in program.buffers}
    extra = {part: tree_like(params, part) for part in work.rules.receives if part != "params"}
    return {"params": params, **({BUFFERS: buffers} if buffers else {}), **extra}


def state_of(program: Program, work: ClientWork, client: str) -> Mapping[str, Tree]:
    """What a client kept from an earlier round; half of them come for the first time."""
    if hash_of(client) % 2:
        return {}
    shared = {name: program.initial[name] for name in program.shared}
    first = work.rules.init({name: torch.from_numpy(leaf) for name, leaf in shared.items()})
    personal = {name: program.initial[name] + 0.01 for name in program.personal}
    return {name: tree_like(shared, client + name) for name in first} | ({"personal": personal} if personal else {})


def hash_of(client: str) -> int:
    return int(client.partition(":")[0])


def trained_by(
    executor: Executor,
    clients: Mapping[str, Examples],
    *,
    round_number: int = 0,
    most_steps: Mapping[str, int] | None = None,
    broadcast: Broadcast | None = None,
) -> dict[str, Trained]:
    program, work = executor.program, executor.work  # pyright: ignore[reportAttributeAccessIssue]
    assignments = [
        ClientAssignment(
            client,
            *examples,
            state_of(program, work, client),
            key(round_number, client),
            (most_steps or {}).get(client),
        )
        for client, examples in clients.items()
    ]
    results = list(executor.run(broadcast or broadcast_of(program, work), round_number, assignments))
    assert sorted(result.client for result in results) == sorted(clients)
    return {result.client: result for result in results}


def trees(result: Trained) -> dict[str, np.ndarray]:
    """Everything that a client sends and keeps, by path."""
    both = [("sent", result.parts), ("kept", result.state)]
    return {f"{k}/{part}/{n}": leaf for k, all_ in both for part, tree in all_.items() for n, leaf in tree.items()}


def bits(results: Mapping[str, Trained]) -> Any:
    return {
        who: ({path: leaf.tobytes() for path, leaf in trees(one).items()}, one.examples, one.metrics)
        for who, one in results.items()
    }


def assert_same(ours: Mapping[str, Trained], theirs: Mapping[str, Trained], atol: float = 1e-9) -> None:
    """Parts, kept states, examples and metrics."""
    assert ours.keys() == theirs.keys()
    for who, mine in ours.items():
        wanted = trees(theirs[who])
        assert trees(mine).keys() == wanted.keys()
        for path, leaf in trees(mine).items():
            assert leaf.dtype == wanted[path].dtype, path
            np.testing.assert_allclose(leaf, wanted[path], rtol=0, atol=atol, err_msg=f"{who} {path}")
        assert mine.examples == theirs[who].examples
        assert mine.metrics.keys() == theirs[who].metrics.keys()
        for name, (total, count) in mine.metrics.items():
            assert count == theirs[who].metrics[name][1]
            assert total == pytest.approx(theirs[who].metrics[name][0], rel=0, abs=atol * max(1, count)), name


def assert_parity(
    make: Make,
    model: str,
    work: ClientWork,
    leaves: Mapping[str, Any] | None = None,
    sizes: Iterable[int] = SIZES,
    **options: Any,
) -> None:
    clients = clients_of(model, sizes)
    wanted = trained_by(AUTOGRAD(program_of(model, leaves=leaves), work), clients, **options)
    executor = make(program_of(model, leaves=leaves), work)
    assert_same(trained_by(executor, clients, **options), wanted)
    assert getattr(executor, "refused", None) is None
    for one in wanted.values():
        assert all(np.isfinite(leaf).all() for leaf in trees(one).values())


# ── in float64, to rounding ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("executor", ["captured", "stack of 4"])
@pytest.mark.parametrize(("model", "work"), PAIRS)
def test_every_model_and_every_work_trains_as_by_autograd(model: str, work: str, executor: str) -> None:
    assert_parity(EXECUTORS[executor], model, WORKS[work])


@pytest.mark.parametrize("model", ["dropout", "gru"])
@pytest.mark.parametrize("executor", ["stack of 1", "stack of 2", "stack of 8"])
def test_whatever_the_stack_clients_train_as_by_autograd(executor: str, model: str) -> None:
    """One client more than the largest stack takes, of one example."""
    assert_parity(EXECUTORS[executor], model, WORKS["momentum"], sizes=(*SIZES, *SIZES, 1))


@pytest.mark.parametrize("executor", ["captured", "stack of 4"])
@pytest.mark.parametrize("leaves", [name for name in LEAVES if name != "all shared"])
@pytest.mark.parametrize("work", ["momentum", "adamw, clip", "fedprox", "scaffold 1", "feddyn"])
def test_frozen_and_personal_leaves_train_as_by_autograd(work: str, leaves: str, executor: str) -> None:
    assert_parity(EXECUTORS[executor], "mlp", WORKS[work], LEAVES[leaves])


LENGTHS: dict[str, dict[str, Any]] = {
    "whole clients at once": {"batch_size": None, "steps": 3},
    "one epoch of one batch": {"batch_size": None, "steps": None},
    "two epochs": {"steps": None, "epochs": 2},
    "batches above every client": {"batch_size": 64, "steps": 3},
    "batches of one": {"batch_size": 1, "steps": 3},
    "one step": {"steps": 1},
    "many passes": {"steps": 13},
}


@pytest.mark.parametrize("executor", ["captured", "stack of 4"])
@pytest.mark.parametrize("length", LENGTHS)
def test_however_long_clients_train_and_however_their_examples_are_cut(length: str, executor: str) -> None:
    """Where clients end at different steps, the stack shrinks as they do."""
    assert_parity(EXECUTORS[executor], "dropout", sgd(momentum=0.9, **LENGTHS[length]))


@pytest.mark.parametrize("executor", ["captured", "stack of 4"])
def test_stragglers_take_the_steps_they_have_time_for(executor: str) -> None:
    clients = clients_of("mlp")
    limits = dict(zip(clients, (1, 2, 5, 3), strict=True))
    for work in (WORKS["momentum"], WORKS["fednova"], WORKS["scaffold 2"], sgd(steps=None, epochs=3)):
        assert_parity(EXECUTORS[executor], "mlp", work, most_steps=limits)


@pytest.mark.parametrize(("executor", "count"), [("stack of 4", 1), ("stack of 4", 7), ("stack of 8", 3)])
def test_stacks_need_not_be_full(count: int, executor: str) -> None:
    sizes = [3 + 2 * number for number in range(count)]
    assert_parity(EXECUTORS[executor], "dropout", sgd(steps=None, epochs=1, momentum=0.9), sizes=sizes)


@pytest.mark.parametrize("executor", ["captured", "stack of 4"])
def test_the_rate_is_that_of_the_round(executor: str) -> None:
    """One graph serves every rate."""
    work = sumus.sgd(sumus.schedules.steps(0.4, (5,), factor=0.5), momentum=0.9, steps=STEPS, batch_size=BATCH)
    clients, ours = clients_of("mlp"), EXECUTORS[executor](program_of("mlp"), work)
    theirs = AUTOGRAD(program_of("mlp"), work)
    for number in (4, 5, 4):
        assert_same(trained_by(ours, clients, round_number=number), trained_by(theirs, clients, round_number=number))


@pytest.mark.parametrize("executor", ["captured", "stack of 4"])
def test_an_own_rule_and_an_own_correction_train_as_by_autograd(executor: str) -> None:
    def towards_each_other(grads: Any, params: Any, broadcast: Any, state: Any) -> Any:
        middle = sum(leaf.sum() for leaf in params.values())
        return {name: grad + 0.01 * middle for name, grad in grads.items()}

    work = ClientWork(
        optimizer=adam_rule(),
        lr=sgd().lr,
        steps=STEPS,
        batch_size=BATCH,
        rules=ClientRules(correct=towards_each_other),
        clip_norm=1.0,
    )
    assert_parity(EXECUTORS[executor], "mlp", work)


@pytest.mark.parametrize("executor", ["captured", "stack of 4"])
def test_a_diverging_client_spoils_no_other(executor: str) -> None:
    clients = clients_of("mlp", (8, 8, 8, 8))
    wanted = trained_by(AUTOGRAD(program_of("mlp"), WORKS["momentum"]), clients)
    wild = {**clients, "1: 8": (clients["1: 8"][0] * math.inf, clients["1: 8"][1])}
    ours = EXECUTORS[executor](program_of("mlp"), WORKS["momentum"])
    found = trained_by(ours, wild)
    assert np.isnan(found["1: 8"].parts["params"]["0.weight"]).any()
    calm = [who for who in clients if who != "1: 8"]
    assert_same({who: found[who] for who in calm}, {who: wanted[who] for who in calm})
    assert_same(trained_by(ours, clients), wanted)  # nor a later round, in the same memory


# ── in float32, within a few times autograd's own rounding ───────────────────────────────────────────────────────────


def moved(result: Trained) -> np.ndarray:
    """All leaves that were sent, as one vector."""
    leaves = [leaf.astype(np.float64).reshape(-1) for _, leaf in sorted(trees(result).items())]
    return np.concatenate(leaves)


def apart(one: Trained, other: Trained) -> float:
    return float(np.linalg.norm(moved(one) - moved(other)))


@pytest.mark.parametrize("executor", FLOAT32)
@pytest.mark.parametrize("model", [name for name in MODELS if name != "dropout"])
def test_a_step_in_float32_is_about_as_exact_as_autograds(model: str, executor: str) -> None:
    """From two points: where training begins, and where five steps lead. Whole batches and padded ones."""
    work, later = sgd(steps=1), AUTOGRAD(program_of(model), WORKS["momentum"])
    first = broadcast_of(later.program, later.work)  # pyright: ignore[reportAttributeAccessIssue]
    far = next(iter(trained_by(later, clients_of(model, (8,))).values())).parts["params"]
    makes = ((AUTOGRAD, torch.float64), (AUTOGRAD, torch.float32), (FLOAT32[executor], torch.float32))
    executors = [(make(program_of(model, dtype), work), clients_of(model, dtype=dtype)) for make, dtype in makes]
    for start in (first["params"], {name: leaf - far[name] for name, leaf in first["params"].items()}):
        point: Broadcast = {"params": {name: leaf.astype(np.float32) for name, leaf in start.items()}}
        exact, eager, ours = (trained_by(each, clients, broadcast=point) for each, clients in executors)
        for who, wanted in exact.items():
            floor = 1e-7 * float(np.linalg.norm(moved(wanted)))
            assert apart(ours[who], wanted) <= 4 * apart(eager[who], wanted) + floor
            (total, count), (right, _) = ours[who].metrics["loss"], wanted.metrics["loss"]
            assert abs(total - right) <= 1e-6 * count * max(1.0, abs(right) / count)


@pytest.mark.parametrize("executor", FLOAT32)
@pytest.mark.parametrize("work", WORKS)
def test_a_step_of_every_work_in_float32_is_about_as_exact_as_autograds(work: str, executor: str) -> None:
    once = dataclasses.replace(WORKS[work], steps=1)
    exact, eager, ours = (
        trained_by(make(program_of("mlp", dtype), once), clients_of("mlp", dtype=dtype))
        for make, dtype in ((AUTOGRAD, torch.float64), (AUTOGRAD, torch.float32), (FLOAT32[executor], torch.float32))
    )
    for who, wanted in exact.items():
        floor = 1e-7 * float(np.linalg.norm(moved(wanted)))
        assert apart(ours[who], wanted) <= 4 * apart(eager[who], wanted) + floor


# ── who else trains changes nothing ──────────────────────────────────────────────────────────────────────────────────

ALONE: dict[str, Make] = {"autograd": AUTOGRAD, "captured": captured}


@pytest.mark.parametrize("model", ["dropout", "gru"])
@pytest.mark.parametrize("executor", ALONE)
def test_one_by_one_company_order_and_earlier_rounds_change_no_bit(executor: str, model: str) -> None:
    clients, work = clients_of(model), WORKS["adam"]
    together = bits(trained_by(ALONE[executor](program_of(model), work), clients))
    veteran = ALONE[executor](program_of(model), work)
    trained_by(veteran, clients_of(model, (5, 12)), round_number=3)
    assert bits(trained_by(veteran, dict(reversed(clients.items())))) == together
    for who, examples in clients.items():
        fresh = ALONE[executor](program_of(model), work)
        assert bits(trained_by(fresh, {who: examples}))[who] == together[who]


@pytest.mark.parametrize(("model", "stack"), [("dropout", 2), ("tied", 4)])
def test_the_same_stacks_again_give_the_same_bits_whatever_trained_between(model: str, stack: int) -> None:
    clients, work = clients_of(model), WORKS["adam"]
    executor = stacked(stack)(program_of(model), work)
    once = bits(trained_by(executor, clients))
    trained_by(executor, clients_of(model, (5, 12, 2)), round_number=3)
    assert bits(trained_by(executor, clients)) == once
    assert bits(trained_by(stacked(stack)(program_of(model), work), clients)) == once


@pytest.mark.parametrize(("model", "stack"), [("dropout", 4), ("tied", 2)])
def test_in_stacks_company_and_order_change_rounding_alone(model: str, stack: int) -> None:
    clients, work = clients_of(model), WORKS["adam"]
    executor = stacked(stack)(program_of(model), work)
    together = trained_by(executor, clients)
    assert_same(trained_by(executor, dict(reversed(clients.items()))), together)
    for who, examples in clients.items():
        assert_same(trained_by(executor, {who: examples}), {who: together[who]})


@pytest.mark.parametrize("executor", [*ALONE, "stack of 2"])
def test_results_are_the_clients_own_and_stay_as_they_were(executor: str) -> None:
    """What one client sent lies in no memory that the next one's training writes."""
    make = {**ALONE, **EXECUTORS}[executor]
    program, work = program_of("mlp", leaves=LEAVES["personal"]), WORKS["feddyn"]
    assignments = [
        ClientAssignment(who, *examples, {}, key(who)) for who, examples in clients_of("mlp", (9, 8, 7, 6, 5)).items()
    ]
    seen: list[tuple[Trained, Any]] = []
    for result in make(program, work).run(broadcast_of(program, work), 0, assignments):
        seen.append((result, bits({"it": result})))
    assert all(bits({"it": result}) == as_it_was for result, as_it_was in seen)


@pytest.mark.parametrize("executor", [*ALONE, "stack of 2"])
def test_data_and_broadcast_stay_as_they_were(executor: str) -> None:
    make, clients = {**ALONE, **EXECUTORS}[executor], clients_of("group-norm resnet")
    before = {who: tuple(side.clone() for side in examples) for who, examples in clients.items()}
    program = program_of("group-norm resnet")
    broadcast = broadcast_of(program, WORKS["momentum"])
    sent = {name: leaf.copy() for name, leaf in broadcast["params"].items()}
    trained_by(make(program, WORKS["momentum"]), clients, broadcast=broadcast)
    assert all(torch.equal(*sides) for who in clients for sides in zip(clients[who], before[who], strict=True))
    assert all(np.array_equal(leaf, sent[name]) for name, leaf in broadcast["params"].items())


# ── how clients are grouped ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("make", "sizes", "groups"),
    [
        (AUTOGRAD, (5, 9, 1), [[0], [1], [2]]),
        (stacked(2), (5, 9, 1, 9, 2), [[1, 3], [0, 4], [2]]),
        (stacked(4), (5, 6, 3, 1, 4), [[1, 0, 4, 2], [3]]),
        (stacked(4), (), []),
    ],
)
def test_stacks_are_of_clients_of_nearly_one_size_the_largest_first(
    make: Make, sizes: Sequence[int], groups: list[list[int]]
) -> None:
    assert make(program_of("mlp"), sgd()).groups(sizes) == groups
