"""A server and an edge below it, which die by turns; devices ask the edge.

Every update that the edge has acknowledged must be in one sum of the server's, once. Otherwise it must be in a round
that the edge has marked as abandoned, because its sum came too late.
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.kills.audit import Found, Ledger, left_behind
from benchmarks.kills.fleet import PEACE, Address, Book, Following, Scripted, let_go_on, while_they_work
from benchmarks.kills.served import TASK, Job, Life, bundle
from sumus.protocol.round import State
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.sql import SqlStore


class Branch:
    """A server, an edge, and the edge's devices.

    Attributes:
        lives: The processes of the two.
        given_up: Reports in rounds that the edge abandoned.
        kills: The kills of either.
    """

    def __init__(self, lives: Sequence[Life], folder: Path, kind: str, devices: int) -> None:
        self.top, self.edge = lives
        self.bundle, self.book, self.ledger = bundle(kind), Book(), Ledger()
        self.kills, self.wrong, self._given_up = 0, list[str](), set[str]()
        self._jobs = Job(str(folder / "top"), None, kind), Job(str(folder / "edge"), None, kind)
        self._address, self._port = Address(), 0
        token = self._begin_top(edges=1)
        token = self._begin_edge(token, devices)
        self.devices = [
            Scripted(number, self.bundle.plan, self.book, Following(self._address)) for number in range(devices)
        ]
        for device in self.devices:
            device.enrol(token)

    def _begin_top(self, edges: int = 0) -> str:
        said = self.top.begin(replace(self._jobs[0], enrols=edges, for_edges=bool(edges)))
        self._port = said["port"]
        return said["token"]

    def _begin_edge(self, token: str = "", devices: int = 0) -> str:
        link = f"http://127.0.0.1:{self._port}" + (f"/#enrol={token}" if token else "")
        said = self.edge.begin(replace(self._jobs[1], upstream=link, enrols=devices))
        self._address.move(said["port"])
        return said["token"]

    def hit(self, rng: random.Random) -> None:
        """Kill the edge; or kill the server, whose next life has another address, and tell a new life of the edge."""
        both = rng.random() < 0.3
        if both:
            self.top.kill()
            time.sleep(0.3 * rng.random())
        self.edge.kill()
        self.kills += 1 + both
        self.read()
        if both:
            self._begin_top()
        self._begin_edge()

    def read(self) -> None:
        """Read the rows."""
        top, edge = (SqlStore.open(Path(job.data) / "sumus.db", f"{TASK}.train") for job in self._jobs)
        self.ledger.read(top)
        with edge.transaction() as rows:
            for row in rows.rounds():
                if row.state is State.ABANDONED:
                    self._given_up |= set(rows.counted_in(row.number))
        for store in (top, edge):
            store.close()

    def arrived(self) -> bool:
        """Return whether every acknowledged report has come to the server, or was given up."""
        self.read()
        counted = {id for those in self.ledger.counted.values() for id in those}
        return self.book.acknowledged <= counted | self._given_up

    def end(self) -> Found:
        """Audit."""
        until = time.monotonic() + PEACE
        while not self.arrived() and time.monotonic() < until:
            for device in self.devices:  # else the server waits long for work whose answer was lost
                device.decline()
            time.sleep(0.2)
        self.edge.kill()
        self.top.kill()
        self._begin_top()
        self.top.kill()
        self.read()
        counted = {id for those in self.ledger.counted.values() for id in those}
        self.book.acknowledged -= self._given_up - counted
        store = SqlStore.open(Path(self._jobs[0].data) / "sumus.db", f"{TASK}.train")
        left = left_behind(store)
        store.close()
        blobs = DirectoryBlobs(f"{self._jobs[0].data}/blobs")
        found = self.ledger.audit(self.bundle, self.book, len(self.devices), blobs)
        found.wrong += self.wrong + left
        if failed := self.book.answers.get("failed"):
            found.wrong.append(f"{failed} requests met a defect of the edge")
        if twice := self._given_up & counted:
            found.wrong.append(f"{len(twice)} reports are counted, and in rounds that the edge has given up")
        return found

    def close(self) -> None:
        """Close the connections."""
        for device in self.devices:
            device.close()


@contextmanager
def branch(lives: Sequence[Life], folder: Path, kind: str, devices: int) -> Iterator[Branch]:
    """Make a branch in a folder."""
    going = Branch(lives, folder, kind, devices)
    try:
        yield going
    finally:
        going.close()
        for life in lives:
            life.kill()


def battered(going: Branch, hits: int, rng: random.Random) -> Found:
    """Kill while devices work, then stop killing."""

    def disturb() -> None:
        for _ in range(hits):
            let_go_on(going.book, rng, 0.3)
            going.hit(rng)
        time.sleep(0.5)

    going.wrong += while_they_work(going.devices, going.book, disturb)
    return going.end()
