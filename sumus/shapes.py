"""Check that a model's outputs fit the targets by comparing axes. An equal number of elements is not enough: (3, 5) is
not (5, 3).
"""

from typing import Any

from sumus.errors import TaskError


def fitted(outputs: Any, targets: Any) -> Any:
    """Return the outputs in the shape of the targets, if both have the same axes. Axes of length 1 may be missing in either.

    Args:
        outputs: The model's outputs, `(B, ...)`.
        targets: The targets, `(B, ...)`.

    Returns:
        The outputs, in the targets' shape.

    Raises:
        TaskError: An axis differs.
    """
    mine, theirs = tuple(outputs.shape), tuple(targets.shape)
    if mine == theirs:
        return outputs
    if not mine or not theirs or mine[0] != theirs[0] or _long_axes(mine) != _long_axes(theirs):
        raise TaskError(f"outputs {mine} and targets {theirs} {_difference(mine, theirs)}: give both the same axes")
    return outputs.reshape(theirs)


def scores_last(outputs: Any, targets: Any, axis: int | None, named: str) -> Any:
    """Move the classes to the last axis, and give the other axes the shape of the targets.

    Args:
        outputs: Scores, with the classes on one axis.
        targets: Classes, in the shape of the outputs without the axis of the classes.
        axis: The axis of the classes; None for the last one.
        named: The function's name for messages; `named_along(axis)` is its variant for another axis.

    Returns:
        The scores, `(*targets.shape, C)`.

    Raises:
        TaskError: The outputs without the axis of the classes have another shape than the targets; or there are fewer
            than two classes; or `axis` is None, and the shapes also fit with the classes on axis 1, which is torch's
            order.
    """
    mine, theirs = tuple(outputs.shape), tuple(targets.shape)
    if len(mine) < 2 or (axis is not None and not (1 <= axis < len(mine) or 1 - len(mine) <= axis < 0)):
        raise TaskError(
            f"outputs {mine} have no axis {axis if axis is not None else 'of classes'} besides the batch axis"
        )
    place = len(mine) - 1 if axis is None else axis % len(mine)
    rest = mine[:place] + mine[place + 1 :]
    if not theirs or rest[0] != theirs[0] or _long_axes(rest) != _long_axes(theirs):
        hint = ""
        if axis is None and len(mine) > 2 and mine[:1] + mine[2:] == theirs:
            hint = f"; for classes on axis 1, as in torch, use {named}_along(1)"
        raise TaskError(
            f"outputs {mine} with the classes on axis {place} need targets {rest}, but the targets are {theirs}: "
            f"they {_difference(rest, theirs)}{hint}"
        )
    if axis is None and len(mine) > 2 and mine[1] == mine[-1] and mine[:1] + mine[2:] == theirs:
        raise TaskError(
            f"outputs {mine} fit targets {theirs} with the classes on axis 1 and on axis {place}: choose one, by "
            f"{named}_along(1) or {named}_along(-1)"
        )
    if mine[place] < 2:
        raise TaskError(
            f"outputs {mine} hold one score per prediction, and so only one class: give a score for each class, or use the loss "
            "and the accuracy of two classes (binary_cross_entropy_with_logits, binary_accuracy_with_logits)"
        )
    if axis is not None and place != len(mine) - 1:
        outputs = outputs.movedim(place, -1)
    return outputs if rest == theirs else outputs.reshape(*theirs, mine[place])


def _long_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes behind the batch axis that are longer than 1."""
    return tuple(side for side in shape[1:] if side != 1)


def _difference(mine: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    """Say in words which axis of two shapes differs."""
    if len(mine) != len(theirs):
        return f"have {len(mine)} and {len(theirs)} axes"
    axis = next(axis for axis, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other)
    order = ", and hold the same axes in another order" if sorted(mine) == sorted(theirs) else ""
    return f"differ in axis {axis} ({mine[axis]} and {theirs[axis]}){order}"
