"""Measures variants in lockstep: they run one round each by turns, in a new order in every sweep. So they share all
disturbances of the machine, and the medians of their rounds can be compared.

Each variant is a runner: a command in a process of its own, perhaps in a Python environment of its own. This module has
the code of both sides, and needs numpy and the standard library alone.

    the parent      results = measure([Runner("naive", command), …], sweeps=9)

    a runner        turns = Turns()                             connects
                    while turns.next():                         ready; later: the round is over; waits for the next one
                        one_round()
                    turns.finish(weights)

If the loop is inside a library, the runner gives it `turns.rounds`, and calls `turns.next()` before the first round and
in the library's callback after each round. Wall time is measured by the runner, from `next` to `next`. CPU time and
memory are measured by the parent, over the runner and all its descendants. A runner that fails, or does not answer in
time, is ended and reported; the others go on. At the end no process is left, whatever happened.
"""

import contextlib
import functools
import json
import os
import random
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ADDRESS = "SUMUS_LOCKSTEP"  # the environment variable that names the socket
STARTING = 300.0  # seconds until a runner must be ready
TICKS = os.sysconf("SC_CLK_TCK")

Weights = Mapping[str, np.ndarray[Any, Any]]


# ── the runner's half ────────────────────────────────────────────────────────────────────────────────────────────────


class Turns:
    """The runner's end of the socket.

    Attributes:
        rounds: The number of rounds that the runner will be asked for.
    """

    def __init__(self) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(os.environ[ADDRESS])
        self._lines = connection.makefile("rw", encoding="utf-8")
        asked = self._receive()
        self.rounds: int = asked["rounds"]
        self._weights: str = asked["weights"]
        self._begun = 0
        self._clock = 0.0

    def next(self) -> bool:
        """Report the end of the round before, and wait for the next one. Return False if there is none left, once all
        others have finished."""
        stopped = time.perf_counter()
        self._send({"wall": stopped - self._clock} if self._begun else {"ready": True})
        self._receive()
        if self._begun == self.rounds:
            return False
        self._begun += 1
        self._clock = time.perf_counter()
        return True

    def finish(self, weights: Weights) -> None:
        """Send the final global model, by the workload's names."""
        np.savez(self._weights, **weights)
        self._send({"done": True})

    def _send(self, message: Mapping[str, Any]) -> None:
        self._lines.write(json.dumps(message) + "\n")
        self._lines.flush()

    def _receive(self) -> Any:
        line = self._lines.readline()
        if not line:  # the parent is gone, so everything here must end, with threads and workers
            os.killpg(os.getpgid(0), signal.SIGKILL)
        return json.loads(line)


# ── the parent's half ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Runner:
    """A variant.

    Attributes:
        name: Its name.
        command: Its command.
        environment: Variables in addition to those of the parent.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Round:
    """The cost of one round.

    Attributes:
        wall: Seconds of wall time.
        cpu: Seconds of CPU time.
        rss: Bytes of resident memory after it.
        pss: Bytes of proportional memory after it; None if the system does not give them.
    """

    wall: float
    cpu: float
    rss: int
    pss: int | None


@dataclass(frozen=True)
class Measured:
    """The cost of a variant, or what went wrong.

    Attributes:
        name: The variant.
        rounds: Its timed rounds, without warm-up.
        weights: The model after all rounds, warm-up included.
        error: What went wrong; None if nothing did.
    """

    name: str
    rounds: tuple[Round, ...] = ()
    weights: Weights | None = None
    error: str | None = None

    def median(self, figure: str) -> float | None:
        """Return the median of `wall`, `cpu`, `rss` or `pss`; None if a round has none."""
        values = [getattr(one, figure) for one in self.rounds]
        return None if not values or None in values else float(np.median(values))


def times_faster(fast: Measured, slow: Measured) -> float | None:
    """Return the median over sweeps of slow / fast in wall seconds: the rounds of a sweep ran next to each other."""
    if fast.error or slow.error or not fast.rounds:
        return None
    return float(np.median([b.wall / a.wall for a, b in zip(fast.rounds, slow.rounds, strict=True)]))


def over(found: Mapping[str, Measured], base: str) -> dict[str, float]:
    """Return each variant's seconds over those of `base`, by the same medians. Variants without a figure are left out."""
    ratios = {name: times_faster(one, found[base]) for name, one in found.items()} if base in found else {}
    return {name: 1 / ratio for name, ratio in ratios.items() if ratio}


def keep_to(cores: int | None) -> int:
    """Keep this process and its children to this many cores (None: to those that it has), and return the number."""
    have = sorted(os.sched_getaffinity(0))
    if cores is not None:
        if not 1 <= cores <= len(have):
            raise SystemExit(f"{cores} cores were asked for, and there are {len(have)}")
        os.sched_setaffinity(0, have[:cores])
    return cores or len(have)


def save_rounds(path: Path, measured: Mapping[str, Mapping[str, Measured]]) -> None:
    """Write every round of every variant as JSON, by workload."""
    plain = {
        workload: {
            name: {"error": one.error, "rounds": [asdict(each) for each in one.rounds]} for name, one in found.items()
        }
        for workload, found in measured.items()
    }
    path.write_text(json.dumps(plain, indent=1) + "\n")


def measure(
    runners: Iterable[Runner],
    *,
    sweeps: int,
    warm_up: int = 2,
    patience: float = 600.0,
    seed: int = 0,
    watch: Callable[[str], None] = lambda line: None,
) -> dict[str, Measured]:
    """Start all runners, let each do one round in each sweep, then end them all.

    Args:
        runners: The runners.
        sweeps: The number of timed sweeps.
        warm_up: The number of first sweeps that are not timed.
        patience: The most seconds for a round.
        seed: The seed of the order in each sweep.
        watch: Called with lines of progress.
    """
    order = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder, contextlib.ExitStack() as stack:
        variants: list[_Variant] = []
        for number, runner in enumerate(runners):  # one after the other: together they would slow each other down
            variant = stack.enter_context(_started(runner, Path(folder) / str(number), warm_up + sweeps))
            variants.append(variant)
            variant.try_to(variant.become_ready)
            watch(f"{runner.name}: {variant.error or 'ready'}")
        for sweep in range(warm_up + sweeps):
            alive = [variant for variant in variants if variant.error is None]
            for variant in order.sample(alive, len(alive)):
                variant.try_to(functools.partial(variant.one_round, patience))
                said = variant.error or f"{variant.rounds[-1].wall:.4f} s"
                watch(f"{variant.runner.name}: round {sweep + 1} of {warm_up + sweeps}, {said}")
        for variant in variants:
            if variant.error is None:
                variant.try_to(functools.partial(variant.finish, patience))
        return {variant.runner.name: variant.measured(warm_up) for variant in variants}


class _Lost(Exception):
    """A runner cannot go on; the message says why."""


class _Variant:
    """A runner's process, as the parent sees it. It is reaped last of all, so that its id is not used again before."""

    def __init__(self, runner: Runner, folder: Path, rounds: int) -> None:
        self.runner = runner
        self.rounds: list[Round] = []
        self.error: str | None = None
        self._folder = folder
        self._rounds = rounds
        self._process: subprocess.Popen[bytes] | None = None
        self._server = socket.socket(socket.AF_UNIX)
        self._connection: socket.socket | None = None
        self._unread = b""
        self._weights: Weights | None = None
        self._known: set[tuple[int, str]] = set()

    def try_to(self, act: Callable[[], None]) -> None:
        """Do something; if it fails, note why and end the runner."""
        try:
            act()
        except (_Lost, OSError) as error:  # OSError: the runner has closed the socket
            self.error = self._last_words() or f"{error}"
            self.end()

    def become_ready(self) -> None:
        self._folder.mkdir()
        self._server.bind(str(self._folder / "socket"))
        self._server.listen(1)
        variables = {**os.environ, **self.runner.environment, ADDRESS: str(self._folder / "socket")}
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self.runner.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=variables,
                start_new_session=True,
            )
        self._wait_for(self._server, STARTING)
        self._connection, _ = self._server.accept()
        self._send({"rounds": self._rounds, "weights": str(self._folder / "weights.npz")})
        self._receive(STARTING)
        self._remember()

    def one_round(self, patience: float) -> None:
        before = cpu_seconds(self._pid)
        self._send({"go": True})
        wall = self._receive(patience)["wall"]
        cpu = cpu_seconds(self._pid) - before
        self.rounds.append(Round(wall, cpu, *memory(self._pid)))
        self._remember()

    def finish(self, patience: float) -> None:
        self._send({"end": True})
        self._receive(patience)
        with np.load(self._folder / "weights.npz") as file:
            self._weights = dict(file)
        self._ended(20)  # it may need time to end its own workers

    def measured(self, warm_up: int) -> Measured:
        if self.error is not None:
            return Measured(self.runner.name, error=self.error)
        return Measured(self.runner.name, tuple(self.rounds[warm_up:]), self._weights)

    def end(self) -> None:
        """End all processes of this runner."""
        if self._process is not None:
            self._signal(signal.SIGTERM)
            self._ended(5)
            until = time.monotonic() + 5
            while self._signal(signal.SIGKILL) and time.monotonic() < until:  # a process takes a moment to die
                time.sleep(0.02)
            self._process.wait()
            self._process = None
        for end in (self._connection, self._server):
            if end is not None:
                end.close()

    @property
    def _pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _signal(self, number: int) -> bool:
        """Send a signal to the runner's group, and to processes that left the group; return whether there were any."""
        self._remember()
        left = [pid for pid, born in self._known if _stat(pid)[-1:] == (born,)]
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, number)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(left)

    def _remember(self) -> None:
        """Record the runner's processes: its descendants, and all processes with its socket in their environment, since
        after a parent's end its children cannot be found."""
        mark = f"{ADDRESS}={self._folder / 'socket'}".encode()
        for pid in {*family(self._pid), *(pid for pid in _pids() if mark in _environment(pid))}:
            if stat := _stat(pid):
                self._known.add((pid, stat[-1]))

    def _ended(self, within: float = 0.0) -> bool:
        """Return whether the process ended within this many seconds. It is not reaped."""
        until = time.monotonic() + within
        while os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)
        return True

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._connection is not None
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self, patience: float) -> Any:
        assert self._connection is not None
        until = time.monotonic() + patience
        while b"\n" not in self._unread:
            self._wait_for(self._connection, until - time.monotonic())
            received = self._connection.recv(4096)
            if not received:
                raise _Lost("it closed the connection")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _wait_for(self, readable: socket.socket, patience: float) -> None:
        until = time.monotonic() + patience
        while not select.select([readable], [], [], 0.2)[0]:  # its workers may keep the socket open after its end
            if self._ended() and not select.select([readable], [], [], 0)[0]:
                raise _Lost("it ended without a word")
            if time.monotonic() > until:
                raise _Lost(f"no answer in {patience:.0f} s")

    def _last_words(self) -> str:
        """Return the last line of its output that names an error, or else the last line."""
        if self._process is None or not self._ended(2):
            return ""
        said = (self._folder / "log").read_text(errors="replace").splitlines()
        lines = [line.strip() for line in said if line.strip()]
        errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
        return (errors or lines or [""])[-1]


@contextlib.contextmanager
def _started(runner: Runner, folder: Path, rounds: int) -> Generator[_Variant, None, None]:
    """Start a runner in a process group of its own, and end it in any case."""
    variant = _Variant(runner, folder, rounds)
    try:
        yield variant
    finally:
        variant.end()


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def family(pid: int) -> list[int]:
    """Return a process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for member in _pids():
        if stat := _stat(member):
            children.setdefault(int(stat[1]), []).append(member)
    found = [pid]
    for member in found:  # the list grows meanwhile
        found += children.get(member, [])
    return found


def cpu_seconds(pid: int) -> float:
    """Return user and system seconds so far of a process, of its living descendants, and of those that were waited for."""
    total = 0.0
    for member in family(pid):
        with contextlib.suppress(OSError, IndexError):
            waited_for = sum(map(int, _stat(member)[13:15])) / TICKS
            total += (
                time.clock_gettime(~member << 3 | 2) + waited_for
            )  # the number of its CPU clock, as in clock_getcpuclockid(3)
    return total


def memory(pid: int) -> tuple[int, int | None]:
    """Return (RSS, PSS) of a process and its descendants in bytes. PSS counts a page that n processes share as 1/n in
    each."""
    totals = {"Rss": 0, "Pss": 0}
    complete = True
    for member in family(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            complete = False
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{member}/statm").read_text().split()[1])
                totals["Rss"] += pages * os.sysconf("SC_PAGE_SIZE")
            continue
        figures = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        totals = {name: total + 1024 * figures[name] for name, total in totals.items()}
    return totals["Rss"], totals["Pss"] if complete else None


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _environment(pid: int) -> list[bytes]:
    """Return a process's environment at its start; empty if it may not be read."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _stat(pid: int) -> tuple[str, ...]:
    """Return the fields of /proc/PID/stat from the state to the start time; empty if the process does not exist or is
    dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
    except OSError:
        return ()
    return () if fields[0] == "Z" else tuple(fields)
