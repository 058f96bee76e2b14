"""How many requests are answered, of each device, each neighbourhood and each population.

    limits = Limits()
    limits.enrolment(address, now)                   Refused("rate") with a window to come back in
    limits.check_in("phones", device, now)

They keep to their bounds whatever arrives. `now` is in seconds, of a clock that need not be right but must not go back.
"""

import math
import random as dice
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from sumus.http.room import neighbourhood
from sumus.wire.messages import Refused, Window

LONGEST_S = 3600.0
"""The longest that anybody is sent away for, in seconds, before the window is spread."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A limit of requests: `burst` at once, and `rate` a second in the long run."""

    per_s: float
    burst: int


class Bucket(NamedTuple):
    """A token bucket, in two times.

    Attributes:
        full: The time at which the bucket will have all its tokens again.
        served: The time at which all who asked could have been served, also those who were sent away.
    """

    full: float
    served: float


EMPTY = Bucket(-math.inf, -math.inf)
"""Of whom nobody has heard."""


def take(rate: Rate, bucket: Bucket, now: float) -> tuple[Bucket, Window | None]:
    """Take a token of a bucket, by the cell rate algorithm of ATM (ITU-T I.371): a bucket is one number, without a timer.

    Args:
        rate: The rate of the bucket.
        bucket: The bucket.
        now: The time.

    Returns:
        The bucket afterwards, and None; or a window, in seconds from now, in which all who were sent away can be served. The
        window begins when there is a token again, and is as long as a queue of those who asked would be.
    """
    each, depth = 1 / rate.per_s, rate.burst / rate.per_s
    served = min(max(bucket.served, now) + each, now + depth + LONGEST_S)
    full = max(bucket.full, now) + each
    if full - now <= depth * (1 + 1e-9):
        return Bucket(full, served), None
    wait = full - depth - now
    return Bucket(bucket.full, served), (wait, max(served - depth - now, wait) + wait)


class Buckets:
    """A bucket for each name, of one rate.

    Args:
        rate: The rate.
        most: The most names that are kept. The name that was not heard of for longest is forgotten first, and so may ask anew
            once so many others have asked.
    """

    def __init__(self, rate: Rate, most: int = 50_000) -> None:
        self.rate = rate
        self._most = most
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, name: str, now: float, times: int = 1) -> Window | None:
        """Take a token of a name's bucket, as the function `take` does. A name may have the rate so many `times`."""
        rate = Rate(self.rate.per_s * times, self.rate.burst * times)
        with self._lock:
            bucket, window = take(rate, self._buckets.get(name, EMPTY), now)
            self._buckets[name] = bucket
            self._buckets.move_to_end(name)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        return window


class Limits:
    """What one device, one edge, one neighbourhood of addresses and one population may ask for.

    Args:
        device: Requests of each, and as many by way of an edge. The devices of an edge together have as many times that as the
            edge may have devices.
        source: Enrolments from each /24 (IPv6: /48).
        population: Check-ins of each.
        edge: Requests of each, without the check-ins in them.
        random: From 0 to 1. It moves windows, so that devices that come back as early as they may do not come together.
        most: Names that are kept, of devices as of sources.
    """

    def __init__(
        self,
        device: Rate = Rate(2.0, 60),
        source: Rate = Rate(2.0, 200),
        population: Rate = Rate(2000.0, 10_000),
        edge: Rate = Rate(30.0, 300),
        random: Callable[[], float] = dice.random,
        most: int = 50_000,
    ) -> None:
        rates = (device, device, edge, source, population)
        self._devices, self._relays, self._edges, self._sources, self._populations = (
            Buckets(rate, most) for rate in rates
        )
        self._random = random

    def request(self, device: str, now: float) -> None:
        """Any request of a device, once it is known to be of it: else others could use up what it may ask."""
        self._check(self._devices.take(device, now), "this device")

    def edge_request(self, edge: str, now: float) -> None:
        """Any request of an edge, once it is known to be of it."""
        self._check(self._edges.take(edge, now), "this edge")

    def check_in(self, population: str, device: str, now: float) -> None:
        """Charge a check-in that a device sends itself. It is a request of the device too."""
        self.request(device, now)
        self._check(self._populations.take(population, now), "this population")

    def relayed(self, population: str, edge: str, speaks_for: int, device: str, now: float) -> None:
        """Charge a check-in by way of an edge that may have `speaks_for` devices.

        The edge is charged first: devices that it invents use up what its own devices may ask, and no more of what the population
        may. The device's own requests are not charged: an edge may send again what a device signed before it left.
        """
        self._check(self._relays.take(edge, now, max(1, speaks_for)), "this edge's devices")
        self._check(self._devices.take(f"{edge}/{device}", now), "this device by way of its edge")
        self._check(self._populations.take(population, now), "this population")

    def enrolment(self, address: str, now: float) -> None:
        """Charge an enrolment. The address is the peer's, not a proxy's."""
        self._check(self._sources.take(neighbourhood(address), now), "this network")

    def _check(self, window: Window | None, who: str) -> None:
        if window is not None:
            low, high = window
            later = self._random() * (high - low) / 2
            raise Refused("rate", f"too many requests of {who}", (round(low + later, 3), round(high + later, 3)))
