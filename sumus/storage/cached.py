"""A table's rows as one transaction sees them: read once, written together at its end."""

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
"""A table's columns, in their order; without `run`. Its key comes first."""
Put: TypeAlias = postgresql.Insert | sqlite.Insert
_AT_ONCE = 500
"""Keys in one statement, fewer than any database's limit of parameters."""


class CachedTable:
    """The rows of a table; of one run, where it has those.

    once: rows are written once, and a second row of the same key raises IntegrityError in `flush`.
    """

    def __init__(self, connection: Connection, table: Table, run: str | None = None, once: bool = False) -> None:
        self._connection = connection
        self._said = _statements(table, connection.dialect.name, once)
        self._run = () if run is None else (run,)
        self._of = {} if run is None else {"run": run}
        self._stored: dict[Row, Row | None] = {}
        self._put: dict[Row, Row | None] = {}

    def get(self, *key: Any) -> Row | None:
        """A row by its key."""
        if key in self._put:
            return self._put[key]
        if key not in self._stored:
            named = dict(zip(self._said.key, key, strict=True))
            found = self._connection.execute(self._said.one, self._of | named).one_or_none()
            self._stored[key] = None if found is None else tuple(found)
        return self._stored[key]

    def put(self, row: Row) -> None:
        """Write a row."""
        self._put[row[: len(self._said.key)]] = row

    def drop(self, *key: Any) -> None:
        """Forget a row, if it is there."""
        self._put[key] = None

    def read(self, keys: Iterable[Any]) -> None:
        """Read rows by their keys, which are one column, so that `get` need not."""
        missing = [key for key in dict.fromkeys(keys) if (key,) not in self._stored]
        for first in range(0, len(missing), _AT_ONCE):
            part = missing[first : first + _AT_ONCE]
            self._stored |= {(key,): None for key in part}
            self._learn(self._connection.execute(self._said.many, {**self._of, "keys": part}))

    def find(self, statement: Select[Any], values: Mapping[str, Any]) -> list[Row]:
        """The rows that a statement selects, with all their columns; what was put is written before."""
        self.flush()
        return self._learn(self._connection.execute(statement, self._of | dict(values)))

    def flush(self) -> None:
        """Write what was put, and is not there already."""
        put, self._put = self._put, {}
        changes = {key: row for key, row in put.items() if key not in self._stored or self._stored[key] != row}
        if gone := [self._run + key for key, row in changes.items() if row is None]:
            self._said.drop.say(self._connection, gone)
        if new := [self._run + row for row in changes.values() if row is not None]:
            self._said.put.say(self._connection, new)
        self._stored |= changes

    def forget(self) -> None:
        """Know nothing any more: rows were changed by another way."""
        self._put, self._stored = {}, {}

    def _learn(self, found: Iterable[Any]) -> list[Row]:
        rows = [tuple(row) for row in found]
        self._stored |= {row[: len(self._said.key)]: row for row in rows}
        return rows


class BulkStatement:
    """A statement that is said of many rows at once, which SQLAlchemy does not have to look at one by one.

    On PostgreSQL it takes an array for each column. Of a list of rows psycopg would make a pipeline, and as long as one is not at
    its end PostgreSQL does not count a process as idle: one that is stopped there would hold its locks for ever
    (docs/decisions/0027-rows-in-arrays.md).
    """

    def __init__(
        self, dialect: str, make: Callable[[Select[Any] | None], Insert | Delete], columns: Sequence[Column[Any]]
    ) -> None:
        """make(rows) → the statement; rows: a query of the columns' arrays, None where values take their place."""
        self._in_arrays = dialect == "postgresql"
        self._numbers = [isinstance(column.type, Double) for column in columns]
        if self._in_arrays:
            arrays = (bindparam(column.name, type_=postgresql.ARRAY(column.type)) for column in columns)
            rows = func.unnest(*arrays).table_valued(*(column.name for column in columns)).render_derived()
            self._text = str(make(select(rows)).compile(dialect=psycopg.dialect(paramstyle="format")))
        else:
            self._text = str(make(None).compile(dialect=sqlite.dialect()))

    def say(self, connection: Connection, rows: Sequence[Row]) -> None:
        """Say it. rows: one at least; values in the columns' order."""
        if not self._in_arrays:
            connection.exec_driver_sql(self._text, list(rows))
            return
        columns = zip(self._numbers, zip(*rows, strict=True), strict=True)  # psycopg takes no whole number among others
        arrays = tuple(list(map(float, values)) if numbers else list(values) for numbers, values in columns)
        connection.exec_driver_sql(self._text, arrays)


@dataclass(frozen=True)
class _Statements:
    """Of a table. put, drop: of rows with `run` before all other columns."""

    key: tuple[str, ...]
    one: Select[Any]
    many: Select[Any]
    put: BulkStatement
    drop: BulkStatement


@cache
def _statements(table: Table, dialect: str, once: bool) -> _Statements:
    """Made once: SQLAlchemy keeps what it made of a statement with it."""
    columns = [column for column in table.columns if column.name != "run"]
    key = [column for column in columns if column.primary_key]
    whole_key = [column for column in table.columns if column.primary_key]
    mine = and_(true(), *(table.c.run == bindparam("run") for _ in range("run" in table.c)))
    this = and_(mine, *(column == bindparam(column.name) for column in key))
    if dialect == "postgresql":  # one parameter, so one plan for however many there are
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
    """Write rows, in place of those that are there. once: none is.  where: of a row that is to take another's place."""

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
    """An INSERT that may say what to do where a row is there already."""
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
