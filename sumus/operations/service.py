"""A server with all its parts: its storage, the part that decides, and the application that answers devices.

service = open_service({"health": bundle}, Storage(data=Path("DIR")))
service.start()
… service.device_app, an ASGI application
service.close()

Servers share rounds if they share a PostgreSQL database, the key ring and the blobs; the sums are then stored with the blobs.
A server that joins others must have all of these and serve the same tasks, or it does not start.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

from starlette.applications import Starlette

from sumus.http.certificates import Certificate
from sumus.http.limits import Limits
from sumus.http.room import Room
from sumus.operations.departures import Departures
from sumus.operations.policy import ServerPolicy, check_name
from sumus.operations.published import check_head, head_writer
from sumus.operations.served_tasks import open_task
from sumus.operations.shared import Shared
from sumus.operations.stores import DEPARTED, HEAD, Storage, Stores
from sumus.rounds.circumstances import Crowd
from sumus.rounds.seeds import Seeds, any_seed
from sumus.server.device_plane import device_app
from sumus.server.identity import DeviceRegister, count_enrolled
from sumus.server.replica import Replica
from sumus.server.server import Server, storage_clock
from sumus.server.status import AboveStatus
from sumus.server.tasks import ServedTask
from sumus.spec import canonical_json
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing
from sumus.wire.bundle import Bundle

_IN_MEMORY = Storage()
_DEFAULT_POLICY = ServerPolicy()


class WayUp(Protocol):
    """An edge's connection to the server above it."""

    def start(self) -> None:
        """Start to use the connection. This is called after the edge's own server has started."""
        ...

    def status(self) -> AboveStatus:
        """Return the state of the connection to the server above."""
        ...

    def close(self) -> None:
        """Stop using the connection. This is called before the edge's own server stops."""
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
        """Recover the stored state, and start to decide about requests."""
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


def open_service(
    bundles: Mapping[str, Bundle],
    storage: Storage = _IN_MEMORY,
    policy: ServerPolicy = _DEFAULT_POLICY,
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
    check_name("population", policy.population)
    with ExitStack() as stack:
        stores, notes, tasks = Stores(storage, stack), list[str](), list[ServedTask]()
        crowd = Crowd(lambda: count_enrolled(stores.identities, policy.population))
        beginnings: list[Callable[[float], None]] = []
        for name, bundle in bundles.items():
            task, begin = open_task(name, bundle, stores, policy, crowd, seeds(name), notes)
            tasks.append(task)
            beginnings.append(begin)
        replica = Replica(stores.leases, stores.name, _serves(tasks, policy), storage.lease)
        stack.callback(replica.stop)
        shared = Shared(stores.store("tasks"), stores.ring, stores.blobs)
        secret = shared.join(replica)
        clock = storage_clock((run.store for task in tasks for run in task.runs), stores.leases.now)
        if storage.data is not None:
            check_head(storage.data / HEAD, tasks)
        for begin in beginnings:
            begin(clock())
        quotas = {policy.population: policy.quota}
        if storage.data is None:
            roll = DeviceRegister(stores.identities, quotas, secret)
        else:
            roll = DeviceRegister(stores.identities, quotas, secret, left=Departures(storage.data / DEPARTED).note)
        server = Server(policy.population, tasks, roll, replica, crowd, clock, policy.group)
        if storage.data is not None:
            server.listeners.append(head_writer(storage.data / HEAD, tasks))
        room = Room(policy.memory)
        app = device_app(server, stores.blobs, room, policy.limits or Limits(), authority)
        return Service(server, stores.blobs, room, stores.ring, shared, app, tuple(notes), stack.pop_all())


def _serves(tasks: Sequence[ServedTask], policy: ServerPolicy) -> str:
    """Hash the settings that servers with shared rounds must have in common."""
    evaluate = None if policy.evaluate is None else dataclasses.asdict(policy.evaluate)
    plans = {task.name: [task.training.plan.id, task.priority] for task in tasks}
    text = canonical_json([policy.population, evaluate, policy.releases, plans])
    return hashlib.sha256(text.encode()).hexdigest()
