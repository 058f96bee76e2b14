"""The folders for files that were read: `done/` for kept readings, `refused/` for the others, with the reasons.

    archive = Archive(Path("incoming"), ledger, retention)
    archive.move(path, archive.place(DONE, "monday.csv"), state)
    archive.prune()                                        deletes old files, by the same limits as readings

The ledger lists each file that the node put there. The node leaves alone the files that other programs put there, and its own
files if they have changed since.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

from sumus.errors import ExperimentError
from sumus.node.folder_state import DONE, REFUSED
from sumus.node.ledger import FileState, Ledger
from sumus.node.readings import DAY, Retention
from sumus.storage.files import make_private_folder, sync, write_whole
from sumus.text import printable_lines


class Archive:
    """The folders `done/` and `refused/`.

    Args:
        folder: The watched folder, in which both are made if they do not exist.
        ledger: Records which files the node put there.
        retention: The limits, in days and bytes, on the files in each of the two folders.
        now: Returns the seconds since 1970.

    Raises:
        ExperimentError: The folder is not writable.
    """

    def __init__(
        self, folder: Path, ledger: Ledger, retention: Retention, now: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._ledger, self._retention, self._now = folder, ledger, retention, now
        try:
            for each in (DONE, REFUSED):
                make_private_folder(folder / each)
        except OSError as error:
            raise ExperimentError(
                f"{folder} cannot be watched: {error.strerror or error}; give a folder in which you can write"
            ) from error

    def place(self, where: str, name: str) -> Path:
        """Find a free path for a file: its own name, or its name with a number if a file has that name already."""
        stem, dot, suffix = name.partition(".")
        names = itertools.chain([name], (f"{stem}~{number}{dot}{suffix}" for number in itertools.count(2)))
        places = (self._folder / where / each for each in names)
        return next(place for place in places if not place.exists() and not _reason_of(place).exists())

    def write_reason(self, place: Path, why: str) -> None:
        """Write the reason for a refusal next to the refused file."""
        write_whole(_reason_of(place), f"{printable_lines(why)}\n".encode(), private=True)
        self._note(_reason_of(place))

    def write_refused(self, place: Path, body: bytes, why: str) -> None:
        """Write the refused part of a file, with the reasons."""
        self.write_reason(place, why)
        write_whole(place, body, private=True)
        self._note(place)

    def move(self, path: Path, place: Path, state: FileState) -> bool:
        """Move a file whose readings were taken.

        Args:
            path: The file.
            place: The destination, from `place`.
            state: The state of the file when it was read.

        Returns:
            Whether the file was moved. A file that was renamed meanwhile stays where it is, and its readings are not taken again.

        Raises:
            ExperimentError: The file cannot be moved.
        """
        relative = _relative(place)
        self._ledger.moved(relative, state, self._now())
        try:
            path.rename(place)
            sync(self._folder)
            found = FileState.of(place.lstat())
        except FileNotFoundError:
            self._ledger.gone([relative])
            return False
        except OSError as error:
            self._ledger.gone([relative])
            raise ExperimentError(f"{path} cannot be moved to {place}: {error.strerror or error}") from error
        if found.inode != state.inode:  # another file has taken the name: it stays, and is read later
            self._ledger.moved(relative, FileState("", -1, 0), self._now())
        return True

    def prune(self) -> None:
        """Delete the node's files in both folders, oldest first, until the limits on days and bytes are met."""
        for where in (DONE, REFUSED):
            self._prune(where)

    def _prune(self, where: str) -> None:
        ours = list[tuple[str, float, int]]()
        gone = list[str]()
        for place, moved in list(self._ledger.places.items()):
            if place.startswith(f"{where}/"):
                try:
                    state = FileState.of((self._folder / place).lstat())
                except OSError:
                    gone.append(place)
                    continue
                if state == moved.state:
                    ours.append((place, moved.at, state.size))
                elif state.inode != moved.state.inode and moved.state.inode:
                    gone.append(place)
        days, most = self._retention.days, self._retention.bytes
        total = sum(size for _, _, size in ours)
        for place, at, size in sorted(ours, key=lambda each: each[1]):
            old = days is not None and at < self._now() - days * DAY
            if old or (most is not None and total > most):
                (self._folder / place).unlink(missing_ok=True)
                gone.append(place)
                total -= size
        self._ledger.gone(gone)

    def _note(self, path: Path) -> None:
        """Record that the node wrote a file."""
        self._ledger.moved(_relative(path), FileState.of(path.lstat()), self._now())


def _relative(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _reason_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.reason")
