"""Who wakes when, for very many: devices by minute, as arrays, sorted as their minute comes."""

import heapq
import math

import numpy as np

from sumus.types import Array, Floats

_MINUTE = 60.0


class Calendar:
    """Devices and the moments at which they wake."""

    def __init__(self) -> None:
        self._minutes: list[int] = []
        self._by_minute: dict[int, list[tuple[Array, Floats]]] = {}
        self._who: Array = np.zeros(0, np.int64)
        self._moments: Floats = np.zeros(0)
        self._taken = self._held = 0
        self._minute = -1

    def put(self, who: Array, moments: Floats) -> None:
        """Wake these then."""
        if not len(who):
            return
        minutes = np.maximum(moments // _MINUTE, self._minute).astype(np.int64)
        order = np.argsort(minutes, kind="stable")
        edges = np.flatnonzero(np.diff(minutes[order])) + 1
        for some in np.split(order, edges):
            self._add(int(minutes[some[0]]), who[some], moments[some])

    def _add(self, minute: int, who: Array, moments: Floats) -> None:
        if minute <= self._minute:  # the minute that is being lived through
            self._who = np.concatenate([self._who[self._taken :], who])
            self._moments = np.concatenate([self._moments[self._taken :], moments])
            order = np.argsort(self._moments, kind="stable")
            self._lay_out(self._who[order], self._moments[order])
            return
        if minute not in self._by_minute:
            self._by_minute[minute] = []
            heapq.heappush(self._minutes, minute)
        self._by_minute[minute].append((who, moments))

    def _lay_out(self, who: Array, moments: Floats) -> None:
        self._who, self._moments, self._taken, self._held = who, moments, 0, len(who)

    def next(self) -> float:
        """When the next one wakes, infinity for never."""
        while self._taken == self._held:
            if not self._minutes:
                return math.inf
            self._minute = heapq.heappop(self._minutes)
            parts = self._by_minute.pop(self._minute)
            who, moments = np.concatenate([who for who, _ in parts]), np.concatenate([times for _, times in parts])
            order = np.argsort(moments, kind="stable")
            self._lay_out(who[order], moments[order])
        return float(self._moments[self._taken])

    def take(self, until: float) -> tuple[Array, Floats]:
        """Those who wake next, up to a moment; one at least."""
        stop = max(self._taken + 1, int(np.searchsorted(self._moments, until, "right")))
        taken = slice(self._taken, stop)
        self._taken = stop
        return self._who[taken], self._moments[taken]
