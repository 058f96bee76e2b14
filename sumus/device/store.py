"""What a device remembers on disk: one record, written whole, and the objects that the record names.

    name = store.put(report)                        bytes, under their hash
    store.write(replace(record, row=row, report=name))
    store.read()                                    what was written last, in this process or in the next

A record holds the protocol's row and everything that the row is about. So what a client keeps from a round is kept or
dropped in the same write that settles the round. An object is put before the record that names it, and is deleted when the
record no longer does.
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
    """Where a device is enrolled.

    Attributes:
        server: The server's address, scheme://host:port.
        population: The population there.
        device: The device's id.
    """

    server: str
    population: str
    device: str


@dataclass(frozen=True, slots=True)
class KeptState:
    """What a client keeps of a task's rounds.

    Attributes:
        object: The name of the object with the encoded tree.
        fingerprint: The hash of the task's leaves and data. The state means nothing to a task with another one.
    """

    object: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class KeptModel:
    """The model that a task's devices answer with.

    Attributes:
        version: The model's version.
        object: The name of the object with its encoded shared leaves.
    """

    version: int
    object: str


@dataclass(frozen=True, slots=True)
class WorkStarts:
    """How often work on a model was begun.

    Attributes:
        version: The version of the model; -1 if there was none yet.
        times: How often.
    """

    version: int = -1
    times: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """All that a device remembers, besides its key; objects by their hashes.

    Attributes:
        membership: Where the device is enrolled; None before it is.
        authority: Certificates (PEM) that alone vouch for the server; empty for those of the system.
        row: Where the device stands in the protocol.
        work: The work that it was given, until its end is known.
        report: The report of that work, encoded.
        pending: What the client keeps if the report is counted.
        states: What the client keeps, by task.
        models: The model to predict with, by task.
        latest: The task whose model came last.
        begun: How often work was begun, by task.
        failures: Rounds in a row that came to nothing here.
        seconds: How long a local step took the last time.
        counts: What the device has done so far, by word.
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
        """The objects that it names."""
        named = {self.report, self.pending and self.pending.object}
        named |= {kept.object for kept in (*self.states.values(), *self.models.values())}
        return frozenset(name for name in named if name)


class DeviceStore(Protocol):
    """A device's memory. A crash at any moment leaves the whole of a write, or nothing of it."""

    def read(self) -> Record:
        """The record that was written last; an empty one at first."""
        ...

    def write(self, record: Record) -> None:
        """Replace the record. Durable when it returns; then objects that it does not name are gone."""
        ...

    def put(self, body: bytes) -> str:
        """Keep an object for the record that is written next; its SHA-256 in hexadecimal. Durable when it returns."""
        ...

    def get(self, name: str) -> bytes:
        """An object that the record names. Raises ExperimentError if it is gone or damaged."""
        ...

    def key(self) -> bytes | None:
        """The device's private key, 32 bytes; None if it has none."""
        ...

    def put_key(self, key: bytes) -> None:
        """Keep the private key, once and for all."""
        ...

    def erase(self) -> None:
        """Forget everything, the key last."""
        ...

    def close(self) -> None:
        """Let another process have it."""
        ...


class MemoryDeviceStore:
    """A device's memory in this process."""

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
        """There is no other process."""


class FolderDeviceStore:
    """A device's memory in a folder that only its owner may read (0700, files 0600). One process at a time may have the folder.

    Args:
        folder: The folder. It is made if there is none.
        look: Only read, also while another process has the folder.

    Raises:
        ExperimentError: The folder holds something else, which is left as it is, or cannot be used. The text says what to do.
    """

    def __init__(self, folder: str | Path, look: bool = False) -> None:
        self.folder = Path(folder)
        self._objects = self.folder / "objects"
        self._unlock: Callable[[], None] = _nothing
        if look:
            if not (self.folder / "record.json").is_file():
                raise ExperimentError(f"{folder} is no device's folder: give the one that `sumus join` was given")
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not _is_a_devices(self.folder):
                raise ExperimentError(
                    f"{folder} holds something else, and is no device's folder: give a new one, or the one of this device"
                )
            self.folder.chmod(0o700)
            make_private_folder(self._objects)
            self._unlock = lock_file(self.folder / "lock")
        except LockHeldError as error:
            raise ExperimentError(
                f"another process is this device: end what runs on {self.folder}, or give each device a folder of its own"
            ) from error
        except OSError as error:
            raise ExperimentError(
                f"a device cannot keep anything in {folder}: {error.strerror or error}; give a folder that is yours"
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
                f"{path} is damaged ({error}): delete {self.folder}, and enrol this device anew with another token"
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
                f"{path} is gone or damaged: delete {self.folder}, and enrol this device anew with another token"
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
        """Delete objects that the record does not name, and what a crash left half written; nothing else."""
        own = [path for path in self._objects.iterdir() if _OBJECT.fullmatch(path.name)]
        unnamed = [path for path in own if path.name not in record.objects]
        for path in (*unnamed, *(self.folder / name for name in _HALF_WRITTEN)):
            with suppress(OSError):  # it only takes room
                path.unlink()


def _is_a_devices(folder: Path) -> bool:
    """Whether a folder is a device's, or may become one.

    The first is so if it has a record or a key, the second if it is empty but for what these leave behind.
    """
    record, key, objects = folder / "record.json", folder / "key", folder / "objects"
    if record.is_file():
        try:
            return "row" in msgspec.json.decode(record.read_bytes(), type=dict[str, msgspec.Raw])
        except msgspec.DecodeError:
            return key.is_file()  # damaged
    if key.is_file():
        return key.stat().st_size == KEY_BYTES
    left = {path.name for path in folder.iterdir()} <= {"lock", "objects", *_HALF_WRITTEN}
    return left and not (objects.exists() and any(objects.iterdir()))


def _nothing() -> None:
    """Let go of no lock."""


def counted(counts: Mapping[str, int], *words: str) -> dict[str, int]:
    """One more of each."""
    return {**counts, **{word: counts.get(word, 0) + 1 for word in words}}
