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

from sumus.errors import ExperimentError
from sumus.protocol.round import DeviceRow, Round, Session

OF_THE_RUN = 2**31 - 1
"""In place of a round's number: what the run itself must remember."""


@dataclass(frozen=True, slots=True)
class RunRow:
    """Where a run stands. newest: the number of its newest round.  version: models published.  fence: of the leader that took
    over last.  lasts: seconds that rounds have lasted of late, 0 before the first has ended.  epoch: of noise, which grows when
    older rows are put back.  released: the version that devices answer with.  led: when that leader took over.
    takes: seconds that a device takes for its work, and takes_by_edge: if an edge reports it; 0 before the first report.
    models: sums that have become a model; a model that was put back is none.
    """

    newest: int = 0
    version: int = 0
    fence: int = 0
    lasts: float = 0.0
    epoch: int = 0
    released: int = 0
    led: float = 0.0
    takes: float = 0.0
    takes_by_edge: float = 0.0
    models: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """What one process has added to a round's sum: where it lies, sealed. name: of the process's life, never used again.
    seq: grows with every commit.  count: contributors in it.  file: its name."""

    round: int
    name: str
    seq: int
    count: int
    file: str


@dataclass(frozen=True, slots=True)
class Model:
    """A version of the model, and what it came from. What is in it lies in blobs, by SHA-256 in hexadecimal.

    round: whose sum it was made with; None for the first, and for one that was put back.  parent: the version before it.
    broadcast: what devices train from.  memory: the optimizer's state.  model: what is published.  plan: of its task.
    contributors: reports in the sum.  metrics: canonical JSON.  at: seconds of the store's clock.
    """

    version: int
    round: int | None
    parent: int | None
    broadcast: str
    memory: str
    model: str
    plan: str
    contributors: int = 0
    metrics: str = "{}"
    at: float = 0.0


class StorageAway(ExperimentError):
    """The database does not answer, or not yet: the same may go well later."""


class Fenced(Exception):
    """A row was written by somebody else since it was read. Raised as the transaction ends, at the latest; it leaves nothing."""


class TakenOver(Fenced):
    """Another process leads the run since."""


class Rows(Protocol):
    """One transaction. What was written in it is read in it. Rows that were never written: `run()` and round 0 as they begin.

    Of what is forgotten nothing is read any more. What is written again afterwards is there again.
    """

    def run(self) -> RunRow:
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

    def device(self, id: str) -> DeviceRow | None:
        """What is known of a device; its session as it is now."""
        ...

    def overdue(self, now: float) -> Sequence[str]:
        """Sessions whose report is awaited beyond the time in which it is counted, in the order in which they expired."""
        ...

    def out_since(self, began: float) -> Sequence[str]:
        """Sessions that hold a place since this moment or longer, those first that have held it longest."""
        ...

    def sessions_out(self) -> Sequence[str]:
        """Sessions whose report is awaited, with a place or without, in the order in which they expire."""
        ...

    def read_ahead(self, devices: Sequence[str] = (), sessions: Sequence[str] = ()) -> None:
        """A hint: these devices with their sessions, and these sessions with their devices, are read next. Changes nothing but
        how long that takes."""
        ...

    def counted_in(self, number: int) -> Sequence[str]:
        """Sessions whose reports are in a round's sum, in the order in which they were counted."""
        ...

    def sum_of(self, id: str) -> int | None:
        """The round that a session was counted in; None where it was not, or that is forgotten."""
        ...

    def put_run(self, run: RunRow) -> None:
        """Write where the run stands."""
        ...

    def put_round(self, row: Round) -> None:
        """Write a round's row."""
        ...

    def put_session(self, row: Session) -> None:
        """Write a session's row. Fenced where it was counted before, and now would be in another sum, or in none."""
        ...

    def put_device(self, row: DeviceRow) -> None:
        """Write what is known of a device, and with it the id of its session."""
        ...

    def drop_session(self, id: str) -> None:
        """Forget a session's row, and not that it was counted."""
        ...

    def forget_device(self, id: str) -> None:
        """Forget a device's row and its sessions, and not that they were counted."""
        ...

    def shards(self, number: int) -> Sequence[Shard]:
        """Where a round's sum lies, by name."""
        ...

    def put_shard(self, row: Shard) -> None:
        """Write where a process's part of a sum lies, in place of where it lay. Fenced where that was not one `seq` before."""
        ...

    def drop_shards(self, number: int) -> None:
        """Forget where a round's sum lies."""
        ...

    def note(self, number: int, name: str) -> bytes | None:
        """What a round must remember: "key" (its data key, wrapped), "seed", "model", or "departed" (the links of devices that
        left after they were counted). None where there is none, or no more."""
        ...

    def put_note(self, number: int, name: str, body: bytes | None) -> None:
        """Write what a round must remember, or forget it."""
        ...

    def model(self, version: int) -> Model | None:
        """A version's row."""
        ...

    def models(self) -> Sequence[Model]:
        """All versions that are kept, in their order."""
        ...

    def put_model(self, row: Model) -> None:
        """Write a version's row."""
        ...

    def drop_model(self, version: int) -> None:
        """Forget a version's row."""
        ...

    def forget_rounds_before(self, number: int) -> None:
        """Forget the rows of older rounds, which sessions were counted in them, their shards and their notes."""
        ...


class Store(Protocol):
    """Rows of one run."""

    def transaction(self) -> AbstractContextManager[Rows]:
        """Begin one; it ends with the block."""
        ...
