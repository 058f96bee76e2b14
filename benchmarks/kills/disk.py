"""Searches the disk as a thief would: for files that hold a piece of an update or of a sum."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from sumus.aggregate import RunningSum, Update
from sumus.first_hop import FirstHop
from sumus.types import Array

WINDOW = 64
"""Bytes of a piece. Whoever has 127 bytes in a row of a vector has one of its pieces whole."""

_MIX, _BITS = np.uint64(0x9E3779B97F4A7C15), 20
"""A word times this, in its highest bits, is what is looked at first."""


class Markers:
    """Pieces of vectors, all of them. A piece that repeats a few bytes, as padding does, marks nothing."""

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
        """Whether these bytes hold one of them, wherever it begins."""
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
    """Each update as it was sent and as it is added, and the sum of any of them in a row: of all partial sums, and of what two of
    them differ by."""
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
    """The names of all files below these that hold a marker, of those that were written since. A file that goes away meanwhile
    is looked at no more."""
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
