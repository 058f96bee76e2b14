"""The server under load: how many devices one process can answer, compared with what the machine allows.

    python -m benchmarks.server                        on SQLite (six minutes)
    python -m benchmarks.server --database postgresql  on a PostgreSQL of its own
    python -m benchmarks.server --seconds 1            a quick look
    python -m benchmarks.server --write                also put the table into docs/results.md

The server runs in a process of its own, over loopback, with its limits of requests lifted. A generator in another
process, on the same two cores, sends requests that were signed before. The bound is a server that only receives:
uvicorn with a raw ASGI application that reads the body and answers, and Starlette with msgspec for check-ins. Both are
measured by turns, and the median of the turns is shown. "Answered" means that what the answer promises is on the disk.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
import timeit
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import create_engine, make_url

from benchmarks.figures import three_digits, times
from benchmarks.results import write_table
from benchmarks.server_load import generator
from benchmarks.server_load.devices import Device
from benchmarks.server_load.generator import Load
from benchmarks.server_load.served import Job, Process, bundle, bundles, enrol, process
from sumus.aggregate import Update
from sumus.operations.service import open_service
from sumus.operations.stores import Storage
from sumus.protocol.round import DeviceRow as ProtocolDevice
from sumus.protocol.round import Session
from sumus.rounds.run import DeviceCheckIn
from sumus.rounds.stages import ClearReport
from sumus.storage.identities import Identity
from sumus.storage.sql import SqlStore
from sumus.wire.messages import CheckInRequest

MIB = 2**20
SMALL, LARGE = 2**16, 2**20
"""Parameters: float32, so 256 KiB and 4 MiB."""
HEADER = [
    "",
    "gate",
    "figure",
    "answered within: median, 99 %",
    "bound",
    "of it",
    "ms of a core each: server, generator",
]


@dataclass(frozen=True)
class Scale:
    """The length of the measurements.

    Attributes:
        seconds: Seconds of a measurement.
        turns: Turns of each measurement.
        soak: Uploads of the memory test.
        slow: Connections that stay open.
        rounds: Rounds of 8 devices.
        database: A PostgreSQL's URL; None for SQLite.
    """

    seconds: float = 5.0
    turns: int = 3
    soak: int = 10_000
    slow: int = 200
    rounds: int = 20
    database: str | None = None

    def enough(self, rate: float) -> int:
        """Return more requests than a turn can use up at this rate."""
        return max(8, round(rate * self.seconds))


@dataclass
class Compared:
    """The turns of a measurement, and of its bound.

    Attributes:
        ours: The turns of our server.
        bound: The turns of the bound.
        cpu: The server's CPU seconds for one request.
    """

    ours: list[Load] = field(default_factory=list[Load])
    bound: list[Load] = field(default_factory=list[Load])
    cpu: list[float] = field(default_factory=list[float])

    def row(self, what: str, gate: str, unit: Callable[[Load], float], shown: str) -> list[str]:
        """Return a row of the table. unit: takes the figure from a load."""
        ours = statistics.median(map(unit, self.ours))
        bound = statistics.median(map(unit, self.bound)) if self.bound else None
        within = [statistics.median(load.percentile(q) for load in self.ours) * 1e3 for q in (50, 99)]
        return [
            what,
            gate,
            f"**{three_digits(ours)}** {shown}",
            " ms, ".join(map(three_digits, within)) + " ms",
            "" if bound is None else three_digits(bound),
            "" if bound is None else times(ours / bound),
            ", ".join(f"{statistics.median(each) * 1e3:.2f}" for each in (self.cpu, [load.cost for load in self.ours])),
        ]


class Bench:
    """What measurements share.

    Attributes:
        load: The generator's process.
        bare: The bound's process.
        notes: What went wrong, or should be known.
    """

    def __init__(self, scale: Scale, load: generator.Generator, bare: Process, folder: Path) -> None:
        self.scale, self.load, self.bare, self._folder = scale, load, bare, folder
        self.notes: list[str] = []
        self._served = 0

    def job(self, sizes: Sequence[int], devices: int, cohort: int = 0) -> Job:
        """Return the job of a server with a folder of its own."""
        self._served += 1
        return Job(str(self._folder / str(self._served)), self._database(), tuple(sizes), cohort, devices)

    def _database(self) -> str | None:
        if self.scale.database is None:
            return None
        url, name = make_url(self.scale.database), f"load{self._served}"
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        engine.dispose()
        return url.set(database=name).render_as_string(hide_password=False)

    def do(self, what: str, function: Callable[..., Load], *arguments: object) -> Load:
        """Let the generator work, and check that it got the right answers."""
        load = self.load.begin(function, *arguments).result()
        wrong = {status: count for status, count in load.answers.items() if status not in (200, 304)}
        if wrong:
            self.notes.append(f"{what}: {wrong} of {len(load.latencies)}")
        return load

    def measured(
        self, server: Process, what: str, into: Compared, function: Callable[..., Load], *asked: object
    ) -> Load:
        """Measure one turn on the server."""
        used = server.cpu
        load = self.do(what, function, server.port, *asked)
        into.ours.append(load)
        into.cpu.append((server.cpu - used) / len(load.latencies))
        return load


def fingerprints(job: Job) -> tuple[str, ...]:
    """Return the fingerprints of its tasks."""
    return tuple(bundle(size, job).plan.description.fingerprint for size in job.sizes)


def _alone(what: str, gate: str, figure: str) -> list[str]:
    """Return a row without a bound."""
    return [what, gate, figure, *[""] * (len(HEADER) - 3)]


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


def check_ins(bench: Bench) -> list[list[str]]:
    """Measure check-ins that are answered with work, of known and unknown devices, and check-ins that get no work."""
    scale, known, fresh, later = bench.scale, Compared(), Compared(), Compared()
    some = scale.enough(6000)
    job = bench.job([1024], some * scale.turns)
    with process(job) as server:
        for turn in range(scale.turns):
            devices = range(turn * some, (turn + 1) * some)
            asked = devices, 0, fingerprints(job), 64, scale.seconds
            known.bound.append(bench.do("bound", generator.check_ins, bench.bare.port, *asked))
            met = bench.measured(server, "check-ins", fresh, generator.check_ins, *asked)
            again = devices[: len(met.latencies)], 1, *asked[2:]
            bench.measured(server, "check-ins", known, generator.check_ins, *again)
    fresh.bound = known.bound
    job = bench.job([1024], 1000, cohort=2)
    with process(job) as server:
        bench.do("check-ins", generator.check_ins, server.port, range(1000), 0, fingerprints(job), 64)
        for turn in range(scale.turns):
            many = [number % 998 + 2 for number in range(scale.enough(12_000))]
            serial = 1 + turn
            asked = many, serial, fingerprints(job), 64, scale.seconds
            later.bound.append(bench.do("bound", generator.check_ins, bench.bare.port, *asked))
            bench.measured(server, "later", later, generator.check_ins, *asked)
    return [
        known.row(
            "check-ins answered with work, 64 connections", "≥ 2,000/s, 99 % < 100 ms", lambda load: load.rate, "/s"
        ),
        fresh.row("the same, of devices not heard of before", "", lambda load: load.rate, "/s"),
        later.row("check-ins answered with “later”", "≥ 6,000/s", lambda load: load.rate, "/s"),
    ]


def uploads(bench: Bench) -> list[list[str]]:
    """Measure reports, which are acknowledged once they are committed."""
    return [
        _uploads(bench, SMALL, 1500, "≥ 500/s, 99 % < 250 ms"),
        _uploads(bench, LARGE, 200, "≥ 40/s, 99 % < 2 s"),
    ]


def _uploads(bench: Bench, size: int, most: float, gate: str) -> list[str]:
    scale, found = bench.scale, Compared()
    some = scale.enough(most)
    job = bench.job([size], some * scale.turns)
    with process(job) as server:
        everyone = range(some * scale.turns)
        bench.do("check-ins", generator.check_ins, server.port, everyone, 0, fingerprints(job), 64)
        for turn in range(scale.turns):
            asked = range(turn * some, (turn + 1) * some), 0, [size], 32, scale.seconds
            found.bound.append(bench.do("bound", generator.uploads, bench.bare.port, *asked))
            bench.measured(server, "uploads", found, generator.uploads, *asked)
    what = f"uploads of {three_digits(size * 4 / MIB)} MiB, 32 at once"
    return found.row(what, gate, lambda load: load.rate, "/s")


def committer(job: Job, updates: int) -> float:
    """Return how many updates a second the deciding thread counts, if nothing lies between it and the senders."""

    async def count() -> float:
        server = service.server
        run = server.tasks[0].training
        ids = [Device(number).id for number in range(updates)]
        prints = fingerprints(job)
        await asyncio.gather(*(server.check_in(DeviceCheckIn(id, CheckInRequest(0, "s0", prints))) for id in ids))
        scale = 0.5 / job.sizes[0] ** 0.5  # half as long as the clip, as the uploads are
        values = np.random.default_rng(0).normal(0.0, scale, job.sizes[0]).astype(np.float32)
        left, began = iter(ids), time.perf_counter()

        async def bring() -> None:
            for id in left:
                update = Update(id, {"params": {"w": values}}, 10, {"loss": (5.0, 10)})
                await server.report(run, ClearReport(f"{id}/s0", run.hop.check(update)))

        await asyncio.gather(*(bring() for _ in range(32)))
        return updates / (time.perf_counter() - began)

    Path(job.data).mkdir(mode=0o700)
    enrol(job)
    service = open_service(bundles(job), Storage(Path(job.data), job.database))
    service.server.start()
    try:
        return asyncio.run(count())
    finally:
        service.close()


def committer_alone(bench: Bench) -> list[list[str]]:
    """Measure the committer without HTTP."""
    found = [
        bench.load.begin(committer, bench.job([LARGE], bench.scale.enough(100) + 1), bench.scale.enough(100)).result()
        for _ in range(bench.scale.turns)
    ]
    rate = f"**{three_digits(statistics.median(found))}** /s"
    return [_alone("the committer alone, updates of 4.00 MiB", "≥ 200/s", rate)]


def round_latency(bench: Bench) -> list[list[str]]:
    """Measure the time from eight reports to eight devices with the next model."""
    job = bench.job([LARGE], 8, cohort=8)
    with process(job) as server:
        took = bench.load.begin(
            generator.rounds, server.port, 8, LARGE, fingerprints(job)[0], bench.scale.rounds
        ).result()
    shown = f"**{three_digits(statistics.median(took))}** s, {three_digits(max(took))} s at most"
    return [_alone("a round of 8 devices and 1,048,576 parameters, from the reports to the next model", "", shown)]


def downloads(bench: Bench) -> list[list[str]]:
    """Measure downloads of a model, and requests whether it has changed."""
    scale, whole, same = bench.scale, Compared(), Compared()
    job = bench.job([LARGE], 2)
    with process(job) as server:
        model = bench.load.begin(generator.work_for, server.port, 0, 0, fingerprints(job)[0]).result().broadcast.sha256
        for _ in range(scale.turns):
            bench.measured(server, "downloads", whole, generator.downloads, model, False, 8, scale.seconds)
            bench.measured(server, "unchanged", same, generator.downloads, model, True, 64, scale.seconds)
    return [
        whole.row(
            "download of a model of 4.00 MiB", "≥ 800 MB/s", lambda load: load.received / load.seconds / 1e6, "MB/s"
        ),
        same.row("the same, unchanged (304)", "≥ 6,000/s", lambda load: load.rate, "/s"),
    ]


def memory(bench: Bench) -> list[list[str]]:
    """Measure resident memory while many reports of three sizes come, and while slow connections stay open."""
    scale, sizes = bench.scale, [SMALL // 4, SMALL // 2, SMALL]
    job = bench.job(sizes, scale.soak + 3 * scale.slow)
    with process(job) as server:
        before = server.rss
        for task in range(len(sizes)):
            mine = range(task, scale.soak + 3 * scale.slow, len(sizes))
            bench.do("check-ins", generator.check_ins, server.port, mine, 0, (fingerprints(job)[task],), 64)
        coming, seen = bench.load.begin(generator.uploads, server.port, range(scale.soak), 0, sizes, 32), list[int]()
        while not coming.done():
            seen.append(server.rss)
            with suppress(TimeoutError):
                coming.exception(0.05)
        wrong = {status: n for status, n in coming.result().answers.items() if status != 200}
        quarters = [max(part) for part in np.array_split(np.array(seen), 4) if part.size]
        slow = [number for number in range(scale.soak, scale.soak + 3 * scale.slow) if number % len(sizes) == 2]
        held = generator.halves(server.port, slow, 0, sizes[2])
        time.sleep(1.0)
        with_slow = server.rss
        for each in held:
            each.close()
    if wrong:
        bench.notes.append(f"soak: {wrong}")
    shown = " → ".join(three_digits(float(each) / 1e6) for each in [before, *quarters])
    return [
        _alone(
            f"memory over {scale.soak:,} uploads of 64 to 256 KiB: at the start, and the most in each quarter",
            "≤ 512 MB, no growth",
            f"**{shown}** MB",
        ),
        _alone(
            f"memory with {len(held)} connections that have sent half a report",
            "≤ 512 MB",
            f"**{three_digits(with_slow / 1e6)}** MB",
        ),
    ]


def recovery(bench: Bench) -> list[list[str]]:
    """Measure the time from a kill in mid-round to the next answer."""
    ready, first = list[float](), list[float]()
    for _ in range(bench.scale.turns):
        job = bench.job([LARGE], 32, cohort=32)
        with process(job) as server:
            bench.do("check-ins", generator.check_ins, server.port, range(32), 0, fingerprints(job), 32)
            bench.do("uploads", generator.uploads, server.port, range(16), 0, [LARGE], 16)
            server.kill()
        began = time.perf_counter()
        with process(job) as server:
            while not _is_ready(server.port):
                time.sleep(0.005)
            ready.append(time.perf_counter() - began)
            bench.do("uploads", generator.uploads, server.port, range(16, 17), 0, [LARGE], 1)
            first.append(time.perf_counter() - began)
    shown = f"**{three_digits(statistics.median(ready))}** s, {three_digits(statistics.median(first))} s"
    return [
        _alone("from the start after kill −9 in mid-round to /readyz, and to the first report acknowledged", "", shown)
    ]


def _is_ready(port: int) -> bool:
    with suppress(OSError, urllib.error.URLError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1.0).status == 200
    return False


def machine(bench: Bench) -> list[list[str]]:
    """Measure the parts of a request on this machine, beside their times on the machine that the gates were set on."""
    body, twice = os.urandom(4 * MIB), os.urandom(8 * MIB)
    values, total = np.random.default_rng(0).normal(size=LARGE).astype(np.float32), np.zeros(LARGE)
    key, seal = Ed25519PrivateKey.generate(), AESGCM(os.urandom(32))
    text = os.urandom(250)
    signature, public = key.sign(text), key.public_key()
    works: tuple[tuple[str, float, Callable[[], object]], ...] = (
        ("Ed25519, a signature checked", 0.06, lambda: public.verify(signature, text)),
        ("SHA-256 of 4 MiB", 2.03, lambda: sha256(body).digest()),
        ("AES-GCM over 8 MiB", 0.45, lambda: seal.encrypt(bytes(12), twice, b"")),
        ("float32 added to float64, 1,048,576 of them", 0.44, lambda: np.add(total, values, out=total)),
    )
    rows: list[list[str]] = []
    for what, there, work in works:
        took = min(timeit.repeat(work, number=5, repeat=7)) / 5 * 1e3
        rows.append(
            _alone(
                f"this machine: {what}", f"{there} ms there", f"**{three_digits(took)}** ms, × {times(took / there)}"
            )
        )
    return rows


def rows_of_devices(bench: Bench) -> list[list[str]]:
    """Measure what the database holds of each device that has taken part once."""
    many = bench.scale.enough(4000)
    job = bench.job([1], 2)
    Path(job.data).mkdir()
    store = SqlStore.open(job.database or Path(job.data) / "sumus.db")
    before = _size(job)
    for first in range(0, many, 1000):
        devices = [sha256(f"{number}".encode()) for number in range(first, min(many, first + 1000))]
        with store.identities().transaction() as people:
            for device in devices:
                people.put_identity(Identity(device.hexdigest(), "default", device.digest(), "enrolled", 1e9, 1e9))
        with store.transaction() as rows:
            for id in (device.hexdigest() for device in devices):
                session = Session(f"{id}/{id[:32]}", id, 1, 0, 0, 1e9, "counted", sum=0)
                rows.put_session(session)
                rows.put_device(ProtocolDevice(id, session, 0, session.id, 1))
    store.close()
    shown = f"**{three_digits((_size(job) - before) / many)}** MB for a million"
    return [_alone("rows of a device that has taken part", "", shown)]


def _size(job: Job) -> int:
    """Return the bytes of the database."""
    if job.database is None:
        return sum(path.stat().st_size for path in Path(job.data).glob("sumus.db*"))
    engine = create_engine(job.database)
    with engine.connect() as connection:
        size = connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one()
    engine.dispose()
    return int(size)


PARTS = (machine, check_ins, uploads, committer_alone, round_latency, downloads, memory, recovery, rows_of_devices)


@contextmanager
def benching(scale: Scale) -> Generator[Bench, None, None]:
    """Provide everything that measurements need, for a block."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sumus-load-")))
        load = stack.enter_context(generator.Generator())
        bare = stack.enter_context(process())
        yield Bench(scale, load, bare, folder)


def main() -> None:
    """Run and print; with --write also write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--soak", type=int, default=10_000, help="uploads of the memory test")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--only", nargs="*", default=[part.__name__ for part in PARTS])
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md")
    args = parser.parse_args()
    with ExitStack() as stack:
        url = None
        if args.database == "postgresql":
            from tests.services import postgresql

            url = stack.enter_context(postgresql())
        bench = stack.enter_context(benching(Scale(args.seconds, args.turns, args.soak, database=url)))
        rows: list[list[str]] = []
        for part in PARTS:
            if part.__name__ in args.only:
                rows += (found := part(bench))
                for row in found:
                    print(row, flush=True)
    store = "PostgreSQL" if args.database == "postgresql" else "SQLite"
    caption = f"`python -m benchmarks.server`: {store}; median of {args.turns} turns of {args.seconds:g} s" + "".join(
        f"; {note}" for note in bench.notes
    )
    write_table(f"server-{args.database}", caption, HEADER, rows, args.write)


if __name__ == "__main__":
    main()
