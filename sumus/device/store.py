"""A device's memory on disk: one record, written as a whole, and the objects that the record names.

    name = store.put(report)                        bytes, stored under their hash
    store.write(replace(record, row=row, report=name))
    store.read()                                    the newest record, in this process or in the next

A record holds the protocol's row and all data that belong to it. So a client's state from a round is kept or dropped in
the same write that settles the round. An object is stored before the record that names it, and is deleted when the record
no longer names it.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from sumus.errors import ExperimentError
from sumus.protocol.session import DeviceState
from sumus.storage.files import LockHeldError, lock_file, make_private_folder, sync, write_whole
from sumus.wire.messages import Assignment

NEW = DeviceState()
KEY_BYTES = 32
_OBJECT = re.compile(r"[0-9a-f]{64}(\.new)?")
_HALF_WRITTEN = ("record.json.new", "key.new")


@dataclass(frozen=True, slots=True)
class Membership:
    """A device's enrolment.

    Attributes:
        server: The server's address, scheme://host:port.
        population: The population at this server.
        device: The device's id.
    """

    server: str
    population: str
    device: str


@dataclass(frozen=True, slots=True)
class KeptState:
    """A client's state from a task's rounds.

    Attributes:
        object: The name of the object with the encoded tree.
        fingerprint: The hash of the task's leaves and data. The state is of no use to a task with a different hash.
    """

    object: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class KeptModel:
    """The released model with which a task's devices predict.

    Attributes:
        version: The model's version.
        object: The name of the object with its encoded shared leaves.
    """

    version: int
    object: str


@dataclass(frozen=True, slots=True)
class WorkStarts:
    """The number of times that work on a model was started.

    Attributes:
        version: The version of the model; -1 if there was none yet.
        times: The number of starts.
    """

    version: int = -1
    times: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """A device's whole memory except its key. Objects are named by their hashes.

    Attributes:
        membership: The device's enrolment; None before it is enrolled.
        authority: The CA certificates (PEM) that verify the server; empty for those of the system.
        row: The device's state in the protocol.
        work: The device's assignment, until its outcome is known.
        report: The report of that work, encoded.
        pending: The state that the client keeps if the report is counted.
        states: The client's states, by task.
        models: The models to predict with, by task.
        latest: The task whose model was updated last.
        begun: How often work was started, by task.
        failures: The number of rounds in a row that failed here.
        seconds: The duration of a local step, as measured last.
        counts: The number of times that each kind of event has happened so far, by kind.
    """

    membership: Membership | None = None
    authority: str = ""
    row: DeviceState = NEW
    work: Assignment | None = None
    report: str | None = None
    pending: KeptState | None = None
    states: Mapping[str, KeptState] = field(default_factory=dict[str, KeptState])
    models: Mapping[str, KeptModel] = field(default_factory=dict[str, KeptModel])
    latest: str = ""
    begun: Mapping[str, WorkStarts] = field(default_factory=dict[str, WorkStarts])
    failures: int = 0
    seconds: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def objects(self) -> frozenset[str]:
        """The names of all objects in the record."""
        named = {self.report, self.pending and self.pending.object}
        named |= {kept.object for kept in (*self.states.values(), *self.models.values())}
        return frozenset(name for name in named if name)


class DeviceStore(Protocol):
    """A device's memory. A crash at any moment leaves a write complete or undone."""

    def read(self) -> Record:
        """Return the record that was written last; an empty record if none was written."""
        ...

    def write(self, record: Record) -> None:
        """Replace the record. When this returns, the new one is durable, and objects that it does not name are deleted."""
        ...

    def put(self, body: bytes) -> str:
        """Store an object for the next record; return its SHA-256 in hexadecimal. The object is durable when this returns."""
        ...

    def get(self, name: str) -> bytes:
        """Return an object that the record names. Raise ExperimentError if it is missing or damaged."""
        ...

    def key(self) -> bytes | None:
        """Return the device's private key, 32 bytes; None if it has none."""
        ...

    def put_key(self, key: bytes) -> None:
        """Store the private key permanently."""
        ...

    def erase(self) -> None:
        """Erase everything, the key last."""
        ...

    def close(self) -> None:
        """Release the memory, so that another process can use it."""
        ...


class MemoryDeviceStore:
    """A device's memory inside this process."""

    def __init__(self) -> None:
        self._record = Record()
        self._objects: dict[str, bytes] = {}
        self._key: bytes | None = None

    def read(self) -> Record:
        return self._record

    def write(self, record: Record) -> None:
        self._record = record
        self._objects = {name: self._objects[name] for name in record.objects}

    def put(self, body: bytes) -> str:
        name = hashlib.sha256(body).hexdigest()
        self._objects[name] = body
        return name

    def get(self, name: str) -> bytes:
        return self._objects[name]

    def key(self) -> bytes | None:
        return self._key

    def put_key(self, key: bytes) -> None:
        self._key = key

    def erase(self) -> None:
        self._record, self._objects, self._key = Record(), {}, None

    def close(self) -> None:
        """Do nothing: no other process can use this memory."""


class FolderDeviceStore:
    """A device's memory in a folder that only its owner may read (0700, files 0600). One process at a time may use the folder.

    Args:
        folder: The folder. It is made if it does not exist.
        look: Whether to open the folder only for reading, even while another process uses it.

    Raises:
        ExperimentError: The folder cannot be used, or has other contents, which stay unchanged. The message says what to do.
    """

    def __init__(self, folder: str | Path, look: bool = False) -> None:
        self.folder = Path(folder)
        self._objects = self.folder / "objects"
        self._unlock: Callable[[], None] = _nothing
        if look:
            if not (self.folder / "record.json").is_file():
                raise ExperimentError(f"{folder} is not a device's folder: give the folder of `sumus join`")
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not _is_a_devices(self.folder):
                raise ExperimentError(
                    f"{folder} is not a device's folder, and is not empty: give a new folder, or this device's folder"
                )
            self.folder.chmod(0o700)
            make_private_folder(self._objects)
            self._unlock = lock_file(self.folder / "lock")
        except LockHeldError as error:
            raise ExperimentError(
                f"another process uses {self.folder}: end that process, or give each device a folder of its own"
            ) from error
        except OSError as error:
            raise ExperimentError(
                f"a device cannot store anything in {folder}: {error.strerror or error}; give a folder in which you can write"
            ) from error
        self._clear(self.read())

    def read(self) -> Record:
        path = self.folder / "record.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=Record)
        except FileNotFoundError:
            return Record()
        except msgspec.DecodeError as error:
            raise ExperimentError(
                f"{path} is damaged ({error}): delete {self.folder}, and enrol this device again with another token"
            ) from error

    def write(self, record: Record) -> None:
        write_whole(self.folder / "record.json", msgspec.json.encode(record), lasting=True, private=True)
        self._clear(record)

    def put(self, body: bytes) -> str:
        name = hashlib.sha256(body).hexdigest()
        path = self._objects / name
        if not path.exists():
            write_whole(path, body, lasting=True, private=True)
        return name

    def get(self, name: str) -> bytes:
        path = self._objects / name
        try:
            body = path.read_bytes()
        except FileNotFoundError:
            body = b""
        if hashlib.sha256(body).hexdigest() != name:
            raise ExperimentError(
                f"{path} is gone or damaged: delete {self.folder}, and enrol this device again with another token"
            )
        return body

    def key(self) -> bytes | None:
        try:
            return (self.folder / "key").read_bytes()
        except FileNotFoundError:
            return None

    def put_key(self, key: bytes) -> None:
        write_whole(self.folder / "key", key, lasting=True, private=True)

    def erase(self) -> None:
        self.write(Record())
        (self.folder / "key").unlink(missing_ok=True)
        (self.folder / "record.json").unlink(missing_ok=True)
        sync(self.folder)

    def close(self) -> None:
        self._unlock()

    def _clear(self, record: Record) -> None:
        """Delete the objects that the record does not name, and the half-written files of a crash. Keep all other files."""
        own = [path for path in self._objects.iterdir() if _OBJECT.fullmatch(path.name)]
        unnamed = [path for path in own if path.name not in record.objects]
        for path in (*unnamed, *(self.folder / name for name in _HALF_WRITTEN)):
            with suppress(OSError):  # a leftover only takes space
                path.unlink()


def _is_a_devices(folder: Path) -> bool:
    """Return whether a folder belongs to a device, or may become a device's.

    It belongs to a device if it has a record or a key. It may become a device's if it is empty, or contains only leftovers
    of a device.
    """
    record, key, objects = folder / "record.json", folder / "key", folder / "objects"
    if record.is_file():
        try:
            return "row" in msgspec.json.decode(record.read_bytes(), type=dict[str, msgspec.Raw])
        except msgspec.DecodeError:
            return key.is_file()  # the record is damaged, but the key shows whose folder it is
    if key.is_file():
        return key.stat().st_size == KEY_BYTES
    left = {path.name for path in folder.iterdir()} <= {"lock", "objects", *_HALF_WRITTEN}
    return left and not (objects.exists() and any(objects.iterdir()))


def _nothing() -> None:
    """Release no lock."""


def counted(counts: Mapping[str, int], *words: str) -> dict[str, int]:
    """Return the counts with one more for each of these kinds."""
    return {**counts, **{word: counts.get(word, 0) + 1 for word in words}}
