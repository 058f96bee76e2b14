"""How much is taken at once: requests by who asks, and bytes by what there is room for.

    limits = Limits()
    limits.enrolment(address, now)                   Refused("rate") with a window to come back in
    limits.check_in("phones", device, now)

    room = Room(256 * 2**20)
    body = room.take(length)                         before a byte is read; Refused("busy") where there is no room
    stream.readinto(body)                            when the last view of it is gone, the next body is written there

Both keep to their bounds whatever arrives. `now` is in seconds, of a clock that need not be right but must not go back.
"""

import ipaddress
import random as dice
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sumus.types import Array
from sumus.wire.messages import Refused, Window

LONGEST_S = 3600.0
"""The longest that anybody is sent away for, in seconds, before the window is spread."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many at once, and so many a second in the long run."""

    per_s: float
    burst: int


class Bucket(NamedTuple):
    """A token bucket, as the two times that say all of it. full: when it will have all its tokens again.  served: when it
    could have served all who asked, and those too who were sent away."""

    full: float
    served: float


EMPTY = Bucket(-np.inf, -np.inf)
"""Of whom nobody has heard."""


def take(rate: Rate, bucket: Bucket, now: float) -> tuple[Bucket, Window | None]:
    """A token of a bucket, and None; or a window, in seconds from now, in which all who were sent away can be served.

    The cell rate algorithm of ATM (ITU-T I.371): a bucket's tokens in one number, without a timer. The window begins when
    there is a token again, and is as long as a queue of those who asked would be.
    """
    each, depth = 1 / rate.per_s, rate.burst / rate.per_s
    served = min(max(bucket.served, now) + each, now + depth + LONGEST_S)
    full = max(bucket.full, now) + each
    if full - now <= depth * (1 + 1e-9):
        return Bucket(full, served), None
    wait = full - depth - now
    return Bucket(bucket.full, served), (wait, max(served - depth - now, wait) + wait)


class Buckets:
    """A bucket a name, of one rate. most: names that are kept; who was not heard of for longest is forgotten first, and so may
    ask anew, once that many others have asked."""

    def __init__(self, rate: Rate, most: int = 50_000) -> None:
        self.rate = rate
        self._most = most
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, name: str, now: float) -> Window | None:
        """As the function."""
        with self._lock:
            bucket, window = take(self.rate, self._buckets.get(name, EMPTY), now)
            self._buckets[name] = bucket
            self._buckets.move_to_end(name)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        return window


class Limits:
    """What one device, one edge, one neighbourhood of addresses and one population may ask for.

    device: requests of each, also by way of an edge.  source: enrolments from each /24 (IPv6: /48).  population: check-ins of
    each.  edge: requests of each, whomever they are for.  random: from 0 to 1; it moves windows, so that those who come back as
    early as they may do not come together.  most: names kept, of devices as of sources.
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
        rates = (device, edge, source, population)
        self._devices, self._edges, self._sources, self._populations = (Buckets(rate, most) for rate in rates)
        self._random = random

    def request(self, device: str, now: float) -> None:
        """Any request of a device, once it is known to be of it: else others could use up what it may ask."""
        self._check(self._devices.take(device, now), "this device")

    def edge_request(self, edge: str, now: float) -> None:
        """Any request of an edge, once it is known to be of it."""
        self._check(self._edges.take(edge, now), "this edge")

    def check_in(self, population: str, device: str, now: float) -> None:
        """A check-in, directly or by way of an edge: also a request of the device."""
        self.request(device, now)
        self._check(self._populations.take(population, now), "this population")

    def enrolment(self, address: str, now: float) -> None:
        """An enrolment. address: of the peer, not of a proxy."""
        self._check(self._sources.take(neighbourhood(address), now), "this network")

    def _check(self, window: Window | None, who: str) -> None:
        if window is not None:
            low, high = window
            later = self._random() * (high - low) / 2
            raise Refused("rate", f"too many requests of {who}", (round(low + later, 3), round(high + later, 3)))


def neighbourhood(address: str) -> str:
    """The /24 of an IPv4 address, the /48 of an IPv6 one: who has one address there may have many. What is no address is all
    one."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "elsewhere"
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 48), strict=False))


class Room:
    """Memory for bodies, in buffers that are used again and again. bytes: that may be out or idle together. Any thread may call.

    retry_after_s: the window that is named where there is no room.
    """

    def __init__(self, bytes: int, retry_after_s: Window = (1.0, 10.0)) -> None:
        self.bytes = bytes
        self._retry = retry_after_s
        self._lock = threading.Lock()
        self._idle: dict[int, list[Array]] = {}
        self._held = 0
        self._lent = 0
        self._returned: deque[Array] = deque()

    @property
    def lent(self) -> int:
        """Bytes that are out."""
        with self._lock:
            self._take_back()
            return self._lent

    def take(self, size: int) -> memoryview:
        """`size` writable bytes, which hold whatever was there before. They are out until the last view of them is gone, be it
        a slice or an array. Refused: busy, or too_large where they would never fit."""
        whole = _rounded(size)
        if whole > self.bytes:
            raise Refused("too_large", f"{size} bytes: this server takes bodies of up to {self.bytes} at once")
        with self._lock:
            self._take_back()
            if self._lent + whole > self.bytes:
                raise Refused("busy", "no room for the body now", self._retry)
            body = self._buffer(whole)
            self._lent += whole
        return np.asarray(_Loan(body, size, self._returned)).data

    def _buffer(self, whole: int) -> Array:
        if self._idle.get(whole):
            return self._idle[whole].pop()
        while self._held + whole > self.bytes:  # idle ones of other lengths make room
            length = next(length for length, bodies in self._idle.items() if bodies)
            self._idle[length].pop()
            self._held -= length
        body = np.empty(whole, np.uint8)
        self._held += whole
        return body

    def _take_back(self) -> None:
        while self._returned:
            body = self._returned.popleft()
            self._idle.setdefault(body.nbytes, []).append(body)
            self._lent -= body.nbytes


class _Loan:
    """What every view of a lent buffer holds on to. It goes when they are gone, in whatever thread, so it takes no lock."""

    def __init__(self, body: Array, size: int, returned: deque[Array]) -> None:
        self.__array_interface__: dict[str, Any] = body[:size].__array_interface__
        self._body = body
        self._returned = returned

    def __del__(self) -> None:
        self._returned.append(self._body)


def _rounded(size: int) -> int:
    """Up to the next of a few lengths, at most an eighth more, so that bodies of about one length share buffers."""
    step = max(2**12, 1 << max(size.bit_length() - 4, 0))
    return max(-(-size // step), 1) * step
