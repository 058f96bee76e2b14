"""Metrics: each gives a value for every example, and devices report the sum of the values and the number of examples.

    def within_a_degree(outputs, targets):
        return (outputs - targets).abs() < 1.0

A metric is a function of a batch's outputs and targets (torch tensors). It returns one value per example, shape `(B,)`.
If an example holds many predictions (such as the words of a text), it returns a pair `(sums, counts)`, each of shape
`(B,)`. Metrics run on devices, and only their sums leave a device. The metrics of this file use only methods of
tensors, so that this module does not import torch.

Figures that are not means over predictions are computed from several sums: see `SeveralSums` and sumus/figures.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from sumus.errors import PlanError, TaskError, expect, expect_number
from sumus.figures import figures, slot_name
from sumus.shapes import fitted, scores_last
from sumus.spec import record
from sumus.types import hold_plain_numbers

M = TypeVar("M", bound=Callable[[Any, Any], Any])


@record("range")
@dataclass(frozen=True)
class Range:
    """The interval in which the mean of a metric over a client's examples must lie.

    Attributes:
        low: The smallest possible mean; None if there is no limit.
        high: The largest possible mean; None if there is no limit.
    """

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
        """Return whether the mean of a sum over `count` predictions in `reports` reports lies in the range, up to rounding."""
        slack = 2e-6 * max(float(reports), abs(total))
        return (self.low is None or total >= self.low * count - slack) and (
            self.high is None or total <= self.high * count + slack
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"from {self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else f"at most {self.high:g}"


def lower_is_better(metric: M) -> M:
    """Mark a metric as an error measure: lower values are better, so the worst client is the client with the highest value."""
    cast(Any, metric).lower_is_better = True
    return metric


def ranged(low: float | None, high: float | None) -> Callable[[M], M]:
    """Mark a metric or a loss with the range of its mean over a client's examples.

    A server refuses a report whose mean lies outside the range, so that no client can hide a bad model behind an
    impossible value.

    Args:
        low: The smallest possible mean; None if there is no limit.
        high: The largest possible mean; None if there is no limit.
    """
    marked = Range(None if low is None else float(low), None if high is None else float(high))

    def mark(metric: M) -> M:
        cast(Any, metric).metric_range = marked
        return metric

    return mark


def range_of(metric: Any) -> Range:
    """Return the range that a metric or a loss is marked with; `Range(None, None)` if it has no mark."""
    found = getattr(metric, "metric_range", None)
    return found if isinstance(found, Range) else Range()


def is_lower_better(name: str, metric: Any) -> bool:
    """Return whether lower values of a metric are better, as for the loss and metrics marked with `lower_is_better`."""
    return name == "loss" or bool(getattr(metric, "lower_is_better", False))


@dataclass(frozen=True, eq=False)
class SeveralSums:
    """A metric that adds up K numbers for each example.

    Attributes:
        measure: (outputs, targets) → (sums, counts): for each example, K sums and K whole numbers, both of shape `(B,
            K)`.
        slots: The names of the K numbers.
        kind: The key of `sumus.figures.KINDS` that computes one figure from all K means; None if each mean is a figure
            of its own, called `NAME.SLOT`.
        metric_range: The range of each of the K means.
        lower_is_better: Whether lower values of the figures are better.
    """

    measure: Callable[[Any, Any], tuple[Any, Any]]
    slots: tuple[str, ...]
    kind: str | None
    metric_range: Range = Range(0.0, 1.0)
    lower_is_better: bool = False

    def __call__(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        return self.measure(outputs, targets)

    def names(self, name: str) -> tuple[str, ...]:
        """Return the metric names of the K sums, for a metric called `name`."""
        if self.kind is None:
            return tuple(f"{name}.{slot}" for slot in self.slots)
        return tuple(slot_name(name, self.kind, slot) for slot in self.slots)


def sums_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Map the name of each sum that a task's metrics add up to its metric.

    Raises:
        TaskError: Two sums have the same name, or a sum is called "loss".
    """
    found: dict[str, Any] = {}
    for name, metric in metrics.items():
        for own in metric.names(name) if isinstance(metric, SeveralSums) else (name,):
            if own in found or own == "loss":
                raise TaskError(f"two metrics are called {own!r}: rename one of them")
            found[own] = metric
    return found


IGNORED = -100
"""A target with this value is padding, and is not counted."""


@ranged(0.0, 1.0)
def accuracy(outputs: Any, targets: Any) -> Any:
    """Compute the share of predictions whose largest score belongs to the target class; NaN if a score is NaN.

    Args:
        outputs: Scores, `(B, ..., C)`, with the classes on the last axis.
        targets: Integers in [0, C), or −100 for padding, `(B, ...)`.
    """
    return _top(outputs, targets, 1, None, "accuracy")


def accuracy_along(axis: int) -> Any:
    """Make the metric `accuracy` for outputs with their classes on another axis: 1 for `(B, C, ...)`, as in torch."""

    @ranged(0.0, 1.0)
    def along(outputs: Any, targets: Any) -> Any:
        return _top(outputs, targets, 1, axis, "accuracy")

    along.__qualname__ = f"accuracy_along_{axis}"
    return along


def top_k_accuracy(k: int, axis: int | None = None) -> Any:
    """Make a metric: the share of predictions whose k largest scores include the target class. Shapes are as in `accuracy`.

    Args:
        k: From 1 to the number of classes.
        axis: The axis of the classes; None for the last one.
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
    """Compute the share of predicted probabilities that lie on the same side of one half as their target.

    Use `binary_accuracy_with_logits` for scores before a sigmoid.

    Args:
        outputs: Probabilities in [0, 1], `(B, ...)`.
        targets: Numbers in [0, 1], in the shape of the outputs.
    """
    outputs = fitted(outputs, targets)
    if bool(((outputs < 0) | (outputs > 1)).any()):
        raise TaskError(
            "binary_accuracy takes probabilities from 0 to 1, but these outputs go from "
            f"{float(outputs.min()):g} to {float(outputs.max()):g}: use binary_accuracy_with_logits for scores before a sigmoid"
        )
    return _sides(outputs, outputs > 0.5, targets)


@ranged(0.0, 1.0)
def binary_accuracy_with_logits(outputs: Any, targets: Any) -> Any:
    """Compute `binary_accuracy` for scores before a sigmoid, where a score of 0 means a probability of one half."""
    outputs = fitted(outputs, targets)
    return _sides(outputs, outputs > 0, targets)


@lower_is_better
@ranged(0.0, None)
def mean_absolute_error(outputs: Any, targets: Any) -> Any:
    """Compute |outputs − targets|, averaged over an example's entries, in float64. Both have one shape, `(B, ...)`."""
    return _each(_distance(outputs, targets).abs())


@lower_is_better
@ranged(0.0, None)
def mean_squared_error(outputs: Any, targets: Any) -> Any:
    """Compute (outputs − targets)², averaged over an example's entries, in float64. Both have one shape, `(B, ...)`."""
    return _each(_distance(outputs, targets) ** 2)


def by_class(metric: Callable[[Any, Any], Any], classes: int | Sequence[str]) -> SeveralSums:
    """Make a metric that gives one figure per class: the mean of `metric` over the predictions whose target is that class.

    With `accuracy`, these figures are the recalls. A figure is called `NAME.CLASS`, such as `recall.3` or `recall.cat`.

    Args:
        metric: A metric with one value per example. If an example holds many predictions, the metric must return (sums,
            counts) and leave out targets of −100.
        classes: The number of classes, or their names in order.
    """
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
    if isinstance(metric, SeveralSums) or not callable(metric):
        raise TaskError("by_class takes a metric with a single mean, such as accuracy")
    if not names or len(set(names)) < len(names) or not all(_is_word(name) for name in names):
        raise TaskError(
            f"by_class(classes={classes!r:.80}): give the number of classes, or their names: each once, printable, "
            "without a slash or an @"
        )

    def measure(outputs: Any, targets: Any) -> tuple[Any, Any]:
        classed = _classes(targets, len(names))
        if classed.reshape(len(classed), -1).shape[1] == 1:
            given: Any = metric(outputs, targets)
            one = classed.reshape(len(classed), 1)
            sums, counts = cast(
                "tuple[Any, Any]", given if isinstance(given, tuple) else (given, (one != IGNORED).reshape(-1))
            )
            mine = one == classed.new_tensor(range(len(names)))
            values = sums.double().reshape(-1, 1).expand(mine.shape)
            return values.masked_fill(~mine, 0.0), mine.long() * counts.long().reshape(-1, 1)
        pairs: list[Any] = [
            metric(outputs, targets.masked_fill(classed != number, IGNORED)) for number in range(len(names))
        ]
        if not all(isinstance(pair, tuple) for pair in pairs):
            raise TaskError(
                "if examples hold many predictions, by_class takes a metric that gives (sums, counts), such as accuracy"
            )
        return _stacked([pair[0] for pair in pairs]).double(), _stacked([pair[1] for pair in pairs]).long()

    return SeveralSums(measure, names, None, range_of(metric), bool(getattr(metric, "lower_is_better", False)))


def roc_auc(bins: int = 100) -> SeveralSums:
    """Make a metric: the area under the ROC curve, for predicted probabilities.

    A device counts how many of its positive and negative predictions lie in each bin. The counts of all devices are
    added, so the figure is that of all examples together. The bins are equally wide in asinh(logit), up to logits of
    ±40, so that there are fine bins near 0, near 1 and around one half. The figure differs from the exact area by at
    most half the share of (positive, negative) pairs that lie in one bin.

    The metric takes outputs in [0, 1] and targets of 0 or 1, of one shape `(B, ...)`.

    Args:
        bins: From 2 to 1000. More bins come closer to the exact area; each bin adds two sums to a report.
    """
    return _roc_auc(bins, of_chances=True)


def roc_auc_with_logits(bins: int = 100) -> SeveralSums:
    """Make the metric of `roc_auc` for scores before a sigmoid."""
    return _roc_auc(bins, of_chances=False)


_FARTHEST = 40.0
"""`roc_auc` puts all logits whose absolute value is above this into the outermost bins."""


def _roc_auc(bins: int, of_chances: bool) -> SeveralSums:
    expect(bins, int, "roc_auc(bins)")
    if not 2 <= bins <= 1000:
        raise TaskError(f"roc_auc(bins={bins!r}): give from 2 to 1000 bins")

    def measure(outputs: Any, targets: Any) -> tuple[Any, Any]:
        outputs = fitted(outputs, targets)
        classed = _classes(targets, 2)
        if bool((classed == IGNORED).any()):
            raise TaskError(
                f"roc_auc takes targets of 0 and 1, but there is a {IGNORED}: leave these examples out in prepare="
            )
        scores = outputs.double().reshape(len(outputs), -1)
        if of_chances and bool(((outputs < 0) | (outputs > 1)).any()):
            raise TaskError(
                f"roc_auc takes probabilities from 0 to 1, but these outputs go from {float(outputs.min()):g} to "
                f"{float(outputs.max()):g}: use roc_auc_with_logits for scores before a sigmoid"
            )
        logits = scores.logit() if of_chances else scores
        spread = (logits.asinh() / math.asinh(_FARTHEST)).clamp(-1.0, 1.0).nan_to_num(0.0)
        place = ((spread + 1.0) / 2.0 * bins).floor().clamp(max=bins - 1).long()
        place = place + bins * classed.reshape(len(classed), -1)
        broken = scores.isnan().any(-1, keepdim=True)
        sums = scores.new_zeros((len(scores), 2 * bins)).scatter_add(1, place, scores.new_ones(scores.shape))
        counts = place.new_full((len(scores), 2 * bins), scores.shape[1])
        return sums.masked_fill(broken, float("nan")), counts

    slots = tuple(f"{letter}{number}" for letter in "np" for number in range(bins))
    return SeveralSums(measure, slots, "roc_auc")


def f1(classes: int) -> SeveralSums:
    """Make a metric: the macro F1 score, which is the mean over classes of 2 · hits / (true + predicted).

    A class that is neither true nor predicted anywhere is left out. Shapes are as in `accuracy`.

    Args:
        classes: The number of classes.
    """
    expect(classes, int, "f1(classes)")
    if classes < 2:
        raise TaskError(f"f1(classes={classes!r}): give 2 or more classes")

    def measure(outputs: Any, targets: Any) -> tuple[Any, Any]:
        scores = scores_last(outputs, targets, None, "accuracy")
        if scores.shape[-1] != classes:
            raise TaskError(f"f1(classes={classes}): the model scores {scores.shape[-1]} classes")
        classed = _classes(targets, classes).reshape(len(targets), -1)
        known = classed != IGNORED
        said = scores.argmax(-1).reshape(len(targets), -1)
        each = classed.new_tensor(range(classes))
        true = (classed[..., None] == each) & known[..., None]
        predicted = (said[..., None] == each) & known[..., None]
        sums = [found.sum(1).double() for found in (true, predicted, true & predicted)]
        broken = (scores.isnan().any(-1).reshape(len(targets), -1) & known).any(-1, keepdim=True)
        joined = _stacked(sums).transpose(1, 2).reshape(len(targets), -1)
        counts = known.sum(1, keepdim=True).expand(joined.shape)
        return joined.masked_fill(broken, float("nan")), counts

    return SeveralSums(measure, tuple(f"{letter}{number}" for letter in "tsh" for number in range(classes)), "f1")


def root_mean_squared_error() -> SeveralSums:
    """Make a metric: the root of the mean squared error over all entries of all examples. Outputs and targets have one shape,
    `(B, ...)`.
    """

    def measure(outputs: Any, targets: Any) -> tuple[Any, Any]:
        squares = mean_squared_error(outputs, targets)
        return squares.reshape(-1, 1), squares.new_ones((len(squares), 1)).long()

    return SeveralSums(measure, ("",), "root", Range(0.0, None), lower_is_better=True)


def _classes(targets: Any, classes: int) -> Any:
    """Convert targets to whole numbers. Raise TaskError for a target that is neither a class nor padding."""
    if targets.is_complex() or (targets.is_floating_point() and bool((targets != targets.round()).any())):
        raise TaskError("targets are not classes: give whole numbers from 0")
    found = targets.long()
    if bool((odd := (found != IGNORED) & ((found < 0) | (found >= classes))).any()):
        raise TaskError(f"the target {int(found[odd][0])} is not a class: there are {classes}, 0 to {classes - 1}")
    return found


def _stacked(each: Sequence[Any]) -> Any:
    """Stack tensors of one shape on a new last axis."""
    first = each[0]
    joined = first.new_empty((*first.shape, len(each)))
    for place, one in enumerate(each):
        joined[..., place] = one
    return joined


def _is_word(name: object) -> bool:
    return isinstance(name, str) and bool(name.strip()) and name.isprintable() and "/" not in name and "@" not in name


def _distance(outputs: Any, targets: Any) -> Any:
    if outputs.is_complex() or targets.is_complex():
        raise TaskError("the error of complex numbers is not defined here: give real and imaginary parts")
    return fitted(outputs, targets).double() - targets.double()


def _each(values: Any) -> Any:
    return values.reshape(len(values), -1).double().mean(-1)


def _sides(outputs: Any, above: Any, targets: Any) -> Any:
    """Compare predictions with their targets: 1 if both are on one side of one half, averaged over an example; NaN if
    an output is NaN.
    """
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise TaskError(
            f"targets of two classes must be 0 and 1, but these go from {float(targets.min()):g} to {float(targets.max()):g}: "
            "write them as 0 and 1"
        )
    return _each((above == (targets > 0.5)).double().masked_fill(outputs.isnan(), float("nan")))


def _top(outputs: Any, targets: Any, k: int, axis: int | None, named: str) -> Any:
    """Count the hits of each example: the predictions whose target is among the k largest scores. Hits are NaN if a
    score is NaN.

    Returns:
        (hits, predictions), each of shape `(B,)`.
    """
    scores = scores_last(outputs, targets, axis, named)
    classes, known = scores.shape[-1], targets != IGNORED
    if targets.is_floating_point() or targets.is_complex():
        raise TaskError(f"targets are {str(targets.dtype).rpartition('.')[2]}, and classes are whole numbers from 0")
    if k > classes:
        raise TaskError(f"the {k} largest of {classes} scores: give k from 1 to {classes}")
    if bool((wrong := known & ((targets < 0) | (targets >= classes))).any()):
        raise TaskError(f"the target {int(targets[wrong][0])} is not a class: there are {classes}, 0 to {classes - 1}")
    found = scores.argmax(-1) == targets if k == 1 else (scores.topk(k, -1)[1] == targets[..., None]).any(-1)
    broken = (scores.isnan().any(-1) & known).reshape(len(known), -1).any(-1)
    hits = (found & known).reshape(len(known), -1).sum(-1).double().masked_fill(broken, float("nan"))
    return hits, known.reshape(len(known), -1).sum(-1)


@dataclass(frozen=True)
class Spread:
    """The distribution of a metric over clients, each counted once. It shows how fair a model is.

    Attributes:
        clients: The number of clients.
        mean: The mean over the clients.
        median: The median over the clients.
        worst_decile: The mean over the worst tenth of the clients (at least one client).
        deviation: The standard deviation over the clients.
        worst: The value of the worst client.
        worst_client: The key of the worst client in the population.
    """

    clients: int
    mean: float
    median: float
    worst_decile: float
    deviation: float
    worst: float
    worst_client: Any

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON, with the client's key as text."""
        return {
            **dataclasses.asdict(dataclasses.replace(self, worst_client=None)),
            "worst_client": str(self.worst_client),
        }

    @staticmethod
    def over(clients: Sequence[object], values: Sequence[float], lower_is_better: bool = False) -> "Spread":
        """Compute the exact statistics over clients. Only the simulator can do this, since it knows each client's value.

        NaN is worse than every number. The mean and the deviation of values with a NaN are NaN. The median is the
        middle value in the order from the worst to the best client; of an even number of clients, the mean of the two
        middle values.

        Args:
            clients: The clients' keys.
            values: The metric of each client, in the same order.
            lower_is_better: Whether the highest value is the worst.
        """
        found = np.asarray(values, np.float64)
        worse = np.where(np.isnan(found), -np.inf, -found if lower_is_better else found)
        worst_first = np.lexsort((worse, ~np.isnan(found)))  # NaN first, then by value
        sorted_values = found[worst_first]
        count = len(sorted_values)
        with np.errstate(invalid="ignore"):  # infinite values may be among them
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
    """Compute the figures from (sum, count) by metric. Metrics with a count of 0 are left out."""
    return figures({name: total / count for name, (total, count) in sums.items() if count})
