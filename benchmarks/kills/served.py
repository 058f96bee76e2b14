"""A server process that is made to be killed.

    python -m benchmarks.kills.served LOG LINE        reads jobs, one JSON object in each line; each is served by a process
                                                      until the process dies

The parent has imported everything and started nothing, so a job is a fork that takes milliseconds. The child is a whole
server: storage, recovery, and the device plane over HTTP on loopback, on a port that the system chooses. `Life` is the
class at the other end.

A job may say at which point the process kills itself (`Points`), and which bug is planted in it (`PLANTED`). The
product contains neither.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg  # noqa: F401 (for PostgreSQL: here, so that children need not)
import uvicorn
from sqlalchemy import event
from sqlalchemy.engine import Engine

import sumus.rounds.coordinator as coordinator_module
import sumus.rounds.sealed_sums as sums_module
import sumus.rounds.seeds as seeds_module
from sumus import Bundle, Pacing, Plan, fedavg, fedbuff, optimizers, sgd
from sumus.device.link import read_link
from sumus.edge.edge import open_edge
from sumus.http.limits import Limits, Rate
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.protocol.round import AcceptReport, Commit, Report, decide
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.run import Run
from sumus.server.replica import Replica
from sumus.server.report_queue import ReportQueue
from sumus.server.server import Server
from sumus.storage import sql
from sumus.storage.keyring import KeyRing
from sumus.task import Data, Description, Leaf
from sumus.update import chain, clip_by_global_norm, quantize, rotate

TASK, COHORT = "campaign", 4
SHAPES = {"a": (40, 25), "b": (1500,), "c": (7,)}
SAID = 9
"""The descriptor of the original standard output. What the server itself prints goes into the log."""
_ROOT = Path(__file__).parents[2]
_MUCH = Rate(1e6, 10**6)
QUIET = ServerPolicy(limits=Limits(_MUCH, _MUCH, _MUCH, _MUCH))
"""No limits of requests, since these devices send many."""


def bundle(kind: str) -> Bundle:
    """Return the bundle that is served.

    The codes of a rotated update mean nothing under another seed, and Adam has a state. So a seed that is drawn again,
    or a lost optimizer state, gives other bits.

    Args:
        kind: "synchronous", "buffered", or "plain", which is synchronous with updates of floats.
    """
    leaves = tuple(Leaf(name, shape, "float32", "shared", True) for name, shape in SHAPES.items())
    task = Description(TASK, leaves, "loss", (), Data((3,), "float32", (), "int64", 2))
    clip = clip_by_global_norm(1.0)
    codes = chain(clip, rotate(), quantize(8))
    if kind == "buffered":
        algorithm, pacing = fedbuff(sgd(0.1), codes, optimizers.adam(0.1)), Pacing(COHORT, concurrency=12)
    else:
        algorithm = fedavg(sgd(0.1), clip if kind == "plain" else codes, optimizers.adam(0.1), cap=100)
        pacing = Pacing(COHORT, over_select=1.5)
    plan = Plan(task, algorithm, pacing, 2, trusts_devices=False)
    rng = np.random.default_rng(7)
    return Bundle(plan, {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()})


# ── where it dies ────────────────────────────────────────────────────────────────────────────────────────────────────


class Points:
    """Moments of the deciding thread: before and after each statement, commit, write, rename, fsync, deletion, and use
    of a key.

    Attributes:
        at: The moment at which the process kills itself.
        passed: The names of the moments so far. They are counted while `armed`.
    """

    def __init__(self, at: int | None) -> None:
        self.at, self.armed, self.passed = at, False, list[str]()

    def here(self, what: str) -> None:
        """Pass a moment, and die if it is the chosen one."""
        if not self.armed or threading.current_thread().name != "committer":
            return
        if len(self.passed) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(what)

    def watch(self, owner: Any, name: str) -> None:
        """Make every call of a function two moments."""
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.here(f"before {name}")
            result = real(*args, **kwargs)
            self.here(f"after {name}")
            return result

        setattr(owner, name, watched)

    def watch_all(self) -> None:
        """Watch everything that leaves a trace on the disk."""
        for owner, names in (
            (os, ("open", "fsync", "link")),
            (Path, ("write_bytes", "replace", "unlink", "mkdir")),
            (KeyRing, ("wrap", "unwrap")),
            (sums_module, ("seal_pieces", "unseal")),
        ):
            for name in names:
                self.watch(owner, name)

        def word(statement: str) -> str:
            return " ".join(statement.split()[:3])

        def before(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            self.here(f"before {word(statement)}")

        def after(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            self.here(f"after {word(statement)}")

        def connected(dialect: Any, *_: Any) -> None:
            if not hasattr(dialect, "watched"):
                dialect.watched = True
                self.watch(dialect, "do_commit")

        event.listen(Engine, "before_cursor_execute", before)
        event.listen(Engine, "after_cursor_execute", after)
        event.listen(Engine, "do_connect", connected)


def _arm(points: Points, closing: int | None, recovering: bool) -> None:
    """Count moments from the arrival of a round's last report until the next round is open; or while the process
    recovers."""
    take, recover = Server._take_reports, Server._recover

    def while_closing(server: Server, now: float) -> None:
        row = server.tasks[0].training.coordinator.current
        points.armed = row.number == closing and row.counted + len(server._reports.waiting) >= COHORT
        take(server, now)
        _disarm(points)

    def while_recovering(server: Server, now: float) -> None:
        points.armed = recovering
        recover(server, now)
        _disarm(points)

    Server._take_reports, Server._recover = while_closing, while_recovering


def _disarm(points: Points) -> None:
    if points.armed:
        points.armed = False
        _say({"survived": points.passed})


# ── bugs that the campaign must find ─────────────────────────────────────────────────────────────────────────────────


def _acknowledges_early() -> None:
    """Acknowledge a report when it is staged, and not when it is committed."""
    stage = ReportQueue.stage

    def early(queue: ReportQueue, run: Run, requests: Any, now: float) -> None:
        stage(queue, run, requests, now)
        queue.say(run, [AcceptReport(session) for session in run.coordinator.staged])
        threading.Event().wait(0.02)  # a commit on a slow disk takes this long

    ReportQueue.stage = early


def _counts_again() -> None:
    """Count a repeated report again: no row prevents it."""

    def rules(facts: Any, asked: Any) -> Any:
        if isinstance(asked, Report | Commit):
            again = tuple(replace(s, state="out") if s.state == "counted" else s for s in facts.sessions)
            facts = replace(facts, sessions=again)
        return decide(facts, asked)

    init, count = Coordinator.__init__, sql._SqlRows._count

    def begin(self: Coordinator, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "rules": rules})

    def without_key(rows: Any) -> None:
        known = set[str]()
        for id in rows._unchecked:
            here = sql.COUNTED.c.run == rows._name, sql.COUNTED.c.session == id
            if rows.connection.execute(sql.select(sql.COUNTED.c.sum).where(*here)).first() is not None:
                known.add(id)
        rows._unchecked = {
            f"{id}#{os.urandom(4).hex()}" if id in known and number is not None else id: number
            for id, number in rows._unchecked.items()
        }
        count(rows)

    Coordinator.__init__, sql._SqlRows._count = begin, without_key


def _forgets_seeds() -> None:
    """Do not write a sum's seed down: after a restart it is drawn anew."""
    remembered = dict[int, bytes]()

    def forgetful(rows: Any, number: int, name: str, make: Callable[[], bytes]) -> bytes:
        return remembered.setdefault(number, make())

    seeds_module.noted = forgetful


def _seals_nothing() -> None:
    """Write partial sums to the disk unencrypted."""

    def sealed(key: bytes, pieces: Sequence[Any], about: str) -> memoryview:
        return memoryview(b"".join(pieces))

    def unsealed(key: bytes, body: Any, about: str) -> bytes:
        return bytes(body)

    sums_module.seal_pieces, sums_module.unseal = sealed, unsealed


def _leads_for_ever() -> None:
    """Let a replica that leads once believe for ever that it leads, and write."""
    look, recover = Replica.look, Coordinator.recover

    def look_once(replica: Replica) -> int | None:
        return look(replica) if replica.fence is None else replica.fence

    def unchecked(rows: Any, fence: Any) -> Any:
        return rows.run()

    def recover_anyhow(coordinator: Coordinator, now: float, fence: int | None = None) -> Any:
        return recover(coordinator, now)

    Replica.look, coordinator_module.run_led_with, Coordinator.recover = look_once, unchecked, recover_anyhow


PLANTED: Mapping[str, Callable[[], None]] = {
    "acknowledges-early": _acknowledges_early,
    "counts-again": _counts_again,
    "forgets-seeds": _forgets_seeds,
    "seals-nothing": _seals_nothing,
    "leads-for-ever": _leads_for_ever,
}

# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Job:
    """A server's life.

    Attributes:
        data: The folder of its data.
        database: A database's URL; None for SQLite.
        kind: The kind of rounds.
        closing: The round at whose closing it dies.
        dies: The moment at which it dies: of closing round `closing`, or, if that is None, of its recovery.
        points: Whether moments are watched.
        planted: A bug.
        enrols: The number of tokens to give out.
        shares: The folder that it shares with other servers, if there are any.
        lease: Seconds of a lease.
        upstream: A link of the server above, if it is an edge.
        for_edges: Whether the tokens are for edges.
    """

    data: str
    database: str | None
    kind: str
    closing: int | None = None
    dies: int | None = None
    points: bool = False
    planted: str = ""
    enrols: int = 0
    shares: str | None = None
    lease: float = Storage().lease
    upstream: str = ""
    for_edges: bool = False


def opened(job: Job) -> Service:
    """Open the server of a job without starting it."""
    where = Storage(Path(job.data), job.database, lease=job.lease)
    if job.shares is not None:
        where = replace(where, keys=Path(job.shares) / "keys", blobs=f"{job.shares}/blobs")
        os.environ["PGAPPNAME"] = Path(job.data).name
    if job.upstream:
        return open_edge(read_link(job.upstream), where, QUIET, linger=0.3)
    return open_service({TASK: bundle(job.kind)}, where, QUIET)


def _end_with(line: int) -> None:
    """Die when the process at the other end of this pipe has died."""
    os.read(line, 1)
    os._exit(1)


def _serve(job: Job) -> None:
    if job.planted:
        PLANTED[job.planted]()
    if job.points:
        points = Points(job.dies)
        points.watch_all()
        _arm(points, job.closing, job.closing is None)
    service = opened(job)
    token, server = "", service.server
    if job.enrols:
        speaks_for = 1000 if job.for_edges else 0
        token = server.roll.new_token("default", server.clock(), uses=job.enrols, speaks_for=speaks_for)
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    _say({"pid": os.getpid(), "port": listening.getsockname()[1], "token": token})
    threading.Thread(target=service.start, daemon=True).start()
    config = uvicorn.Config(service.device_app, log_level="info", access_log=True, lifespan="off")
    uvicorn.Server(config).run(sockets=[listening])


def _say(what: Mapping[str, Any]) -> None:
    os.write(SAID, json.dumps(what).encode() + b"\n")


def main(log: str, line: int) -> None:
    """Serve one job after the other. log: a file. line: a pipe's descriptor."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(1, SAID)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with tempfile.TemporaryDirectory() as folder:  # opened once, so that children find everything imported and compiled
        service = opened(Job(folder, None, "synchronous"))
        uvicorn.Config(service.device_app, lifespan="off").load()
        service.close()
    for said in iter(sys.stdin.readline, ""):
        job = Job(**json.loads(said))
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                threading.Thread(target=_end_with, args=(line,), daemon=True).start()
                _serve(job)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        _, status = os.waitpid(pid, 0)
        _say({"ended": status})


class Life:
    """The lives of a server, one at a time, seen from outside.

    Attributes:
        log: The file for what they print.
        kills: How often the server was killed.
        deaths: How often it killed itself.
    """

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
        line, self._line = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kills.served", str(log), str(line)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT, env=environment, pass_fds=[line],
        )  # fmt: skip
        os.close(line)
        self.log = log
        self.pid: int | None = None
        self.survived: Sequence[str] | None = None
        self.kills = self.deaths = 0

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin(self, job: Job) -> dict[str, Any]:
        """Start the server; return its addresses, perhaps before it has recovered."""
        self.survived = None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        while "pid" not in (said := self._hear()):
            if "ended" in said:
                raise ChildProcessError(f"the server did not start: {self.log.read_text()[-2000:]}")
        self.pid = said["pid"]
        return said

    def kill(self) -> None:
        """Send SIGKILL, and wait for the server's end."""
        if self.pid is None:
            return
        os.kill(self.pid, signal.SIGKILL)
        while "ended" not in self._hear():
            pass
        self.pid = None
        self.kills += 1

    def passed(self) -> Sequence[str] | None:
        """Wait for the moments that the server has passed, or for its end; return None for its end."""
        while self.survived is None:
            if "ended" in self._hear():
                self.pid = None
                self.deaths += 1
                return None
        return self.survived

    def close(self) -> None:
        """End all processes."""
        self.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
        os.close(self._line)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"servers cannot be started: {self.log.read_text()[-2000:]}")
        said: dict[str, Any] = json.loads(line)
        if "survived" in said:
            self.survived = said["survived"]
        return said


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
