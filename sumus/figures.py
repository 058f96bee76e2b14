"""Figures that need more than one mean: the area under a ROC curve, an F1 score, the root of a mean.

Devices report sums, and edges and servers add the sums. A figure such as an F1 score is not a mean, so it cannot be
added up. It is computed from several sums at the end, by one rule on every machine.

Each of these sums is called a slot, and is a metric of its own for the machines that add. The slot's name says what the
sum is for: `NAME@KIND:SLOT`, such as `auc@roc_auc:p17`. KIND is a key of `KINDS`, a closed list. A metric with any
other name is itself a figure. Therefore neither an edge nor a server needs the task's code or further fields in the
plan.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from sumus.errors import BeyondBoundError

T = TypeVar("T")

MARK = "@"
_SLACK = 2.0**-16
"""The share of a count by which rounding may change a sum of shares."""


@dataclass(frozen=True)
class Kind:
    """A rule that computes one figure from the means of its slots.

    Attributes:
        figure: (mean by slot name) → the figure; NaN if the figure is not defined for these means.
        once: Prefixes of slot names. For each prefix, a prediction is counted in at most one slot whose name begins
            with it.
    """

    figure: Callable[[Mapping[str, float]], float]
    once: tuple[str, ...] = ()


def slot_name(figure: str, kind: str, slot: str) -> str:
    """Return the metric name of one slot of a figure."""
    return f"{figure}{MARK}{kind}:{slot}"


def figure_of(name: str) -> str:
    """Return the name of the figure that a metric belongs to. For a metric that is not a slot, this is the metric's own name."""
    return _parsed(name)[0]


def figure_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the figures that these metrics make, without repetitions, in the order of the metrics."""
    return tuple(dict.fromkeys(map(figure_of, names)))


def figures(means: Mapping[str, float]) -> dict[str, float]:
    """Compute all figures from the means of metrics, in the order of the metrics.

    A figure that is not defined, such as the AUC of a single class, is left out. A figure with a NaN among its means is
    NaN.
    """
    found: dict[str, float] = {}
    for (name, kind), slots in _grouped(means).items():
        if not kind:
            found[name] = slots[""]
        elif any(math.isnan(mean) for mean in slots.values()):
            found[name] = math.nan
        elif not math.isnan(figure := KINDS[kind].figure(slots)):
            found[name] = figure
    return found


def counts(metrics: Mapping[str, int]) -> dict[str, int]:
    """Return the number of predictions that each figure is computed from, given the count of each metric."""
    found: dict[str, int] = {}
    for name, count in metrics.items():
        found[figure_of(name)] = max(count, found.get(figure_of(name), 0))
    return found


def check_slots(sender: object, metrics: Mapping[str, tuple[float, int]]) -> None:
    """Refuse sums that cannot come from real predictions.

    All slots of one figure must count the same number of predictions, and a prediction is in at most one slot of each
    prefix in `Kind.once`.

    Args:
        sender: The reporting device or edge, for errors.
        metrics: (sum, count) by metric name, of one device or of an edge's sum.

    Raises:
        BeyondBoundError: The slots of a figure contradict each other.
    """
    for (name, kind), slots in _grouped(metrics).items():
        if not kind:
            continue
        if len({count for _, count in slots.values()}) > 1:
            raise BeyondBoundError(sender, f"the sums of {name!r} count different numbers of predictions")
        for beginning in KINDS[kind].once:
            each = [slot for key, slot in slots.items() if key.startswith(beginning)]
            if each and math.fsum(value for value, _ in each) > each[0][1] * (1 + _SLACK) + _SLACK * len(each):
                raise BeyondBoundError(sender, f"the sums of {name!r} hold more predictions than they count")


def _grouped(metrics: Mapping[str, T]) -> dict[tuple[str, str], dict[str, T]]:
    """Group metrics by (figure, kind), and then by slot. A metric that is not a slot has the kind '' and the slot ''."""
    groups: dict[tuple[str, str], dict[str, T]] = {}
    for name, value in metrics.items():
        figure, kind, slot = _parsed(name)
        groups.setdefault((figure, kind), {})[slot] = value
    return groups


def is_slot(name: str) -> bool:
    """Return whether a metric is a slot of a figure."""
    return bool(_parsed(name)[1])


def _parsed(name: str) -> tuple[str, str, str]:
    """Split a metric's name into (figure, kind, slot). A metric that is not a slot has the kind '' and the slot ''."""
    figure, _, rest = name.rpartition(MARK)
    kind, _, slot = rest.partition(":")
    return (figure, kind, slot) if figure and kind in KINDS else (name, "", "")


def _roc_auc(shares: Mapping[str, float]) -> float:
    """Compute the probability that a positive prediction lies in a higher bin than a negative one. Pairs in one bin
    count one half.

    Args:
        shares: The share of all predictions in each bin, from the lowest bin: negatives `n0`, `n1`, …; positives `p0`,
            `p1`, ….
    """
    below = area = 0.0
    for number in range(len(shares) // 2):
        negative, positive = shares.get(f"n{number}", 0.0), shares.get(f"p{number}", 0.0)
        area += positive * (below + negative / 2)
        below += negative
    positives = math.fsum(share for slot, share in shares.items() if slot.startswith("p"))
    return area / (below * positives) if below > 0 and positives > 0 else math.nan


def _f1(shares: Mapping[str, float]) -> float:
    """Compute the mean F1 score over the classes that are true or predicted at least once.

    Args:
        shares: For each class 0, 1, …, three shares of all predictions: the class is true (`t0`, …), the class is
            predicted (`s0`, …), both (`h0`, …).
    """
    scores: list[float] = []
    for number in range(len(shares) // 3):
        true, said, hit = (shares.get(f"{letter}{number}", 0.0) for letter in "tsh")
        if true + said > 0:
            scores.append(2 * hit / (true + said))
    return math.fsum(scores) / len(scores) if scores else math.nan


def _root(means: Mapping[str, float]) -> float:
    return math.sqrt(max(0.0, means[""]))


KINDS: Mapping[str, Kind] = {
    "roc_auc": Kind(_roc_auc, once=("",)),
    "f1": Kind(_f1, once=("t", "s", "h")),
    "root": Kind(_root),
}
"""The closed list of kinds. A metric whose name has another kind is a metric like any other."""
