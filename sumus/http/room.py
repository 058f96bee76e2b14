"""Bounded memory for bodies (`Room`), and bounded shares of any resource (`Shares`): no neighbourhood (network of addresses)
can take all of it.

    room = Room(256 * 2**20)
    body = room.take(length, near(address))          before a byte is read; Refused("busy") if there is no room
    stream.readinto(body)                            when the last view of the body is gone, its memory can be lent again

    shares = Shares(10_000)
    shares.take(near(address), 1)                    False if it is not available now
    shares.give(near(address), 1)

Neither exceeds its bound, whatever arrives.
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
"""There is a shortage if more than the fraction `SHORT` of a resource is taken. Then the resource is divided into `PORTIONS`
equal portions, and a neighbourhood gets at most one of them.
"""
IDLE_S = 2.0
"""The number of seconds for which an idle buffer is kept for the next body."""


def neighbourhood(address: str, v6: int = 48) -> str:
    """Return the network of an address.

    Args:
        address: The address. Text that is not an address belongs to the network "elsewhere".
        v6: The bits of an IPv6 network; an IPv4 address belongs to its /24. A client that has one address in such a network may
            have all of them.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "elsewhere"
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else v6), strict=False))


def trim() -> None:
    """Return freed memory that the C library keeps to the system (only with glibc). Ended TLS connections leave much of it."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@lru_cache(4096)
def near(address: str) -> str:
    """Return the neighbourhood of an address for shares: its /24 network, or its /64 network (IPv6), which is usually one
    household.
    """
    return neighbourhood(address, 64)


class Shares:
    """The shares of neighbourhoods in a bounded resource, here called the whole.

    While at most `SHORT` of the whole is taken, any neighbourhood may take more. Beyond that, a neighbourhood may only take its
    first piece, or stay within one portion. So devices behind one address are limited only in a shortage. If one neighbourhood
    causes a shortage, the other neighbourhoods still get their portions.

    Args:
        most: The size of the whole.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self._by: dict[str, int] = {}

    def of(self, who: str) -> int:
        """Return the amount that a neighbourhood has."""
        return self._by.get(who, 0)

    def may(self, who: str, amount: int) -> bool:
        """Return whether a neighbourhood may take this amount now."""
        after, has = self.taken + amount, self.of(who)
        plenty = after <= SHORT * self.most or not amount
        return after <= self.most and (plenty or not has or has + amount <= self.most / PORTIONS)

    def take(self, who: str, amount: int) -> bool:
        """Take this amount for a neighbourhood and return True; return False if the neighbourhood may not have it."""
        if not self.may(who, amount):
            return False
        self.add(who, amount)
        return True

    def add(self, who: str, amount: int) -> None:
        """Count this amount without a check; the caller has called `may`."""
        self.taken += amount
        if amount:
            self._by[who] = self.of(who) + amount

    def give(self, who: str, amount: int) -> None:
        """Return this amount to the whole."""
        self.taken -= amount
        if left := self.of(who) - amount:
            self._by[who] = left
        else:
            self._by.pop(who, None)


class Room:
    """Memory for bodies, in buffers that are reused by later bodies. The methods are safe to call from any thread.

    Args:
        bytes: The largest number of bytes that may be lent or idle together.
        retry_after_s: The retry window of a refusal, in seconds.
        clock: Returns monotonic seconds.
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
        """The size of the room, in bytes."""
        return self.shares.most

    @property
    def lent(self) -> int:
        """The number of bytes that are lent."""
        with self._lock:
            self._take_back()
            return self.shares.taken

    @property
    def held(self) -> int:
        """The number of bytes that are lent or idle."""
        return self._held

    def take(self, size: int, who: str) -> memoryview:
        """Lend `size` writable bytes, whose content is undefined. The loan ends when the last view of the bytes (a slice or an
        array) is deleted.

        Args:
            who: The neighbourhood to which they are lent.

        Raises:
            Refused: With the code `busy` if there is no space now; with `too_large` if this size can never fit.
        """
        whole = _rounded(size)
        if whole > self.bytes:
            raise Refused(
                "too_large",
                f"the body has {amount(size)}, but this server accepts at most {amount(self.bytes)} at once",
            )
        with self._lock:
            self._take_back()
            if not self.shares.take(who, whole):
                raise Refused("busy", "this server has no memory for the body now: try again later", self._retry)
            body = self._buffer(whole)
        return np.asarray(_Loan(body, size, who, self._returned)).data

    def tidy(self) -> bool:
        """Return buffers that have been idle for `IDLE_S` to the system. The result is True if idle buffers are left, so that
        `tidy` must be called again.
        """
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
        while self._held + whole > self.bytes:  # delete idle buffers of other lengths to make space
            length = next(length for length, bodies in self._idle.items() if bodies)
            self._idle[length].pop()
            self._held -= length
        # The memory comes from the system and not from malloc, which would keep freed memory.
        body = np.frombuffer(mmap.mmap(-1, whole), np.uint8)
        self._held += whole
        return body

    def _take_back(self) -> None:
        while self._returned:
            body, who = self._returned.popleft()
            self._idle.setdefault(body.nbytes, []).append((body, self._clock()))
            self.shares.give(who, body.nbytes)


class _Loan:
    """The owner that all views of a lent buffer keep alive. It is deleted with the last view, in any thread, so its deletion
    must not take a lock.
    """

    def __init__(self, body: Array, size: int, who: str, returned: deque[tuple[Array, str]]) -> None:
        self.__array_interface__: dict[str, Any] = body[:size].__array_interface__
        self._body, self._who = body, who
        self._returned = returned

    def __del__(self) -> None:
        self._returned.append((self._body, self._who))


def _rounded(size: int) -> int:
    """Round a length up by at most an eighth, to one of a few lengths, so that bodies of similar length can reuse the same
    buffers.
    """
    step = max(2**12, 1 << max(size.bit_length() - 4, 0))
    return max(-(-size // step), 1) * step
