"""Metrics are sums too: a value for each example, added up and divided by how many there were.

    def within_a_degree(outputs, targets):
        return (outputs - targets).abs() < 1.0

A metric takes a batch's outputs and targets (torch tensors) and returns one value an example, shape `(B,)`; or a pair
`(sums, counts)`, each `(B,)`, where an example holds many predictions (words of a text). It runs on devices, and only
its sums leave them. These are written in tensor methods, and so need no torch to import.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from sumus.errors import PlanError, expect_number
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
    """Share of predictions whose largest score is the target's. outputs `(B, ..., C)`, targets `(B, ...)` integers."""
    targets = targets.reshape(outputs.shape[:-1])
    return _hits(outputs.argmax(-1) == targets, targets)


def top_k_accuracy(k: int) -> Any:
    """Share of predictions whose k largest scores hold the target. Shapes as `accuracy`."""

    @ranged(0.0, 1.0)
    def top_k(outputs: Any, targets: Any) -> Any:
        targets = targets.reshape(outputs.shape[:-1])
        return _hits((outputs.topk(k, -1)[1] == targets[..., None]).any(-1), targets)

    top_k.__qualname__ = f"top_{k}_accuracy"
    return top_k


@ranged(0.0, 1.0)
def binary_accuracy(outputs: Any, targets: Any) -> Any:
    """Share of scores on the right side of one half. outputs and targets `(B,)` or `(B, 1)`, in [0, 1]."""
    return _each((outputs.reshape(targets.shape) > 0.5) == (targets > 0.5))


@lower_is_better
@ranged(0.0, None)
def mean_absolute_error(outputs: Any, targets: Any) -> Any:
    """|outputs − targets|, averaged over an example's entries. Equal shapes `(B, ...)`."""
    return _each((outputs.reshape(targets.shape) - targets).abs())


@lower_is_better
@ranged(0.0, None)
def mean_squared_error(outputs: Any, targets: Any) -> Any:
    """(outputs − targets)², averaged over an example's entries. Equal shapes `(B, ...)`."""
    return _each((outputs.reshape(targets.shape) - targets) ** 2)


def _each(values: Any) -> Any:
    return values.reshape(len(values), -1).double().mean(-1)


def _hits(hits: Any, targets: Any) -> Any:
    known = targets != IGNORED
    return (hits & known).reshape(len(hits), -1).sum(-1), known.reshape(len(hits), -1).sum(-1)


@dataclass(frozen=True)
class Spread:
    """A metric over clients, each counting once: how fair is the model?

    worst_decile: the mean of the worst tenth of the clients (at least one). deviation: the standard deviation.
    worst: the worst client's value, and `worst_client` who it is.
    """

    clients: int
    mean: float
    median: float
    worst_decile: float
    deviation: float
    worst: float
    worst_client: str

    @staticmethod
    def over(clients: Sequence[object], values: Sequence[float], lower_is_better: bool = False) -> "Spread":
        """Exact statistics over clients; in the simulator only, where they are known one by one."""
        order = np.argsort(values)
        worst_first = order[::-1] if lower_is_better else order
        sorted_values = np.asarray(values, np.float64)[worst_first]
        decile = sorted_values[: max(1, len(sorted_values) // 10)]
        return Spread(
            len(sorted_values),
            float(np.mean(sorted_values)),
            float(np.median(sorted_values)),
            float(np.mean(decile)),
            float(np.std(sorted_values)),
            float(sorted_values[0]),
            str(clients[int(worst_first[0])]),
        )


def pooled(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """(sum, count) by metric as means; what was counted on nothing is left out."""
    return {name: total / count for name, (total, count) in sums.items() if count}
