"""Plans and models on their way to devices: which of them devices may fetch, and how they are read.

An object is in memory once, however many devices read it, or is sent from its file.
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
"""Objects of up to so many bytes are sent from memory; larger objects from their files, if they have any."""
MEMORY = 4 * LARGE
"""The most bytes of objects in memory that have files too."""
SOON: Window = (1.0, 10.0)


class FetchableObjects:
    """The objects that devices may fetch: plans and models of the tasks."""

    def __init__(
        self, tasks: ServedTasks, shared: bool, command: Callable[[Callable[[float], Any]], Awaitable[Any]]
    ) -> None:
        """Know the objects of these tasks.

        Args:
            tasks: The tasks of the server.
            shared: Whether other servers may make models of them.
            command: Lets the deciding thread do something, given the time, and returns its answer.
        """
        self._tasks, self._shared, self._command = tasks, shared, command
        self._looked = 0.0

    async def has(self, sha256: str) -> bool:
        """Return whether devices may fetch an object. If other servers make models, new ones are looked for in the rows."""
        asked = time.monotonic()
        if self._tasks.have(sha256) or not self._shared:
            return self._tasks.have(sha256)
        if not await self._command(lambda now: self._look(asked)):
            raise Refused("busy", "it may be new: ask again", MADE_SOON)
        return self._tasks.have(sha256)

    def _look(self, since: float) -> bool:
        """Read the models, unless that was done since; False if they were read too short a time ago to be read again."""
        if self._looked < since:
            if time.monotonic() < self._looked + MADE_SOON[0]:
                return False
            self._looked = time.monotonic()
            for task in self._tasks:
                task.training.see()
        return True


class HeldObject:
    """An object in memory. It stays there while an answer reads it, or while it is one of the objects that were read last."""

    def __init__(self, body: bytes) -> None:
        self.body = body


class ObjectReader:
    """Reads objects for answers. All calls are from one event loop.

    Args:
        blobs: Where the objects lie.
        most: The most bytes of objects in memory that have no file; a single longer object is allowed if no other is in memory.
        in_thread: Calls a function with arguments in a thread, since a disk or a bucket may take long to answer.
    """

    def __init__(self, blobs: Blobs, most: int, in_thread: Callable[..., Awaitable[Any]]) -> None:
        self._blobs, self._most, self._in_thread = blobs, most, in_thread
        self._recent: OrderedDict[str, HeldObject] = OrderedDict()
        self._alive: WeakValueDictionary[str, HeldObject] = WeakValueDictionary()
        self._coming: dict[str, tuple[asyncio.Future[HeldObject], int]] = {}

    async def open(self, sha256: str) -> HeldObject | Path:
        """Open an object: its content in memory, or its file.

        Raises:
            Refused: busy, if there is no room for the object in memory now.
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
            raise Refused("busy", "other models are being sent, and there is no memory for this one now", SOON)
        return path

    def _here(self, sha256: str) -> "asyncio.Future[HeldObject] | None":
        """An object that is in memory, or is being read; None for any other."""
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
