"""The work of an edge's rounds: the work of the server above, stored when the first of it arrives for a round.

notes = EdgeWorkNotes(store, rounds=1)
notes.begin(number, work, now)         the round is for this work, and must end early enough for its sum to be sent
notes.of(number)                       None if no work has arrived for the round
"""

import msgspec

from sumus.protocol.rows import changed
from sumus.rounds.departures import keep_departed
from sumus.storage.store import Store
from sumus.wire.messages import Assignment

MARGIN = 0.2
"""The fraction of the server above's time limit that is reserved for sending the sum."""


class EdgeWork(msgspec.Struct, frozen=True):
    """The work of an edge's round, with its time limits.

    Attributes:
        work: The assignment of the server above for the round's first device.
        ends: The time by which the round must be over, by the edge's clock; None if it has no limit.
        sent: The time by which the sum must be sent, by the edge's clock; None if it has no limit.
    """

    work: Assignment
    ends: float | None
    sent: float | None


class EdgeWorkNotes:
    """The notes that record the work of each round of a run."""

    def __init__(self, store: Store, rounds: int) -> None:
        """Read and write the notes in a store.

        Args:
            store: The rows of the run.
            rounds: The number of edge rounds that share the time of one sum of the server above."""
        self._store, self._rounds = store, rounds
        self._last: tuple[int, EdgeWork] | None = None

    def restart(self) -> None:
        """Forget the notes in memory: they are read again."""
        self._last = None

    def of(self, number: int) -> EdgeWork | None:
        """Return the work of a round; None if it has no work yet."""
        if self._last is None or self._last[0] != number:
            with self._store.transaction() as rows:
                note = rows.note(number, "work")
            if note is None:
                return None
            self._last = number, msgspec.json.decode(note, type=EdgeWork)
        return self._last[1]

    def begin(self, number: int, work: Assignment, now: float) -> None:
        """Store the work of a round. The round's time begins now."""
        sent = None if work.expires_in_s is None else now + work.expires_in_s * (1 - MARGIN)
        before = self.of(number - 1)
        with self._store.transaction() as rows:
            if before is not None and is_same_sum(before.work, work):
                keep_departed(rows, number - 1, number)
            noted = EdgeWork(work, share_of(sent, self._rounds, now), sent)
            rows.put_note(number, "work", msgspec.json.encode(noted))
            row = rows.round(number)
            assert row is not None, "work begins the round that is open"
            rows.put_round(changed(row, since=now))
        self._last = None

    def rounds_of_sum(self, newest: int, work: EdgeWork | None) -> list[int]:
        """Return the numbers of the rounds whose sums go into one sum of the server above, in order.

        Args:
            newest: The number of the newest round.
            work: The work of the newest round; None if it has no work yet: then the sum is that of the previous round.
        """
        rounds = [newest if work is not None else newest - 1]
        work = work or self.of(rounds[0])
        while work is not None and (before := self.of(rounds[0] - 1)) is not None:
            if not is_same_sum(before.work, work.work):
                break
            rounds.insert(0, rounds[0] - 1)
        return rounds


def share_of(until: float | None, rounds: int, now: float) -> float | None:
    """Return the time by which the first of several rounds must end, if they share the time from now to `until` evenly."""
    return None if until is None else now + max(0.0, until - now) / rounds


def is_same_sum(one: Assignment, other: Assignment) -> bool:
    """Return whether two assignments are for the same sum of the server above."""
    return msgspec.structs.replace(one, session=other.session, expires_in_s=other.expires_in_s) == other
