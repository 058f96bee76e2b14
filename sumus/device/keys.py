"""A device's randomness: bytes for words that say what they are for. Real devices take them from the system; simulations and
tests derive them from a seed.

keys = system                                   nobody can guess what it gives
keys = keyed(seed)                              the same bytes for the same words, as in the simulator
"""

import secrets
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from sumus.rng import key

Keys: TypeAlias = Callable[..., bytes]
"""Gives 32 bytes for words such as `("round", 3, "client", "alice", "training")`."""


def system(*words: object) -> bytes:
    """32 bytes of the system's generator, other ones at each call."""
    return secrets.token_bytes(32)


def keyed(seed: int) -> Keys:
    """Keys that are derived from a seed and the words."""
    return partial(key, seed)


def share_of(own: bytes) -> float:
    """A uniform number from 0 to 1, made of the bytes that `Keys` give."""
    return int.from_bytes(own[:7], "little") / 2**56
