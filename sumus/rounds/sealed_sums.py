"""Sums that survive a crash: what is counted and what is added are one transaction.

    sums = SealedSums(coordinator, hop, ring, blobs)
    sums.report("alice/1", update, now)          checked, and staged in memory: nothing is promised
    for action in sums.commit(now): …            now who is counted may be told so
    total = sums.total(7)                        everyone's, also of processes that are gone
    sums.destroy(7)                              its key, then its blobs

Each process adds to a sum of its own, a *shard* of the round's, and writes it anew with every commit, sealed, as another blob; a
row points to it. So no update is ever on a disk, a kill at any moment leaves the last commit, and the sums of all processes merge
to the same bits.

A shard's memory is added to in place, and is only good for the next commit: where a commit fails it is let go of, what its row
points to stays, and the process begins another shard.
"""

import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import cast

from sumus.aggregate import Aggregate, RunningSum, Update
from sumus.errors import ExperimentError
from sumus.first_hop import FirstHop
from sumus.protocol.round import Action, Session, StageReport
from sumus.rounds.coordinator import Arrived, Coordinator
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing, new_key, seal_pieces, unseal
from sumus.storage.store import Rows, Shard
from sumus.text import many
from sumus.wire.tensors import aggregate_pieces, decode_aggregate


class SealedSums:
    """The sums of a run's rounds, as one process adds to them.

    hop: of the plan.  ring: wraps each round's key.  blobs: for this run's sealed sums alone, the same for all processes.
    spools: whether each report is sealed apart, as a sum of one, and added at the round's end: for aggregators that need each.
    """

    def __init__(
        self, coordinator: Coordinator, hop: FirstHop, ring: KeyRing, blobs: Blobs, spools: bool = False
    ) -> None:
        self._coordinator, self._hop, self._ring, self._blobs, self.spools = coordinator, hop, ring, blobs, spools
        self._held: dict[str, Update | Aggregate] = {}
        self._shards: dict[int, tuple[Shard, RunningSum]] = {}

    def report(self, session: str, update: Update, now: float) -> tuple[Action, ...]:
        """Take in an update that has arrived whole: if it is staged, it is kept for the next commit.

        Raises ParticipantError for one that cannot be counted, and then nothing has changed.
        """
        self._hop.check(update)
        return self.report_all([(Arrived((session,)), update)], now)[0]

    def report_all(self, reports: Sequence[tuple[Arrived, Update | Aggregate]], now: float) -> list[tuple[Action, ...]]:
        """Take in many, which the first hop has checked: what is said of each. They are a session's update, or the sum that an
        edge made of those of many."""
        answers = self._coordinator.report_all([report for report, _ in reports], now)
        for (report, content), actions in zip(reports, answers, strict=True):
            if any(isinstance(action, StageReport) for action in actions):
                self._held.setdefault(report.sessions[0], content)  # what came first is what counts
        return answers

    def commit(self, now: float) -> tuple[Action, ...]:
        """Add what is staged to the sum, and write both down. If it raises, nothing was acknowledged, and all is still staged."""
        written: list[tuple[Shard, RunningSum]] = []
        waiting = list(self._coordinator.staged)
        try:
            actions = self._coordinator.commit(now, lambda rows, counted: written.extend(self._add(rows, counted)))
        except BaseException:
            self._shards.clear()  # perhaps it was committed all the same: what there is stays as it is
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
        """A round's sum over all processes' shards. ExperimentError where it is not all there.

        The round is to be closed: this process keeps its shard no longer in memory, and would begin another.
        """
        self._shards.pop(number, None)
        return merged(self.shards(number))

    def shards(self, number: int) -> list[Aggregate]:
        """What lies of a round, unsealed, by the shards' names: where reports are spooled, each of them."""
        with self._coordinator.store.transaction() as rows:
            row, shards, wrapped = rows.round(number), rows.shards(number), rows.note(number, "key")
        if shards and wrapped is None:
            raise ExperimentError(f"the key of round {number} is gone, and its sum with it: abandon the round")
        key = b"" if wrapped is None else self._ring.unwrap(wrapped, _key_of(number))
        parts = [decode_aggregate(unseal(key, self._blobs.get(shard.file), _content(shard))) for shard in shards]
        counted, there = 0 if row is None else row.counted, sum(int(part.count) for part in parts)
        if there != counted:
            raise ExperimentError(
                f"the sum of round {number} is of {many(there, 'report')}, and {counted} are counted: rows and files are not "
                "of one time; put back both from the same backup, or give up the open rounds with `sumus reconcile`"
            )
        return parts

    def destroy(self, number: int) -> None:
        """Forget a round's key, and remove its sums: what of them may be left anywhere is unreadable."""
        with self._coordinator.leading() as rows:
            rows.put_note(number, "key", None)
            shards = rows.shards(number)
        self._shards.pop(number, None)
        for shard in shards:
            self._remove(shard.file)

    def probe(self) -> None:
        """Write something, and remove it. ExperimentError where a commit could not be written either."""
        self._remove(self._blobs.put(b"written and removed"))

    def sweep(self) -> list[str]:
        """Forget the keys of sums that are over, and remove blobs that no row points to, as crashes leave them: of none is a
        commit on its way, since commits are transactions too, and these come one after the other, whichever process's."""
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
        """Hold no sum of a round that is over, as another process may have ended it."""
        if self._shards:
            wanted = {row.number for row in rows.rounds() if not row.over}
            self._shards = {number: held for number, held in self._shards.items() if number in wanted}

    def restart(self) -> None:
        """Hold nothing, as a new process."""
        self._held.clear()
        self._shards.clear()

    def _add(self, rows: Rows, counted: Sequence[Session]) -> list[tuple[Shard, RunningSum]]:
        """Within the transaction: the new sums, as blobs, and rows that point to them. If it raises, or the transaction fails,
        what is held of shards is no longer what their rows point to."""
        written: list[tuple[Shard, RunningSum]] = []
        if self.spools:
            for session in counted:
                one = RunningSum()
                self._count_in(session, one)
                self._seal(rows, Shard(cast(int, session.sum), session.id, 1, 1, ""), one.total)
            return written
        for number in sorted({session.sum for session in counted if session.sum is not None}):
            before, running = self._shards.get(number) or (Shard(number, uuid.uuid4().hex, 0, 0, ""), RunningSum())
            for session in counted:
                if session.sum == number:
                    self._count_in(session, running)
            shard = replace(before, seq=before.seq + 1, count=int(running.total.count))
            written.append((self._seal(rows, shard, running.total), running))
        return written

    def _count_in(self, session: Session, into: RunningSum) -> None:
        """Add what a session's report holds; of an edge's that is with the first of its sessions."""
        content = self._held.get(session.id)
        if isinstance(content, Aggregate):
            into.add(content)
        elif content is not None:
            self._hop.add(content, into, session.staleness)

    def _seal(self, rows: Rows, shard: Shard, content: Aggregate) -> Shard:
        """A shard with its content sealed as a blob, which its row points to."""
        sealed = seal_pieces(self._key(rows, shard.round), aggregate_pieces(content), _content(shard))
        shard = replace(shard, file=self._blobs.put(sealed))
        rows.put_shard(shard)
        return shard

    def _key(self, rows: Rows, number: int) -> bytes:
        """A round's key, made by whoever is the first to need it."""
        if (wrapped := rows.note(number, "key")) is not None:
            return self._ring.unwrap(wrapped, _key_of(number))
        key = new_key()
        rows.put_note(number, "key", self._ring.wrap(key, _key_of(number)))
        return key

    def _remove(self, name: str) -> None:
        with suppress(OSError, ExperimentError):  # it is sealed, and nothing points to it
            self._blobs.delete(name)


def merged(parts: Iterable[Aggregate]) -> Aggregate:
    """The sum of sums."""
    total = RunningSum()
    for part in parts:
        total.add(part)
    return total.total


def _key_of(number: int) -> str:
    return f"the key of round {number}"


def _content(shard: Shard) -> str:
    return f"sum {shard.round}, shard {shard.name}, commit {shard.seq}, {many(shard.count, 'report')}"
