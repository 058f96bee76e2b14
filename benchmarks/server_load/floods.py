"""The floods of a siege, and the honest devices beside them. Each function is called in a process of its own.

A flood goes on for a number of seconds, and returns how often it acted. If a connection fails, the flood tries again.
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import uvloop

from benchmarks.server_load.devices import Device, Pieces, report_body
from benchmarks.server_load.generator import Connection, Load

HALF = b"POST /v1/checkins HTTP/1.1\r\nHost: load\r\nSumus-Pro"
HELD_S = 3.0
"""Seconds for which a flood holds a connection before it opens another one."""


def _run(play: Awaitable[int]) -> int:
    async def played() -> int:
        return await play

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(played())


async def _opened(port: int, small: bool = False) -> socket.socket:
    """Open a connection without a reader. small: with a small receive buffer."""
    connection = socket.socket()
    connection.setblocking(False)
    if small:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    return connection


async def _each(many: int, until: float, once: Callable[[int], Awaitable[None]]) -> int:
    """Run this many at a time, each again and again."""
    done = 0

    async def again(number: int) -> None:
        nonlocal done
        while time.perf_counter() < until:
            with suppress(OSError):
                await once(number)
            done += 1

    await asyncio.gather(*map(again, range(many)))
    return done


async def _paced(rate: float, until: float, once: Callable[[int], Awaitable[None]]) -> int:
    """Start this many a second, however long each takes."""
    running, begun, start = set[asyncio.Task[None]](), 0, time.perf_counter()

    async def safely(number: int) -> None:
        with suppress(OSError):
            await once(number)

    while (now := time.perf_counter()) < until:
        while begun < (now - start) * rate:
            task = asyncio.create_task(safely(begun))
            running.add(task)
            task.add_done_callback(running.discard)
            begun += 1
        await asyncio.sleep(0.002)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return begun


async def _hold(port: int, begun: bytes, until: float, small: bool = False) -> None:
    """Send these bytes and nothing more, until the server ends the connection or it has been held long enough."""
    loop = asyncio.get_running_loop()
    connection = await _opened(port, small)
    try:
        await loop.sock_sendall(connection, begun)
        left = max(0.0, min(HELD_S, until - time.perf_counter()))
        if small:
            await asyncio.sleep(left)
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    while await loop.sock_recv(connection, 2**16):
                        pass
    finally:
        connection.close()


def half_heads(port: int, many: int, seconds: float) -> int:
    """Open connections that each send half a head."""
    until = time.perf_counter() + seconds
    return _run(_each(many, until, lambda number: _hold(port, HALF, until)))


def lazy_readers(port: int, many: int, sha256: str, seconds: float) -> int:
    """Open connections that each ask for a model, and do not read it."""
    until = time.perf_counter() + seconds
    asked = f"GET /v1/objects/{sha256} HTTP/1.1\r\nHost: load\r\n\r\n".encode()
    return _run(_each(many, until, lambda number: _hold(port, asked, until, small=True)))


def announcements(port: int, many: int, size: int, seconds: float) -> int:
    """Open connections that each announce an unsigned report, and send a little of it."""
    until = time.perf_counter() + seconds
    head, body = Device(0).report(f"load{size}", 0, *report_body(size))
    unsigned = head.replace(b"Sumus-Signature: ", b"Sumus-Signature: A") + body[:1000]
    return _run(_each(many, until, lambda number: _hold(port, unsigned, until)))


def cut_uploads(port: int, rate: float, devices: Sequence[int], size: int, seconds: float) -> int:
    """Send signed reports that end in the middle."""
    until = time.perf_counter() + seconds
    body, digest = report_body(size)
    heads = [Device(number).report(f"load{size}", 0, body, digest)[0] for number in devices]
    half = body[: len(body) // 2]

    async def once(number: int) -> None:
        connection = await _opened(port)
        try:
            await asyncio.get_running_loop().sock_sendall(connection, heads[number % len(heads)] + half)
        finally:
            connection.close()

    return _run(_paced(rate, until, once))


def bad_signatures(port: int, rate: float, seconds: float, connections: int = 1000) -> int:
    """Send check-ins with the signature of another request.

    Requests that wait for their answers have connections of their own, up to `connections`. So a slow server is asked
    as often as a fast one.
    """
    until = time.perf_counter() + seconds
    (head, body), (other, _) = (Device(0).check_in(("0" * 64,), serial) for serial in (1, 2))
    wrong = head.replace(_signature(head), _signature(other)), body

    async def play() -> int:
        loop = asyncio.get_running_loop()
        free, left, sent = list[Connection](), connections, 0

        async def once(number: int) -> None:
            nonlocal left, sent
            if not free and not left:
                return
            if free:
                line = free.pop()
            else:
                left -= 1
                line = (await loop.create_connection(Connection, "127.0.0.1", port))[1]
            sent += 1
            await line.ask(wrong)
            free.append(line)

        await _paced(rate, until, once)
        return sent

    return _run(play())


def _signature(head: bytes) -> bytes:
    return head.partition(b"Sumus-Signature: ")[2].partition(b"\r")[0]


def silent(port: int, fingerprints: tuple[str, ...], first: int, seconds: float) -> int:
    """Let devices take work, one every tenth of a second, and never send anything again."""
    until = time.perf_counter() + seconds
    requests = [Device(first + number).check_in(fingerprints, 0) for number in range(int(10 * seconds) + 1)]

    async def once(number: int) -> None:
        connection = await _opened(port)
        await asyncio.get_running_loop().sock_sendall(connection, b"".join(requests[number % len(requests)]))
        await asyncio.sleep(0.5)
        connection.close()

    return _run(_paced(10.0, until, once))


def quiet(port: int, seconds: float) -> int:
    """Do nothing."""
    time.sleep(seconds)
    return 0


def honest(port: int, check_ins: Sequence[Pieces], uploads: Sequence[Pieces], seconds: float) -> tuple[Load, Load]:
    """Send check-ins and uploads, evenly over this many seconds; each is timed from the moment at which it was due."""

    async def both() -> tuple[Load, Load]:
        found = await asyncio.gather(_evenly(port, check_ins, seconds), _evenly(port, uploads, seconds))
        return found[0], found[1]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(both())


async def _evenly(port: int, requests: Sequence[Pieces], seconds: float, connections: int = 16) -> Load:
    load, free = Load(), asyncio.Queue[Connection]()
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        free.put_nowait((await loop.create_connection(Connection, "127.0.0.1", port))[1])
    start = time.perf_counter()

    async def ask(number: int) -> None:
        due = start + number * seconds / len(requests)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        line = await free.get()
        load.answers[await line.ask(requests[number])] += 1
        load.latencies.append(time.perf_counter() - due)
        free.put_nowait(line)

    await asyncio.gather(*map(ask, range(len(requests))))
    load.seconds = time.perf_counter() - start
    while not free.empty():
        free.get_nowait().close()
    return load
