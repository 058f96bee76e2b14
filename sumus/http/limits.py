"""Rate limits for the requests of each device, each edge, each neighbourhood (network of addresses) and each population.

    limits = Limits()
    limits.enrolment(address, now)                   raises Refused("rate") with a retry window
    limits.check_in("phones", device, now)

Memory stays bounded, whatever arrives. `now` is in seconds of a monotonic clock, which need not show the right time of day.
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
"""The longest time after which a refused sender may retry, in seconds, before random time is added."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A limit on requests: `burst` requests at once, and `per_s` requests per second in the long run."""

    per_s: float
    burst: int


class Bucket(NamedTuple):
    """A token bucket, stored as two times.

    Attributes:
        full: The time at which the bucket will have all its tokens again.
        served: The time at which all requests so far could have been served, including the refused ones.
    """

    full: float
    served: float


EMPTY = Bucket(-math.inf, -math.inf)
"""The bucket of a name without earlier requests."""


def take(rate: Rate, bucket: Bucket, now: float) -> tuple[Bucket, Window | None]:
    """Take a token from a bucket, by the generic cell rate algorithm of ATM (ITU-T I.371): it needs no timer.

    Args:
        rate: The rate of the bucket.
        bucket: The bucket.
        now: The time.

    Returns:
        The new bucket, and None if a token was taken. If no token was available: the bucket, and the retry window, in seconds
        from now, in which all refused requests can be served. The window begins when a token is available again, and is as long
        as these requests need.
    """
    each, depth = 1 / rate.per_s, rate.burst / rate.per_s
    served = min(max(bucket.served, now) + each, now + depth + LONGEST_S)
    full = max(bucket.full, now) + each
    if full - now <= depth * (1 + 1e-9):
        return Bucket(full, served), None
    wait = full - depth - now
    return Bucket(bucket.full, served), (wait, max(served - depth - now, wait) + wait)


class Buckets:
    """Token buckets of the same rate, one for each name.

    Args:
        rate: The rate.
        most: The largest number of names that are kept. The name whose last request is oldest is forgotten first; its bucket is
            then full again.
    """

    def __init__(self, rate: Rate, most: int = 50_000) -> None:
        self.rate = rate
        self._most = most
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, name: str, now: float, times: int = 1) -> Window | None:
        """Take a token from a name's bucket, as the function `take` does. `times` is the multiple of the rate that applies to
        this name.
        """
        rate = Rate(self.rate.per_s * times, self.rate.burst * times)
        with self._lock:
            bucket, window = take(rate, self._buckets.get(name, EMPTY), now)
            self._buckets[name] = bucket
            self._buckets.move_to_end(name)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        return window


class Limits:
    """The rate limits of one server.

    Args:
        device: The rate of requests of each device; requests through an edge are counted separately, at the same rate. All
            devices of an edge together have this rate times the number of devices that the edge may have.
        source: The rate of enrolments from each /24 network (IPv6: /48).
        population: The rate of check-ins of each population.
        edge: The rate of requests of each edge; the relayed check-ins in a request are not counted here.
        random: Returns a random number from 0 to 1, which shifts a retry window, so that devices that retry as early as
            possible do not all retry at the same moment.
        most: The largest number of names that are kept for each limit.
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
        """Charge a request to a device. Call this after the device is authenticated: otherwise other senders could use up its
        limit.
        """
        self._check(self._devices.take(device, now), "this device")

    def edge_request(self, edge: str, now: float) -> None:
        """Charge a request to an edge. Call this after the edge is authenticated."""
        self._check(self._edges.take(edge, now), "this edge")

    def check_in(self, population: str, device: str, now: float) -> None:
        """Charge a check-in that a device sends itself. It counts as a request of the device too."""
        self.request(device, now)
        self._check(self._populations.take(population, now), "this population")

    def relayed(self, population: str, edge: str, speaks_for: int, device: str, now: float) -> None:
        """Charge a check-in that came through an edge, which may have `speaks_for` devices.

        The edge is charged first, so an edge that invents devices cannot use up more of the population's limit than its own
        limit allows. The device's limit for direct requests is not charged, since an edge may repeat a check-in that a device
        signed before it left the edge.
        """
        self._check(self._relays.take(edge, now, max(1, speaks_for)), "this edge's devices")
        self._check(self._devices.take(f"{edge}/{device}", now), "this device through its edge")
        self._check(self._populations.take(population, now), "this population")

    def enrolment(self, address: str, now: float) -> None:
        """Charge an enrolment. The address is that of the client, not of a proxy."""
        self._check(self._sources.take(neighbourhood(address), now), "this network")

    def _check(self, window: Window | None, who: str) -> None:
        if window is not None:
            low, high = window
            later = self._random() * (high - low) / 2
            raise Refused("rate", f"too many requests from {who}", (round(low + later, 3), round(high + later, 3)))
