"""Searches the disk as a thief would: for files that hold a piece of an update or of a sum."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from sumus.aggregate import RunningSum, Update
from sumus.first_hop import FirstHop
from sumus.types import Array

WINDOW = 64
"""Bytes of a piece. Any 127 consecutive bytes of a vector hold at least one whole piece."""

_MIX, _BITS = np.uint64(0x9E3779B97F4A7C15), 20
"""A word times this number; its highest bits are compared first."""


class Markers:
    """All pieces of some vectors. A piece that repeats a few bytes, as padding does, is left out."""

    def __init__(self, vectors: Iterable[Array]) -> None:
        pieces = set[bytes]()
        for vector in vectors:
            body = np.ascontiguousarray(vector).tobytes()
            for first in range(0, len(body) - WINDOW + 1, WINDOW):
                piece = body[first : first + WINDOW]
                if len(set(piece)) > 12 and any(piece[:8]):
                    pieces.add(piece)
        self._pieces = pieces
        self._beginnings = np.unique(np.array([int.from_bytes(piece[:8], "little") for piece in pieces], np.uint64))
        self._seen = np.zeros(2**_BITS, np.bool_)
        self._seen[_mixed(self._beginnings)] = True

    def __len__(self) -> int:
        return len(self._pieces)

    def found_in(self, body: bytes) -> bool:
        """Return whether these bytes hold one of the pieces, at any position."""
        for offset in range(8) if len(body) >= WINDOW else ():
            words = np.frombuffer(body, np.uint64, (len(body) - offset) // 8, offset)
            perhaps = np.flatnonzero(self._seen[_mixed(words)])
            at = np.minimum(np.searchsorted(self._beginnings, words[perhaps]), self._beginnings.size - 1)
            for word in perhaps[self._beginnings[at] == words[perhaps]]:
                first = offset + 8 * int(word)
                if body[first : first + WINDOW] in self._pieces:
                    return True
        return False


def _mixed(words: Array) -> Array:
    return words * _MIX >> np.uint64(64 - _BITS)


def vectors_of(updates: Sequence[Update], hop: FirstHop) -> Iterator[Array]:
    """Yield each update as it was sent and as it is added, and the sum of any consecutive ones: all partial sums, and
    all differences of two of them."""
    partial: list[dict[str, Array]] = [{}]
    total = RunningSum()
    for update in updates:
        yield from (leaf for tree in update.parts.values() for leaf in tree.values())
        hop.count_in(update, total)
        partial.append(
            {f"{part} {name}": leaf.copy() for part, tree in total.total.sums.items() for name, leaf in tree.items()}
        )
    for one, other in combinations(partial, 2):
        yield from (leaf - one[name] if one else leaf for name, leaf in other.items())


def found_on_disk(roots: Iterable[Path], markers: Markers, since: float = 0.0) -> list[str]:
    """Return the names of all files below these folders that hold a marker and were written since a moment. A file that
    is deleted meanwhile is skipped."""
    found = list[str]()
    for root in roots:
        for path in sorted(root.rglob("*")):
            try:
                body = path.read_bytes() if path.is_file() and path.stat().st_mtime >= since else b""
            except FileNotFoundError:
                continue
            if markers.found_in(body):
                found.append(str(path.relative_to(root)))
    return found
