"""A cached response, for requests that anybody may send but that are expensive to answer. It is made at most once per period.

metrics = Snapshot(make, lasts=1.0)
await metrics.look()                         a response that was made now, or at most a second ago
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Snapshot(Generic[T]):
    """Returns the same response to all calls within a period. A call that comes while the response is being made waits for it.

    Args:
        make: Makes the response.
        lasts: The number of seconds for which a response is reused.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self, make: Callable[[], Awaitable[T]], lasts: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make, self._lasts, self._clock = make, lasts, clock
        self._making = asyncio.Lock()
        self._made: tuple[T, float] | None = None

    async def look(self) -> T:
        """Return the cached response, or a new one if the cached one is too old."""
        async with self._making:
            if self._made is None or self._clock() >= self._made[1]:
                self._made = await self._make(), self._clock() + self._lasts
            return self._made[0]
