"""Files that are read as a whole: each is read once it is complete, and then moved. Readings that are written into it later are
read too."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from sumus.node.archive import Archive
from sumus.node.batch import MOST_BYTES
from sumus.node.file_lines import FileLines, opened
from sumus.node.folder_state import (
    DONE,
    NOTHING_TAKEN,
    PATIENCE_S,
    REFUSED,
    SETTLED_S,
    FolderState,
    SeenFile,
    UnchangedSince,
)
from sumus.node.formats import is_whole
from sumus.node.ledger import FileState, Ledger
from sumus.node.readings import BadReading
from sumus.text import over

MOST_BEHIND = 1000
"""The number of newest files in `done/` that are checked for readings that were appended to them there."""


class WholeFiles:
    """Reads whole files, and moves them to `done/`, or to `refused/` if they cannot be read.

    Args:
        folder: The watched folder.
        lines: Takes readings from a file.
        archive: Moves files.
        ledger: Records how far each file was read.
        since: The time since which each file is unchanged.
        state: The record of waiting and refused files.
    """

    def __init__(
        self,
        folder: Path,
        lines: FileLines,
        archive: Archive,
        ledger: Ledger,
        since: UnchangedSince,
        state: FolderState,
    ) -> None:
        self._folder, self._lines, self._archive, self._ledger = folder, lines, archive, ledger
        self._since, self._state = since, state

    def take(self, states: Mapping[str, FileState], now: float) -> Iterator[SeenFile]:
        """Take and move the files that are complete.

        Args:
            states: The files in the folder, by name.
            now: The time.
        """
        for name, state in sorted(states.items()):
            quiet = self._since.seconds(name, now) or 0.0
            if quiet < SETTLED_S:
                self._state.waiting[name] = f"until it has not changed for {SETTLED_S:g} s"
            elif (seen := self._take(name, state, quiet >= PATIENCE_S)) is not None:
                yield seen

    def _take(self, name: str, state: FileState, anyway: bool) -> SeenFile | None:
        """Take a file if it is complete. If `anyway` is set, take an incomplete file too."""
        path, taken = self._folder / name, NOTHING_TAKEN
        try:
            with opened(path) as descriptor:
                if FileState.of(os.fstat(descriptor)) != state:
                    return None
                if state.size > MOST_BYTES:
                    raise BadReading(f"it has {over(state.size, MOST_BYTES)} are read: split it")
                body = os.pread(descriptor, state.size, 0)
                if len(body) != state.size:
                    return None
                if not (anyway or is_whole(name, body)):
                    self._state.waiting[name] = (
                        f"it does not end like a complete file; after {PATIENCE_S:g} s without a change it is read as it is"
                    )
                    return None
                file = self._lines.known(descriptor, name, state, continuing=False)
                if not (file.offset == state.size and not file.half and body):
                    part = self._lines.part(descriptor, file, state, True, MOST_BYTES)
                    if part is None:
                        return None
                    taken = self._lines.keep(part, whole=True)
        except FileNotFoundError:  # it was renamed meanwhile
            return None
        except (BadReading, OSError) as error:
            why = str(error) if isinstance(error, BadReading) else f"it cannot be read: {error.strerror or error}"
            return self._refuse(name, state, why)
        self._move(path, self._archive.place(DONE, name), state)
        return SeenFile(name, taken)

    def _refuse(self, name: str, state: FileState, why: str) -> SeenFile:
        """Move a file into `refused/` unchanged."""
        self._state.refused += 1
        place = self._archive.place(REFUSED, name)
        self._archive.write_reason(place, why)
        self._move(self._folder / name, place, state)
        for file in self._ledger.of_inode(state.inode):
            self._ledger.forget(file)
        return SeenFile(name, NOTHING_TAKEN, why.partition("\n")[0])

    def _move(self, path: Path, place: Path, state: FileState) -> None:
        if self._archive.move(path, place, state):
            self._since.forget(path.name)


class LateWrites:
    """Reads what programs write into files after the node has moved them: a program may still have such a file open.

    Args:
        folder: The watched folder.
        lines: Takes readings from a file.
        ledger: Records how far each file was read, and which files were moved.
        since: The time since which each file is unchanged.
    """

    def __init__(self, folder: Path, lines: FileLines, ledger: Ledger, since: UnchangedSince) -> None:
        self._folder, self._lines, self._ledger, self._since = folder, lines, ledger, since

    def take(self, now: float) -> Iterator[SeenFile]:
        """Take the readings that were written into the newest files in `done/` since they were read."""
        gone = list[str]()
        places = [place for place in self._ledger.places if place.startswith(f"{DONE}/")]
        for place in places[-MOST_BEHIND:]:
            moved, path = self._ledger.places[place], self._folder / place
            try:
                state = FileState.of(path.lstat())
            except OSError:
                gone.append(place)
                continue
            if state == moved.state:
                continue
            if moved.state.inode not in ("", state.inode):  # another program put it there
                gone.append(place)
                continue
            quiet = self._since.seconds(place, now, state)
            if quiet is None:
                self._since.note(place, state, now)
            elif quiet < PATIENCE_S:
                continue
            final = quiet is not None and quiet >= PATIENCE_S
            yield from self._lines.take(path, place.partition("/")[2], state, final)
            if final or not self._has_more(state):
                self._since.forget(place)
                self._ledger.moved(place, state, moved.at)
        self._ledger.gone(gone)

    def _has_more(self, state: FileState) -> bool:
        """Return whether a file has bytes that have not been read."""
        return any(file.offset < state.size for file in self._ledger.of_inode(state.inode)[:1])
