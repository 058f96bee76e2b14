"""All operations that a worker can do with tensors: a table from a registered name to a function of torch, its
arguments, and the arguments that it changes. No other operation works, neither at a worker nor on a pointer.

    OPERATIONS["linear"].function(inputs, weight, bias)
    SPELLINGS[torch.Tensor.__rsub__].name == "rsub"           finds an operation by the function that callers use

The functions draw no random numbers. The shape of their results never depends on numbers in a tensor, only on shapes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

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
"""The dtypes that a tensor may have."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Operation:
    """One operation, and its properties that are known before it is computed.

    Attributes:
        name: The registered name, which is sent.
        function: The function that computes it if all tensors are public.
        closed: The function that computes it if a tensor is private: the same bits, but numbers in tensors cause no errors.
        takes: The names of its arguments, in order.
        named: The names of keyword-only arguments.
        tensors: The names of the arguments that may be tensors.
        changes: The positions in `takes` of the arguments to which it writes.
    """

    name: str
    function: Callable[..., Any]
    closed: Callable[..., Any]
    takes: tuple[str, ...]
    named: frozenset[str]
    tensors: frozenset[str]
    changes: tuple[int, ...]


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, including those in lists."""
    for each in arguments:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from tensors_in(cast(Any, each))


# ── functions that torch has in another form, or does not have ────────────────────────────────────────────────────────


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
        raise TypeError("a shape must consist of whole numbers")
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
    """Choose entries by a condition. Three arguments are required: with one, the result's shape would depend on numbers."""
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
    """Normalize a batch.

    torch's own function changes the running values without raising their version counters. This function raises them. So a
    gradient that needs the old values is refused instead of being computed from the new ones.
    """
    if not training or running_mean is None or running_var is None:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, var = running_mean.clone(), running_var.clone()
    outputs = functional.batch_norm(input, mean, var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        running_mean.copy_(mean)
        running_var.copy_(var)
    return outputs


# ── functions for private tensors: instead of an error that reveals numbers, result and gradient are NaN ──────────────


def _in_range(indices: Tensor, size: int, ignored: int | None = None) -> tuple[Tensor, Tensor]:
    """Replace wrong indices by an index that never fails.

    Args:
        indices: Integers.
        size: The number of valid indices, from 0.
        ignored: An index that is allowed outside the range. If `size` is 0, it replaces the wrong indices.

    Returns:
        The indices, and a bool of shape (): whether one of them was wrong.
    """
    wrong = (indices < 0) | (indices >= size)
    if ignored is not None:
        wrong = wrong & (indices != ignored)
    return indices.masked_fill(wrong, ignored if not size and ignored is not None else 0), wrong.any()


def _unknown_where(wrong: Tensor, result: Tensor) -> Tensor:
    """Multiply a result by 1, which changes no bit, or by NaN if indices were wrong."""
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


def _closed_fill(input: Tensor, value: Any) -> Tensor:
    return input.fill_(_as_number_of(input, value))


def _closed_masked_fill(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    return input.masked_fill_(mask, _as_number_of(input, value))


def _closed_setitem(input: Tensor, index: Any, value: Any) -> Tensor:
    return _setitem(input, index, _as_number_of(input, value))


def _as_number_of(input: Tensor, value: Any) -> Any:
    """Convert a number to a tensor with the dtype of `input`.

    torch turns a tensor with one element into a Python number, and then fails if the number is too large for that dtype. A
    conversion of the tensor does not fail.
    """
    return value.to(input.dtype) if isinstance(value, Tensor) else value


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────────

OPERATIONS: dict[str, Operation] = {}
SPELLINGS: dict[Any, Operation] = {}
"""The operation for each function that torch passes to a pointer's `__torch_function__`."""


TENSORS = frozenset({
    "input", "other", "tensors", "condition", "exponent", "end", "weight", "tensor1", "tensor2", "mat2", "vec", "vec2",
    "min", "max", "index", "mask", "src", "bias", "running_mean", "running_var", "target", "pos_weight",
})  # fmt: skip
"""The arguments that may be tensors. torch accepts a tensor for a number too, and reads it. If the number is a size or
a dimension, the shape of the result would reveal it, and an overflow would reveal how large it is."""


def _add(
    name: str,
    function: Callable[..., Any],
    takes: str,
    spelt: str = "",
    changes: tuple[int, ...] = (),
    closed: Callable[..., Any] | None = None,
    tensors: str = "",
) -> None:
    """Add an operation to the table.

    Args:
        name: The registered name.
        function: The function that computes it.
        takes: Its arguments in order; those after a star are keyword-only.
        spelt: Other names that torch has for it, separated by blanks.
        changes: The positions of the arguments to which it writes.
        closed: The function that computes it if a tensor is private; None to use `function`.
        tensors: The arguments that may be tensors here, in addition to `TENSORS`.
    """
    ordered, _, named = takes.partition("*")
    names = frozenset(ordered.split()) | frozenset(named.split())
    operation = Operation(
        name,
        function,
        closed or function,
        tuple(ordered.split()),
        frozenset(named.split()),
        names & (TENSORS | frozenset(tensors.split())),
        changes,
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
_add("matmul", torch.matmul, "input other", "__matmul__")
_add("sum", torch.sum, "input dim keepdim * dtype")
_add("mean", torch.mean, "input dim keepdim * dtype")
ARITHMETIC = frozenset(OPERATIONS)
"""A small set of operations: sums, products and means."""

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
_add("mm", torch.mm, "input mat2")
_add("bmm", torch.bmm, "input mat2")
_add("mv", torch.mv, "input vec")
_add("dot", torch.dot, "input other")
_add("outer", torch.outer, "input vec2")
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
_add("expand", _expand, "input shape")
_add("repeat", _repeat, "input shape")
_add("permute", _permute, "input dims")
_add("flatten", torch.flatten, "input start_dim end_dim")
_add("transpose", torch.transpose, "input dim0 dim1", "swapaxes")
_add("t", torch.t, "input")
_add("squeeze", torch.squeeze, "input dim")
_add("unsqueeze", torch.unsqueeze, "input dim")
_add("getitem", _getitem, "input index", "__getitem__")
_add("cat", torch.cat, "tensors dim", "concat")
_add("stack", torch.stack, "tensors dim")
_add("gather", torch.gather, "input dim index")
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

_add("linear", functional.linear, "input weight bias")
_add("embedding", _embedding, "input weight padding_idx", closed=_closed_embedding)
_add("conv1d", torch.conv1d, "input weight bias stride padding dilation groups")
_add("conv2d", torch.conv2d, "input weight bias stride padding dilation groups")
_add("max_pool2d", torch.max_pool2d, "input kernel_size stride padding dilation ceil_mode")
_add(
    "avg_pool2d",
    functional.avg_pool2d,
    "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
)
_add("adaptive_avg_pool2d", functional.adaptive_avg_pool2d, "input output_size")
_add("layer_norm", functional.layer_norm, "input normalized_shape weight bias eps")
_add("batch_norm", _batch_norm, "input running_mean running_var weight bias training momentum eps", "", (1, 2))

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
    ("copy_", "input src", ""),
):
    _add(_word, getattr(torch.Tensor, _word), _takes, _spelt, (0,))
_add("fill_", torch.Tensor.fill_, "input value", "", (0,), _closed_fill, "value")
_add("masked_fill_", torch.Tensor.masked_fill_, "input mask value", "", (0,), _closed_masked_fill, "value")
_add("setitem", _setitem, "input index value", "__setitem__", (0,), _closed_setitem, "value")

for _other in (torch.Tensor.where, torch.embedding, torch.batch_norm, torch.binary_cross_entropy_with_logits):
    del SPELLINGS[_other]  # these have the same names, but other arguments

TELLS = {
    "getitem": "index",
    "setitem": "index",
    "gather": "index",
    "floor_divide": "other",
    "remainder": "other",
}
"""Operations that can fail because of integers in a tensor (an index out of range, a division by zero), with the argument
that holds this tensor. The failure would reveal those numbers, so the argument may not be private."""

EVERYTHING = frozenset(OPERATIONS)
"""All operations that a worker can do, by registered name."""
