"""A node's SQLite file: its readings, and its records of files and topics.

    file = ReadingsFile("DATA")
    with file.transaction() as database: ...           all or nothing; on the disk at the end of the block
    with file.reading() as database: ...
    file.close()

Only its owner has access to the file, and one process uses it at a time.
"""

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from sumus.errors import ExperimentError
from sumus.storage.files import make_private_folder, sync

FILE = "readings.db"
_TABLES = """
CREATE TABLE IF NOT EXISTS readings (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, key TEXT UNIQUE, input BLOB NOT NULL, target BLOB, came BLOB
);
CREATE INDEX IF NOT EXISTS by_time ON readings (at);
CREATE TABLE IF NOT EXISTS forms (what TEXT PRIMARY KEY, form TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS targets (what TEXT PRIMARY KEY, number INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, inode TEXT NOT NULL, offset INTEGER NOT NULL, mark BLOB NOT NULL,
    size INTEGER NOT NULL, changed INTEGER NOT NULL, head BLOB NOT NULL, decimal TEXT NOT NULL, separator TEXT NOT NULL,
    half TEXT NOT NULL, at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS topics (topic TEXT PRIMARY KEY, mark BLOB NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS moved (
    place TEXT PRIMARY KEY, inode TEXT NOT NULL, size INTEGER NOT NULL, changed INTEGER NOT NULL, at REAL NOT NULL
);
"""
_COLUMNS_SINCE = {"came": "BLOB"}
"""Columns of the table `readings` that files of earlier releases lack. came: the target that arrived with the reading."""


class ReadingsFile:
    """The open file of a node.

    Args:
        folder: The node's folder; it is made if it does not exist.

    Raises:
        ExperimentError: Another process uses the file, it is damaged, or the folder is not writable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).absolute() / FILE  # SQLite takes a relative path that begins with `file:` for a URI
        self.database = self._opened()

    def close(self) -> None:
        """Close the file, so that another process can use it."""
        self.database.close()

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection, None, None]:
        """Open a transaction for a `with` block: either all of its writes are stored, or none.

        Raises:
            ExperimentError: The file is not writable. Its contents are unchanged.
        """
        try:
            self.database.execute("BEGIN IMMEDIATE")
            yield self.database
            self.database.execute("COMMIT")
        except BaseException as error:  # also Ctrl-C: the file must not stay in the middle of a transaction
            with suppress(sqlite3.Error):  # it may have been rolled back already
                self.database.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise ExperimentError(
                    f"nothing can be stored in {self.path}: {error}; check the disk. The stored data are unchanged"
                ) from error
            raise

    @contextmanager
    def reading(self) -> Generator[sqlite3.Connection, None, None]:
        """Open the file for reading while a `with` block runs.

        Raises:
            ExperimentError: The file cannot be read.
        """
        try:
            yield self.database
        except sqlite3.Error as error:
            raise ExperimentError(f"{self.path} cannot be read: {error}; check the disk") from error

    def _opened(self) -> sqlite3.Connection:
        folder = self.path.parent
        try:
            make_private_folder(folder)
            self.path.touch(0o600)
            sync(folder)
            self.path.chmod(0o600)  # SQLite gives the files beside it the same mode
            database = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ExperimentError(
                f"nothing can be stored in {folder}: {error}; give a folder in which you can write"
            ) from error
        try:
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA secure_delete = ON")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.executescript(_TABLES)
            there = {row[1] for row in database.execute("PRAGMA table_info(readings)")}
            for column, kind in _COLUMNS_SINCE.items():
                if column not in there:
                    database.execute(f"ALTER TABLE readings ADD COLUMN {column} {kind}")
            free, pages = (
                database.execute(f"PRAGMA {what}").fetchone()[0] for what in ("freelist_count", "page_count")
            )
            if free > pages / 2 > 1000:
                database.execute("VACUUM")
        except sqlite3.Error as error:
            database.close()
            if "locked" in str(error):
                raise ExperimentError(
                    f"another process uses the readings in {folder}: end that process, or give each node a folder of its own"
                ) from error
            raise ExperimentError(f"{self.path} is damaged ({error}): move it away, and start again") from error
        return database
