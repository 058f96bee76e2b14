"""Bodies of requests, read: the one place that does it, for every plane.

    length = announced(request, most)                           refused by its length before a byte is read
    body = await strangers.read(request, length)                of a sender who is not known yet
    async with uploads.body(request, length, sender) as body:   of one who is, in memory that is lent
    body = await whole(request, length)                         in memory that the caller has counted

A body that stops coming, ends early or is not as long as it said is refused with a code of `wire.messages.STATUS`. Memory of a
request that failed comes back at once: `let_go` empties the frames that an error's traceback holds on to.
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
"""In every so many seconds at least so many bytes of a body must come, or the rest of it."""
SMALL = 64 * 2**10
"""The longest body, in bytes, that is read of a sender who is not known yet."""
FREE = 4 * 2**10
"""Bytes of each such body that are not counted: a connection costs as much, and connections are bounded."""
STRANGERS = 32 * 2**20
"""The most bytes of all such bodies together, beyond what is free."""
SOON: Window = (1.0, 10.0)


def announced(request: Request, most: int, packed: str = "identity") -> int:
    """Return the length that a request announces for its body.

    Args:
        request: The request.
        most: The most bytes that are read.
        packed: The content encoding that is read, besides none.

    Raises:
        Refused: The length is too long, or is not announced. Nothing of the body was read.
    """
    if request.headers.get("content-encoding", "identity") not in ("identity", packed):
        raise Refused("encoding", "bodies are sent as they are: leave Content-Encoding out")
    length = whole_number(request.headers.get("content-length", ""))
    if length is None:
        raise Refused("length_required", "the header Content-Length is required")
    if length > most:
        raise Refused("too_large", f"{over(length, most)} are read here")
    return length


async def fill(request: Request, into: memoryview) -> None:
    """Read a body of exactly this length. The memory is given back if it is refused."""
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
    """Read a body whose length was not announced: it comes in chunks.

    Args:
        request: The request.
        most: The most bytes that are read.
        more: Is told the bytes of each piece before it is kept; it may refuse.
    """
    body = bytearray()

    def put(piece: bytes) -> None:
        more(len(piece))
        body.extend(piece)

    await _read(request, most, put, exactly=False)
    return bytes(body)


class Strangers:
    """Reads small bodies of senders who are not known yet: altogether no more than so many bytes, and of a neighbourhood no more
    than its share. What has come is counted, not what was announced, so that announcing costs nobody anything.

    Args:
        most: The most bytes of all such bodies, beyond those that are free of each.
    """

    def __init__(self, most: int) -> None:
        self._shares = Shares(most)

    @property
    def taken(self) -> int:
        """Bytes that are counted now."""
        return self._shares.taken

    async def read(self, request: Request, length: int) -> bytes:
        """Read a body of exactly this length. The request is refused with `busy` if there is no room for it."""
        body, counted, who = bytearray(), 0, near(source(request))

        def put(piece: bytes) -> None:
            nonlocal counted
            more = max(len(body) + len(piece) - FREE, 0) - counted
            if not self._shares.take(who, more):
                raise Refused("busy", "too many bodies of senders who are not known are on their way", SOON)
            counted += more
            body.extend(piece)

        try:
            await _read(request, length, put)
            return bytes(body)
        finally:
            self._shares.give(who, counted)


class Uploads:
    """Reads long bodies of senders who are known, into lent memory.

    Args:
        room: Lends the memory.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._sending: set[str] = set()
        self._tidying = False

    @asynccontextmanager
    async def body(self, request: Request, length: int, sender: str) -> AsyncGenerator[memoryview, None]:
        """Read a body of exactly this length, for the length of a block. A sender has one body at a time.

        Raises:
            Refused: Among others `busy`: there is no room, or the sender has another body.
        """
        if sender in self._sending:
            raise Refused("busy", "another report of this device is on its way: let it end first", (1.0, 5.0))
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
    """Read a body of a length, or of a length at most, and at the least rate at least. `put` is given each piece."""
    loop, got, mark, more = asyncio.get_running_loop(), 0, LEAST, True
    try:
        async with asyncio.timeout(WINDOW_S) as window:
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Refused("malformed", "the connection ended before the body did")
                piece, more = cast(bytes, message.get("body", b"")), bool(message.get("more_body", False))
                got += len(piece)
                if got > length and not exactly:
                    raise Refused("too_large", f"more than {amount(length)}, and no more is read here")
                if got > length:
                    raise Refused("malformed", f"the body is longer than it said, which was {length} bytes")
                put(piece)
                if got >= mark:
                    mark = got + LEAST
                    window.reschedule(loop.time() + WINDOW_S)
    except TimeoutError:
        raise Refused("slow", f"less than {LEAST} bytes of the body came in {WINDOW_S:g} s") from None
    if got < length and exactly:
        raise Refused("malformed", f"the body has {got} bytes, and said {length}")


def let_go(error: BaseException) -> None:
    """Empty the frames that an error and the errors behind it hold on to, once all is said about them. Without that, a body that
    a frame has named lives until the error does; and an error that a frame has named too, until a collection finds the circle."""
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
