"""Sums that survive a crash: what is counted and what is added are one transaction.

    sums = SealedSums(coordinator, hop, ring, folder)
    sums.report("alice/1", update, now)          checked, and staged in memory: nothing is promised
    for action in sums.commit(now): …            now who is counted may be told so
    total = sums.total(7)                        everyone's, also of processes that are gone
    sums.destroy(7)                              its key, then its files

Each process adds to a sum of its own, its *shard*, and writes it anew with every commit, sealed, under a new name; a row points
to it. So no update is ever on a disk, a kill at any moment leaves the last commit, and the sums of all processes merge to the
same bits.
"""

import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sumus.aggregate import Aggregate, RunningSum, Update
from sumus.errors import ExperimentError
from sumus.first_hop import FirstHop
from sumus.protocol.round import Action, Session, Stage
from sumus.server.coordinator import Coordinator
from sumus.storage.files import sync
from sumus.storage.keyring import KeyRing, new_key, seal, unseal
from sumus.storage.store import Rows, Shard
from sumus.wire.tensors import decode_aggregate, encode_aggregate


class SealedSums:
    """The sums of a run's rounds, as one process adds to them.

    hop: of the plan.  ring: wraps each round's key.  folder: for sealed sums, the same for all processes.
    """

    def __init__(self, coordinator: Coordinator, hop: FirstHop, ring: KeyRing, folder: Path) -> None:
        self._coordinator, self._hop, self._ring, self._folder = coordinator, hop, ring, folder
        self._held: dict[str, Update] = {}
        self._begin_anew()

    def report(self, session: str, update: Update, now: float) -> tuple[Action, ...]:
        """Take in an update that has arrived whole: if it is staged, it is kept for the next commit.

        Raises ParticipantError for one that cannot be counted, and then nothing has changed.
        """
        self._hop.check(update)
        actions = self._coordinator.report(session, now)
        if any(isinstance(action, Stage) for action in actions):
            self._held[session] = update
        return actions

    def commit(self, now: float) -> tuple[Action, ...]:
        """Add what is staged to the sum, and write both down. If it raises, nothing was acknowledged, and all is still staged."""
        written: list[tuple[Shard, RunningSum]] = []
        waiting = list(self._coordinator.staged)
        try:
            actions = self._coordinator.commit(now, lambda rows, counted: written.extend(self._add(rows, counted)))
        except BaseException:
            self._begin_anew()  # perhaps it was committed all the same: what there is stays as it is
            raise
        for shard, running in written:
            before = self._shards.get(shard.round)
            self._shards[shard.round] = shard, running
            if before is not None:
                self._remove(before[0].file)
        for session in waiting:
            if session not in self._coordinator.staged:
                self._held.pop(session, None)
        return actions

    def total(self, number: int) -> Aggregate:
        """A round's sum over all processes' shards. ExperimentError where it is not all there."""
        with self._coordinator.store.transaction() as rows:
            row, shards, wrapped = rows.round(number), rows.shards(number), rows.key(number)
        total = RunningSum()
        for shard in shards:
            if wrapped is None:
                raise ExperimentError(f"the key of round {number} is gone, and its sum with it: abandon the round")
            key = self._ring.unwrap(wrapped, _key_of(number))
            total.add(decode_aggregate(unseal(key, self._read(shard.file), _content(shard))))
        counted = 0 if row is None else row.counted
        if int(total.total.count) != counted:
            raise ExperimentError(
                f"the sum of round {number} is of {int(total.total.count)} reports, and {counted} are counted: rows and files "
                "are not of one time; put back both from the same backup, or abandon the round"
            )
        return total.total

    def destroy(self, number: int) -> None:
        """Forget a round's key, and remove its sums: what of them may be left anywhere is unreadable."""
        with self._coordinator.store.transaction() as rows:
            rows.put_key(number, None)
            shards = rows.shards(number)
        self._shards.pop(number, None)
        for shard in shards:
            self._remove(shard.file)

    def sweep(self, older_than: float = 3600.0) -> list[str]:
        """Remove files that no row points to, as crashes leave them; of younger ones, in seconds, a commit may be on its way."""
        with self._coordinator.store.transaction() as rows:
            wanted = {shard.file for row in rows.rounds() for shard in rows.shards(row.number)}
        young = time.time() - older_than
        left = [path for path in self._folder.glob("*.sum") if path.name not in wanted and path.stat().st_mtime < young]
        for path in left:
            self._remove(path.name)
        return sorted(path.name for path in left)

    def _begin_anew(self) -> None:
        """Be a shard that nobody has added to."""
        self._name = uuid.uuid4().hex
        self._shards: dict[int, tuple[Shard, RunningSum]] = {}

    def _add(self, rows: Rows, counted: Sequence[Session]) -> list[tuple[Shard, RunningSum]]:
        """Within the transaction: the new sums, in files, and rows that point to them."""
        written: list[tuple[Shard, RunningSum]] = []
        for number in sorted({session.sum for session in counted if session.sum is not None}):
            before, running = self._shards.get(number, (Shard(number, self._name, 0, 0, ""), RunningSum()))
            after = RunningSum()
            after.add(running.total)
            for session in counted:
                if session.sum == number:
                    self._hop.count_in(self._held[session.id], after, session.staleness)
            seq, count = before.seq + 1, int(after.total.count)
            shard = Shard(number, self._name, seq, count, f"{number}.{self._name}.{seq}.sum")
            self._write(shard.file, seal(self._key(rows, number), encode_aggregate(after.total), _content(shard)))
            rows.put_shard(shard)
            written.append((shard, after))
        return written

    def _key(self, rows: Rows, number: int) -> bytes:
        """A round's key, made by whoever is the first to need it."""
        if (wrapped := rows.key(number)) is not None:
            return self._ring.unwrap(wrapped, _key_of(number))
        key = new_key()
        rows.put_key(number, self._ring.wrap(key, _key_of(number)))
        return key

    def _write(self, name: str, body: bytes) -> None:
        """A new file, on the disk with its name when this returns."""
        path = self._folder / name
        try:
            with open(path, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            sync(self._folder)
        except OSError as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise ExperimentError(
                f"a sum cannot be written to {path}: {error.strerror or error}; see to the disk"
            ) from error

    def _read(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise ExperimentError(f"a sum cannot be read: {error}; put the file back, or abandon the round") from error

    def _remove(self, name: str) -> None:
        with suppress(OSError):  # it is sealed, and nothing points to it
            (self._folder / name).unlink()


def _key_of(number: int) -> str:
    return f"the key of round {number}"


def _content(shard: Shard) -> str:
    return f"sum {shard.round}, shard {shard.name}, commit {shard.seq}, {shard.count} reports"
