"""What is random about a device: bytes for words, from the system in earnest, and keyed in simulation and tests.

keys = system                                   nobody can guess what it gives
keys = keyed(seed)                              the same bytes for the same words, as in the simulator
"""

import secrets
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from sumus.rng import key

Keys: TypeAlias = Callable[..., bytes]
"""32 bytes for words such as `("round", 3, "client", "alice", "training")`."""


def system(*words: object) -> bytes:
    """From the system's generator, other ones each time."""
    return secrets.token_bytes(32)


def keyed(seed: int) -> Keys:
    """Of a seed and the words."""
    return partial(key, seed)


def share_of(own: bytes) -> float:
    """Such bytes as a number from 0 to 1, uniform."""
    return int.from_bytes(own[:7], "little") / 2**56
