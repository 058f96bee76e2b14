"""Client states: the values that clients keep between rounds, such as control variates and personal leaves (parameters that
never leave their client).

    states.propose("alice", trained.state)       # pending: her report is on its way
    states.counted("alice")                      # the report is in the sum: the state is kept
    states.discarded("alice")                    # the report is not in the sum: her old state stays

The order matters. SCAFFOLD's server keeps the mean of all clients' controls. If a client keeps its new control although
its report was lost, the mean and the client's control disagree forever. While a state is pending, its client cannot
begin another round.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save  # pyright: ignore[reportUnknownVariableType]

from sumus.errors import ExperimentError, UsageError, unread
from sumus.storage.files import sync, write_whole
from sumus.tree import nested, unnested
from sumus.types import Array, Tree
from sumus.work import ClientState


class ClientStates(Protocol):
    """Client states by client id (a string). A client that never had a state has the empty state."""

    def get(self, client: str) -> ClientState:
        """Return the state that a client keeps: that of its last counted report."""
        ...

    def pending(self, client: str) -> ClientState | None:
        """Return the state that a client has proposed, if the report is neither counted nor discarded yet; else None."""
        ...

    def propose(self, client: str, state: ClientState) -> None:
        """Keep a state as pending until the client's report is counted or discarded.

        Raises:
            UsageError: Another state of this client is pending.
        """
        ...

    def counted(self, client: str) -> None:
        """Keep the pending state, if there is one: the report is in the sum."""
        ...

    def discarded(self, client: str) -> None:
        """Forget the pending state, if there is one: the report is not in the sum."""
        ...

    @property
    def empty(self) -> bool:
        """Whether this store holds nothing that `restore` would delete."""
        ...

    def snapshot(self) -> dict[str, Array]:
        """Return all kept states as tensors by name, for a checkpoint. Pending states are left out."""
        ...

    def restore(self, tensors: Tree) -> None:
        """Keep exactly the states of a snapshot. An empty snapshot forgets all clients."""
        ...


class MemoryClientStates:
    """Client states in memory. A snapshot holds all of them."""

    def __init__(self) -> None:
        self._kept: dict[str, ClientState] = {}
        self._pending: dict[str, ClientState] = {}

    def get(self, client: str) -> ClientState:
        return self._kept.get(client, {})

    def pending(self, client: str) -> ClientState | None:
        return self._pending.get(client)

    def propose(self, client: str, state: ClientState) -> None:
        _check_free(client, self._pending)
        self._pending[client] = state

    def counted(self, client: str) -> None:
        if client in self._pending:
            self._kept[client] = self._pending.pop(client)

    def discarded(self, client: str) -> None:
        self._pending.pop(client, None)

    @property
    def empty(self) -> bool:
        return not self._kept

    def snapshot(self) -> dict[str, Array]:
        tensors = {"clients": _as_tensor(list(self._kept))} if self._kept else {}
        for index, state in enumerate(self._kept.values()):
            tensors |= {f"{index}/{name}": array for name, array in unnested(state).items()}
        return tensors

    def restore(self, tensors: Tree) -> None:
        names: list[str] = _listed(tensors, "clients") or []
        flat: list[dict[str, Array]] = [{} for _ in names]
        for name, array in tensors.items():
            index, slash, rest = name.partition("/")
            if slash:
                flat[int(index)][rest] = array
        self._kept = {client: nested(tree) for client, tree in zip(names, flat, strict=True)}
        self._pending = {}


class DirectoryClientStates:
    """Client states in a folder: one file for each client and version. The states need not fit in memory.

    A snapshot is only the list of versions, so it is small. A file that one of the last two snapshots lists is kept
    until newer snapshots no longer list it. A folder belongs to one run; the file `owner` in the folder identifies this
    run. Other files in the folder are not touched.
    """

    _NAME = re.compile(r"[0-9a-f]{32}-\d+\.safetensors(\.new)?")
    _OWNER = "owner"

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExperimentError(
                f"client states cannot be kept in {folder}: {error.strerror}; give another folder"
            ) from error
        self._kept: dict[str, int] = {}
        self._pending: dict[str, int] = {}
        self._next = 0
        self._listed: list[set[Path]] = [set(), set()]
        self._retired: set[Path] = set()
        self._unsynced: set[Path] = set()
        self._owner = ""

    def get(self, client: str) -> ClientState:
        return self._read(client, self._kept[client]) if client in self._kept else {}

    def pending(self, client: str) -> ClientState | None:
        return self._read(client, self._pending[client]) if client in self._pending else None

    def propose(self, client: str, state: ClientState) -> None:
        _check_free(client, self._pending)
        self._check_owner()
        path = self._path(client, self._next)
        write_whole(path, save({name: np.array(array, order="C") for name, array in unnested(state).items()}))
        self._unsynced.add(path)
        self._pending[client] = self._next
        self._next += 1

    def counted(self, client: str) -> None:
        if client in self._pending:
            before = self._kept.get(client)
            self._kept[client] = self._pending.pop(client)
            if before is not None:
                self._retire(self._path(client, before))

    def discarded(self, client: str) -> None:
        if client in self._pending:
            self._retire(self._path(client, self._pending.pop(client)))

    @property
    def empty(self) -> bool:
        return not any(self._files())

    def snapshot(self) -> dict[str, Array]:
        self._check_owner()
        try:
            for path in (*self._unsynced, self._folder):
                sync(path)
        except OSError as error:
            raise ExperimentError(
                f"client states in {self._folder} cannot be kept: {error.filename or 'a file'}: {unread(error)}"
            ) from error
        self._unsynced.clear()
        now = {self._path(client, version) for client, version in self._kept.items()}
        if now != self._listed[1]:  # if unchanged, the last checkpoint may still hold the older list
            self._listed = [self._listed[1], now]
            still, self._retired = self._retired, set()
            for path in still:
                self._retire(path)
        return {"versions": _as_tensor(self._kept), "owner": _as_tensor(self._owner)} if self._kept else {}

    def restore(self, tensors: Tree) -> None:
        kept: Mapping[str, int] = _listed(tensors, "versions") or {}
        if kept:
            self._owner = _listed(tensors, "owner")
            self._check_owner()
        else:
            self._take()
        listed = {self._path(client, version) for client, version in kept.items()}
        if missing := [path for path in listed if not path.exists()]:
            raise ExperimentError(
                f"{missing[0]}, a client's state, is missing: restore the folder, or start over with restart=True"
            )
        for path in list(self._files()):
            if path not in listed:
                path.unlink()
        self._kept, self._pending, self._next = dict(kept), {}, max(kept.values(), default=-1) + 1
        self._listed, self._retired, self._unsynced = [set(), listed], set(), set()

    def _take(self) -> None:
        self._owner = secrets.token_hex(16)
        write_whole(self._folder / self._OWNER, self._owner.encode())

    def _check_owner(self) -> None:
        if not self._owner:  # no run has called `restore`
            self._take()
        path = self._folder / self._OWNER
        if not path.exists() or path.read_text() != self._owner:
            raise ExperimentError(
                f"another run keeps its clients' states in {self._folder}: give each run a folder of its own, and start "
                "this run over with restart=True (--restart)"
            )

    def _files(self) -> Iterator[Path]:
        return (path for path in self._folder.iterdir() if self._NAME.fullmatch(path.name))

    def _path(self, client: str, version: int) -> Path:
        return self._folder / f"{hashlib.sha256(client.encode()).hexdigest()[:32]}-{version}.safetensors"

    def _read(self, client: str, version: int) -> ClientState:
        path = self._path(client, version)
        try:
            return nested(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ExperimentError(
                f"the state of client {client!r} at {path} cannot be read: {unread(error)}"
            ) from error

    def _retire(self, path: Path) -> None:
        """Delete a file; or, if one of the last two snapshots lists the file, delete it later."""
        if any(path in listed for listed in self._listed):
            self._retired.add(path)
        else:
            self._unsynced.discard(path)
            with suppress(OSError):  # a file that cannot be deleted only takes space
                path.unlink()


def _check_free(client: str, pending: Mapping[str, object]) -> None:
    if client in pending:
        raise UsageError(
            f"client {client!r} trained again before its last report was settled: call counted() or discarded() first"
        )


def _as_tensor(value: object) -> Array:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _listed(tensors: Tree, name: str) -> Any:
    """Return the value that a snapshot holds under a name; None if the snapshot is empty."""
    if tensors and name not in tensors:
        raise ExperimentError(
            "the run kept its clients' states in another kind of store: give the same client_states (--client-states) "
            "again, or restart=True (--restart) to start over"
        )
    return json.loads(tensors[name].tobytes()) if tensors else None
