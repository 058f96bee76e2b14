"""A copy of an SQLite database that opens no sum of a round."""

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from sqlalchemy import URL, create_engine
from sqlalchemy.exc import SQLAlchemyError

from sumus.errors import ExperimentError
from sumus.storage.files import sync
from sumus.storage.migrations import bring_up_to_date
from sumus.storage.tables import NOTE, SHARD, TABLES

_LEFT_OUT = {SHARD.name: "0", NOTE.name: "name NOT IN ('key', 'seed')"}
"""What rows of a table are copied, where not all are."""


def copy_to(path: Path, database: Path) -> None:
    """Copy a database's rows, as they are at one moment, to a new file, whole and on the disk when this returns."""
    if path.exists():
        raise ExperimentError(f"{path} is there already: give the backup a name of its own")
    path = path.absolute()  # of a relative path that begins with `file:`, SQLite makes a URI
    new = path.with_name(path.name + ".new")
    try:
        new.unlink(missing_ok=True)
        new.touch(0o600)
        _make(new)
        with closing(sqlite3.connect(database, isolation_level=None, timeout=30.0)) as connection:
            connection.execute("ATTACH ? AS backup", [os.fsencode(new)])
            connection.execute("BEGIN")
            for table in TABLES.sorted_tables:
                columns = ", ".join(f'"{column.name}"' for column in table.columns)
                which = _LEFT_OUT.get(table.name, "1")
                connection.execute(
                    f'INSERT INTO backup."{table.name}" ({columns}) SELECT {columns} FROM main."{table.name}" WHERE {which}'
                )
            connection.execute("COMMIT")
        sync(new)
        new.replace(path)
        sync(path.parent)
    except (OSError, sqlite3.Error, SQLAlchemyError) as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise ExperimentError(
            f"the backup cannot be written to {path} ({reason}): see to the folder and its disk"
        ) from error


def _make(path: Path) -> None:
    """An empty database."""
    engine = create_engine(URL.create("sqlite", database=str(path)))
    try:
        with engine.begin() as connection:
            bring_up_to_date(connection)
    finally:
        engine.dispose()
