"""A server with all its parts: its storage, the part that decides, and the application that answers devices.

service = open_service({"health": bundle}, Storage(data=Path("DIR")))
service.start()
… service.device_app, an ASGI application
service.close()

DIR/sumus.db    rows (or a PostgreSQL)          DIR/blobs    plans and models          DIR/sums    sealed partial sums
DIR/keys        the key ring                    DIR/head.json    the last published versions, outside the database
DIR/lock        held while a server runs        DIR/departed.txt    devices that left or were revoked, outside the database
DIR/replica     the server's name among those that share the database

Servers share rounds if they share a PostgreSQL database, the key ring and the blobs; the sums are then stored with the blobs.
A server that joins others must have all of these and serve the same tasks, or it does not start.
"""

import dataclasses
import hashlib
import json
import re
import secrets
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from starlette.applications import Starlette

from sumus.errors import ExperimentError
from sumus.http.certificates import Certificate
from sumus.http.limits import Limits
from sumus.http.room import Room
from sumus.operations.departures import Departures
from sumus.plan import Plan
from sumus.protocol.consent import hurdles
from sumus.protocol.round import Round, State
from sumus.protocol.rows import changed
from sumus.rounds.circumstances import Crowd
from sumus.rounds.run import Run
from sumus.rounds.seeds import Seeds, any_seed
from sumus.server.device_plane import device_app
from sumus.server.evaluation import Evaluating, EvaluationRun
from sumus.server.identity import DeviceRegister, count_enrolled
from sumus.server.replica import LASTS, Replica
from sumus.server.server import GROUP, Server, storage_clock
from sumus.server.status import AboveStatus
from sumus.server.tasks import ServedTask
from sumus.server.training import TrainingRun
from sumus.spec import canonical_json
from sumus.storage.blobs import Blobs, DirectoryBlobs, MemoryBlobs, open_blobs
from sumus.storage.files import LockHeldError, lock_file, make_private_folder, write_whole
from sumus.storage.identities import Identities, MemoryIdentities
from sumus.storage.keyring import KeyRing, SealError, new_key
from sumus.storage.leases import Leases, MemoryLeases, PresentReplica
from sumus.storage.memory import MemoryStore
from sumus.storage.sql import SqlStore
from sumus.storage.store import OF_THE_RUN, Model, Rows, Store, TakenOver
from sumus.text import shell_word
from sumus.types import Tree
from sumus.wire.bundle import Bundle
from sumus.wire.reports import most_bytes
from sumus.wire.tensors import decode_tree

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
DEPARTED = "departed.txt"


@dataclass(frozen=True)
class Storage:
    """The location of a server's data.

    Attributes:
        data: The server's folder; None for memory, which is lost when the process ends.
        database: The URL of a database; None for SQLite in the folder.
        keys: A folder for the key ring, better on another volume; None for one in the server's folder.
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


@dataclass(frozen=True)
class ServerPolicy:
    """The rules by which a server runs its tasks.

    Attributes:
        population: The name of the devices' population.
        quota: The number of devices that may enrol.
        evaluate: The rules for measuring models on devices; None if devices measure none.
        releases: Whether devices predict with a new model at once, without waiting for an operator to promote it.
        warm_start: Whether a task whose leaves or data have changed starts with the values of the old model that still fit.
        spool: Whether to serve plans that need each update separately. An update is then sealed on the disk until its round ends.
        priority: Priorities by task; devices are asked first to work on the tasks with higher ones.
        memory: The most bytes of memory for bodies in transit.
        group: The seconds for which the server collects reports before it decides on them together; see `server.GROUP`.
        limits: The limits on requests per second; None for the default ones.
    """

    population: str = "default"
    quota: int = 1_000_000
    evaluate: Evaluating | None = None
    releases: bool = True
    warm_start: bool = False
    spool: bool = False
    priority: Mapping[str, int] = field(default_factory=dict[str, int])
    memory: int = 256 * 2**20
    group: float = GROUP
    limits: Limits | None = None


class Shared:
    """The data, in addition to rows, that servers with one database share: a secret, wrapped by the key ring, and blobs.

    The secret shows whether they have the same ring and the same blobs.

    Args:
        store: The rows that hold the wrapped secret.
        ring: The key ring.
        blobs: The blobs.
    """

    _NOTE = "/shared"
    """The note's name, which no task can have."""

    def __init__(self, store: Store, ring: KeyRing, blobs: Blobs) -> None:
        self._store, self._ring, self._blobs = store, ring, blobs

    def join(self, replica: Replica) -> bytes:
        """Join the servers that work on the database.

        Returns:
            The secret.

        Raises:
            ExperimentError: Other servers have a different ring, different blobs or different tasks.
        """
        with self._store.transaction() as rows:  # one after the other, so that each sees those before
            others = replica.others(rows)
            for other in others:
                if other.serves != replica.serves:
                    raise ExperimentError(
                        f"replica {other.name} serves other tasks, plans or options from this database: start all with the "
                        "same, or stop all of them first"
                    )
            secret = self._secret(rows, others)
            if replica.shared:
                mark = b"replicas share these blobs " + hashlib.sha256(secret).digest()
                if others and self._blobs.size(hashlib.sha256(mark).hexdigest()) is None:
                    raise ExperimentError(
                        f"replica {others[0].name} keeps models and sums elsewhere: give all the same --blobs, a folder or a "
                        "bucket that all reach"
                    )
                self._blobs.put(mark)
            replica.beat(rows)
        return secret

    def wrap_again(self, fence: int | None) -> None:
        """Wrap the secret with the newest key. TakenOver is raised if another server leads."""
        with self._store.transaction() as rows:
            if rows.run().fence != fence:
                raise TakenOver
            self._write(rows, self._secret(rows, ()))

    def _secret(self, rows: Rows, others: Sequence[PresentReplica]) -> bytes:
        """Unwrap the secret. If the ring no longer has its key and no other server uses it, make a new one."""
        wrapped = rows.note(OF_THE_RUN, self._NOTE)
        try:
            if wrapped is not None:
                return self._ring.unwrap(wrapped, self._NOTE)
        except SealError as error:
            if others:
                raise ExperimentError(
                    f"replica {others[0].name} has another key ring: give all the same --keys, a folder that all reach"
                ) from error
        return self._write(rows, new_key())

    def _write(self, rows: Rows, secret: bytes) -> bytes:
        rows.put_note(OF_THE_RUN, self._NOTE, self._ring.wrap(secret, self._NOTE))
        return secret


class WayUp(Protocol):
    """An edge's connection to the server above it."""

    def start(self) -> None:
        """Start to use the connection; the edge's own server has started."""
        ...

    def status(self) -> AboveStatus:
        """Return the state of the connection to the server above."""
        ...

    def close(self) -> None:
        """Stop using the connection; the edge's own server has not stopped yet."""
        ...


class Service:
    """The parts of a server, as `open_service` opens them.

    Attributes:
        server: The server, which makes all decisions.
        blobs: The plans and models.
        room: The memory for bodies in transit.
        ring: The key ring, which wraps the keys of rounds.
        shared: The data that servers with one database share.
        device_app: The device plane, an ASGI application.
        notes: Notes for the operator.
        certificate: The server's certificate; None if it has none.
    """

    def __init__(
        self,
        server: Server,
        blobs: Blobs,
        room: Room,
        ring: KeyRing,
        shared: Shared,
        app: Starlette,
        notes: tuple[str, ...],
        stack: ExitStack,
        way_up: WayUp | None = None,
    ) -> None:
        self.server, self.blobs, self.room, self.ring, self.shared = server, blobs, room, ring, shared
        self.device_app, self.notes, self._stack, self._way_up = app, notes, stack, way_up
        self.certificate: Certificate | None = None

    def start(self) -> None:
        """Recover, and start to decide."""
        self.server.start()
        if self._way_up is not None:
            self._way_up.start()

    def above(self) -> AboveStatus | None:
        """Return the state of an edge's connection to the server above; None if this server is not an edge."""
        return None if self._way_up is None else self._way_up.status()

    def close(self) -> None:
        """Answer all waiting requests, and close everything."""
        if self._way_up is not None:
            self._way_up.close()
        self.server.stop()
        self._stack.close()


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


def open_service(
    bundles: Mapping[str, Bundle],
    storage: Storage = Storage(),
    policy: ServerPolicy = ServerPolicy(),
    authority: bytes | None = None,
    seeds: Callable[[str], Seeds] = lambda task: any_seed,
) -> Service:
    """Open all parts of a server. It continues from its stored state.

    Args:
        bundles: The tasks, by name.
        storage: The location of the server's data.
        policy: The rules by which it runs its tasks.
        authority: The certificate (PEM) that devices pin, if the server made its own.
        seeds: Returns, for a task and a round, the seed that the round's sums share; random by default.

    Raises:
        ExperimentError: The server cannot be opened.
    """
    if not _NAME.fullmatch(policy.population):
        raise ExperimentError(
            f"a population is called {policy.population!r}: give it letters, digits, `.`, `_` and `-`, at most 64"
        )
    with ExitStack() as stack:
        kept, notes, tasks = Stores(storage, stack), list[str](), list[ServedTask]()
        crowd = Crowd(lambda: count_enrolled(kept.identities, policy.population))
        beginnings: list[Callable[[float], None]] = []
        for name, bundle in bundles.items():
            task, begin = _task(name, bundle, kept, policy, crowd, seeds(name), notes)
            tasks.append(task)
            beginnings.append(begin)
        replica = Replica(kept.leases, kept.name, _serves(tasks, policy), storage.lease)
        stack.callback(replica.stop)
        shared = Shared(kept.store("tasks"), kept.ring, kept.blobs)
        secret = shared.join(replica)
        clock = storage_clock((run.store for task in tasks for run in task.runs), kept.leases.now)
        if storage.data is not None:
            _check_head(storage.data / "head.json", tasks)
        for begin in beginnings:
            begin(clock())
        quotas = {policy.population: policy.quota}
        if storage.data is None:
            roll = DeviceRegister(kept.identities, quotas, secret)
        else:
            roll = DeviceRegister(kept.identities, quotas, secret, left=Departures(storage.data / DEPARTED).note)
        server = Server(policy.population, tasks, roll, replica, crowd, clock, policy.group)
        if storage.data is not None:
            server.listeners.append(_head_writer(storage.data / "head.json", tasks))
        room = Room(policy.memory)
        app = device_app(server, kept.blobs, room, policy.limits or Limits(), authority)
        return Service(server, kept.blobs, room, kept.ring, shared, app, tuple(notes), stack.pop_all())


def _task(
    name: str,
    bundle: Bundle,
    kept: Stores,
    policy: ServerPolicy,
    crowd: Crowd,
    seeds: Seeds,
    notes: list[str],
) -> tuple[ServedTask, Callable[[float], None]]:
    """Make a served task, and the function that starts it. If its leaves or data have changed, it becomes a new version."""
    plan = bundle.plan
    if plan.trusts_devices is None:  # its metrics would count any number of predictions
        raise ExperimentError(
            f"the plan of {name} was not made for devices: it does not say whether it trusts them. Pack its file again with "
            "`sumus pack`, or bundle plan.for_devices()"
        )
    plan.check_deployable(policy.spool)
    if not _NAME.fullmatch(name):
        raise ExperimentError(f"a task is called {name!r}: give it letters, digits, `.`, `_` and `-`, at most 64")
    if re.search(r"\.\d+$", name):
        raise ExperimentError(
            f"a task is called {name!r}: an end like `.2` is for versions of a task; call it otherwise"
        )
    if plan.pacing.deadline is None:
        notes.append(
            f"{name}: the plan gives rounds no deadline; on a server each ends after an hour: Pacing(deadline=)"
        )
    notes.append(f"{name}: {plan.influence.said}")
    notes += [f"{name}: {each}" for each in hurdles(plan)]
    number, before = _version(name, plan, kept.store("tasks"))
    wire = name if number == 1 else f"{name}.{number}"
    training = TrainingRun(
        wire,
        plan,
        kept.store(f"{wire}.train"),
        kept.blobs,
        kept.ring,
        kept.sums(f"{wire}.train"),
        crowd,
        seeds,
        policy.releases,
    )
    if (most := most_bytes(training.hop)) > policy.memory:
        raise ExperimentError(
            f"a report of {name} may have {_mib(most)} MiB, and all on their way may hold {_mib(policy.memory)}: none would be "
            f"taken. Give it --memory {_mib(2 * most)}, or train fewer leaves"
        )
    shared: Tree = {
        leaf: bundle.model[leaf] for leaf in (*plan.description.trained_layout, *plan.description.buffer_layout)
    }
    runs: tuple[Run, ...] = (training,)
    if policy.evaluate is not None:
        run = f"{wire}.evaluate"
        runs += (EvaluationRun(training, policy.evaluate, kept.store(run), kept.ring, kept.sums(run), any_seed),)

    def begin(now: float) -> None:
        _version(name, plan, kept.store("tasks"), write=True)
        first = shared
        if number > 1:
            notes.append(
                f"{name}: its leaves or its data have changed: this is version {number} of the task, a new model"
            )
        if number > 1 and policy.warm_start:
            first, taken = _warm(shared, before, kept)
            notes.append(f"{name}: {taken} of {len(shared)} leaves begin with the old model's values")
        training.begin(first, now)

    fingerprint, priority = plan.description.fingerprint, policy.priority.get(name, 0)
    return ServedTask(wire, runs, fingerprint, plan.keeps_state, priority), begin


def _version(name: str, plan: Plan, store: Store, write: bool = False) -> tuple[int, str]:
    """Find the version of a task, and the wire name of the previous version.

    Args:
        name: The task.
        plan: Its plan.
        store: The store of the versions.
        write: Whether to store a new version.
    """
    fingerprint = plan.description.fingerprint
    with store.transaction() as rows:
        note = rows.note(OF_THE_RUN, name)
        known: list[str] = [] if note is None else json.loads(note)
        if fingerprint not in known:
            known.append(fingerprint)
            if write:
                rows.put_note(OF_THE_RUN, name, json.dumps(known).encode())
    number = known.index(fingerprint) + 1
    return number, name if number <= 2 else f"{name}.{number - 1}"


def _warm(shared: Tree, before: str, kept: Stores) -> tuple[Tree, int]:
    """Take leaves' first values from the previous version, if name and shape are equal; also return the number of such leaves."""
    with kept.store(f"{before}.train").transaction() as rows:
        model: Model | None = rows.model(rows.run().version)
    if model is None:
        return shared, 0
    old = decode_tree(kept.blobs.get(model.model))
    fits = {leaf for leaf, value in shared.items() if leaf in old and old[leaf].shape == value.shape}
    return {leaf: old[leaf].astype(value.dtype) if leaf in fits else value for leaf, value in shared.items()}, len(fits)


def _serves(tasks: Sequence[ServedTask], policy: ServerPolicy) -> str:
    """Hash the settings that servers with shared rounds must have in common."""
    evaluate = None if policy.evaluate is None else dataclasses.asdict(policy.evaluate)
    plans = {task.name: [task.training.plan.id, task.priority] for task in tasks}
    text = canonical_json([policy.population, evaluate, policy.releases, plans])
    return hashlib.sha256(text.encode()).hexdigest()


def _name(path: Path) -> str:
    """Read the server's name among servers that share a database; it is made when it is first needed."""
    if not path.exists():
        write_whole(path, f"{socket.gethostname()}-{secrets.token_hex(2)}".encode(), lasting=True)
    return path.read_text()


def _mib(nbytes: int) -> int:
    return -(-nbytes // 2**20)


def make_private(folder: Path) -> None:
    """Make a folder of the server's own if it does not exist. ExperimentError is raised if other users can access it."""
    try:
        make_private_folder(folder)
        mode = folder.stat().st_mode
    except OSError as error:
        raise ExperimentError(f"nothing can be kept in {folder}: {error.strerror}; give another folder") from error
    if mode & 0o077:
        raise ExperimentError(
            f"{folder} is open to other users (mode {mode & 0o777:o}), and a server keeps there who is enrolled: run "
            f"`chmod 700 {shell_word(folder)}`, or give a new folder"
        )


def _lock(path: Path) -> Callable[[], None]:
    """Lock a file, so that no second server uses its folder; return the function that unlocks it."""
    try:
        return lock_file(path)
    except LockHeldError:
        raise ExperimentError(f"another server runs on {path.parent}: stop it first, or give another folder") from None
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be written: {error.strerror}; give a folder of the server's own"
        ) from error


# ── what was published, outside the database ─────────────────────────────────────────────────────────────────────────


def _heads(tasks: list[ServedTask]) -> dict[str, Any]:
    heads: dict[str, Any] = {}
    for task in tasks:
        with task.training.store.transaction() as rows:
            run = rows.run()
        heads[task.name] = {"version": run.version, "epoch": run.epoch}
    return heads


def _check_head(path: Path, tasks: list[ServedTask]) -> None:
    """Refuse a database that is older than the published versions: noise that it counts as unspent was spent already."""
    if not path.exists():
        return
    try:
        known = cast(dict[str, dict[str, int]], json.loads(path.read_text()))
    except ValueError as error:
        raise ExperimentError(
            f"{path} is damaged: put it back, or `sumus reconcile` to go on from the database"
        ) from error
    for name, at in _heads(tasks).items():
        head = known.get(name) or at
        if (head["epoch"], head["version"]) > (at["epoch"], at["version"]):
            raise ExperimentError(
                f"the database is at version {at['version']} of {name}, and version {head['version']} was published: it was put "
                "back from a backup. `sumus reconcile` begins a new epoch from it, in which nothing counts as unspent"
            )


def _head_writer(path: Path, tasks: list[ServedTask]) -> Callable[[], None]:
    """Return a function that writes the published versions, if they have changed."""
    written: dict[str, Any] = {}

    def write() -> None:
        now = {task.name: {"version": task.training.version} for task in tasks}
        if now != written:
            write_whole(path, json.dumps(_heads(tasks)).encode(), lasting=True)
            written.clear()
            written.update(now)

    return write


def reconcile(storage: Storage) -> dict[str, int]:
    """Continue from a database that was restored from a backup.

    Each task's noise epoch is raised above the published one. Open rounds are given up: their sums do not match the database.

    Returns:
        The epochs, by task.
    """
    if storage.data is None:
        raise ExperimentError("there is nothing to reconcile in memory: give the server's folder")
    path = storage.data / "head.json"
    known: dict[str, dict[str, int]] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text())
    epochs: dict[str, int] = {}
    with ExitStack() as stack:
        kept = Stores(storage, stack)
        if kept.leases.shared and (there := [each.name for each in kept.leases.present(LASTS)]):
            raise ExperimentError(f"replica {there[0]} works on this database: stop all of them first")
        for name in kept.runs():
            task, _, kind = name.rpartition(".")
            with kept.store(name).transaction() as rows:
                _give_up(rows)
                if kind == "train" and rows.model(rows.run().version) is not None:
                    run = rows.run()
                    epochs[task] = max(run.epoch, known.get(task, {}).get("epoch", 0)) + 1
                    rows.put_run(changed(run, epoch=epochs[task]))
                    known[task] = {"version": run.version, "epoch": epochs[task]}
        write_whole(path, json.dumps(known).encode(), lasting=True)
    return epochs


def _give_up(rows: Rows) -> None:
    """Abandon open rounds and sessions, since their sums are lost."""
    ended = [row for row in rows.rounds() if row.state is not State.PLANNED and not row.over]
    for row in ended:
        rows.put_round(changed(row, state=State.ABANDONED, reason="restored"))
        rows.drop_shards(row.number)
        rows.put_note(row.number, "key", None)
    for session in map(rows.session, rows.sessions_out()):
        if session is not None:
            rows.put_session(changed(session, state="dropped", reason="restored"))
    if ended:
        newest = rows.run().newest
        last = rows.round(newest)
        rows.put_round(
            Round(newest + 1, since=0.0 if last is None else last.since, fence=0 if last is None else last.fence)
        )
        rows.put_run(changed(rows.run(), newest=newest + 1))
