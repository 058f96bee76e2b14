"""A table's rows as one transaction sees them: read once, written together at its end."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from sqlalchemy import Connection, Delete, Insert, Select, Table, and_, any_, bindparam, delete, insert, select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import psycopg

from sumus.storage.tables import TEXT

Row: TypeAlias = tuple[Any, ...]
"""A table's columns, in their order; without `run`. Its key comes first."""
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
            self._connection.exec_driver_sql(self._said.drop, gone)
        if new := [self._run + row for row in changes.values() if row is not None]:
            self._connection.exec_driver_sql(self._said.put, new)
        self._stored |= changes

    def forget(self) -> None:
        """Know nothing any more: rows were changed by another way."""
        self._put, self._stored = {}, {}

    def _learn(self, found: Iterable[Any]) -> list[Row]:
        rows = [tuple(row) for row in found]
        self._stored |= {row[: len(self._said.key)]: row for row in rows}
        return rows


@dataclass(frozen=True)
class _Statements:
    """Of a table. put, drop: as the driver takes them, with values in the order of the columns, `run` before them."""

    key: tuple[str, ...]
    one: Select[Any]
    many: Select[Any]
    put: str
    drop: str


@cache
def _statements(table: Table, dialect: str, once: bool) -> _Statements:
    """Made once: SQLAlchemy keeps what it made of a statement with it."""
    columns = [column for column in table.columns if column.name != "run"]
    key = [column for column in columns if column.primary_key]
    mine = and_(true(), *(table.c.run == bindparam("run") for _ in range("run" in table.c)))
    this = and_(mine, *(column == bindparam(column.name) for column in key))
    if dialect == "postgresql":  # one parameter, so one plan for however many there are
        these = (column == any_(bindparam("keys", type_=postgresql.ARRAY(TEXT))) for column in key)
    else:
        these = (column.in_(bindparam("keys", expanding=True)) for column in key)
    return _Statements(
        tuple(column.name for column in key),
        select(*columns).where(this),
        select(*columns).where(mine, *these),
        _text(insert(table) if once else _upsert(table, dialect), dialect),
        _text(delete(table).where(this), dialect),
    )


def _text(statement: Insert | Delete, dialect: str) -> str:
    """Of a statement that is said of many rows at once, which SQLAlchemy does not have to look at one by one."""
    return str(
        statement.compile(dialect=psycopg.dialect(paramstyle="format") if dialect == "postgresql" else sqlite.dialect())
    )


def _upsert(table: Table, dialect: str) -> Insert:
    """Write a row, in place of the one that is there."""
    put = (postgresql.insert if dialect == "postgresql" else sqlite.insert)(table)
    others = {column.name: put.excluded[column.name] for column in table.columns if not column.primary_key}
    return put.on_conflict_do_update(index_elements=list(table.primary_key), set_=others)
