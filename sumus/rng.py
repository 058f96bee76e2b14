"""Randomness arrives as an argument: streams keyed by words, in simulation and in tests.

A deployed device takes its keys from the system's CSPRNG instead; the code that consumes them is the same.
"""

import hashlib
from typing import cast

import numpy as np

from sumus.types import Floats


def key(*words: object) -> bytes:
    """32 bytes from words such as `(seed, "round", 3, "client", "alice")`. Words are separated, so that
    `("ab", "c")` and `("a", "bc")` differ, and typed, so that `1` and `"1"` do; numpy's numbers are Python's. Bytes are
    written in hexadecimal, as docs/wire.md says: what another language makes of them is the same."""
    digest = hashlib.sha256()
    for word in words:
        if isinstance(word, np.generic):
            word = cast(object, word.item())
        if isinstance(word, bytes | bytearray | memoryview):
            text = f"bytes:{word.hex()}".encode()
        else:
            text = f"{type(word).__name__}:{word}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.digest()


def generator(*words: object) -> np.random.Generator:
    """A numpy generator for these words: Philox, keyed by the first 16 bytes of `key`. Not for secrets."""
    return generator_of(key(*words))


def generator_of(own: bytes) -> np.random.Generator:
    """The same, of a `key` that was made before."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(own[:16], "little")))


def signs(seed: bytes, count: int) -> Floats:
    """`count` signs (±1.0, float64) that every participant derives alike from a public seed.

    Bit `i` of the stream SHA-256(seed ‖ 0) ‖ SHA-256(seed ‖ 1) ‖ …, counters as 8 little-endian bytes, bits of a
    byte from the lowest: a primitive that Python and WebCrypto share.
    """
    blocks = -(-count // 256)
    stream = b"".join(hashlib.sha256(seed + block.to_bytes(8, "little")).digest() for block in range(blocks))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=count, bitorder="little")
    return 1.0 - 2.0 * bits
