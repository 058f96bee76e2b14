"""The readings of one file or one body, and the limits that hold for all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sumus.node.reading import BadReading

Raw: TypeAlias = Mapping[str, Any]
"""A reading as it came: values by name."""

MOST_READINGS = 100_000
"""In one file or one body."""
MOST_BYTES = 64 * 2**20
"""Of a file, as it is and unpacked."""
MOST_TEXT = 8 * 2**20
"""Of a file of text, or a body of JSON: in memory it is many times that."""


class NothingReadable(BadReading):
    """A file in which nothing can be read so far, and something may follow."""


@dataclass(frozen=True)
class Beginning:
    """What a file of text says once, for all of its lines, so that the lines after it can be read later.

    Attributes:
        head: The bytes up to the first reading: the line of names, and the lines before it.
        decimal: "," or "." if the numbers so far are written with it; empty if none showed it.
        separator: The text between values, once a row has shown it; else empty.
    """

    head: bytes = b""
    decimal: str = ""
    separator: str = ""


@dataclass(frozen=True)
class Batch:
    """The readings of a file.

    Attributes:
        found: each reading, or what is wrong with it.
        subset: Makes a file of the same form with some of the readings, by their numbers.
        where: names the place of a reading, by its number, as a person finds it.
        begins: The byte at which each reading begins; empty for files that are not read line by line.
        pieces: The bytes of each reading; empty for those files.
        beginning: What later lines of the same file need.
        open: The byte at which a quote opens that the end of the file does not close; None if there is none.
    """

    found: Sequence[Raw | BadReading]
    subset: Callable[[Sequence[int]], bytes]
    where: Callable[[int], str] = "reading {}".format
    begins: Sequence[int] = ()
    pieces: Sequence[bytes] = ()
    beginning: Beginning = field(default_factory=Beginning)
    open: int | None = None


def of_lines(
    found: Sequence[Raw | BadReading],
    pieces: Sequence[bytes],
    begins: Sequence[int],
    lines: Sequence[int],
    beginning: Beginning,
    open: int | None = None,
) -> Batch:
    """Make a batch of the readings of a file of text.

    Args:
        found: Each reading, or what is wrong with it.
        pieces: The bytes of each.
        begins: The byte at which each begins.
        lines: The number of the line at which each begins, from 1.
        beginning: What stands before the first one.
        open: The byte at which a quote opens that is not closed; None if there is none.
    """

    def subset(numbers: Sequence[int]) -> bytes:
        return beginning.head + b"".join(_closed(pieces[number]) for number in numbers)

    return Batch(found, subset, lambda number: f"line {lines[number]}", begins, pieces, beginning, open)


def _closed(piece: bytes) -> bytes:
    """Give a line an end that another line can follow: a carriage return alone ends no line of JSON or line protocol."""
    return piece if piece.endswith(b"\n") else piece + b"\n"
