"""The devices of a population: how fast they are, when they are online, and what goes wrong.

    Fleet(seconds=60, spread=10)                         speeds spread 1:10, a round's work takes about a minute
    Fleet(seconds=60, spread=10, hours=8, waits=False)   phones: online some hours a day; the server says when to check in
    Fleet(seconds=60, network=FleetNetwork(flaky=0.2))   one message in five is lost, and sent again

A fleet is a few numbers; `devices(count, rng)` draws the devices from them. `sumus.simulator` reads measured devices from a file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from sumus.errors import ExperimentError, expect
from sumus.types import Array, Floats, hold_plain_numbers

MINUTE, DAY = 60.0, 86400.0
EVENING, SIGMA = 22.5 * 3600, 2 * 3600
"""The mean and the standard deviation of the time at which people put their phones on a charger, in seconds of the day."""
_SHARE = "it is a share, a number from 0 to 1"
_FINITE = "it must be 0 or more, and finite"


def _expect(value: object, name: str, low: float, high: float, rule: str) -> None:
    """Refuse a field of a value that is not a finite number within bounds."""
    number = getattr(value, name)
    known = isinstance(number, int | float) and not isinstance(number, bool)
    if not known or not math.isfinite(number) or not low <= number <= high:
        raise ExperimentError(f"{type(value).__name__}({name}={number!r}): {rule}")


@dataclass(frozen=True)
class Fate:
    """The outcome of one client's work in one round.

    Attributes:
        most_steps: The local steps that the client has time for; None for all of them.
        late: Whether the client is still at work when the round closes.
        lost: Whether the client disappears before its report arrives.
    """

    most_steps: int | None = None
    late: bool = False
    lost: bool = False


@dataclass(frozen=True)
class DeviceArrays:
    """Devices as arrays of one length, `(n,)` float64.

    Attributes:
        seconds: The time that a round's work takes, in seconds.
        down: Bytes per second that the device receives.
        up: Bytes per second that the device sends.
        clock: The speed of the device's clock; 1 for an exact clock.
        begins: The start times of the k daily intervals in which the device is online, in seconds of the day, `(n, k)`;
            `(n, 0)` if the device is always online.
        lasts: The lengths of these intervals, in seconds.
    """

    seconds: Floats
    down: Floats
    up: Floats
    clock: Floats
    begins: Floats
    lasts: Floats

    def __len__(self) -> int:
        return len(self.seconds)

    def online_until(self, who: Array, now: Array | float) -> Floats:
        """Return when these devices go offline: infinity if they never do, and `now` if they are offline already.

        Args:
            who: The positions of the devices.
            now: The current time in seconds, for all or for each.

        Returns:
            Times in seconds, in the shape of `who`.
        """
        if not self.begins.shape[1]:
            return np.full(np.shape(who), math.inf)
        begins, lasts = self.begins[who], self.lasts[who]
        until = np.broadcast_to(np.asarray(now, np.float64), np.shape(who)).copy()
        for _ in range(begins.shape[-1]):  # intervals that overlap count as one
            since = (np.where(np.isfinite(until), until, 0.0)[..., None] - begins) % DAY
            until += np.maximum(np.where(lasts >= DAY, math.inf, lasts - since).max(-1), 0.0)
        return until

    def one_online_until(self, who: int, now: float) -> float:
        """Return `online_until` for one device, without arrays."""
        if not self.begins.shape[1]:
            return math.inf
        intervals = list(zip(self.begins[who].tolist(), self.lasts[who].tolist(), strict=True))
        until = now
        for _ in intervals:
            if any(length >= DAY for _, length in intervals):
                return math.inf
            until += max(0.0, max(length - (until - begin) % DAY for begin, length in intervals))
        return until

    def online_from(self, who: Array, now: Array) -> Floats:
        """Return the first time from `now` on at which these devices are online. See `online_until`."""
        if not self.begins.shape[1]:
            return np.asarray(now, np.float64)
        since = (now[..., None] - self.begins[who]) % DAY
        wait = np.where(since < self.lasts[who], 0.0, np.where(self.lasts[who] > 0, DAY - since, math.inf))
        return now + wait.min(-1)

    def one_online_from(self, who: int, now: float) -> float:
        """Return `online_from` for one device, without arrays."""
        if not self.begins.shape[1]:
            return now
        wait = math.inf
        for begin, length in zip(self.begins[who].tolist(), self.lasts[who].tolist(), strict=True):
            since = (now - begin) % DAY
            wait = min(wait, 0.0 if since < length else DAY - since if length > 0 else math.inf)
        return now + wait


@dataclass(frozen=True)
class FleetNetwork:
    """The network between a fleet's devices and the server. By default a message takes no time, and always arrives.

    Attributes:
        down: Bytes per second that the median device receives. These rates vary as much as the devices' speeds, but
            independently. None if transfers take no time.
        up: Bytes per second that the median device sends; otherwise like `down`.
        latency: Seconds that a message takes.
        flaky: The share of messages that are lost on their way and sent again.
        doubled: The share of messages that arrive twice.
    """

    down: float | None = None
    up: float | None = None
    latency: float = 0.0
    flaky: float = 0.0
    doubled: float = 0.0

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        for name in ("flaky", "doubled"):
            _expect(self, name, 0, 1, _SHARE)
        _expect(self, "latency", 0, math.inf, _FINITE)
        if self.flaky == 1:
            raise ExperimentError(
                "FleetNetwork(flaky=1): no message would ever arrive; for devices that are gone, give Fleet(lost=1)"
            )
        for name in ("down", "up"):
            if getattr(self, name) is not None:
                _expect(self, name, 1e-9, math.inf, "it must be positive")


@dataclass(frozen=True)
class FleetTiming:
    """The variation of a fleet's durations, and the error of its clocks.

    Attributes:
        jitter: Relative noise of each duration, lognormal.
        by: "client" if a client's work does not depend on its number of examples; "examples" if it takes longer the more
            examples the client holds, with `Fleet.seconds` for a client with the mean number.
        skew: The relative error of the speed of devices' clocks.
    """

    jitter: float = 0.0
    by: Literal["client", "examples"] = "client"
    skew: float = 0.0

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        _expect(self, "jitter", 0, math.inf, _FINITE)
        _expect(
            self,
            "skew",
            0,
            0.5,
            "give from 0 to 0.5: with 0.5, clocks run from half to one and a half times the true speed",
        )
        if self.by not in ("client", "examples"):
            raise ExperimentError(f"FleetTiming(by={self.by!r}): give 'client' or 'examples'")


@dataclass(frozen=True)
class Fleet:
    """Devices drawn from a few numbers, by the experiment's seed. By default, everything is instant, and every report arrives.

    Attributes:
        lost: The share of work that is begun and never reported, since the device disappears.
        stragglers: The share of work that is cut short: the client has time for only some of its steps, a uniform
            number from one to all. Such work takes as long as all steps would.
        partial_work: Whether a straggler's partial report is counted (FedProx), or comes too late and is not counted (as in
            FedAvg's paper). [Li et al. 2020, arXiv:1812.06127, section 5.2]
        seconds: The training time of the median device in a round, in seconds.
        spread: The slowest device's seconds divided by the fastest's; seconds are log-uniform.
        hours: The number of hours a day that a device is online, that is on its charger, unmetered and idle: three quarters of
            them at night, beginning in the evening. None for always.
        waits: True if an idle device holds a request open, so that the server can give it work at any time; False if it checks
            in by itself, within the window that the server gave it.
        network: The time that messages take, and the share that is lost.
        timing: The variation of durations, and the error of clocks.
        trace: A CSV file of measured devices, in place of those drawn from these numbers
            (`sumus.simulator.virtual_time.traces`).
    """

    lost: float = 0.0
    stragglers: float = 0.0
    partial_work: bool = True
    seconds: float = 0.0
    spread: float = 1.0
    hours: float | None = None
    waits: bool = True
    network: FleetNetwork = FleetNetwork()
    timing: FleetTiming = FleetTiming()
    trace: str | None = None

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        expect(self.network, FleetNetwork, "Fleet(network=)")
        expect(self.timing, FleetTiming, "Fleet(timing=)")
        for name in ("lost", "stragglers"):
            _expect(self, name, 0, 1, _SHARE)
        _expect(self, "seconds", 0, math.inf, _FINITE)
        for name in ("partial_work", "waits"):
            if not isinstance(getattr(self, name), bool):
                raise ExperimentError(f"Fleet({name}={getattr(self, name)!r}): give True or False")
        if self.trace is not None:
            expect(self.trace, str, "Fleet(trace=)")
            given, defaults = self.figures, Fleet().figures
            drawn = ("seconds", "spread", "down", "up", "hours", "skew")
            if unused := [name for name in drawn if given[name] != defaults[name]]:
                raise ExperimentError(f"Fleet(trace=): the file describes the devices; leave out {', '.join(unused)}")
        _expect(self, "spread", 1, math.inf, "it is the slowest time divided by the fastest, so 1 or more")
        if self.hours is not None:
            _expect(self, "hours", 1e-9, 24, "it must be above 0 and at most 24")

    @staticmethod
    def of(figures: Mapping[str, Any]) -> "Fleet":
        """Create a fleet from a flat mapping.

        Args:
            figures: The values of fields of `Fleet`, `FleetNetwork` and `FleetTiming`, by field name.
        """
        parts: list[dict[str, Any]] = [
            {field.name: figures[field.name] for field in fields(part) if field.name in figures}
            for part in (Fleet, FleetNetwork, FleetTiming)
        ]
        return Fleet(**parts[0], network=FleetNetwork(**parts[1]), timing=FleetTiming(**parts[2]))

    @property
    def figures(self) -> dict[str, Any]:
        """The values of all fields of the fleet, its network and its timing, by field name. `Fleet.of` takes this mapping."""
        own = {name: value for name, value in vars(self).items() if name not in ("network", "timing")}
        return own | vars(self.network) | vars(self.timing)

    @property
    def timed(self) -> bool:
        """Whether anything takes time, or a device is ever offline."""
        net = self.network
        return bool(self.seconds or net.latency or net.down or net.up or self.hours or self.trace) or not self.waits

    def devices(self, count: int, rng: np.random.Generator) -> DeviceArrays:
        """Draw the properties of `count` devices."""
        pace, down, up = (self.spread ** (rng.random(count) - 0.5) for _ in range(3))
        intervals = 0 if self.hours is None else 2
        begins, lasts = np.zeros((count, intervals)), np.zeros((count, intervals))
        if self.hours is not None:
            middle = self.hours * 3600
            length = middle + min(0.4 * middle, DAY - middle) * rng.uniform(-1.0, 1.0, count)
            lasts[:, 0], lasts[:, 1] = 0.75 * length, 0.25 * length
            begins[:, 0] = (EVENING + SIGMA * rng.standard_normal(count)) % DAY
            begins[:, 1] = (
                begins[:, 0] + lasts[:, 0] + rng.random(count) * (DAY - length)
            ) % DAY  # an interval outside the night
        return DeviceArrays(
            self.seconds * pace,
            (self.network.down or math.inf) / down,
            (self.network.up or math.inf) / up,
            1.0 + self.timing.skew * rng.uniform(-1.0, 1.0, count),
            begins,
            lasts,
        )

    def fate(self, steps: int, rng: np.random.Generator) -> Fate:
        """Draw the outcome of a client's work.

        Args:
            steps: The number of local steps if the client does all of its work.
            rng: The source of the draw.
        """
        arrives, slow, share = rng.random(3).tolist()
        most = 1 + int(share * steps) if slow < self.stragglers else None
        late = most is not None and most < steps and not self.partial_work
        return Fate(most, late, lost=arrives < self.lost)


PERFECT = Fleet()
"""A fleet in which every client does all its work, and every report arrives, at once."""
