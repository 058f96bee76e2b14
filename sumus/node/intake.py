"""Makes examples from incoming readings: applies the user's `prepare`, and checks that they fit the readings that are kept.

    intake = Intake(readings, prepare)
    taken = intake.take([{"inputs": [1, 2], "target": 0}], key="kitchen/17")      kept, once
    intake.inputs([{"inputs": [1, 2]}])                                            to predict from

A bad reading is refused, and reported by its number; the other readings are kept.
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
"""Maps a reading as it arrived to (input, target); the target is None if the reading has none."""
Label: TypeAlias = Callable[[Any], Any]
"""Maps a target as its owner writes it, such as "cold", to a target for the task, such as 0."""


class BadAnswer(UsageError):
    """The user's `answer` failed on a prediction."""


@dataclass(frozen=True)
class IntakeResult:
    """The results for a batch of readings.

    Attributes:
        kept: The number of new readings.
        labelled: The number of known readings that had no target and have one now.
        again: The number of readings that were known already.
        refused: The reason for each refused reading, by its number from 0.
    """

    kept: int
    labelled: int
    again: int
    refused: dict[int, str]


_UNITS = (1, 1e3, 1e6, 1e9)
"""How many seconds, milliseconds, microseconds and nanoseconds a second has."""
_LATEST = 1e11
"""The largest number that counts as seconds since 1970, and not as milliseconds: the year 5138."""
_OTHER = {
    "other input": "its key is already in use, with another input: give each reading a key of its own",
    "other target": "its key is already in use, with another target: use /v1/labels to correct a target",
}


def as_it_came(raw: Raw, label: Label | None = None) -> tuple[Any, Any]:
    """Use a reading's `inputs` as the task's input; use its `target`, or the result of `label` for it, as the target."""
    if "inputs" not in raw:
        names = ", ".join(map(repr, list(raw)[:5]))
        raise BadReading(f"it has no 'inputs', but {names or 'nothing'}: send inputs, or define `prepare(reading)`")
    target = raw.get("target")
    return raw["inputs"], target if target is None else labelled(label, target)


def labelled(label: Label | None, value: Any) -> Any:
    """Convert a target to the task's form. Raise BadReading if `label` has no target for the value."""
    if label is None:
        return value
    try:
        target = label(value)
    except BadReading:
        raise
    except Exception as error:  # an error in the user's function, with this label
        why = f"it has no entry for {value!r:.100}" if isinstance(error, KeyError) else said(error)
        raise BadReading(f"label: {why:.300}") from error
    if target is None:
        raise BadReading(f"label: it returns no target for {value!r:.100}")
    return target


def answered(answer: Callable[[Any, Any], Any], inputs: Array, outputs: Array) -> Any:
    """Apply the user's `answer` to one prediction, and return the result as a JSON value.

    Raises:
        BadAnswer: The user's `answer` raises, or returns a value that JSON cannot hold.
    """
    try:
        found = as_json(answer(inputs, outputs))
        msgspec.json.encode(found)
        return found
    except Exception as error:
        raise BadAnswer(
            f"answer(inputs, outputs) of the node's file failed: {said(error)}; it gets one reading's input, of shape "
            f"{list(inputs.shape)}, and the model's output, of shape {list(outputs.shape)}, and must return a JSON value"
        ) from error


def as_json(value: Any) -> Any:
    """Convert the numpy numbers and arrays in a value to Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return cast(Any, value).tolist()
    if isinstance(value, dict):
        return {as_json(name): as_json(each) for name, each in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in cast(list[Any], value)]
    return value


class Intake:
    """Accepts readings. Any thread may call its methods.

    Args:
        readings: The readings that are kept.
        prepare: The user's function; None if readings arrive in the task's form.
        time: The name of the value that holds the time at which a reading was made; None for the time of arrival.
        label: The user's function that converts a target as its owner writes it; None if targets arrive in the task's form.
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
        self._as_input: Prepare = prepare or as_it_came  # for predictions, which need no target

    def take(
        self,
        raws: Sequence[Raw | BadReading],
        key: str | None = None,
        keys: Sequence[str] | None = None,
        beside: Callable[[Connection], None] | None = None,
    ) -> IntakeResult:
        """Keep all readings that can be kept. They are on the disk when this returns.

        Args:
            raws: The readings as they arrived.
            key: A key for the whole batch, for readings without a `key` of their own, so that a batch that is sent again is kept
                only once. A different reading under the same key is refused.
            keys: One key for each reading without a `key` of its own, derived from its content.
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
                    raise BadReading("its key is not a text")
                fitting.append(self.readings.fit(self._prepared(raw, own or (given[number] if given else None))))
                numbers.append(number)
            except BadReading as bad:
                refused[number] = str(bad)
        became = self.readings.keep(fitting, beside) if fitting or beside else []
        again = became.count("again")
        for number, what in zip(numbers, became, strict=True):
            if what in _OTHER and keys is not None and number < len(keys) and not _has_key(raws[number]):
                again += 1  # the same line, which an earlier `prepare` turned into another reading
            elif what in _OTHER:
                refused[number] = _OTHER[what]
        return IntakeResult(became.count("kept"), became.count("labelled"), again, dict(sorted(refused.items())))

    def label(self, raw: Raw | BadReading) -> None:
        """Give a reading its target.

        Args:
            raw: `{"key": …, "target": …}`, with the target in the task's form, or as the user's `label` expects it.

        Raises:
            BadReading: No reading has this key.
        """
        if isinstance(raw, BadReading):
            raise raw
        key = raw.get("key")
        if not isinstance(key, str) or "target" not in raw:
            raise BadReading("it is not a label: give a key (a text) and a target")
        if not self.readings.label(key, labelled(self._label, raw["target"])):
            raise BadReading("no reading has this key, or the reading was deleted")

    def inputs(self, raws: Sequence[Raw | BadReading]) -> Array:
        """Make inputs for predictions, one row for each reading.

        Raises:
            BadReading: A reading is invalid; the message names the first one.
        """
        rows = list[Array]()
        for number, raw in enumerate(raws):
            try:
                rows.append(self.readings.shaped(self._prepared(raw, None, self._as_input).input))
                if rows[-1].shape != rows[0].shape:
                    raise BadReading("its input does not have the shape of the first reading's input")
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
        except Exception as error:  # an error in the user's function, with this reading
            has = f"; it has {', '.join(map(repr, list(raw)[:8]))}" if isinstance(error, KeyError) else ""
            raise BadReading(f"prepare: {type(error).__name__}: {error!s:.200}{has:.400}") from error
        return Reading(input, target, key, at)


def time_of(raw: Raw, name: str) -> float:
    """Read a reading's own time, in seconds since 1970.

    Args:
        raw: The reading.
        name: The name of the value with its time: an ISO 8601 text, in UTC unless the text has an offset; or the seconds,
            milliseconds, microseconds or nanoseconds since 1970, which are distinguished by their size.

    Raises:
        BadReading: The reading does not have this value, or the value is not a time.
    """
    value: Any = raw.get(name)
    if isinstance(value, np.generic):
        value = cast(Any, value).item()
    if isinstance(value, str):
        try:
            when = datetime.fromisoformat(value.strip())
            return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError) as error:
            raise BadReading(f"its {name!r:.50} is not an ISO 8601 time: {value!r:.50}") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LATEST * max(_UNITS):
        raise BadReading(f"it has no time: {name!r:.50} is {value!r:.50}")
    return float(value) / next(unit for unit in _UNITS if abs(value) < _LATEST * unit)


def _has_key(raw: Raw | BadReading) -> bool:
    return isinstance(raw, dict) and raw.get("key") is not None
