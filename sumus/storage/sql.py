"""Rows in a database: SQLite on one machine, PostgreSQL beyond.

    store = SqlStore.open("sqlite:///run.db")          made, if it is not there
    with store.transaction() as rows: …

A transaction is durable when it ends: SQLite writes ahead and waits for the disk (`synchronous=FULL`). Transactions of one run
come one after the other: SQLite has one writer, and on PostgreSQL each begins by locking the run's row.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    create_engine,
    delete,
    event,
    func,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from sumus.errors import ExperimentError
from sumus.protocol.round import Device, Round, Session, State
from sumus.storage.store import Fenced, Rows, Run, Shard

TABLES = MetaData()
RUN = Table(
    "run",
    TABLES,
    Column("run", String, primary_key=True),
    Column("newest", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("lasts", Float, nullable=False),
)
ROUND = Table(
    "round",
    TABLES,
    Column("run", String, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("state", String, nullable=False),
    Column("since", Float, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("given", Integer, nullable=False),
    Column("dropped", Integer, nullable=False),
    Column("counted", Integer, nullable=False),
    Column("reason", String, nullable=False),
)
SESSION = Table(
    "session",
    TABLES,
    Column("run", String, primary_key=True),
    Column("id", String, primary_key=True),
    Column("device", String, nullable=False),
    Column("serial", Integer, nullable=False),
    Column("round", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("expires", Float, nullable=False),
    Column("state", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("sum", Integer),
    Column("staleness", Integer, nullable=False),
    Index("session_expires", "run", "state", "expires"),
)
DEVICE = Table(
    "device",
    TABLES,
    Column("run", String, primary_key=True),
    Column("id", String, primary_key=True),
    Column("session", String),
    Column("last_sum", Integer),
    Column("last_counted", String),
    Column("times_counted", Integer, nullable=False),
)
COUNTED = Table(
    "counted",
    TABLES,
    Column("run", String, primary_key=True),
    Column("session", String, primary_key=True),
    Column("sum", Integer, nullable=False),
    Column("place", Integer, nullable=False),
    Index("counted_sum", "run", "sum", "place"),
)
"""The key (run, session) is what makes a report count once."""
SHARD = Table(
    "shard",
    TABLES,
    Column("run", String, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("name", String, primary_key=True),
    Column("seq", Integer, nullable=False),
    Column("count", Integer, nullable=False),
    Column("file", String, nullable=False),
)
KEY = Table(
    "round_key",
    TABLES,
    Column("run", String, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("wrapped", LargeBinary, nullable=False),
)
_PATIENCE = "-c idle_in_transaction_session_timeout=5000 -c lock_timeout=10000"
"""Milliseconds after which PostgreSQL lets go of a process that was stopped in a transaction, and others stop waiting for it."""


class SqlStore:
    """A `Store` of one run in a database that may hold others."""

    def __init__(self, engine: Engine, run: str) -> None:
        self._engine, self._run = engine, run

    @staticmethod
    def open(url: str, run: str = "run") -> "SqlStore":
        """The store at a database URL; its tables are made where they are not there. ExperimentError where it cannot be."""
        try:
            engine = create_engine(url, connect_args={"options": _PATIENCE} if url.startswith("postgresql") else {})
            if engine.dialect.name == "sqlite":
                _make_durable(engine)
            TABLES.create_all(engine)
        except (SQLAlchemyError, ModuleNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise ExperimentError(
                f"the database cannot be opened ({reason}): is it there, and may you write to it?"
            ) from error
        store = SqlStore(engine, run)
        with engine.begin() as connection:
            store.rows(connection).begin()
        return store

    def transaction(self) -> AbstractContextManager[Rows]:
        return self._transaction()

    @contextmanager
    def _transaction(self) -> Generator[Rows, None, None]:
        with self._engine.begin() as connection:
            rows = self.rows(connection)
            rows.lock()
            yield rows

    def rows(self, connection: Connection) -> "_SqlRows":
        """The rows of this run, as a transaction of this connection sees them."""
        return _SqlRows(connection, self._run)

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()


class _SqlRows:
    """One transaction."""

    def __init__(self, connection: Connection, run: str) -> None:
        self._connection, self._name = connection, run
        self._insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        self._at = Run()

    def begin(self) -> None:
        """Write the first rows, where there are none."""
        if self._one(self._of(RUN)) is None:
            self._put(ROUND, _row_of(Round(0)), replace=False)
            self._put(RUN, asdict(Run()), replace=False)

    def lock(self) -> None:
        """Wait for other transactions of this run, and keep them waiting."""
        self._at = Run(**self._one(self._of(RUN).with_for_update()) or {})

    def run(self) -> Run:
        return self._at

    def round(self, number: int) -> Round | None:
        found = self._one(self._of(ROUND).where(ROUND.c.number == number))
        return None if found is None else _round_of(found)

    def rounds(self) -> Sequence[Round]:
        return [_round_of(found) for found in self._all(self._of(ROUND).order_by(ROUND.c.number))]

    def session(self, id: str) -> Session | None:
        found = self._one(self._of(SESSION).where(SESSION.c.id == id))
        return None if found is None else Session(**found)

    def device(self, id: str) -> Device | None:
        found = self._one(self._of(DEVICE).where(DEVICE.c.id == id))
        if found is None:
            return None
        session = found["session"]
        values: dict[str, Any] = {**found, "session": None if session is None else self.session(session)}
        return Device(**values)

    def overdue(self, now: float) -> Sequence[str]:
        late = self._of(SESSION).where(SESSION.c.state == "out", SESSION.c.expires <= now)
        return [found["id"] for found in self._all(late.order_by(SESSION.c.expires, SESSION.c.id))]

    def counted_in(self, number: int) -> Sequence[str]:
        of_round = self._of(COUNTED).where(COUNTED.c.sum == number).order_by(COUNTED.c.place)
        return [found["session"] for found in self._all(of_round)]

    def put_run(self, run: Run) -> None:
        if run != self._at:
            self._put(RUN, asdict(run))
            self._at = run

    def put_round(self, row: Round) -> None:
        self._put(ROUND, _row_of(row))

    def put_session(self, row: Session) -> None:
        if row.sum is not None:
            count = select(func.count()).where(COUNTED.c.run == self._name, COUNTED.c.sum == row.sum)
            place = self._connection.execute(count).scalar_one()
            self._put(COUNTED, {"session": row.id, "sum": row.sum, "place": place}, replace=False)
        counted = self._one(self._of(COUNTED).where(COUNTED.c.session == row.id))
        if counted is not None and counted["sum"] != row.sum:
            raise Fenced
        self._put(SESSION, asdict(row))

    def put_device(self, row: Device) -> None:
        session = None if row.session is None else row.session.id
        self._put(DEVICE, {**asdict(row), "session": session})

    def drop_session(self, id: str) -> None:
        self._delete(SESSION, SESSION.c.id == id)

    def shards(self, number: int) -> Sequence[Shard]:
        found = self._all(self._of(SHARD).where(SHARD.c.round == number))
        return sorted((Shard(**each) for each in found), key=lambda shard: shard.name)

    def put_shard(self, row: Shard) -> None:
        before = self._one(self._of(SHARD).where(SHARD.c.round == row.round, SHARD.c.name == row.name))
        if row.seq != 1 + (before["seq"] if before is not None else 0):
            raise Fenced
        self._put(SHARD, asdict(row))

    def key(self, number: int) -> bytes | None:
        found = self._one(self._of(KEY).where(KEY.c.round == number))
        return None if found is None else bytes(found["wrapped"])

    def put_key(self, number: int, wrapped: bytes | None) -> None:
        if wrapped is None:
            self._delete(KEY, KEY.c.round == number)
        else:
            self._put(KEY, {"round": number, "wrapped": wrapped})

    def forget_rounds_before(self, number: int) -> None:
        for table, column in (
            (ROUND, ROUND.c.number),
            (COUNTED, COUNTED.c.sum),
            (SHARD, SHARD.c.round),
            (KEY, KEY.c.round),
        ):
            self._delete(table, column < number)

    # ── statements ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _of(self, table: Table) -> Select[Any]:
        """What of a table is this run's."""
        return select(*(column for column in table.columns if column.name != "run")).where(table.c.run == self._name)

    def _one(self, statement: Select[Any]) -> dict[str, Any] | None:
        found = self._connection.execute(statement).mappings().one_or_none()
        return None if found is None else dict(found)

    def _all(self, statement: Select[Any]) -> list[dict[str, Any]]:
        return [dict(found) for found in self._connection.execute(statement).mappings()]

    def _delete(self, table: Table, which: ColumnElement[bool]) -> None:
        self._connection.execute(delete(table).where(table.c.run == self._name, which))

    def _put(self, table: Table, values: Mapping[str, Any], replace: bool = True) -> None:
        """Write a row; one that is there is replaced, or stays."""
        keys = [column.name for column in table.primary_key]
        statement = self._insert(table).values(run=self._name, **values)
        others = {name: value for name, value in values.items() if name not in keys}
        if replace:
            statement = statement.on_conflict_do_update(index_elements=keys, set_=others)
        else:
            statement = statement.on_conflict_do_nothing(index_elements=keys)
        self._connection.execute(statement)


def _row_of(row: Round) -> dict[str, Any]:
    return {**asdict(row), "state": row.state.value}


def _round_of(found: Mapping[str, Any]) -> Round:
    values: dict[str, Any] = {**found, "state": State(found["state"])}
    return Round(**values)


def _make_durable(engine: Engine) -> None:
    """One writer at a time, from the beginning of a transaction on; what is committed is on the disk; what is deleted is gone."""

    def connected(connection: Any, record: object) -> None:
        connection.isolation_level = None  # sqlite3 itself begins nothing
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "busy_timeout=30000"):
            connection.execute(f"PRAGMA {pragma}")

    def begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)
