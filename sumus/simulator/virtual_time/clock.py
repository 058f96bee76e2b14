"""The virtual clock, which jumps from one scheduled event to the next."""

import heapq
import math
from collections.abc import Callable
from typing import Any


class VirtualClock:
    """Scheduled events, by the moment at which they are due.

    Attributes:
        now: The current time of the clock, in simulated seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, moment: float, act: Callable[..., None], *args: Any, late: bool = False) -> None:
        """Schedule an event at a moment.

        Args:
            moment: The moment of the event. Events of the same moment run in the order in which they were scheduled.
            act: The function to call.
            args: The arguments of `act`.
            late: Whether the event runs after all other events of its moment.
        """
        self._count += 1
        heapq.heappush(self._queue, (moment, int(late), self._count, act, args))

    def next(self) -> float:
        """Return the time of the next event; infinity if there is none."""
        return self._queue[0][0] if self._queue else math.inf

    def go_on(self) -> None:
        """Advance to the next event, and run it."""
        self.now, _, _, act, args = heapq.heappop(self._queue)
        act(*args)

    def go_to(self, moment: float) -> None:
        """Advance to a moment before the next event."""
        self.now = moment
