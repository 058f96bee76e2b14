"""Followed files: they stay where they are, and each line is taken once it is complete.

A file that is renamed, replaced or started again is recognized by its inode and by the bytes that were read from it. It is kept
open, so that its last lines are read even if it leaves the folder.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sumus.node.file_lines import FileLines, begins_as, opened
from sumus.node.folder_state import PATIENCE_S, SETTLED_S, FolderState, SeenFile, UnchangedSince
from sumus.node.formats import grows, is_read
from sumus.node.ledger import File, FileState, Ledger, mark_of

MOST_OPEN = 128
"""The maximum number of files that are kept open."""


class FollowedFiles:
    """Takes lines from files that stay where they are.

    Args:
        folder: The watched folder.
        lines: Takes readings from a file.
        ledger: Records how far each file was read.
        since: The time since which each file is unchanged.
        state: The record of waiting files.
        clock: Returns seconds that never go backwards.
        now: Returns the seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        lines: FileLines,
        ledger: Ledger,
        since: UnchangedSince,
        state: FolderState,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._lines, self._ledger, self._since, self._state = folder, lines, ledger, since, state
        self._clock, self._now = clock, now
        self._first: dict[str, float] = {}
        self._open: dict[str, int] = {}
        moved = {each.state.inode for each in ledger.places.values()}
        self._before = {file.state.inode for file in ledger.files()} - moved - {""}

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def take(self, states: Mapping[str, FileState], now: float) -> Iterator[SeenFile]:
        """Take newly completed lines, both from files in the folder and from files that have left it.

        Args:
            states: The files in the folder, by name.
            now: The time.
        """
        for name, state in sorted(states.items()):
            yield from self._take(name, state, now)
        there = {state.inode for state in states.values()}
        self._ledger.lose(self._before - there - set(self._open))
        self._before = there
        for inode in [inode for inode in self._open if inode not in there]:
            yield from self._take_gone(inode, now)
        self._first = {inode: first for inode, first in self._first.items() if inode in there}

    def _take(self, name: str, state: FileState, now: float) -> Iterator[SeenFile]:
        """Take lines from a file in the folder."""
        if not self._keep_open(name, state):  # another file has taken its name: the next scan finds it
            return
        known = self._ledger.of_inode(state.inode)
        if not known:  # from now on the file is known under every name
            self._ledger.save(File(name, replace(state, size=-1), at=self._now()))
        elif known[0].state == state:
            if grows(known[0].name) and known[0].offset < state.size:
                self._state.waiting[name] = "its last line has no line end"
            return
        first = self._first.setdefault(state.inode, now)
        if now - first < SETTLED_S and self._is_copy(name, state):
            self._state.waiting[name] = f"for {SETTLED_S:g} s, since it begins like another file"
            return
        if grows(known[0].name if known and not is_read(name) else name):
            if (descriptor := self._open.get(state.inode)) is not None:  # even if it was renamed meanwhile
                yield from self._lines.take_open(descriptor, name, state, False)
            else:
                yield from self._lines.take(self._folder / name, name, state, False)
        elif (self._since.seconds(name, now) or 0.0) >= SETTLED_S:
            yield from self._lines.take(self._folder / name, name, state, True)
        else:
            self._state.waiting[name] = f"until it has not changed for {SETTLED_S:g} s"

    def _take_gone(self, inode: str, now: float) -> Iterator[SeenFile]:
        """Take the last lines of a file that has left the folder, for as long as new lines appear."""
        descriptor = self._open[inode]
        state, key = FileState.of(os.fstat(descriptor)), f"/{inode}"
        known = self._ledger.of_inode(inode)
        quiet = self._since.seconds(key, now, state)
        if quiet is None or not known or known[0].state != state:
            self._since.note(key, state, now)
            name = known[0].name if known else ".lost.csv"
            yield from self._lines.take_open(descriptor, name, state, False)
        elif quiet >= PATIENCE_S:
            self._since.forget(key)
            os.close(self._open.pop(inode))
            self._ledger.lose([inode])

    def _keep_open(self, name: str, state: FileState) -> bool:
        """Keep a file open if the limit on open files allows it. Return whether its name still refers to the same file."""
        if state.inode in self._open or not grows(name) or len(self._open) >= MOST_OPEN:
            return True
        try:
            with opened(self._folder / name) as descriptor:
                found = FileState.of(os.fstat(descriptor))
                if found.inode != state.inode:
                    return False
                self._open[state.inode] = os.dup(descriptor)
                self._since.note(f"/{state.inode}", found, self._clock())
        except FileNotFoundError:
            return False
        except OSError:  # the reason is reported when the file is read
            pass
        return True

    def _is_copy(self, name: str, state: FileState) -> bool:
        """Return whether a new file begins with all bytes that were read from another one. Programs that rotate logs copy a file
        before they restart it."""
        with suppress(OSError), opened(self._folder / name) as descriptor:
            known = self._ledger.of_inode(state.inode)[:1]
            if any(file.offset and mark_of(descriptor, file.offset) == file.mark for file in known):
                return False
            others = (file for file in self._ledger.files() if file.state.inode != state.inode)
            return any(begins_as(descriptor, file, state, continuing=True) for file in others)
        return False
