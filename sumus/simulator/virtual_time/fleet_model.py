"""A random model of a fleet's devices: how long work and messages take, which messages are lost, how long devices wait."""

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
    """The work that a round requires of each device, by the device's position.

    Attributes:
        steps: The number of steps of the device's training.
        share: The device's number of examples, divided by the mean over clients.
        down: Bytes that the device receives.
        up: Bytes of the device's report.
        times: The number of times that the device trains: 1, or the number of rounds that its edge runs per round of the
            server. `steps`, `down` and `up` are for all these trainings together.
    """

    steps: Callable[[int], int] = lambda position: 1
    share: Callable[[int], float] = lambda position: 1.0
    down: int = 0
    up: int = 0
    times: int = 1

    def seconds(self, devices: DeviceArrays) -> Floats:
        """Return the seconds that a round takes each device, transfers included. Shape `(n,)`."""
        total = devices.seconds * self.times
        for nbytes, rate in ((self.down, devices.down), (self.up, devices.up)):
            if nbytes and np.isfinite(rate).any():
                total = total + nbytes / rate
        return total


class FleetModel:
    """Draws the events of devices.

    Args:
        fleet: The properties of the devices.
        devices: The devices.
        work: The work that a round requires of them.
        seed: The experiment's seed.
        name: Function from a position to its client's id. The outcome of a client's work is drawn from a key made of this id.
            None if no client trains; the outcome is then drawn from `rng`.
        rng: The generator of all other draws.
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
        """The seconds from sending a message until it arrives."""
        return self._fleet.network.latency

    def fate(self, who: int, number: int, again: int) -> Fate:
        """Draw the outcome of a device's work for a round. again: the number of times it had this round's work before."""
        if not (self._fleet.lost or self._fleet.stragglers):
            return Fate()
        rng = self._rng
        if self._name is not None:
            words = ("round", number, "client", self._name(who), "fleet", *([again] if again else []))
            rng = generator(self._seed, *words)
        return self._fleet.fate(self.work.steps(who), rng)

    def seconds(self, who: int) -> float:
        """Draw the seconds that a device takes from its check-in until its report is ready to send."""
        timing = self._fleet.timing
        seconds = float(self._devices.seconds[who]) * self.work.times
        if seconds and timing.by == "examples":
            seconds *= self.work.share(who)
        if seconds and timing.jitter:
            seconds *= math.exp(timing.jitter * self._rng.standard_normal())
        return seconds + (2 * self.latency + self.work.down / float(self._devices.down[who]))

    def upload_seconds(self, who: int) -> float:
        """Return the seconds that the upload of a device's report takes, without the latency."""
        return self.work.up / float(self._devices.up[who])

    def online_until(self, who: int, now: float) -> float:
        """Return the time at which a device that is online goes offline."""
        return self._devices.one_online_until(who, now)

    def loses_message(self) -> bool:
        """Draw whether a message is lost."""
        return self._fleet.network.flaky > 0 and self._rng.random() < self._fleet.network.flaky

    def copy_arrives(self, now: float, takes: float) -> float | None:
        """Draw the time at which a second copy of a report arrives; None if there is no second copy.

        Args:
            now: The time at which the report is sent, in simulated seconds.
            takes: The seconds that the report takes to arrive.
        """
        doubled = self._fleet.network.doubled
        if not doubled or self._rng.random() >= doubled:
            return None
        return now + takes * (1 + self._rng.random()) + self._rng.random()

    def wait(self, who: int, window: tuple[float, float]) -> float:
        """Draw the seconds that a device waits if the server wants it back within a window; the device's clock may be wrong."""
        return float(self._rng.uniform(*window)) / float(self._devices.clock[who])

    def waits(self, who: Array, windows: Array) -> Floats:
        """Draw the waits of many devices, as `wait` does. windows: `(n, 2)`."""
        return self._rng.uniform(windows[:, 0], windows[:, 1]) / self._devices.clock[who]
