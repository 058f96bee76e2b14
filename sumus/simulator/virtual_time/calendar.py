"""The times at which devices wake, for millions of devices: arrays by minute, each sorted when its minute begins."""

import heapq
import math
from dataclasses import dataclass, field

import numpy as np

from sumus.fleet import MINUTE
from sumus.types import Array, Floats


@dataclass(slots=True)
class _Minute:
    """The devices that wake in a minute, in no particular order.

    Attributes:
        many: Devices that were added together, and their moments.
        who: Devices that were added one by one.
        moments: The moments of the devices in `who`.
    """

    many: list[tuple[Array, Floats]] = field(default_factory=list[tuple[Array, Floats]])
    who: list[int] = field(default_factory=list[int])
    moments: list[float] = field(default_factory=list[float])


class Calendar:
    """The devices, and the moments at which they wake."""

    def __init__(self) -> None:
        self._minutes: list[int] = []
        self._by_minute: dict[int, _Minute] = {}
        self._who: Array = np.zeros(0, np.int64)
        self._moments: Floats = np.zeros(0)
        self._taken = self._held = 0
        self._minute = -1

    def put(self, who: Array, moments: Floats) -> None:
        """Plan to wake devices at these moments."""
        if not len(who):
            return
        minutes = np.maximum(moments // MINUTE, self._minute).astype(np.int64)
        order = np.argsort(minutes, kind="stable")
        edges = np.flatnonzero(np.diff(minutes[order])) + 1
        for some in np.split(order, edges):
            minute = int(minutes[some[0]])
            if minute <= self._minute:
                self._wake_within_this_minute(who[some], moments[some])
            else:
                self._in(minute).many.append((who[some], moments[some]))

    def put_one(self, who: int, moment: float) -> None:
        """Plan to wake a device at this moment."""
        minute = int(moment // MINUTE)
        if minute <= self._minute:
            self._wake_within_this_minute(np.array([who]), np.array([moment]))
        else:
            later = self._in(minute)
            later.who.append(who)
            later.moments.append(moment)

    def _in(self, minute: int) -> _Minute:
        if minute not in self._by_minute:
            self._by_minute[minute] = _Minute()
            heapq.heappush(self._minutes, minute)
        return self._by_minute[minute]

    def _wake_within_this_minute(self, who: Array, moments: Floats) -> None:
        rest = slice(self._taken, None)
        self._lay_out([self._who[rest], who], [self._moments[rest], moments])

    def _lay_out(self, who: list[Array], moments: list[Floats]) -> None:
        """Sort the devices of the current minute by the moments at which they wake."""
        together = np.concatenate(moments)
        order = np.argsort(together, kind="stable")
        self._who, self._moments = np.concatenate(who)[order], together[order]
        self._taken, self._held = 0, len(order)

    def next(self) -> float:
        """Return the time at which the next device wakes; infinity if none does."""
        while self._taken == self._held:
            if not self._minutes:
                return math.inf
            self._minute = heapq.heappop(self._minutes)
            minute = self._by_minute.pop(self._minute)
            many = [*minute.many, (np.array(minute.who, np.int64), np.array(minute.moments, np.float64))]
            self._lay_out([who for who, _ in many], [moments for _, moments in many])
        return float(self._moments[self._taken])

    def take(self, until: float) -> tuple[Array, Floats]:
        """Remove and return the devices that wake up to a moment, with their moments; at least one device."""
        stop = max(self._taken + 1, int(np.searchsorted(self._moments, until, "right")))
        taken = slice(self._taken, stop)
        self._taken = stop
        return self._who[taken], self._moments[taken]
