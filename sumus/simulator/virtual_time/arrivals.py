"""The arrivals of devices that ask the server for work: devices that wait for it, or devices that come by themselves.

A *place* is room for one more device in a round. A *window* is the time span within which the server wants a device back.
"""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from sumus.fleet import MINUTE
from sumus.rng import generator
from sumus.simulator.populations.participation import Passes, present_at
from sumus.simulator.virtual_time.account import Totals
from sumus.simulator.virtual_time.clock import VirtualClock
from sumus.simulator.virtual_time.devices import VirtualDevices
from sumus.simulator.virtual_time.fleet_model import FleetModel
from sumus.simulator.virtual_time.roster import Roster
from sumus.simulator.virtual_time.server import VirtualServer
from sumus.simulator.virtual_time.sleepers import Sleepers
from sumus.types import Array

_MANY = 10_000
"""In a fleet of more devices than this, a random part is searched for permitted devices before all are."""


class Arrivals(Protocol):
    """Lets devices ask for work."""

    def next(self) -> float:
        """Return the time at which the next device comes by itself; infinity if none does."""
        ...

    def come(self, until: float) -> None:
        """Let devices come by themselves, up to a moment, and advance the clock with them."""
        ...

    def fill(self) -> None:
        """Give the free places to devices that wait for work. The timeline calls this after all events of a moment."""
        ...


class CohortDraw:
    """Draws devices for the free places: uniformly from those that may come, or in passes (`Population.in_passes`).

    Args:
        seed: The experiment's seed. The first draw of a round depends only on this seed and the round.
        rng: The generator of all further draws.
        joined: The first round of each device, from 1, int64 `(n,)`; None if all take part from the start.
        count: The number of devices.
        in_passes: Whether every device is drawn once before any device is drawn again.
    """

    def __init__(self, seed: int, rng: np.random.Generator, joined: Array | None, count: int, in_passes: bool) -> None:
        self._seed, self._rng, self._joined, self._count = seed, rng, joined, count
        self._passes = Passes(seed) if in_passes else None
        self._drawn = -1

    def draw(self, wanted: int, number: int, may_come: Callable[[Array], Array]) -> list[int]:
        """Draw devices for a round, and return their positions.

        Args:
            wanted: The largest number to draw.
            number: The round.
            may_come: Function from positions to booleans: whether each device may be given work now.
        """
        if self._passes is not None:
            return self._passes.draw(wanted, present_at(self._joined, number, self._count), may_come)
        rng, count = self._rng, self._count
        if self._drawn < number:
            self._drawn, rng = number, generator(self._seed, "round", number, "cohort")
        drawn = rng.choice(count, size=min(wanted, count), replace=False)
        some = drawn[may_come(drawn)]
        if len(some) < wanted and count > _MANY:  # try a larger random part before searching all devices
            drawn = np.unique(np.concatenate([some, rng.choice(count, size=min(64 * wanted, count), replace=False)]))
            some = rng.permutation(drawn[may_come(drawn)])[:wanted]
        if len(some) < wanted:
            others = np.setdiff1d(np.flatnonzero(may_come(np.arange(count))), some)
            more = rng.choice(others, size=min(wanted - len(some), len(others)), replace=False)
            some = np.concatenate([some, more])
        return some.tolist()


class WaitingArrivals:
    """Devices that wait for work: for each free place, one of the devices that may come is drawn."""

    def __init__(
        self,
        clock: VirtualClock,
        server: VirtualServer,
        devices: VirtualDevices,
        roster: Roster,
        draw: CohortDraw,
        count: int,
    ) -> None:
        self._clock, self._server, self._devices = clock, server, devices
        self._roster, self._draw, self._count = roster, draw, count
        self._is_waiting = False

    def next(self) -> float:
        """Return infinity: no device comes by itself."""
        return math.inf

    def come(self, until: float) -> None:
        """Do nothing: no device comes by itself."""

    def fill(self) -> None:
        """Give work to one device for each free place, as far as devices may come."""
        if (wanted := self._server.room()) <= 0 or self._is_waiting:
            return
        now = self._clock.now
        if (begins := self._server.begins) > now:
            self._look_again_at(begins)
            return
        if self._server.is_down():  # no device can be given work: all waiting requests were cut off
            self._look_again_at(self._server.back_at())
            return
        some = self._draw.draw(wanted, self._server.current.number, lambda who: self._may_come(who, online=True))
        for who in some:
            self._devices.check_in(who)
        if not some and self._may_come(np.arange(self._count), online=False).any():
            self._look_again_at(now + MINUTE)  # every device that may come is offline or rests

    def _may_come(self, who: Array, online: bool) -> Array:
        now = self._clock.now if online else None
        return self._roster.may_come(who, self._server.current.number, self._server.models, now)

    def _look_again_at(self, moment: float) -> None:
        self._is_waiting = True
        self._clock.at(moment, self._look_again)

    def _look_again(self) -> None:
        self._is_waiting = False


class SleepingArrivals:
    """Devices that come by themselves, each within the window that the server gave it."""

    def __init__(
        self,
        clock: VirtualClock,
        server: VirtualServer,
        devices: VirtualDevices,
        sleepers: Sleepers,
        model: FleetModel,
        totals: Totals,
    ) -> None:
        self._clock, self._server, self._devices = clock, server, devices
        self._sleepers, self._model, self._totals = sleepers, model, totals

    def next(self) -> float:
        """Return the time at which the next device wakes."""
        return self._sleepers.next()

    def fill(self) -> None:
        """Do nothing: no device waits for work."""

    def come(self, until: float) -> None:
        """Let devices that have woken ask for work.

        While the server has no work, all devices receive the same response, which is computed once.
        """
        who, moments = self._sleepers.take(until)
        self._server.note_rate(self._totals.load.rate)
        position = 0
        while position < len(who):
            if self._clock.next() < moments[position]:  # an earlier check-in has scheduled an event
                self._sleepers.put_back(who[position:], moments[position:])
                return
            self._clock.go_to(float(moments[position]))
            unsettled = self._devices.unsettled
            if unsettled[who[position]] or (self._server.room(self._clock.now) > 0 and not self._server.is_down()):
                self._totals.load.checked_in(moments[position : position + 1])
                self._devices.check_in(int(who[position]))
                position += 1
                continue
            owing = np.flatnonzero(unsettled[who[position:]])
            stop = position + (int(owing[0]) if len(owing) else len(who) - position)
            self._totals.load.checked_in(moments[position:stop])
            self._turn_away(who[position:stop], moments[position:stop])
            position = stop

    def _turn_away(self, who: Array, moments: Array) -> None:
        """Let devices sleep: all within one new window, or, if the server is down, each within the window it has."""
        if not self._server.is_down():
            later = self._server.turn_away()
            self._sleepers.set_window(who, later.window)
            self._totals.work.reasons[later.reason] += len(who)
        self._sleepers.sleep(who, moments + self._model.waits(who, self._sleepers.windows(who)))
