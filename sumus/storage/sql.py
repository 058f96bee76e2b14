"""Rows in a database: SQLite on one machine, PostgreSQL for several.

    store = SqlStore.open(Path("run.db"))              makes the file if needed; or
        SqlStore.open("postgresql://HOST/NAME")
    with store.transaction() as rows: …

A transaction is durable when it ends: SQLite uses a write-ahead log and waits for the disk (`synchronous=FULL`).
Transactions of one run follow one another: SQLite has one writer, and on PostgreSQL each transaction begins by locking
the run's row.
"""

import math
import sqlite3
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BindParameter,
    ColumnElement,
    Connection,
    Engine,
    Select,
    Table,
    bindparam,
    case,
    create_engine,
    delete,
    event,
    func,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, SQLAlchemyError

from sumus.errors import ExperimentError, UsageError, extra
from sumus.protocol.round import DeviceRow, Round, Session, State
from sumus.storage.backup import copy_to
from sumus.storage.cached import BulkStatement, CachedTable, Row, insert_into, put_rows
from sumus.storage.files import network_disk
from sumus.storage.identities import Identity, IdentityRows, Member, Token
from sumus.storage.leases import Lease, PresentReplica, Serials, after, is_near
from sumus.storage.migrations import alone, bring_up_to_date
from sumus.storage.store import Fenced, Model, Rows, RunRow, Shard, StorageAway
from sumus.storage.tables import (
    COUNTED,
    DEVICE,
    IDENTITY,
    LEASE,
    MEMBER,
    MODEL,
    NOTE,
    REPLICA,
    ROUND,
    RUN,
    SERIAL,
    SESSION,
    SHARD,
    TOKEN,
)

_RUN_VALUES = attrgetter(*RUN.columns.keys()[1:])
_ROUND_VALUES = attrgetter("number", "state.value", "since", "fence", "given", "dropped", "counted", "reason")
_SESSION_VALUES = attrgetter(*SESSION.columns.keys()[1:])
_DEVICE_VALUES = attrgetter(*DEVICE.columns.keys()[3:])
_SHARD_VALUES = attrgetter(*SHARD.columns.keys()[1:])
_MODEL_VALUES = attrgetter(*MODEL.columns.keys()[1:])


def _of(table: Table, *which: ColumnElement[bool]) -> Select[Any]:
    """Select the columns of a table, without `run`, for the rows of one run."""
    columns = (column for column in table.columns if column.name != "run")
    return select(*columns).where(table.c.run == bindparam("run"), *which)


_NUMBER: BindParameter[int] = bindparam("number")
_LOCK = _of(RUN).with_for_update()
_ROUNDS = _of(ROUND).order_by(ROUND.c.number)
_LATE = SESSION.c.expires <= bindparam("until")
_AWAITED = _of(SESSION, SESSION.c.state.in_(("out", "lapsed")), _LATE).order_by(SESSION.c.expires, SESSION.c.id)
_BEGAN = SESSION.c.began <= bindparam("until")
_OUT_SINCE = _of(SESSION, SESSION.c.state == "out", _BEGAN).order_by(SESSION.c.began, SESSION.c.id)
_OF_DEVICE = _of(SESSION, SESSION.c.device == bindparam("device"))
_COUNTED = _of(COUNTED, COUNTED.c.sum == _NUMBER).order_by(COUNTED.c.place)
_SHARDS = _of(SHARD, SHARD.c.round == _NUMBER).order_by(SHARD.c.name)
_MODELS = _of(MODEL).order_by(MODEL.c.version)
_LAST_PLACE = select(func.max(COUNTED.c.place)).where(COUNTED.c.run == bindparam("run"), COUNTED.c.sum == _NUMBER)
_FORGET = [
    delete(column.table).where(column.table.c.run == bindparam("run"), column < _NUMBER)
    for column in (ROUND.c.number, COUNTED.c.sum, SHARD.c.round, NOTE.c.round)
]
_TOKEN_VALUES = attrgetter(*TOKEN.columns.keys())
_IDENTITY_VALUES = attrgetter(*IDENTITY.columns.keys())
_MEMBER_VALUES = attrgetter(*MEMBER.columns.keys())
_MEMBERS = select(func.count()).select_from(MEMBER).where(MEMBER.c.edge == bindparam("edge"))
_TOKENS = select(TOKEN).order_by(TOKEN.c.hash)
_IDENTITIES = (
    select(IDENTITY).where(IDENTITY.c.id > bindparam("after")).order_by(IDENTITY.c.id).limit(bindparam("limit"))
)
_HERE = IDENTITY.c.population == bindparam("population")
_PEOPLE = case((IDENTITY.c.speaks_for > 0, IDENTITY.c.members), else_=1)
_ENROLLED = select(func.coalesce(func.sum(_PEOPLE), 0)).where(_HERE, IDENTITY.c.state == "enrolled")
_LEASE = select(LEASE.c.holder, LEASE.c.fence, LEASE.c.expires).where(LEASE.c.name == "leader")
_RUNS_LOCKED = select(RUN.c.run).order_by(RUN.c.run).with_for_update()
_PRESENT = select(REPLICA.c.name, REPLICA.c.serves).where(REPLICA.c.seen > bindparam("since")).order_by(REPLICA.c.name)
_LONG_GONE = 100.0
"""Seconds after which the row of a replica that has ended is deleted, since it is no longer needed."""
_READS = "sumus_reads"
"""The execution option that marks a connection as read-only."""
_BUSY = 30
"""Seconds for which SQLite lets one transaction wait for another."""
_PATIENCE = (
    "SELECT set_config('idle_in_transaction_session_timeout', '5000', true), set_config('lock_timeout', '10000', true)"
)
"""Two limits of PostgreSQL, in milliseconds. After the first limit, PostgreSQL ends the session of a process that stopped
within a transaction. After the second limit, a transaction stops waiting for a lock. Each transaction sets both limits for
itself: behind a pooler, the next transaction may have another session."""
_CONNECTING = 10
"""Seconds to wait for a connection to PostgreSQL, if the URL gives no other number."""
_NOT_YET = (
    "refused",
    "timeout expired",
    "timed out",
    "no such file or directory",
    "could not translate host name",
    "failed to resolve host",
    "is unreachable",
    "no route to host",
    "closed the connection",
    "connection reset",
    "is starting up",
    "is shutting down",
    "in recovery mode",
    "not yet accepting connections",
    "administrator command",
    "too many clients",
    "too many connections",
    "connection slots",
    "server_login_retry",
    "query_wait_timeout",
    "server conn crashed",
    "no more connections allowed",
)
"""Parts of error messages, in lower case. With these, the operating system, PostgreSQL and PgBouncer report that a database
cannot be reached now, or accepts no connection now."""


def _is_away(engine: Engine, error: Exception) -> bool:
    """Return whether a shared database may be reachable again later, without an action of the operator."""
    if engine.dialect.name != "postgresql" or not isinstance(error, OperationalError):
        return False
    said = str(error).lower()
    return "certificate" not in said and any(words in said for words in _NOT_YET)


def _address_of(where: str | Path) -> URL:
    """Return the address of a database.

    A path is never read as a URL: `?`, `#`, `%` or `file:` in a path are part of the file's name. The text after
    `sqlite:///` is a path too. postgres:// and postgresql://, which many services and tools use, also mean PostgreSQL.

    Raises:
        ExperimentError: An SQLite address does not name a file, or has options.
        ArgumentError: `where` is not an address.
    """
    if isinstance(where, Path):
        return URL.create("sqlite", database=str(where.absolute()))
    scheme, separator, rest = where.partition("://")
    if separator and scheme.partition("+")[0] == "sqlite":
        file = rest.removeprefix("/")
        if rest == file or file in ("", ":memory:"):
            raise ExperimentError(
                f"the database's address {where!r:.200} names no file, but a server's data must survive the server: give "
                "sqlite:///FILE.db, or sqlite:////FOLDER/FILE.db"
            )
        if "?" in file:
            raise ExperimentError(
                f"the database's address {where!r:.200} has a `?`, which begins options, but sumus accepts no options for "
                "SQLite: leave them out; if the file's own name has a `?`, give the file another name"
            )
        return URL.create("sqlite", database=str(Path(file).absolute()))
    if separator and scheme in ("postgres", "postgresql"):
        where = f"postgresql+psycopg://{rest}"
    return make_url(where)


class SqlStore:
    """A `Store` of one run, in a database that may hold other runs."""

    def __init__(self, engine: Engine, run: str) -> None:
        self._engine, self._run = engine, run

    @staticmethod
    def open(where: str | Path, run: str = "run") -> "SqlStore":
        """Open a database. Missing tables are created, and tables of an older version are upgraded.

        Args:
            where: An SQLite file, which only its owner may read afterwards; or a database's URL.
            run: The run whose rows the store holds.

        Raises:
            StorageAway: The database does not answer now; the same call may succeed later.
            ExperimentError: The database cannot be opened, was written by a newer sumus, or is an SQLite file on
                another machine's disk.
        """
        engine: Engine | None = None
        try:
            url = _address_of(where)
            shared = url.get_backend_name() == "postgresql"
            options = (
                {"prepare_threshold": None} if shared else {}
            )  # behind a pooler, the next session lacks this session's statements
            # parameters are hidden so that a log shows no device's id
            engine = create_engine(url, connect_args=options, hide_parameters=True)
            if shared:
                event.listen(engine, "begin", _be_patient)
            if engine.dialect.name == "sqlite":
                _refuse_network_disk(engine.url.database)
                _make_private(Path(str(engine.url.database)))
                _make_durable(engine)
            with engine.begin() as connection:
                bring_up_to_date(connection)
            return SqlStore(engine, run).beside(run)
        except (SQLAlchemyError, ModuleNotFoundError, ExperimentError) as error:
            if engine is not None:
                engine.dispose()
            if isinstance(error, ExperimentError):
                raise
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            if isinstance(error, ArgumentError | ModuleNotFoundError):
                raise ExperimentError(
                    f"the database's address is not understood ({reason}): give sqlite:///FILE.db or "
                    f"postgresql+psycopg://USER@HOST/NAME; if psycopg is missing, {extra('server')}"
                ) from error
            if "statement pooling mode" in reason:
                raise ExperimentError(
                    "the database is behind a pooler that may run each statement in another session (pool_mode = statement), "
                    "but sumus needs transactions: set pool_mode = transaction"
                ) from error
            kind = StorageAway if engine is not None and _is_away(engine, error) else ExperimentError
            raise kind(
                f"the database cannot be opened ({reason}): check that it exists, and that you may write to it"
            ) from error

    def transaction(self) -> AbstractContextManager[Rows]:
        return self._transaction()

    @contextmanager
    def _transaction(self) -> Generator[Rows, None, None]:
        with self._engine.begin() as connection:
            rows = self.rows(connection)
            rows.lock()
            yield rows
            rows.flush()

    def beside(self, run: str) -> "SqlStore":
        """Return another run's store in the same database, over the same connections. The run's first rows are written
        if needed."""
        store = SqlStore(self._engine, run)
        with self._engine.begin() as connection:
            store.rows(connection).begin()
        return store

    def runs(self) -> list[str]:
        """Return the names of all runs in the database."""
        with self._engine.begin() as connection:
            return list(connection.execute(select(RUN.c.run).order_by(RUN.c.run)).scalars())

    def identities(self) -> "SqlIdentities":
        """Return the devices and tokens in the same database."""
        return SqlIdentities(self._engine)

    def leases(self, clock: Callable[[], float] = time.time, shared: bool | None = None) -> "SqlLeases":
        """Return the leases of the same database, which apply to all its runs.

        Args:
            clock: The clock that SQLite's leases use, in seconds.
            shared: Whether processes take turns at leading. None means that they do on PostgreSQL only.
        """
        return SqlLeases(self._engine, clock, self._engine.dialect.name == "postgresql" if shared is None else shared)

    def rows(self, connection: Connection) -> "_SqlRows":
        """Return this run's rows in the transaction of a connection."""
        return _SqlRows(connection, self._run)

    def backup(self, path: Path) -> None:
        """Copy all runs of an SQLite database to a new file, as they are at one moment. Transactions continue meanwhile.

        All data that could decrypt sums is left out: the keys and seeds of rounds, and the rows that name the blobs of their
        shards. So a round that has not ended at the time of the backup is lost when the backup is restored.

        Raises:
            UsageError: The database is PostgreSQL, which has its own program for backups.
            ExperimentError: The file exists already, or cannot be written.
        """
        if self._engine.dialect.name != "sqlite":
            raise UsageError(
                "this command copies only SQLite databases, but this database is PostgreSQL: use pg_dump "
                "--exclude-table-data=note --exclude-table-data=shard, so that the backup holds no keys of rounds' sums"
            )
        copy_to(path, Path(str(self._engine.url.database)))

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


class _SqlRows:
    """The rows in one transaction on a connection. Changes are sent to the database at the end, or before a query that
    must see them."""

    def __init__(self, connection: Connection, run: str) -> None:
        self.connection, self._name = connection, run
        self._runs = CachedTable(connection, RUN, run)
        self._rounds = CachedTable(connection, ROUND, run)
        self._sessions = CachedTable(connection, SESSION, run)
        self._devices = CachedTable(connection, DEVICE, run)
        self._counted = CachedTable(connection, COUNTED, run, once=True)
        self._shards = CachedTable(connection, SHARD, run)
        self._notes = CachedTable(connection, NOTE, run)
        self._models = CachedTable(connection, MODEL, run)
        self._unchecked: dict[str, int | None] = {}
        self._at = RunRow()

    def begin(self) -> None:
        """Write the run's first rows, if they do not exist."""
        alone(self.connection)
        if self._runs.get() is None:
            self._runs.put(_RUN_VALUES(RunRow()))
            if self._rounds.get(0) is None:
                self.put_round(Round(0))
        self.flush()

    def lock(self) -> None:
        """Lock the run's row: wait for other transactions of this run, and make later ones wait."""
        self._at = RunRow(*self._runs.find(_LOCK, {})[0])

    def flush(self) -> None:
        """Write all pending changes."""
        self._count()
        for table in (self._runs, self._rounds, self._sessions, self._devices, self._shards, self._notes, self._models):
            table.flush()

    def run(self) -> RunRow:
        return self._at

    def round(self, number: int) -> Round | None:
        found = self._rounds.get(number)
        return None if found is None else _round(found)

    def rounds(self) -> Sequence[Round]:
        return [_round(found) for found in self._rounds.find(_ROUNDS, {})]

    def session(self, id: str) -> Session | None:
        found = self._sessions.get(id)
        return None if found is None else Session(*found)

    def device(self, id: str) -> DeviceRow | None:
        found = self._devices.get(id)
        if found is None:
            return None
        _, session, *others = found
        return DeviceRow(id, None if session is None else self.session(session), *others)

    def overdue(self, now: float) -> Sequence[str]:
        return [found[0] for found in self._sessions.find(_AWAITED, {"until": now})]

    def out_since(self, began: float) -> Sequence[str]:
        return [found[0] for found in self._sessions.find(_OUT_SINCE, {"until": began})]

    def sessions_out(self) -> Sequence[str]:
        return self.overdue(float("inf"))

    def read_ahead(self, devices: Sequence[str] = (), sessions: Sequence[str] = ()) -> None:
        self._sessions.read(sessions)
        self._counted.read(sessions)
        of_sessions = (found[1] for id in sessions if (found := self._sessions.get(id)) is not None)
        ids = [*devices, *of_sessions]
        self._devices.read(ids)
        known = (found for id in ids if (found := self._devices.get(id)) is not None)
        self._sessions.read(id for _, session, _, counted, *_ in known for id in (session, counted) if id is not None)

    def counted_in(self, number: int) -> Sequence[str]:
        self._count()
        return [found[0] for found in self._counted.find(_COUNTED, {"number": number})]

    def sum_of(self, id: str) -> int | None:
        if (pending := self._unchecked.get(id)) is not None:
            return pending
        found = self._counted.get(id)
        return None if found is None else found[1]

    def put_run(self, run: RunRow) -> None:
        self._runs.put(_RUN_VALUES(run))
        self._at = run

    def put_round(self, row: Round) -> None:
        self._rounds.put(_ROUND_VALUES(row))

    def put_session(self, row: Session) -> None:
        if self._unchecked.setdefault(row.id, row.sum) != row.sum:
            self._count()
            self._unchecked[row.id] = row.sum
        self._sessions.put(_SESSION_VALUES(row))

    def put_device(self, row: DeviceRow) -> None:
        session = None if row.session is None else row.session.id
        self._devices.put((row.id, session, *_DEVICE_VALUES(row)))

    def drop_session(self, id: str) -> None:
        self._sessions.drop(id)

    def forget_device(self, id: str) -> None:
        self._devices.drop(id)
        for session, *_ in self._sessions.find(_OF_DEVICE, {"device": id}):
            self._sessions.drop(session)

    def shards(self, number: int) -> Sequence[Shard]:
        return [Shard(*found) for found in self._shards.find(_SHARDS, {"number": number})]

    def put_shard(self, row: Shard) -> None:
        before = self._shards.get(row.round, row.name)
        if row.seq != 1 + (0 if before is None else Shard(*before).seq):
            raise Fenced
        self._shards.put(_SHARD_VALUES(row))

    def drop_shards(self, number: int) -> None:
        for shard in self.shards(number):
            self._shards.drop(number, shard.name)

    def note(self, number: int, name: str) -> bytes | None:
        found = self._notes.get(number, name)
        return None if found is None else found[-1]

    def put_note(self, number: int, name: str, body: bytes | None) -> None:
        if body is None:
            self._notes.drop(number, name)
        else:
            self._notes.put((number, name, body))

    def model(self, version: int) -> Model | None:
        found = self._models.get(version)
        return None if found is None else Model(*found)

    def models(self) -> Sequence[Model]:
        return [Model(*found) for found in self._models.find(_MODELS, {})]

    def put_model(self, row: Model) -> None:
        self._models.put(_MODEL_VALUES(row))

    def drop_model(self, version: int) -> None:
        self._models.drop(version)

    def forget_rounds_before(self, number: int) -> None:
        self.flush()
        for statement in _FORGET:
            self.connection.execute(statement, {"run": self._name, "number": number})
        for table in (self._rounds, self._counted, self._shards, self._notes):
            table.forget()

    def _count(self) -> None:
        """Record which of the written sessions are counted.

        Raises:
            Fenced: A session was already counted, and is now in another sum or in no sum.
        """
        put, self._unchecked = self._unchecked, {}
        self._counted.read(put)
        places = dict[int, int]()
        for id, number in put.items():
            before = self._counted.get(id)
            if before is not None and before[1] != number:
                raise Fenced
            if before is None and number is not None:
                place = places.get(number)
                if place is None:
                    last = self.connection.execute(_LAST_PLACE, {"run": self._name, "number": number}).scalar()
                    place = 0 if last is None else last + 1
                self._counted.put((id, number, place))
                places[number] = place + 1
        try:
            self._counted.flush()
        except IntegrityError as error:
            raise Fenced from error


def _refuse_network_disk(file: str | None) -> None:
    if file and (kind := network_disk(Path(file))):
        raise ExperimentError(
            f"{file} is on another machine's disk ({kind}), where SQLite's locks do not work: put it on a disk of this "
            "machine, or use PostgreSQL"
        )


def _make_private(file: Path) -> None:
    """Make a database's file readable only for its owner, from the first byte on. SQLite gives its other files the
    same mode."""
    with suppress(OSError):  # SQLite then reports the error
        file.touch(0o600)
        file.chmod(0o600)


def _be_patient(connection: Connection) -> None:
    connection.exec_driver_sql(_PATIENCE)


def _make_durable(engine: Engine) -> None:
    """Set SQLite's options for each connection.

    A transaction that may write takes the write lock at its beginning. Committed data is on the disk. Deleted data is
    overwritten.
    """

    def connected(connection: Any, record: object) -> None:
        connection.isolation_level = None  # sqlite3 then begins no transaction by itself
        for pragma in (f"busy_timeout={_BUSY * 1000}", "synchronous=FULL", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}")
        _write_ahead(connection)

    def begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get(_READS) else "BEGIN IMMEDIATE")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turn on write-ahead logging. If several processes do so at the same time, only one succeeds, and the others fail
    immediately and retry."""
    until = time.monotonic() + _BUSY
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _round(found: Row) -> Round:
    number, state, *others = found
    return Round(number, State(state), *others)


class SqlIdentities:
    """`Identities` in a database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def transaction(self) -> AbstractContextManager[IdentityRows]:
        return self._transaction()

    @contextmanager
    def _transaction(self) -> Generator[IdentityRows, None, None]:
        with self._engine.begin() as connection:
            alone(connection)
            rows = _SqlIdentityRows(connection)
            yield rows
            rows.flush()

    def find(self, id: str) -> Identity | None:
        with self._engine.connect().execution_options(**{_READS: True}) as connection:
            return _SqlIdentityRows(connection).identity(id)

    def find_members(self, devices: Sequence[str]) -> Sequence[Member]:
        with self._engine.connect().execution_options(**{_READS: True}) as connection:
            rows = _SqlIdentityRows(connection)
            rows.read_ahead(devices)
            return [row for device in devices if (row := rows.member(device)) is not None]


class _SqlIdentityRows:
    """The rows of identities in one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._tokens = CachedTable(connection, TOKEN)
        self._identities = CachedTable(connection, IDENTITY)
        self._members = CachedTable(connection, MEMBER)

    def flush(self) -> None:
        """Write all pending changes."""
        for table in (self._tokens, self._identities, self._members):
            table.flush()

    def token(self, hash: str) -> Token | None:
        found = self._tokens.get(hash)
        return None if found is None else Token(*found)

    def tokens(self) -> Sequence[Token]:
        return [Token(*found) for found in self._tokens.find(_TOKENS, {})]

    def put_token(self, row: Token) -> None:
        self._tokens.put(_TOKEN_VALUES(row))

    def drop_token(self, hash: str) -> None:
        self._tokens.drop(hash)

    def identity(self, id: str) -> Identity | None:
        found = self._identities.get(id)
        return None if found is None else Identity(*found)

    def identities(self, after: str = "", limit: int = 100) -> Sequence[Identity]:
        return [Identity(*found) for found in self._identities.find(_IDENTITIES, {"after": after, "limit": limit})]

    def put_identity(self, row: Identity) -> None:
        self._identities.put(_IDENTITY_VALUES(row))

    def count(self, population: str) -> int:
        self._identities.flush()
        return int(self._connection.execute(_ENROLLED, {"population": population}).scalar_one())

    def read_ahead(self, devices: Sequence[str]) -> None:
        self._identities.read(devices)
        self._members.read(devices)

    def member(self, device: str) -> Member | None:
        found = self._members.get(device)
        return None if found is None else Member(*found)

    def count_members(self, edge: str) -> int:
        self._members.flush()
        return int(self._connection.execute(_MEMBERS, {"edge": edge}).scalar_one())

    def put_member(self, row: Member) -> None:
        self._members.put(_MEMBER_VALUES(row))

    def drop_member(self, device: str) -> None:
        self._members.drop(device)

    def drop_members(self, edge: str, before: float = math.inf) -> None:
        self._members.flush()
        self._connection.execute(delete(MEMBER).where(MEMBER.c.edge == edge, MEMBER.c.seen < before))
        self._members.forget()


class SqlLeases:
    """`Leases` in a database."""

    def __init__(self, engine: Engine, clock: Callable[[], float], shared: bool) -> None:
        self._engine, self._clock, self._shared = engine, clock, shared
        self._serials = Serials()
        new = {"name": "leader", "holder": "", "fence": 0, "expires": 0.0}
        with engine.begin() as connection:
            connection.execute(insert_into(LEASE, engine.dialect.name).values(new).on_conflict_do_nothing())

    @property
    def shared(self) -> bool:
        return self._shared

    def now(self) -> float:
        if self._engine.dialect.name != "postgresql":
            return self._clock()
        with self._engine.connect() as connection:
            return self._now(connection)

    def hold(self, holder: str, lasts: float, begins: bool = False) -> Lease:
        with self._engine.connect().execution_options(**{_READS: True}) as connection:
            row = Lease(*connection.execute(_LEASE).one())
            if after(row, holder, lasts, self._now(connection), begins, self._shared) is row:
                return row  # another holder has the lease: no lock is taken, so a waiting replica blocks no other
        with self._engine.begin() as connection:
            row = Lease(*connection.execute(_LEASE.with_for_update()).one())
            mine = after(row, holder, lasts, self._now(connection), begins, self._shared)
            if mine.fence != row.fence:
                connection.execute(_RUNS_LOCKED).all()  # this wait may be long; the lease's time starts after it
                mine = after(row, holder, lasts, self._now(connection), begins, self._shared)
                connection.execute(update(RUN).values(fence=mine.fence))
            connection.execute(update(LEASE).values(holder=mine.holder, fence=mine.fence, expires=mine.expires))
            return mine

    def leave(self, holder: str) -> None:
        with self._engine.begin() as connection:
            connection.execute(delete(REPLICA).where(REPLICA.c.name == holder.rpartition("/")[0]))
            connection.execute(update(LEASE).where(LEASE.c.holder == holder).values(expires=0.0))

    def beat(self, name: str, serves: str, rows: Rows | None = None) -> None:
        with self._within(rows) as connection:
            now = self._now(connection)
            replicas = CachedTable(connection, REPLICA)
            replicas.put((name, serves, now))
            replicas.flush()
            connection.execute(delete(REPLICA).where(REPLICA.c.seen < now - _LONG_GONE))

    def present(self, within: float, rows: Rows | None = None) -> Sequence[PresentReplica]:
        with self._within(rows, reads=True) as connection:
            found = connection.execute(_PRESENT, {"since": self._now(connection) - within}).all()
            return [PresentReplica(*row) for row in found]

    @contextmanager
    def _within(self, rows: Rows | None, reads: bool = False) -> Generator[Connection, None, None]:
        """Yield a connection with a running transaction: the connection of `rows`, or a new one.

        Within a transaction, no second connection is opened: a pooler may have no other connection, and would wait until
        the first is returned.
        """
        if isinstance(rows, _SqlRows):
            yield rows.connection
        elif reads:
            with self._engine.connect().execution_options(**{_READS: True}) as connection:
                yield connection
        else:
            with self._engine.begin() as connection:
                yield connection

    def raise_serials(self, asked: Mapping[str, int], known: Mapping[str, int] = {}) -> Mapping[str, int]:
        if not self._shared:
            return self._serials.raise_all(asked, known)
        with self._engine.begin() as connection:
            if self._engine.dialect.name == "postgresql":  # a crash may lose serials, as in a process's memory
                connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")
            table, last = CachedTable(connection, SERIAL), dict[str, int]()
            table.read(asked)
            for device in asked:
                found = table.get(device)
                last[device] = max(-1 if found is None else found[1], known.get(device, -1))
            higher = {
                device: serial
                for device, serial in sorted(asked.items())
                if serial > last[device] and is_near(serial, last[device])
            }
            if higher:
                _raise_serials(self._engine.dialect.name).say(connection, list(higher.items()))
            return last | higher

    def forget_serial(self, device: str) -> None:
        if not self._shared:
            self._serials.forget(device)
            return
        with self._engine.begin() as connection:
            connection.execute(delete(SERIAL).where(SERIAL.c.device == device))

    def _now(self, connection: Connection) -> float:
        if self._engine.dialect.name != "postgresql":
            return self._clock()
        return float(connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one())


@cache
def _raise_serials(dialect: str) -> BulkStatement:
    """Return the statement that writes (device, serial), if the serial is higher than the stored one."""
    return put_rows(SERIAL, dialect, where=lambda put: SERIAL.c.serial < put.excluded.serial)
