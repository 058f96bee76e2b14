"""Servers that share a round are killed, stopped and resumed while devices ask any of them. The time until another
leads is measured.

A trigger in the database records which process writes each model, and which process holds the lease at that moment. So
it is seen if a leader that was stopped writes once more when it resumes. Another trigger records how late each report
was counted; this depends on when the leader made the models before.
"""

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy import create_engine, text

from benchmarks.kills.audit import Found, Ledger, left_behind
from benchmarks.kills.fleet import PEACE, Address, Anywhere, Book, Scripted, let_go_on, while_they_work
from benchmarks.kills.served import COHORT, TASK, Job, Life, bundle
from sumus.protocol.round import State
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.sql import SqlStore

REPLICAS = 3
LEASE = 1.0
"""Seconds of a lease, few so that a campaign need not wait long."""
_WITNESS = """
CREATE TABLE written (place bigserial, version bigint, by text, holder text, fence bigint);
CREATE FUNCTION witness() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO written (version, by, holder, fence)
        SELECT NEW.version, current_setting('application_name'), split_part(holder, '/', 1), fence FROM lease;
    RETURN NEW;
END $$;
CREATE TRIGGER witness AFTER INSERT OR UPDATE ON model FOR EACH ROW EXECUTE FUNCTION witness();
CREATE TABLE late (id text PRIMARY KEY, staleness bigint);
CREATE FUNCTION count_late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO late VALUES (NEW.id, NEW.staleness) ON CONFLICT DO NOTHING;
    RETURN NEW;
END $$;
CREATE TRIGGER late AFTER INSERT OR UPDATE ON session FOR EACH ROW WHEN (NEW.sum IS NOT NULL)
    EXECUTE FUNCTION count_late();
"""
_STALE = """
SELECT count(*) FROM (SELECT *, max(fence) OVER (ORDER BY place) AS highest FROM written WHERE version > 0) AS each
WHERE by <> holder OR fence < highest
"""


class Crowd:
    """Replicas and devices.

    Args:
        lives: The processes of the replicas.
        folder: The folder of all their data.
        database: A PostgreSQL's URL.
        kind: The kind of rounds.
        devices: The number of devices.
        lease: Seconds of a lease.
        planted: A bug. The campaign then goes on until a replica that does not lead has written.

    Attributes:
        took: Seconds from a leader's end to the next one's lease.
        woken: The number of leaders that were stopped, and resumed while another led.
    """

    def __init__(
        self,
        lives: Sequence[Life],
        folder: Path,
        database: str,
        kind: str,
        devices: int,
        lease: float = LEASE,
        planted: str = "",
    ) -> None:
        self.lives, self.bundle, self.book, self.ledger = lives, bundle(kind), Book(), Ledger()
        self.took, self.woken, self.kills, self.wrong = list[float](), 0, 0, list[str]()
        self.addresses = [Address() for _ in lives]
        self._engine = create_engine(database, isolation_level="AUTOCOMMIT")
        self._blobs, self._stopped, self._control = folder / "blobs", set[int](), bool(planted)
        self._jobs = list[Job]()
        for number in range(len(lives)):
            data = folder / f"r{number}"
            data.mkdir(mode=0o700)
            (data / "replica").write_text(data.name)
            self._jobs.append(Job(str(data), database, kind, planted=planted, shares=str(folder), lease=lease))
        token = self.begin(0, devices)
        with self._engine.connect() as connection:
            connection.execute(text(_WITNESS))
        self.devices = [
            Scripted(number, self.bundle.plan, self.book, Anywhere(self.addresses, number)) for number in range(devices)
        ]
        for number in range(1, len(lives)):
            self.begin(number)
        for device in self.devices:
            device.enrol(token)

    def begin(self, number: int, enrols: int = 0) -> str:
        """Begin a replica's next life; return a token, if devices are to enrol."""
        job = self._jobs[number]
        said = self.lives[number].begin(Job(**{**job.__dict__, "enrols": enrols}))
        self.addresses[number].move(said["port"])
        return said["token"]

    def kill(self, number: int) -> None:
        """Kill a replica with SIGKILL."""
        self.lives[number].kill()
        self.kills += 1

    def signal(self, number: int, which: signal.Signals) -> None:
        """Stop a replica, or let it go on."""
        pid = self.lives[number].pid
        assert pid is not None
        os.kill(pid, which)
        (self._stopped.add if which is signal.SIGSTOP else self._stopped.discard)(number)

    def leads(self) -> tuple[int, int]:
        """Return the replica that holds the lease, and its fence."""
        with self._engine.connect() as connection:
            holder, fence = connection.execute(text("SELECT holder, fence FROM lease")).one()
        return (int(holder[1:].partition("/")[0]) if holder else -1), fence

    def wait_for_another(self, fence: int) -> None:
        """Wait until another replica has taken the lease, and record how long that took."""
        began = time.monotonic()
        while self.leads()[1] == fence:
            if time.monotonic() - began > PEACE:
                raise TimeoutError("nobody has taken the lease")
            time.sleep(0.01)
        self.took.append(time.monotonic() - began)

    def hit(self, rng: random.Random) -> None:
        """Disturb one of the replicas, more often the leader."""
        leader, fence = self.leads()
        number = leader if leader >= 0 and rng.random() < 0.7 else rng.randrange(len(self.lives))
        how = rng.choice(("killed", "killed, and back at once", "stopped"))
        if how == "stopped":
            self.signal(number, signal.SIGSTOP)
        else:
            self.kill(number)
        if number == leader and how != "killed, and back at once":
            self.wait_for_another(fence)
        time.sleep(0.3 * rng.random())
        if how == "stopped":
            self.woken += self.leads()[0] != leader == number
            self.signal(number, signal.SIGCONT)
        else:
            self.begin(number)

    def wake_a_leader(self) -> None:
        """Stop the leader until another one leads, and let both go on for a few models."""
        leader, fence = self.leads()
        self.signal(leader, signal.SIGSTOP)
        self.wait_for_another(fence)
        self.signal(leader, signal.SIGCONT)
        self.woken += 1
        until, wanted = time.monotonic() + PEACE / 4, len(self.book.acknowledged) + 8 * COHORT
        while len(self.book.acknowledged) < wanted and time.monotonic() < until:
            time.sleep(0.01)
        until = time.monotonic() + PEACE
        while self._control and not self.stale() and time.monotonic() < until:  # it writes only by chance
            time.sleep(0.1)

    def stale(self) -> int:
        """Return how many models were written by a replica that did not lead."""
        with self._engine.connect() as connection:
            return connection.execute(text(_STALE)).scalar_one()

    def read(self) -> list[str]:
        """Read the rows; return those that should not exist at the end."""
        store = SqlStore.open(self._jobs[0].database or "", f"{TASK}.train")
        try:
            self.ledger.read(store)
            return left_behind(store)
        finally:
            store.close()

    def end(self) -> Found:
        """Audit, after the leader has finished its work."""
        until = time.monotonic() + PEACE
        while (left := self.read()) or State.CLOSING in self.ledger.states.values():
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        with self._engine.connect() as connection:
            self.ledger.late = {row.id: row.staleness for row in connection.execute(text("SELECT * FROM late"))}
        found = self.ledger.audit(self.bundle, self.book, len(self.devices), DirectoryBlobs(self._blobs))
        found.wrong += self.wrong + left
        if failed := self.book.answers.get("failed"):
            found.wrong.append(f"{failed} requests met a defect of a server")
        if stale := self.stale():
            found.wrong.append(f"{stale} models were written by a server that did not lead")
        return found

    def close(self) -> None:
        """End all processes and connections."""
        for number in list(self._stopped):
            self.signal(number, signal.SIGCONT)
        for device in getattr(self, "devices", ()):
            device.close()
        for life in self.lives:
            life.kill()
        self._engine.dispose()


@contextmanager
def crowd(
    lives: Sequence[Life], folder: Path, database: str, kind: str, devices: int, lease: float = LEASE, planted: str = ""
) -> Iterator[Crowd]:
    """Start servers that share a folder and a database."""
    with ExitStack() as stack:
        for life in lives:
            stack.callback(life.kill)
        going = Crowd(lives, folder, database, kind, devices, lease, planted)
        stack.callback(going.close)
        yield going


def harassed(going: Crowd, hits: int, rng: random.Random) -> Found:
    """Disturb replicas while devices work; at last stop and resume a leader; then stop disturbing."""

    def disturb() -> None:
        for _ in range(hits):
            let_go_on(going.book, rng)
            going.hit(rng)
            going.read()
        going.wake_a_leader()

    going.wrong += while_they_work(going.devices, going.book, disturb)
    return going.end()
