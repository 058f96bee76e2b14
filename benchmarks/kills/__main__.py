"""Kill servers, and check every promise that they made.

python -m benchmarks.kills            everything: random kills and every failpoint, on SQLite and PostgreSQL, and three servers
                                      that share a round, killed, stopped and resumed; about fifteen minutes
python -m benchmarks.kills --short    a sample, chosen by seed, and the controls: under two minutes

The last line has four figures: acknowledged updates that were lost, updates counted twice, models that equal the
recomputed ones, and the most models published for one round. The controls are servers with a bug; each bug must be
found. The time until another server leads is measured, but no limit is asserted.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from sqlalchemy import create_engine, text

from benchmarks.kills.audit import Found, Ledger, left_behind
from benchmarks.kills.disk import Markers, found_on_disk, vectors_of
from benchmarks.kills.edges import battered, branch
from benchmarks.kills.fleet import PEACE, Address, Book, Following, Scripted, let_go_on, while_they_work
from benchmarks.kills.replicas import LEASE, REPLICAS, Crowd, crowd, harassed
from benchmarks.kills.served import COHORT, TASK, Job, Life, bundle
from sumus.aggregate import Update
from sumus.server.replica import LASTS
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.sql import SqlStore
from sumus.wire.messages import Assignment
from tests.services import postgresql

DEVICES = 12


class Campaign:
    """A server's data, its lives, and the devices.

    Args:
        life: The server process.
        folder: The folder of its data.
        database: A PostgreSQL's URL; None for SQLite.
        kind: The kind of rounds, as in `served.bundle`.
        planted: A bug, a key of `PLANTED`; empty for none.
        devices: The number of devices.
    """

    def __init__(self, life: Life, folder: Path, database: str | None, kind: str, planted: str, devices: int) -> None:
        self.job = Job(str(folder), database, kind, planted=planted)
        self.life, self.bundle, self.book, self.ledger = life, bundle(kind), Book(), Ledger()
        self.address, self._died = Address(), life.kills + life.deaths
        self.devices = [
            Scripted(number, self.bundle.plan, self.book, Following(self.address), 0.5 if planted else 0.1)
            for number in range(devices)
        ]
        self.wrong: list[str] = []
        token = self.begin(enrols=devices)
        for device in self.devices:
            device.enrol(token)

    @property
    def deaths(self) -> int:
        """How often the server has died, without the two deaths at the end."""
        return self.life.kills + self.life.deaths - self._died - 2

    @property
    def url(self) -> str:
        """The URL of its rows."""
        return self.job.database or f"sqlite:///{self.job.data}/sumus.db"

    def begin(self, closing: int | None = None, dies: int | None = None, points: bool = False, enrols: int = 0) -> str:
        """Begin a life of the server."""
        job = replace(self.job, closing=closing, dies=dies, points=points, enrols=enrols)
        said = self.life.begin(job)
        self.address.move(said["port"])
        return said["token"]

    def read(self) -> list[str]:
        """Read the rows while no other process does; return those that should not exist."""
        store = SqlStore.open(self.url, f"{TASK}.train")
        self.ledger.read(store)
        left = left_behind(store)
        store.close()
        return left

    def end(self) -> Found:
        """Audit, after a last life has recovered what the life before it left."""
        self.life.kill()
        self.begin(points=True)
        self.life.passed()
        self.life.kill()
        left = self.read()
        found = self.ledger.audit(self.bundle, self.book, len(self.devices), DirectoryBlobs(f"{self.job.data}/blobs"))
        found.wrong += self.wrong + left
        if failed := self.book.answers.get("failed"):
            found.wrong.append(f"{failed} requests met a defect of the server")
        for device in self.devices:
            device.close()
        return found


def at_random(campaign: Campaign, kills: int, rng: random.Random) -> Found:
    """Kill at random moments while devices work, then stop killing."""

    def disturb() -> None:
        for _ in range(kills):
            let_go_on(campaign.book, rng)
            campaign.life.kill()
            campaign.read()
            campaign.begin()
        time.sleep(0.5)

    campaign.wrong += while_they_work(campaign.devices, campaign.book, disturb)
    return campaign.end()


class Steps:
    """Rounds with one report after the other, so that the last report closes the round while moments are watched."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign, self.round = campaign, 0

    def begin(self, at: int | None, recovering: bool = False) -> None:
        """Begin a life that dies at this moment of closing the next round, or of recovering."""
        self.campaign.life.kill()
        self.campaign.begin(None if recovering else self.round, at, True)

    def go(self) -> Sequence[str] | None:
        """Play a round. Return None if the server died while closing it, else the moments that it passed."""
        for device in self.campaign.devices:
            self._settle(device)
        for device in self.campaign.devices:
            device.train(self._asked(device))
        *others, last = self.campaign.devices
        for device in others:
            self._settle(device)
        with ThreadPoolExecutor(1) as sending:
            sending.submit(last.send)
            passed = self.campaign.life.passed()
            if passed is None:
                self.campaign.read()
                self.campaign.address.move(0)
        self.round += 1
        return passed

    def _asked(self, device: Scripted) -> Assignment:
        until = time.monotonic() + PEACE
        while time.monotonic() < until:
            answer = device.check_in(2.0)
            if answer is not None and answer.assignment is not None:
                return answer.assignment
        raise TimeoutError(f"no work in round {self.round}")

    def _settle(self, device: Scripted) -> None:
        until = time.monotonic() + PEACE
        while device.unsettled is not None and not device.send():
            if time.monotonic() > until:
                raise TimeoutError(f"a report of round {self.round} is not answered")


def everywhere(campaign: Campaign, most: int | None, rng: random.Random) -> tuple[Found, int]:
    """Die before and after every step of closing a round, and of recovering from there.

    A server that has died while it closed one round is started again, to die one moment later while it closes the next
    round.

    Args:
        campaign: The campaign.
        most: The most moments of each kind, drawn at random; None for all.
        rng: Draws them.

    Returns:
        The audit, and the number of moments there are.
    """
    steps = Steps(campaign)
    steps.begin(None)
    closing = steps.go() or ()
    closed = [number for number, name in enumerate(closing) if name == "after do_commit"][1]  # report, then commit
    for at in _some(len(closing), most, rng):
        steps.begin(at)
        steps.go()
    steps.begin(closed)
    steps.go()
    steps.begin(None, recovering=True)
    recovering = campaign.life.passed() or ()
    for at in _some(len(recovering), most, rng):
        steps.begin(closed)
        steps.go()
        steps.begin(at, recovering=True)
        campaign.life.passed()
    campaign.life.kill()
    campaign.begin()
    for device in campaign.devices:
        device.run(lambda: True)
    return campaign.end(), len(closing) + len(recovering)


def _some(number: int, most: int | None, rng: random.Random) -> list[int]:
    return list(range(number)) if most is None else sorted(rng.sample(range(number), min(most, number)))


def on_disk(campaign: Campaign, roots: Sequence[Path]) -> list[str]:
    """Play two rounds. Search the data after each counted report, and these folders after every second one.

    Returns:
        The files that hold a piece of an update or of a sum.
    """
    steps, found, sent = Steps(campaign), list[str](), set[str]()
    hop, began = campaign.bundle.plan.first_hop, time.time() - 60.0
    for _ in range(2):
        updates = list[Update]()
        for device in campaign.devices:
            device.train(steps._asked(device))
        for number, device in enumerate(campaign.devices):
            assert device.unsettled is not None
            updates.append(device.unsettled.update)
            steps._settle(device)
            places = [Path(campaign.job.data), *(roots if number % 2 else ())]
            found += found_on_disk(places, Markers(vectors_of(updates, hop)), began)
        sent |= set(campaign.book.sent)
    if not sent <= campaign.book.acknowledged:
        campaign.wrong.append("what was searched for was not all counted")
    return sorted(set(found))


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def database(url: str | None) -> Iterator[str | None]:
    """Make a new database beside this one; yield None for SQLite."""
    if url is None:
        yield None
        return
    name = f"campaign_{time.monotonic_ns()}"
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield url.replace("@/postgres?", f"@/{name}?")
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        engine.dispose()


def hurry(url: str) -> None:
    """Let a PostgreSQL not wait for the disk: here processes die, but the machine does not."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("ALTER SYSTEM SET fsync = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    engine.dispose()


@contextmanager
def campaign(life: Life, url: str | None, kind: str, planted: str = "", devices: int = DEVICES) -> Iterator[Campaign]:
    """Make a campaign in a folder and a database of its own."""
    with tempfile.TemporaryDirectory(prefix="sumus-kills-") as folder, database(url) as mine:
        try:
            yield Campaign(life, Path(folder) / "data", mine, kind, planted, devices)
        finally:
            life.kill()


def stepwise(going: Campaign) -> Campaign:
    """Let devices send everything once, so that a round's last report is its last request."""
    for device in going.devices:
        device.twice = 0.0
    return going


def shared(
    url: str, lives: Sequence[Life], short: bool, rng: random.Random
) -> Iterator[tuple[str, Crowd, Found, float]]:
    """Run servers that share a round; yield what was done to them, the result, and when it began."""
    some = [("synchronous", LEASE, 1)]
    for kind, lease, hits in (
        some if short else [("synchronous", LEASE, 30), ("buffered", LEASE, 30), ("synchronous", LASTS, 4)]
    ):
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="sumus-kills-") as folder, database(url) as mine:
            assert mine is not None
            with crowd(lives, Path(folder), mine, kind, DEVICES, lease) as going:
                found = harassed(going, hits, rng)
        yield f"{len(lives)} servers, {kind}, leases of {lease:g} s", going, found, began


def follows(url: str, lives: Sequence[Life], rng: random.Random) -> tuple[bool, str]:
    """Run the control of shared rounds: return whether a leader that never gives up is found, and what was seen."""
    with tempfile.TemporaryDirectory(prefix="sumus-kills-") as folder, database(url) as mine:
        assert mine is not None
        with crowd(lives, Path(folder), mine, "synchronous", DEVICES, planted="leads-for-ever") as going:
            found = harassed(going, 0, rng)
    seen = [wrong for wrong in found.wrong if "did not lead" in wrong]
    return bool(seen), "; ".join(seen)


def controls(life: Life, rng: random.Random) -> Iterator[tuple[str, bool, str]]:
    """Run with each planted bug; yield its name, whether it was found, and what was seen."""
    for planted, kind, kills in (
        ("acknowledges-early", "synchronous", 6),
        ("counts-again", "buffered", 2),
        ("forgets-seeds", "synchronous", 4),
    ):
        with campaign(life, None, kind, planted) as going:
            found = at_random(going, kills, rng)
        seen = {"acknowledges-early": found.lost, "counts-again": found.twice}
        yield planted, bool(seen.get(planted, found.models - found.equal)), str(found)
    with campaign(life, None, "plain", "seals-nothing", COHORT) as going:
        files = on_disk(stepwise(going), [life.log.parent])
    yield "seals-nothing", bool(files), f"pieces of updates in {len(files)} files"


def main() -> int:
    """Run everything. The exit status is 1 if a promise was broken, or a control was not found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="a sample, for every day")
    parser.add_argument("--seed", type=int, default=0, help="of when servers die, and of the sample (default 0)")
    args = parser.parse_args()
    rng, whole, kills, good = random.Random(args.seed), Found(), 0, True
    with (
        tempfile.TemporaryDirectory(prefix="sumus-kills-") as folder,
        postgresql() as url,
        Life(Path(folder) / "log") as life,
    ):
        for name, where in (("SQLite", None), ("PostgreSQL", url)):
            for kind in ("synchronous", "buffered"):
                began = time.monotonic()
                with campaign(life, where, kind) as going:
                    found = at_random(going, 3 if args.short else 40, rng)
                    died, answers = going.deaths, dict(sorted(going.book.answers.items()))
                _tell(f"{name}, {kind}, at random", died, found, began, f"answers {answers}")
                whole, kills = whole.plus(found), kills + died
                began = time.monotonic()
                with campaign(life, where, kind, devices=COHORT) as going:
                    found, moments = everywhere(stepwise(going), 2 if args.short else None, rng)
                    died = going.deaths
                _tell(f"{name}, {kind}, at failpoints", died, found, began, f"{moments} moments")
                whole, kills = whole.plus(found), kills + died
            with campaign(life, where, "plain", devices=COHORT) as going:
                data = [] if where is None else [Path(where.rpartition("=")[2])]
                files = on_disk(stepwise(going), [life.log.parent, *data])
            print(f"{name}, on disk: {len(files)} files hold pieces of updates or sums {files}", flush=True)
            good = good and not files
        with ExitStack() as stack:
            lives = [life, *(stack.enter_context(Life(Path(folder) / f"log{more}")) for more in range(1, REPLICAS))]
            for what, going, found, began in shared(url, lives, args.short, rng):
                took = ", ".join(f"{seconds:.2f}" for seconds in sorted(going.took))
                _tell(what, going.kills, found, began, f"{going.woken} leaders woken; another led after {took} s")
                whole, kills = whole.plus(found), kills + going.kills
            told = [("leads-for-ever", *follows(url, lives, rng))]
            for kind in ("synchronous", "buffered"):
                began = time.monotonic()
                with (
                    tempfile.TemporaryDirectory(prefix="sumus-kills-") as scratch,
                    branch(lives[:2], Path(scratch), kind, DEVICES) as below,
                ):
                    found = battered(below, 3 if args.short else 40, rng)
                _tell(
                    f"an edge, {kind}", below.kills, found, began, f"answers {dict(sorted(below.book.answers.items()))}"
                )
                whole, kills = whole.plus(found), kills + below.kills
        for planted, seen, what in (*told, *controls(life, rng)):
            print(f"control {planted}: {'found' if seen else 'NOT FOUND'}; {what}", flush=True)
            good = good and seen
    for line in whole.wrong:
        print(line)
    print(f"{kills} kills, {whole.acknowledged} updates acknowledged, {whole.rounds} rounds: {whole}", flush=True)
    return 0 if good and whole.good else 1


def _tell(what: str, kills: int, found: Found, began: float, more: str) -> None:
    print(
        f"{what}: {kills} kills, {found.acknowledged} acknowledged, {found} ({time.monotonic() - began:.0f} s; {more})",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
