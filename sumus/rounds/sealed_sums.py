"""Sums that survive a crash: reports are counted and added to their sum in the same transaction.

    written = sums.add(rows, committed)          within the transaction of a commit
    sums.keep(written)                           once the transaction is durable
    total = sums.total(7)                        the sum over all processes, including those that have ended
    sums.destroy(7)                              destroys its key, then its blobs

Each process adds to a sum of its own, a *shard* of the round's sum. With every commit the process writes its whole shard again,
sealed, as a new blob, and a row points to the blob. So a single update is never on a disk, the last commit of a killed process
is never lost, and the merged shards give the same bits with any number of processes.

Reports are added in place to a shard in memory. If a commit fails, this memory no longer agrees with the rows. Then the process
drops it, leaves the last written blob as it is, and begins a new shard.
"""

import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from sumus.aggregate import Aggregate, RunningSum
from sumus.errors import ExperimentError
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.stages import CommittedReport
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing, new_key, seal_pieces, unseal
from sumus.storage.store import Rows, Shard
from sumus.text import many
from sumus.wire.tensors import aggregate_pieces, decode_aggregate


class WrittenSum(NamedTuple):
    """A sum that a commit has written.

    Attributes:
        shard: The row of the sum.
        running: The sum in memory; None if later commits do not add to this sum.
    """

    shard: Shard
    running: RunningSum | None


class SealedSums:
    """The sums of a run's rounds, as one process adds to them.

    Attributes:
        spools: Whether each report is spooled: sealed separately as a sum of one report, and added when its round is over.
            Aggregators that need each update require this.
    """

    def __init__(self, coordinator: Coordinator, ring: KeyRing, blobs: Blobs, spools: bool = False) -> None:
        """Keep the sums of a run.

        Args:
            coordinator: The rounds of the run.
            ring: Wraps the key of each round.
            blobs: The store of this run's sealed sums, shared by all its processes and used by no other run.
            spools: See the class.
        """
        self._coordinator, self._ring, self._blobs, self.spools = coordinator, ring, blobs, spools
        self._shards: dict[int, tuple[Shard, RunningSum]] = {}

    def add(self, rows: Rows, counted: Sequence[CommittedReport]) -> list[WrittenSum]:
        """Add reports to their sums, within a transaction: write the new sums as blobs, and rows that point to them.

        If this raises, or the transaction fails, call `begin_anew`: the shards in memory no longer agree with their rows.

        Returns:
            The sums, to be passed to `keep`.
        """
        written: list[WrittenSum] = []
        for report in counted:
            if report.apart:
                alone = RunningSum()
                report.content.count_in(alone, report.staleness)
                shard = self._seal(rows, Shard(report.sum, report.apart, 1, 1, ""), alone.total)
                written.append(WrittenSum(shard, None))
        for number in sorted({report.sum for report in counted if not report.apart}):
            before, running = self._shards.get(number) or (Shard(number, uuid.uuid4().hex, 0, 0, ""), RunningSum())
            for report in counted:
                if report.sum == number and not report.apart:
                    report.content.count_in(running, report.staleness)
            shard = replace(before, seq=before.seq + 1, count=int(running.total.count))
            written.append(WrittenSum(self._seal(rows, shard, running.total), running))
        return written

    def keep(self, written: Iterable[WrittenSum]) -> None:
        """Use the sums of a durable commit from now on, and remove the blobs that they replace."""
        for shard, running in written:
            if running is None:
                continue
            before = self._shards.get(shard.round)
            self._shards[shard.round] = shard, running
            if before is not None:
                self._remove(before[0].file)

    def begin_anew(self) -> None:
        """Drop the sums in memory: the next commit begins new shards."""
        self._shards.clear()

    def total(self, number: int) -> Aggregate:
        """Merge a round's shards of all processes.

        The round must be closed: this process drops its shard from memory, and a later commit would begin a new one.

        Raises:
            ExperimentError: A part of the sum is missing or damaged.
        """
        self._shards.pop(number, None)
        return merged(self.shards(number))

    def shards(self, number: int) -> list[Aggregate]:
        """Read a round's shards, in the order of their names; if reports are spooled, each report is a shard of its own.

        Raises:
            ExperimentError: A part of the sum is missing or damaged.
        """
        with self._coordinator.store.transaction() as rows:
            row, shards, wrapped = rows.round(number), rows.shards(number), rows.note(number, "key")
        if shards and wrapped is None:
            raise ExperimentError(f"the key of round {number} is gone, so its sum cannot be read: cancel the round")
        key = b"" if wrapped is None else self._ring.unwrap(wrapped, _key_of(number))
        parts = [decode_aggregate(unseal(key, self._blobs.get(shard.file), _content(shard))) for shard in shards]
        counted, there = 0 if row is None else row.counted, sum(int(part.count) for part in parts)
        if there != counted:
            raise ExperimentError(
                f"the files of round {number}'s sum hold {many(there, 'report')}, but {counted} are counted: database and files "
                "are from different times; restore both from the same backup, or give up the open rounds with `sumus reconcile`"
            )
        return parts

    def destroy(self, number: int) -> None:
        """Destroy a round's key, and remove its sums. Without the key, leftover copies cannot be read."""
        with self._coordinator.leading() as rows:
            rows.put_note(number, "key", None)
            shards = rows.shards(number)
        self._shards.pop(number, None)
        for shard in shards:
            self._remove(shard.file)

    def probe(self) -> None:
        """Check that blobs can be written: write one, and remove it.

        Raises:
            ExperimentError: Nothing can be written, so commits would fail.
        """
        self._remove(self._blobs.put(b"written and removed"))

    def sweep(self) -> list[str]:
        """Destroy the keys of rounds that are over, and remove blobs that no row points to, which crashes leave behind.

        A blob of a commit that is still running is never removed, since the transactions of all processes are serialized.

        Returns:
            The names of the blobs that were removed.
        """
        wanted = set[str]()
        with self._coordinator.leading() as rows:
            for row in rows.rounds():
                if row.over:
                    rows.put_note(row.number, "key", None)
                else:
                    wanted |= {shard.file for shard in rows.shards(row.number)}
            left = sorted(set(self._blobs) - wanted)
            for name in left:
                self._remove(name)
        return left

    def keep_open(self, rows: Rows) -> None:
        """Drop the sums of rounds that are over from memory: another process may have ended them."""
        if self._shards:
            wanted = {row.number for row in rows.rounds() if not row.over}
            self._shards = {number: held for number, held in self._shards.items() if number in wanted}

    def _seal(self, rows: Rows, shard: Shard, content: Aggregate) -> Shard:
        """Seal a shard's content as a blob, and write the row that points to it."""
        sealed = seal_pieces(self._key(rows, shard.round), aggregate_pieces(content), _content(shard))
        shard = replace(shard, file=self._blobs.put(sealed))
        rows.put_shard(shard)
        return shard

    def _key(self, rows: Rows, number: int) -> bytes:
        """Read a round's key, or make and store it if it does not exist yet."""
        if (wrapped := rows.note(number, "key")) is not None:
            return self._ring.unwrap(wrapped, _key_of(number))
        key = new_key()
        rows.put_note(number, "key", self._ring.wrap(key, _key_of(number)))
        return key

    def _remove(self, name: str) -> None:
        with suppress(
            OSError, ExperimentError
        ):  # a blob that stays does no harm: it is sealed, and no row points to it
            self._blobs.delete(name)


def merged(parts: Iterable[Aggregate]) -> Aggregate:
    """Merge sums into one."""
    total = RunningSum()
    for part in parts:
        total.add(part)
    return total.total


def _key_of(number: int) -> str:
    return f"the key of round {number}"


def _content(shard: Shard) -> str:
    return f"sum {shard.round}, shard {shard.name}, commit {shard.seq}, {many(shard.count, 'report')}"
