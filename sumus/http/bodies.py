"""Reads the bodies of requests, for every plane.

    length = announced(request, most)                           raises Refused for a bad length, before a byte is read
    body = await strangers.read(request, length)                from an unauthenticated sender

    async with uploads.body(request, length, sender) as body:   from an authenticated sender, into memory of a `Room`

    body = await whole(request, length)                         into memory that the caller has counted

A body that stalls, ends early or does not have the announced length is refused with a code from `wire.messages.STATUS`. The
memory of a failed request is freed at once: `let_go` clears the frames that an error's traceback keeps alive.
"""

import asyncio
import traceback
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import cast

from starlette.requests import Request

from sumus.http.room import IDLE_S, Room, Shares, near
from sumus.text import amount, over, whole_number
from sumus.wire.messages import Refused, Window

WINDOW_S, LEAST = 10.0, 160 * 2**10
"""The slowest rate of a body: in each period of this many seconds, at least this many bytes or the rest of the body must
arrive.
"""
SMALL = 64 * 2**10
"""The longest body, in bytes, that is read from a sender who is not authenticated yet."""
FREE = 4 * 2**10
"""The number of bytes at the start of each such body that are not counted: the connection itself needs as much memory, and the
number of connections is limited.
"""
STRANGERS = 32 * 2**20
"""The largest number of counted bytes of all such bodies together."""
SOON: Window = (1.0, 10.0)


def announced(request: Request, most: int, packed: str = "identity") -> int:
    """Return the announced length of a request's body.

    Args:
        request: The request.
        most: The longest body that is accepted, in bytes.
        packed: The content encoding that is accepted besides `identity`.

    Raises:
        Refused: The body is too long, or its length is not announced. Nothing of the body was read.
    """
    if request.headers.get("content-encoding", "identity") not in ("identity", packed):
        raise Refused(
            "encoding",
            "this content encoding is not accepted: send the body as it is, without the header Content-Encoding",
        )
    length = whole_number(request.headers.get("content-length", ""))
    if length is None:
        raise Refused(
            "length_required", "the header Content-Length is missing or wrong: send it with the body's length"
        )
    if length > most:
        raise Refused("too_large", f"the body has {over(length, most)} are accepted")
    return length


async def fill(request: Request, into: memoryview) -> None:
    """Read a body into memory, which it must fill exactly. The memory is released if the body is refused."""
    got = 0

    def put(piece: bytes) -> None:
        nonlocal got
        into[got : got + len(piece)] = piece
        got += len(piece)

    try:
        await _read(request, len(into), put)
    except BaseException:
        into.release()
        raise


async def whole(request: Request, length: int) -> bytes:
    """Read a body of exactly this length."""
    body = bytearray()
    await _read(request, length, body.extend)
    return bytes(body)


async def up_to(request: Request, most: int, more: Callable[[int], None]) -> bytes:
    """Read a body that is sent in chunks, without an announced length.

    Args:
        request: The request.
        most: The longest body that is accepted, in bytes.
        more: Called with the size of each piece before the piece is kept. It may raise Refused; then the body is refused.
    """
    body = bytearray()

    def put(piece: bytes) -> None:
        more(len(piece))
        body.extend(piece)

    await _read(request, most, put, exactly=False)
    return bytes(body)


class Strangers:
    """Reads small bodies from senders who are not authenticated. The bytes of all these bodies are bounded together, and so are
    the bytes from each neighbourhood (network of addresses). Only received bytes are counted, not announced ones, so an
    announcement cannot take space from other senders.

    Args:
        most: The largest number of bytes that may be counted at the same time.
    """

    def __init__(self, most: int) -> None:
        self._shares = Shares(most)

    @property
    def taken(self) -> int:
        """The number of bytes that are counted now."""
        return self._shares.taken

    async def read(self, request: Request, length: int) -> bytes:
        """Read a body of exactly this length. The request is refused with `busy` if there is no space for it."""
        body, counted, who = bytearray(), 0, near(source(request))

        def put(piece: bytes) -> None:
            nonlocal counted
            more = max(len(body) + len(piece) - FREE, 0) - counted
            if not self._shares.take(who, more):
                raise Refused(
                    "busy", "the server is receiving too many requests from unknown senders: try again later", SOON
                )
            counted += more
            body.extend(piece)

        try:
            await _read(request, length, put)
            return bytes(body)
        finally:
            self._shares.give(who, counted)


class Uploads:
    """Reads long bodies from authenticated senders into memory that a `Room` lends.

    Args:
        room: Lends the memory.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._sending: set[str] = set()
        self._tidying = False

    @asynccontextmanager
    async def body(self, request: Request, length: int, sender: str) -> AsyncGenerator[memoryview, None]:
        """Read a body of exactly this length, as a context manager. A sender can have only one body at a time.

        Raises:
            Refused: The body is refused; with the code `busy` if there is no memory, or the sender is already sending another
                body.
        """
        if sender in self._sending:
            raise Refused(
                "busy", "another report of this device is being received: wait until that is done", (1.0, 5.0)
            )
        self._sending.add(sender)
        try:
            body = self._room.take(length, near(source(request)))
            await fill(request, body)
            yield body
        finally:
            self._sending.discard(sender)
            self._tidy_soon()

    def _tidy_soon(self) -> None:
        if not self._tidying:
            self._tidying = True
            asyncio.get_running_loop().call_later(IDLE_S, self._tidy)

    def _tidy(self) -> None:
        self._tidying = False
        if self._room.tidy():
            self._tidy_soon()


async def _read(request: Request, length: int, put: Callable[[bytes], None], exactly: bool = True) -> None:
    """Read a body, and refuse it if it arrives more slowly than the slowest rate.

    Args:
        request: The request.
        length: The length of the body.
        put: Called with each piece.
        exactly: Whether the body must have exactly this length; if False, the body may be shorter.
    """
    loop, got, mark, more = asyncio.get_running_loop(), 0, LEAST, True
    try:
        async with asyncio.timeout(WINDOW_S) as window:
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Refused("malformed", "the connection ended before the body was complete")
                piece, more = cast(bytes, message.get("body", b"")), bool(message.get("more_body", False))
                got += len(piece)
                if got > length and not exactly:
                    raise Refused(
                        "too_large", f"the body is longer than {amount(length)}, the longest that is accepted"
                    )
                if got > length:
                    raise Refused("malformed", f"the body is longer than {length} bytes, its announced Content-Length")
                put(piece)
                if got >= mark:
                    mark = got + LEAST
                    window.reschedule(loop.time() + WINDOW_S)
    except TimeoutError:
        raise Refused("slow", f"the body is too slow: less than {LEAST} bytes arrived in {WINDOW_S:g} s") from None
    if got < length and exactly:
        raise Refused("malformed", f"the body has {got} bytes, but {length} bytes were announced (Content-Length)")


def let_go(error: BaseException) -> None:
    """Clear the frames that a handled error and its causes keep alive. Otherwise a body to which a frame refers stays in memory
    as long as the error. If the frame also refers to the error, the body stays until the garbage collector finds the cycle.
    """
    seen = set[int]()
    behind: list[BaseException | None] = [error]
    while behind:
        one = behind.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None
        behind += [one.__cause__, one.__context__]


def source(request: Request) -> str:
    """Return the address that a request comes from."""
    return request.client.host if request.client is not None else ""
