"""Everything that a worker can do with tensors: one table, from a registered name to a function of torch, with the arguments that
it takes and those that it changes. What is not in it does not exist, at a worker as at a pointer.

    OPERATIONS["linear"].function(inputs, weight, bias)
    SPELLINGS[torch.Tensor.__rsub__].name == "rsub"           how callers reach it

The functions draw no random numbers, and the shape of what they give never depends on numbers in a tensor, only on shapes.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""What a tensor may be of."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Size: TypeAlias = Callable[[Sequence[Any]], int] | None
"""From arguments, elements of the largest result, at most; None where it has to be tried without numbers."""


@dataclass(frozen=True)
class Operation:
    """takes: names of its arguments in order.  named: those that are given by name only.  changes: which of its arguments it
    writes to.  closed: for private tensors, does not fail because of numbers in them."""

    name: str
    function: Callable[..., Any]
    takes: tuple[str, ...]
    named: frozenset[str]
    changes: tuple[int, ...]
    size: Size
    closed: Callable[..., Any]


# ── how large a result can be ────────────────────────────────────────────────────────────────────────────────────────


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    """The tensors among arguments, and in their lists."""
    for each in arguments:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from tensors_in(cast(Any, each))


def _broadcast(shapes: Sequence[Sequence[int]]) -> int:
    """Elements of what these broadcast to; no dimension counts as none, since a sum over none is still there."""
    reversed_shapes = [tuple(reversed(shape)) for shape in shapes]
    return math.prod(max(1, *sizes) for sizes in itertools.zip_longest(*reversed_shapes, fillvalue=1))


def _as_wide(arguments: Sequence[Any]) -> int:
    return _broadcast([tensor.shape for tensor in tensors_in(arguments)])


def _product(arguments: Sequence[Any]) -> int:
    """Of the first two, as matrices in batches."""
    first, second = (tuple(tensor.shape) for tensor in arguments[:2])
    rows = first[-2] if len(first) > 1 else 1
    columns = second[-1] if len(second) > 1 else 1
    return rows * columns * _broadcast([first[:-2], second[:-2]])


def _outer(arguments: Sequence[Any]) -> int:
    return math.prod(max(1, tensor.numel()) for tensor in arguments[:2])


def _layer(arguments: Sequence[Any]) -> int:
    inputs, weight = (tuple(tensor.shape) for tensor in arguments[:2])
    return math.prod(inputs[:-1]) * (weight[0] if weight else 1)


def _rows(arguments: Sequence[Any]) -> int:
    indices, weight = (tuple(tensor.shape) for tensor in arguments[:2])
    return math.prod(indices) * math.prod(weight[1:])


def _together(arguments: Sequence[Any]) -> int:
    return sum(_broadcast([tensor.shape]) for tensor in tensors_in(arguments))


# ── functions that torch has under another form, or not at all ───────────────────────────────────────────────────────


def _view(input: Tensor, shape: tuple[int, ...]) -> Tensor:
    return input.view(_sizes(shape))


def _reshape(input: Tensor, shape: tuple[int, ...]) -> Tensor:
    return input.reshape(_sizes(shape))


def _expand(input: Tensor, shape: tuple[int, ...]) -> Tensor:
    return input.expand(_sizes(shape))


def _repeat(input: Tensor, shape: tuple[int, ...]) -> Tensor:
    return input.repeat(_sizes(shape))


def _permute(input: Tensor, dims: tuple[int, ...]) -> Tensor:
    return input.permute(_sizes(dims))


def _sizes(shape: Any) -> tuple[int, ...]:
    sizes = cast(Any, shape) if isinstance(shape, list | tuple) else (shape,)
    if not all(type(size) is int for size in sizes):
        raise TypeError("a shape is several whole numbers")
    return tuple(sizes)


def _to(input: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        raise TypeError("to() takes a dtype")
    return input.to(dtype)


def _getitem(input: Tensor, index: Any) -> Tensor:
    return input[index]


def _setitem(input: Tensor, index: Any, value: Any) -> Tensor:
    input[index] = value
    return input


def _where(condition: Tensor, input: Any, other: Any) -> Tensor:
    """With three arguments: with one, the shape of the result depends on numbers."""
    return torch.where(condition, input, other)


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    return functional.embedding(input, weight, padding_idx)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch's own changes the running values without a trace in their versions; this leaves one, so that a gradient through what
    they were is refused and not computed with what they have become."""
    if not training or running_mean is None or running_var is None:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, var = running_mean.clone(), running_var.clone()
    outputs = functional.batch_norm(input, mean, var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        running_mean.copy_(mean)
        running_var.copy_(var)
    return outputs


# ── the same without an error that tells numbers: what would fail is NaN, and so is its gradient ─────────────────────────


def _in_range(indices: Tensor, size: int, also: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices with 0 in the place of wrong ones, and whether there were any. also: one that is not wrong."""
    wrong = (indices < 0) | (indices >= size)
    if also is not None:
        wrong = wrong & (indices != also)
    return indices.masked_fill(wrong, 0), wrong.any()


def _unknown_where(wrong: Tensor, result: Tensor) -> Tensor:
    """Times 1, which changes no bit, or times NaN."""
    return result * torch.where(wrong, float("nan"), 1.0).to(result.dtype)


def _closed_embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    indices, wrong = _in_range(input, weight.shape[0])
    return _unknown_where(wrong, _embedding(indices, weight, padding_idx))


def _with_classes(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def closed(
        input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100, **named: Any
    ) -> Tensor:
        if target.is_floating_point():
            return loss(input, target, weight, ignore_index=ignore_index, **named)
        classes = input.shape[min(1, input.dim() - 1)]
        target, wrong = _in_range(target, classes, ignore_index)
        return _unknown_where(wrong, loss(input, target, weight, ignore_index=ignore_index, **named))

    return closed


def _closed_binary_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, **named: Any) -> Tensor:
    within = [(each >= 0) & (each <= 1) for each in (input, target)]
    safe = [torch.where(right, each, 0.5) for right, each in zip(within, (input, target), strict=True)]
    wrong = ~(within[0].all() & within[1].all())
    return _unknown_where(wrong, functional.binary_cross_entropy(safe[0], safe[1], weight, **named))


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────

OPERATIONS: dict[str, Operation] = {}
SPELLINGS: dict[Any, Operation] = {}
"""By what torch calls it when it meets a pointer."""


def _add(
    name: str,
    function: Callable[..., Any],
    takes: str,
    spelt: str = "",
    size: Size = _as_wide,
    changes: tuple[int, ...] = (),
    closed: Callable[..., Any] | None = None,
) -> None:
    """takes: arguments in order, those after a star by name only.  spelt: further names that tensors have for it."""
    ordered, _, named = takes.partition("*")
    operation = Operation(
        name, function, tuple(ordered.split()), frozenset(named.split()), changes, size, closed or function
    )
    OPERATIONS[name] = operation
    for home in (torch.Tensor, torch, functional, torch.linalg):
        for word in (name, *spelt.split()):
            dunder_elsewhere = word.startswith("__") and home is not torch.Tensor
            if not dunder_elsewhere and (spelling := getattr(home, word, None)) is not None:
                SPELLINGS.setdefault(spelling, operation)


_add("add", torch.add, "input other * alpha", "__add__ __radd__")
_add("sub", torch.sub, "input other * alpha", "subtract __sub__")
_add("rsub", torch.rsub, "input other * alpha", "__rsub__")
_add("mul", torch.mul, "input other", "multiply __mul__ __rmul__")
_add("div", torch.div, "input other", "divide true_divide __div__ __truediv__")
_add("rdiv", torch.Tensor.__rdiv__, "input other", "__rdiv__ __rtruediv__")
_add("floor_divide", torch.floor_divide, "input other", "__floordiv__")
_add("remainder", torch.remainder, "input other", "__mod__")
_add("pow", torch.pow, "input exponent", "__pow__")
_add("rpow", torch.Tensor.__rpow__, "input other", "__rpow__")
_add("neg", torch.neg, "input", "negative __neg__")
_add("abs", torch.abs, "input", "absolute __abs__")
_add("maximum", torch.maximum, "input other")
_add("minimum", torch.minimum, "input other")
_add("clamp", torch.clamp, "input min max", "clip")
_add("matmul", torch.matmul, "input other", "__matmul__", _product)
_add("sum", torch.sum, "input dim keepdim * dtype")
_add("mean", torch.mean, "input dim keepdim * dtype")
ARITHMETIC = frozenset(OPERATIONS)
"""A small set: sums, products, means."""

for _word in ("square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "log1p", "sin", "cos", "sign", "floor"):
    _add(_word, getattr(torch, _word), "input")
for _word, _spelt in {
    "eq": "__eq__",
    "ne": "__ne__",
    "lt": "__lt__",
    "le": "__le__",
    "gt": "__gt__",
    "ge": "__ge__",
}.items():
    _add(_word, getattr(torch, _word), "input other", _spelt)
_add("round", torch.round, "input")
_add("logical_not", torch.logical_not, "input")
_add("logical_and", torch.logical_and, "input other")
_add("logical_or", torch.logical_or, "input other")
_add("bitwise_not", torch.bitwise_not, "input", "__invert__")
_add("bitwise_and", torch.bitwise_and, "input other", "__and__")
_add("bitwise_or", torch.bitwise_or, "input other", "__or__")
_add("where", _where, "condition input other")
_add("lerp", torch.lerp, "input end weight")
_add("addcmul", torch.addcmul, "input tensor1 tensor2 * value")
_add("addcdiv", torch.addcdiv, "input tensor1 tensor2 * value")
_add("mm", torch.mm, "input mat2", "", _product)
_add("bmm", torch.bmm, "input mat2", "", _product)
_add("mv", torch.mv, "input vec", "", _product)
_add("dot", torch.dot, "input other")
_add("outer", torch.outer, "input vec2", "", _outer)
_add("var", torch.var, "input dim unbiased keepdim * correction")
_add("std", torch.std, "input dim unbiased keepdim * correction")
_add("amax", torch.amax, "input dim keepdim")
_add("amin", torch.amin, "input dim keepdim")
_add("max", torch.max, "input dim keepdim")
_add("min", torch.min, "input dim keepdim")
_add("argmax", torch.argmax, "input dim keepdim")
_add("argmin", torch.argmin, "input dim keepdim")
_add("cumsum", torch.cumsum, "input dim * dtype")
_add("logsumexp", torch.logsumexp, "input dim keepdim")
_add("vector_norm", torch.linalg.vector_norm, "input ord dim keepdim * dtype")

_add("view", _view, "input shape")
_add("reshape", _reshape, "input shape")
_add("expand", _expand, "input shape", "", None)
_add("repeat", _repeat, "input shape", "", None)
_add("permute", _permute, "input dims")
_add("flatten", torch.flatten, "input start_dim end_dim")
_add("transpose", torch.transpose, "input dim0 dim1", "swapaxes")
_add("t", torch.t, "input")
_add("squeeze", torch.squeeze, "input dim")
_add("unsqueeze", torch.unsqueeze, "input dim")
_add("getitem", _getitem, "input index", "__getitem__", None)
_add("cat", torch.cat, "tensors dim", "concat", _together)
_add("stack", torch.stack, "tensors dim", "", _together)
_add("gather", torch.gather, "input dim index", "", None)
_add("clone", torch.clone, "input")
_add("detach", torch.detach, "input")
_add("contiguous", torch.Tensor.contiguous, "input")
_add("to", _to, "input dtype")
_add("zeros_like", torch.zeros_like, "input * dtype")
_add("ones_like", torch.ones_like, "input * dtype")
_add("full_like", torch.full_like, "input fill_value * dtype")

_add("relu", torch.relu, "input")
_add("sigmoid", torch.sigmoid, "input")
_add("tanh", torch.tanh, "input")
_add("gelu", functional.gelu, "input * approximate")
_add("silu", functional.silu, "input")
_add("elu", functional.elu, "input alpha")
_add("leaky_relu", functional.leaky_relu, "input negative_slope")
_add("softplus", functional.softplus, "input beta threshold")
_add("logsigmoid", functional.logsigmoid, "input")
_add("softmax", torch.softmax, "input dim * dtype")
_add("log_softmax", torch.log_softmax, "input dim * dtype")

_add("linear", functional.linear, "input weight bias", "", _layer)
_add("embedding", _embedding, "input weight padding_idx", "", _rows, closed=_closed_embedding)
_add("conv1d", torch.conv1d, "input weight bias stride padding dilation groups", "", None)
_add("conv2d", torch.conv2d, "input weight bias stride padding dilation groups", "", None)
_add("max_pool2d", torch.max_pool2d, "input kernel_size stride padding dilation ceil_mode", "", None)
_add(
    "avg_pool2d",
    functional.avg_pool2d,
    "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "",
    None,
)
_add("adaptive_avg_pool2d", functional.adaptive_avg_pool2d, "input output_size", "", None)
_add("layer_norm", functional.layer_norm, "input normalized_shape weight bias eps")
_add(
    "batch_norm", _batch_norm, "input running_mean running_var weight bias training momentum eps", "", _as_wide, (1, 2)
)

_add("mse_loss", functional.mse_loss, "input target * reduction weight")
_add("l1_loss", functional.l1_loss, "input target * reduction weight")
_add("smooth_l1_loss", functional.smooth_l1_loss, "input target * reduction beta")
_add(
    "binary_cross_entropy",
    functional.binary_cross_entropy,
    "input target weight * reduction",
    closed=_closed_binary_cross_entropy,
)
_add(
    "binary_cross_entropy_with_logits",
    functional.binary_cross_entropy_with_logits,
    "input target weight * reduction pos_weight",
)
_add(
    "nll_loss",
    functional.nll_loss,
    "input target weight * ignore_index reduction",
    closed=_with_classes(functional.nll_loss),
)
_add(
    "cross_entropy",
    functional.cross_entropy,
    "input target weight * ignore_index reduction label_smoothing",
    closed=_with_classes(functional.cross_entropy),
)

for _word, _takes, _spelt in (
    ("add_", "input other * alpha", "__iadd__"),
    ("sub_", "input other * alpha", "__isub__"),
    ("mul_", "input other", "__imul__"),
    ("div_", "input other", "__idiv__ __itruediv__"),
    ("pow_", "input exponent", "__ipow__"),
    ("neg_", "input", ""),
    ("sqrt_", "input", ""),
    ("clamp_", "input min max", ""),
    ("lerp_", "input end weight", ""),
    ("addcmul_", "input tensor1 tensor2 * value", ""),
    ("addcdiv_", "input tensor1 tensor2 * value", ""),
    ("relu_", "input", ""),
    ("sigmoid_", "input", ""),
    ("tanh_", "input", ""),
    ("zero_", "input", ""),
    ("fill_", "input value", ""),
    ("copy_", "input src", ""),
    ("masked_fill_", "input mask value", ""),
):
    _add(_word, getattr(torch.Tensor, _word), _takes, _spelt, _as_wide, (0,))
_add("setitem", _setitem, "input index value", "__setitem__", None, (0,))

for _other in (torch.Tensor.where, torch.embedding, torch.batch_norm, torch.binary_cross_entropy_with_logits):
    del SPELLINGS[_other]  # the same names, with other arguments

TENSORS = frozenset(
    {
        *(
            "input",
            "other",
            "tensors",
            "condition",
            "exponent",
            "end",
            "weight",
            "tensor1",
            "tensor2",
            "mat2",
            "vec",
            "vec2",
        ),
        *("min", "max", "index", "value", "fill_value", "mask", "src", "bias", "running_mean", "running_var"),
        *("target", "pos_weight"),
    }
)
"""Arguments that may be tensors. torch takes one for a number too, and where that is a size or a dimension, the shape of what
comes out would tell it."""

TELLS = {
    "getitem": "index",
    "setitem": "index",
    "gather": "index",
    "floor_divide": "other",
    "remainder": "other",
}
"""Of operations that fail because of whole numbers in a tensor (an index out of range, a division by zero): which argument it is.
Whether one fails would tell those numbers."""

EVERYTHING = frozenset(OPERATIONS)
"""All that any worker can do, by registered name."""
