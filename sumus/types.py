"""The few shapes of data that every layer shares."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
"""A numpy array; `Floats` where that much is known."""
Floats: TypeAlias = NDArray[np.floating[Any]]

Tree: TypeAlias = Mapping[str, Array]
"""Leaf name → array: the only container of parameters. Order never matters; `sorted` is canonical."""

Layout: TypeAlias = Mapping[str, tuple[int, ...]]
"""Leaf name → shape."""

Broadcast: TypeAlias = Mapping[str, Tree]
"""What the server sends down, by name: always `params`; SCAFFOLD adds `control`."""

Tensors: TypeAlias = Mapping[str, Any]
"""A tree whose arrays may be numpy's or torch's: the client rules are written in operators both know."""

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None


def plain_number(value: Any) -> Any:
    """A number of numpy's or torch's, which has no dimension, as Python's; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def hold_plain_numbers(instance: Any) -> None:
    """Let a frozen dataclass hold Python's numbers where it was given numpy's or torch's: they are written and hashed alike."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if (plain := plain_number(value)) is not value:
            object.__setattr__(instance, field.name, plain)
