"""Leases: they decide which of several processes that share rounds is the leader, and show which processes are running.

    lease = leases.hold("a/1f", lasts=10.0)             renews the lease, or takes it if it is free
    lease.holder == "a/1f"                              if true, this process leads, and writes with `lease.fence`
    leases.beat("a", "hash of what it serves")          records that this replica is running

The database's clock is used. The process that takes the lease raises the fence, a number that tells leaders apart. In the
same transaction it writes the fence into the row of each run, which every transaction of that run locks and reads. So after
the lease is taken, no process can write with an older fence.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import time
from typing import Protocol

from sumus.protocol.rows import changed
from sumus.storage.memory import MemoryStore
from sumus.storage.store import Rows

MOST_JUMP = 2**20
"""The most by which a device's serial may exceed its last one. A device adds one for each request, so an honest device
would have to lose a million requests to reach this limit."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The lease of the leader.

    Attributes:
        holder: The process that holds the lease, as `REPLICA/LIFE`: the replica's name and an id that is new at each
            start. Empty if no process has held it yet.
        fence: A number that grows each time another process takes the lease.
        expires: The time at which the lease expires, in seconds of the database's clock.
    """

    holder: str = ""
    fence: int = 0
    expires: float = 0.0

    @property
    def leader(self) -> str:
        """The leading replica's name."""
        return self.holder.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class PresentReplica:
    """A replica (one of several servers that share a database) that is running.

    Attributes:
        name: The replica's name.
        serves: A hash of its tasks and plans.
    """

    name: str
    serves: str


class Leases(Protocol):
    """The leases of one database. Any thread may call the methods."""

    @property
    def shared(self) -> bool:
        """Whether several processes take turns at leading. If not (as with SQLite), a process that starts takes the
        lease from its predecessor."""
        ...

    def now(self) -> float:
        """Return the time in seconds, by the clock that all processes of these leases share."""
        ...

    def hold(self, holder: str, lasts: float, begins: bool = False) -> Lease:
        """Renew the lease if this holder has it, or take it if it is free.

        Args:
            holder: The process, as `REPLICA/LIFE`.
            lasts: Seconds from now until the lease expires.
            begins: Whether this process is the newest one of its replica, and the earlier processes of the replica have
                ended. If so, a lease that an earlier process held counts as free.

        Returns:
            The lease after this call, which may be held by another process.
        """
        ...

    def leave(self, holder: str) -> None:
        """Record that a process has ended. If it held the lease, the lease becomes free."""
        ...

    def beat(self, name: str, serves: str, rows: Rows | None = None) -> None:
        """Record that a replica is running.

        Args:
            name: The replica's name.
            serves: A hash of its tasks and plans.
            rows: A running transaction of the same database, which is used for writing. None begins a new transaction.
        """
        ...

    def present(self, within: float, rows: Rows | None = None) -> Sequence[PresentReplica]:
        """Return the replicas that were running at some time in the last `within` seconds, in the order of their names.

        Args:
            within: The period in seconds, up to now.
            rows: As in `beat`.
        """
        ...

    def raise_serials(self, asked: Mapping[str, int], known: Mapping[str, int] = {}) -> Mapping[str, int]:
        """Record the serials (numbers that grow) of devices' check-ins, and return the highest ones.

        A serial that is more than MOST_JUMP above the device's highest serial so far is not recorded. Otherwise one request
        with an enormous serial would lock its device out permanently.

        Args:
            asked: The serial of each device's present check-in, by device.
            known: By device, the serial in the rows of rounds; it is used if the device is no longer recorded here.

        Returns:
            The highest serial that each device has used at any replica, by device; −1 if none is known.
        """
        ...

    def forget_serial(self, device: str) -> None:
        """Forget a device's serial."""
        ...


def is_near(serial: int, last: int) -> bool:
    """Return whether a serial is plausible after the last one. `last` is −1 if the last serial is not known."""
    return serial <= max(last, 0) + MOST_JUMP


def after(row: Lease, holder: str, lasts: float, now: float, begins: bool, shared: bool) -> Lease:
    """Return the lease after a process has asked for it, by the rule of `Leases.hold`."""
    if row.holder == holder:
        return changed(row, expires=now + lasts)
    free = not shared or now >= row.expires or (begins and row.leader == holder.rpartition("/")[0])
    return Lease(holder, row.fence + 1, now + lasts) if free else row


class Serials:
    """The last serials of devices, in memory.

    Args:
        most: The largest number of devices to keep. If there are more, the device that has been silent longest is forgotten.
    """

    def __init__(self, most: int = 100_000) -> None:
        self._most = most
        self._last: OrderedDict[str, int] = OrderedDict()

    def raise_all(self, asked: Mapping[str, int], known: Mapping[str, int]) -> Mapping[str, int]:
        """Record and return serials, as in `Leases.raise_serials`."""
        found = dict[str, int]()
        for device, serial in asked.items():
            last = max(self._last.get(device, -1), known.get(device, -1))
            found[device] = max(serial, last) if is_near(serial, last) else last
            if found[device] >= 0:
                self._last[device] = found[device]
                self._last.move_to_end(device)
        while len(self._last) > self._most:
            self._last.popitem(last=False)
        return found

    def forget(self, device: str) -> None:
        """Forget a device's serial."""
        self._last.pop(device, None)


class MemoryLeases:
    """`Leases` of one process.

    Args:
        stores: The stores of all runs, by name.
        clock: Returns the time in seconds.
        shared: Whether threads take turns at leading, as in tests.
    """

    def __init__(
        self, stores: Mapping[str, MemoryStore], clock: Callable[[], float] = time, shared: bool = False
    ) -> None:
        self._shared, self._clock, self._stores = shared, clock, stores
        self._lock = threading.Lock()
        self._lease = Lease()
        self._present: dict[str, tuple[str, float]] = {}
        self._serials = Serials()

    @property
    def shared(self) -> bool:
        return self._shared

    def now(self) -> float:
        return self._clock()

    def hold(self, holder: str, lasts: float, begins: bool = False) -> Lease:
        with self._lock:
            before, self._lease = self._lease, after(self._lease, holder, lasts, self.now(), begins, self._shared)
            if self._lease.fence != before.fence:
                for store in self._stores.values():
                    store.run = changed(store.run, fence=self._lease.fence)
            return self._lease

    def leave(self, holder: str) -> None:
        with self._lock:
            self._present.pop(holder.rpartition("/")[0], None)
            if self._lease.holder == holder:
                self._lease = changed(self._lease, expires=0.0)

    def beat(self, name: str, serves: str, rows: Rows | None = None) -> None:
        self._present[name] = serves, self.now()

    def present(self, within: float, rows: Rows | None = None) -> Sequence[PresentReplica]:
        since = self.now() - within
        return [PresentReplica(name, serves) for name, (serves, seen) in sorted(self._present.items()) if seen > since]

    def raise_serials(self, asked: Mapping[str, int], known: Mapping[str, int] = {}) -> Mapping[str, int]:
        with self._lock:
            return self._serials.raise_all(asked, known)

    def forget_serial(self, device: str) -> None:
        with self._lock:
            self._serials.forget(device)
