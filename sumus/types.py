"""Type aliases for the data that every layer shares, and two functions that turn numpy's and torch's numbers into Python's."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
"""A numpy array of any dtype. `Floats` is the alias for arrays that are known to hold floats."""
Floats: TypeAlias = NDArray[np.floating[Any]]

Tree: TypeAlias = Mapping[str, Array]
"""The parameters of a model: leaf name → array. The order of the names has no meaning; the canonical order is `sorted`."""

Layout: TypeAlias = Mapping[str, tuple[int, ...]]
"""The shapes of a tree: leaf name → shape."""

Broadcast: TypeAlias = Mapping[str, Tree]
"""What the server sends to each device, by part name: always `params`; SCAFFOLD adds `control`."""

Tensors: TypeAlias = Mapping[str, Any]
"""A tree whose arrays are either numpy's or torch's. The client rules use only operators that both libraries have."""

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None


def plain_number(value: Any) -> Any:
    """Convert a numpy or torch number without dimensions to a Python number. Return any other value unchanged."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def hold_plain_numbers(instance: Any) -> None:
    """Replace numpy and torch numbers in the fields of a frozen dataclass by Python numbers, in place.

    Equal values then have the same JSON text and the same hash, whichever library their numbers came from.
    """
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if (plain := plain_number(value)) is not value:
            object.__setattr__(instance, field.name, plain)
