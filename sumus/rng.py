"""Random numbers. Code that needs randomness takes it as an argument; in simulations and tests, it comes from streams
keyed by words.

A deployed device takes its keys from the operating system's CSPRNG instead. The code that uses the keys is the same.
"""

import hashlib
from typing import cast

import numpy as np

from sumus.types import Floats


def key(*words: object) -> bytes:
    """Derive 32 bytes from words such as `(seed, "round", 3, "client", "alice")`, by SHA-256.

    Each word is preceded by its length, so that `("ab", "c")` and `("a", "bc")` differ, and by its type, so that `1`
    and `"1"` differ. A numpy number counts as the equal Python number. Bytes are written in hexadecimal, as
    docs/wire.md says, so that other languages derive the same key.
    """
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
    """Make a numpy generator (Philox) that is keyed by the first 16 bytes of `key(*words)`. Do not use it for secrets."""
    return generator_of(key(*words))


def generator_of(own: bytes) -> np.random.Generator:
    """Make a generator as `generator` does, from a `key` that has already been derived."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(own[:16], "little")))


def signs(seed: bytes, count: int) -> Floats:
    """Derive `count` signs (±1.0, float64) from a public seed. Every participant derives the same signs.

    Sign `i` is given by bit `i` of the stream SHA-256(seed ‖ 0) ‖ SHA-256(seed ‖ 1) ‖ …: a bit of 0 gives +1. The
    counters are 8 little-endian bytes; the bits of a byte are read from the lowest to the highest. Python and WebCrypto
    both have this primitive.
    """
    blocks = -(-count // 256)
    stream = b"".join(hashlib.sha256(seed + block.to_bytes(8, "little")).digest() for block in range(blocks))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=count, bitorder="little")
    return 1.0 - 2.0 * bits
