"""Kill servers, and audit every promise they made.

python -m benchmarks.kills            all of it: random kills and every failpoint, on SQLite and PostgreSQL; about ten minutes
python -m benchmarks.kills --short    a sample, by seed, and the controls: under a minute and a half

The last line has the four figures: acknowledged updates lost, counted twice, models equal to the recomputed ones, and the most
models published of one round. The controls are servers with a bug; each must be found.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sqlalchemy import create_engine, text

from benchmarks.kills.audit import Found, Ledger, left_behind
from benchmarks.kills.disk import Markers, found_on_disk, vectors_of
from benchmarks.kills.fleet import Address, Book, Following, Scripted
from benchmarks.kills.served import COHORT, TASK, Job, Life, bundle
from sumus.aggregate import Update
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.sql import SqlStore
from sumus.wire.messages import Assignment
from tests.services import postgresql

DEVICES = 12
PATIENCE = 60.0
"""Seconds for devices to come to an end once nothing is killed any more."""


class Campaign:
    """A server's data, its lives, and the devices. folder: for all of it.  database: a PostgreSQL's URL, or None for SQLite."""

    def __init__(self, folder: Path, database: str | None, kind: str, planted: str = "", devices: int = DEVICES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.job = Job(str(folder / "data"), database, kind, planted=planted)
        self.folder, self.bundle, self.book, self.ledger = folder, bundle(kind), Book(), Ledger()
        self.address, self.life = Address(), Life(folder / "log")
        self.devices = [
            Scripted(number, self.bundle.plan, self.book, Following(self.address), 0.5 if planted else 0.1)
            for number in range(devices)
        ]
        self.wrong: list[str] = []
        token = self.begin(enrols=devices)
        for device in self.devices:
            device.enrol(token)

    @property
    def url(self) -> str:
        """Of its rows."""
        return self.job.database or f"sqlite:///{self.job.data}/sumus.db"

    def begin(self, closing: int | None = None, dies: int | None = None, points: bool = False, enrols: int = 0) -> str:
        """A life of the server."""
        job = replace(self.job, closing=closing, dies=dies, points=points, enrols=enrols)
        said = self.life.begin(job)
        self.address.move(said["port"])
        return said["token"]

    def read(self) -> None:
        """Read the rows, while nobody else does."""
        store = SqlStore.open(self.url, f"{TASK}.train")
        self.ledger.read(store)
        store.close()

    def end(self) -> Found:
        """The audit, of a server that has come to rest."""
        self.life.close()
        self.read()
        found = self.ledger.audit(self.bundle, self.book, len(self.devices), DirectoryBlobs(f"{self.job.data}/blobs"))
        store = SqlStore.open(self.url, f"{TASK}.train")
        found.wrong += self.wrong + left_behind(store)
        if failed := self.book.answers.get("failed"):
            found.wrong.append(f"{failed} requests met a defect of the server")
        store.close()
        for device in self.devices:
            device.close()
        return found


def at_random(campaign: Campaign, kills: int, rng: random.Random) -> Found:
    """Kills at any moment while devices work, then peace until every one of them is told what became of its last report."""
    enough, over = threading.Event(), campaign.book.over
    with ThreadPoolExecutor(len(campaign.devices)) as pool:
        working = [pool.submit(device.run, enough.is_set) for device in campaign.devices]
        try:
            for _ in range(kills):
                time.sleep(rng.choice((0.03, 0.15, 0.4, 0.7)) * rng.random())
                campaign.life.kill()
                campaign.read()
                campaign.begin()
            time.sleep(0.5)
            enough.set()
            wait(working, PATIENCE, FIRST_EXCEPTION)
        finally:
            enough.set()
            over.set()
    for one in working:
        one.result()
    if waiting := [device.number for device in campaign.devices if device.unsettled is not None]:
        campaign.wrong.append(f"devices {waiting} were not told what became of their reports")
    return campaign.end()


class Steps:
    """Rounds one report after the other, so that the last one of each closes it while moments are watched."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign, self.round = campaign, 0

    def begin(self, at: int | None, recovering: bool = False) -> None:
        """A life that dies at this moment of closing the next round, or of recovering; its devices are told what they wait for."""
        self.campaign.life.kill()
        self.campaign.begin(None if recovering else self.round, at, True)

    def go(self) -> Sequence[str] | None:
        """A round; None where closing it died, or the moments that it survived."""
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
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            answer = device.check_in(2.0)
            if answer is not None and answer.assignment is not None:
                return answer.assignment
        raise TimeoutError(f"no work in round {self.round}")

    def _settle(self, device: Scripted) -> None:
        until = time.monotonic() + PATIENCE
        while device.unsettled is not None and not device.send():
            if time.monotonic() > until:
                raise TimeoutError(f"a report of round {self.round} is not answered")


def everywhere(campaign: Campaign, most: int | None, rng: random.Random) -> tuple[Found, int]:
    """Die before and after everything that closing a round does, and that recovering from there does; of each, at most so many
    moments, drawn. Also how many there are in all.

    A server that has died while it closed one round is begun again to die while it closes the next one, a moment later.
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
    """Two rounds, with a search of every file after each report that was counted; the files that hold what somebody sent."""
    steps, found, sent = Steps(campaign), list[str](), set[str]()
    hop = campaign.bundle.plan.first_hop
    for _ in range(2):
        updates = list[Update]()
        for device in campaign.devices:
            device.train(steps._asked(device))
        for device in campaign.devices:
            assert device.unsettled is not None
            updates.append(device.unsettled.update)
            steps._settle(device)
            found += found_on_disk([campaign.folder, *roots], Markers(vectors_of(updates, hop)))
        sent |= set(campaign.book.sent)
    if not sent <= campaign.book.acknowledged:
        campaign.wrong.append("what was searched for was not all counted")
    return sorted(set(found))


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def database(url: str | None) -> Iterator[str | None]:
    """A new database beside this one; None for SQLite."""
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


@contextmanager
def campaign(url: str | None, kind: str, planted: str = "", devices: int = DEVICES) -> Iterator[Campaign]:
    """A campaign in a folder and a database of its own."""
    with tempfile.TemporaryDirectory(prefix="sumus-kills-") as folder, database(url) as mine:
        going = Campaign(Path(folder), mine, kind, planted, devices)
        try:
            yield going
        finally:
            going.life.close()


def stepwise(going: Campaign) -> Campaign:
    """Devices that say everything once, so that a round's last report is its last."""
    for device in going.devices:
        device.twice = 0.0
    return going


def controls(rng: random.Random) -> Iterator[tuple[str, bool, str]]:
    """Each planted bug: its name, whether it was found, and what was seen."""
    for planted, kills in (("acknowledges-early", 8), ("counts-again", 1), ("forgets-seeds", 5)):
        with campaign(None, "synchronous", planted) as going:
            found = at_random(going, kills, rng)
        seen = {"acknowledges-early": found.lost, "counts-again": found.twice}
        yield planted, bool(seen.get(planted, found.models - found.equal)), str(found)
    with campaign(None, "plain", "seals-nothing", COHORT) as going:
        files = on_disk(stepwise(going), [])
    yield "seals-nothing", bool(files), f"pieces of updates in {len(files)} files"


def main() -> int:
    """All of it; 1 where a promise was broken, or a control not found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="a sample, for every day")
    parser.add_argument("--seed", type=int, default=0, help="of when servers die, and of the sample (default 0)")
    args = parser.parse_args()
    rng, whole, kills, good = random.Random(args.seed), Found(), 0, True
    with postgresql() as url:
        for name, where in (("SQLite", None), ("PostgreSQL", url)):
            for kind in ("synchronous", "buffered"):
                began = time.monotonic()
                with campaign(where, kind) as going:
                    found = at_random(going, 5 if args.short else 40, rng)
                    died, answers = going.life.kills - 1, dict(sorted(going.book.answers.items()))
                _tell(f"{name}, {kind}, at random", died, found, began, f"answers {answers}")
                whole, kills = whole.plus(found), kills + died
                began = time.monotonic()
                with campaign(where, kind, devices=COHORT) as going:
                    found, moments = everywhere(stepwise(going), 4 if args.short else None, rng)
                    died = going.life.deaths
                _tell(f"{name}, {kind}, at failpoints", died, found, began, f"{moments} moments")
                whole, kills = whole.plus(found), kills + died
            with campaign(where, "plain", devices=COHORT) as going:
                data = [] if where is None else [Path(where.rpartition("=")[2]) / "data"]
                files = on_disk(stepwise(going), data)
            print(f"{name}, on disk: {len(files)} files hold pieces of updates or sums {files}", flush=True)
            good = good and not files
    for planted, seen, what in controls(rng):
        print(f"control {planted}: {'found' if seen else 'NOT FOUND'}; {what}", flush=True)
        good = good and seen
    for line in whole.wrong:
        print(line)
    print(f"{kills} kills, {whole.acknowledged} updates acknowledged, {whole.rounds} rounds: {whole}", flush=True)
    return 0 if good and whole.good else 1


def _tell(what: str, kills: int, found: Found, began: float, more: str) -> None:
    print(f"{what}: {kills} kills, {found.acknowledged} acknowledged, {found} ({time.monotonic() - began:.0f} s; {more})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
