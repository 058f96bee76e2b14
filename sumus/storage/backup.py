"""A copy of an SQLite database, without any data that could decrypt a round's sum."""

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
"""For each table that is copied only in part: the SQL condition that selects the copied rows."""


def copy_to(path: Path, database: Path) -> None:
    """Copy the rows of a database, as they are at one moment, to a new file.

    The copy is complete and on the disk when this function returns. Shards, keys and seeds are left out (`_LEFT_OUT`).

    Args:
        path: The new file. No file of this name may exist.
        database: The database's file.

    Raises:
        ExperimentError: The file exists already, or cannot be written.
    """
    if path.exists():
        raise ExperimentError(f"{path} already exists: give the backup another name")
    path = path.absolute()  # SQLite would read a relative path that begins with `file:` as a URI
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
            f"the backup cannot be written to {path} ({reason}): check the folder and its disk"
        ) from error


def _make(path: Path) -> None:
    """Make an empty database with all tables."""
    engine = create_engine(URL.create("sqlite", database=str(path)))
    try:
        with engine.begin() as connection:
            bring_up_to_date(connection)
    finally:
        engine.dispose()
