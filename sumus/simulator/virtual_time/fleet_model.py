"""What a fleet's devices do with their work and their messages: how long it takes, what is lost, how long they wait."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sumus.fleet import DeviceArrays, Fate, Fleet
from sumus.rng import generator
from sumus.types import Array, Floats


@dataclass(frozen=True)
class RoundDemand:
    """What a round asks of each device, by its position.

    Attributes:
        steps: The steps of its training.
        share: Its examples over those of the mean client.
        down: Bytes of what it is sent.
        up: Bytes of its report.
        times: How often it trains, if its edge does rounds of its own; steps, down and up are of all of these rounds.
    """

    steps: Callable[[int], int] = lambda position: 1
    share: Callable[[int], float] = lambda position: 1.0
    down: int = 0
    up: int = 0
    times: int = 1

    def seconds(self, devices: DeviceArrays) -> Floats:
        """How long a round takes each device, transfers included. Shape `(n,)`."""
        total = devices.seconds * self.times
        for nbytes, rate in ((self.down, devices.down), (self.up, devices.up)):
            if nbytes and np.isfinite(rate).any():
                total = total + nbytes / rate
        return total


class FleetModel:
    """Draws what happens to devices.

    Args:
        fleet: What the devices are like.
        devices: The devices.
        work: What a round asks of them.
        seed: The experiment's seed.
        name: The client at a position: what becomes of its work is keyed by the client, whatever else happens. None if nobody
            trains, and then `rng` decides.
        rng: The generator of everything that no client's key decides.
    """

    def __init__(
        self,
        fleet: Fleet,
        devices: DeviceArrays,
        work: RoundDemand,
        seed: int,
        name: Callable[[int], Any] | None,
        rng: np.random.Generator,
    ) -> None:
        self.work = work
        self._fleet, self._devices, self._seed, self._name, self._rng = fleet, devices, seed, name, rng

    @property
    def latency(self) -> float:
        """Seconds of a message."""
        return self._fleet.network.latency

    def fate(self, who: int, number: int, again: int) -> Fate:
        """Draw what becomes of a device's work for a round, which it has had `again` times before."""
        if not (self._fleet.lost or self._fleet.stragglers):
            return Fate()
        rng = self._rng
        if self._name is not None:
            words = ("round", number, "client", self._name(who), "fleet", *([again] if again else []))
            rng = generator(self._seed, *words)
        return self._fleet.fate(self.work.steps(who), rng)

    def seconds(self, who: int) -> float:
        """Draw how long a device takes from its check-in until its report is ready to be sent."""
        timing = self._fleet.timing
        seconds = float(self._devices.seconds[who]) * self.work.times
        if seconds and timing.by == "examples":
            seconds *= self.work.share(who)
        if seconds and timing.jitter:
            seconds *= math.exp(timing.jitter * self._rng.standard_normal())
        return seconds + (2 * self.latency + self.work.down / float(self._devices.down[who]))

    def upload_seconds(self, who: int) -> float:
        """How long a device's report is on its way, without the latency."""
        return self.work.up / float(self._devices.up[who])

    def online_until(self, who: int, now: float) -> float:
        """When a device that is online goes offline."""
        return self._devices.one_online_until(who, now)

    def loses_message(self) -> bool:
        """Draw whether a message does not arrive."""
        return self._fleet.network.flaky > 0 and self._rng.random() < self._fleet.network.flaky

    def copy_arrives(self, now: float, takes: float) -> float | None:
        """Draw when a report that is sent now and takes so long arrives a second time; None if it does not."""
        doubled = self._fleet.network.doubled
        if not doubled or self._rng.random() >= doubled:
            return None
        return now + takes * (1 + self._rng.random()) + self._rng.random()

    def wait(self, who: int, window: tuple[float, float]) -> float:
        """Draw how long a device waits that is told to come back within a window of seconds, by its own clock."""
        return float(self._rng.uniform(*window)) / float(self._devices.clock[who])

    def waits(self, who: Array, windows: Array) -> Floats:
        """`wait` of many devices. windows: `(n, 2)`."""
        return self._rng.uniform(windows[:, 0], windows[:, 1]) / self._devices.clock[who]
