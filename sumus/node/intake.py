"""Makes examples of readings as they came: by the user's `prepare`, and with a check that they fit those that are kept.

    intake = Intake(readings, prepare)
    taken = intake.take([{"inputs": [1, 2], "target": 0}], key="kitchen/17")      kept, once
    intake.inputs([{"inputs": [1, 2]}])                                            to predict for

A bad reading is refused by its number, and the others are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from sqlite3 import Connection
from typing import Any, TypeAlias, cast

import msgspec
import numpy as np

from sumus.errors import UsageError, said
from sumus.node.batch import Raw
from sumus.node.reading import BadReading, Reading
from sumus.node.readings import Readings
from sumus.types import Array

Prepare: TypeAlias = Callable[[Raw], tuple[Any, Any]]
"""A reading as it came → (input, target), where the target is None if it has none."""
Label: TypeAlias = Callable[[Any], Any]
"""A target in the words of whoever gives it → as the task takes it."""


class BadAnswer(UsageError):
    """The user's `answer` makes nothing of a prediction."""


@dataclass(frozen=True)
class IntakeResult:
    """What became of readings.

    Attributes:
        kept: New readings.
        labelled: Readings that were here without a target, which they have now.
        again: Readings that were here already.
        refused: Why a reading was refused, by its number from 0.
    """

    kept: int
    labelled: int
    again: int
    refused: dict[int, str]


_UNITS = (1, 1e3, 1e6, 1e9)
"""In a second."""
_LATEST = 1e11
"""Seconds since 1970 that are told from milliseconds: until the year 5138."""
_OTHER = {
    "other input": "its key is here already, with another input: give each reading a key of its own",
    "other target": "its key is here already, with another target: /v1/labels corrects a target",
}


def as_it_came(raw: Raw, label: Label | None = None) -> tuple[Any, Any]:
    """Take a reading's `inputs` as the task's input, and its `target`, or what `label` makes of it, as the target."""
    if "inputs" not in raw:
        names = ", ".join(map(repr, list(raw)[:5]))
        raise BadReading(f"it has no 'inputs', but {names or 'nothing'}: send inputs, or define `prepare(reading)`")
    target = raw.get("target")
    return raw["inputs"], target if target is None else labelled(label, target)


def labelled(label: Label | None, value: Any) -> Any:
    """Make a target as the task takes it. BadReading is raised if `label` has no target for the value."""
    if label is None:
        return value
    try:
        target = label(value)
    except BadReading:
        raise
    except Exception as error:  # of the user's file, about this one label
        why = f"it knows no {value!r:.100}" if isinstance(error, KeyError) else said(error)
        raise BadReading(f"label: {why:.300}") from error
    if target is None:
        raise BadReading(f"label: it gives no target for {value!r:.100}")
    return target


def answered(answer: Callable[[Any, Any], Any], inputs: Array, outputs: Array) -> Any:
    """Say one prediction in the user's words, as JSON holds it.

    Raises:
        BadAnswer: The user's `answer` raises, or gives what JSON does not hold.
    """
    try:
        found = as_json(answer(inputs, outputs))
        msgspec.json.encode(found)
        return found
    except Exception as error:
        raise BadAnswer(
            f"answer(inputs, outputs) of the node's file failed: {said(error)}; it is given one reading's input, of shape "
            f"{list(inputs.shape)}, and the model's output, of {list(outputs.shape)}, and must give what JSON holds"
        ) from error


def as_json(value: Any) -> Any:
    """Turn numpy's numbers and arrays in a value into Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return cast(Any, value).tolist()
    if isinstance(value, dict):
        return {as_json(name): as_json(each) for name, each in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in cast(list[Any], value)]
    return value


class Intake:
    """Takes readings. Any thread may call.

    Args:
        readings: The readings that are kept.
        prepare: The user's function; None if readings come as the task takes them.
        time: The name of the value that is a reading's own time; None for the time at which it comes.
        label: The user's function for targets in their words; None if they come as the task takes them.
    """

    def __init__(
        self,
        readings: Readings,
        prepare: Prepare | None = None,
        time: str | None = None,
        label: Label | None = None,
    ) -> None:
        self.readings, self._time, self._label = readings, time, label
        self._prepare: Prepare = prepare or (lambda raw: as_it_came(raw, label))
        self._as_input: Prepare = prepare or as_it_came  # to predict for: no target is asked for, in whatever words

    def take(
        self,
        raws: Sequence[Raw | BadReading],
        key: str | None = None,
        keys: Sequence[str] | None = None,
        beside: Callable[[Connection], None] | None = None,
    ) -> IntakeResult:
        """Keep the readings that can be kept. They are on the disk when this returns.

        Args:
            raws: The readings as they came.
            key: A key of the whole batch, for readings without a `key` of their own, so that a batch that is sent again is kept
                once. Another reading under the same key is refused.
            keys: One key for each reading that has none of its own, derived from its content.
            beside: Writes other rows in the same transaction.
        """
        fitting, refused, numbers = list[Reading](), dict[int, str](), list[int]()
        of_all = [key] if len(raws) == 1 else [f"{key}/{number}" for number in range(len(raws))] if key else None
        given = keys or (of_all if key is not None else None)
        if key is not None and self.readings.has(f"{key}/0" if len(raws) == 1 else key):
            return IntakeResult(0, 0, 0, dict.fromkeys(range(len(raws)), _OTHER["other input"]))
        for number, raw in enumerate(raws):
            try:
                own = raw.get("key") if isinstance(raw, dict) else None
                if own is not None and not isinstance(own, str):
                    raise BadReading("its key is no text")
                fitting.append(self.readings.fit(self._prepared(raw, own or (given[number] if given else None))))
                numbers.append(number)
            except BadReading as bad:
                refused[number] = str(bad)
        became = self.readings.keep(fitting, beside) if fitting or beside else []
        again = became.count("again")
        for number, what in zip(numbers, became, strict=True):
            if what in _OTHER and keys is not None and number < len(keys) and not _has_key(raws[number]):
                again += 1  # the same line, which another `prepare` made something else of
            elif what in _OTHER:
                refused[number] = _OTHER[what]
        return IntakeResult(became.count("kept"), became.count("labelled"), again, dict(sorted(refused.items())))

    def label(self, raw: Raw | BadReading) -> None:
        """Give a reading its target.

        Args:
            raw: `{"key": …, "target": …}`, with the target as the task takes it, or in the words of `label`.

        Raises:
            BadReading: There is no reading under this key.
        """
        if isinstance(raw, BadReading):
            raise raw
        key = raw.get("key")
        if not isinstance(key, str) or "target" not in raw:
            raise BadReading("a label has a key and a target")
        if not self.readings.label(key, labelled(self._label, raw["target"])):
            raise BadReading("there is no reading under this key, or not any more")

    def inputs(self, raws: Sequence[Raw | BadReading]) -> Array:
        """Make inputs to predict for, one row a reading.

        Raises:
            BadReading: A reading is none; the message names the first one.
        """
        rows = list[Array]()
        for number, raw in enumerate(raws):
            try:
                rows.append(self.readings.shaped(self._prepared(raw, None, self._as_input).input))
                if rows[-1].shape != rows[0].shape:
                    raise BadReading("its input has another shape than the first one's")
            except BadReading as bad:
                raise BadReading(f"reading {number}: {bad}") from bad
        return np.stack(rows)

    def _prepared(self, raw: Raw | BadReading, key: str | None, prepare: Prepare | None = None) -> Reading:
        if isinstance(raw, BadReading):
            raise raw
        at = None if self._time is None else time_of(raw, self._time)
        try:
            input, target = (prepare or self._prepare)(raw)
        except BadReading:
            raise
        except Exception as error:  # of the user's file, about this one reading
            has = f"; it has {', '.join(map(repr, list(raw)[:8]))}" if isinstance(error, KeyError) else ""
            raise BadReading(f"prepare: {type(error).__name__}: {error!s:.200}{has:.400}") from error
        return Reading(input, target, key, at)


def time_of(raw: Raw, name: str) -> float:
    """Read a reading's own time, in seconds since 1970.

    Args:
        raw: The reading.
        name: The name of the value that is its time: a text by ISO 8601, in UTC unless it says otherwise; or the seconds,
            milliseconds, microseconds or nanoseconds since 1970, which are told apart by their size.

    Raises:
        BadReading: There is no such value, or it is no time.
    """
    value: Any = raw.get(name)
    if isinstance(value, np.generic):
        value = cast(Any, value).item()
    if isinstance(value, str):
        try:
            when = datetime.fromisoformat(value.strip())
            return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError) as error:
            raise BadReading(f"its {name!r:.50} is no time by ISO 8601: {value!r:.50}") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LATEST * max(_UNITS):
        raise BadReading(f"it has no time: {name!r:.50} is {value!r:.50}")
    return float(value) / next(unit for unit in _UNITS if abs(value) < _LATEST * unit)


def _has_key(raw: Raw | BadReading) -> bool:
    return isinstance(raw, dict) and raw.get("key") is not None
