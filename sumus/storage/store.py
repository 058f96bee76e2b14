"""The store: the lasting records of rounds, as rows that are read and written in transactions.

    with store.transaction() as rows:
        row = rows.round(rows.run().newest)
        …
        rows.put_round(…)                  all changes are durable when the block ends; none is kept if it raises

The rows of rounds, sessions and devices are defined in `protocol.round`. A store belongs to one run. Its transactions run
one after the other, whichever thread or process begins them. Memory, SQLite and PostgreSQL behave the same; one suite of
tests runs against all of them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from sumus.errors import ExperimentError
from sumus.protocol.round import DeviceRow, Round, Session

OF_THE_RUN = 2**31 - 1
"""The round number under which the notes (small named values) of the run itself are stored."""


@dataclass(frozen=True, slots=True)
class RunRow:
    """The state of a run.

    Attributes:
        newest: The number of its newest round.
        version: The version of its newest model.
        fence: The fence (a number that grows with each change of leader) of the process that became leader last.
        lasts: The average duration of recent rounds, in seconds; 0 before the first round has ended.
        epoch: A number for the seeds of noise. It grows with each restore and rollback, so that no noise is used twice.
        released: The version of the model with which devices predict.
        led: The time at which the leader took over, in seconds of the store's clock.
        takes: The time that a device needs for its work, in seconds; 0 before the first report.
        takes_by_edge: The seconds from the moment when an edge gets work for a device until the edge's sum arrives; 0 before
            the first sum of an edge.
        models: The number of sums that have become a model. A model that a rollback restored does not count.
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
    """The part of a round's sum that one process has added, and the name of the encrypted blob that holds it.

    Attributes:
        round: The round's number.
        name: A unique name. A process that was restarted uses a new one.
        seq: A number that grows by one with every commit.
        count: The number of contributors to this part.
        file: The name of the blob.
    """

    round: int
    name: str
    seq: int
    count: int
    file: str


@dataclass(frozen=True, slots=True)
class Model:
    """A version of the model, and its origin. The contents are blobs, named by their SHA-256 in hexadecimal.

    Attributes:
        version: The version's number.
        round: The round from whose sum it was made; None for the first version, and for a version that a rollback restored.
        parent: The previous version.
        broadcast: The blob that devices receive to begin training.
        memory: The blob of the server optimizer's state.
        model: The blob of the published model.
        plan: The blob of its task's plan.
        contributors: The number of reports in the sum.
        metrics: Metrics as canonical JSON.
        at: The time at which it was made, in seconds of the store's clock.
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
    """The database does not answer now; the same call may succeed later."""


class Fenced(Exception):
    """Another process has written a row since this transaction read it.

    It is raised at the end of the transaction at the latest. The transaction then changes nothing.
    """


class TakenOver(Fenced):
    """Another process has become the run's leader in the meantime."""


class Rows(Protocol):
    """The rows in one transaction. A read returns what the same transaction has written.

    In a new store, the run and round 0 exist with their default values. A row that was dropped or forgotten can no longer be
    read, unless it is written again.
    """

    def run(self) -> RunRow:
        """Return the run's row."""
        ...

    def round(self, number: int) -> Round | None:
        """Return a round's row; None if it does not exist."""
        ...

    def rounds(self) -> Sequence[Round]:
        """Return all rounds that are not forgotten, in the order of their numbers."""
        ...

    def session(self, id: str) -> Session | None:
        """Return a session's row; None if it does not exist."""
        ...

    def device(self, id: str) -> DeviceRow | None:
        """Return a device's row, with the current row of its last session; None if the device does not exist."""
        ...

    def overdue(self, now: float) -> Sequence[str]:
        """List the sessions whose report is still awaited although they have expired, in the order in which they expired."""
        ...

    def out_since(self, began: float) -> Sequence[str]:
        """List the sessions that hold a place in a round (see `protocol.round`) and got it at this moment or earlier, the
        oldest first."""
        ...

    def sessions_out(self) -> Sequence[str]:
        """List all sessions whose report is awaited, even if they have lost their place, in the order in which they expire."""
        ...

    def read_ahead(self, devices: Sequence[str] = (), sessions: Sequence[str] = ()) -> None:
        """Read these devices with their sessions, and these sessions with their devices, in advance. This is a hint, and
        changes only how long later reads take."""
        ...

    def counted_in(self, number: int) -> Sequence[str]:
        """List the sessions whose reports are in a round's sum, in the order in which they were counted."""
        ...

    def sum_of(self, id: str) -> int | None:
        """Return the round in which a session was counted; None if it was not counted, or if that round is forgotten."""
        ...

    def put_run(self, run: RunRow) -> None:
        """Write the run's row."""
        ...

    def put_round(self, row: Round) -> None:
        """Write a round's row."""
        ...

    def put_session(self, row: Session) -> None:
        """Write a session's row.

        Raises:
            Fenced: The session was already counted, and would now be in another sum or in no sum.
        """
        ...

    def put_device(self, row: DeviceRow) -> None:
        """Write a device's row, with the id of its session."""
        ...

    def drop_session(self, id: str) -> None:
        """Delete a session's row. The record that it was counted stays."""
        ...

    def forget_device(self, id: str) -> None:
        """Delete a device's row and its sessions. The records that they were counted stay."""
        ...

    def shards(self, number: int) -> Sequence[Shard]:
        """List the shards of a round's sum, in the order of their names."""
        ...

    def put_shard(self, row: Shard) -> None:
        """Write a process's shard of a sum. It replaces the process's previous shard.

        Raises:
            Fenced: `seq` is not exactly one more than the `seq` of the previous shard (0 if there is no previous shard).
        """
        ...

    def drop_shards(self, number: int) -> None:
        """Delete all shards of a round's sum."""
        ...

    def note(self, number: int, name: str) -> bytes | None:
        """Return a note (a small value with a name) of a round; None if it does not exist or was deleted.

        Examples of names: "key" (the round's data key, wrapped), "seed", "model", and "departed" (the links of devices
        that left after they were counted).
        """
        ...

    def put_note(self, number: int, name: str, body: bytes | None) -> None:
        """Write a note of a round. None as the body deletes the note."""
        ...

    def model(self, version: int) -> Model | None:
        """Return the row of a version of the model; None if it does not exist."""
        ...

    def models(self) -> Sequence[Model]:
        """Return the rows of all versions that are kept, in the order of their numbers."""
        ...

    def put_model(self, row: Model) -> None:
        """Write the row of a version of the model."""
        ...

    def drop_model(self, version: int) -> None:
        """Delete the row of a version of the model."""
        ...

    def forget_rounds_before(self, number: int) -> None:
        """Delete the rows of older rounds, with their shards, their notes, and the records of sessions that were counted
        in them."""
        ...


class Store(Protocol):
    """The rows of one run."""

    def transaction(self) -> AbstractContextManager[Rows]:
        """Begin a transaction. It ends with the block."""
        ...
