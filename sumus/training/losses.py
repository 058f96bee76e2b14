"""Losses: (outputs, targets) → one value an example, shape `(B,)`. Any function of this form will do."""

from typing import Any, cast

from torch import Tensor
from torch.nn import functional

from sumus.metrics import IGNORED, ranged


@ranged(0.0, None)
def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(outputs)[target], averaged over an example's targets that are not −100 (padding).

    outputs `(B, ..., C)`: scores, classes last. targets `(B, ...)`: integers in [0, C).
    """
    if targets.dim() == 1:
        return functional.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="none")
    flat = functional.cross_entropy(
        outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    known = (targets != IGNORED).reshape(len(targets), -1)
    return flat.reshape(len(targets), -1).sum(1) / known.sum(1).clamp(min=1)


cast(Any, cross_entropy).class_targets = True  # labels are checked against the classes before they reach the loss


@ranged(0.0, None)
def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """(outputs − targets)², averaged over an example's entries. outputs and targets `(B, ...)`, as many entries."""
    return _each((outputs.reshape(targets.shape) - targets) ** 2)


@ranged(0.0, None)
def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """−t log p − (1−t) log(1−p) for probabilities p (after a sigmoid), averaged over an example's entries."""
    return _each(functional.binary_cross_entropy(outputs.reshape(targets.shape), targets, reduction="none"))


@ranged(0.0, None)
def binary_cross_entropy_with_logits(outputs: Tensor, targets: Tensor) -> Tensor:
    """The same for scores before the sigmoid."""
    flat = functional.binary_cross_entropy_with_logits(outputs.reshape(targets.shape), targets, reduction="none")
    return _each(flat)


def _each(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(1)
