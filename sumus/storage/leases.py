"""Who leads, where several processes share rounds: a lease with a fence, in rows, and who is there.

    lease = leases.hold("a/1f", lasts=10.0)             renewed, or taken where it was free; whoever has it
    lease.holder == "a/1f"                              then this process leads, and writes under `lease.fence`
    leases.beat("a", "what it serves")                  and is there

Time is the database's. Whoever takes the lease raises the fence, and in the same transaction writes it into the row of each run,
which every transaction of a run locks and reads: so once it is taken, nobody writes under an older one.
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
"""How far a device's serial may lie above its last one. A device counts one for each request, so that none comes near, and a
million requests would have to be lost."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Who leads. holder: a process's life, `REPLICA/LIFE`; empty before the first.  fence: grows with each that takes it.
    expires: by the database's clock, in seconds."""

    holder: str = ""
    fence: int = 0
    expires: float = 0.0

    @property
    def leader(self) -> str:
        """The replica, whichever of its lives it is."""
        return self.holder.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class PresentReplica:
    """A replica that is there. name: its own.  serves: a hash of its tasks and plans."""

    name: str
    serves: str


class Leases(Protocol):
    """Any thread may call.

    shared: whether processes lead in turn. Where they do not, as on SQLite, whoever comes takes the lease from the one before.
    """

    @property
    def shared(self) -> bool:
        """See above."""
        ...

    def now(self) -> float:
        """Seconds, by the clock that all who share this go by."""
        ...

    def hold(self, holder: str, lasts: float, begins: bool = False) -> Lease:
        """Keep the lease for so many seconds, where it is this holder's; take it, where it is free. The lease as it is then.

        begins: this life is its replica's newest, and the ones before it have ended: their lease is free.
        """
        ...

    def leave(self, holder: str) -> None:
        """Be there no longer; the lease is free, if it was this holder's."""
        ...

    def beat(self, name: str, serves: str, rows: Rows | None = None) -> None:
        """Be there. rows: a transaction of the same database that is under way, of which this becomes a part."""
        ...

    def present(self, within: float, rows: Rows | None = None) -> Sequence[PresentReplica]:
        """Who was there in the last so many seconds, by name. rows: as of `beat`."""
        ...

    def raise_serials(self, asked: Mapping[str, int], known: Mapping[str, int] = {}) -> Mapping[str, int]:
        """Note the serials that devices ask with, and read the highest ones.

        A serial that is more than MOST_JUMP above the highest one before changes nothing: one request with an enormous serial
        would else lock its device out for good.

        Args:
            asked: The serials that devices ask with now.
            known: Serials that rows of rounds hold, for devices that are not known here any more.

        Returns:
            By device, the highest serial that it has asked with anywhere; −1 if it is not known.
        """
        ...

    def forget_serial(self, device: str) -> None:
        """Know nothing of a device any more."""
        ...


def is_near(serial: int, last: int) -> bool:
    """Whether a device may have asked so often since its last serial. last: −1 if it is not known."""
    return serial <= max(last, 0) + MOST_JUMP


def after(row: Lease, holder: str, lasts: float, now: float, begins: bool, shared: bool) -> Lease:
    """The lease, once somebody has asked for it."""
    if row.holder == holder:
        return changed(row, expires=now + lasts)
    free = not shared or now >= row.expires or (begins and row.leader == holder.rpartition("/")[0])
    return Lease(holder, row.fence + 1, now + lasts) if free else row


class Serials:
    """The last serials of devices, in memory. most: devices; of who was not heard of for longest nothing is known any more."""

    def __init__(self, most: int = 100_000) -> None:
        self._most = most
        self._last: OrderedDict[str, int] = OrderedDict()

    def raise_all(self, asked: Mapping[str, int], known: Mapping[str, int]) -> Mapping[str, int]:
        """See `Leases.raise_serials`."""
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
        """See `Leases.forget_serial`."""
        self._last.pop(device, None)


class MemoryLeases:
    """`Leases` of one process. stores: of all runs, by name.  shared: for tests, whose threads may then lead in turn."""

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
