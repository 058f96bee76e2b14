"""A watched folder: files of readings that are put into it are taken, once each.

    watched = Watched(Path("incoming"), intake)
    for taken in watched.look():         each second or so
        print(taken.said)

A file is taken when it is whole: when it has not changed for two seconds, and ends as such a file does. Then its readings are
kept, and only then is it moved to `done/`. What cannot be kept goes to `refused/`, those readings alone, with the reasons beside
it: mended, it can be put back. Names that begin with a dot, or end otherwise than these files do, are left alone.
"""

import itertools
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

from sumus.errors import ExperimentError
from sumus.node.formats import MOST_BYTES, SUFFIXES, is_whole, read_file
from sumus.node.intake import Intake, Taken
from sumus.node.readings import DAY, USUAL, BadReading, Retention
from sumus.storage.files import sync, write_whole
from sumus.text import printable, printable_lines

DONE, REFUSED = "done", "refused"
SETTLED_S = 2.0
"""Seconds without a change after which a file that ends well is whole."""
PATIENCE_S = 60.0
"""Seconds after which another one is taken as it is."""
LOOK_S = 1.0
"""Seconds between two looks."""
_MOST_REASONS = 100
_State: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Seen:
    """A file that was taken. why: it was refused altogether, else empty."""

    name: str
    taken: Taken
    why: str = ""

    @property
    def said(self) -> str:
        """In a line, whatever the file is called."""
        return printable(f"{self.name}: {self._became()}")

    def _became(self) -> str:
        if self.why:
            return f"refused, {self.why}"
        parts = (("kept", self.taken.kept), ("labelled", self.taken.labelled), ("here already", self.taken.again))
        refused = f"{len(self.taken.refused)} refused, see {REFUSED}/" if self.taken.refused else ""
        return ", ".join([*(f"{count} {word}" for word, count in parts if count), *filter(None, [refused])])


class Watched:
    """A folder, and what is known of the files in it. retention: also of `done/` and `refused/`, each.  clock: seconds, which
    do not go back.  now: seconds since 1970.

    ExperimentError where it is no folder in which files can be moved.
    """

    def __init__(
        self,
        folder: Path,
        intake: Intake,
        retention: Retention = USUAL,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._intake, self._retention, self._clock, self._now = folder, intake, retention, clock, now
        self._since: dict[str, tuple[_State, float]] = {}
        try:
            for each in (DONE, REFUSED):
                (folder / each).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ExperimentError(
                f"{folder} cannot be watched: {error.strerror or error}; give a folder that is yours"
            ) from error

    def look(self) -> list[Seen]:
        """Take what is whole. ExperimentError where nothing can be kept or moved now: what was not taken is still there."""
        seen, now = list[Seen](), self._clock()
        states = self._states()
        self._since = {
            name: before if (before := self._since.get(name)) and before[0] == state else (state, now)
            for name, state in states.items()
        }
        for name, (state, since) in sorted(self._since.items()):
            quiet = now - since
            if quiet >= SETTLED_S and (one := self._look_at(name, state, quiet >= PATIENCE_S)) is not None:
                seen.append(one)
        if seen:
            for each in (DONE, REFUSED):
                self._let_go(self._folder / each)
        return seen

    def _states(self) -> dict[str, _State]:
        """Size, time of the last change and inode of the files that may be readings."""
        found: dict[str, _State] = {}
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if not entry.name.startswith(".") and entry.name.lower().endswith(SUFFIXES):
                        with suppress(FileNotFoundError):
                            state = entry.stat(follow_symlinks=False)
                            if stat.S_ISREG(state.st_mode):
                                found[entry.name] = (state.st_size, state.st_mtime_ns, state.st_ino)
        except OSError as error:
            raise ExperimentError(f"{self._folder} cannot be watched: {error.strerror or error}") from error
        return found

    def _look_at(self, name: str, state: _State, anyway: bool) -> Seen | None:
        """Take a file, unless it is not whole yet."""
        path = self._folder / name
        try:
            body = _read(path)
            if len(body) != state[0] or not (anyway or is_whole(name, body)):
                return None
            batch = read_file(name, body)
        except (BadReading, OSError) as error:
            why = str(error) if isinstance(error, BadReading) else f"it cannot be read: {error.strerror or error}"
            place = self._place(REFUSED, name)
            self._give_reason(place, why)
            self._move(path, place)
            return Seen(name, Taken(0, 0, 0, {}), why)
        # after a crash the same file has the same key, and another one with the same content has not
        key = sha256(repr((name, state[1:])).encode() + body).hexdigest()
        taken = self._intake.take(batch.found, key)
        if taken.refused:
            place = self._place(REFUSED, name)
            self._give_reason(place, _reasons(taken.refused))
            write_whole(place, batch.subset(list(taken.refused)), private=True)
        self._move(path, self._place(DONE, name))
        return Seen(name, taken)

    def _place(self, where: str, name: str) -> Path:
        """Where a file goes: under its name, or one with a number where that is taken."""
        stem, dot, suffix = name.partition(".")
        names = itertools.chain([name], (f"{stem}~{number}{dot}{suffix}" for number in itertools.count(2)))
        places = (self._folder / where / each for each in names)
        return next(place for place in places if not place.exists() and not _reason_of(place).exists())

    def _give_reason(self, place: Path, why: str) -> None:
        write_whole(_reason_of(place), f"{printable_lines(why)}\n".encode(), private=True)

    def _move(self, path: Path, place: Path) -> None:
        try:
            path.rename(place)
            sync(self._folder)
        except OSError as error:
            raise ExperimentError(f"{path} cannot be moved to {place}: {error.strerror or error}") from error
        self._since.pop(path.name, None)

    def _let_go(self, folder: Path) -> None:
        """Delete the oldest files of a folder, beyond what is kept of readings."""
        files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.iterdir() if path.is_file())
        days, most = self._retention.days, self._retention.bytes
        total = sum(size for _, size, _ in files)
        for changed, size, path in files:
            old = days is not None and changed < self._now() - days * DAY
            if old or (most is not None and total > most):
                path.unlink(missing_ok=True)
                total -= size


def _reason_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.reason")


def _reasons(refused: dict[int, str]) -> str:
    lines = [f"reading {number}: {why}" for number, why in list(refused.items())[:_MOST_REASONS]]
    return "\n".join([*lines, *([f"and {len(refused) - len(lines)} more"] if len(refused) > len(lines) else [])])


def _read(path: Path) -> bytes:
    """A file's bytes, up to the most that is read; never another file's, by a link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if (size := os.fstat(descriptor).st_size) > MOST_BYTES:
            raise BadReading(f"it has {size} bytes, and at most {MOST_BYTES} are read: split it")
        return file.read()
