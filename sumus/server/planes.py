"""Where a server listens: two planes of HTTP on one event loop, each on a socket of its own.

    async with Planes([(device_socket, device_config), (admin_socket, admin_config)]):
        …                                          both answer
    …                                              both have answered what they were asked, and are closed

uvicorn reads and writes. What it leaves open is bounded here: the length of a request's head, and the time that it takes.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sumus.errors import ExperimentError

HEAD_S = 10.0
"""Seconds for a request's line and headers to come."""
MOST_HEAD = 32 * 2**10
"""Their bytes, at most, beyond the last piece that was read."""
KEEP_ALIVE_S = 15
"""Seconds that an idle connection is kept."""
GRACE_S = 20
"""Seconds for what is on its way when a server stops."""


def bound(host: str, port: int, what: str) -> socket.socket:
    """A socket at an address, port 0 for any. what: the option that names it, for the error."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ExperimentError(
            f"nothing can listen on {host}:{port}: {error.strerror or error}; give another with {what}"
        ) from error
    return listening


def is_local(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def config(app: Any, proxies: str, certificate: tuple[Path, Path] | None = None) -> uvicorn.Config:
    """How an application is served. proxies: addresses of reverse proxies that are believed about who asks, with commas.
    certificate: its chain and its key, PEM."""
    chain, key = certificate or (None, None)
    return uvicorn.Config(
        app,
        loop="none",
        http=BoundedHeads,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=proxies,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        ssl_certfile=chain,
        ssl_keyfile=key,
    )


class Planes:
    """Sockets and what is served on them, for the length of a block."""

    def __init__(self, planes: Sequence[tuple[socket.socket, uvicorn.Config]]) -> None:
        self._planes = [(listening, _Plane(how)) for listening, how in planes]
        self._running: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Planes":
        self._running = [asyncio.create_task(plane.serve([listening])) for listening, plane in self._planes]
        for _, plane in self._planes:
            await plane.up.wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, plane in self._planes:
            plane.should_exit = True
        await asyncio.gather(*self._running)

    def hurry(self) -> None:
        """Wait for nobody when the block ends."""
        for _, plane in self._planes:
            plane.force_exit = True


class _Plane(uvicorn.Server):
    """up: once it answers. Signals are its owner's."""

    def __init__(self, how: uvicorn.Config) -> None:
        super().__init__(how)
        self.up = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


class BoundedHeads(HttpToolsProtocol):
    """uvicorn's protocol, which lets go of a connection whose next head is too long or too slow."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head = 0
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        if self._late is None and (self.cycle is None or self.cycle.response_complete):
            self._begin()
        super().data_received(data)
        if self._late is not None:
            self._head += len(data)
            if self._head > MOST_HEAD and not self.transport.is_closing():
                self.transport.close()

    def on_headers_complete(self) -> None:
        self._end()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def _begin(self) -> None:
        self._head, self._late = 0, self.loop.call_later(HEAD_S, self.timeout_keep_alive_handler)

    def _end(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
