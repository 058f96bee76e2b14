"""A node's records of the files in its watched folder: how far each was read, and where it was moved. They are in the database
of the node's readings.

ledger = Ledger(readings)
ledger.save(replace(file, offset=1200))          on the disk when it returns
ledger.moved("done/monday.csv", state, now)      before the file is moved
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from secrets import token_hex
from typing import Any

from sumus.node.batch import Beginning
from sumus.node.readings import Readings

MOST_FILES = 20_000
"""The maximum number of files that are remembered; those untouched for longest are forgotten first."""
_EDGE = 4096
"""The number of bytes at each end of the part that was read. A file is recognized by these bytes."""
NONE_READ = sha256(bytes(8)).digest()
"""The mark of a file from which no bytes were read."""


@dataclass(frozen=True)
class FileState:
    """The present state of a file on the disk.

    Attributes:
        inode: The file's identity, independent of its name: its disk and its number there.
        size: The size, in bytes.
        changed: The time of the last write, in nanoseconds since 1970.
    """

    inode: str
    size: int
    changed: int

    @staticmethod
    def of(stat: os.stat_result) -> "FileState":
        """Make a state from a result of `os.stat`."""
        return FileState(f"{stat.st_dev}/{stat.st_ino}", stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class File:
    """A record of how far a file was read.

    Attributes:
        name: The file's last known name.
        state: The file's state when it was last read.
        offset: The number of bytes whose readings are kept or refused.
        mark: A hash of these bytes, by which the file is recognized; see `mark_of`.
        beginning: The facts from the file's beginning that are needed for later lines.
        half: The key of the last reading if its line has no line end, because text may still be appended to it; else empty.
        at: The time at which the file was last read, in seconds since 1970.
        id: The part of the readings' keys that identifies the file.
    """

    name: str
    state: FileState
    offset: int = 0
    mark: bytes = NONE_READ
    beginning: Beginning = field(default_factory=Beginning)
    half: str = ""
    at: float = 0.0
    id: str = field(default_factory=lambda: token_hex(8))


@dataclass(frozen=True)
class MovedFile:
    """A file that the node moved or wrote into `done/` or `refused/`.

    Attributes:
        place: The file's path in the watched folder, such as `done/monday.csv`.
        state: The file's state when the node put it there.
        at: The time of the move, in seconds since 1970.
    """

    place: str
    state: FileState
    at: float


def _file_of(row: Sequence[Any]) -> File:
    id, name, inode, offset, mark, size, changed, head, decimal, separator, half, at = row
    return File(name, FileState(inode, size, changed), offset, mark, Beginning(head, decimal, separator), half, at, id)


def mark_of(descriptor: int, offset: int) -> bytes:
    """Return a mark of the first bytes of a file: a hash of their number and of both their ends."""
    edge = min(offset, _EDGE)
    ends = os.pread(descriptor, edge, 0) + os.pread(descriptor, edge, offset - edge)
    return sha256(offset.to_bytes(8, "little") + ends).digest()


class Ledger:
    """The records of files, in memory and on the disk.

    Args:
        readings: The readings, whose database also holds the ledger.

    Raises:
        ExperimentError: The database can be neither read nor written.
    """

    def __init__(self, readings: Readings) -> None:
        self._readings = readings
        rows, moved = readings.rows("files"), readings.rows("moved")
        self._files = {row[0]: _file_of(row) for row in rows}
        self._moved = {row[0]: MovedFile(row[0], FileState(*row[1:4]), row[4]) for row in moved}
        self._by_inode: dict[str, dict[str, None]] = {}
        self._by_name: dict[str, dict[str, None]] = {}
        for file in self._files.values():
            self._index(file)

    def of_inode(self, inode: str) -> list[File]:
        """List the files that were seen with an inode, newest first."""
        return [self._files[id] for id in reversed(self._by_inode.get(inode, {}))]

    def of_name(self, name: str, but: str) -> File | None:
        """Find the newest record for a name, except the one with this id."""
        ids = (id for id in reversed(self._by_name.get(name, {})) if id != but)
        return next((self._files[id] for id in ids if self._files[id].offset), None)

    def files(self) -> list[File]:
        """List all files."""
        return list(self._files.values())

    def save(self, file: File) -> None:
        """Record how far a file was read."""
        state, begun = file.state, file.beginning
        row = (file.id, file.name, state.inode, file.offset, file.mark, state.size, state.changed, begun.head, begun.decimal,
               begun.separator, file.half, file.at)  # fmt: skip
        spare = list(self._files)[: max(len(self._files) - MOST_FILES, 0)]
        with self._readings.transaction() as database:
            database.execute(f"INSERT OR REPLACE INTO files VALUES ({', '.join('?' * len(row))})", row)
            database.executemany("DELETE FROM files WHERE id = ?", [(id,) for id in spare])
        for id in (file.id, *spare):
            self._drop(id)
        self._files[file.id] = file
        self._index(file)

    def lose(self, inodes: Iterable[str]) -> None:
        """Record that files are gone: a later file may have the same inode, but is a different file."""
        lost = [file for inode in inodes for file in self.of_inode(inode)]
        if lost:
            with self._readings.transaction() as database:
                database.executemany("UPDATE files SET inode = '' WHERE id = ?", [(file.id,) for file in lost])
        for file in lost:
            self._drop(file.id)
            self._files[file.id] = gone = replace(file, state=replace(file.state, inode=""))
            self._index(gone)

    def forget(self, file: File) -> None:
        """Delete the record of a file: if the file is found again, it counts as new."""
        with self._readings.transaction() as database:
            database.execute("DELETE FROM files WHERE id = ?", (file.id,))
        self._drop(file.id)

    def moved(self, place: str, state: FileState, at: float) -> None:
        """Record that the node put a file at a place."""
        with self._readings.transaction() as database:
            row = (place, state.inode, state.size, state.changed, at)
            database.execute("INSERT OR REPLACE INTO moved VALUES (?, ?, ?, ?, ?)", row)
        self._moved[place] = MovedFile(place, state, at)

    def gone(self, places: list[str]) -> None:
        """Delete the records of files that the node moved, and that are gone now."""
        if places:
            with self._readings.transaction() as database:
                database.executemany("DELETE FROM moved WHERE place = ?", [(place,) for place in places])
            for place in places:
                self._moved.pop(place, None)

    @property
    def places(self) -> dict[str, MovedFile]:
        """The files that the node moved, by place."""
        return self._moved

    def _index(self, file: File) -> None:
        self._by_inode.setdefault(file.state.inode, {})[file.id] = None
        self._by_name.setdefault(file.name, {})[file.id] = None

    def _drop(self, id: str) -> None:
        file = self._files.pop(id, None)
        if file is not None:
            for index, at in ((self._by_inode, file.state.inode), (self._by_name, file.name)):
                index.get(at, {}).pop(id, None)
                if not index.get(at):
                    index.pop(at, None)
