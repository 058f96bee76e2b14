"""What can be captured as a graph trains as by autograd; what cannot is refused in one line, and trains by autograd then."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import sumus
from sumus.aggregate import BUFFERS
from sumus.errors import TaskError
from sumus.executors.choice import ExecutorChoice, checked
from sumus.executors.executor import ClientAssignment, Executor, Trained
from sumus.executors.sequential import SequentialExecutor
from sumus.executors.vectorized import VectorizedExecutor
from sumus.metrics import IGNORED
from sumus.rng import key
from sumus.training import losses
from sumus.training.graph import capture
from sumus.training.program import Program
from sumus.training.rewrite import NotCapturable
from sumus.work import ClientRules, ClientWork, LeafRule

Examples = tuple[Tensor, Tensor]
Make = Callable[[], nn.Module]
Loss = Callable[[Tensor, Tensor], Tensor]

FEATURES, LENGTH, SIDE, WORDS, CLASSES = 6, 3, 6, 11, 3
WORK = sumus.sgd(0.1, steps=4, batch_size=4, momentum=0.9)


class Model(nn.Module):
    """Some layers, parameters and buffers, and a forward pass over them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        return self._forward(self, inputs)


def model(forward: Callable[[Any, Tensor], Tensor], **layers: Callable[[], Any]) -> Make:
    """Its parts are drawn anew each time."""
    return lambda: Model(forward, **{name: draw() for name, draw in layers.items()})


def dense(inputs: int = FEATURES, outputs: int = CLASSES) -> Callable[[], nn.Linear]:
    return lambda: nn.Linear(inputs, outputs)


def drawn(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(0.4 * torch.randn(shape))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


# ── clients, and training them ───────────────────────────────────────────────────────────────────────────────────────


def vectors(*sizes: int) -> list[Examples]:
    return floats((FEATURES,), *sizes)


def floats(shape: tuple[int, ...], *sizes: int) -> list[Examples]:
    draw = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(count, *shape, generator=draw, dtype=torch.float64),
            torch.randint(0, CLASSES, (count,), generator=draw),
        )
        for count in sizes
    ]


def texts(*sizes: int) -> list[Examples]:
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randint(0, WORDS, (count, LENGTH), generator=draw), torch.randint(0, CLASSES, (count,), generator=draw))
        for count in sizes
    ]


def program_of(
    make: Make,
    loss: Loss = losses.cross_entropy,
    dtype: torch.dtype = torch.float64,
    leaves: Mapping[str, Any] | None = None,
) -> Program:
    def seeded() -> nn.Module:
        torch.manual_seed(1)
        return make().to(dtype)

    return Program(sumus.Task(seeded, loss, leaves=leaves or {}))


def captured(program: Program, work: ClientWork = WORK) -> SequentialExecutor:
    return SequentialExecutor(program, work, captured=True)


def stacked(program: Program, work: ClientWork = WORK) -> VectorizedExecutor:
    return VectorizedExecutor(program, work, stack=2)


def trained_by(executor: Any, clients: list[Examples]) -> dict[str, Trained]:
    program: Program = executor.program
    broadcast = {"params": {name: program.initial[name] for name in program.shared}}
    if program.buffers:
        broadcast[BUFFERS] = {name: program.initial[name] for name in program.buffers}
    assignments = [ClientAssignment(f"{n}", *examples, {}, key(n)) for n, examples in enumerate(clients)]
    return {one.client: one for one in executor.run(broadcast, 0, assignments)}


def assert_close(ours: Mapping[str, Trained], theirs: Mapping[str, Trained], atol: float = 1e-9) -> None:
    for who, wanted in theirs.items():
        for part, tree in wanted.parts.items():
            for name, leaf in tree.items():
                np.testing.assert_allclose(ours[who].parts[part][name], leaf, rtol=0, atol=atol, err_msg=name)
        assert ours[who].metrics["loss"] == pytest.approx(wanted.metrics["loss"], rel=0, abs=100 * atol)


def assert_parity(
    make: Make,
    clients: list[Examples],
    loss: Loss = losses.cross_entropy,
    work: ClientWork = WORK,
    executor: Callable[[Program, ClientWork], Executor] = captured,
    **options: Any,
) -> str | None:
    """Why it was not captured, if it was not."""
    wanted = trained_by(SequentialExecutor(program_of(make, loss, **options), work), clients)
    ours = executor(program_of(make, loss, **options), work)
    assert_close(trained_by(ours, clients), wanted)
    return getattr(ours, "refused", None)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


class Counting(nn.Module):
    """Counts its calls, and does nothing with the number."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(FEATURES, CLASSES)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.out(inputs)


def packed(m: Any, inputs: Tensor) -> Tensor:
    lengths = (inputs[:, :, 0] > -0.5).sum(1).clamp(min=1)
    outputs, _ = m.layer(pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False))
    return m.out(pad_packed_sequence(outputs, batch_first=True, total_length=LENGTH)[0].mean(1))


def if_positive(m: Any, inputs: Tensor) -> Tensor:
    return m.out(inputs if inputs.sum() > 0 else 2 * inputs)


def by_python(m: Any, inputs: Tensor) -> Tensor:
    return m.out(inputs * (1.0 if random.random() < 2 else 0.0))


def by_numpy(m: Any, inputs: Tensor) -> Tensor:
    return m.out(inputs * (1.0 if np.random.random() < 2 else 0.0))


REFUSED: dict[str, tuple[Make, str, list[Examples]]] = {
    "an if": (model(if_positive, out=dense()), "depends on the values of tensors", vectors(8, 9, 3)),
    ".item()": (
        model(lambda m, x: m.out(x / x.abs().max().item()), out=dense()),
        "depends on the values of tensors",
        vectors(8, 9, 3),
    ),
    "a chance": (
        model(lambda m, x: m.out(x if torch.rand(()) < 0.5 else 2 * x), out=dense()),
        "depends on the values of tensors",
        vectors(8, 9, 3),
    ),
    "packed sequences": (
        model(packed, layer=lambda: nn.GRU(FEATURES, 4, batch_first=True), out=dense(4)),
        "depends on the values of tensors",
        floats((LENGTH, FEATURES), 8, 9, 3),
    ),
    "Python's random": (model(by_python, out=dense()), "Python's or numpy's generator", vectors(8, 9, 3)),
    "numpy's random": (model(by_numpy, out=dense()), "Python's or numpy's generator", vectors(8, 9, 3)),
    "a count of calls": (Counting, "attribute `calls`", vectors(8, 9, 3)),
    "an averaging norm": (
        lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, CLASSES)),
        "depends on the values of tensors",
        vectors(8, 9, 3)[:1],
    ),
}


def assert_refused(
    words: str,
    make: Make,
    clients: list[Examples],
    executor: Callable[[Program, ClientWork], Executor],
    work: ClientWork = WORK,
) -> None:
    """Trained by autograd, and why."""
    refused = assert_parity(make, clients, executor=executor, work=work)
    assert refused is not None
    assert words in refused
    assert "\n" not in refused


@pytest.mark.parametrize("executor", [captured, stacked])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_captured_says_why_in_a_line_and_trains_by_autograd(
    what: str, executor: Callable[..., Any]
) -> None:
    make, words, clients = REFUSED[what]
    assert_refused(words, make, clients, executor)


@pytest.mark.parametrize("stack", [None, 2])
@pytest.mark.parametrize("what", REFUSED)
def test_its_capture_is_refused(what: str, stack: int | None) -> None:
    make, words, clients = REFUSED[what]
    inputs, targets = clients[0]
    with pytest.raises(NotCapturable, match=words.replace(".", r"\.")):
        capture(program_of(make), WORK, inputs[:4], targets[:4], stack)


def test_no_reason_is_given_where_a_step_was_captured() -> None:
    assert assert_parity(mlp, vectors(8, 9, 3)) is None


def test_a_client_below_a_batch_is_no_reason() -> None:
    assert assert_parity(mlp, vectors(3, 2)) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)), "batch statistics"),
        (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(FEATURES, 4)), nn.Linear(4, CLASSES)), ""),
    ],
)
def test_stacks_refuse_a_model_that_writes_into_its_buffers(make: Make, words: str) -> None:
    assert_refused(words, make, vectors(8, 8), stacked)


def as_a_list(m: Any, inputs: Tensor) -> Tensor:
    return m.out(inputs * inputs[0].tolist()[0])


def as_an_array(m: Any, inputs: Tensor) -> Tensor:
    return m.out(inputs * float(inputs.numpy().mean()))


def as_a_length(m: Any, inputs: Tensor) -> Tensor:
    return m.out(inputs) * (inputs > 0).nonzero().shape[0]


def as_a_mean_of_some(m: Any, inputs: Tensor) -> Tensor:
    outputs = m.out(inputs)
    return outputs * outputs[outputs > 0].mean()


def kept_beside(m: Any, inputs: Tensor) -> Tensor:
    m.beside["calls"] = m.beside["calls"] + 1
    return m.out(inputs) * (1 + 0.1 * m.beside["calls"])


def by_its_own_generator(m: Any, inputs: Tensor) -> Tensor:
    return m.out(inputs) * float(m.beside["draw"].random())


@pytest.mark.parametrize("executor", [captured, stacked])
@pytest.mark.parametrize("forward", [as_a_list, as_an_array, as_a_length, as_a_mean_of_some])
def test_numbers_taken_from_values_are_refused(
    forward: Callable[[Any, Tensor], Tensor], executor: Callable[..., Any]
) -> None:
    assert_refused("", model(forward, out=dense()), vectors(8, 9, 3), executor)


@pytest.mark.parametrize("forward", [kept_beside, by_its_own_generator])
def test_state_that_modules_keep_in_containers_is_refused_and_put_back(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    def make() -> nn.Module:
        module = Model(forward, out=nn.Linear(FEATURES, CLASSES))
        module.beside = {"calls": 0, "draw": np.random.default_rng(0)}  # pyright: ignore
        return module

    program = program_of(make)
    with pytest.raises(NotCapturable, match="attribute `beside`"):
        capture(program, WORK, *vectors(4)[0])
    beside: Any = program.module.beside
    assert beside["calls"] == 0
    assert beside["draw"].random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("executor", [captured, stacked])
@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(lambda layer: [layer.weight], id="leaf"),
        pytest.param(lambda layer: [layer], id="module"),
        pytest.param(lambda layer: [[layer.weight]], id="list"),
    ],
)
def test_leaves_in_a_container_that_is_put_back_still_train(kept: Any, executor: Callable[..., Any]) -> None:
    def listed() -> nn.Module:
        module: Any = Model(by_list, first=nn.Linear(FEATURES, FEATURES), out=nn.Linear(FEATURES, CLASSES))
        module.kept = kept(module.first)
        return module

    def by_list(m: Any, inputs: Tensor) -> Tensor:
        m.kept.append(len(m.kept))
        (leaf,) = m.kept[0] if isinstance(m.kept[0], list) else [getattr(m.kept[0], "weight", m.kept[0])]
        return m.out(inputs @ leaf)

    assert_refused("attribute `kept`", listed, vectors(8, 9), executor)


@pytest.mark.parametrize("executor", [SequentialExecutor, captured, stacked])
def test_a_forward_that_binds_a_buffer_anew_is_refused_by_every_executor(executor: Callable[..., Any]) -> None:
    def averaged(m: Any, inputs: Tensor) -> Tensor:
        m.mean = 0.9 * m.mean + 0.1 * inputs.mean(0).detach()
        return m.out(inputs - m.mean)

    program = program_of(model(averaged, out=dense(), mean=lambda: torch.zeros(FEATURES)))
    with pytest.raises(TaskError, match="forward binds `mean` to a new tensor: write into the existing one"):
        trained_by(executor(program, WORK), vectors(8, 8))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(FEATURES, 4).requires_grad_(False), nn.Linear(4, CLASSES)),
        model(
            lambda m, x: m.out(x + torch.rand_like(m.some).sum(0)),
            out=dense(),
            some=lambda: nn.Parameter(torch.zeros(2, FEATURES), requires_grad=False),
        ),
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(6, CLASSES)
        ),
    ],
)
def test_stacks_take_leaves_that_never_change(make: Make) -> None:
    assert assert_parity(make, vectors(8, 8), executor=stacked) is None


def test_what_torch_compiles_is_captured_as_it_was_before() -> None:
    make = lambda: torch.compile(mlp(), backend="eager")  # noqa: E731
    assert "params/0.weight" in capture(program_of(make), WORK, *vectors(4)[0]).names  # pyright: ignore


# ── what is left as it was ───────────────────────────────────────────────────────────────────────────────────────────


def test_capturing_changes_neither_module_nor_data_nor_torchs_generator() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.2), mlp_of(4)
        )

    program, (examples,) = program_of(make), vectors(4)
    before = {name: tensor.clone() for name, tensor in program.module.state_dict().items()}
    data, generator = [side.clone() for side in examples], torch.get_rng_state()
    capture(program, WORK, *examples)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.module.state_dict().items())
    assert all(torch.equal(*sides) for sides in zip(examples, data, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def mlp_of(inputs: int) -> nn.Module:
    return nn.Linear(inputs, CLASSES)


def test_frozen_leaves_are_read_where_they_are_and_never_written() -> None:
    program, (examples,) = program_of(mlp, leaves={"0.*": "frozen"}), vectors(4)
    graph = capture(program, WORK, *examples)
    arguments = {node.name: node for node in graph.module.graph.nodes if node.op == "placeholder"}
    frozen = [
        node
        for name, node in zip((*graph.names, *graph.others), arguments.values(), strict=True)
        if name in ("buffers/0.weight", "buffers/0.bias")
    ]
    assert len(frozen) == 2
    for node in frozen:
        assert not any("copy_" in str(user.target) or "clone" in str(user.target) for user in node.users)


def test_a_graph_names_only_what_it_uses() -> None:
    (examples,) = vectors(4)
    assert all(name.startswith("params/") for name in capture(program_of(mlp), sumus.sgd(0.1), *examples).names)
    graph = capture(program_of(mlp), sumus.adam(0.1), *examples)
    assert {name.partition("/")[0] for name in graph.names} == {"params", "rule"}
    assert "step" in graph.others
    assert "step" not in capture(program_of(mlp), sumus.sgd(0.1), *examples).others


IN_PLACE: dict[str, Make] = {
    "a ReLU in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(FEATURES, CLASSES)),
    "an input added to": model(lambda m, x: m.out(x.add_(1.0)), out=dense()),
    "an entry of the input": model(lambda m, x: (x[:, 0].mul_(2.0), m.out(x))[1], out=dense()),
    "an activation added to": model(lambda m, x: m.out(m.first(x).add_(1.0)), first=dense(outputs=8), out=dense(8)),
    "after flattening": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 1), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(24, CLASSES)
    ),
}


@pytest.mark.parametrize("executor", [captured, stacked])
@pytest.mark.parametrize("what", IN_PLACE)
def test_a_forward_in_place_does_not_reach_the_data(what: str, executor: Callable[..., Any]) -> None:
    clients = vectors(4, 8, 3)
    before = [inputs.clone() for inputs, _ in clients]
    refused = assert_parity(IN_PLACE[what], clients, executor=executor)
    if executor is stacked and what in ("a ReLU in place", "an input added to", "an entry of the input"):
        assert "in place" in (refused or "")
    else:
        assert refused is None
    assert all(torch.equal(inputs, was) for (inputs, _), was in zip(clients, before, strict=True))


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────────

WEIGHTS = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)


def crossed(**options: Any) -> Loss:
    return lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="none", **options)


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    each = functional.cross_entropy(outputs, targets, reduction="none")
    return (1 - torch.exp(-each)) ** 2 * each


def with_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    logs = functional.log_softmax(outputs, 1)
    return functional.nll_loss(logs, targets, reduction="none") + 0.1 * (logs.exp() * logs).sum(1)


def margins(outputs: Tensor, targets: Tensor) -> Tensor:
    own = outputs.gather(1, targets[:, None])
    return (1 - own + outputs).clamp(min=0).sum(1)


LOSSES: dict[str, Loss] = {
    "label smoothing": crossed(label_smoothing=0.1),
    "class weights": crossed(weight=WEIGHTS),
    "an ignored class": crossed(ignore_index=1),
    "focal": focal,
    "with entropy": with_entropy,
    "margins, by hand": margins,
    "torch's margins": lambda outputs, targets: functional.multi_margin_loss(outputs, targets, reduction="none"),
    "twice": lambda o, t: losses.cross_entropy(o, t) + 0.5 * losses.cross_entropy(o, (t + 1) % CLASSES),
}


@pytest.mark.parametrize("executor", [captured, stacked])
@pytest.mark.parametrize("loss", LOSSES)
def test_whatever_the_loss(loss: str, executor: Callable[..., Any]) -> None:
    assert assert_parity(mlp, vectors(8, 9, 4, 3), LOSSES[loss], executor=executor) is None


REGRESSIONS: dict[str, Loss] = {
    "squared": losses.mean_squared_error,
    "huber": lambda outputs, targets: functional.huber_loss(outputs, targets, reduction="none").sum(1),
    "soft classes": lambda o, t: functional.cross_entropy(o, torch.softmax(t, 1), reduction="none"),
    "logits": lambda o, t: losses.binary_cross_entropy_with_logits(o, torch.sigmoid(t)),
    "probabilities": lambda o, t: losses.binary_cross_entropy(torch.sigmoid(o), torch.sigmoid(t)),
}


@pytest.mark.parametrize("executor", [captured, stacked])
@pytest.mark.parametrize("loss", REGRESSIONS)
def test_whatever_the_loss_of_real_targets(loss: str, executor: Callable[..., Any]) -> None:
    clients = [(inputs, inputs[:, :CLASSES].sin()) for inputs, _ in vectors(8, 9, 4, 3)]
    assert assert_parity(mlp, clients, REGRESSIONS[loss], executor=executor) is None


@pytest.mark.parametrize("executor", [captured, stacked])
@pytest.mark.parametrize("ignored", ["some", "whole rows", "all"])
def test_targets_in_rows_some_of_them_padding(ignored: str, executor: Callable[..., Any]) -> None:
    clients = []
    for words, _ in texts(8, 9, 4, 3):
        targets = words.roll(-1, 1).clone()
        targets[{"some": (..., -1), "whole rows": slice(None, None, 2), "all": ...}[ignored]] = IGNORED
        clients.append((words, targets))
    make = model(lambda m, x: m.out(m.embed(x)), embed=lambda: nn.Embedding(WORDS, 4), out=dense(4, WORDS))
    assert assert_parity(make, clients, executor=executor) is None


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned round."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -gradient


def unlearned(m: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        features = m.first(inputs)
    return m.out(features)


def penalised(m: Any, inputs: Tensor) -> Tensor:
    inputs = inputs.detach().requires_grad_()
    outputs = m.out(torch.tanh(m.first(inputs)))
    (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return outputs * (1 + slope.square().sum(1, keepdim=True))


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    module[0].register_forward_hook(lambda layer, inputs, output: 1.5 * output)
    module[2].register_full_backward_hook(lambda layer, inner, outer: (0.5 * inner[0],))
    return module


def two(**more: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    return {"first": dense(outputs=8), "out": dense(8), **more}


ON_VECTORS: dict[str, Make] = {
    "a layer used twice": model(
        lambda m, x: m.out(torch.relu(m.mix(torch.relu(m.mix(x))))), mix=dense(6, 6), out=dense()
    ),
    "a layer never used": model(lambda m, x: m.out(x), spare=dense(), out=dense()),
    "a layer behind no_grad": model(unlearned, **two()),
    "a scalar": model(lambda m, x: m.out(x) * m.scale, out=dense(), scale=drawn()),
    "an empty leaf": model(lambda m, x: m.out(x) + m.none.sum(), out=dense(), none=drawn(0, 4)),
    "weights times weights": model(lambda m, x: m.out(x @ (m.left @ m.left)), out=dense(), left=drawn(6, 6)),
    "an autoencoder's tied weights": model(
        lambda m, x: m.out(torch.tanh(x @ m.code) @ m.code.t()), out=dense(), code=drawn(6, 4)
    ),
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(FEATURES, 8)), nn.Tanh(), nn.Linear(8, CLASSES)
    ),
    "orthogonal": lambda: nn.Sequential(
        parametrizations.orthogonal(nn.Linear(FEATURES, 6)), nn.Tanh(), nn.Linear(6, CLASSES)
    ),
    "bilinear": model(lambda m, x: m.out(m.pairs(x, x)), pairs=lambda: nn.Bilinear(6, 6, 5), out=dense(5)),
    "rounded, straight through": model(
        lambda m, x: m.out((lambda h: h + (h.round() - h).detach())(m.first(x))), **two()
    ),
    "a norm by hand": model(lambda m, x: m.out(functional.normalize(m.first(x))), **two()),
    "sorted": model(lambda m, x: m.out(m.first(x).sort(1)[0].cumsum(1)), **two()),
    "a Fourier transform": model(
        lambda m, x: m.out(torch.fft.rfft(m.first(x)).abs()), first=dense(outputs=8), out=dense(5)
    ),
    "a shape's own way": model(
        lambda m, x: m.out(x) if x.shape[1] == FEATURES else m.out(x[:, :FEATURES]), out=dense()
    ),
}
BY_AUTOGRAD: dict[str, Make] = {
    "a function of its own": model(lambda m, x: m.out(Reversed.apply(m.first(x))), **two()),
    "a gradient inside": model(penalised, **two()),
    "hooks": hooked,
}
"""Captured, and not stacked."""
ON_IMAGES: dict[str, Make] = {
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(2, 3, 3, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES)
    ),
    "grouped and dilated": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2, dilation=2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)
    ),
    "wrapped and mirrored": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(72, CLASSES),
    ),
    "pooled and enlarged": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2),
        nn.PixelShuffle(2),
        nn.Flatten(),
        nn.Linear(64, 3),
    ),
    "adaptively pooled": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)
    ),
    "normalised": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, CLASSES)
    ),
    "in one dimension": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(68, CLASSES)
    ),
}


def attended(m: Any, inputs: Tensor) -> Tensor:
    later = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
    return m.out(m.layer(inputs, inputs, inputs, attn_mask=later)[0].mean(1))


def recurrent(m: Any, inputs: Tensor) -> Tensor:
    return m.out(m.layer(inputs)[0].mean(1))


def by_cell(m: Any, inputs: Tensor) -> Tensor:
    hidden = torch.zeros(len(inputs), 4, dtype=inputs.dtype)
    for position in range(LENGTH):
        hidden = m.cell(inputs[:, position], hidden)
    return m.out(hidden)


ON_SEQUENCES: dict[str, Make] = {
    "masked attention": model(
        attended, layer=lambda: nn.MultiheadAttention(FEATURES, 2, batch_first=True), out=dense()
    ),
    "a projected lstm": model(
        recurrent, layer=lambda: nn.LSTM(FEATURES, 4, 2, proj_size=3, batch_first=True), out=dense(3)
    ),
    "a plain recurrence": model(recurrent, layer=lambda: nn.RNN(FEATURES, 4, batch_first=True), out=dense(4)),
    "a cell": model(by_cell, cell=lambda: nn.GRUCell(FEATURES, 4), out=dense(4)),
}


def embedded(**options: Any) -> Make:
    embed = lambda: nn.Embedding(WORDS, 4, **options)  # noqa: E731
    return model(lambda m, x: m.out(m.embed(x).mean(1)), embed=embed, out=dense(4))


ON_TEXTS: dict[str, Make] = {
    "with padding": embedded(padding_idx=0),
    "of a largest norm": embedded(max_norm=0.5),
    "a bag": model(lambda m, x: m.out(m.embed(x)), embed=lambda: nn.EmbeddingBag(WORDS, 4), out=dense(4)),
}

LAYERS: dict[str, tuple[Make, list[Examples]]] = {
    **{name: (make, vectors(8, 9, 4, 3)) for name, make in ON_VECTORS.items()},
    **{f"convolution, {name}": (make, floats((2, SIDE, SIDE), 8, 9, 4, 3)) for name, make in ON_IMAGES.items()},
    **{f"sequences, {name}": (make, floats((LENGTH, FEATURES), 8, 9, 4, 3)) for name, make in ON_SEQUENCES.items()},
    **{f"embedding, {name}": (make, texts(8, 9, 4, 3)) for name, make in ON_TEXTS.items()},
}


@pytest.mark.parametrize("executor", [captured, stacked])
@pytest.mark.parametrize("what", LAYERS)
def test_whatever_the_layers(what: str, executor: Callable[..., Any]) -> None:
    assert assert_parity(*LAYERS[what], executor=executor) is None


@pytest.mark.parametrize("what", BY_AUTOGRAD)
def test_what_needs_autograd_is_captured_and_not_stacked(what: str) -> None:
    assert assert_parity(BY_AUTOGRAD[what], vectors(8, 9, 3)) is None
    assert_refused("", BY_AUTOGRAD[what], vectors(8, 9, 3), stacked)


def test_sparse_gradients_of_an_embedding_are_captured() -> None:
    assert assert_parity(embedded(sparse=True), texts(8, 9, 3)) is None


VIEWED: dict[str, Make] = {
    "a slice": model(lambda m, x: m.out(x @ (m.left @ m.right[1:7])), right=drawn(8, 6), left=drawn(6, 6), out=dense()),
    "one of several": model(
        lambda m, x: m.out(x @ (m.left @ m.right[1])), right=drawn(2, 6, 6), left=drawn(6, 6), out=dense()
    ),
    "a part": model(
        lambda m, x: m.out(x @ (m.left @ m.right.chunk(2)[1])), right=drawn(12, 6), left=drawn(6, 6), out=dense()
    ),
}


@pytest.mark.parametrize("executor", [captured, stacked])
@pytest.mark.parametrize("view", VIEWED)
def test_weights_times_a_view_of_weights(view: str, executor: Callable[..., Any]) -> None:
    work = sumus.sgd(0.1, steps=4, batch_size=4)
    assert assert_parity(VIEWED[view], vectors(8, 9), work=work, executor=executor) is None


# ── rules of one's own ───────────────────────────────────────────────────────────────────────────────────────────────

RULES: dict[str, LeafRule] = {
    "heavy ball": LeafRule(
        init=lambda p: (p * 1,), update=lambda g, s, p, lr, step: (p - lr * g + 0.3 * (p - s[0]), (p,))
    ),
    "optimistic": LeafRule(init=lambda p: (p * 0,), update=lambda g, s, p, lr, step: (p - lr * (2 * g - s[0]), (g,))),
    "averaging": LeafRule(init=lambda p: (p * 0,), update=lambda g, s, p, lr, step: (p - lr * g, (s[0] + p,))),
    "decreasing": LeafRule(init=lambda p: (), update=lambda g, s, p, lr, step: (p - lr / step * g, ())),
    "anchored": LeafRule(init=lambda p: (p,), update=lambda g, s, p, lr, step: (p - lr * g + 0.3 * (s[0] - p), s)),
    "two slots of one tensor": LeafRule(
        init=lambda p: (p * 0,) * 2, update=lambda g, s, p, lr, step: (p - lr * (g + s[0] - 0.5 * s[1]), (g, s[0] + g))
    ),
    "two gradients ago": LeafRule(
        init=lambda p: (p * 0, p * 0),
        update=lambda g, s, p, lr, step: (p - lr * (g + 0.5 * s[0] + 0.25 * s[1]), (g * 1, s[0])),
    ),
}


@pytest.mark.parametrize("executor", [captured, stacked])
@pytest.mark.parametrize("rule", RULES)
def test_whatever_the_clients_optimizer(rule: str, executor: Callable[..., Any]) -> None:
    work = ClientWork(optimizer=RULES[rule], lr=WORK.lr, steps=5, batch_size=4)
    assert assert_parity(mlp, vectors(8, 9, 4, 3), work=work, executor=executor) is None


def by_hand(rule: LeafRule, program: Program, examples: Examples, steps: int) -> dict[str, Tensor]:
    """A linear model after some steps on all of the examples; nothing shares memory."""
    leaves = {name: torch.tensor(leaf) for name, leaf in program.initial.items()}
    slots = {name: tuple(slot.clone() for slot in rule.init(leaf.clone())) for name, leaf in leaves.items()}
    for step in range(1, steps + 1):
        for leaf in leaves.values():
            leaf.requires_grad_()
        loss = functional.cross_entropy(functional.linear(examples[0], **leaves), examples[1])
        grads = torch.autograd.grad(loss, list(leaves.values()))
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            moved, kept = rule.update(grad, slots[name], leaf.detach().clone(), float(WORK.lr.at(0)), step)
            leaves[name], slots[name] = moved.clone(), tuple(slot.clone() for slot in kept)
    return leaves


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("executor", [SequentialExecutor, captured, stacked])
def test_a_clients_optimizer_does_what_it_says(executor: Callable[..., Any], rule: str) -> None:
    program, (examples,) = program_of(dense()), vectors(4)
    work = ClientWork(optimizer=RULES[rule], lr=WORK.lr, steps=4, batch_size=4)
    sent = trained_by(executor(program, work), [examples])["0"].parts["params"]
    for name, leaf in by_hand(RULES[rule], program, examples, 4).items():
        np.testing.assert_allclose(program.initial[name] - sent[name], leaf, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("executor", [captured, stacked])
def test_a_correction_may_give_a_leaf_as_the_gradient_of_another(executor: Callable[..., Any]) -> None:
    def exchanged(grads: Any, params: Any, broadcast: Any, state: Any) -> Any:
        return {**grads, "0.weight": params["2.weight"], "2.weight": params["0.weight"]}

    def square() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))

    work = ClientWork(
        optimizer=sumus.sgd(0.1).optimizer, lr=WORK.lr, steps=4, batch_size=4, rules=ClientRules(correct=exchanged)
    )
    assert_parity(square, vectors(8, 9), work=work, executor=executor)


@pytest.mark.parametrize("taken", [lambda grad: grad.max().tolist(), lambda grad: float(grad.numpy().max())])
def test_numbers_that_a_correction_takes_from_values_are_refused(taken: Callable[[Tensor], float]) -> None:
    def scaled(grads: Any, params: Any, broadcast: Any, state: Any) -> Any:
        return {name: grad * (1 + taken(grad)) for name, grad in grads.items()}

    work = ClientWork(
        optimizer=sumus.sgd(0.1).optimizer, lr=WORK.lr, steps=4, batch_size=4, rules=ClientRules(correct=scaled)
    )
    for executor in (stacked, captured):
        assert_refused("", mlp, vectors(8, 9), executor, work)


# ── buffers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def drifting(m: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        m.mean.mul_(0.9).add_(0.1 * inputs.mean(0))
        m.steps.add_(1)
    return m.out(inputs - m.mean / m.steps)


class Settled(nn.Module):
    """Its norm keeps the statistics that it came with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)

    def train(self, mode: bool = True) -> "Settled":
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.first(inputs))))


STATISTICS: dict[str, tuple[Make, list[Examples]]] = {
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, CLASSES)),
        vectors(8, 10, 3),
    ),
    "batch norm of images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)
        ),
        floats((2, SIDE, SIDE), 8, 9, 3),
    ),
    "instance norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten(), nn.Linear(64, CLASSES)
        ),
        floats((2, SIDE, SIDE), 8, 9, 3),
    ),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(FEATURES, 4)), nn.Tanh(), nn.Linear(4, CLASSES)),
        vectors(8, 9, 3),
    ),
    "settled": (Settled, vectors(8, 9, 3)),
    "a mean and a counter of its own": (
        model(
            drifting, out=dense(), mean=lambda: torch.zeros(FEATURES), steps=lambda: torch.zeros((), dtype=torch.long)
        ),
        vectors(8, 9, 3),
    ),
}


@pytest.mark.parametrize("what", STATISTICS)
def test_statistics_and_counters_go_on_as_by_autograd(what: str) -> None:
    """Captured whole batches, and short ones by autograd between them, on the same memory."""
    make, clients = STATISTICS[what]
    ours, theirs = captured(program_of(make)), SequentialExecutor(program_of(make), WORK)
    found, wanted = trained_by(ours, clients), trained_by(theirs, clients)
    assert ours.refused is None
    assert_close(found, wanted)
    assert all(BUFFERS in one.parts for one in found.values())
    for name, tensor in theirs.program.tensors.items():  # integer counters, which nobody sends
        torch.testing.assert_close(ours.program.tensors[name].detach(), tensor.detach(), rtol=0, atol=1e-9)


ACTING: dict[str, tuple[Make, Callable[..., list[Examples]]]] = {
    "batch norm": (
        lambda: nn.Sequential(
            nn.Linear(FEATURES, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, CLASSES)
        ),
        vectors,
    ),
    "a mean over the batch": (model(lambda m, x: m.out(x - x.mean(0)), out=dense()), vectors),
    "frequencies in the batch": (embedded(scale_grad_by_freq=True), texts),
}


@pytest.mark.parametrize("what", ACTING)
def test_rows_that_act_on_each_other_may_where_nothing_is_padded(what: str) -> None:
    make, clients = ACTING[what]
    assert assert_parity(make, clients(8, 8), executor=stacked) is None


@pytest.mark.parametrize("sizes", [(6, 3), (16, 16, 16)])
@pytest.mark.parametrize("what", ACTING)
def test_padding_would_act_on_such_rows_and_so_they_are_not_stacked(what: str, sizes: tuple[int, ...]) -> None:
    """No graph shows it: the probe compares a padded batch with autograd's, whatever the sizes of the clients it tries."""
    make, clients = ACTING[what]
    program = program_of(make)
    broadcast = {"params": {name: program.initial[name] for name in program.shared}}
    assignments = [ClientAssignment(f"{n}", *examples, {}, key(n)) for n, examples in enumerate(clients(*sizes))]
    chosen = checked(ExecutorChoice("vectorized", 2), program, WORK, assignments, broadcast)
    assert chosen.choice.kind != "vectorized"
    assert "the examples of a batch influence each other" in chosen.reason


# ── half precision ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("executor", [captured, stacked])
@pytest.mark.parametrize(
    "make",
    [
        mlp,
        lambda: nn.Sequential(nn.Linear(FEATURES, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 40)),
        lambda: nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    ],
)
def test_in_half_precision_a_step_is_about_as_exact_as_autograds(make: Make, executor: Callable[..., Any]) -> None:
    """Against the exact step of the same bfloat16 weights."""
    work, clients = sumus.sgd(1.0, steps=1, batch_size=8), vectors(8, 8)
    half = [(inputs.bfloat16(), targets) for inputs, targets in clients]

    def exactly() -> nn.Module:
        return make().bfloat16()

    exact = trained_by(SequentialExecutor(program_of(exactly), work), [(x.double(), y) for x, y in half])
    eager = trained_by(SequentialExecutor(program_of(make, dtype=torch.bfloat16), work), half)
    ours = trained_by(executor(program_of(make, dtype=torch.bfloat16), work), half)

    def away(results: Mapping[str, Trained]) -> float:
        pairs = [
            (leaf, exact[who].parts["params"][name])
            for who, one in results.items()
            for name, leaf in one.parts["params"].items()
        ]
        return float(np.sqrt(sum(np.sum((np.asarray(leaf, np.float64) - wanted) ** 2) for leaf, wanted in pairs)))

    assert away(ours) <= 2 * away(eager)
