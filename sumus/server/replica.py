"""A replica: one of the processes that share a population's rounds. It keeps track of whether it leads, and of the other
replicas.

    replica = Replica(leases, "web-1", serves)
    replica.others()                          the other replicas, before this one announces itself
    replica.start(wake)                       keeps the lease, or tries to get it, from now on, in a thread
    fence = replica.look()                    its fence (a number that grows with each new leader) if it leads; else None
    replica.stop()                            gives the lease back, so that another replica need not wait until it ends

A leader's thread renews the lease even while a model is being made. A change of rows fails if another process has taken the
lease since the change began, so correctness does not depend on timing.
"""

import secrets
import threading
from collections.abc import Callable, Sequence

from sqlalchemy.exc import SQLAlchemyError

from sumus.logs import logger
from sumus.storage.leases import Leases, PresentReplica
from sumus.storage.store import Rows

LOG = logger("sumus.replica")
LASTS = 10.0
"""The duration of a lease, in seconds."""

RENEWED, SOUGHT = 0.3, 0.1
"""The fractions of a lease's duration after which the leader renews it, and after which another replica tries to get it."""


class Replica:
    """This process as one of the processes that share the rounds.

    Attributes:
        leases: The leases of the database.
        name: The replica's name, which is stored in its folder.
        serves: A hash of the replica's tasks and plans.
        lasts: The duration of a lease, in seconds.
        fence: The fence (number) of its lease; None if another replica leads.
        last_fence: The fence of the last lease that this replica saw, whichever replica holds it.
        leader: The replica that leads.
        there: The running replicas, including this one.
        trouble: The reason why this replica must not continue: another replica now serves other tasks or plans. Else empty.
    """

    def __init__(self, leases: Leases, name: str, serves: str = "", lasts: float = LASTS) -> None:
        """Make a replica with a name; see the class for the arguments."""
        self.leases, self.name, self.serves, self.lasts = leases, name, serves, lasts
        self.fence: int | None = None
        self.last_fence = 0
        self.leader = ""
        self.there: tuple[str, ...] = (name,)
        self.trouble = ""
        self._holder = f"{name}/{secrets.token_hex(8)}"
        self._begins = True
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def shared(self) -> bool:
        """Whether there may be other replicas."""
        return self.leases.shared

    def others(self, rows: Rows | None = None) -> Sequence[PresentReplica]:
        """List the other replicas. `rows` is an open transaction, if there is one."""
        there = self.leases.present(self.lasts, rows) if self.shared else ()
        return [each for each in there if each.name != self.name]

    def beat(self, rows: Rows | None = None) -> None:
        """Tell the other replicas that this one is running. `rows` is an open transaction, if there is one."""
        if self.shared:
            self.leases.beat(self.name, self.serves, rows)

    def start(self, changed: Callable[[], None]) -> None:
        """Keep the lease, or try to get it, from now on. `changed` is called from a thread when this replica begins or ceases
        to lead.
        """
        if self.shared:
            self._thread = threading.Thread(target=self._attend, args=(changed,), name="lease", daemon=True)
            self._thread.start()

    def look(self) -> int | None:
        """Keep the lease, or take it if it is free; return its fence if this replica leads. Any thread may call."""
        with self._lock:
            lease = self.leases.hold(self._holder, self.lasts, self._begins)
            self._begins = False
            self.beat()
            others = self.others()
            self.fence = lease.fence if lease.holder == self._holder else None
            self.leader, self.last_fence = lease.leader, lease.fence
            self.there = tuple(sorted([self.name, *(each.name for each in others)]))
            odd = [each.name for each in others if each.serves != self.serves]
            if odd and self.fence is None:
                self.trouble = (
                    f"replica {odd[0]} now serves other tasks or plans than this replica: stop one of the two"
                )
            return self.fence

    def stop(self) -> None:
        """Give the lease back. This replica no longer decides anything."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.leases.leave(self._holder)
        except SQLAlchemyError as error:
            LOG.warning("the lease could not be given back: %s", _line(error))

    def _attend(self, changed: Callable[[], None]) -> None:
        while not self._over.wait(self.lasts * (SOUGHT if self.fence is None else RENEWED)):
            before = self.fence
            try:
                self.look()
            except SQLAlchemyError as error:  # if this replica leads, it continues until another one does
                LOG.warning("the lease could not be read: %s", _line(error))
            if self.fence != before or self.trouble:
                changed()


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
