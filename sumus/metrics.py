"""Metrics are sums too: a value for each example, added up and divided by how many there were.

    def within_a_degree(outputs, targets):
        return (outputs - targets).abs() < 1.0

A metric takes a batch's outputs and targets (torch tensors) and returns one value an example, shape `(B,)`; or a pair
`(sums, counts)`, each `(B,)`, where an example holds many predictions (words of a text). It runs on devices, and only
its sums leave them. These are written in tensor methods, and so need no torch to import.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from sumus.errors import PlanError, TaskError, expect, expect_number
from sumus.shapes import fitted, scores_last
from sumus.spec import record
from sumus.types import hold_plain_numbers

M = TypeVar("M", bound=Callable[[Any, Any], Any])


@record("range")
@dataclass(frozen=True)
class Range:
    """Where the mean of a metric over a client's examples can lie. None: no limit on that side."""

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        for side in (self.low, self.high):
            if side is not None:
                expect_number(side, -1e100, 1e100, "a side of a range")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise PlanError("positive", f"a range from {self.low} to {self.high}: the first must be below the second")

    def holds(self, total: float, count: int, reports: int = 1) -> bool:
        """Whether a sum over `count` predictions, of so many reports, has its mean in the range, up to rounding."""
        slack = 2e-6 * max(float(reports), abs(total))
        return (self.low is None or total >= self.low * count - slack) and (
            self.high is None or total <= self.high * count + slack
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"from {self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else f"at most {self.high:g}"


def lower_is_better(metric: M) -> M:
    """Mark a metric as an error: targets are reached from above, and the worst client is the highest."""
    cast(Any, metric).lower_is_better = True
    return metric


def ranged(low: float | None, high: float | None) -> Callable[[M], M]:
    """Mark a metric or a loss with the range that its mean over a client's examples lies in.

    A server refuses a report whose mean lies outside of the range: nobody can hide a bad model behind an impossible figure.

    Args:
        low: the smallest mean; None if there is none.
        high: the largest mean; None if there is none.
    """
    marked = Range(None if low is None else float(low), None if high is None else float(high))

    def mark(metric: M) -> M:
        cast(Any, metric).metric_range = marked
        return metric

    return mark


def range_of(metric: Any) -> Range:
    """The range that a metric or a loss is marked with; `(None, None)` without one."""
    found = getattr(metric, "metric_range", None)
    return found if isinstance(found, Range) else Range()


def is_lower_better(name: str, metric: Any) -> bool:
    """Whether a metric is marked so; the loss always is."""
    return name == "loss" or bool(getattr(metric, "lower_is_better", False))


IGNORED = -100
"""A target that does not count: padding."""


@ranged(0.0, 1.0)
def accuracy(outputs: Any, targets: Any) -> Any:
    """Share of predictions whose largest score is the target's; NaN if a score is NaN.

    outputs `(B, ..., C)`: scores, classes last. targets `(B, ...)`: integers in [0, C), or −100 for padding.
    """
    return _top(outputs, targets, 1, None, "accuracy")


def accuracy_along(axis: int) -> Any:
    """Make `accuracy` for outputs with their classes on this axis: 1 for `(B, C, ...)`, as torch has them."""

    @ranged(0.0, 1.0)
    def along(outputs: Any, targets: Any) -> Any:
        return _top(outputs, targets, 1, axis, "accuracy")

    along.__qualname__ = f"accuracy_along_{axis}"
    return along


def top_k_accuracy(k: int, axis: int | None = None) -> Any:
    """Share of predictions whose k largest scores hold the target. Shapes as `accuracy`.

    k: from 1 to the number of classes.  axis: of the classes; None for the last one.
    """
    expect(k, int, "top_k_accuracy(k)")
    if k < 1:
        raise TaskError(f"top_k_accuracy({k!r}): k must be at least 1")

    @ranged(0.0, 1.0)
    def top_k(outputs: Any, targets: Any) -> Any:
        return _top(outputs, targets, k, axis, "accuracy")

    top_k.__qualname__ = f"top_{k}_accuracy" + ("" if axis is None else f"_along_{axis}")
    return top_k


@ranged(0.0, 1.0)
def binary_accuracy(outputs: Any, targets: Any) -> Any:
    """Share of chances on the right side of one half. outputs and targets in [0, 1], of one shape `(B, ...)`.

    For scores before a sigmoid take `binary_accuracy_with_logits`.
    """
    outputs = fitted(outputs, targets)
    if bool(((outputs < 0) | (outputs > 1)).any()):
        raise TaskError(
            "binary_accuracy takes chances from 0 to 1, and these outputs go from "
            f"{float(outputs.min()):g} to {float(outputs.max()):g}: take binary_accuracy_with_logits for scores before a sigmoid"
        )
    return _sides(outputs, outputs > 0.5, targets)


@ranged(0.0, 1.0)
def binary_accuracy_with_logits(outputs: Any, targets: Any) -> Any:
    """The same for scores before a sigmoid: cut at 0, which is a chance of one half."""
    outputs = fitted(outputs, targets)
    return _sides(outputs, outputs > 0, targets)


@lower_is_better
@ranged(0.0, None)
def mean_absolute_error(outputs: Any, targets: Any) -> Any:
    """|outputs − targets|, averaged over an example's entries, in float64. One shape `(B, ...)`."""
    return _each(_distance(outputs, targets).abs())


@lower_is_better
@ranged(0.0, None)
def mean_squared_error(outputs: Any, targets: Any) -> Any:
    """(outputs − targets)², averaged over an example's entries, in float64. One shape `(B, ...)`."""
    return _each(_distance(outputs, targets) ** 2)


def _distance(outputs: Any, targets: Any) -> Any:
    if outputs.is_complex() or targets.is_complex():
        raise TaskError("the error of complex numbers is not defined here: give real and imaginary parts")
    return fitted(outputs, targets).double() - targets.double()


def _each(values: Any) -> Any:
    return values.reshape(len(values), -1).double().mean(-1)


def _sides(outputs: Any, above: Any, targets: Any) -> Any:
    """1 where a prediction is on its target's side of one half, averaged over an example; NaN where an output is NaN."""
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise TaskError(
            f"targets of two classes are 0 and 1, and these go from {float(targets.min()):g} to {float(targets.max()):g}: "
            "write them as 0 and 1"
        )
    return _each((above == (targets > 0.5)).double().masked_fill(outputs.isnan(), float("nan")))


def _top(outputs: Any, targets: Any, k: int, axis: int | None, named: str) -> Any:
    """(hits, predictions) of each example: whether a target is among the k largest scores. NaN hits if a score is NaN."""
    scores = scores_last(outputs, targets, axis, named)
    classes, known = scores.shape[-1], targets != IGNORED
    if targets.is_floating_point() or targets.is_complex():
        raise TaskError(f"targets are {str(targets.dtype).rpartition('.')[2]}, and classes are whole numbers from 0")
    if k > classes:
        raise TaskError(f"the {k} largest of {classes} scores: give k from 1 to {classes}")
    if bool((wrong := known & ((targets < 0) | (targets >= classes))).any()):
        raise TaskError(f"the target {int(targets[wrong][0])} is no class: there are {classes}, 0 to {classes - 1}")
    found = scores.argmax(-1) == targets if k == 1 else (scores.topk(k, -1)[1] == targets[..., None]).any(-1)
    broken = (scores.isnan().any(-1) & known).reshape(len(known), -1).any(-1)
    hits = (found & known).reshape(len(known), -1).sum(-1).double().masked_fill(broken, float("nan"))
    return hits, known.reshape(len(known), -1).sum(-1)


@dataclass(frozen=True)
class Spread:
    """A metric over clients, each counting once: how fair is the model?

    worst_decile: the mean of the worst tenth of the clients (at least one). deviation: the standard deviation.
    worst: the worst client's value, and `worst_client` who it is: the key under which the population has that client.
    """

    clients: int
    mean: float
    median: float
    worst_decile: float
    deviation: float
    worst: float
    worst_client: Any

    def to_json(self) -> dict[str, Any]:
        """As JSON, with the client's key as text."""
        return {
            **dataclasses.asdict(dataclasses.replace(self, worst_client=None)),
            "worst_client": str(self.worst_client),
        }

    @staticmethod
    def over(clients: Sequence[object], values: Sequence[float], lower_is_better: bool = False) -> "Spread":
        """Exact statistics over clients; in the simulator only, where they are known one by one.

        NaN is worse than every number. A mean or a deviation over a NaN is NaN; the median is the value of the client in the
        middle, from the worst to the best.

        Args:
            clients: Their ids.
            values: The metric of each of them, in the same order.
            lower_is_better: Whether the highest value is the worst.
        """
        found = np.asarray(values, np.float64)
        worse = np.where(np.isnan(found), -np.inf, -found if lower_is_better else found)
        worst_first = np.lexsort((worse, ~np.isnan(found)))  # by whether it is NaN, and then by its value
        sorted_values = found[worst_first]
        count = len(sorted_values)
        with np.errstate(invalid="ignore"):  # of infinite values
            return Spread(
                count,
                float(np.mean(sorted_values)),
                float(np.mean(sorted_values[(count - 1) // 2 : count // 2 + 1])),
                float(np.mean(sorted_values[: max(1, count // 10)])),
                float(np.std(sorted_values)),
                float(sorted_values[0]),
                clients[int(worst_first[0])],
            )


def pooled(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """(sum, count) by metric as means; what was counted on nothing is left out."""
    return {name: total / count for name, (total, count) in sums.items() if count}
