"""Readings from one file: finds its new lines, keeps their readings, and only then records the lines as read.

    lines = FileLines(intake, ledger, archive, since, state)
    file = lines.known(descriptor, name, state, continuing=True)     how far it was read, even under another name
    part = lines.part(descriptor, file, state, False, MOST_TEXT)     the readings of its next lines
    lines.keep(part, whole=False)                                    kept, and only then recorded as read

A reading's key is made from the file, the offset and the line. Lines that are read again after a crash therefore get the same
keys, and their readings are kept only once.
"""

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex

from sumus.node.archive import Archive
from sumus.node.batch import MOST_READINGS, MOST_TEXT, Batch, NothingReadable
from sumus.node.delimited import continues
from sumus.node.folder_state import NOTHING_TAKEN, REFUSED, FolderState, SeenFile, UnchangedSince
from sumus.node.formats import grows, is_read, read_file
from sumus.node.intake import Intake, IntakeResult
from sumus.node.ledger import File, FileState, Ledger, mark_of
from sumus.node.readings import DAY, BadReading
from sumus.text import amount

_MOST_REASONS = 100


@dataclass
class FilePart:
    """Some of a file's readings.

    Attributes:
        file: The file's record before these readings.
        batch: The readings.
        keys: One key for each reading; empty if the file is read as a whole.
        after: The file's record once the readings are kept.
    """

    file: File
    batch: Batch
    keys: list[str]
    after: File


class FileLines:
    """Takes readings from files.

    Args:
        intake: Keeps the readings.
        ledger: Records how far each file was read.
        archive: Stores refused readings.
        since: The time since which each file is unchanged.
        state: The record of waiting and refused files.
        tells_each: Whether to report a file each time that readings are taken from it, and not only the first time.
        now: Returns the seconds since 1970.
    """

    def __init__(
        self,
        intake: Intake,
        ledger: Ledger,
        archive: Archive,
        since: UnchangedSince,
        state: FolderState,
        tells_each: bool = True,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._intake, self._ledger, self._archive = intake, ledger, archive
        self._since, self._state, self._tells_each, self._now = since, state, tells_each, now
        self._said: dict[str, str] = {}

    def take(self, path: Path, name: str, state: FileState, final: bool) -> Iterator[SeenFile]:
        """Take the new readings of a file.

        Args:
            path: The file.
            name: The file's name, for messages and for the ledger.
            state: The file's state.
            final: Whether to take the last line even if it has no line end.
        """
        with suppress(FileNotFoundError):
            try:
                with opened(path) as descriptor:
                    yield from self.take_open(descriptor, name, state, final)
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                yield from self._refuse_once(name, state, f"it cannot be read: {error.strerror or error}")

    def take_open(self, descriptor: int, name: str, state: FileState, final: bool) -> Iterator[SeenFile]:
        """Take the new readings of an open file."""
        found = FileState.of(os.fstat(descriptor))
        if found.inode != state.inode:
            return
        file, total, begun = self.known(descriptor, name, found, continuing=True), list[IntakeResult](), False
        while True:
            try:
                part = self.part(descriptor, file, found, final, MOST_TEXT)
            except NothingReadable:
                break
            except BadReading as bad:
                yield from self._refuse_once(name, found, str(bad))
                return
            if part is None:
                break
            begun = begun or not file.offset
            total.append(self.keep(part, whole=False))
            file = part.after
        self._ledger.save(replace(file, state=found, at=self._now()))
        taken = added(total)
        if taken.refused or (total and (begun or self._tells_each)):
            yield SeenFile(name, taken)

    def known(self, descriptor: int, name: str, state: FileState, continuing: bool) -> File:
        """Find the record of a file.

        Args:
            descriptor: The open file.
            name: The file's name now.
            state: The file's state now.
            continuing: Whether programs may append to the file. If so, a file that begins like a known file counts as that file.
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
            elif continuing and grows(called):  # rewritten: its unchanged lines get the same keys again
                gone = replace(file, state=replace(file.state, inode=""), id=token_hex(8))
                self._ledger.save(gone)  # a copy of the old contents may exist, or appear later
                new = File(called, state, id=file.id) if state.size else File(called, state)
                break
        prior = self._ledger.of_name(new.name, new.id)
        if grows(new.name):
            for file in [prior, *(self._orphans(state) if continuing else ())]:
                if file is not None and begins_as(descriptor, file, state, continuing):
                    return replace(new, offset=file.offset, mark=file.mark, beginning=file.beginning)
            begin = os.pread(descriptor, MOST_TEXT, 0) if prior is not None and prior.beginning.head else b""
            if prior is not None and begin and continues(begin, prior.beginning):
                return replace(new, beginning=prior.beginning)
        return new

    def part(self, descriptor: int, file: File, state: FileState, final: bool, most: int) -> FilePart | None:
        """Read the next bytes of a file.

        Args:
            descriptor: The open file.
            file: The file's record, which says how far it was read.
            state: The file's state.
            final: Whether to take the last line even if it has no line end.
            most: The maximum number of bytes to read.

        Returns:
            The readings; None if no further line is complete.

        Raises:
            BadReading: The file cannot be read, and no part of it was read before.
            NothingReadable: The file has no readings so far.
        """
        name = file.name
        if not grows(name) and (file.offset or not final):
            return None
        length = min(state.size - file.offset, most)
        chunk = os.pread(descriptor, max(length, 0), file.offset)
        if grows(name) and (not final or len(chunk) == most):
            chunk = _lines_of(chunk)
            if not chunk and length == most:
                raise BadReading(f"one of its lines has more than {amount(most)}: split the line")
        if not chunk and (file.offset or not final):
            return None
        head = file.beginning.head
        try:
            batch = read_file(name, head + chunk, file.beginning if head else None)
        except NothingReadable:
            if not file.offset:
                raise
            part = FilePart(file, Batch([], lambda numbers: b""), [], replace(file, offset=file.offset + len(chunk)))
        except BadReading as bad:
            if not file.offset:
                raise
            piece, why = head + chunk, str(bad)
            batch = Batch([BadReading(why)], lambda numbers: piece, lambda number: "its next lines")
            part = FilePart(file, batch, [], replace(file, offset=file.offset + len(chunk)))
        else:
            part = _ended_lines(file, batch, chunk, state, final)
        if part is not None:
            part.after = replace(part.after, mark=mark_of(descriptor, part.after.offset))
            if (
                os.pread(descriptor, len(chunk), file.offset) != chunk
            ):  # restarted meanwhile: the next scan notices that
                return None
        return part

    def keep(self, part: FilePart, whole: bool) -> IntakeResult:
        """Keep readings, put refused ones into `refused/`, and only then record that the lines were read.

        Args:
            part: The readings.
            whole: Whether these are all readings of the file.

        Raises:
            BadReading: These are all readings of the file, and none of them can be kept.
        """
        file, batch = part.file, part.batch
        self._ledger.save(file)
        if file.half:
            self._intake.readings.withdraw([file.half])
        taken = self._intake.take(batch.found, keys=part.keys or [f"{file.id}/{n}" for n in range(len(batch.found))])
        if taken.refused:
            if whole and not file.offset and len(taken.refused) == len(batch.found):
                raise BadReading(_one_reason(batch, taken.refused))
            self._state.refused += len(taken.refused)
            place = self._archive.place(REFUSED, file.name)
            self._archive.write_refused(place, batch.subset(list(taken.refused)), _reasons(batch, taken.refused))
        part.after = replace(part.after, at=self._now())
        self._ledger.save(part.after)
        return taken

    def _refuse_once(self, name: str, state: FileState, why: str) -> Iterator[SeenFile]:
        """Report why a file is not read. The file stays where it is, and is not reported again."""
        self._state.waiting[name] = why
        if self._said.get(state.inode) != why:
            self._said[state.inode] = why
            self._state.refused += 1
            yield SeenFile(name, NOTHING_TAKEN, why)

    def _orphans(self, state: FileState) -> Sequence[File]:
        """List the files that were read in the last day, and then deleted or begun anew by their program. A copy of such a
        file holds no new readings."""
        here = self._since.inodes()
        gone = [
            file for file in self._ledger.files() if file.state.inode not in here and file.state.inode != state.inode
        ]
        return [file for file in gone if file.at > self._now() - DAY]


def begins_as(descriptor: int, file: File, state: FileState, continuing: bool) -> bool:
    """Return whether a file begins with all bytes that were read from another one.

    Args:
        descriptor: The open file.
        file: The record of the other file, which says how far it was read.
        state: The file's state.
        continuing: Whether the file may end after these bytes; if not, it must be longer.
    """
    more = state.size >= file.offset if continuing else state.size > file.offset
    return more and file.offset > len(file.beginning.head) and mark_of(descriptor, file.offset) == file.mark


@contextmanager
def opened(path: Path) -> Generator[int, None, None]:
    """Open a file for reading while a `with` block runs. Refuse symbolic links, and special files that could block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _ended_lines(file: File, batch: Batch, chunk: bytes, state: FileState, final: bool) -> FilePart | None:
    """Make a part from the readings whose lines are complete. Each reading's key combines the file's id,
    the line's offset and a hash of the line."""
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
    return FilePart(file, found, keys, replace(file, state=state, offset=offset, beginning=batch.beginning, half=half))


def added(results: Sequence[IntakeResult]) -> IntakeResult:
    """Combine the results of consecutive parts of a file. The numbering of the readings continues from part to part."""
    kept, labelled, again = (sum(getattr(each, what) for each in results) for what in ("kept", "labelled", "again"))
    refused, before = dict[int, str](), 0
    for each in results:
        refused |= {before + number: why for number, why in each.refused.items()}
        before += each.kept + each.labelled + each.again + len(each.refused)
    return IntakeResult(kept, labelled, again, refused)


def _short_mark(piece: bytes) -> str:
    return blake2b(piece.rstrip(b"\r\n"), digest_size=8).hexdigest()


def ended_well(chunk: bytes) -> bool:
    """Return whether the last line has a line end."""
    return chunk == b"" or chunk.endswith((b"\n", b"\r"))


def _lines_of(chunk: bytes) -> bytes:
    """Cut off the last line if it has no line end, and all lines beyond the limit for one batch."""
    end = chunk.rfind(b"\n") + 1
    if chunk.count(b"\n") > MOST_READINGS // 2:
        end, most = 0, MOST_READINGS // 2
        for _ in range(most):
            end = chunk.index(b"\n", end) + 1
    return chunk[:end]


def _reasons(batch: Batch, refused: dict[int, str]) -> str:
    lines = [f"{batch.where(number)}: {why}" for number, why in list(refused.items())[:_MOST_REASONS]]
    return "\n".join([*lines, *([f"and {len(refused) - len(lines)} more"] if len(refused) > len(lines) else [])])


def _one_reason(batch: Batch, refused: dict[int, str]) -> str:
    """Explain why no reading of a file can be kept: the first reason in the first line, then all reasons."""
    why, count = next(iter(refused.values())), len(refused)
    first = "" if set(refused.values()) == {why} else "the first reason: "
    said = why if count == 1 else f"none of its {count} readings can be kept: {first}{why}"
    return "\n".join([said, _reasons(batch, refused)])
