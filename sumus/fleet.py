"""What a population's devices are like: how fast, when they are there, and what goes wrong.

    Fleet(seconds=60, spread=10)                         speeds spread 1:10, a round's work takes about a minute
    Fleet(seconds=60, spread=10, hours=8, waits=False)   phones: online some hours a day, asking when they were told to

A fleet is a few numbers; `devices(count, rng)` draws the devices from them. `sumus.simulator` reads measured ones from a file.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from sumus.errors import ExperimentError, expect
from sumus.spec import record
from sumus.types import Array, Floats, hold_plain_numbers

MINUTE, DAY = 60.0, 86400.0
EVENING, SIGMA = 22.5 * 3600, 2 * 3600
"""When people put phones on their chargers: a normal distribution over the evening."""


@dataclass(frozen=True)
class Fate:
    """What becomes of one client's work in one round.

    most_steps: the local steps it has time for, None for all of them.  late: it is not done when the round closes.
    lost: it is gone before its report arrives.
    """

    most_steps: int | None = None
    late: bool = False
    lost: bool = False


@dataclass(frozen=True)
class DeviceArrays:
    """Devices as arrays of one length, `(n,)` float64.

    seconds: for a round's work.  down, up: bytes a second.  clock: how fast its clock runs.
    begins, lasts: `(n, k)`, the intervals of each day in which it is online, in seconds; `(n, 0)` for always.
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
        """When these devices go offline, infinity for never; `now` for those that are offline. Shape of `who`."""
        if not self.begins.shape[1]:
            return np.full(np.shape(who), math.inf)
        begins, lasts = self.begins[who], self.lasts[who]
        until = np.broadcast_to(np.asarray(now, np.float64), np.shape(who)).copy()
        for _ in range(begins.shape[-1]):  # where one interval ends in another, they are one
            since = (np.where(np.isfinite(until), until, 0.0)[..., None] - begins) % DAY
            until += np.maximum(np.where(lasts >= DAY, math.inf, lasts - since).max(-1), 0.0)
        return until

    def one_online_until(self, who: int, now: float) -> float:
        """`online_until` of one device, without arrays."""
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
        """The first moment from `now` on at which these devices are online. Shape of `who`."""
        if not self.begins.shape[1]:
            return np.asarray(now, np.float64)
        since = (now[..., None] - self.begins[who]) % DAY
        wait = np.where(since < self.lasts[who], 0.0, np.where(self.lasts[who] > 0, DAY - since, math.inf))
        return now + wait.min(-1)

    def one_online_from(self, who: int, now: float) -> float:
        """`online_from` of one device, without arrays."""
        if not self.begins.shape[1]:
            return now
        wait = math.inf
        for begin, length in zip(self.begins[who].tolist(), self.lasts[who].tolist(), strict=True):
            since = (now - begin) % DAY
            wait = min(wait, 0.0 if since < length else DAY - since if length > 0 else math.inf)
        return now + wait


@record("fleet")
@dataclass(frozen=True)
class Fleet:
    """Devices drawn from a few numbers, by the experiment's seed. All by default perfect: everything takes no time, and arrives.

    seconds: that the middle device trains in a round.  spread: the slowest device's seconds over the fastest's; log-uniform.
    jitter: relative noise of each duration, lognormal.  by: whether each client's work takes as long, or as its examples are
        many (the mean client's is the middle).
    down, up: bytes a second of the middle device; they spread like speeds, apart from them. None: no time.
    latency: seconds of a message.
    hours: a day that a device is online, which is to say on its charger, unmetered and idle: three quarters of them at night,
        begun in the evening; None for always.
    waits: whether an idle device is woken when there is work for it (it holds a request open), or comes by itself, within the
        window that it was given.
    lost: the share of work that is begun and never reported: the device is gone.
    flaky, doubled: the shares of messages that are lost on their way and sent again, and that arrive twice.
    skew: how fast devices' clocks run, as a relative deviation.
    stragglers: the share of work for which there is time for only a part of its steps, uniform from one to all: it takes as
        long as all of them would.
    partial_work: whether a straggler's partial report is counted (FedProx), or comes too late and is not (what FedAvg's
        paper does). [Li et al. 2020, arXiv:1812.06127, section 5.2]
    trace: a CSV file of measured devices, in place of those drawn from these numbers (`sumus.simulator.virtual_time.traces`).
    """

    lost: float = 0.0
    stragglers: float = 0.0
    partial_work: bool = True
    seconds: float = 0.0
    spread: float = 1.0
    jitter: float = 0.0
    by: Literal["client", "examples"] = "client"
    down: float | None = None
    up: float | None = None
    latency: float = 0.0
    hours: float | None = None
    waits: bool = True
    flaky: float = 0.0
    doubled: float = 0.0
    skew: float = 0.0
    trace: str | None = None

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        for name in ("lost", "stragglers", "flaky", "doubled"):
            _expect(self, name, 0, 1, "it is a share, a number from 0 to 1")
        for name in ("seconds", "latency", "jitter"):
            _expect(self, name, 0, math.inf, "it must be 0 or more, and finite")
        _expect(
            self, "skew", 0, 0.5, "it is a share, of at most 0.5: a clock that runs half as fast, or half as fast again"
        )
        for name in ("partial_work", "waits"):
            if not isinstance(getattr(self, name), bool):
                raise ExperimentError(f"Fleet({name}={getattr(self, name)!r}): give True or False")
        if self.trace is not None:
            expect(self.trace, str, "Fleet(trace=)")
            defaults = {each.name: each.default for each in fields(self)}
            drawn = ("seconds", "spread", "down", "up", "hours", "skew")
            if unused := [name for name in drawn if getattr(self, name) != defaults[name]]:
                raise ExperimentError(
                    f"Fleet(trace=): the file says what devices are like; leave out {', '.join(unused)}"
                )
        _expect(self, "spread", 1, math.inf, "it is the slowest over the fastest, 1 or more")
        if self.flaky == 1:
            raise ExperimentError(
                "Fleet(flaky=1): no message would ever arrive; for devices that are gone, give lost=1"
            )
        if self.by not in ("client", "examples"):
            raise ExperimentError(f"Fleet(by={self.by!r}): give 'client' or 'examples'")
        for name in ("down", "up", "hours"):
            if getattr(self, name) is not None:
                _expect(
                    self, name, 1e-9, 24 if name == "hours" else math.inf, "it must be positive, and hours at most 24"
                )

    @property
    def timed(self) -> bool:
        """Whether anything takes time, or somebody is ever away."""
        return bool(self.seconds or self.latency or self.down or self.up or self.hours or self.trace) or not self.waits

    def devices(self, count: int, rng: np.random.Generator) -> DeviceArrays:
        """So many devices."""
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
            ) % DAY  # when it is not night
        return DeviceArrays(
            self.seconds * pace,
            (self.down or math.inf) / down,
            (self.up or math.inf) / up,
            1.0 + self.skew * rng.uniform(-1.0, 1.0, count),
            begins,
            lasts,
        )

    def fate(self, steps: int, rng: np.random.Generator) -> Fate:
        """What becomes of a client whose whole work is so many steps."""
        arrives, slow, share = rng.random(3).tolist()
        most = 1 + int(share * steps) if slow < self.stragglers else None
        late = most is not None and most < steps and not self.partial_work
        return Fate(most, late, lost=arrives < self.lost)


def _expect(fleet: Fleet, name: str, low: float, high: float, rule: str) -> None:
    value = getattr(fleet, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise ExperimentError(f"Fleet({name}={value!r}): {rule}")


PERFECT = Fleet()
"""Every client does all its work, and every report arrives, at once."""
