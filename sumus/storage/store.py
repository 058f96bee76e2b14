"""What rounds leave behind: rows, read and written in transactions.

    with store.transaction() as rows:
        row = rows.round(rows.run().newest)
        …
        rows.put_round(…)                  all that is written here is durable when the block ends; or, if it raises, none of it

The rows are those of `protocol.round`. A store is one run's; its transactions come one after the other, whoever opens them. In
memory, SQLite and PostgreSQL it is the same, and one suite of tests runs against all of them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from sumus.protocol.round import Device, Round, Session


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run stands. newest: the number of its newest round.  version: models published.  fence: of the leader that took
    over last.  lasts: seconds that rounds have lasted of late, 0 before the first has ended."""

    newest: int = 0
    version: int = 0
    fence: int = 0
    lasts: float = 0.0


@dataclass(frozen=True, slots=True)
class Shard:
    """What one process has added to a round's sum: where it lies, sealed. name: of the process's life, never used again.
    seq: grows with every commit.  count: contributors in it.  file: its name."""

    round: int
    name: str
    seq: int
    count: int
    file: str


class Fenced(Exception):
    """A row was written by somebody else since it was read."""


class Rows(Protocol):
    """One transaction. What was written in it is read in it. Rows that were never written: `run()` and round 0 as they begin."""

    def run(self) -> Run:
        """Where the run stands."""
        ...

    def round(self, number: int) -> Round | None:
        """A round's row."""
        ...

    def rounds(self) -> Sequence[Round]:
        """All rounds that are not forgotten, in their order."""
        ...

    def session(self, id: str) -> Session | None:
        """A session's row."""
        ...

    def device(self, id: str) -> Device | None:
        """What is known of a device; its session as it is now."""
        ...

    def overdue(self, now: float) -> Sequence[str]:
        """Sessions that are out beyond their time, in the order in which they expired."""
        ...

    def counted_in(self, number: int) -> Sequence[str]:
        """Sessions whose reports are in a round's sum, in the order in which they were counted."""
        ...

    def put_run(self, run: Run) -> None:
        """Write where the run stands."""
        ...

    def put_round(self, row: Round) -> None:
        """Write a round's row."""
        ...

    def put_session(self, row: Session) -> None:
        """Write a session's row. Fenced where it was counted before, and now would be in another sum, or in none."""
        ...

    def put_device(self, row: Device) -> None:
        """Write what is known of a device, and with it the id of its session."""
        ...

    def drop_session(self, id: str) -> None:
        """Forget a session's row, and not that it was counted."""
        ...

    def shards(self, number: int) -> Sequence[Shard]:
        """Where a round's sum lies, by name."""
        ...

    def put_shard(self, row: Shard) -> None:
        """Write where a process's part of a sum lies, in place of where it lay. Fenced where that was not one `seq` before."""
        ...

    def key(self, number: int) -> bytes | None:
        """A round's data key, wrapped; None where there is none, or none any more."""
        ...

    def put_key(self, number: int, wrapped: bytes | None) -> None:
        """Write a round's wrapped data key, or forget it."""
        ...

    def forget_rounds_before(self, number: int) -> None:
        """Forget the rows of older rounds, which sessions were counted in them, their shards and their keys."""
        ...


class Store(Protocol):
    """Rows of one run."""

    def transaction(self) -> AbstractContextManager[Rows]:
        """Begin one; it ends with the block."""
        ...
