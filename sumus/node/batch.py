"""The readings of one file or one request body, with the limits for both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sumus.node.reading import BadReading

Raw: TypeAlias = Mapping[str, Any]
"""A reading as it arrived: values by name."""

MOST_READINGS = 100_000
"""The maximum number of readings in one file or one body."""
MOST_BYTES = 64 * 2**20
"""The maximum number of bytes of a file, both packed and unpacked."""
MOST_TEXT = 8 * 2**20
"""The maximum number of bytes of a text file, or of a JSON body: in memory, its contents take many times as much."""


class NothingReadable(BadReading):
    """Raised for a file that contains no reading so far; more data may follow."""


@dataclass(frozen=True)
class Beginning:
    """The facts from the beginning of a text file that are needed to read later lines.

    Attributes:
        head: The bytes before the first reading: the line of names, and the lines before it.
        decimal: The decimal sign of the numbers so far, "," or "."; empty if no number has shown it.
        separator: The text between values; empty if no row has shown it yet.
    """

    head: bytes = b""
    decimal: str = ""
    separator: str = ""


@dataclass(frozen=True)
class Batch:
    """The readings of a file.

    Attributes:
        found: Each reading, or the error in its place.
        subset: Makes a file of the same format from some of the readings, given by number.
        where: Describes the place of a reading, given by number, for a person.
        begins: The offset of each reading, in bytes; empty for files that are not read line by line.
        pieces: The bytes of each reading; empty for files that are not read line by line.
        beginning: The facts that are needed to read later lines of the same file.
        open: The offset of a quote that is still open at the end of the file; None if all are closed.
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
    """Make a batch from the readings of a text file.

    Args:
        found: Each reading, or the error in its place.
        pieces: The bytes of each reading.
        begins: The offset of each reading, in bytes.
        lines: The number of the line at which each reading begins, from 1.
        beginning: The facts from the beginning of the file.
        open: The offset of a quote that is still open; None if all are closed.
    """

    def subset(numbers: Sequence[int]) -> bytes:
        return beginning.head + b"".join(_closed(pieces[number]) for number in numbers)

    return Batch(found, subset, lambda number: f"line {lines[number]}", begins, pieces, beginning, open)


def _closed(piece: bytes) -> bytes:
    """End a line with a newline, so that another line can follow: in JSON and in line protocol, a carriage return alone does not
    end a line."""
    return piece if piece.endswith(b"\n") else piece + b"\n"
