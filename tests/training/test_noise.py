"""Keyed noise: what a model draws comes from its client's key, step and call, and so is the same however it is trained."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import sumus
from sumus.executors.executor import ClientAssignment, Executor, Trained
from sumus.executors.sequential import SequentialExecutor
from sumus.executors.vectorized import VectorizedExecutor
from sumus.rng import key
from sumus.training import losses
from sumus.training.noise import KEYED, KeyedNoise, NoiseShape, RandomOperatorWatch, dropout_gradient
from sumus.training.program import Program
from sumus.training.step import local_step, step_values
from sumus.training.trace import trace_step
from sumus.work import ClientWork

FEATURES, LENGTH, CLASSES = 6, 3, 3
WORK = sumus.sgd(0.2, steps=3, batch_size=4, momentum=0.9)

Forward = Callable[[nn.ModuleDict, Tensor], Tensor]


# ── models that draw ─────────────────────────────────────────────────────────────────────────────────────────────────


class Model(nn.Module):
    """Some layers and a forward pass over them."""

    def __init__(self, forward: Forward, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self._forward = forward

    def forward(self, inputs: Tensor) -> Tensor:
        return self._forward(self.layers, inputs)


def vectors(forward: Forward) -> Callable[[], nn.Module]:
    return lambda: Model(forward, first=nn.Linear(FEATURES, 8), out=nn.Linear(8, CLASSES))


def sequences(layer: Callable[[], nn.Module], forward: Forward, width: int) -> Callable[[], nn.Module]:
    return lambda: Model(forward, layer=layer(), out=nn.Linear(width, CLASSES))


def attended(layers: nn.ModuleDict, inputs: Tensor) -> Tensor:
    query, keys, values = layers["layer"](inputs).view(*inputs.shape[:2], 3, 2, 3).transpose(1, 3).unbind(2)
    seen = functional.scaled_dot_product_attention(query, keys, values, dropout_p=0.3)
    return layers["out"](seen.transpose(1, 2).flatten(2).mean(1))


def recurrent(layers: nn.ModuleDict, inputs: Tensor) -> Tensor:
    return layers["out"](layers["layer"](inputs)[0][:, -1])


def transformed(layers: nn.ModuleDict, inputs: Tensor) -> Tensor:
    return layers["out"](layers["layer"](inputs).mean(1))


def length_first(layers: nn.ModuleDict, inputs: Tensor) -> Tensor:
    return layers["out"](layers["layer"](inputs.transpose(0, 1)).mean(0))


DRAWING: dict[str, Callable[[], nn.Module]] = {
    "nn.Dropout": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.4), nn.Linear(8, CLASSES)),
    "nn.Dropout, of everything": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(1.0), nn.Linear(8, CLASSES)),
    "nn.Dropout, in place": lambda: nn.Sequential(
        nn.Linear(FEATURES, 8), nn.Dropout(0.4, inplace=True), nn.Linear(8, CLASSES)
    ),
    "nn.AlphaDropout": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.AlphaDropout(0.4), nn.Linear(8, CLASSES)),
    "F.dropout, twice": vectors(lambda m, x: m["out"](functional.dropout(m["first"](functional.dropout(x, 0.3)), 0.3))),
    "of weights": vectors(lambda m, x: m["out"](functional.linear(x, functional.dropout(m["first"].weight, 0.3)))),
    "nn.Dropout2d": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 1, 3)),
        nn.Conv2d(2, 8, 1),
        nn.Dropout2d(0.4),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    ),
    "torch.rand_like": vectors(lambda m, x: m["out"](m["first"](x + torch.rand_like(x)))),
    "torch.randn_like": vectors(lambda m, x: m["out"](m["first"](x + 0.3 * torch.randn_like(x)))),
    "torch.rand": vectors(lambda m, x: m["out"](m["first"](x + torch.rand(x.shape, dtype=x.dtype)))),
    "torch.randn, for all rows": vectors(lambda m, x: m["out"](m["first"](x + torch.randn(FEATURES, dtype=x.dtype)))),
    "torch.bernoulli": vectors(lambda m, x: m["out"](m["first"](x * torch.bernoulli(torch.sigmoid(x))))),
    "bernoulli_": vectors(lambda m, x: m["out"](m["first"](x * torch.empty_like(x[:, :1]).bernoulli_(0.7)))),
    "normal_ and uniform_": vectors(
        lambda m, x: m["out"](m["first"](x * torch.empty_like(x).normal_(1, 0.2) + torch.empty_like(x).uniform_(-1, 1)))
    ),
}
"""Of vectors."""
IN_SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "attention": sequences(lambda: nn.Linear(FEATURES, 3 * FEATURES), attended, FEATURES),
    "transformer": sequences(
        lambda: nn.TransformerEncoderLayer(FEATURES, 2, 8, dropout=0.3, batch_first=True), transformed, FEATURES
    ),
    "lstm, between layers": sequences(
        lambda: nn.LSTM(FEATURES, 4, num_layers=2, dropout=0.4, batch_first=True), recurrent, 4
    ),
    "transformer, length first": sequences(
        lambda: nn.TransformerEncoderLayer(FEATURES, 2, 8, dropout=0.3), length_first, FEATURES
    ),
}

UNKEYED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torch.multinomial": (
        vectors(lambda m, x: m["out"](m["first"](x)[:, torch.multinomial(torch.ones(8), 8)])),
        "multinomial",
    ),
    "torch.randperm": (vectors(lambda m, x: m["out"](m["first"](x)[:, torch.randperm(8)])), "randperm"),
    "torch.randint": (vectors(lambda m, x: m["out"](m["first"](x) * torch.randint(0, 3, (8,)))), "randint"),
    "exponential_": (vectors(lambda m, x: m["out"](functional.gumbel_softmax(m["first"](x)))), "exponential_"),
    "nn.RReLU": (vectors(lambda m, x: m["out"](functional.rrelu(m["first"](x), training=True))), "rrelu"),
    "checkpointed dropout": (
        vectors(
            lambda m, x: m["out"](
                checkpoint(lambda h: functional.dropout(m["first"](h), 0.4), x, use_reentrant=False)  # pyright: ignore
            )
        ),
        "checkpoint",
    ),
}
SILENT: dict[str, Callable[[], nn.Module]] = {
    "no draw": vectors(lambda m, x: m["out"](torch.relu(m["first"](x)))),
    "dropout of nothing": vectors(lambda m, x: m["out"](functional.dropout(m["first"](x), 0.0))),
    "dropout in eval": vectors(lambda m, x: m["out"](functional.dropout(m["first"](x), 0.5, training=False))),
    "attention without dropout": sequences(
        lambda: nn.MultiheadAttention(FEATURES, 2, batch_first=True),
        lambda m, x: m["out"](m["layer"](x, x, x, need_weights=False)[0].mean(1)),
        FEATURES,
    ),
    "checkpoint without dropout": vectors(
        lambda m, x: m["out"](checkpoint(lambda h: torch.tanh(m["first"](h)), x, use_reentrant=False))  # pyright: ignore
    ),
}

MAKES: dict[str, Callable[[Program, ClientWork], Executor]] = {
    "autograd": SequentialExecutor,
    "captured": lambda program, work: SequentialExecutor(program, work, captured=True),
    "stack of 2": lambda program, work: VectorizedExecutor(program, work, stack=2),
    "stack of 4": lambda program, work: VectorizedExecutor(program, work, stack=4),
}


def program_of(model: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> Program:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return model().to(dtype)

    return Program(sumus.Task(make, losses.cross_entropy))


def clients_of(shape: tuple[int, ...], *sizes: int) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return {
        f"client {number}": (
            torch.randn(count, *shape, generator=draw, dtype=torch.float64),
            torch.randint(0, CLASSES, (count,), generator=draw),
        )
        for number, count in enumerate(sizes)
    }


def trained_by(
    executor: Any, clients: Mapping[str, tuple[Tensor, Tensor]], round_number: int = 0
) -> dict[str, Trained]:
    program: Program = executor.program
    broadcast = {"params": {name: program.initial[name] for name in program.shared}}
    assignments = [ClientAssignment(who, *examples, {}, key(round_number, who)) for who, examples in clients.items()]
    return {one.client: one for one in executor.run(broadcast, round_number, assignments)}


def assert_close(ours: Mapping[str, Trained], theirs: Mapping[str, Trained]) -> None:
    for who, wanted in theirs.items():
        for name, leaf in wanted.parts["params"].items():
            assert np.isfinite(leaf).all()
            np.testing.assert_allclose(ours[who].parts["params"][name], leaf, rtol=0, atol=1e-9, err_msg=name)
        assert ours[who].metrics["loss"] == pytest.approx(wanted.metrics["loss"], rel=0, abs=1e-9)


def assert_same_noise(
    model: Callable[[], nn.Module], executor: str, shape: tuple[int, ...], *sizes: int, refused: bool = False
) -> None:
    """refused: since the numbers of a row would move when a batch is padded."""
    clients = clients_of(shape, *sizes)
    reference = SequentialExecutor(program_of(model), WORK)
    wanted = trained_by(reference, clients)
    assert reference.unkeyed is None
    ours: Any = MAKES[executor](program_of(model), WORK)
    assert_close(trained_by(ours, clients), wanted)
    assert (ours.refused is not None) == refused
    assert not refused or "whose first dimension is not the rows of the batch" in ours.refused


# ── the same in every executor ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("executor", ["captured", "stack of 4"])
@pytest.mark.parametrize("model", DRAWING)
def test_a_client_draws_the_same_in_every_executor(model: str, executor: str) -> None:
    """Also in short batches, which are padded in a stack."""
    assert_same_noise(DRAWING[model], executor, (FEATURES,), 8, 9, 3, 2)


@pytest.mark.parametrize("model", ["nn.Dropout", "of weights"])
def test_a_client_draws_the_same_in_whatever_stack(model: str) -> None:
    """Here in two, whose batches are padded to different widths."""
    assert_same_noise(DRAWING[model], "stack of 2", (FEATURES,), 8, 9, 3, 2)


@pytest.mark.parametrize("executor", ["captured", "stack of 4"])
@pytest.mark.parametrize("model", ["attention", "transformer"])
def test_dropout_inside_sequences_is_the_same_in_every_executor(model: str, executor: str) -> None:
    assert_same_noise(IN_SEQUENCES[model], executor, (LENGTH, FEATURES), 8, 9, 3, 2)


@pytest.mark.parametrize("model", ["lstm, between layers", "transformer, length first"])
def test_draws_of_which_rows_are_not_first_are_captured_and_not_stacked(model: str) -> None:
    assert_same_noise(IN_SEQUENCES[model], "captured", (LENGTH, FEATURES), 8, 9, 3, 2)
    assert_same_noise(IN_SEQUENCES[model], "stack of 4", (LENGTH, FEATURES), 8, 9, 3, 2, refused=True)


@pytest.mark.parametrize("model", ["lstm, between layers", "transformer, length first"])
def test_nor_are_they_where_nothing_is_padded(model: str) -> None:
    assert_same_noise(IN_SEQUENCES[model], "stack of 2", (LENGTH, FEATURES), 8, 4, refused=True)


def flat(layers: nn.ModuleDict, inputs: Tensor) -> Tensor:
    """Length first, and both in one dimension: the first is a multiple of the rows, and yet rows are inside."""
    dropped = functional.dropout(layers["layer"](inputs.transpose(0, 1).reshape(-1, FEATURES)), 0.4)
    return layers["out"](dropped.view(LENGTH, len(inputs), -1).mean(0))


def test_nor_are_they_where_rows_are_inside_the_first_dimension() -> None:
    model = sequences(lambda: nn.Linear(FEATURES, 4), flat, 4)
    assert_same_noise(model, "stack of 2", (LENGTH, FEATURES), 8, 3, refused=True)


@pytest.mark.parametrize("executor", ["captured", "stack of 2"])
@pytest.mark.parametrize(
    ("forward", "rows_first"),
    [
        pytest.param(lambda m, x, v: v[:, :2].bernoulli_(0.5), True, id="columns"),
        pytest.param(lambda m, x, v: v.view(-1).normal_(), False, id="flat"),
        pytest.param(lambda m, x, v: v.uniform_(), True, id="itself"),
    ],
)
def test_noise_drawn_in_place_is_seen_through_every_view(forward: Any, rows_first: bool, executor: str) -> None:
    def whole(layers: nn.ModuleDict, inputs: Tensor) -> Tensor:
        values = torch.ones_like(inputs)
        forward(layers, inputs, values)
        return layers["out"](layers["first"](inputs * values))

    assert_same_noise(vectors(whole), executor, (FEATURES,), 8, 4, refused=executor != "captured" and not rows_first)


# ── keyed by client, round, step and call ────────────────────────────────────────────────────────────────────────────


def test_numbers_differ_by_key_step_and_call_and_are_the_same_again() -> None:
    draw = NoiseShape(False, (64,))
    seen = [
        draw.numbers(own, step, call).tobytes() for own in (key(0), key(1)) for step in (0, 1, 2) for call in (0, 1)
    ]
    assert len(set(seen)) == len(seen)
    assert draw.numbers(key(1), 2, 1).tobytes() == seen[-1]


@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (5, 3), (5, 2, 4)])
def test_numbers_of_the_first_rows_stay_when_a_batch_is_padded(normal: bool, shape: tuple[int, ...]) -> None:
    few, many = (NoiseShape(normal, (rows, *shape)).numbers(key("alice"), 1, 0) for rows in (3, 8))
    assert few.dtype == np.float32
    np.testing.assert_array_equal(many[:3], few)


def test_uniform_and_normal_numbers_are_what_they_are_called() -> None:
    uniform, normal = (NoiseShape(normal, (100_000,)).numbers(key(0), 1, 0) for normal in (False, True))
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert (normal.mean(), normal.std()) == pytest.approx((0, 1), abs=0.02)


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_scales_what_it_keeps(chance: float) -> None:
    ones = torch.ones(100_000)
    with KeyedNoise(key("alice"), 1):
        dropped = functional.dropout(ones, chance)
    assert float((dropped > 0).double().mean()) == pytest.approx(1 - chance, abs=0.01)
    assert float(dropped.max()) == pytest.approx(1 / (1 - chance), rel=1e-6)


@pytest.mark.parametrize("chance", [0.0, 0.3, 1.0])
def test_native_dropout_of_any_share_is_finite(chance: float) -> None:
    with KeyedNoise(key("alice"), 1):
        values, kept = torch.native_dropout(torch.ones(1000), chance, True)
    assert torch.isfinite(values).all()
    assert float(kept.double().mean()) == pytest.approx(1 - chance, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chance", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_native_dropout_keeps_the_units_that_dropout_keeps(chance: float, dtype: torch.dtype) -> None:
    """A GPU and a traced step take the first, a CPU the second: values and gradients have the same bits."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    with KeyedNoise(key("alice"), 1):
        theirs = functional.dropout(values, chance)
    with KeyedNoise(key("alice"), 1):
        ours, kept = torch.native_dropout(values.detach(), chance, True)
    assert torch.equal(ours, theirs)
    (grad,) = torch.autograd.grad(theirs.sum(), [values])
    scale = 0.0 if chance == 1 else 1 / (1 - chance)
    assert torch.equal(dropout_gradient(torch.ones_like(values), kept, scale), grad)


DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda v: functional.dropout(v, 0.3),
    "dropout in place": lambda v: functional.dropout(v * 1, 0.3, inplace=True),
    "native dropout": lambda v: torch.native_dropout(v, 0.3, True)[0],
    "alpha dropout": lambda v: functional.alpha_dropout(v, 0.3, training=True),
    "whole channels": lambda v: functional.dropout1d(v[:, :, None], 0.3)[:, :, 0],
    "attention": lambda v: functional.scaled_dot_product_attention(*[v[:, None]] * 3, dropout_p=0.3)[:, 0],
    "bernoulli": lambda v: v * torch.empty_like(v).bernoulli_(0.7),
    "uniform": lambda v: v * torch.empty_like(v).uniform_(-1, 1),
    "normal": lambda v: v * torch.empty_like(v).normal_(0, 2),
    "rand_like": lambda v: v * torch.rand_like(v),
}


@pytest.mark.parametrize("what", DRAWN)
def test_a_traced_step_draws_what_the_executors_draw(what: str) -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(DRAWN[what](self.first(inputs)))

    program = program_of(Drawing)
    inputs, targets = clients_of((FEATURES,), 16)["client 0"]
    graph = trace_step(program, WORK, inputs, targets)
    values = step_values(program, WORK, inputs, targets)
    with KeyedNoise(key("alice"), 1):
        wanted = local_step(program, WORK, values)
    values["mask"] = torch.ones(len(inputs), dtype=torch.float64)
    with KeyedNoise(key("alice"), 1):
        traced = graph(values)
    for name, value in wanted.items():
        torch.testing.assert_close(traced[name], value, rtol=0, atol=1e-12)


def test_native_dropout_that_does_not_train_drops_nothing() -> None:
    with KeyedNoise(key("alice"), 1):
        assert torch.equal(torch.native_dropout(torch.ones(1000), 0.5, False)[0], torch.ones(1000))


def test_calls_and_steps_and_clients_draw_apart() -> None:
    ones = torch.ones(200)
    drawn: list[Tensor] = []
    for own in ("alice", "bob"):
        for step in (1, 2):
            with KeyedNoise(key(own), step) as noise:
                drawn += [functional.dropout(ones, 0.5) for _ in range(2)]
            assert noise.calls == 2
    assert all(not torch.equal(one, other) for place, one in enumerate(drawn) for other in drawn[:place])


@pytest.mark.parametrize("executor", MAKES)
def test_clients_and_rounds_draw_apart(executor: str) -> None:
    """Two clients with the same examples, and one of them in the next round."""
    ((_, examples),) = clients_of((FEATURES,), 8).items()
    ours = MAKES[executor](program_of(DRAWING["nn.Dropout"]), sumus.sgd(0.2))
    alice, bob = (trained_by(ours, {who: examples})[who].parts["params"]["0.weight"] for who in ("alice", "bob"))
    later = trained_by(ours, {"alice": examples}, round_number=1)["alice"].parts["params"]["0.weight"]
    assert not np.allclose(alice, bob)
    assert not np.allclose(alice, later)


def test_the_gradient_that_a_work_asks_for_draws_apart_from_every_step() -> None:
    executor = SequentialExecutor(program_of(DRAWING["nn.Dropout"]), sumus.sgd(0.2))
    ((who, examples),) = clients_of((FEATURES,), 8).items()
    assignment = ClientAssignment(who, *examples, {}, key(who))
    drawn = []
    for step in (0, 1):
        with executor.noise(assignment, step):
            drawn.append(functional.dropout(torch.ones(100), 0.5))
    assert not torch.equal(*drawn)


def test_torchs_own_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for make in MAKES.values():
        trained_by(make(program_of(DRAWING["nn.Dropout"]), WORK), clients_of((FEATURES,), 8, 3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("model", ["nn.Dropout", "nn.AlphaDropout", "nn.Dropout2d"])
def test_in_evaluation_nothing_is_drawn(model: str) -> None:
    program = program_of(DRAWING[model])
    inputs, _ = clients_of((FEATURES,), 20)["client 0"]
    program.module.eval()
    with RandomOperatorWatch() as watch:
        once, again = program.module(inputs), program.module(inputs)
    assert watch.seen == []
    assert torch.equal(once, again)


# ── what is random, and what of it has a key ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", SILENT)
def test_what_draws_nothing_counts_as_not_random(model: str) -> None:
    shape = (LENGTH, FEATURES) if "attention" in model else (FEATURES,)
    executor = SequentialExecutor(program_of(SILENT[model]), WORK)
    ((who, examples),) = clients_of(shape, 8).items()
    assert not isinstance(executor.noise(ClientAssignment(who, *examples, {}, key(who)), 1), KeyedNoise)
    assert executor.unkeyed is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_attention_is_random_only_with_dropout(dropout: float) -> None:
    query = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    with RandomOperatorWatch() as watch:
        functional.scaled_dot_product_attention(query, query, query, dropout_p=dropout)
    assert bool(watch.seen) == (dropout > 0)
    assert watch.unkeyed == []


@pytest.mark.parametrize("model", UNKEYED)
def test_what_has_no_key_is_said_and_trains_by_the_clients_seed(model: str) -> None:
    make, word = UNKEYED[model]
    clients = clients_of((FEATURES,), 8, 3)
    executor = SequentialExecutor(program_of(make), WORK)
    once = trained_by(executor, clients)
    assert executor.unkeyed is not None
    assert word in executor.unkeyed
    assert "\n" not in executor.unkeyed
    assert_close(trained_by(executor, dict(reversed(clients.items()))), once)
    assert_close(trained_by(SequentialExecutor(program_of(make), WORK), clients), once)


@pytest.mark.parametrize("executor", ["captured", "stack of 2"])
@pytest.mark.parametrize("model", UNKEYED)
def test_what_has_no_key_is_not_captured_and_trains_by_autograd(model: str, executor: str) -> None:
    make, word = UNKEYED[model]
    clients = clients_of((FEATURES,), 8, 3)
    ours: Any = MAKES[executor](program_of(make), WORK)
    assert_close(trained_by(ours, clients), trained_by(SequentialExecutor(program_of(make), WORK), clients))
    assert word in ours.refused


def test_every_keyed_operator_is_one_that_torch_calls_random() -> None:
    assert all(torch.Tag.nondeterministic_seeded in operator.tags for operator in KEYED)
