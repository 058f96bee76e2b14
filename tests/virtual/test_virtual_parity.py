"""Every operation gives at a worker what it gives here, bit for bit, and so does its gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumus.virtual import EVERYTHING, Pointer, VirtualWorker, get, send
from sumus.virtual.operations import OPERATIONS, tensors_in


def some(*shape: int, seed: int = 0) -> Tensor:
    """Between 0.1 and 0.9, in float32."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1


X, Y, SQUARE = some(2, 3), some(2, 3, seed=1), some(3, 3, seed=2)
WHOLE = torch.tensor([[1, 2, 0], [0, 1, 2]])
BITS = torch.tensor([[True, False, True], [False, True, True]])
IMAGE = some(2, 3, 6, 6)
LABELS = torch.tensor([2, 0])

Case = tuple[Callable[..., Any], tuple[Any, ...]]
CASES: dict[str, list[Case]] = {
    "add": [
        (lambda x, y: x + y, (X, Y)),
        (lambda x: 2 + x, (X,)),
        (lambda x, y: torch.add(x, y, alpha=0.3), (X, Y[0])),
    ],
    "sub": [(lambda x, y: x - y, (X, Y)), (lambda x: torch.sub(x, 1.5), (X,))],
    "rsub": [(lambda x: 1 - x, (X,))],
    "mul": [(lambda x, y: x * y, (X, Y)), (lambda x: 0.1 * x, (X,))],
    "div": [(lambda x, y: x / y, (X, Y)), (lambda x: x / 3, (X,))],
    "rdiv": [(lambda x: 1 / x, (X,))],
    "floor_divide": [(lambda x: x.detach() // 0.3, (X,))],
    "remainder": [(lambda x: x % 0.3, (X,))],
    "pow": [(lambda x: x**2, (X,)), (lambda x, y: x.pow(y), (X, Y))],
    "rpow": [(lambda x: 2**x, (X,))],
    "neg": [(lambda x: -x, (X,))],
    "abs": [(lambda x: abs(x - 0.5), (X,))],
    "maximum": [(torch.maximum, (X, Y))],
    "minimum": [(torch.minimum, (X, Y))],
    "clamp": [(lambda x: x.clamp(0.2, 0.5), (X,)), (lambda x: torch.clamp(x, max=0.4), (X,))],
    "matmul": [(lambda x, y: x @ y, (X, SQUARE)), (lambda x, y: x @ y, (some(4, 2, 3), some(3)))],
    "sum": [
        (lambda x: x.sum(), (X,)),
        (lambda x: x.sum(0), (X,)),
        (lambda x: torch.sum(x, dim=(0, 1), keepdim=True), (X,)),
    ],
    "mean": [
        (lambda x: x.mean(), (X,)),
        (lambda x: x.mean(dim=1), (X,)),
        (lambda x: x.mean(dtype=torch.float64), (X,)),
    ],
    "round": [(lambda x: (x * 10).round(), (X,))],
    "logical_not": [(torch.logical_not, (BITS,))],
    "logical_and": [(torch.logical_and, (BITS, ~BITS))],
    "logical_or": [(torch.logical_or, (BITS, ~BITS))],
    "bitwise_not": [(lambda x: ~x, (BITS,))],
    "bitwise_and": [(lambda x, y: x & y, (BITS, BITS[0]))],
    "bitwise_or": [(lambda x, y: x | y, (WHOLE, WHOLE[0]))],
    "where": [(torch.where, (BITS, X, Y)), (lambda b, x: torch.where(b, x, 0.0), (BITS, X))],
    "lerp": [(lambda x, y: x.lerp(y, 0.3), (X, Y))],
    "addcmul": [(lambda x, y: x.addcmul(y, y, value=0.3), (X, Y))],
    "addcdiv": [(lambda x, y: x.addcdiv(y, y + 1, value=0.3), (X, Y))],
    "mm": [(torch.mm, (X, SQUARE))],
    "bmm": [(torch.bmm, (some(4, 2, 3), some(4, 3, 2)))],
    "mv": [(torch.mv, (X, some(3)))],
    "dot": [(torch.dot, (some(5), some(5, seed=1)))],
    "outer": [(torch.outer, (some(5), some(3)))],
    "var": [(lambda x: x.var(), (X,)), (lambda x: x.var(dim=1, correction=0), (X,))],
    "std": [(lambda x: x.std(1, keepdim=True), (X,))],
    "amax": [(lambda x: x.amax(1), (X,))],
    "amin": [(lambda x: x.amin(dim=0, keepdim=True), (X,))],
    "max": [(lambda x: x.max(), (X,)), (lambda x: x.max(1).values, (X,)), (lambda x: torch.max(x, 1)[1], (X,))],
    "min": [(lambda x: x.min(dim=0)[0], (X,))],
    "argmax": [(lambda x: x.argmax(1), (X,))],
    "argmin": [(lambda x: x.argmin(), (X,))],
    "cumsum": [(lambda x: x.cumsum(1), (X,))],
    "logsumexp": [(lambda x: x.logsumexp(1), (X,))],
    "vector_norm": [
        (lambda x: torch.linalg.vector_norm(x), (X,)),
        (lambda x: torch.linalg.vector_norm(x, 1, dim=1), (X,)),
    ],
    "view": [(lambda x: x.view(3, 2), (X,)), (lambda x: x.view((6,)), (X,)), (lambda x: x.view(-1), (X,))],
    "reshape": [(lambda x: x.reshape(3, -1), (X,)), (lambda x: torch.reshape(x, (6,)), (X,))],
    "expand": [(lambda x: x.unsqueeze(0).expand(4, -1, -1), (X,))],
    "repeat": [(lambda x: x.repeat(2, 1), (X,))],
    "permute": [(lambda x: x.permute(1, 0), (X,)), (lambda x: x.T, (X,))],
    "flatten": [(lambda x: x.flatten(), (X,)), (lambda x: torch.flatten(x, 1), (IMAGE,)), (nn.Flatten(), (IMAGE,))],
    "transpose": [(lambda x: x.transpose(0, 1), (X,)), (lambda x: x.mT, (X,))],
    "t": [(lambda x: x.t(), (X,))],
    "squeeze": [(lambda x: x[:1].squeeze(0), (X,)), (lambda x: x[:1].squeeze(), (X,))],
    "unsqueeze": [(lambda x: x.unsqueeze(-1), (X,))],
    "getitem": [
        (lambda x: x[0], (X,)),
        (lambda x: x[:, 1:], (X,)),
        (lambda x: x[..., None, -1], (X,)),
        (lambda x, i: x[i], (X, torch.tensor([1, 1, 0]))),
        (lambda x: torch.stack(list(x)), (X,)),
    ],
    "cat": [(lambda x, y: torch.cat([x, y]), (X, Y)), (lambda x, y: torch.cat((x, y), dim=1), (X, Y))],
    "stack": [(lambda x, y: torch.stack([x, y], 1), (X, Y))],
    "gather": [(lambda x, i: x.gather(1, i), (X, WHOLE))],
    "clone": [(lambda x: x.clone(), (X,))],
    "detach": [(lambda x: x * x.detach(), (X,))],
    "contiguous": [(lambda x: x.t().contiguous(), (X,)), (lambda x: x.contiguous() * 1, (X,))],
    "to": [(lambda x: x.double() * 3, (X,)), (lambda x: x.to(torch.float16), (X,)), (lambda x: x.to("cpu") * 1, (X,))],
    "zeros_like": [(torch.zeros_like, (X,))],
    "ones_like": [(lambda x: torch.ones_like(x, dtype=torch.int64), (X,))],
    "full_like": [(lambda x: torch.full_like(x, 0.3), (X,))],
    "relu": [(lambda x: F.relu(x - 0.5), (X,)), (lambda x: torch.relu(x), (X,)), (nn.ReLU(), (X,))],
    "gelu": [(F.gelu, (X,)), (nn.GELU(approximate="tanh"), (X,))],
    "elu": [(F.elu, (X,)), (nn.ELU(0.5), (X,))],
    "leaky_relu": [(F.leaky_relu, (X,)), (nn.LeakyReLU(0.2), (X,))],
    "softplus": [(nn.Softplus(), (X,))],
    "softmax": [(lambda x: F.softmax(x, dim=1), (X,)), (lambda x: x.softmax(0), (X,)), (nn.Softmax(dim=1), (X,))],
    "log_softmax": [(lambda x: F.log_softmax(x, dim=-1), (X,)), (lambda x: torch.log_softmax(x, 1), (X,))],
    "linear": [(F.linear, (X, SQUARE)), (F.linear, (X, SQUARE, some(3)))],
    "embedding": [(lambda i, w: F.embedding(i, w, padding_idx=0), (WHOLE, SQUARE))],
    "conv1d": [(lambda x, w, b: F.conv1d(x, w, b, padding=1), (some(2, 3, 8), some(4, 3, 3), some(4)))],
    "conv2d": [(lambda x, w: F.conv2d(x, w, stride=2), (IMAGE, some(4, 3, 3, 3)))],
    "max_pool2d": [(lambda x: F.max_pool2d(x, 2), (IMAGE,)), (nn.MaxPool2d(3, stride=1, padding=1), (IMAGE,))],
    "avg_pool2d": [(nn.AvgPool2d(2), (IMAGE,))],
    "adaptive_avg_pool2d": [(nn.AdaptiveAvgPool2d((1, 1)), (IMAGE,)), (nn.AdaptiveAvgPool2d(2), (IMAGE,))],
    "layer_norm": [(lambda x, w, b: F.layer_norm(x, (3,), w, b), (X, some(3), some(3, seed=1)))],
    "batch_norm": [
        (lambda x, m, v: F.batch_norm(x, m.detach(), v.detach(), training=True), (X, some(3), some(3))),
        (lambda x, m, v, w, b: F.batch_norm(x, m.detach(), v.detach(), w, b), (X, *[some(3)] * 4)),
        (lambda x: F.batch_norm(x, None, None, training=True), (IMAGE,)),
    ],
    "mse_loss": [(F.mse_loss, (X, Y)), (nn.MSELoss(reduction="sum"), (X, Y))],
    "l1_loss": [(nn.L1Loss(), (X, Y))],
    "smooth_l1_loss": [(nn.SmoothL1Loss(beta=0.1), (X, Y))],
    "binary_cross_entropy": [(nn.BCELoss(), (X, Y.round())), (nn.BCELoss(reduction="none"), (X, Y.round()))],
    "binary_cross_entropy_with_logits": [
        (nn.BCEWithLogitsLoss(), (X, Y.round())),
        (lambda x, y, p: F.binary_cross_entropy_with_logits(x, y, pos_weight=p.detach()), (X, Y.round(), some(3))),
    ],
    "nll_loss": [(lambda x, y: F.nll_loss(x.log_softmax(1), y), (X, LABELS))],
    "cross_entropy": [
        (nn.CrossEntropyLoss(), (X, LABELS)),
        (
            lambda x, y, w: F.cross_entropy(x, y, weight=w.detach(), label_smoothing=0.1, reduction="sum"),
            (X, LABELS, some(3)),
        ),
        (nn.CrossEntropyLoss(ignore_index=0), (X, LABELS)),
    ],
    "add_": [(lambda x, y: x.clone().add_(y, alpha=0.3), (X, Y))],
    "sub_": [(lambda x, y: x.clone().sub_(y), (X, Y))],
    "mul_": [(lambda x: x.clone().mul_(0.3), (X,))],
    "div_": [(lambda x, y: x.clone().div_(y), (X, Y))],
    "pow_": [(lambda x: x.clone().pow_(3), (X,))],
    "neg_": [(lambda x: x.clone().neg_(), (X,))],
    "sqrt_": [(lambda x: x.clone().sqrt_(), (X,))],
    "clamp_": [(lambda x: x.clone().clamp_(min=0.4), (X,))],
    "lerp_": [(lambda x, y: x.clone().lerp_(y, 0.1), (X, Y))],
    "addcmul_": [(lambda x, y: x.clone().addcmul_(y, y, value=0.1), (X, Y))],
    "addcdiv_": [(lambda x, y: x.clone().addcdiv_(y, y, value=0.1), (X, Y))],
    "relu_": [(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), ()), (lambda x: (x - 0.5).relu_(), (X,))],
    "sigmoid_": [(lambda x: x.clone().sigmoid_(), (X,))],
    "tanh_": [(lambda x: x.clone().tanh_(), (X,))],
    "zero_": [(lambda x: x.clone().zero_(), (X,))],
    "fill_": [(lambda x: x.clone().fill_(0.1), (X,))],
    "copy_": [(lambda x, y: x.clone().copy_(y), (X, Y))],
    "masked_fill_": [(lambda x, m: x.clone().masked_fill_(m, 0.5), (X, BITS))],
    "setitem": [],
}
for _name in ("square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "log1p", "sin", "cos", "sign", "floor"):
    CASES[_name] = [(getattr(torch, _name), (X,))]
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    CASES[_name] = [(getattr(torch, _name), (X, Y)), (lambda x, name=_name: getattr(x, f"__{name}__")(0.5), (X,))]
for _name in ("sigmoid", "tanh", "silu", "logsigmoid"):
    CASES[_name] = [(getattr(F, _name), (X,))]
CASES["relu_"] = CASES["relu_"][1:]


def put(x: Any, at: Any, value: Any) -> Any:
    """x[at] = value, of a copy."""
    copied = x.clone()
    copied[at] = value
    return copied


CASES["setitem"] = [
    (lambda x: put(x, 0, 0.5), (X,)),
    (lambda x, y: put(x, (slice(None), 1), y[:, 0]), (X, Y)),
]


@pytest.fixture
def alice() -> VirtualWorker:
    return VirtualWorker("alice")


def same(here: Any, there: Any) -> None:
    """Equal in every bit, and in what autograd thinks of it."""
    assert isinstance(there, Pointer)
    assert (there.shape, there.dtype, there.requires_grad) == (here.shape, here.dtype, here.requires_grad)
    found = there.get()
    assert found.dtype == here.dtype
    assert torch.equal(
        found.detach().reshape(-1).view(torch.uint8), here.detach().reshape(-1).contiguous().view(torch.uint8)
    )


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == EVERYTHING
    assert all(CASES.values())


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_it_gives_the_same_bits_and_the_same_gradients(alice: VirtualWorker, name: str) -> None:
    for function, arguments in CASES[name]:
        here = [each.clone().requires_grad_(each.is_floating_point()) for each in arguments]
        there = [send(each, alice) for each in here]
        result, pointer = function(*here), function(*there)
        same(result, pointer)
        if result.requires_grad:
            seed = some(*result.shape, seed=9).to(result.dtype)
            result.backward(seed)
            pointer.backward(send(seed, alice))
            for plain, remote in zip(here, there, strict=True):
                if plain.grad is None:
                    assert remote.grad is None
                else:
                    same(plain.grad, remote.grad)


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_it_is_what_it_is_called(alice: VirtualWorker, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case of an operation uses that operation, and it alone of what its policy may forbid."""
    asked: set[str] = set()
    ask = alice.ask

    def listening(what: Any, *rest: Any) -> Any:
        asked.add(getattr(what, "operation", ""))
        return ask(what, *rest)

    monkeypatch.setattr(alice, "ask", listening)
    for function, arguments in CASES[name]:
        function(*[send(each, alice) for each in arguments])
    assert name in asked


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_it_changes_what_it_says_and_nothing_else(
    alice: VirtualWorker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts changes in place; of what is not declared to change, that count stays."""
    operation = OPERATIONS[name]
    changes: list[tuple[int, ...]] = []

    def watched(*arguments: Any, **named: Any) -> Any:
        if any(tensor.is_meta for tensor in tensors_in(arguments)):
            return operation.function(*arguments, **named)
        tensors = [next(tensors_in([each]), None) for each in arguments]
        versions = [None if each is None else each._version for each in tensors]
        result = operation.function(*arguments, **named)
        after = [None if each is None else each._version for each in tensors]
        changes.append(tuple(at for at, version in enumerate(versions) if version != after[at]))
        return result

    monkeypatch.setitem(OPERATIONS, name, replace(operation, function=watched))
    function, arguments = CASES[name][0]
    function(*[send(each, alice) for each in arguments])
    assert changes == [operation.changes]


# ── models and optimizers ────────────────────────────────────────────────────────────────────────────────────────────


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 2))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda leaves: torch.optim.SGD(leaves, lr=0.1),
    "momentum": lambda leaves: torch.optim.SGD(leaves, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda leaves: torch.optim.Adam(leaves, lr=0.01),
    "adamw": lambda leaves: torch.optim.AdamW(leaves, lr=0.01),
    "adagrad": lambda leaves: torch.optim.Adagrad(leaves, lr=0.01),
    "rmsprop": lambda leaves: torch.optim.RMSprop(leaves, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [dense, normed])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_model_learns_the_same(alice: VirtualWorker, make: Any, optimizer: str, to_none: bool) -> None:
    torch.manual_seed(0)
    here = make()
    there = send(here, alice)
    inputs, targets = some(5, 3), torch.tensor([0, 1, 1, 0, 1])
    runs = [(here, inputs, targets), (there, send(inputs, alice), send(targets, alice))]
    losses = []
    for model, x, y in runs:
        steps = OPTIMIZERS[optimizer](model.parameters())
        for _ in range(3):
            steps.zero_grad(set_to_none=to_none)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            steps.step()
        losses.append(loss)  # pyright: ignore[reportPossiblyUnboundVariable]
    same(*losses)
    for (name, leaf), (again, learnt) in zip(here.state_dict().items(), get(there).state_dict().items(), strict=True):
        assert name == again
        assert torch.equal(leaf, learnt), name


def test_a_sent_model_is_a_copy_of_its_class_and_keeps_ties(alice: VirtualWorker) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)

    model = Tied()
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    there = send(model, alice)
    assert type(there) is Tied
    assert there.first.weight is there.second.weight
    assert all(isinstance(leaf, nn.Parameter) for leaf in there.parameters())
    assert [leaf.requires_grad for leaf in there.parameters()] == [True, False, True]
    with torch.no_grad():
        there.first.weight.zero_()
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())
    back = get(there)
    assert back.first.weight is back.second.weight
    assert not back.second.weight.any()
    assert [leaf.requires_grad for leaf in back.parameters()] == [True, False, True]


def test_no_grad_holds_at_the_worker(alice: VirtualWorker) -> None:
    w = send(torch.ones(2, requires_grad=True), alice)
    with torch.no_grad():
        assert not (w * 2).requires_grad
    assert (w * 2).requires_grad
    assert not w.detach().requires_grad


def test_inference_mode_is_the_callers(alice: VirtualWorker) -> None:
    with torch.inference_mode():
        w = send(torch.ones(2), alice)
        assert not (w * 2).requires_grad
    (w.requires_grad_() * 3).sum().backward()
    assert w.grad.get().tolist() == [3.0, 3.0]


def test_gradients_add_up_until_they_are_taken_away(alice: VirtualWorker) -> None:
    w = send(torch.ones(2, requires_grad=True), alice)
    assert w.grad is None
    (w * 3).sum().backward()
    first = w.grad
    assert first is w.grad, "asked for once"
    (w * 3).sum().backward()
    assert w.grad.get().tolist() == [6.0, 6.0]
    w.grad = None
    assert w.grad is None
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert w.grad.get().tolist() == [4.0, 4.0]
    w.grad = send(torch.tensor([1.0, 2.0]), alice)
    assert w.grad.get().tolist() == [1.0, 2.0]
