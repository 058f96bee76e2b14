"""The few shapes of data that every layer shares."""

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
