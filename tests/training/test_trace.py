"""The traced step: one functional graph of plain operators that takes the steps the executor takes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sumus
from sumus.algorithms.feddyn import dynamic
from sumus.algorithms.fedprox import prox
from sumus.algorithms.scaffold import control
from sumus.executors.executor import ClientAssignment
from sumus.executors.sequential import SequentialExecutor
from sumus.training import losses
from sumus.training.program import Program
from sumus.training.step import step_values
from sumus.training.trace import StepGraph, trace_step
from sumus.tree import nested
from sumus.work import ClientWork, apply_gradients

BATCH, STEPS, LR = 6, 3, 0.05


class Words(nn.Module):
    """A language model in small: embedding, LSTM, scores for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.out = nn.Linear(5, 7)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(words))[0])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def in_place() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3), nn.LayerNorm(3))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=draw), torch.randint(0, 3, (count,), generator=draw)


def vectors(count: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=draw), torch.randint(0, 3, (count,), generator=draw)


def sentences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The last target of each is padding."""
    draw = torch.Generator().manual_seed(seed)
    words, targets = (torch.randint(0, 7, (count, 5), generator=draw) for _ in range(2))
    targets[:, -1] = sumus.metrics.IGNORED
    return words, targets


Examples = Callable[[int, int], tuple[Tensor, Tensor]]
MODELS: dict[str, tuple[Callable[[], nn.Module], Examples]] = {
    "mlp": (mlp, vectors),
    "cnn": (cnn, images),
    "lstm": (Words, sentences),
}
WORKS: dict[str, ClientWork] = {
    "momentum": sumus.sgd(LR, momentum=0.9, steps=STEPS),
    "adam": sumus.adam(LR, steps=STEPS),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
CLOSE = {"float32": 1e-6, "float64": 1e-10}

Traced = tuple[Program, ClientWork, StepGraph]
_traced: dict[tuple[str, ...], Traced] = {}


def program_of(make: Callable[[], nn.Module], dtype: str = "float32", **options: Any) -> Program:
    return Program(sumus.Task(lambda: make().to(DTYPES[dtype]), losses.cross_entropy, **options))


def batch_of(examples: Examples, dtype: str, count: int = BATCH, seed: int = 0) -> tuple[Tensor, Tensor]:
    inputs, targets = examples(count, seed)
    return inputs.to(DTYPES[dtype]) if inputs.is_floating_point() else inputs, targets


def traced(model: str, work: str, dtype: str = "float32") -> Traced:
    """Tracing takes a second: each case is traced once."""
    if (model, work, dtype) not in _traced:
        make, examples = MODELS[model]
        program = program_of(make, dtype)
        graph = trace_step(program, WORKS[work], *batch_of(examples, dtype))
        _traced[model, work, dtype] = program, WORKS[work], graph
    return _traced[model, work, dtype]


def by_autograd(
    program: Program, work: ClientWork, batches: list[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], Tensor]:
    """The eager rule, step by step: gradients by autograd, then `apply_gradients`. (parameters, last loss)"""
    params: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in program.trained.items()}
    states = {name: work.optimizer.init(param) for name, param in params.items()}
    base, loss = {"params": dict(params)}, torch.zeros(())
    program.module.train()
    for number, (inputs, targets) in enumerate(batches, 1):
        program.load(params)
        _, each = program.losses(inputs, targets)
        loss = each.mean()
        grads = torch.autograd.grad(loss, list(program.trained.values()))
        named = {name: grad.detach() for name, grad in zip(program.trained, grads, strict=True)}
        params, states = apply_gradients(work, params, named, states, base, {}, LR, number)
    program.load(program.tensors_of(program.initial_shared))
    return params, loss.detach()


def by_graph(
    program: Program,
    work: ClientWork,
    graph: StepGraph,
    batches: list[tuple[Tensor, Tensor]],
    rows: int = BATCH,
    given: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    values = {**step_values(program, work, *batches[0]), **(given or {})}
    for number, (inputs, targets) in enumerate(batches, 1):
        mask = torch.zeros(len(inputs), dtype=next(iter(program.trained.values())).dtype)
        mask[:rows] = 1
        values |= {"inputs": inputs, "targets": targets, "mask": mask}
        values |= {"lr": torch.full_like(values["lr"], LR), "step": torch.full_like(values["step"], number)}
        results = graph(values)
        values |= {name: value for name, value in results.items() if name in values}
    return {**values, "loss": results["loss"]}  # pyright: ignore[reportPossiblyUnboundVariable]


def the_same(values: dict[str, Tensor], params: dict[str, Tensor], tolerance: float) -> None:
    for name, wanted in params.items():
        np.testing.assert_allclose(values[f"params/{name}"], wanted, rtol=0, atol=tolerance, err_msg=name)


def in_place_operators(graph: StepGraph) -> set[str]:
    """aten operators that change an argument: `add_.Tensor`, `copy_.default`."""
    return {name for name in graph.operators if name.startswith("aten.") and name.split(".")[1].endswith("_")}


# ── what the graph is made of ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("model", MODELS)
def test_a_graph_is_functional_and_free_of_fused_kernels(model: str, work: str) -> None:
    """Nothing in place (`add_`, `copy_`), nothing random, nothing that only one backend has (`mkldnn_rnn_layer`)."""
    _, _, graph = traced(model, work)
    names = {operator.split(".")[1] for operator in graph.operators if operator.startswith("aten.")}
    assert len(names) > 10
    assert in_place_operators(graph) == set()
    unwanted = ("mkldnn", "cudnn", "miopen", "rnn", "lstm", "rand", "bernoulli", "dropout", "scaled_dot", "as_strided")
    assert {name for name in names if any(word in name for word in unwanted)} == set()
    assert {operator for operator in graph.operators if not operator.startswith("aten.")} <= {
        "<built-in function getitem>"
    }


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("model", MODELS)
def test_a_graph_holds_no_tensor_of_its_own(model: str, work: str) -> None:
    """Parameters, optimizer state and buffers come in and go out by name; none is baked in."""
    program, _, graph = traced(model, work)
    kinds = [node.op for node in graph.graph.graph.nodes]
    assert set(kinds) == {"placeholder", "call_function", "output"}
    assert kinds.count("placeholder") == len(graph.inputs)
    assert list(graph.graph.parameters()) == list(graph.graph.buffers()) == []
    for name in program.trained:
        assert {f"params/{name}", f"rule/{name}/0"} <= set(graph.inputs) & set(graph.outputs)


def test_the_optimizer_is_inside() -> None:
    _, _, plain = traced("mlp", "momentum")
    _, _, adam = traced("mlp", "adam")
    assert {name for name in plain.inputs if name.startswith("rule/0.weight/")} == {"rule/0.weight/0"}
    assert {name for name in adam.inputs if name.startswith("rule/0.weight/")} == {"rule/0.weight/0", "rule/0.weight/1"}
    assert {"lr", "step", "mask"} <= set(adam.inputs)
    assert {operator for operator in adam.operators if ".pow." in operator}
    assert {operator for operator in plain.operators if ".pow." in operator} == set()


def test_tracing_changes_nothing_in_the_program() -> None:
    program = program_of(normed)
    before = {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
    trace_step(program, sumus.sgd(LR), *batch_of(vectors, "float32"))
    assert all(torch.equal(program.tensors[name], value) for name, value in before.items())


# ── what the graph computes ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("model", MODELS)
def test_a_graph_takes_the_steps_of_autograd_and_the_rule(model: str, work: str, dtype: str) -> None:
    program, rule, graph = traced(model, work, dtype)
    batches = [batch_of(MODELS[model][1], dtype, seed=number) for number in range(STEPS)]
    values = by_graph(program, rule, graph, batches)
    params, loss = by_autograd(program, rule, batches)
    the_same(values, params, CLOSE[dtype])
    np.testing.assert_allclose(values["loss"], loss, rtol=0, atol=CLOSE[dtype])
    assert all(not torch.equal(params[name], tensor.detach()) for name, tensor in program.trained.items())


@pytest.mark.parametrize("work", WORKS)
def test_a_graph_takes_the_steps_of_the_executor(work: str) -> None:
    program, rule, graph = traced("mlp", work, "float64")
    inputs, targets = batch_of(vectors, "float64")
    (trained,) = SequentialExecutor(program, rule).run(
        {"params": program.initial_shared}, 0, [ClientAssignment("alice", inputs, targets, {}, bytes(32))]
    )
    program.load(program.tensors_of(program.initial_shared))
    values = by_graph(program, rule, graph, [(inputs, targets)] * STEPS)
    sent = {n: torch.from_numpy(program.initial[n] - leaf) for n, leaf in trained.parts["params"].items()}
    the_same(values, sent, CLOSE["float64"])


CORRECTED: dict[str, ClientWork] = {
    "prox": prox(sumus.sgd(LR, momentum=0.9, steps=STEPS), mu=0.7),
    "control": control(sumus.sgd(LR, steps=STEPS)),
    "dynamic": dynamic(sumus.adam(LR, steps=STEPS), alpha=0.3),
}


@pytest.mark.parametrize("name", CORRECTED)
def test_a_corrected_step_takes_what_is_broadcast_and_what_the_client_kept(name: str) -> None:
    """FedProx, SCAFFOLD and FedDyn, with controls that are not zero, as the executor takes them."""
    program, work = program_of(mlp, "float64"), CORRECTED[name]
    inputs, targets = batch_of(vectors, "float64")
    graph = trace_step(program, work, inputs, targets)
    draw = np.random.default_rng(0)
    first = {key: draw.normal(size=value.shape) for key, value in step_values(program, work, inputs, targets).items()}
    extra = {key: value for key, value in first.items() if key.startswith(("broadcast/control/", "state/"))}
    assert bool(extra) is (name != "prox")
    broadcast = {"params": program.initial_shared, **nested(without("broadcast/", extra))}
    (trained,) = SequentialExecutor(program, work).run(
        broadcast, 0, [ClientAssignment("alice", inputs, targets, nested(without("state/", extra)), bytes(32))]
    )
    program.load(program.tensors_of(program.initial_shared))
    given = {key: torch.from_numpy(value) for key, value in extra.items()}
    values = by_graph(program, work, graph, [(inputs, targets)] * STEPS, given=given)
    sent = {n: torch.from_numpy(program.initial[n] - leaf) for n, leaf in trained.parts["params"].items()}
    the_same(values, sent, CLOSE["float64"])


def without(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(kind): value for key, value in values.items() if key.startswith(kind)}


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("model", MODELS)
def test_the_mask_makes_a_padded_batch_the_short_one(model: str, work: str) -> None:
    """Rows that pad may hold anything: they change neither parameters, nor optimizer state, nor the loss."""
    program, rule, graph = traced(model, work, "float64")
    short = [batch_of(MODELS[model][1], "float64", count=BATCH - 2, seed=number) for number in range(STEPS)]
    junk = batch_of(MODELS[model][1], "float64", count=2, seed=99)
    padded = [(torch.cat([inputs, junk[0]]), torch.cat([targets, junk[1]])) for inputs, targets in short]
    values = by_graph(program, rule, graph, padded, rows=BATCH - 2)
    params, loss = by_autograd(program, rule, short)
    the_same(values, params, CLOSE["float64"])
    np.testing.assert_allclose(values["loss"], loss, rtol=0, atol=CLOSE["float64"])


def test_a_batch_that_is_all_padding_moves_nothing() -> None:
    program, rule, graph = traced("mlp", "momentum", "float64")
    values = by_graph(program, rule, graph, [batch_of(vectors, "float64")], rows=0)
    the_same(values, {name: tensor.detach() for name, tensor in program.trained.items()}, 0.0)
    assert float(values["loss"]) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_adams_first_step_is_as_exact_in_the_graph_as_outside(dtype: str) -> None:
    """1 − β₂ is small: in single precision the bias correction would lose four digits of its seven."""
    program, rule, graph = traced("mlp", "adam", dtype)
    batch = batch_of(vectors, dtype)
    inside = by_graph(program, rule, graph, [batch])
    outside, _ = by_autograd(program, rule, [batch])
    last_place = {"float32": 2.0**-23, "float64": 2.0**-52}[dtype]
    for name, param in program.trained.items():
        step = outside[name] - param.detach()
        off = (inside[f"params/{name}"] - outside[name]).abs().max()
        assert float(off) <= 4 * last_place * float(outside[name].abs().max()), name
        assert float(step.abs().max()) <= LR * 1.001


# ── models of other kinds ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES)
def test_running_statistics_go_in_and_come_out(dtype: str) -> None:
    program, work = program_of(normed, dtype), sumus.sgd(LR, steps=STEPS)
    batches = [batch_of(vectors, dtype, seed=number) for number in range(STEPS)]
    graph = trace_step(program, work, *batches[0])
    values = by_graph(program, work, graph, batches)
    assert not in_place_operators(graph)
    assert int(values["buffers/1.num_batches_tracked"]) == STEPS
    module = program.module
    optimizer = torch.optim.SGD(module.parameters(), LR)
    for inputs, targets in batches:
        optimizer.zero_grad()
        losses.cross_entropy(module(inputs), targets).mean().backward()
        optimizer.step()
    for name, tensor in module.state_dict().items():
        kind = "params" if name in program.trained else "buffers"
        np.testing.assert_allclose(values[f"{kind}/{name}"], tensor, rtol=0, atol=CLOSE[dtype], err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_works_in_place_has_a_functional_step(dtype: str) -> None:
    program, work = program_of(in_place, dtype), sumus.adamw(LR, steps=STEPS, weight_decay=0.1, clip_norm=0.5)
    batches = [batch_of(vectors, dtype, seed=number) for number in range(STEPS)]
    graph = trace_step(program, work, *batches[0])
    assert not in_place_operators(graph)
    params, _ = by_autograd(program, work, batches)
    the_same(by_graph(program, work, graph, batches), params, CLOSE[dtype])


def test_frozen_leaves_come_out_as_they_went_in_and_personal_ones_are_trained() -> None:
    program = program_of(mlp, "float64", leaves={"0.*": "frozen", "2.bias": "personal"})
    work = sumus.sgd(LR, momentum=0.9)
    batch = batch_of(vectors, "float64")
    graph = trace_step(program, work, *batch)
    assert {name for name in graph.outputs if name.startswith("params/")} == {"params/2.weight", "params/2.bias"}
    assert "broadcast/params/2.bias" not in graph.inputs
    values = by_graph(program, work, graph, [batch])
    assert torch.equal(values["buffers/0.weight"], program.tensors["0.weight"])
    assert not torch.equal(values["params/2.bias"], program.tensors["2.bias"].detach())


def test_tied_weights_are_one_argument() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.outer.weight = self.inner.weight

        def forward(self, inputs: Tensor) -> Tensor:
            return self.outer(torch.tanh(self.inner(inputs)))

    program, work, batch = program_of(Tied, "float64"), sumus.sgd(LR), batch_of(vectors, "float64")
    graph = trace_step(program, work, *batch)
    assert [name for name in graph.inputs if name.startswith("params/")] == ["params/inner.weight"]
    params, _ = by_autograd(program, work, [batch])
    the_same(by_graph(program, work, graph, [batch]), params, CLOSE["float64"])


@pytest.mark.parametrize("work", WORKS)
def test_a_scalar_parameter_keeps_its_dtype(work: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(2.0))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(inputs) * self.scale

    program, batch = program_of(Scaled), batch_of(vectors, "float32")
    graph = trace_step(program, WORKS[work], *batch)
    values = by_graph(program, WORKS[work], graph, [batch] * STEPS)
    assert values["params/scale"].dtype == values["rule/scale/0"].dtype == torch.float32
    params, _ = by_autograd(program, WORKS[work], [batch] * STEPS)
    the_same(values, params, CLOSE["float32"])
