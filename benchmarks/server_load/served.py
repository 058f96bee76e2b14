"""Servers to put load on, each in a process: ours, and bare ones that only receive.

    python -m benchmarks.server_load.served JOB         ours; JOB is a `Job` as JSON
    python -m benchmarks.server_load.served             bare: `PUT` receives a body in raw ASGI, `POST` reads a check-in
    python -m benchmarks.server_load.served GROUP       bare, but it answers once a line of the request is on the disk;
                                                        it syncs the lines of GROUP seconds at once

Each prints its URL, and the admin's, once it answers, and ends on SIGTERM. Ours is `sumus serve` with its limits of
requests lifted; it imports no torch.
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.server_load.devices import Device
from sumus import Bundle, Pacing, Plan, fedavg, fedbuff, sgd
from sumus.device.link import read_link
from sumus.edge.edge import open_edge
from sumus.http.limits import Limits, Rate
from sumus.http.listening import Listening
from sumus.operations.policy import ServerPolicy
from sumus.operations.serve import Startup, keep, run
from sumus.operations.stores import Storage
from sumus.storage.identities import Identity
from sumus.storage.sql import SqlStore
from sumus.task import Data, Description, Leaf
from sumus.update import chain, clip_by_global_norm, quantize, rotate
from sumus.wire.messages import Assignment, Body, CheckInAnswer, CheckInRequest, read, write

MUCH = Rate(1e9, 10**9)
OPEN = Limits(MUCH, MUCH, MUCH, MUCH)
"""No limits of requests: a generator has one address, and its devices send many requests."""
_TICKS = os.sysconf("SC_CLK_TCK")
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """What our server serves.

    Attributes:
        data: Its folder.
        database: A database's URL; None for SQLite in the folder.
        sizes: The float32 of each model, with one task for each.
        cohort: The cohort of synchronous rounds; 0 for a buffer that is full when every device has reported.
        devices: The number of enrolled devices; at least two.
        first: The number of the first device.
        upstream: A link of the server above, if ours is an edge.
        bits: The bits of the codes that are sent; None for floats.
    """

    data: str
    database: str | None
    sizes: tuple[int, ...]
    cohort: int
    devices: int
    first: int = 0
    upstream: str = ""
    bits: int | None = None


def bundle(size: int, job: Job) -> Bundle:
    """Return FedAvg with one leaf of this many float32; or FedBuff with places for all devices."""
    leaf = Leaf("w", (size,), "float32", "shared", True)
    task = Description(f"load{size}", (leaf,), "loss", (), Data((3,), "float32", (), "int64", 2))
    clip = clip_by_global_norm(1.0)
    if job.cohort:
        coded = clip if job.bits is None else chain(clip, rotate(), quantize(job.bits))
        plan = Plan(task, fedavg(sgd(0.1), coded, cap=100), Pacing(job.cohort), 2, trusts_devices=False)
    else:
        pacing = Pacing(job.devices, concurrency=10**6)
        plan = Plan(task, fedbuff(sgd(0.1), clip), pacing, 2, trusts_devices=False)
    return Bundle(plan, {"w": np.zeros(size, np.float32)})


def bundles(job: Job) -> dict[str, Bundle]:
    """Return the tasks' bundles by name."""
    return {f"load{size}": bundle(size, job) for size in job.sizes}


def enrol(job: Job) -> None:
    """Write the devices into the database, as their enrolment would have."""
    store = SqlStore.open(job.database or Path(job.data) / "sumus.db", "tasks")
    with store.identities().transaction() as rows:
        for number in range(job.first, job.first + job.devices):
            device = Device(number)
            rows.put_identity(Identity(device.id, "default", device.public, "enrolled", 0.0, 0.0))
    store.close()


def serve(job: Job) -> None:
    """Run our server until SIGTERM."""
    Path(job.data).mkdir(mode=0o700, exist_ok=True)
    enrol(job)
    where, policy = Storage(Path(job.data), job.database), ServerPolicy(limits=OPEN)
    tell, listen = (
        Startup(ready=lambda opened: print(opened.url, opened.admin_url, flush=True)),
        Listening(port=0, admin_port=0),
    )
    if job.upstream:
        link = read_link(job.upstream)
        keep(lambda authority: open_edge(link, where, policy, authority), where.data, listen, tell)
    else:
        run(bundles(job), where, policy, listen, tell)


class Journal:
    """Lines that are written and synced together, at most once in `group` seconds; None for no journal."""

    def __init__(self, group: float | None) -> None:
        self._group, self._last = group, 0.0
        self._waiting: list[asyncio.Future[None]] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._writing: asyncio.Task[None] | None = None

    async def keep(self) -> None:
        """Return once one more line is on the disk."""
        if self._group is None:
            return
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(kept)
        if self._writing is None:
            self._writing = asyncio.ensure_future(self._write(self._group))
        await kept

    async def _write(self, group: float) -> None:
        while self._waiting:
            await asyncio.sleep(max(0.0, self._last + group - time.monotonic()))
            some, self._waiting = self._waiting, []
            await asyncio.to_thread(self._sync, len(some))
            self._last = time.monotonic()
            for each in some:
                if not each.done():
                    each.set_result(None)
        self._writing = None

    def _sync(self, lines: int) -> None:
        self._file.write(b"x" * 100 * lines)
        self._file.flush()
        os.fsync(self._file.fileno())


def bare(group: float | None) -> Any:
    """Return an application that only receives: in Python it takes every byte of an upload, and decodes a check-in. An
    answer is as long as one with work."""
    journal, model = Journal(group), bytes(4 * 2**20)

    async def receive(scope: Any, receiving: Any, send: Any) -> None:
        more = True
        while more:
            more = (await receiving()).get("more_body", False)
        await journal.keep()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})

    async def decode(request: Request) -> Response:
        asked = read(CheckInRequest, await request.body())
        await journal.keep()
        some = Body("0" * 64, 1)
        work = Assignment("load", "train", asked.session, 0, some, some, "0" * 64, 2, 1.0)
        return Response(write(CheckInAnswer(assignment=work)), media_type="application/json")

    async def fetch(request: Request) -> Response:
        return Response(model)

    framed = Starlette(routes=[Route("/v1/checkins", decode, methods=["POST"]), Route("/v1/objects/{sha256}", fetch)])

    async def app(scope: Any, receiving: Any, send: Any) -> None:
        await (receive if scope["method"] == "PUT" else framed)(scope, receiving, send)

    return app


def serve_bare(group: float | None) -> None:
    """Run the bare server until SIGTERM."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    how = uvicorn.Config(
        bare(group), loop="none", http="httptools", ws="none", lifespan="off", log_config=None, access_log=False
    )
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(uvicorn.Server(how).serve([listening]))


# ── the other end ────────────────────────────────────────────────────────────────────────────────────────────────────


class Process:
    """A running server.

    Attributes:
        port: The port that it listens on.
        admin: The address of its admin plane.
    """

    def __init__(self, child: "subprocess.Popen[str]", port: int, admin: str) -> None:
        self.child, self.port, self.admin = child, port, admin

    @property
    def cpu(self) -> float:
        """Return the seconds of CPU time that it has used."""
        used = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(used[11]) + int(used[12])) / _TICKS

    @property
    def rss(self) -> int:
        """Return the bytes of memory that it holds."""
        return int(Path(f"/proc/{self.child.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def peak(self) -> int:
        """Return the most bytes of memory that it has held."""
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(_figure("VmHWM:", status)) * 1024

    @property
    def received(self) -> int:
        """Return the bytes of reports that have come in, by its metrics, which are updated once a second."""
        time.sleep(1.1)
        said = urllib.request.urlopen(f"{self.admin}/metrics", timeout=10.0).read().decode()
        return int(_figure("sumus_received_bytes_total", said))

    def kill(self) -> None:
        """Kill it, as a power cut would."""
        self.child.send_signal(signal.SIGKILL)
        self.child.wait()


def _figure(name: str, said: str) -> float:
    """Return the number behind a name, in a text with one name in each line."""
    found = re.search(rf"^{name}\s+(\S+)", said, re.M)
    assert found is not None, f"nothing is said of {name}"
    return float(found[1])


@contextmanager
def process(job: Job | None = None, group: float | None = None) -> Generator[Process, None, None]:
    """Run a server for a block: ours, or a bare one. group: of a bare one that keeps a journal."""
    arguments: Sequence[str] = () if job is None else (json.dumps(asdict(job)),)
    if group is not None:
        arguments = (str(group),)
    command = [sys.executable, "-m", "benchmarks.server_load.served", *arguments]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            said = child.stdout.readline().split()
            if not said:
                raise SystemExit("the server did not start; see above")
            yield Process(child, urlsplit(said[0]).port or 0, said[-1])
        finally:
            child.terminate()
            child.wait()


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            serve_bare(None)
        case [text] if text.startswith("{"):
            serve(Job(**json.loads(text)))
        case [text]:
            serve_bare(float(text))
        case _:
            raise SystemExit(__doc__)
