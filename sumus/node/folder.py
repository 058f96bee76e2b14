"""A watched folder: what is put into it, or written to files in it, is taken, each reading once.

    watched = Watched(Path("incoming"), intake)
    for taken in watched.look():         each second or so
        print(taken.said)

A file is taken when it is whole: when it has not changed for two seconds, and ends as such a file does. Then its readings are
kept, and only then is it moved to `done/`. What cannot be kept goes to `refused/`, those readings alone, with the reasons beside
it: mended, it can be put back. A program that still has the file open may go on: what it writes into the moved file is taken too.

With `follow=True` files stay where they are, and each line is taken once it has its end, also of files that are renamed, replaced
or begun anew.

Names that begin with a dot, or end otherwise than these files do, are left alone. `WatchedFolder.state` says what waits, and why.
"""

import itertools
import os
import stat
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import Any

from sumus.errors import ExperimentError
from sumus.node.batch import MOST_BYTES, MOST_READINGS, MOST_TEXT, Batch, NothingReadable
from sumus.node.delimited import continues
from sumus.node.formats import grows, is_read, is_whole, read_file
from sumus.node.intake import Intake, IntakeResult
from sumus.node.ledger import File, FileState, Ledger, mark_of
from sumus.node.readings import DAY, USUAL, BadReading, Retention
from sumus.storage.files import sync, write_whole
from sumus.text import amount, over, printable, printable_lines

DONE, REFUSED = "done", "refused"
SETTLED_S = 2.0
"""Seconds without a change after which a file that ends well is whole."""
PATIENCE_S = 60.0
"""Seconds after which another one is taken as it is."""
LOOK_S = 1.0
"""Seconds between two looks."""
LET_GO_S = 60.0
"""Seconds between two looks for files that are too old, if nothing came."""
MOST_NAMES = 20
"""Files that a status names."""
MOST_OPEN = 128
"""Followed files that are kept open, so that their last lines are read if they go."""
MOST_BEHIND = 1000
"""Files in `done/`, the last ones, that are looked at for what is written into them there."""
_MOST_REASONS = 100
_NOTHING = IntakeResult(0, 0, 0, {})


@dataclass(frozen=True)
class SeenFile:
    """A file of which something was taken. why: it was refused altogether, else empty."""

    name: str
    taken: IntakeResult
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
        said = ", ".join([*(f"{count} {word}" for word, count in parts if count), *filter(None, [refused])])
        return said or "nothing new"


@dataclass
class FolderState:
    """What is not taken, and why.

    Attributes:
        waiting: files that wait, by name: for what.
        left_alone: files that are not read, by name: why.
        refused: files and lines that were refused since the start.
    """

    waiting: dict[str, str] = field(default_factory=dict[str, str])
    left_alone: dict[str, str] = field(default_factory=dict[str, str])
    refused: int = 0

    def as_json(self) -> dict[str, Any]:
        """For a status: how many there are, and the first ones by name."""
        named: dict[str, Any] = {
            what: {"files": len(names), "first": {printable(name): names[name] for name in sorted(names)[:MOST_NAMES]}}
            for what, names in (("waiting", self.waiting), ("left_alone", self.left_alone))
        }
        return {**named, "refused": self.refused}


class WatchedFolder:
    """A folder, and what is known of the files in it.

    Args:
        folder: that is watched; it is made if it is not there.
        intake: takes the readings.
        retention: also of what the node put into `done/` and `refused/`, each, by when it put it there.
        clock: seconds, which do not go back.
        now: seconds since 1970.
        follow: leave files where they are, and take each line once it has its end.

    Raises:
        ExperimentError: it is no folder in which files can be moved.
    """

    def __init__(
        self,
        folder: Path,
        intake: Intake,
        retention: Retention = USUAL,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        follow: bool = False,
    ) -> None:
        self._folder, self._intake, self._retention, self._clock, self._now = folder, intake, retention, clock, now
        self._follows, self._ledger, self.state = follow, Ledger(intake.readings), FolderState()
        self._since: dict[str, tuple[FileState, float]] = {}
        self._first: dict[str, float] = {}
        self._open: dict[str, int] = {}
        self._said: dict[str, str] = {}
        moved = {each.state.inode for each in self._ledger.places.values()}
        self._before = {file.state.inode for file in self._ledger.files()} - moved - {""}
        self._next_let_go = 0.0
        try:
            for each in (DONE, REFUSED):
                (folder / each).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ExperimentError(
                f"{folder} cannot be watched: {error.strerror or error}; give a folder that is yours"
            ) from error

    def close(self) -> None:
        """Close the files that are followed."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def look(self) -> list[SeenFile]:
        """Take what there is to take. ExperimentError if nothing can be kept or moved now: what was not taken is still there."""
        states, now = self._states(), self._clock()
        self.state.waiting.clear()
        self._settle(states, now)
        seen = list(self._followed(states, now) if self._follows else self._whole(states, now))
        seen += self._behind(now)
        if seen or now >= self._next_let_go:
            self._next_let_go = now + LET_GO_S
            for each in (DONE, REFUSED):
                self._let_go(each)
        return seen

    # ── what is there ────────────────────────────────────────────────────────────────────────────────────────────────

    def _states(self) -> dict[str, FileState]:
        """The files that may be readings."""
        found, left = dict[str, FileState](), dict[str, str]()
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in (DONE, REFUSED):
                        continue
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if not stat.S_ISREG(status.st_mode):
                            left[entry.name] = "it is no plain file"
                        elif is_read(entry.name) or (
                            self._follows and self._ledger.of_inode(FileState.of(status).inode)
                        ):
                            found[entry.name] = FileState.of(status)
                        else:
                            left[entry.name] = "files with such an ending are not read"
        except OSError as error:
            raise ExperimentError(f"{self._folder} cannot be watched: {error.strerror or error}") from error
        self.state.left_alone = left
        return found

    def _settle(self, states: dict[str, FileState], now: float) -> None:
        """Note since when each file is as it is."""
        since = {
            name: before if (before := self._since.get(name)) and before[0] == state else (state, now)
            for name, state in states.items()
        }
        self._since = since | {place: at for place, at in self._since.items() if "/" in place}

    # ── whole files ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _whole(self, states: dict[str, FileState], now: float) -> Iterator[SeenFile]:
        """Take and move the files that have come to their end."""
        for name, state in sorted(states.items()):
            quiet = now - self._since[name][1]
            if quiet < SETTLED_S:
                self.state.waiting[name] = f"until it has not changed for {SETTLED_S:g} s"
            elif (one := self._take_whole(name, state, quiet >= PATIENCE_S)) is not None:
                yield one

    def _take_whole(self, name: str, state: FileState, anyway: bool) -> SeenFile | None:
        """Take a file, unless it is not whole yet."""
        path, taken = self._folder / name, _NOTHING
        try:
            with _opened(path) as descriptor:
                if FileState.of(os.fstat(descriptor)) != state:
                    return None
                if state.size > MOST_BYTES:
                    raise BadReading(f"it has {over(state.size, MOST_BYTES)} are read: split it")
                body = os.pread(descriptor, state.size, 0)
                if len(body) != state.size:
                    return None
                if not (anyway or is_whole(name, body)):
                    self.state.waiting[name] = (
                        f"it does not end as such a file does; after {PATIENCE_S:g} s it is taken as it is"
                    )
                    return None
                file = self._known(descriptor, name, state, continuing=False)
                if not (file.offset == state.size and not file.half and body):
                    part = self._part(descriptor, file, state, True, MOST_BYTES)
                    if part is None:
                        return None
                    taken = self._keep(part, whole=True)
        except FileNotFoundError:  # it was renamed since
            return None
        except (BadReading, OSError) as error:
            why = str(error) if isinstance(error, BadReading) else f"it cannot be read: {error.strerror or error}"
            return self._refuse_whole(name, state, why)
        self._move(path, self._place(DONE, name), state)
        return SeenFile(name, taken)

    def _refuse_whole(self, name: str, state: FileState, why: str) -> SeenFile:
        """Put a file into `refused/` as it is."""
        self.state.refused += 1
        place = self._place(REFUSED, name)
        self._give_reason(place, why)
        self._move(self._folder / name, place, state)
        for file in self._ledger.of_inode(state.inode):
            self._ledger.forget(file)
        return SeenFile(name, _NOTHING, why.partition("\n")[0])

    def _behind(self, now: float) -> Iterator[SeenFile]:
        """Take what was written into files after they were moved, by programs that had them open."""
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
            if moved.state.inode not in ("", state.inode):  # it is somebody else's
                gone.append(place)
                continue
            before = self._since.get(place)
            if before is None or before[0] != state:
                self._since[place] = before = (state, now)
            elif now - before[1] < PATIENCE_S:
                continue
            final = now - before[1] >= PATIENCE_S
            yield from self._take_lines(path, place.partition("/")[2], state, final)
            if final or not self._left_over(state):
                self._since.pop(place, None)
                self._ledger.moved(place, state, moved.at)
        self._ledger.gone(gone)

    def _left_over(self, state: FileState) -> bool:
        """Whether a file has bytes that were not read."""
        return any(file.offset < state.size for file in self._ledger.of_inode(state.inode)[:1])

    # ── files that are followed ──────────────────────────────────────────────────────────────────────────────────────

    def _followed(self, states: dict[str, FileState], now: float) -> Iterator[SeenFile]:
        """Take the lines that have come to their end, of files that are there, and of those that have gone since."""
        for name, state in sorted(states.items()):
            if not self._keep_open(name, state):  # another one has its name since: the next look finds it
                continue
            known = self._ledger.of_inode(state.inode)
            if not known:  # from now on it is known under every name
                self._ledger.save(File(name, replace(state, size=-1), at=self._now()))
            elif known[0].state == state:
                if grows(known[0].name) and known[0].offset < state.size:
                    self.state.waiting[name] = "its last line has no end"
                continue
            first = self._first.setdefault(state.inode, now)
            if now - first < SETTLED_S and self._is_copy(name, state):
                self.state.waiting[name] = f"for {SETTLED_S:g} s, since it begins as another one does"
                continue
            if grows(known[0].name if known and not is_read(name) else name):
                if (descriptor := self._open.get(state.inode)) is not None:  # also if it was renamed since
                    yield from self._take_open(descriptor, name, state, False)
                else:
                    yield from self._take_lines(self._folder / name, name, state, False)
            elif now - self._since[name][1] >= SETTLED_S:
                yield from self._take_lines(self._folder / name, name, state, True)
            else:
                self.state.waiting[name] = f"until it has not changed for {SETTLED_S:g} s"
        there = {state.inode for state in states.values()}
        self._ledger.lose(self._before - there - set(self._open))
        self._before = there
        for inode in [inode for inode in self._open if inode not in there]:
            yield from self._take_gone(inode, now)
        self._first = {inode: first for inode, first in self._first.items() if inode in there}

    def _is_copy(self, name: str, state: FileState) -> bool:
        """Whether a new file begins with all that was read of another one, as a copy does before the other one is begun anew."""
        with suppress(OSError), _opened(self._folder / name) as descriptor:
            known = self._ledger.of_inode(state.inode)[:1]
            if any(file.offset and mark_of(descriptor, file.offset) == file.mark for file in known):
                return False
            others = (file for file in self._ledger.files() if file.state.inode != state.inode)
            return any(self._begins_as(descriptor, file, state, continuing=True) for file in others)
        return False

    def _keep_open(self, name: str, state: FileState) -> bool:
        """Keep a file open, if there is room for one more; whether it is still the one under its name."""
        if state.inode in self._open or not grows(name) or len(self._open) >= MOST_OPEN:
            return True
        try:
            with _opened(self._folder / name) as descriptor:
                found = FileState.of(os.fstat(descriptor))
                if found.inode != state.inode:
                    return False
                self._open[state.inode] = os.dup(descriptor)
                self._since[f"/{state.inode}"] = (found, self._clock())
        except FileNotFoundError:
            return False
        except OSError:  # it is said where the file is read
            pass
        return True

    def _take_gone(self, inode: str, now: float) -> Iterator[SeenFile]:
        """Take the last lines of a file that is not in the folder any more, for as long as they come."""
        descriptor = self._open[inode]
        state, place = FileState.of(os.fstat(descriptor)), f"/{inode}"
        known = self._ledger.of_inode(inode)
        before = self._since.get(place)
        if before is None or before[0] != state or not known or known[0].state != state:
            self._since[place] = (state, now)
            name = known[0].name if known else ".lost.csv"
            yield from self._take_open(descriptor, name, state, False)
        elif now - before[1] >= PATIENCE_S:
            self._since.pop(place, None)
            os.close(self._open.pop(inode))
            self._ledger.lose([inode])

    # ── lines ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_lines(self, path: Path, name: str, state: FileState, final: bool) -> Iterator[SeenFile]:
        """Take what a file has more than was read of it. final: it is taken as it is, also without an end."""
        with suppress(FileNotFoundError):
            try:
                with _opened(path) as descriptor:
                    yield from self._take_open(descriptor, name, state, final)
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                yield from self._say_once(name, state, f"it cannot be read: {error.strerror or error}")

    def _take_open(self, descriptor: int, name: str, state: FileState, final: bool) -> Iterator[SeenFile]:
        found = FileState.of(os.fstat(descriptor))
        if found.inode != state.inode:
            return
        file, total, begun = self._known(descriptor, name, found, continuing=True), list[IntakeResult](), False
        while True:
            try:
                part = self._part(descriptor, file, found, final, MOST_TEXT)
            except NothingReadable:
                break
            except BadReading as bad:
                yield from self._say_once(name, found, str(bad))
                return
            if part is None:
                break
            begun = begun or not file.offset
            total.append(self._keep(part, whole=False))
            file = part.after
        self._ledger.save(replace(file, state=found, at=self._now()))
        kept, labelled, again = (sum(getattr(each, what) for each in total) for what in ("kept", "labelled", "again"))
        taken = IntakeResult(
            kept,
            labelled,
            again,
            {len(total) + number: why for each in total for number, why in each.refused.items()},
        )
        if taken.refused or (total and (begun or not self._follows)):
            yield SeenFile(name, taken)

    def _say_once(self, name: str, state: FileState, why: str) -> Iterator[SeenFile]:
        """Say why a file is not read, which stays where it is."""
        self.state.waiting[name] = why
        if self._said.get(state.inode) != why:
            self._said[state.inode] = why
            self.state.refused += 1
            yield SeenFile(name, _NOTHING, why)

    def _known(self, descriptor: int, name: str, state: FileState, continuing: bool) -> File:
        """What is known of a file.

        Args:
            descriptor: of the file.
            name: of the file now.
            state: of the file now.
            continuing: it is a file that programs write on: what it has in common with what was read is the same.
        """
        new = File(name, state)
        for file in self._ledger.of_inode(state.inode):
            called = name if is_read(name) else file.name
            if not file.offset and not file.beginning.head:
                new = replace(file, name=called, state=state)
                break
            if state.size >= file.offset and mark_of(descriptor, file.offset) == file.mark:
                rewritten = state.size == file.state.size and state.changed != file.state.changed
                if continuing or not rewritten:
                    return replace(file, name=called)
            elif continuing and grows(called):  # its lines that are as they were have the same keys
                gone = replace(file, state=replace(file.state, inode=""), id=token_hex(8))
                self._ledger.save(gone)  # its copy may be here, or come
                new = File(called, state, id=file.id) if state.size else File(called, state)
                break
        prior = self._ledger.of_name(new.name, new.id)
        if grows(new.name):
            for file in [prior, *(self._orphans(state) if continuing else ())]:
                if file is not None and self._begins_as(descriptor, file, state, continuing):
                    return replace(new, offset=file.offset, mark=file.mark, beginning=file.beginning)
            begin = os.pread(descriptor, MOST_TEXT, 0) if prior is not None and prior.beginning.head else b""
            if prior is not None and begin and continues(begin, prior.beginning):
                return replace(new, beginning=prior.beginning)
        return new

    def _begins_as(self, descriptor: int, file: File, state: FileState, continuing: bool) -> bool:
        """Whether a file begins with all that was read of another one, and has more."""
        more = state.size >= file.offset if continuing else state.size > file.offset
        return more and file.offset > len(file.beginning.head) and mark_of(descriptor, file.offset) == file.mark

    def _orphans(self, state: FileState) -> Sequence[File]:
        """Files that were read, and are gone or begun anew: what was copied before that is not new."""
        here = {each.inode for each, _ in self._since.values()}
        gone = [
            file for file in self._ledger.files() if file.state.inode not in here and file.state.inode != state.inode
        ]
        return [file for file in gone if file.at > self._now() - DAY]

    def _part(self, descriptor: int, file: File, state: FileState, final: bool, most: int) -> "_Part | None":
        """The readings of the next bytes of a file; None if no line has come to its end."""
        name = file.name
        if not grows(name) and (file.offset or not final):
            return None
        length = min(state.size - file.offset, most)
        chunk = os.pread(descriptor, max(length, 0), file.offset)
        if grows(name) and (not final or len(chunk) == most):
            chunk = _lines_of(chunk)
            if not chunk and length == most:
                raise BadReading(f"it has a line of more than {amount(most)}")
        if not chunk and (file.offset or not final):
            return None
        head = file.beginning.head
        try:
            batch = read_file(name, head + chunk, file.beginning if head else None)
        except NothingReadable:
            if not file.offset:
                raise
            part = _Part(file, Batch([], lambda numbers: b""), [], replace(file, offset=file.offset + len(chunk)))
        except BadReading as bad:
            if not file.offset:
                raise
            piece, why = head + chunk, str(bad)
            batch = Batch([BadReading(why)], lambda numbers: piece, lambda number: "its next lines")
            part = _Part(file, batch, [], replace(file, offset=file.offset + len(chunk)))
        else:
            part = _whole_part(file, batch, chunk, state, final)
        if part is not None:
            part.after = replace(part.after, mark=mark_of(descriptor, part.after.offset))
            if os.pread(descriptor, len(chunk), file.offset) != chunk:  # begun anew since: the next look finds it so
                return None
        return part

    def _keep(self, part: "_Part", whole: bool) -> IntakeResult:
        """Keep readings, put what is refused into `refused/`, and only then remember that they were read.

        Raises:
            BadReading: whole, and nothing of the file can be kept.
        """
        file, batch = part.file, part.batch
        self._ledger.save(file)
        if file.half:
            self._intake.readings.withdraw([file.half])
        taken = self._intake.take(batch.found, keys=part.keys or [f"{file.id}/{n}" for n in range(len(batch.found))])
        if taken.refused:
            if whole and not file.offset and len(taken.refused) == len(batch.found):
                raise BadReading(_one_reason(batch, taken.refused))
            self.state.refused += len(taken.refused)
            place = self._place(REFUSED, file.name)
            self._give_reason(place, _reasons(batch, taken.refused))
            write_whole(place, batch.subset(list(taken.refused)), private=True)
            self._note(place)
        part.after = replace(part.after, at=self._now())
        self._ledger.save(part.after)
        return taken

    # ── where files go ───────────────────────────────────────────────────────────────────────────────────────────────

    def _place(self, where: str, name: str) -> Path:
        """Where a file goes: under its name, or one with a number where that is taken."""
        stem, dot, suffix = name.partition(".")
        names = itertools.chain([name], (f"{stem}~{number}{dot}{suffix}" for number in itertools.count(2)))
        places = (self._folder / where / each for each in names)
        return next(place for place in places if not place.exists() and not _reason_of(place).exists())

    def _give_reason(self, place: Path, why: str) -> None:
        write_whole(_reason_of(place), f"{printable_lines(why)}\n".encode(), private=True)
        self._note(_reason_of(place))

    def _note(self, path: Path) -> None:
        """Remember that the node wrote a file."""
        self._ledger.moved(self._relative(path), FileState.of(path.lstat()), self._now())

    def _relative(self, path: Path) -> str:
        return f"{path.parent.name}/{path.name}"

    def _move(self, path: Path, place: Path, state: FileState) -> None:
        """Move a file that was read, and see whether it is the one that was read."""
        relative = self._relative(place)
        self._ledger.moved(relative, state, self._now())
        try:
            path.rename(place)
            sync(self._folder)
            found = FileState.of(place.lstat())
        except FileNotFoundError:  # it was renamed since: under its new name nothing in it is new
            self._ledger.gone([relative])
            return
        except OSError as error:
            self._ledger.gone([relative])
            raise ExperimentError(f"{path} cannot be moved to {place}: {error.strerror or error}") from error
        if found.inode != state.inode:  # another one took its name: it is read where it lies
            self._ledger.moved(relative, FileState("", -1, 0), self._now())
        self._since.pop(path.name, None)

    def _let_go(self, where: str) -> None:
        """Delete the files that the node put into a folder, the first ones first, beyond what is kept of readings. What somebody
        else put there, or has changed since, is left alone."""
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


@dataclass
class _Part:
    """Some readings of a file. keys: of each.  after: what is known of the file once they are kept."""

    file: File
    batch: Batch
    keys: list[str]
    after: File


def _whole_part(file: File, batch: Batch, chunk: bytes, state: FileState, final: bool) -> _Part | None:
    """The readings whose lines have come to their end, with a key each: of the file, the place in it and what stands there."""
    shift, end = file.offset - len(file.beginning.head), file.offset + len(chunk)
    count, half, offset = len(batch.found), "", end
    if batch.open is not None and not final:
        count, offset = sum(begin < batch.open for begin in batch.begins), batch.open + shift
        if offset <= file.offset:
            return None
    pieces = zip(batch.begins[:count], batch.pieces, strict=False)
    keys = [f"{file.id}/{begin + shift}/{_short_mark(piece)}" for begin, piece in pieces]
    if final and keys and not ended_well(chunk):
        offset, last = batch.begins[-1] + shift, batch.found[-1]
        own = None if isinstance(last, BadReading) else last.get("key")
        half = own if isinstance(own, str) else keys[-1]
    found = replace(batch, found=batch.found[:count])
    return _Part(file, found, keys, replace(file, state=state, offset=offset, beginning=batch.beginning, half=half))


def _short_mark(piece: bytes) -> str:
    return blake2b(piece.rstrip(b"\r\n"), digest_size=8).hexdigest()


def ended_well(chunk: bytes) -> bool:
    """Whether the last line has its end."""
    return chunk == b"" or chunk.endswith((b"\n", b"\r"))


def _lines_of(chunk: bytes) -> bytes:
    """The lines that have their end, no more than are read at once."""
    end = chunk.rfind(b"\n") + 1
    if chunk.count(b"\n") > MOST_READINGS // 2:
        end, most = 0, MOST_READINGS // 2
        for _ in range(most):
            end = chunk.index(b"\n", end) + 1
    return chunk[:end]


def _reason_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.reason")


def _reasons(batch: Batch, refused: dict[int, str]) -> str:
    lines = [f"{batch.where(number)}: {why}" for number, why in list(refused.items())[:_MOST_REASONS]]
    return "\n".join([*lines, *([f"and {len(refused) - len(lines)} more"] if len(refused) > len(lines) else [])])


def _one_reason(batch: Batch, refused: dict[int, str]) -> str:
    """Why nothing of a file can be kept: the first reason, in the first line, and then all of them."""
    why, count = next(iter(refused.values())), len(refused)
    others = "" if set(refused.values()) == {why} else " is the first reason"
    said = why if count == 1 else f"none of its {count} readings can be kept: {why}{others}"
    return "\n".join([said, _reasons(batch, refused)])


@contextmanager
def _opened(path: Path) -> Generator[int, None, None]:
    """A file to read from; never another one by a link, and nothing that blocks."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
