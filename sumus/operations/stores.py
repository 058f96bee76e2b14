"""The stores of a server, in which it keeps its rows, blobs, sums and keys.

DIR/sumus.db    rows (unless PostgreSQL holds them)    DIR/blobs    plans and models          DIR/sums    sealed partial sums
DIR/keys        the key ring                    DIR/head.json    the last published versions, outside the database
DIR/lock        locked while a server runs        DIR/departed.txt    devices that left or were revoked, outside the database
DIR/replica     the server's name among those that share the database
"""

import secrets
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sumus.errors import ExperimentError
from sumus.operations.departures import Departures
from sumus.server.replica import LASTS
from sumus.storage.blobs import Blobs, DirectoryBlobs, MemoryBlobs, open_blobs
from sumus.storage.files import LockHeldError, lock_file, make_private_folder, write_whole
from sumus.storage.identities import Identities, MemoryIdentities
from sumus.storage.keyring import KeyRing
from sumus.storage.leases import Leases, MemoryLeases
from sumus.storage.memory import MemoryStore
from sumus.storage.sql import SqlStore
from sumus.storage.store import Store
from sumus.text import shell_word

DEPARTED = "departed.txt"
HEAD = "head.json"


@dataclass(frozen=True)
class Storage:
    """The location of a server's data.

    Attributes:
        data: The server's folder; None for memory, which is lost when the process ends.
        database: The URL of a database; None for SQLite in the folder.
        keys: A folder for the key ring, preferably on another volume; None for a folder in the server's folder.
        blobs: A folder or a URL for plans, models and sealed sums; None for the server's folder.
        lease: The seconds after which another server with the same database may lead if the leader has not renewed its lease.
    """

    data: Path | None = None
    database: str | None = None
    keys: Path | None = None
    blobs: str | None = None
    lease: float = LASTS

    def __post_init__(self) -> None:
        for name in ("data", "keys"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))


class Stores:
    """The stores of a server: rows, blobs and keys.

    Args:
        storage: The location of the stores.
        stack: The exit stack that closes the stores.
        shares: Whether other servers may use the same database.
    """

    def __init__(self, storage: Storage, stack: ExitStack, shares: bool = True) -> None:
        self.data = storage.data
        self._stores: dict[str, MemoryStore] = {}
        self._sums: dict[str, MemoryBlobs] = {}
        self._sql: SqlStore | None = None
        if storage.data is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sumus-")))
            self.blobs: Blobs = MemoryBlobs()
            self.identities: Identities = MemoryIdentities()
            self.ring = KeyRing(scratch / "keys")
            self.leases: Leases = MemoryLeases(self._stores)
            self.name = "memory"
            return
        make_private(storage.data)
        stack.callback(_lock(storage.data / "lock"))
        self._sql = SqlStore.open(storage.database or storage.data / "sumus.db", "tasks")
        stack.callback(self._sql.close)
        self.leases = self._sql.leases(shared=None if shares else False)
        self.name = _name(storage.data / "replica")
        self._below = storage.blobs or storage.data
        self.blobs = open_blobs(storage.blobs or storage.data / "blobs")
        self.identities = self._sql.identities()
        Departures(storage.data / DEPARTED).hold(self.identities)
        self.ring = KeyRing(storage.keys or storage.data / "keys")

    def runs(self) -> list[str]:
        """List all runs that have rows."""
        return sorted(self._stores) if self._sql is None else self._sql.runs()

    def store(self, run: str) -> Store:
        """Return the rows of a run."""
        if self._sql is None:
            return self._stores.setdefault(run, MemoryStore())
        return self._sql.beside(run)

    def sums(self, run: str) -> Blobs:
        """Return the sealed sums of a run."""
        if self.data is None:
            return self._sums.setdefault(run, MemoryBlobs())
        if "://" in str(self._below):
            return open_blobs(f"{self._below}/sums/{run}")
        make_private(Path(self._below) / "sums")
        return DirectoryBlobs(Path(self._below) / "sums" / run)


def make_private(folder: Path) -> None:
    """Make a private folder for a server if it does not exist. Raise ExperimentError if other users can access it."""
    try:
        make_private_folder(folder)
        mode = folder.stat().st_mode
    except OSError as error:
        raise ExperimentError(f"nothing can be written to {folder}: {error.strerror}; give another folder") from error
    if mode & 0o077:
        raise ExperimentError(
            f"{folder} is open to other users (mode {mode & 0o777:o}), but it holds the ids of all enrolled devices: run "
            f"`chmod 700 {shell_word(folder)}`, or give a new folder"
        )


def _lock(path: Path) -> Callable[[], None]:
    """Lock a file, so that no second server uses its folder; return the function that unlocks it."""
    try:
        return lock_file(path)
    except LockHeldError:
        raise ExperimentError(f"another server is using {path.parent}: stop it first, or give another folder") from None
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be written: {error.strerror}; give a folder in which the server can write"
        ) from error


def _name(path: Path) -> str:
    """Read the server's name among the servers that share a database. If the server has no name yet, make one."""
    if not path.exists():
        write_whole(path, f"{socket.gethostname()}-{secrets.token_hex(2)}".encode(), lasting=True)
    return path.read_text()
