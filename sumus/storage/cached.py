"""A table's rows in one transaction: each row is read once, and all changes are written together at the end."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Delete,
    Double,
    Insert,
    Select,
    Table,
    and_,
    any_,
    bindparam,
    delete,
    func,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import psycopg

from sumus.storage.tables import TEXT

Row: TypeAlias = tuple[Any, ...]
"""A table's columns in their order, without `run`. The primary key comes first."""
Put: TypeAlias = postgresql.Insert | sqlite.Insert
_AT_ONCE = 500
"""The largest number of keys in one statement. It is below the limit of parameters of every database."""


class CachedTable:
    """The rows of a table in one transaction; if `run` is given, only the rows of this run.

    Args:
        connection: The connection of the transaction.
        table: The table.
        run: The run's name, for tables with a column `run`.
        once: Whether rows may only be inserted. A second row with the same key then raises IntegrityError in `flush`.
    """

    def __init__(self, connection: Connection, table: Table, run: str | None = None, once: bool = False) -> None:
        self._connection = connection
        self._said = _statements(table, connection.dialect.name, once)
        self._run = () if run is None else (run,)
        self._of = {} if run is None else {"run": run}
        self._stored: dict[Row, Row | None] = {}
        self._put: dict[Row, Row | None] = {}

    def get(self, *key: Any) -> Row | None:
        """Return a row by its key; None if the row does not exist."""
        if key in self._put:
            return self._put[key]
        if key not in self._stored:
            named = dict(zip(self._said.key, key, strict=True))
            found = self._connection.execute(self._said.one, self._of | named).one_or_none()
            self._stored[key] = None if found is None else tuple(found)
        return self._stored[key]

    def put(self, row: Row) -> None:
        """Write a row at the next `flush`."""
        self._put[row[: len(self._said.key)]] = row

    def drop(self, *key: Any) -> None:
        """Delete a row at the next `flush`, if the row exists."""
        self._put[key] = None

    def read(self, keys: Iterable[Any]) -> None:
        """Read many rows in few statements, so that `get` then finds them in memory. The key must be a single column."""
        missing = [key for key in dict.fromkeys(keys) if (key,) not in self._stored]
        for first in range(0, len(missing), _AT_ONCE):
            part = missing[first : first + _AT_ONCE]
            self._stored |= {(key,): None for key in part}
            self._learn(self._connection.execute(self._said.many, {**self._of, "keys": part}))

    def find(self, statement: Select[Any], values: Mapping[str, Any]) -> list[Row]:
        """Return the rows that a statement selects, with all their columns. Pending changes are flushed first."""
        self.flush()
        return self._learn(self._connection.execute(statement, self._of | dict(values)))

    def flush(self) -> None:
        """Write the pending changes. Rows that would not change are left out."""
        put, self._put = self._put, {}
        changes = {key: row for key, row in put.items() if key not in self._stored or self._stored[key] != row}
        if gone := [self._run + key for key, row in changes.items() if row is None]:
            self._said.drop.say(self._connection, gone)
        if new := [self._run + row for row in changes.values() if row is not None]:
            self._said.put.say(self._connection, new)
        self._stored |= changes

    def forget(self) -> None:
        """Forget all rows and pending changes, since another statement has changed the table."""
        self._put, self._stored = {}, {}

    def _learn(self, found: Iterable[Any]) -> list[Row]:
        rows = [tuple(row) for row in found]
        self._stored |= {row[: len(self._said.key)]: row for row in rows}
        return rows


class BulkStatement:
    """A statement that is executed for many rows at once.

    It is compiled once, so SQLAlchemy does not process each row. On PostgreSQL the statement takes one array for each
    column. With a list of rows, psycopg would use a pipeline. Until a pipeline ends, PostgreSQL does not count its
    process as idle. A process that stops within a pipeline would therefore keep its locks for ever
    (docs/decisions/0027-rows-in-arrays.md).
    """

    def __init__(
        self, dialect: str, make: Callable[[Select[Any] | None], Insert | Delete], columns: Sequence[Column[Any]]
    ) -> None:
        """Compile the statement.

        Args:
            dialect: The name of the database's dialect: "sqlite" or "postgresql".
            make: Function that makes the statement. Its argument is a query that turns the columns' arrays into rows, or
                None for a statement that takes the values of one row.
            columns: The columns of a row, in their order.
        """
        self._in_arrays = dialect == "postgresql"
        self._numbers = [isinstance(column.type, Double) for column in columns]
        if self._in_arrays:
            arrays = (bindparam(column.name, type_=postgresql.ARRAY(column.type)) for column in columns)
            rows = func.unnest(*arrays).table_valued(*(column.name for column in columns)).render_derived()
            self._text = str(make(select(rows)).compile(dialect=psycopg.dialect(paramstyle="format")))
        else:
            self._text = str(make(None).compile(dialect=sqlite.dialect()))

    def say(self, connection: Connection, rows: Sequence[Row]) -> None:
        """Execute the statement for these rows.

        Args:
            connection: The connection.
            rows: At least one row. The values are in the order of the columns.
        """
        if not self._in_arrays:
            connection.exec_driver_sql(self._text, list(rows))
            return
        # psycopg takes no integer in an array of floats
        columns = zip(self._numbers, zip(*rows, strict=True), strict=True)
        arrays = tuple(list(map(float, values)) if numbers else list(values) for numbers, values in columns)
        connection.exec_driver_sql(self._text, arrays)


@dataclass(frozen=True)
class _Statements:
    """The statements of one table.

    Attributes:
        key: Names of the columns of the primary key, without `run`.
        one: Selects the row of one key.
        many: Selects the rows of many keys.
        put: Writes rows. `run` comes before all other columns.
        drop: Deletes rows by key. `run` comes before all other columns.
    """

    key: tuple[str, ...]
    one: Select[Any]
    many: Select[Any]
    put: BulkStatement
    drop: BulkStatement


@cache
def _statements(table: Table, dialect: str, once: bool) -> _Statements:
    """Make a table's statements. They are cached, since SQLAlchemy caches a compiled statement together with the
    statement."""
    columns = [column for column in table.columns if column.name != "run"]
    key = [column for column in columns if column.primary_key]
    whole_key = [column for column in table.columns if column.primary_key]
    mine = and_(true(), *(table.c.run == bindparam("run") for _ in range("run" in table.c)))
    this = and_(mine, *(column == bindparam(column.name) for column in key))
    if dialect == "postgresql":  # one parameter, so that any number of keys has the same query plan
        these = (column == any_(bindparam("keys", type_=postgresql.ARRAY(TEXT))) for column in key)
    else:
        these = (column.in_(bindparam("keys", expanding=True)) for column in key)

    def drop(rows: Select[Any] | None) -> Delete:
        return delete(table).where(this if rows is None else tuple_(*whole_key).in_(rows))

    return _Statements(
        tuple(column.name for column in key),
        select(*columns).where(this),
        select(*columns).where(mine, *these),
        put_rows(table, dialect, once),
        BulkStatement(dialect, drop, whole_key),
    )


def put_rows(
    table: Table, dialect: str, once: bool = False, where: Callable[[Put], ColumnElement[bool]] | None = None
) -> BulkStatement:
    """Make a statement that writes rows. A row replaces an existing row with the same key.

    Args:
        table: The table.
        dialect: "sqlite" or "postgresql".
        once: Whether rows may only be inserted. If so, a row with an existing key is an error.
        where: The condition under which a new row replaces an existing one. Its argument is the INSERT. None means
            always.
    """

    def put(rows: Select[Any] | None) -> Put:
        new = insert_into(table, dialect)
        if rows is not None:
            new = new.from_select([column.name for column in table.columns], rows)
        if once:
            return new
        others = {column.name: new.excluded[column.name] for column in table.columns if not column.primary_key}
        return new.on_conflict_do_update(
            index_elements=list(table.primary_key), set_=others, where=None if where is None else where(new)
        )

    return BulkStatement(dialect, put, list(table.columns))


def insert_into(table: Table, dialect: str) -> Put:
    """Return an INSERT to which ON CONFLICT can be added."""
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
