"""Each rewrite of a captured step by itself, on graphs of a few operators: what it makes, what it leaves, and same values."""

from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import sumus
from sumus.executors.executor import ClientAssignment
from sumus.executors.sequential import SequentialExecutor
from sumus.metrics import IGNORED
from sumus.rng import key
from sumus.training import losses, rewrite
from sumus.training.program import Program
from sumus.training.rewrite import NotCapturable
from sumus.work import ClientWork

aten = torch.ops.aten

Function = Callable[..., Any]


def traced(function: Function, *values: Tensor) -> GraphModule:
    return make_fx(function)(*(value.clone() for value in values))


def operators(module: GraphModule) -> Counter[str]:
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    return Counter(name.removeprefix("aten.").removesuffix(".default") for name in names)


def run(module: GraphModule, *values: Any) -> Any:
    module.graph.lint()
    module.recompile()
    return module(*(value.clone() if isinstance(value, Tensor) else value for value in values))


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(ours: Any, theirs: Any, atol: float = 1e-12) -> None:
    pairs = zip(ours, theirs, strict=True) if isinstance(theirs, list | tuple) else [(ours, theirs)]
    for mine, wanted in pairs:
        torch.testing.assert_close(mine, wanted, rtol=0, atol=atol)


def rewritten(change: Callable[[Any], Any], function: Function, *values: Tensor, atol: float = 1e-12) -> Counter[str]:
    """The operators after a rewrite, which must leave every value."""
    module = traced(function, *values)
    change(module.graph)
    assert_close(run(module, *values), function(*(value.clone() for value in values)), atol)
    return operators(module)


# ── simplify ─────────────────────────────────────────────────────────────────────────────────────────────────────────

NOTHING: dict[str, Function] = {
    "a view to its own shape": lambda x: aten.view.default(x, [4, 3]) + 1,
    "an expansion to its own shape": lambda x: aten.expand.default(x, [4, 3]) + 1,
    "transposed twice": lambda x: x.t().t() + 1,
    "two dimensions exchanged twice": lambda x: x.transpose(0, 1).transpose(1, 0) + 1,
    "times one": lambda x: aten.mul.Scalar(x, 1) + 1,
    "over one": lambda x: aten.div.Scalar(x, 1.0) + 1,
    "detached": lambda x: x.detach() + 1,
}


@pytest.mark.parametrize("what", NOTHING)
def test_what_changes_nothing_is_dropped(what: str) -> None:
    assert rewritten(rewrite.simplify, NOTHING[what], some(4, 3)) == {"add.Tensor": 1}


def test_a_view_made_twice_is_made_once() -> None:
    assert rewritten(rewrite.simplify, lambda x: x.view(6, 2) * x.view(6, 2).cos(), some(4, 3))["view"] == 1


KEPT: dict[str, Function] = {
    "a view to another shape": lambda x: x.view(3, 4) + 1,
    "transposed once": lambda x: x.t() + 1,
    "different dimensions exchanged": lambda x: x.view(4, 3, 1).transpose(0, 1).transpose(1, 2) + 1,
    "times one, in another dtype": lambda x: aten.mul.Scalar(x.int(), 1.0) + 1,
    "a copy of its own, changed": lambda x: aten.mul.Scalar(x, 1).add_(1) + x,
}


@pytest.mark.parametrize("what", KEPT)
def test_what_changes_something_stays(what: str) -> None:
    before = operators(traced(KEPT[what], some(4, 3)))
    assert rewritten(rewrite.simplify, KEPT[what], some(4, 3)) == before


def test_a_copy_stays_where_its_source_is_changed_after() -> None:
    def function(x: Tensor) -> Tensor:
        before = aten.mul.Scalar(x, 1)
        x.add_(1)
        return before + x

    rewritten(rewrite.simplify, function, some(4, 3))


# ── x·W + b ──────────────────────────────────────────────────────────────────────────────────────────────────────────

X, W, B = some(4, 3), some(3, 5, seed=1), some(5, seed=2)
STACK = some(2, 4, 3), some(2, 3, 5, seed=1), some(2, 1, 5, seed=2)

WITH_BIAS: dict[str, tuple[Function, Sequence[Tensor], str]] = {
    "a layer": (lambda x, w, b: x @ w + b, (X, W, B), "addmm"),
    "the bias first": (lambda x, w, b: b + x @ w, (X, W, B), "addmm"),
    "of sequences": (lambda x, w, b: (x.view(4, 3) @ w).view(2, 2, 5) + b, (some(2, 2, 3), W, B), "addmm"),
    "by the transpose": (lambda x, w, b: x @ w.t() + b, (X, some(5, 3), B), "addmm"),
    "a stack of layers": (lambda x, w, b: aten.bmm.default(x, w) + b, STACK, "baddbmm"),
}


@pytest.mark.parametrize("what", WITH_BIAS)
def test_a_bias_joins_its_product(what: str) -> None:
    function, values, fused = WITH_BIAS[what]
    found = rewritten(rewrite.fuse_bias, function, *values)
    assert found[fused] == 1
    assert not found.keys() & {"mm", "bmm", "add.Tensor"}


ALONE: dict[str, tuple[Function, Sequence[Tensor]]] = {
    "the product is used elsewhere": (lambda x, w, b: (lambda y: y + b + y.cos())(x @ w), (X, W, B)),
    "a column is added": (lambda x, w, b: x @ w + b, (X, W, some(4, 1))),
    "a matrix is added": (lambda x, w, b: x @ w + b, (X, W, some(4, 5))),
    "a number is added": (lambda x, w, b: x @ w + 1.0, (X, W, B)),
    "a multiple is added": (lambda x, w, b: torch.add(x @ w, b, alpha=2), (X, W, B)),
    "to another shape": (lambda x, w, b: (x @ w).view(5, 4) + b, (X, W, some(4))),
    "wider": (lambda x, w, b: x @ w + b, (X.float(), W.float(), B)),
    "a bias for all of a stack": (lambda x, w, b: aten.bmm.default(x, w) + b, (*STACK[:2], some(1, 4, 5))),
}


@pytest.mark.parametrize("why", ALONE)
def test_what_is_no_bias_is_added_as_it_was(why: str) -> None:
    function, values = ALONE[why]
    assert not rewritten(rewrite.fuse_bias, function, *values).keys() & {"addmm", "baddbmm"}


def test_a_product_is_taken_before_its_factor_changes() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        product = x @ w
        x.add_(1.0)
        return product + b + x.sum()

    rewritten(rewrite.fuse_bias, function, X, W, B)


def test_a_bias_by_rows_is_no_bias_by_stack() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return aten.bmm.default(x, w).view(2, 2, 2, 5) + b

    rewritten(rewrite.fuse_bias, function, *STACK)


# ── cross-entropy ────────────────────────────────────────────────────────────────────────────────────────────────────

Losses = Callable[[Tensor, Tensor], Tensor]


def fuse_cross_entropy(graph: Graph) -> None:
    """As a step's capture does it: the copies that autograd detaches are gone before."""
    rewrite.simplify(graph)
    rewrite.fuse_cross_entropy(graph)


def loss_and_gradient(loss: Losses) -> Function:
    def function(scores: Tensor, targets: Tensor) -> list[Tensor]:
        leaf = scores.detach().requires_grad_()
        each = loss(leaf, targets)
        (gradient,) = torch.autograd.grad(each.mean(), leaf)
        return [each.detach(), gradient]

    return function


def plainly(scores: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(scores, targets, reduction="none", ignore_index=IGNORED)


TARGETS = torch.tensor([0, 2, 1, 2, 0])
SCORES: dict[str, tuple[Tensor, Tensor]] = {
    "ordinary": (some(5, 3), TARGETS),
    "one class": (some(5, 1), TARGETS * 0),
    "one row": (some(1, 3), TARGETS[:1]),
    "some ignored": (some(5, 3), torch.where(TARGETS == 2, IGNORED, TARGETS)),
    "all ignored": (some(5, 3), torch.full_like(TARGETS, IGNORED)),
    "large": (some(5, 3) * 1e4, TARGETS),
    "large and alike": (some(5, 3) + 1e4, TARGETS),
    "very negative": (some(5, 3) - 1e4, TARGETS),
    "equal": (torch.zeros(5, 3, dtype=torch.float64), TARGETS),
    "impossible classes": (
        some(5, 4).masked_fill(torch.tensor([False, False, False, True]), -torch.inf),
        TARGETS,
    ),
}


@pytest.mark.parametrize("what", SCORES)
def test_cross_entropy_and_its_gradient_come_from_one_exponential(what: str) -> None:
    scores, targets = SCORES[what]
    module = traced(loss_and_gradient(plainly), scores, targets)
    fuse_cross_entropy(module.graph)
    found = run(module, scores, targets)
    assert all(torch.isfinite(value).all() for value in found)
    assert_close(found, loss_and_gradient(plainly)(scores, targets))
    assert operators(module)["exp_"] == 1
    assert not operators(module).keys() & {"_log_softmax", "_log_softmax_backward_data", "nll_loss_forward"}


@pytest.mark.parametrize("what", SCORES)
def test_in_float32_it_is_about_as_exact_as_torchs(what: str) -> None:
    scores, targets = SCORES[what]
    module = traced(loss_and_gradient(plainly), scores.float(), targets)
    fuse_cross_entropy(module.graph)
    ours, theirs = run(module, scores.float(), targets), loss_and_gradient(plainly)(scores.float(), targets)
    for mine, its, exact in zip(
        ours, theirs, loss_and_gradient(plainly)(scores.float().double(), targets), strict=True
    ):
        floor = 1e-7 * float(exact.abs().max().clamp(min=1.0))
        assert float((mine - exact).abs().max()) <= 4 * float((its - exact).abs().max()) + floor


def test_a_graph_takes_other_ignored_rows_than_it_was_made_with() -> None:
    module = traced(loss_and_gradient(plainly), *SCORES["ordinary"])
    fuse_cross_entropy(module.graph)
    for what in ("some ignored", "all ignored", "ordinary", "large"):
        assert_close(run(module, *SCORES[what]), loss_and_gradient(plainly)(*SCORES[what]))


def test_two_losses_of_the_same_scores_are_both_fused() -> None:
    def twice(scores: Tensor, targets: Tensor) -> Tensor:
        return plainly(scores, targets) + 0.5 * plainly(2 * scores, (targets + 1) % 3)

    found = rewritten(fuse_cross_entropy, loss_and_gradient(twice), *SCORES["ordinary"])
    assert found["exp_"] == 2


def with_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    logs = functional.log_softmax(scores, 1)
    return functional.nll_loss(logs, targets, reduction="none") - 0.1 * logs.mean(1)


def weighted(scores: Tensor, targets: Tensor) -> Tensor:
    weights = torch.tensor([0.2, 0.5, 1.0], dtype=scores.dtype)
    return functional.cross_entropy(scores, targets, weight=weights, reduction="none")


def smoothed(scores: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(scores, targets, label_smoothing=0.1, reduction="none")


def by_columns(scores: Tensor, targets: Tensor) -> Tensor:
    return -functional.log_softmax(scores, 0).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("loss", [with_entropy, weighted, smoothed, by_columns])
def test_other_losses_stay_as_they_are(loss: Losses) -> None:
    assert rewritten(fuse_cross_entropy, loss_and_gradient(loss), *SCORES["ordinary"])["_log_softmax"] == 1


# ── pooling ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def pooled(images: Tensor, kernels: Tensor) -> list[Tensor]:
    leaf = kernels.detach().requires_grad_()
    seen = functional.max_pool2d(torch.relu(functional.conv2d(images, leaf)), 2)
    out = seen.flatten(1).square().sum()
    return [seen.detach(), *torch.autograd.grad(out, leaf)]


def test_pooling_is_channels_last_and_gives_the_same() -> None:
    values = some(2, 3, 7, 7), some(4, 3, 2, 2, seed=1)
    module = traced(pooled, *values)
    rewrite.pool_channels_last(module.graph)
    turned = [
        node for node in module.graph.nodes if node.kwargs.get("memory_format") is torch.channels_last and node.users
    ]
    assert len(turned) == 1
    assert_close(run(module, *values), pooled(*values))


def test_of_equal_values_the_first_wins_in_either_layout() -> None:
    values = some(2, 3, 7, 7).round(), some(4, 3, 2, 2, seed=1).round()
    rewritten(rewrite.pool_channels_last, pooled, *values)


def test_without_pooling_nothing_changes() -> None:
    before = operators(traced(lambda x: x.view(6, 2) + 1, some(4, 3)))
    assert rewritten(rewrite.pool_channels_last, lambda x: x.view(6, 2) + 1, some(4, 3)) == before


def test_a_write_into_a_view_of_what_was_pooled_is_seen() -> None:
    def function(images: Tensor) -> Tensor:
        seen = functional.max_pool2d(images, 2)
        seen.view(len(images), -1)[:, :5] = 0.5
        return seen * 2

    rewritten(rewrite.pool_channels_last, function, some(2, 3, 6, 6))


def test_a_write_into_a_view_of_what_will_be_pooled_is_seen() -> None:
    def function(images: Tensor) -> Tensor:
        copy = images.clone()
        flat = copy.view(-1)
        seen = functional.max_pool2d(copy, 2)
        flat.add_(1.0)
        return copy.sum() + seen.sum()

    rewritten(rewrite.pool_channels_last, function, some(2, 3, 6, 6))


# ── results written into the state they replace ──────────────────────────────────────────────────────────────────────

LR = torch.tensor(0.1, dtype=torch.float64)


def updated(function: Function, state: Sequence[Tensor], *others: Tensor) -> Counter[str]:
    """The operators of a step in place. function: (state…, lr, others…) → (next state…, other results…)."""
    values = [*state, LR, *others]
    module = traced(lambda *args: list(function(*args)), *values)
    graph = module.graph
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(arguments[-1]):
        negative = graph.placeholder("negative_lr")
    places = {node: place for place, node in enumerate(arguments[: len(state)])}
    rewrite.update_in_place(graph, places, arguments[len(state)], negative)
    graph.lint()
    module.recompile()
    held = [leaf.clone() for leaf in state]
    returned = module(*held, LR, *others, -float(LR))
    wanted = function(*(leaf.clone() for leaf in state), LR, *others)
    assert_close(held, list(wanted[: len(state)]))
    assert_close(list(returned), list(wanted[len(state) :]))
    return operators(module)


P, Q, A, C = some(3, 4), some(4, 5, seed=1), some(3, 6, seed=2), some(6, 4, seed=3)


def test_a_gradient_that_is_a_product_is_folded_into_the_step() -> None:
    assert updated(lambda p, lr, a, c: (p - lr * (a @ c), p.sum()), [P], A, C) == {"sum": 1, "addmm_": 1}


def test_a_transposed_product_is_folded_by_its_factors() -> None:
    found = updated(lambda p, lr, a, c: (p - lr * (c.t() @ a.t()).t(),), [P], A, C)
    assert found["addmm_"] == 1
    assert not found.keys() & {"mm", "mul.Tensor", "sub.Tensor"}


def test_a_stack_of_products_is_folded() -> None:
    leaf, a, c = some(2, 3, 4), some(2, 3, 6, seed=1), some(2, 6, 4, seed=2)
    assert updated(lambda p, lr, a, c: (p - lr * aten.bmm.default(a, c),), [leaf], a, c) == {"baddbmm_": 1}
    turned = lambda p, lr, a, c: (p - aten.bmm.default(c.mT, a.mT).transpose(1, 2) * lr,)  # noqa: E731
    found = updated(turned, [leaf], a, c)
    assert found["baddbmm_"] == 1
    assert "bmm" not in found


def test_any_other_gradient_is_added() -> None:
    assert updated(lambda p, lr, g: (p - lr * g,), [P], some(3, 4, seed=9)) == {"add_.Tensor": 1}


NOT_FOLDED: dict[str, Function] = {
    "used elsewhere": lambda p, lr, a, c: (lambda g: (p - lr * g, g.square().sum()))(a @ c),
    "clipped": lambda p, lr, a, c: (lambda g: (p - lr * (g / g.norm().clip(min=1)),))(a @ c),
    "with decay": lambda p, lr, a, c: (p - lr * (a @ c + 0.1 * p),),
}


@pytest.mark.parametrize("why", NOT_FOLDED)
def test_a_product_that_is_more_than_the_gradient_stays(why: str) -> None:
    assert "addmm_" not in updated(NOT_FOLDED[why], [P], A, C)


@pytest.mark.parametrize("turned", [False, True])
def test_a_product_with_another_leaf_is_taken_before_that_leaf_changes(turned: bool) -> None:
    """y = P Q x: the gradient of each holds the other."""

    def step(p: Tensor, q: Tensor, lr: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        of_p, of_q = g @ q.t(), p.t() @ g
        return (p - lr * of_p, q - lr * of_q) if not turned else (p - lr * (q @ g.t()).t(), q - lr * (g.t() @ p).t())

    assert "addmm_" not in updated(step, [P, Q], some(3, 5, seed=4))


VIEWS: dict[str, tuple[Tensor, Function]] = {
    "transposed": (some(6, 4), lambda q: q.t().t()),
    "reshaped": (some(24), lambda q: q.view(6, 4)),
    "permuted": (some(4, 6), lambda q: q.permute(1, 0)),
    "a slice": (some(8, 4), lambda q: q[1:7]),
    "one of several": (some(2, 6, 4), lambda q: q[1]),
    "squeezed": (some(1, 6, 4), lambda q: q.squeeze(0)),
    "a part": (some(12, 4), lambda q: q.chunk(2)[1]),
    "unbound": (some(2, 6, 4), lambda q: q.unbind(0)[1]),
    "a diagonal": (some(6, 4, 6), lambda q: q.diagonal(dim1=0, dim2=2).t()),
    "strided": (some(6, 4), lambda q: q.as_strided((6, 4), (4, 1))),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_product_with_a_view_of_another_leaf_is_taken_before_that_leaf_changes(view: str) -> None:
    other, look = VIEWS[view]

    def step(q: Tensor, p: Tensor, lr: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        return q - lr * q.cos(), p - lr * (a @ look(q))

    updated(step, [other, P], A)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda p, q, lr, g: (g * 1, p), id="shifted"),
        pytest.param(lambda p, q, lr, g: (q, p), id="exchanged"),
        pytest.param(lambda p, q, lr, g: (p - lr * g, p), id="the leaf before its step"),
        pytest.param(lambda p, q, lr, g: (p - lr * g, q - lr * p), id="a step by the leaf before its step"),
    ],
)
def test_state_may_move_to_other_state(step: Function) -> None:
    updated(step, [P, some(3, 4, seed=7)], some(3, 4, seed=8))


def test_state_that_stays_is_not_written() -> None:
    assert updated(lambda p, lr: (p, p.sum()), [P]) == {"sum": 1}
    assert updated(lambda p, lr: (p.clone(), p.sum()), [P]) == {"sum": 1}


def test_other_next_states_are_copied() -> None:
    assert updated(lambda p, lr: (0.9 * p,), [P])["copy_"] == 1
    assert updated(lambda p, lr: (p.clone().add_(1),), [P])["copy_"] == 1


# ── oneDNN ───────────────────────────────────────────────────────────────────────────────────────────────────────────

LAYERS: dict[str, tuple[Function, Sequence[Tensor]]] = {
    "addmm, transposed": (lambda x, w, b: aten.addmm.default(b, x, w.t()), (X, some(5, 3), B)),
    "addmm": (lambda x, w, b: aten.addmm.default(b, x, w), (X, W, B)),
    "mm": (lambda x, w, b: x @ w, (X, W, B)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_float32_products_go_by_onednn(layer: str) -> None:
    function, values = LAYERS[layer]
    found = rewritten(rewrite.multiply_by_onednn, function, *(value.float() for value in values), atol=1e-6)
    assert found["mkldnn._linear_pointwise"] == 1
    assert not found.keys() & {"mm", "addmm"}


@pytest.mark.parametrize("layer", LAYERS)
def test_other_precisions_stay(layer: str) -> None:
    function, values = LAYERS[layer]
    assert "mkldnn._linear_pointwise" not in rewritten(rewrite.multiply_by_onednn, function, *values)


def test_a_matrix_as_bias_stays() -> None:
    found = rewritten(
        rewrite.multiply_by_onednn,
        lambda x, w, b: aten.addmm.default(b, x, w),
        *(value.float() for value in (X, W, some(4, 5))),
    )
    assert found["addmm"] == 1


def test_where_torch_has_no_onednn_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = traced(lambda x, w: x @ w, X.float(), W.float())
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    with pytest.raises(NotCapturable, match="no linear operator of oneDNN"):
        rewrite.multiply_by_onednn(module.graph)


# ── all together ─────────────────────────────────────────────────────────────────────────────────────────────────────

ACTIVATIONS: list[Callable[[], nn.Module]] = [nn.ReLU, nn.Tanh, nn.GELU, lambda: nn.ReLU(inplace=True), nn.Identity]


def dense(widths: Sequence[int], activation: Callable[[], nn.Module], bias: bool, norm: bool, out: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in zip([4, *widths], widths, strict=False):
        layers += [nn.Linear(before, after, bias=bias), *([nn.LayerNorm(after)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear([4, *widths][-1], out))


def convolutional(
    widths: Sequence[int], activation: Callable[[], nn.Module], bias: bool, pool: bool, out: int
) -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for before, after in zip([1, *widths], widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=bias), activation()]
        layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(out))


LOSSES: dict[str, Losses] = {"cross-entropy": losses.cross_entropy, "weighted": weighted, "smoothed": smoothed}


def step_of(program: Program, work: ClientWork, examples: tuple[Tensor, Tensor], captured: bool) -> dict[str, Any]:
    executor = SequentialExecutor(program, work, captured=captured)
    broadcast = {"params": {name: program.initial[name] for name in program.shared}}
    (done,) = executor.run(broadcast, 0, [ClientAssignment("alice", *examples, {}, key(0))])
    assert executor.refused is None
    return {**done.parts["params"], "loss": done.metrics["loss"][0]}


@settings(max_examples=25)
@given(
    deep=st.booleans(),
    widths=st.lists(st.integers(1, 5), max_size=3),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    extra=st.booleans(),
    rows=st.integers(1, 6),
    loss=st.sampled_from(list(LOSSES.values())),
    momentum=st.sampled_from([0.0, 0.9]),
    clip=st.sampled_from([None, 0.1]),
    seed=st.integers(0, 99),
)
def test_a_captured_step_is_autograds_for_whatever_layers(
    deep: bool,
    widths: list[int],
    activation: Callable[[], nn.Module],
    bias: bool,
    extra: bool,
    rows: int,
    loss: Losses,
    momentum: float,
    clip: float | None,
    seed: int,
) -> None:
    examples = some(rows, 64 if deep else 4, seed=seed), torch.arange(rows) % 3

    def make() -> nn.Module:
        torch.manual_seed(seed)
        module = (convolutional if deep else dense)(widths, activation, bias, extra, 3).double()
        module(examples[0])  # lazy layers learn their width
        return module

    work = sumus.sgd(0.1, steps=2, batch_size=rows, momentum=momentum, clip_norm=clip)
    ours, theirs = (step_of(Program(sumus.Task(make, loss)), work, examples, captured) for captured in (True, False))
    for name, wanted in theirs.items():
        assert_close(torch.as_tensor(ours[name]), torch.as_tensor(wanted))
