"""A complete edge: its folder, its server for devices, and its uplink.

    edge = open_edge(link, Storage(data=Path("DIR")))
    edge.start()                           with the current or last known runs of the server above
    … edge.device_app, an ASGI application
    edge.close()

DIR/upstream    the edge's key and membership          DIR/blobs    plans and models, for devices
DIR/sumus.db, DIR/sums, DIR/keys    as on a server
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from starlette.applications import Starlette

from sumus.device.keys import system
from sumus.device.link import Link, fetch_authority, pin_of
from sumus.device.requests import Requests
from sumus.device.store import DeviceStore, FolderDeviceStore, Membership, MemoryDeviceStore
from sumus.edge.edge_run import LINGER, EdgeRun
from sumus.edge.relay import Relay
from sumus.edge.site_model import SiteModel
from sumus.edge.uplink import EdgeRuns, Uplink, quiet
from sumus.errors import ExperimentError, PlanError
from sumus.http.limits import Limits
from sumus.http.room import Room
from sumus.logs import logger
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service
from sumus.operations.shared import Shared
from sumus.operations.stores import Storage, Stores
from sumus.rounds.circumstances import Crowd
from sumus.server.device_plane import device_app
from sumus.server.identity import DeviceRegister, count_enrolled
from sumus.server.replica import Replica
from sumus.server.server import Server, storage_clock
from sumus.server.status import AboveStatus, in_short
from sumus.server.tasks import ServedTask
from sumus.transport.http import HttpTransport
from sumus.transport.transport import Transport, Unreachable
from sumus.wire.messages import AGAIN, Refused, Served

LOG = logger("sumus.edge")
HERE, USUAL = Storage(), ServerPolicy()


class EdgeTasks:
    """The tasks of the server above, as the edge's own server serves them."""

    def __init__(self, server: Server, relay: Relay, kept: Stores, crowd: Crowd, linger: float) -> None:
        """Begin without tasks; `take_up` adds them.

        Args:
            server: The edge's own server.
            relay: The relay, which all runs share.
            kept: The stores of the edge.
            crowd: The devices of the edge.
            linger: The seconds for which more devices are awaited after the last work has arrived.
        """
        self._server, self._relay, self._kept = server, relay, kept
        self._crowd, self._linger = crowd, linger

    def take_up(self, served_above: Sequence[Served], now: float) -> None:
        """Make a run for each run of the server above. Call this on the deciding thread.

        Args:
            served_above: The runs of the server above, as it describes them.
            now: Seconds of the edge's clock.
        """
        for name in dict.fromkeys(served.task for served in served_above):
            self._take_up(name, [served for served in served_above if served.task == name], now)

    def _take_up(self, name: str, mine: Sequence[Served], now: float) -> None:
        """Make the runs of a task. Runs that count reports differently from the server above are ended first."""
        here = [run for run in (self._server.run(name, served.kind) for served in mine) if isinstance(run, EdgeRun)]
        if len(here) == len(mine) and all(map(_counts_alike, here, mine)):
            for run, served in zip(here, mine, strict=True):
                run.serve(served)
            return
        for run in here:
            run.end_all(now)
        try:
            new = tuple(self._new_run(f"{name}.{served.kind}", served) for served in mine)
        except PlanError as error:  # a site's plan uses a name that is not registered here
            LOG.warning("task %s is left out: %s", name, error)
            return
        self._server.take_up(ServedTask(name, new, mine[0].fingerprint, mine[0].keeps_state), now)

    def _new_run(self, name: str, served: Served) -> EdgeRun:
        kept, again = self._kept, self._server.decide_held_again
        store, sums = kept.store(name), kept.sums(name)
        model = SiteModel(served, store, kept.blobs) if served.rounds > 1 else None
        return EdgeRun(served, self._relay, store, kept.ring, sums, self._crowd, again, self._linger, model)


def _counts_alike(run: EdgeRun, served: Served) -> bool:
    """Return whether a run counts reports as the server above now requires."""
    return (run.served.hop, run.served.plan) == (served.hop, served.plan)


class UplinkThread:
    """The thread of an edge's uplink."""

    def __init__(self, server: Server, uplink: Uplink, upstream: str) -> None:
        """Prepare the thread; `start` starts it.

        Args:
            server: The edge's own server.
            uplink: The uplink that the thread runs.
            upstream: The address of the server above.
        """
        self._server, self._uplink, self._upstream = server, uplink, upstream
        self._over = threading.Event()
        self._thread = threading.Thread(target=uplink.run, args=(self._over,), name="uplink", daemon=True)

    def start(self) -> None:
        """Start the thread, which relays check-ins and sends sums. The last known runs of the server above are taken up first.

        If none are known, devices are told to check in again later, until the server above has listed its runs.
        """
        if not self._server.ask_to_do(self._uplink.remember).result():
            self._uplink.turn()
        self._thread.start()

    def status(self) -> AboveStatus:
        """Return the status of the server above."""
        up = self._uplink
        why = in_short(up.trouble, self._upstream)
        return AboveStatus(self._upstream, up.trouble, up.sent, up.bytes_up, up.waiting, why)

    def close(self) -> None:
        """End the thread. A sum that was not sent is sent after the next start."""
        self._over.set()
        self._uplink.wake()
        if self._thread.ident is not None:
            self._thread.join()


class Edge(Service):
    """An edge, as `open_edge` opens it: a server and an uplink.

    Attributes:
        uplink: The uplink.
    """

    def __init__(
        self,
        server: Server,
        kept: Stores,
        shared: Shared,
        room: Room,
        app: Starlette,
        uplink: Uplink,
        upstream: str,
        stack: ExitStack,
    ) -> None:
        """Make an edge of its parts.

        Args:
            server: The edge's own server.
            kept: The edge's keys and blobs.
            shared: The edge's secret.
            room: The memory for bodies of requests.
            app: The device plane.
            uplink: The uplink.
            upstream: The address of the server above.
            stack: Closes everything.
        """
        way_up = UplinkThread(server, uplink, upstream)
        super().__init__(server, kept.blobs, room, kept.ring, shared, app, (), stack, way_up)
        self.uplink = uplink


def open_edge(
    link: Link,
    storage: Storage = HERE,
    policy: ServerPolicy = USUAL,
    authority: bytes | None = None,
    linger: float = LINGER,
    transport: Transport | None = None,
    say: Callable[[str], None] | None = None,
) -> Edge:
    """Open an edge below the server that a link leads to. The first time, the edge enrols with the link's token.

    Args:
        link: The link to the server above.
        storage: The folder or database of the edge's data.
        policy: The policy; only quota, memory, group and limits are used, since the population is that of the server above.
        authority: The certificate that this edge's devices must trust.
        linger: The seconds for which more devices are awaited after the last work has arrived.
        transport: The transport to the server above, for tests; None for HTTP.
        say: Called with a line of text about each sum that was sent.

    Raises:
        ExperimentError: The edge is not enrolled and cannot be, or its folder cannot be used.
    """
    with ExitStack() as stack:
        kept = Stores(storage, stack, shares=False)
        replica = Replica(kept.leases, kept.name)
        stack.callback(replica.stop)
        memory: DeviceStore = (
            MemoryDeviceStore() if storage.data is None else FolderDeviceStore(storage.data / "upstream")
        )
        stack.callback(memory.close)
        requests, upstream = _enrolled(link, memory, transport)
        clock = storage_clock(map(kept.store, kept.runs()))
        shared = Shared(kept.store("tasks"), kept.ring, kept.blobs)
        roll = DeviceRegister(kept.identities, {requests.population: policy.quota}, shared.join(replica))
        crowd = Crowd(lambda: count_enrolled(kept.identities, requests.population))
        server = Server(requests.population, [], roll, replica, crowd, clock, policy.group)
        wanted, runs = threading.Event(), EdgeRuns(server)
        relay = Relay(wanted.set, runs)
        tasks = EdgeTasks(server, relay, kept, crowd, linger)
        rows, told = kept.store("uplink"), say or quiet
        uplink = Uplink(requests, server, kept.blobs, rows, relay, runs, tasks.take_up, wanted, told)
        room = Room(policy.memory)
        app = device_app(server, kept.blobs, room, policy.limits or Limits(), authority)
        return Edge(server, kept, shared, room, app, uplink, upstream, stack.pop_all())


def _enrolled(link: Link, memory: DeviceStore, transport: Transport | None) -> tuple[Requests, str]:
    """Return requests to the server above, where this edge is enrolled, and that server's address."""
    record = memory.read()
    member, authority = record.membership, record.authority
    address = link.server or (member.server if member else "")
    if transport is None:
        if not address:
            raise ExperimentError("this edge has no server above it: give the server's address or a link")
        if link.authority:
            authority = link.authority
        elif link.pin is not None and pin_of(authority) != link.pin:
            authority = fetch_authority(replace(link, server=address))
        transport = HttpTransport(address, authority or None)
    if (key := memory.key()) is None:
        memory.put_key(key := system("edge"))
    requests = Requests(transport, key, member.population if member else "")
    if member is not None:
        if authority != record.authority:
            memory.write(replace(record, authority=authority))
        return requests, address
    if link.token is None:
        raise ExperimentError(
            "this edge is not enrolled: give it a link or a token, from the operator of the server above"
        )
    try:
        enrolment = requests.enrol(link.token)
    except Refused as refused:
        if refused.problem.code in AGAIN:
            raise Unreachable(f"the server above cannot enrol this edge now: {refused}") from refused
        raise ExperimentError(f"the server above does not enrol this edge: {refused}; ask its operator") from refused
    memory.write(
        replace(record, membership=Membership(link.server, enrolment.population, enrolment.device), authority=authority)
    )
    return requests, address
