"""Authenticates the senders of requests and reads the bodies. No byte of a long body is read before its sender is
authenticated.

message = await senders.message(request, EnrolmentRequest)                 a small body from an unauthenticated sender

device, body = await senders.signed(request)                               a small request that a device signed
async with senders.upload(request, most, limit) as (device, body, digest): a long signed request
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, cast

from starlette.requests import Request

from sumus.http.bodies import STRANGERS, Strangers, Uploads, announced, source
from sumus.http.room import Room, near
from sumus.server.doubt import Doubt
from sumus.server.server import Server
from sumus.server.windows import AGAIN
from sumus.wire.messages import MAX_CONTROL, MAX_UNDIGESTED, Refused, digest_of, read, text_over

MOST_LOOKUPS = 1000
"""The largest number of devices that are read from the database at the same time."""
_DIGEST = re.compile("[0-9a-f]{64}")


class Senders:
    """Reads requests, and refuses requests that are not signed by their device."""

    def __init__(self, server: Server, room: Room) -> None:
        """Read requests to a server.

        Args:
            server: The server, which has the register of enrolled devices.
            room: The memory for long bodies.
        """
        self._server = server
        self._strangers, self._uploads, self._doubt = Strangers(STRANGERS), Uploads(room), Doubt()
        self._finding, self._lookups = ThreadPoolExecutor(1, thread_name_prefix="devices"), 0

    async def message(self, request: Request, form: type[Any]) -> Any:
        """Read a small message from a sender who is not authenticated."""
        return read(form, await self._strangers.read(request, announced(request, MAX_CONTROL)))

    async def signed(self, request: Request, most: int = MAX_CONTROL) -> tuple[str, bytes]:
        """Return the device that signed a small request, and the request's body.

        Args:
            request: The request.
            most: The longest body that is accepted, in bytes.
        """
        if request.method == "GET":
            await self._wait_if_in_doubt(request)
            return await self._sender(request, digest_of(b"")), b""
        length = announced(request, most)
        digest = _claimed(request, length)
        await self._wait_if_in_doubt(request)
        if digest is None:
            body = await self._strangers.read(request, length)
            return await self._sender(request, digest_of(body)), body
        device = await self._sender(request, digest)
        async with self._uploads.body(request, length, f"{device} {request.url.path}") as lent:
            compare(lent, digest)
            return device, bytes(lent)

    @asynccontextmanager
    async def upload(
        self, request: Request, most: int, limit: Callable[[str, float], None]
    ) -> AsyncGenerator[tuple[str, memoryview, str], None]:
        """Read a long body into memory that is lent for it.

        Args:
            request: The request.
            most: The longest body that is accepted, in bytes.
            limit: Called with the sender and the time before the body is read; raises Refused for a sender with too many
                requests.

        Yields:
            The sender, the body, and the signed digest, with which the caller must compare the body.
        """
        length = announced(request, most)
        digest = _claimed(request, length)
        await self._wait_if_in_doubt(request)
        if digest is None:
            read_before = memoryview(await self._strangers.read(request, length))
            digest = digest_of(read_before)
            device = await self._sender(request, digest)
            limit(device, time.monotonic())
            self._server.counts.bytes_in += length
            yield device, read_before, digest
            return
        device = await self._sender(request, digest)
        limit(device, time.monotonic())
        async with self._uploads.body(request, length, device) as body:
            self._server.counts.bytes_in += length
            yield device, body, digest

    async def _wait_if_in_doubt(self, request: Request) -> None:
        """Wait, before the body is read, if requests with bad signatures have come in this device's name."""
        await self._doubt.turn(request.headers.get("sumus-device", ""), near(source(request)))

    async def _sender(self, request: Request, digest: str) -> str:
        """Return the device that signed a request whose body has this digest."""
        device = request.headers.get("sumus-device", "")
        await self._find(device)
        text = text_over(request.method, _path(request), self._server.population, device, digest)
        signature = request.headers.get("sumus-signature", "")
        try:
            self._server.roll.authenticate(device, signature, text, self._server.clock())
        except Refused as refused:
            if refused.problem.code == "bad_signature":
                self._doubt.note(device, near(source(request)))
            raise
        return device

    async def _find(self, device: str) -> None:
        """Refuse a device that is not enrolled.

        A device that is not in memory is read from the database in a thread, since a database may be slow. The number of
        simultaneous reads is bounded, since anybody can send ids of devices.
        """
        if self._server.roll.remembers(device, self._server.clock()):
            return
        if self._lookups >= MOST_LOOKUPS:
            raise Refused(
                "busy", "too many devices must be looked up in the database at the same time: try again later", AGAIN
            )
        self._lookups += 1
        try:
            find = self._server.roll.find
            await asyncio.get_running_loop().run_in_executor(self._finding, find, device, self._server.clock())
        finally:
            self._lookups -= 1


def compare(body: memoryview, digest: str) -> None:
    """Refuse a body whose digest is not the signed one."""
    if digest_of(body) != digest:
        raise Refused("bad_digest", "the body does not have the signed digest: it was changed in transit")


def _path(request: Request) -> str:
    """Return the path with its query, as the device sent it."""
    raw = cast(bytes | None, request.scope.get("raw_path")) or request.url.path.encode()
    query = cast(bytes, request.scope.get("query_string", b""))
    return (raw + b"?" + query if query else raw).decode("latin-1")


def _claimed(request: Request, length: int) -> str | None:
    """Return the digest in a request's header; None if the body is short and the header is missing."""
    digest = request.headers.get("sumus-digest")
    if digest is None and length > MAX_UNDIGESTED:
        raise Refused("digest_required", f"a body of more than {MAX_UNDIGESTED} bytes needs the header Sumus-Digest")
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise Refused("malformed", "Sumus-Digest must be the SHA-256 of the body: 64 hexadecimal digits, in lower case")
    return digest
