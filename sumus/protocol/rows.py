"""Rows are values: a changed row is a new value."""

from typing import Any, TypeVar

R = TypeVar("R")


def changed(row: R, **values: Any) -> R:
    """Return a copy of a row with some values changed, as `dataclasses.replace` does. It works for classes that have slots and
    no checks in their constructor.

    This function takes a third of the time of `replace`. In a simulated week of a million devices, most of the time is spent in
    it.
    """
    kind: Any = type(row)
    new = object.__new__(kind)
    for name in kind.__slots__:
        object.__setattr__(new, name, values.pop(name) if name in values else getattr(row, name))
    if values:
        raise TypeError(f"a {kind.__name__} has no {', '.join(values)}")
    return new
