"""Load: requests that were signed before, over several connections. Each connection sends its next request when the
last is answered.

A connection here reads only the length of an answer, so it takes little time of the cores that it shares with a server.
Functions are called in a process of their own, and return what they cost that process.
"""

import asyncio
import multiprocessing
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import uvloop

from benchmarks.server_load.devices import Device, Pieces, fetch, report_body
from sumus.wire.messages import Assignment, CheckInAnswer, read

R = TypeVar("R")


@dataclass
class Load:
    """The result of a load.

    Attributes:
        seconds: Seconds from the first request to the last answer.
        latencies: The seconds of each request.
        answers: The number of answers by status.
        received: Bytes of bodies.
        cpu: CPU seconds of the generator.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list[float])
    answers: Counter[int] = field(default_factory=lambda: Counter[int]())
    received: int = 0
    cpu: float = 0.0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    @property
    def cost(self) -> float:
        """The generator's CPU seconds for one request."""
        return self.cpu / len(self.latencies)

    def percentile(self, which: float) -> float:
        """Return a percentile of the latencies, in seconds."""
        return float(np.percentile(self.latencies, which))


class Connection(asyncio.Protocol):
    """One connection. The body of an answer is kept only if `keep` is set."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._answer: asyncio.Future[int] | None = None
        self._head, self._left, self._status = b"", -1, 0
        self.keep, self.body, self.received = False, b"", 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    async def ask(self, pieces: Pieces) -> int:
        """Send a request, and return the status of the answer."""
        self._answer = asyncio.get_running_loop().create_future()
        self._head, self._left, self.body = b"", -1, b""
        self._transport.writelines(pieces)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        if self._left < 0:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._head[:end].lower(), self._head[end + 4 :]
            self._status = int(head[9:12])
            _, said, length = head.partition(b"content-length: ")
            self._left = int(length.partition(b"\r")[0]) if said else 0
        if self.keep:
            self.body += data
        self.received += len(data)
        self._left -= len(data)
        if self._left <= 0 and self._answer is not None and not self._answer.done():
            self._answer.set_result(self._status)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the server closed a connection"))

    def close(self) -> None:
        self._transport.close()


async def connect(port: int, many: int) -> list[Connection]:
    """Open this many connections."""
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(Connection, "127.0.0.1", port))[1] for _ in range(many)]


async def _drive(port: int, requests: Iterator[Pieces], connections: int, until: float) -> Load:
    load, lines = Load(), await connect(port, connections)
    began, used = time.perf_counter(), time.process_time()

    async def keep_asking(line: Connection) -> None:
        for pieces in requests:
            start = time.perf_counter()
            if start - began > until:
                return
            load.answers[await line.ask(pieces)] += 1
            load.latencies.append(time.perf_counter() - start)

    await asyncio.gather(*map(keep_asking, lines))
    load.seconds, load.cpu = time.perf_counter() - began, time.process_time() - used
    load.received = sum(line.received for line in lines)
    for line in lines:
        line.close()
    return load


def drive(port: int, requests: Iterable[Pieces], connections: int, until: float = 1e9) -> Load:
    """Send all requests, or for this many seconds."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_drive(port, iter(requests), connections, until))


def check_ins(
    port: int, devices: Sequence[int], serial: int, fingerprints: tuple[str, ...], connections: int, until: float = 1e9
) -> Load:
    """Send check-ins, each of another device."""
    requests = [Device(number).check_in(fingerprints, serial) for number in devices]
    return drive(port, requests, connections, until)


def uploads(
    port: int, devices: Sequence[int], serial: int, sizes: Sequence[int], connections: int, until: float = 1e9
) -> Load:
    """Send reports, each of another device. sizes: of the models; several are used in turn."""
    bodies = [(f"load{size}", *report_body(size)) for size in sizes]
    requests: list[Pieces] = []
    for number in devices:
        task, body, digest = bodies[number % len(bodies)]
        requests.append(Device(number).report(task, serial, body, digest))
    return drive(port, requests, connections, until)


def downloads(port: int, sha256: str, known: bool, connections: int, until: float) -> Load:
    """Fetch one object again and again."""
    requests = (fetch(sha256, known) for _ in iter(int, 1))
    return drive(port, requests, connections, until)


def work_for(port: int, number: int, serial: int, fingerprint: str) -> Assignment:
    """Return the work that a device is given."""

    async def ask() -> bytes:
        (line,) = await connect(port, 1)
        line.keep = True
        status = await line.ask(Device(number).check_in((fingerprint,), serial, 10.0))
        line.close()
        assert status == 200, line.body
        return line.body

    answer = read(CheckInAnswer, asyncio.run(ask()))
    assert answer.assignment is not None, answer
    return answer.assignment


def rounds(port: int, devices: int, size: int, fingerprint: str, many: int) -> list[float]:
    """Return the seconds of rounds: from the moment when all report at once until each has fetched the next model."""

    async def play() -> list[float]:
        lines, took = await connect(port, devices), list[float]()
        players = [Device(number) for number in range(devices)]
        body, digest = report_body(size)
        for line in lines:
            line.keep = True

        async def ask(line: Connection, device: Device, serial: int) -> Assignment:
            assert await line.ask(device.check_in((fingerprint,), serial, 30.0)) == 200, line.body
            answer = read(CheckInAnswer, line.body)
            assert answer.assignment is not None, answer
            return answer.assignment

        async def go_on(line: Connection, device: Device, report: Pieces, serial: int) -> Assignment:
            assert await line.ask(report) == 200, line.body
            work = await ask(line, device, serial + 1)
            assert await line.ask(fetch(work.broadcast.sha256)) == 200
            return work

        await asyncio.gather(*(ask(line, device, 0) for line, device in zip(lines, players, strict=True)))
        for serial in range(many):
            reports = [device.report(f"load{size}", serial, body, digest) for device in players]
            start = time.perf_counter()
            steps = zip(lines, players, reports, strict=True)
            works = await asyncio.gather(*(go_on(*step, serial) for step in steps))
            took.append(time.perf_counter() - start)
            assert {work.version for work in works} == {serial + 1}
        for line in lines:
            line.close()
        return took

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(play())


def halves(port: int, devices: Sequence[int], serial: int, size: int) -> list[socket.socket]:
    """Open connections that have sent half a report, and stay open."""
    body, digest = report_body(size)
    opened: list[socket.socket] = []
    for number in devices:
        head, _ = Device(number).report(f"load{size}", serial, body, digest)
        opened.append(socket.create_connection(("127.0.0.1", port)))
        opened[-1].sendall(head + body[: len(body) // 2])
    return opened


class Generator:
    """A process that generates load."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def begin(self, function: Callable[..., R], *arguments: Any) -> "Future[R]":
        """Call one of these functions in the process."""
        return self._pool.submit(function, *arguments)
