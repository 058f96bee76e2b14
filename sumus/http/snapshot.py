"""An answer that anybody may ask for and that takes work to make. It is made at most once in a while, however many ask.

metrics = Snapshot(make, lasts=1.0)
await metrics.look()                         made now, or up to a second ago
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Snapshot(Generic[T]):
    """Gives everybody who asks within so many seconds the same answer. Those who ask while it is being made wait for it.

    Args:
        make: Makes the answer.
        lasts: The seconds for which an answer is given again.
        clock: Gives seconds, which do not go back.
    """

    def __init__(
        self, make: Callable[[], Awaitable[T]], lasts: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make, self._lasts, self._clock = make, lasts, clock
        self._making = asyncio.Lock()
        self._made: tuple[T, float] | None = None

    async def look(self) -> T:
        """Return the answer."""
        async with self._making:
            if self._made is None or self._clock() >= self._made[1]:
                self._made = await self._make(), self._clock() + self._lasts
            return self._made[0]
