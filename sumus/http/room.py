"""Bounded memory for bodies, and bounded shares of anything: what is lent comes back, and no neighbourhood takes all of it.

    room = Room(256 * 2**20)
    body = room.take(length, near(address))          before a byte is read; Refused("busy") if there is no room
    stream.readinto(body)                            when the last view of the body is gone, its memory is lent again

    shares = Shares(10_000)
    shares.take(near(address), 1)                    False if that is not to be had now
    shares.give(near(address), 1)

Both keep to their bounds whatever arrives.
"""

import ctypes
import ipaddress
import mmap
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np

from sumus.text import amount
from sumus.types import Array
from sumus.wire.messages import Refused, Window

SHORT, PORTIONS = 3 / 4, 16
"""Beyond this part of the whole there is a shortage; then one neighbourhood has at most one of so many portions."""
IDLE_S = 2.0
"""Seconds that a buffer is kept for the next body."""


def neighbourhood(address: str, v6: int = 48) -> str:
    """Return the network that an address is in.

    Args:
        address: The address. Text that is no address is in one network, "elsewhere".
        v6: The bits of an IPv6 network; an IPv4 address is in its /24. Whoever has one address there may have many.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "elsewhere"
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else v6), strict=False))


def trim() -> None:
    """Give freed memory that the C library keeps back to the system (glibc alone can); a crowd of TLS connections leaves much."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@lru_cache(4096)
def near(address: str) -> str:
    """Return the neighbourhood that shares are counted by: a /24, or a /64, which is what one household has."""
    return neighbourhood(address, 64)


class Shares:
    """How much of a bounded whole each neighbourhood has.

    While at most `SHORT` of the whole is taken, anybody may take more. Beyond, a neighbourhood may take only as much as keeps
    it within one portion, or its first piece. So devices behind one address are bounded only in a shortage, and a shortage that
    one neighbourhood makes leaves the others their portions.

    Args:
        most: The whole.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self._by: dict[str, int] = {}

    def of(self, who: str) -> int:
        """Tell how much a neighbourhood has."""
        return self._by.get(who, 0)

    def may(self, who: str, amount: int) -> bool:
        """Return whether a neighbourhood may take so much now."""
        after, has = self.taken + amount, self.of(who)
        plenty = after <= SHORT * self.most or not amount
        return after <= self.most and (plenty or not has or has + amount <= self.most / PORTIONS)

    def take(self, who: str, amount: int) -> bool:
        """Take so much, if it may be; else False."""
        if not self.may(who, amount):
            return False
        self.add(who, amount)
        return True

    def add(self, who: str, amount: int) -> None:
        """Count so much, of which the caller has made sure."""
        self.taken += amount
        if amount:
            self._by[who] = self.of(who) + amount

    def give(self, who: str, amount: int) -> None:
        """Give so much back."""
        self.taken -= amount
        if left := self.of(who) - amount:
            self._by[who] = left
        else:
            self._by.pop(who, None)


class Room:
    """Memory for bodies, in buffers that are used again and again while bodies come. Any thread may call.

    Args:
        bytes: The most bytes that may be lent or idle together.
        retry_after_s: The window that a refusal names.
        clock: Gives seconds, which do not go back.
    """

    def __init__(
        self, bytes: int, retry_after_s: Window = (1.0, 10.0), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.shares = Shares(bytes)
        self._retry, self._clock = retry_after_s, clock
        self._lock = threading.Lock()
        self._idle: OrderedDict[int, list[tuple[Array, float]]] = OrderedDict()
        self._held = 0
        self._returned: deque[tuple[Array, str]] = deque()

    @property
    def bytes(self) -> int:
        """The bytes of the whole room."""
        return self.shares.most

    @property
    def lent(self) -> int:
        """Bytes that are out."""
        with self._lock:
            self._take_back()
            return self.shares.taken

    @property
    def held(self) -> int:
        """Bytes that are out or idle."""
        return self._held

    def take(self, size: int, who: str) -> memoryview:
        """`size` writable bytes, which hold whatever was there before. They are out until the last view of them is gone, be it
        a slice or an array.

        Args:
            who: The neighbourhood that has them meanwhile.

        Raises:
            Refused: busy; or too_large, if so many would never fit.
        """
        whole = _rounded(size)
        if whole > self.bytes:
            raise Refused(
                "too_large", f"{amount(size)}: this server takes bodies of up to {amount(self.bytes)} at once"
            )
        with self._lock:
            self._take_back()
            if not self.shares.take(who, whole):
                raise Refused("busy", "no room for the body now", self._retry)
            body = self._buffer(whole)
        return np.asarray(_Loan(body, size, who, self._returned)).data

    def tidy(self) -> bool:
        """Give the system back what has lain idle for `IDLE_S`; whether to call again then."""
        with self._lock:
            self._take_back()
            before = self._clock() - IDLE_S
            for length, bodies in list(self._idle.items()):
                fresh = [(body, since) for body, since in bodies if since > before]
                self._held -= length * (len(bodies) - len(fresh))
                self._idle[length] = fresh
                if not fresh:
                    del self._idle[length]
            return self._held > 0

    def _buffer(self, whole: int) -> Array:
        if self._idle.get(whole):
            return self._idle[whole].pop()[0]
        while self._held + whole > self.bytes:  # idle ones of other lengths make room
            length = next(length for length, bodies in self._idle.items() if bodies)
            self._idle[length].pop()
            self._held -= length
        # From the system and not from malloc, which would keep what is freed.
        body = np.frombuffer(mmap.mmap(-1, whole), np.uint8)
        self._held += whole
        return body

    def _take_back(self) -> None:
        while self._returned:
            body, who = self._returned.popleft()
            self._idle.setdefault(body.nbytes, []).append((body, self._clock()))
            self.shares.give(who, body.nbytes)


class _Loan:
    """What every view of a lent buffer holds on to. It goes when they are gone, in whatever thread, so it takes no lock."""

    def __init__(self, body: Array, size: int, who: str, returned: deque[tuple[Array, str]]) -> None:
        self.__array_interface__: dict[str, Any] = body[:size].__array_interface__
        self._body, self._who = body, who
        self._returned = returned

    def __del__(self) -> None:
        self._returned.append((self._body, self._who))


def _rounded(size: int) -> int:
    """Up to the next of a few lengths, at most an eighth more, so that bodies of about one length share buffers."""
    step = max(2**12, 1 << max(size.bit_length() - 4, 0))
    return max(-(-size // step), 1) * step
