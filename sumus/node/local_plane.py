"""A node's HTTP server in a thread of its own: an event loop that runs until another thread stops it."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

import uvloop

from sumus.http.listening import Planes


class LocalPlane:
    """A node's HTTP plane.

    Args:
        planes: The plane, bound to its socket.
    """

    def __init__(self, planes: Planes) -> None:
        self._planes = planes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None

    def run(self, over: threading.Event, up: Callable[[], None]) -> None:
        """Answer requests until `stop` is called.

        Args:
            over: Set if the node ends before the plane answers.
            up: Called once the plane answers.
        """
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._until_stopped(over, up))

    def stop(self) -> None:
        """End the plane once open requests are answered. Any thread may call this."""
        if self._loop is not None and self._ended is not None:
            with suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._ended.set)

    async def _until_stopped(self, over: threading.Event, up: Callable[[], None]) -> None:
        ended = asyncio.Event()
        async with self._planes:
            self._loop, self._ended = asyncio.get_running_loop(), ended
            up()
            if not over.is_set():
                await ended.wait()
