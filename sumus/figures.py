"""Figures that are made of several sums: an area under a curve, an F1 score, the root of a mean.

A device reports sums, and sums are added; what is no mean itself is made of the sums at the end, by one rule wherever that is.
Each sum is a metric of its own to whoever adds, and its name says what it is for: `NAME@KIND:SLOT`, such as `auc@roc_auc:p17`,
where KIND is one of a closed list. Any other name is a figure as it is. So neither an edge nor a server needs the task's code,
or a word of this in the plan.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from sumus.errors import BeyondBoundError

T = TypeVar("T")

MARK = "@"
_SLACK = 2.0**-16
"""The share of a count by which rounding may move a sum of shares."""


@dataclass(frozen=True)
class Kind:
    """How a figure is made of the means of its slots, by slot; NaN where it is not defined.

    once: beginnings of slots' names: each prediction is in one slot of each of these at most.
    """

    figure: Callable[[Mapping[str, float]], float]
    once: tuple[str, ...] = ()


def slot_name(figure: str, kind: str, slot: str) -> str:
    """What a sum is called among the metrics."""
    return f"{figure}{MARK}{kind}:{slot}"


def figure_of(name: str) -> str:
    """The figure that a metric of a plan belongs to: itself, if it is no slot of one."""
    return _parsed(name)[0]


def figure_names(names: Iterable[str]) -> tuple[str, ...]:
    """The figures that these metrics make, each once, in their order."""
    return tuple(dict.fromkeys(map(figure_of, names)))


def figures(means: Mapping[str, float]) -> dict[str, float]:
    """Figures of the means of metrics, in their order. A figure that is not defined, such as an AUC of one class, is left out."""
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
    """On how many predictions each figure is, of the counts of metrics."""
    found: dict[str, int] = {}
    for name, count in metrics.items():
        found[figure_of(name)] = max(count, found.get(figure_of(name), 0))
    return found


def check_slots(sender: object, metrics: Mapping[str, tuple[float, int]]) -> None:
    """Refuse sums that no predictions add up to: slots of one figure count the same, and a prediction is in one of them.

    Args:
        sender: Who reports, for errors.
        metrics: (sum, count) by metric, of a device or of an edge's sum.

    Raises:
        BeyondBoundError: The slots of a figure do not fit with one another.
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
    """Metrics by figure and kind, and by slot; a plain one has the kind and the slot ''."""
    groups: dict[tuple[str, str], dict[str, T]] = {}
    for name, value in metrics.items():
        figure, kind, slot = _parsed(name)
        groups.setdefault((figure, kind), {})[slot] = value
    return groups


def is_slot(name: str) -> bool:
    """Whether a metric is a sum that a figure is made of."""
    return bool(_parsed(name)[1])


def _parsed(name: str) -> tuple[str, str, str]:
    """(figure, kind, slot) of a metric; a plain one has the kind and the slot ''."""
    figure, _, rest = name.rpartition(MARK)
    kind, _, slot = rest.partition(":")
    return (figure, kind, slot) if figure and kind in KINDS else (name, "", "")


def _roc_auc(shares: Mapping[str, float]) -> float:
    """The chance that a positive prediction is in a higher bin than a negative one, counting one half where both are in one.

    shares: of the negatives `n0`, `n1`, … and the positives `p0`, `p1`, …, in rising bins.
    """
    below = area = 0.0
    for number in range(len(shares) // 2):
        negative, positive = shares.get(f"n{number}", 0.0), shares.get(f"p{number}", 0.0)
        area += positive * (below + negative / 2)
        below += negative
    positives = math.fsum(share for slot, share in shares.items() if slot.startswith("p"))
    return area / (below * positives) if below > 0 and positives > 0 else math.nan


def _f1(shares: Mapping[str, float]) -> float:
    """The mean F1 score of the classes that are predicted or true somewhere.

    shares: of predictions whose class is true `t0`, …, predicted `s0`, …, and both `h0`, ….
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
"""A closed list: a name of another kind is a metric like others."""
