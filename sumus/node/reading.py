"""One reading, and the common form of a node's readings: a shape and a dtype, both for inputs and for targets.

form = Form.of([1, 2], "input")           the form of a first value: whole numbers
form = form.widened([0.5, 2])             float32, since this value has a fraction
form.fit([1, 2], "input")                 an array of this form; BadReading if the value has another shape

forms = ReadingForms(forms_of(task.data))
forms.fitted(reading)                     the reading's arrays, and the resulting forms
"""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sumus.errors import ExperimentError, UsageError
from sumus.metrics import IGNORED
from sumus.task import Data
from sumus.types import Array


class BadReading(UsageError):
    """A reading that cannot be kept or used for a prediction; the message says why."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One example.

    Attributes:
        input: An array, or numbers.
        target: An array, or numbers; None if the target is not known yet.
        key: The key under which the reading is kept once, however often it arrives; None for a reading that is new each time.
        at: The time at which the reading was made, in seconds since 1970; None for the time of arrival.
    """

    input: Any
    target: Any = None
    key: str | None = None
    at: float | None = None


@dataclass(frozen=True)
class Form:
    """The form of an input or of a target.

    Attributes:
        shape: The shape.
        dtype: The dtype.
        classes: The number of classes, if the targets are class numbers in [0, classes).
    """

    shape: tuple[int, ...]
    dtype: str
    classes: int | None = None

    def fit(self, value: Any, what: str) -> Array:
        """Convert a value to an array of this form.

        Args:
            value: The value.
            what: "input" or "target", for messages.

        Raises:
            BadReading: The value has a different form, or is not finite.
        """
        array = _array(value, what)
        if array.shape != self.shape:
            raise BadReading(
                f"its {what} has the shape {list(array.shape)}, but all others here have {list(self.shape)}"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            fitted = array.astype(self.dtype)
        if fitted.dtype.kind == "f":
            if array.dtype.kind in "iu" and not (fitted.astype(np.longdouble) == array).all():
                raise BadReading(
                    f"its {what} contains a whole number that {self.dtype} cannot hold exactly: scale it down in `prepare`"
                )
            if not np.isfinite(fitted).all():
                at = [int(axis[0]) for axis in np.nonzero(~np.isfinite(fitted))] if fitted.ndim else []
                raise BadReading(f"its {what} contains a NaN or an infinity{f' at {at}' if at else ''}")
        elif not (fitted == array).all():
            raise BadReading(
                f"its {what} does not fit {self.dtype}: it has values of {array.dtype} that the conversion would change; "
                "declare another dtype with the task's data="
            )
        if self.classes is not None and bool(((fitted != IGNORED) & ((fitted < 0) | (fitted >= self.classes))).any()):
            raise BadReading(f"its {what} is not a class from 0 to {self.classes - 1}")
        return fitted

    def widened(self, value: Any) -> "Form":
        """Return the form that holds all values so far and also this one, which may be the first with a fraction."""
        array = _array(value, "input")
        if array.shape != self.shape or self.dtype == "float32":
            return self
        if array.dtype.kind == "f":
            return Form(self.shape, "float32")
        return self if bool((array.astype(self.dtype) == array).all()) else Form(self.shape, "int64")

    @staticmethod
    def of(value: Any, what: str) -> "Form":
        """Return the form of a first value. Floats become float32 and whole numbers int64; inputs of bytes or booleans keep their
        dtype."""
        array = _array(value, what)
        if array.dtype.kind == "f":
            return Form(array.shape, "float32")
        return Form(
            array.shape, array.dtype.name if what == "input" and array.dtype.name in ("uint8", "bool") else "int64"
        )


def forms_of(data: Data | None) -> dict[str, Form]:
    """Return the forms that a task's data declare, for inputs and for targets."""
    if data is None:
        return {}
    widened = {"float16": "float32", "bfloat16": "float32"}
    return {
        "input": Form(tuple(data.inputs), widened.get(data.inputs_dtype, data.inputs_dtype)),
        "target": Form(tuple(data.targets), widened.get(data.targets_dtype, data.targets_dtype), data.classes),
    }


class ReadingForms:
    """The known forms of a node's readings.

    Args:
        declared: The forms that the task declares. An undeclared form is taken from the first value, and widened later.
    """

    def __init__(self, declared: Mapping[str, Form]) -> None:
        self._declared = dict(declared)
        self.known: dict[str, Form] = {}

    def form(self, what: str, value: Any) -> Form:
        """Return the form that a value must have; an undeclared form of inputs is widened by the value."""
        form = self.known.get(what) or Form.of(value, what)
        return form.widened(value) if what == "input" and what not in self._declared else form

    def fitted(self, reading: Reading) -> tuple[dict[str, Array], dict[str, Form]]:
        """Convert a reading's values to arrays.

        Returns:
            The arrays, and the forms after this reading.

        Raises:
            BadReading: A value does not fit, or the input is missing.
        """
        forms, arrays = dict(self.known), dict[str, Array]()
        for what, value in (("input", reading.input), ("target", reading.target)):
            if value is not None:
                forms[what] = self.form(what, value)
                arrays[what] = forms[what].fit(value, what)
        if "input" not in arrays:
            raise BadReading("it has no input")
        return arrays, forms

    def encoded(self, what: str, array: Array | None) -> bytes | None:
        """Return the bytes of an array as they are stored: in the known dtype, which a later reading may have widened."""
        return None if array is None else array.astype(self.known[what].dtype).tobytes()

    def learn(self, forms: Mapping[str, Form]) -> None:
        """Replace the known forms by these."""
        self.known = dict(forms)

    def convert(self, database: sqlite3.Connection, what: str, form: Form) -> None:
        """Rewrite all inputs in another dtype, which holds the same values."""
        before = self.known[what]
        for number, body in database.execute("SELECT number, input FROM readings").fetchall():
            values = form.fit(np.frombuffer(body, before.dtype).reshape(before.shape), what)
            database.execute("UPDATE readings SET input = ? WHERE number = ?", (values.tobytes(), number))
        database.execute(
            "INSERT OR REPLACE INTO forms (what, form) VALUES (?, ?)", (what, msgspec.json.encode(form).decode())
        )
        self.known = {**self.known, what: form}

    def save(self, database: sqlite3.Connection) -> None:
        """Write the forms that are not in the file yet."""
        rows = [(what, msgspec.json.encode(form).decode()) for what, form in self.known.items()]
        database.executemany("INSERT OR IGNORE INTO forms (what, form) VALUES (?, ?)", rows)

    def load(self, database: sqlite3.Connection) -> None:
        """Read the forms from the file."""
        rows = database.execute("SELECT what, form FROM forms").fetchall()
        self.known = {what: msgspec.json.decode(form, type=Form) for what, form in rows}

    def to_convert(self, path: Path) -> Form | None:
        """Compare the forms in the file with the declared ones.

        Args:
            path: The file, for messages.

        Returns:
            The form into which the inputs must be converted; None if they have it already.

        Raises:
            ExperimentError: The file holds readings of a different form.
        """
        wanted: Form | None = None
        for what, form in self._declared.items():
            before = self.known.get(what, form)
            if (
                what == "input"
                and before.shape == form.shape
                and before.widened(np.zeros(form.shape, form.dtype)) == form
            ):
                wanted = form if before != form else None
            elif (before.shape, before.dtype) != (form.shape, form.dtype):
                raise ExperimentError(
                    f"the {what}s in {path} are {before.dtype}{list(before.shape)}, but the task's are "
                    f"{form.dtype}{list(form.shape)}: give a new folder, or the task for which they were kept"
                )
        return wanted

    def declare(self) -> None:
        """Replace the known forms by the declared ones."""
        self.known = {**self.known, **self._declared}


def _array(value: Any, what: str) -> Array:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise BadReading(f"its {what} is not an array of numbers: {error!s:.100}") from error
    if array.dtype.kind not in "biuf":
        raise BadReading(f"its {what} is not an array of numbers: it has the dtype {array.dtype}")
    return array
