"""Losses: functions (outputs, targets) → one value for each example, shape `(B,)`. Any function of this form can
serve as a loss."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from torch.nn import functional

from sumus.metrics import IGNORED, ranged
from sumus.shapes import fitted, scores_last


@ranged(0.0, None)
def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return −log softmax(outputs)[target], averaged over an example's targets that are not −100 (padding).

    An example whose targets are all −100 has the loss 0.

    Args:
        outputs: Scores `(B, ..., C)`, with the classes on the last axis.
        targets: Integers in [0, C), `(B, ...)`.
    """
    return _cross_entropy(scores_last(outputs, targets, None, "cross_entropy"), targets)


def cross_entropy_along(axis: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Make `cross_entropy` for outputs with the classes on another axis: 1 for `(B, C, ...)`, torch's layout."""

    @ranged(0.0, None)
    def along(outputs: Tensor, targets: Tensor) -> Tensor:
        return _cross_entropy(scores_last(outputs, targets, axis, "cross_entropy"), targets)

    along.__qualname__ = f"cross_entropy_along_{axis}"
    cast(Any, along).class_axis = axis
    return along


cast(Any, cross_entropy).class_axis = -1  # labels are checked against the classes before they reach the loss


@ranged(0.0, None)
def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (outputs − targets)², averaged over an example's entries. Both have the same shape `(B, ...)`."""
    return _each((fitted(outputs, targets) - targets) ** 2)


@ranged(0.0, None)
def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return −t log p − (1−t) log(1−p) for probabilities p (after a sigmoid), averaged over an example's entries.

    Args:
        outputs: Probabilities p in [0, 1], `(B, ...)`.
        targets: Values t in [0, 1], of the same shape.
    """
    return _each(functional.binary_cross_entropy(fitted(outputs, targets), targets, reduction="none"))


@ranged(0.0, None)
def binary_cross_entropy_with_logits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return `binary_cross_entropy` for scores before the sigmoid."""
    flat = functional.binary_cross_entropy_with_logits(fitted(outputs, targets), targets, reduction="none")
    return _each(flat)


for _two_classes in (binary_cross_entropy, binary_cross_entropy_with_logits):
    cast(Any, _two_classes).target_range = (0.0, 1.0)  # targets are checked before they reach the loss


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    if targets.dim() == 1:
        return functional.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none")
    flat = functional.cross_entropy(
        scores.reshape(-1, scores.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    known = (targets != IGNORED).reshape(len(targets), -1)
    return flat.reshape(len(targets), -1).sum(1) / known.sum(1).clamp(min=1)


def _each(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(1)
