"""From what came to what is kept: the user's `prepare`, and the check that it fits what is here.

    intake = Intake(readings, prepare)
    taken = intake.take([{"inputs": [1, 2], "target": 0}], key="kitchen/17")      kept, once
    intake.inputs([{"inputs": [1, 2]}])                                            to predict for

One bad reading is refused by its number, and the others are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from sumus.node.formats import Raw
from sumus.node.readings import BadReading, Reading, Readings
from sumus.types import Array

Prepare: TypeAlias = Callable[[Raw], tuple[Any, Any]]
"""A reading as it came → (input, target), where the target is None if it has none."""


@dataclass(frozen=True)
class Taken:
    """What became of readings. kept: new ones.  labelled: that were here without a target.  again: that were here.
    refused: number, from 0 → why."""

    kept: int
    labelled: int
    again: int
    refused: dict[int, str]


def as_it_came(raw: Raw) -> tuple[Any, Any]:
    """A reading whose `inputs` and `target` are what the task takes."""
    if "inputs" not in raw:
        names = ", ".join(map(repr, list(raw)[:5]))
        raise BadReading(f"it has no 'inputs', but {names or 'nothing'}: send inputs, or define `prepare(reading)`")
    return raw["inputs"], raw.get("target")


class Intake:
    """What takes readings. prepare: the user's, or nothing. Any thread may call."""

    def __init__(self, readings: Readings, prepare: Prepare | None = None) -> None:
        self._readings, self._prepare = readings, prepare or as_it_came

    def take(self, raws: Sequence[Raw | BadReading], key: str | None = None) -> Taken:
        """Keep what can be kept. It is on the disk when this returns.

        key: of all that came together, where a reading has no `key` of its own, so that what comes again is kept once.
        """
        fitting, refused = list[Reading](), dict[int, str]()
        for number, raw in enumerate(raws):
            try:
                own = raw.get("key") if isinstance(raw, dict) else None
                if own is not None and not isinstance(own, str):
                    raise BadReading("its key is no text")
                of_all = key if key is None or len(raws) == 1 else f"{key}/{number}"
                fitting.append(self._readings.fit(self._prepared(raw, own or of_all)))
            except BadReading as bad:
                refused[number] = str(bad)
        became = self._readings.keep(fitting) if fitting else []
        return Taken(became.count("kept"), became.count("labelled"), became.count("again"), refused)

    def label(self, raw: Raw | BadReading) -> None:
        """Give a reading that is here its target: `{"key": …, "target": …}`, the target as the task takes it. BadReading where
        there is none under this key."""
        if isinstance(raw, BadReading):
            raise raw
        key = raw.get("key")
        if not isinstance(key, str) or "target" not in raw:
            raise BadReading("a label has a key and a target")
        if not self._readings.label(key, raw["target"]):
            raise BadReading("there is no reading under this key, or not any more")

    def inputs(self, raws: Sequence[Raw | BadReading]) -> Array:
        """Inputs to predict for, one row a reading. BadReading names the first that is none."""
        rows = list[Array]()
        for number, raw in enumerate(raws):
            try:
                rows.append(self._readings.shaped(self._prepared(raw, None).input))
                if rows[-1].shape != rows[0].shape:
                    raise BadReading("its input has another shape than the first one's")
            except BadReading as bad:
                raise BadReading(f"reading {number}: {bad}") from bad
        return np.stack(rows)

    def _prepared(self, raw: Raw | BadReading, key: str | None) -> Reading:
        if isinstance(raw, BadReading):
            raise raw
        try:
            input, target = self._prepare(raw)
        except BadReading:
            raise
        except Exception as error:  # of the user's file, about this one reading
            raise BadReading(f"prepare: {type(error).__name__}: {error!s:.200}") from error
        return Reading(input, target, key)
