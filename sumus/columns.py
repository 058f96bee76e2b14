"""Convert users' columns, tables and lists to arrays without changing a value. A value that would change is refused,
with its row.

    array_of([1, 2.5])              array([1. , 2.5])
    array_of(["a", 1])              ValueError: row 1 is a number (1), but row 0 is text ('a'): ...
    array_of([2**60 + 1, 0.5])      ValueError: row 0 is 1152921504606846977, which float64 cannot hold ...

NumPy's own conversion would turn the number in the second line into text, round the number in the third line, and use
values that a mask hides.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from sumus.types import Array

_KINDS = {"b": "a truth value", "i": "a number", "u": "a number", "f": "a number", "c": "a complex number"} | {
    "U": "text",
    "S": "bytes",
    "M": "a time",
    "m": "a span of time",
    "O": "an object",
}


def array_of(values: Any) -> Array:
    """Convert a column, a table or a list to an array. An array is returned unchanged.

    Args:
        values: The values, one row per example.

    Returns:
        An array of the same values.

    Raises:
        ValueError: A value is masked, or the conversion would change it; the message names the row and the reason.
    """
    if isinstance(values, np.ma.MaskedArray):
        return _unmasked(values)
    if hasattr(values, "iloc") and hasattr(values, "columns"):
        names = [str(name) for name in values.columns]
        columns = {name: array_of(values.iloc[:, place]) for place, name in enumerate(names)}
        whole = np.asarray(values.to_numpy())
        for place, (name, column) in enumerate(columns.items() if len(columns) == len(names) else ()):
            _expect_unrounded(column, whole[:, place], f"column {name!r}, row ")
        return whole
    if hasattr(values, "to_numpy"):
        return np.asarray(values.to_numpy())
    if isinstance(values, list | tuple):
        return _listed(cast(Sequence[Any], values))
    return np.asarray(values)


def stacked(rows: Sequence[Array], axis: int = 0, names: Sequence[str] = ()) -> Array:
    """Stack arrays of one shape and kind without changing a value.

    Args:
        rows: The arrays.
        axis: The position of the new axis.
        names: The names of the arrays in errors; "row 0", "row 1" and so on by default.

    Returns:
        One array.

    Raises:
        ValueError: Shapes or kinds differ, or a whole number would be rounded.
    """
    if not rows:
        return np.zeros(0)
    called = names or [f"row {number}" for number in range(len(rows))]
    first = rows[0]
    for name, row in zip(called, rows, strict=True):
        if row.shape != first.shape:
            raise ValueError(f"{name} has shape {row.shape}, but {called[0]} has shape {first.shape}")
        if _kind(row) != _kind(first):
            raise ValueError(
                f"{name} is {_kind(row)}{_shown(row)}, but {called[0]} is {_kind(first)}{_shown(first)}: give values of one kind"
            )
    whole = np.stack(rows, axis)
    for name, row, kept in zip(called, rows, np.moveaxis(whole, axis, 0), strict=True):
        if row.dtype != whole.dtype:
            _expect_unrounded(row, kept, f"{name}, entry ")
    return whole


def numbers_of(values: Any) -> Array:
    """Convert values to an array as `array_of` does, and refuse values that are not numbers. A text of digits is not a number.

    Args:
        values: The values, one row per example.

    Returns:
        An array of numbers or truth values.

    Raises:
        ValueError: A value is not a number; the message names the row and column.
    """
    array = array_of(values)
    if array.dtype.kind in "biuf":
        return array
    for place, value in np.ndenumerate(array):
        if array.dtype.kind != "O" or not _is_number(value):
            plain = value.item() if hasattr(value, "item") else value
            raise ValueError(f"{where(place)} holds {_kind_of(value)} ({plain!r:.60}), which is not a number")
    raise ValueError("numbers are kept as objects: give an array of one dtype, such as float32")


def ids_of(by: Any) -> list[Any] | Array:
    """Read a column of client ids. Each id names one person.

    Args:
        by: One id for each example.

    Returns:
        The ids as Python values; or as an array, if its dtype holds each id exactly.

    Raises:
        ValueError: An id is missing, is of another kind than the first, or may have been rounded.
    """
    if isinstance(by, np.ma.MaskedArray):
        by = _unmasked(by)
    if not isinstance(by, list | tuple):
        found: Array = np.asarray(by.to_numpy() if hasattr(by, "to_numpy") else by)
        if found.dtype.kind in "Mm" and np.isnat(found).any():
            raise ValueError(
                f"by= has no client for example {int(np.isnat(found).argmax())} (NaT): give every example a client"
            )
        if found.dtype.kind not in "Of" or found.ndim != 1:
            return found
        by = list(found)
    ids = list(cast(Sequence[Any], by))
    for row, one in enumerate(ids):
        if _is_missing(one):
            raise ValueError(f"by= has no client for example {row} ({one!r}): give every example a client")
        if _kind_of(one) != _kind_of(ids[0]):
            raise ValueError(
                f"by= holds values of different kinds (example {row} is {_kind_of(one)}, {one!r:.60}, but example 0 is "
                f"{_kind_of(ids[0])}, {ids[0]!r:.60}): give ids of one kind"
            )
        if isinstance(one, float | np.floating) and _is_beyond_whole(cast(Any, one)):
            raise ValueError(
                f"by= has the client {one!r} for example {row}, but several whole numbers may have been rounded to a float of "
                "that size: give whole numbers or text"
            )
    return [one.item() if isinstance(one, np.generic) else one for one in ids]


def first_changed(before: Array, after: Array) -> tuple[int, ...] | None:
    """Find the first whole number that a conversion has changed, among those with an absolute value of at least 2^24.

    Returns:
        The number's position; None if there is none.
    """
    with np.errstate(invalid="ignore"):
        large = (np.abs(before) >= 2.0**24) & (before != after)
        if before.dtype.kind == "f":
            large &= before == np.rint(before)
    return tuple(int(axis) for axis in np.argwhere(large)[0]) if large.any() else None


def where(place: tuple[int, ...]) -> str:
    """Name a position in an array in words: its row, and its column if there is one."""
    if len(place) < 2:
        return f"row {place[0]}" if place else "the value"
    return f"row {place[0]}, column {place[1] if len(place) == 2 else place[1:]}"


def _listed(values: Sequence[Any]) -> Array:
    """Convert a list to an array: numbers or text all at once, everything else row by row."""
    if any(isinstance(one, list | tuple | np.ndarray) or hasattr(one, "__array__") for one in values):
        return stacked([_row(number, one) for number, one in enumerate(values)])
    with np.errstate(all="ignore"):
        array = np.array(values)
    if array.dtype.kind in "US":
        wanted = str if array.dtype.kind == "U" else bytes
        for row, one in enumerate(values):
            if not isinstance(one, wanted):
                other = next((place for place, value in enumerate(values) if isinstance(value, wanted)), 0)
                raise ValueError(
                    f"row {row} is {_kind_of(one)} ({one!r:.60}), but row {other} is {_kind_of(values[other])} "
                    f"({values[other]!r:.60}): give values of one kind"
                )
            if len(one) and one[-1] in ("\0", 0):
                raise ValueError(
                    f"row {row} is a text that ends with a zero byte ({one!r:.60}), which NumPy would drop: remove it"
                )
    if array.dtype.kind == "f":
        for row, one in enumerate(values):
            if isinstance(one, int | np.integer) and int(array[row]) != int(cast(Any, one)):
                raise ValueError(
                    f"row {row} is {one}, which {array.dtype} cannot hold (it would become {int(array[row])}): give smaller "
                    "numbers, or only whole numbers"
                )
    return array


def _is_beyond_whole(value: Any) -> bool:
    """Return whether a float is so large that several whole numbers may have been rounded to it."""
    digits = np.finfo(np.asarray(value).dtype).nmant + 1
    return bool(abs(value) >= 2.0**digits)


def _row(number: int, value: Any) -> Array:
    try:
        return array_of(value)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error


def _unmasked(values: Any) -> Array:
    hidden = np.argwhere(np.ma.getmaskarray(values))
    if len(hidden):
        raise ValueError(f"{where(tuple(int(axis) for axis in hidden[0]))} is masked: leave it out, or fill it")
    return np.asarray(values.data)


def _expect_unrounded(before: Array, after: Array, name: str) -> None:
    """Raise ValueError if whole numbers were rounded when they became floats."""
    if before.dtype.kind not in "iu" or after.dtype.kind != "f":
        return
    limit = 2 ** (np.finfo(after.dtype).nmant + 1)
    for place in np.argwhere((before > limit) | (before < -limit)):
        one, other = int(before[tuple(place)]), int(after[tuple(place)])
        if one != other:
            entry = ", ".join(map(str, place)) or "0"
            raise ValueError(
                f"{name}{entry} is {one}, which {after.dtype} cannot hold (it would become {other}): give smaller numbers, or "
                "only whole numbers"
            )


def _kind(array: Array) -> str:
    return _KINDS.get(array.dtype.kind, str(array.dtype))


def _kind_of(value: Any) -> str:
    """Name the kind of a value in words."""
    if _is_missing(value):
        return "nothing"
    for kinds, said in (
        ((bool, np.bool_), "a truth value"),
        ((int, np.integer), "a whole number"),
        ((float, np.floating), "a number with a fraction"),
        ((str,), "text"),
        ((bytes,), "bytes"),
    ):
        if isinstance(value, kinds):
            return said
    return f"a {type(value).__name__}"


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.bool_ | np.number) and not isinstance(value, complex)


def _is_missing(value: Any) -> bool:
    """Return whether a value marks a missing entry: None, NaN, NaT, or pandas' NA."""
    return value is None or type(value).__name__ in ("NAType", "NaTType") or (_is_scalar(value) and value != value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, float | np.generic)


def _shown(array: Array) -> str:
    return f" ({array.flat[0]!r:.60})" if array.size else ""
