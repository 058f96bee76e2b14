"""One of the processes that share a population's rounds: whether it leads, and who else is there.

    replica = Replica(leases, "web-1", serves)
    replica.others()                          before it is there itself
    replica.start(wake)                       keeps or seeks the lease from now on, in a thread of its own
    fence = replica.look()                    its fence, where it leads
    replica.stop()                            who waits for the lease need not wait for its end

A leader's thread renews the lease also while a model is made. What was begun under a lease that another has taken since is
refused by the rows: nothing here has to be in time.
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
"""Seconds that a lease lasts."""
RENEWED, SOUGHT = 0.3, 0.1
"""How often who leads renews it, and who does not asks for it: a part of that."""


class Replica:
    """leases: of the database.  name: of its folder.  serves: a hash of its tasks and plans.  lasts: seconds of a lease.

    fence: of its lease; None where another leads.  leader: who does.  there: who is there, itself among them.
    trouble: why it must not go on: others serve something else since.
    """

    def __init__(self, leases: Leases, name: str, serves: str = "", lasts: float = LASTS) -> None:
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
        """Whether others may be there."""
        return self.leases.shared

    def others(self, rows: Rows | None = None) -> Sequence[PresentReplica]:
        """Who else is there. rows: a transaction that is under way."""
        there = self.leases.present(self.lasts, rows) if self.shared else ()
        return [each for each in there if each.name != self.name]

    def beat(self, rows: Rows | None = None) -> None:
        """Be there. rows: a transaction that is under way."""
        if self.shared:
            self.leases.beat(self.name, self.serves, rows)

    def start(self, changed: Callable[[], None]) -> None:
        """Look now and then. changed: is called from a thread, when it leads, or does not any more."""
        if self.shared:
            self._thread = threading.Thread(target=self._attend, args=(changed,), name="lease", daemon=True)
            self._thread.start()

    def look(self) -> int | None:
        """Keep the lease, or take it where it is free; its fence, if this leads. Any thread."""
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
                self.trouble = f"replica {odd[0]} serves other tasks or plans since: stop one of the two"
            return self.fence

    def stop(self) -> None:
        """Leave. Nothing of it is decided any more."""
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
            except SQLAlchemyError as error:  # what it leads it goes on to lead, until another does
                LOG.warning("the lease could not be looked at: %s", _line(error))
            if self.fence != before or self.trouble:
                changed()


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
