"""A device's randomness: random bytes for a purpose, which is named in words. Real devices take them from the system;
simulations and tests derive them from a seed.

keys = system                                   unpredictable bytes
keys = keyed(seed)                              the same bytes for the same words, as in the simulator
"""

import secrets
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from sumus.rng import key

Keys: TypeAlias = Callable[..., bytes]
"""Returns 32 bytes for words such as `("round", 3, "client", "alice", "training")`."""


def system(*words: object) -> bytes:
    """Return 32 bytes from the system's generator, different at each call."""
    return secrets.token_bytes(32)


def keyed(seed: int) -> Keys:
    """Return keys that are derived from a seed and the words."""
    return partial(key, seed)


def share_of(own: bytes) -> float:
    """Return a uniform number from 0 to 1, made from bytes that `Keys` returned."""
    return int.from_bytes(own[:7], "little") / 2**56
