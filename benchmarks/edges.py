"""Edges: the traffic through them to the server, and the resources that they need.

    python -m benchmarks.edges                 1,000 devices, directly and behind 10 edges; and an edge's memory (three minutes)
    python -m benchmarks.edges --write         also put the tables into docs/results.md

All run as processes over loopback: a server, edges, and devices that report without training, in 8-bit codes. An edge
imports no PyTorch.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np

from benchmarks.figures import three_digits
from benchmarks.results import write_table
from benchmarks.server_load.served import Job, Process, bundle, process
from sumus.aggregate import Update
from sumus.device.requests import Requests
from sumus.server.identity import DeviceRegister
from sumus.storage.sql import SqlStore
from sumus.transport.http import HttpTransport
from sumus.wire.messages import Assignment, CheckInRequest
from sumus.wire.reports import encode_report

PARAMETERS = 2**20
BITS = 8


class Asking:
    """A device. port: of the server or the edge that it asks."""

    def __init__(self, number: int, port: int, print_: str) -> None:
        key = sha256(f"load {number}".encode()).digest()
        self._transport = HttpTransport(f"http://127.0.0.1:{port}")
        self._requests, self._print = Requests(self._transport, key, "default"), print_
        self.work: Assignment | None = None

    def ask(self) -> None:
        """Ask until there is work."""
        serial = 0
        while self.work is None:
            serial += 1
            self.work = self._requests.check_in(
                CheckInRequest(serial, f"s{serial}", (self._print,), wait_s=30.0)
            ).assignment

    def report(self, body: bytes) -> None:
        """Send the report, after asking."""
        assert self.work is not None
        self._requests.report(self.work, body)
        self._transport.close()


def body_of(job: Job) -> bytes:
    """Return a report of codes."""
    plan = bundle(job.sizes[0], job).plan
    hop = plan.first_hop
    rng = np.random.default_rng(0)
    parts = {
        part.name: {leaf: rng.integers(-40, 41, shape).astype(np.int8) for leaf, shape in layout}
        for part, layout in zip(hop.parts, hop.layouts, strict=True)
    }
    return encode_report(Update("", parts, 10, {"loss": (5.0, 10)}))


def link_for_edges(job: Job, port: int, edges: int) -> str:
    """Return a link with which this many edges may enrol."""
    store = SqlStore.open(Path(job.data) / "sumus.db", "tasks")
    token = DeviceRegister(store.identities(), {"default": 10**6}).new_token(
        "default", time.time(), edges, speaks_for=10**6
    )
    store.close()
    return f"http://127.0.0.1:{port}/#enrol={token}"


@contextmanager
def tree(
    folder: Path, size: int, devices: int, edges: int
) -> Generator[tuple[Job, Process, list[Process]], None, None]:
    """Start a server, this many edges, and this many devices in all."""
    folder.mkdir(exist_ok=True)
    job = Job(str(folder / "top"), None, (size,), devices, devices if not edges else 2, bits=BITS)
    each = devices // edges if edges else 0
    with ExitStack() as stack:
        top = stack.enter_context(process(job))
        link = link_for_edges(job, top.port, edges) if edges else ""
        below = [
            stack.enter_context(
                process(Job(str(folder / f"edge{n}"), None, (size,), devices, each, n * each, link, BITS))
            )
            for n in range(edges)
        ]
        yield job, top, below


def a_round(job: Job, ports: Callable[[int], int], devices: int, uploads: int = 16) -> float:
    """Let all devices ask and report, and return the seconds."""
    print_, body = bundle(job.sizes[0], job).plan.description.fingerprint, body_of(job)
    everyone = [Asking(number, ports(number), print_) for number in range(devices)]
    began = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(Asking.ask, everyone))
    with ThreadPoolExecutor(uploads) as pool:
        list(pool.map(lambda device: device.report(body), everyone))
    return time.perf_counter() - began


def received(job: Job) -> tuple[int, int]:
    """Return the number of the server's models, and the number of reports in the last one."""
    store = SqlStore.open(Path(job.data) / "sumus.db", f"load{job.sizes[0]}.train")
    with store.transaction() as rows:
        models = rows.models()
    store.close()
    return models[-1].version, models[-1].contributors


def await_model(job: Job, devices: int) -> None:
    """Wait until the server has a model with all of the devices in it; a minute at most."""
    deadline = time.monotonic() + 60
    while received(job)[0] < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    version, counted = received(job)
    assert (version, counted) == (1, devices), (version, counted)


def traffic(folder: Path, devices: int, edges: int) -> list[str]:
    """Run a round, and return what the server received in it."""
    with tree(folder, 2**16, devices, edges) as (job, top, below):
        each = devices // edges if edges else devices
        before = top.received
        seconds = a_round(job, lambda number: below[number // each].port if below else top.port, devices)
        await_model(job, devices)
        up = top.received - before
    return [
        f"{devices:,} devices, " + (f"behind {edges} edges" if edges else "directly"),
        f"{edges or devices:,}",
        f"**{three_digits(up / 1e6)}** MB",
        three_digits(up / (edges or devices) / 2**16),
        f"{seconds:.1f} s",
    ]


def memory(folder: Path, devices: int, uploads: int) -> list[str]:
    """Return an edge's resident memory, until the server above has counted its sum."""
    with tree(folder, PARAMETERS, devices, 1) as (job, _, (edge,)):
        before = edge.rss
        seconds = a_round(job, lambda number: edge.port, devices, uploads)
        await_model(job, devices)
        peak = edge.peak
    return [
        f"{devices} devices, {PARAMETERS:,} parameters, {uploads} uploads in flight",
        f"{three_digits(before / 1e6)} MB",
        f"**{three_digits(peak / 1e6)}** MB",
        f"{seconds:.1f} s",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with --write also write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--edges", type=int, default=10)
    parser.add_argument("--members", type=int, default=100, help="devices of the edge whose memory is measured")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/results.md")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sumus-edges-") as scratch:
        rows = [traffic(Path(scratch) / f"{n}", args.devices, n) for n in (0, args.edges)]
        needs = memory(Path(scratch) / "memory", args.members, 4)
    write_table(
        "edges-traffic",
        f"`python -m benchmarks.edges`: a round of {2**16:,} parameters in 8-bit codes, weighted by examples; what comes up",
        ["", "reports and sums", "bytes", "bytes a parameter of each", "the round"],
        rows,
        args.write,
    )
    write_table(
        "edges-memory",
        "`python -m benchmarks.edges`: an edge's resident memory",
        ["", "at the start", "at most", "the round"],
        [needs],
        args.write,
    )


if __name__ == "__main__":
    main()
