"""Rows are values: what becomes of one is another."""

from typing import Any, TypeVar

R = TypeVar("R")


def changed(row: R, **values: Any) -> R:
    """`dataclasses.replace` for rows, which have slots and check nothing: in a third of its time, since a week of a million
    devices does little else."""
    kind: Any = type(row)
    new = object.__new__(kind)
    for name in kind.__slots__:
        object.__setattr__(new, name, values.pop(name) if name in values else getattr(row, name))
    if values:
        raise TypeError(f"a {kind.__name__} has no {', '.join(values)}")
    return new
