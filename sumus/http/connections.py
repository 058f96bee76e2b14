"""Bounded connections: their number, the time of each step, and the memory for waiting data are limited.

    connections = Connections(10_000)
    listener = Listener(socket, config, state, connections)          accepts connections from now on
    connections.sweep(now)                                           called regularly: ends connections that are too slow
    listener.close()

uvicorn reads and writes HTTP. This module adds the limits that uvicorn does not have:

- a connection is counted from the moment when it is accepted; if its TLS handshake is not done after `HANDSHAKE_S`, it is
  ended;
- every request head (the request line and the headers) is limited to `HEAD_S` seconds and `MOST_HEAD` bytes;
- **a connection handles one request at a time**: data that follows an unanswered request is not read, and the connection is
  closed after the response;
- a connection is ended if its client does not read the response, or does not close, for `STALLED_S`;
- the body of a refused request is read and discarded, for at most `LINGER_S`, so that the response arrives.
"""

import asyncio
import math
import resource
import socket
import ssl
import struct
from collections import OrderedDict
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from sumus.http.answers import PIECE
from sumus.http.room import Shares, near

HEAD_S, MOST_HEAD = 10.0, 32 * 2**10
"""The limits of a request's head (its request line and headers), in seconds and in bytes."""
HANDSHAKE_S = 10.0
"""The largest number of seconds for the TLS handshake."""
STALLED_S = 10.0
"""The number of seconds in which a client must read the waiting data, which are at most two pieces of a response."""
LINGER_S, LINGER_BYTES = 10.0, 32 * 2**20
"""The limits for reading the body of a refused request, in seconds and in bytes."""
UNUSED_S = 1.0
"""The number of seconds without a request after which a connection may be replaced by a new one."""
MOST_CONNECTIONS = 16_384
"""The largest number of connections to one plane."""
ACCEPTED_AT_ONCE = 64
"""The number of connections that are accepted in one go before the event loop does other work."""
FULL_S = 0.5
"""The number of seconds for which no connection is accepted after the process has reached its limit of open files."""


def files_for(most: int) -> int:
    """Return `most` or half of the number of files that the process may open, whichever is smaller."""
    return max(min(most, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2), 1)


class Connections:
    """The connections to one plane. In a shortage, each neighbourhood (network of addresses) has only its share. At the limit,
    a new connection replaces the connection that has been idle for the longest time.

    ended: The number of connections that have ended since this was set to 0.

    Args:
        most: The largest number of connections at any time.
    """

    def __init__(self, most: int) -> None:
        self.shares = Shares(most)
        self.open = set[Connection]()
        self.ended = 0
        self._without_request: dict[str, OrderedDict[Connection, float]] = {}

    def admit(self, who: str) -> bool:
        """Count a new connection of a neighbourhood and return True; return False if the limits do not allow it."""
        if self.shares.take(who, 1):
            return True
        full = self.shares.taken >= self.shares.most
        waiting = self._without_request.get(next(iter(self._without_request), who) if full else who)
        if not waiting:
            return False
        longest, since = next(iter(waiting.items()))
        if longest.loop.time() < since + UNUSED_S:
            return False
        longest.give_up()
        self.shares.add(who, 1)
        return True

    def leave(self, who: str) -> None:
        """Record that a connection of a neighbourhood has ended."""
        self.shares.give(who, 1)
        self.ended += 1

    def has_no_request(self, one: "Connection") -> None:
        """Record that a connection has no request: from now on a new connection may replace it."""
        self._without_request.setdefault(one.who, OrderedDict())[one] = one.loop.time()

    def has_request(self, one: "Connection") -> None:
        """Record that a connection has a request: a new connection does not replace it."""
        if (waiting := self._without_request.get(one.who)) is not None:
            waiting.pop(one, None)
            if not waiting:
                del self._without_request[one.who]

    def sweep(self, now: float) -> None:
        """End the connections that have taken too long over their present step."""
        for one in [one for one in self.open if one.is_late(now)]:
            one.give_up()


class Listener:
    """Accepts connections on a socket as soon as it is made; each connection is counted before a byte of it is read.

    Args:
        listening: A socket that listens.
        how: The uvicorn configuration of the application that handles the requests.
        state: The state of the uvicorn server to which the connections belong.
        connections: Counts them.
    """

    def __init__(
        self, listening: socket.socket, how: uvicorn.Config, state: ServerState, connections: Connections
    ) -> None:
        self._socket, self._how, self._state, self._connections = listening, how, state, connections
        self._loop = asyncio.get_running_loop()
        self._beginning = set[asyncio.Task[None]]()
        listening.setblocking(False)
        self._loop.add_reader(listening.fileno(), self._accept)
        self._open = True

    def close(self) -> None:
        """Accept no more connections, and drop those that are still in their handshake."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket.fileno())
            for task in self._beginning:
                task.cancel()

    async def wait_closed(self) -> None:
        """Wait for the connections that were in their handshake."""
        await asyncio.gather(*self._beginning, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                one, address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._pause()
                return
            who = near(address[0])
            if not self._connections.admit(who):
                one.close()
                continue
            _prepare(one)
            task = self._loop.create_task(self._begin(one, who))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    def _pause(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._loop.call_later(FULL_S, self._resume)

    def _resume(self) -> None:
        if self._open:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    async def _begin(self, one: socket.socket, who: str) -> None:
        """Pass a connection to HTTP after its TLS handshake."""
        made: Connection | None = None

        def make() -> Connection:
            nonlocal made
            made = Connection(self._how, self._state, self._connections, who)
            return made

        secure = self._how.ssl
        times = {} if secure is None else {"ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": STALLED_S}
        try:
            await self._loop.connect_accepted_socket(make, one, ssl=secure, **times)
        except (OSError, ssl.SSLError, asyncio.CancelledError):
            one.close()
        finally:
            if made is None or not made.begun:
                self._connections.leave(who)
            if made is not None and not made.begun:
                made.forget()


def _prepare(one: socket.socket) -> None:
    """Make a connection send without delay, and keep only a small part of a response in the system's buffers. The rest waits in
    this process, which can then see whether the client reads.
    """
    one.setblocking(False)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if (unsent := getattr(socket, "TCP_NOTSENT_LOWAT", None)) is not None:
        one.setsockopt(socket.IPPROTO_TCP, unsent, 2 * PIECE)


class Connection(HttpToolsProtocol):
    """One connection; uvicorn reads its requests one at a time.

    Attributes:
        who: The neighbourhood from which the connection comes.
        begun: Whether the connection is counted. If so, it is removed from the count when it ends.
    """

    def __init__(self, how: uvicorn.Config, state: ServerState, connections: Connections, who: str) -> None:
        super().__init__(how, state, {})
        self.who, self.begun = who, False
        self._connections = connections
        self._until, self._stalled = math.inf, math.inf
        self._came = self._named = self._unwanted = 0
        self._in_head = self._deaf = False
        self._whole = True

    # ── from the transport ───────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=PIECE)
        self.begun = True
        self._connections.open.add(self)
        self._connections.has_no_request(self)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._count_out()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Do the same as uvicorn, with limits. Bad input is not logged, since anybody can send it."""
        self._unset_keepalive_if_required()
        if not self._is_wanted(len(data)):
            return
        awaited = self._in_head
        parser: Any = self.parser
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._deaf = True  # the data that follow belong to another protocol
        except httptools.HttpParserError:
            self._refuse()
        if self._in_head and awaited:
            self._came += len(data)
            if self._came > MOST_HEAD:
                self.give_up()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.time() + STALLED_S

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = math.inf

    # ── from the parser ──────────────────────────────────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        if not self._answered():
            raise _Unwanted("a request that follows an unanswered request")
        if not self._in_head:  # it begins in the piece of data in which the previous request ended
            self._await_head()
        self._whole = False
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._grow(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            raise _Unwanted("headers after a body")
        self._grow(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._connections.has_request(self)
        super().on_headers_complete()
        self._in_head, self._until = False, math.inf
        if self.expect_100_continue:
            self.cycle.keep_alive = False  # the client sends its body only if told to, so no later request can follow
        if any(name == b"transfer-encoding" for name, _ in self.headers):
            self._deaf = True  # no plane reads such bodies: the request is refused when its head is read
        self.flow.pause_reading()  # until an endpoint reads the body

    def on_body(self, body: bytes) -> None:
        """Do the same as uvicorn, but without its two copies of each piece."""
        if self.cycle.body or self.cycle.response_complete:
            super().on_body(body)
            return
        self.cycle.body = body  # pyright: ignore[reportAttributeAccessIssue]
        if len(body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._whole = True
        super().on_message_complete()
        if self._answered():
            self._rest()

    # ── from requests ────────────────────────────────────────────────────────────────────────────────────────────────

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.cycle.body = bytearray()
        if self._whole and not self._deaf and not self.transport.is_closing():
            self._rest()
            return
        self._until = self.loop.time() + LINGER_S
        if self._whole:
            self.transport.close()

    # ── the end of a connection ──────────────────────────────────────────────────────────────────────────────────────

    def is_late(self, now: float) -> bool:
        """Return whether the connection has exceeded the time of its present step."""
        return self._until <= now or self._stalled <= now

    def give_up(self) -> None:
        """End the connection at once, even if data waits to be read or written."""
        self._deaf = True
        self._count_out()
        if (at := self.transport.get_extra_info("socket")) is not None:  # the system drops unsent data too
            at.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def forget(self) -> None:
        """Drop the parser: it and the connection refer to each other, which would keep both in memory."""
        self.parser = None  # pyright: ignore[reportAttributeAccessIssue]

    def _count_out(self) -> None:
        if self in self._connections.open:
            self._connections.open.discard(self)
            self._connections.has_request(self)
            self._connections.leave(self.who)

    def _refuse(self) -> None:
        """Refuse the received data: they are not a request, or are not accepted here."""
        if not self._answered():
            self._deaf = True
        elif self._named > MOST_HEAD:
            self.give_up()
        else:
            self._deaf, self._in_head = True, False
            self.send_400_response("Invalid HTTP request received.")
            self._until = self.loop.time() + LINGER_S

    # ── private methods ──────────────────────────────────────────────────────────────────────────────────────────────

    def _is_wanted(self, more: int) -> bool:
        """Return whether the next `more` bytes should be parsed."""
        unread = self._answered() and not self._whole and not self._in_head
        if self._deaf or unread:
            self._unwanted += more
            if self._unwanted > LINGER_BYTES:
                self.give_up()
            return not self._deaf
        if self._whole and self._answered() and not self._in_head:
            self._await_head()
        return True

    def _await_head(self) -> None:
        self._in_head, self._came, self._named = True, 0, 0
        self._until = self.loop.time() + HEAD_S

    def _rest(self) -> None:
        """Record that the connection is idle. uvicorn closes idle connections; `sweep` ends a connection that does not close."""
        self._unwanted = 0
        self._until = self.loop.time() + self.timeout_keep_alive + LINGER_S
        self._connections.has_no_request(self)

    def _answered(self) -> bool:
        """Return whether all requests have been answered."""
        last: Any = self.cycle  # None if the connection is new
        return last is None or last.response_complete

    def _grow(self, more: int) -> None:
        self._named += more
        if self._named > MOST_HEAD:
            raise _Unwanted("the head is too long")


class _Unwanted(Exception):
    """Raised to stop the parser, since further data are not read."""
