"""Reads plans and models for devices, and decides which of these objects devices may fetch.

An object is either sent from its file, or is in memory once, even if many devices read it.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from sumus.server.tasks import ServedTasks
from sumus.server.windows import SOON as MADE_SOON
from sumus.storage.blobs import Blobs
from sumus.wire.messages import Refused, Window

LARGE = 8 * 2**20
"""Objects up to this size, in bytes, are sent from memory; larger objects are sent from their files, if they have files."""
MEMORY = 4 * LARGE
"""The largest number of bytes in memory for objects that also have files."""
SOON: Window = (1.0, 10.0)


class FetchableObjects:
    """The objects that devices may fetch: plans and models of the tasks."""

    def __init__(
        self, tasks: ServedTasks, shared: bool, command: Callable[[Callable[[float], Any]], Awaitable[Any]]
    ) -> None:
        """Offer the objects of these tasks.

        Args:
            tasks: The tasks of the server.
            shared: Whether other servers may make models for these tasks.
            command: Calls a function, whose argument is the time, on the deciding thread, and returns its result.
        """
        self._tasks, self._shared, self._command = tasks, shared, command
        self._looked = 0.0

    async def has(self, sha256: str) -> bool:
        """Return whether devices may fetch an object. If other servers make models, the rows are read to find new models."""
        asked = time.monotonic()
        if self._tasks.have(sha256) or not self._shared:
            return self._tasks.have(sha256)
        if not await self._command(lambda now: self._look(asked)):
            raise Refused("busy", "this server does not know the object yet: try again", MADE_SOON)
        return self._tasks.have(sha256)

    def _look(self, since: float) -> bool:
        """Read the models, unless they were read after `since`. Return False if they were read too recently to be read again."""
        if self._looked < since:
            if time.monotonic() < self._looked + MADE_SOON[0]:
                return False
            self._looked = time.monotonic()
            for task in self._tasks:
                task.training.see()
        return True


class HeldObject:
    """An object in memory. It stays in memory while a response reads it, or while it is one of the most recently read objects."""

    def __init__(self, body: bytes) -> None:
        self.body = body


class ObjectReader:
    """Reads objects for responses. All calls must come from one event loop.

    Args:
        blobs: The store of the objects.
        most: The largest number of bytes in memory for objects without files. A single longer object is allowed if no other
            object is in memory.
        in_thread: Calls a function with arguments in a thread, since a disk or a bucket may be slow to answer.
    """

    def __init__(self, blobs: Blobs, most: int, in_thread: Callable[..., Awaitable[Any]]) -> None:
        self._blobs, self._most, self._in_thread = blobs, most, in_thread
        self._recent: OrderedDict[str, HeldObject] = OrderedDict()
        self._alive: WeakValueDictionary[str, HeldObject] = WeakValueDictionary()
        self._coming: dict[str, tuple[asyncio.Future[HeldObject], int]] = {}

    async def open(self, sha256: str) -> HeldObject | Path:
        """Open an object: its content in memory, or its file.

        Raises:
            Refused: With the code `busy`, if there is no memory for the object now.
        """
        if (found := self._here(sha256)) is not None:
            return await found
        path, size = await self._in_thread(self._look, sha256)
        if (found := self._here(sha256)) is not None:
            return await found
        most = MEMORY if path is not None else self._most
        if path is not None and size > LARGE:
            return path
        while self._recent and self._bytes() + size > most:
            self._recent.popitem(last=False)
        if self._bytes() + size <= most or not self._bytes():
            return await self._load(sha256, size)
        if path is None:
            raise Refused(
                "busy",
                "there is no memory for this model now, since other models are being sent: try again later",
                SOON,
            )
        return path

    def _here(self, sha256: str) -> "asyncio.Future[HeldObject] | None":
        """Return an object that is in memory or is being read; None for any other object."""
        if (found := self._alive.get(sha256)) is not None:
            self._remember(sha256, found)
            known: asyncio.Future[HeldObject] = asyncio.get_running_loop().create_future()
            known.set_result(found)
            return known
        return asyncio.shield(self._coming[sha256][0]) if sha256 in self._coming else None

    def _look(self, sha256: str) -> tuple[Path | None, int]:
        return self._blobs.path(sha256), self._blobs.size(sha256) or 0

    def _bytes(self) -> int:
        return sum(len(each.body) for each in self._alive.values()) + sum(size for _, size in self._coming.values())

    def _load(self, sha256: str, size: int) -> "asyncio.Future[HeldObject]":
        async def load() -> HeldObject:
            try:
                found = HeldObject(await self._in_thread(self._blobs.get, sha256))
            finally:
                del self._coming[sha256]
            self._alive[sha256] = found
            self._remember(sha256, found)
            return found

        coming = asyncio.ensure_future(load())
        self._coming[sha256] = coming, size
        return asyncio.shield(coming)

    def _remember(self, sha256: str, found: HeldObject) -> None:
        self._recent[sha256] = found
        self._recent.move_to_end(sha256)
