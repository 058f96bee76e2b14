"""A network with random faults that are determined by a seed, for tests of programs that must survive a bad network.

transport = FaultyTransport(inner, Faults(lost=0.1, unanswered=0.1, twice=0.05), generator(seed, "network", device))
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sumus.errors import expect_number
from sumus.transport.transport import MOST, PATIENCE, Answer, Transport, Unreachable


@dataclass(frozen=True)
class Faults:
    """The probability of each fault for one request, from 0 to 1.

    Attributes:
        lost: The request does not arrive.
        unanswered: The request arrives, but its response is lost.
        twice: The request arrives twice, and the second response is returned.
        cut: The request's body arrives without its end, and there is no response.
        answer_cut: The response's body arrives without its end, but the response looks complete.
        delayed: The request is delayed.
        delay: The longest delay, in seconds.
    """

    lost: float = 0.0
    unanswered: float = 0.0
    twice: float = 0.0
    cut: float = 0.0
    answer_cut: float = 0.0
    delayed: float = 0.0
    delay: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            expect_number(getattr(self, field.name), 0, 1e9 if field.name == "delay" else 1, f"Faults({field.name}=)")


def no_time(seconds: float) -> None:
    """Return at once, without a delay."""


class FaultyTransport:
    """A `Transport` that adds faults to another transport. The same requests in the same order get the same faults.

    Args:
        inner: The other transport.
        faults: The probabilities of the faults.
        rng: The generator that draws the faults.
        sleep: A function that is called with each delay, in seconds.

    Attributes:
        met: The number of faults so far, by name.
    """

    def __init__(
        self, inner: Transport, faults: Faults, rng: np.random.Generator, sleep: Callable[[float], Any] = no_time
    ) -> None:
        self.met = dict.fromkeys((field.name for field in fields(Faults) if field.name != "delay"), 0)
        self._inner, self._faults, self._rng, self._sleep = inner, faults, rng, sleep
        self._one_at_a_time = threading.Lock()

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        patience: float = PATIENCE,
        most: int = MOST,
    ) -> Answer:
        """Send a request with the faults that are drawn for it."""
        with self._one_at_a_time:
            fate = {name: bool(self._rng.random() < getattr(self._faults, name)) for name in self.met}
            share, seconds = float(self._rng.random()), float(self._rng.random()) * self._faults.delay
        if self._meets("delayed", fate):
            self._sleep(seconds)
        if self._meets("lost", fate):
            raise Unreachable("the request was lost on its way")
        if body and self._meets("cut", fate):
            self._inner.request(method, path, body[: int(share * len(body))], headers, patience, most)
            raise Unreachable("the request was cut off on its way")
        if self._meets("twice", fate):
            self._inner.request(method, path, body, headers, patience, most)
        answer = self._inner.request(method, path, body, headers, patience, most)
        if self._meets("unanswered", fate):
            raise Unreachable("the answer was lost on its way")
        if answer.body and self._meets("answer_cut", fate):
            return Answer(answer.status, answer.headers, answer.body[: int(share * len(answer.body))])
        return answer

    def _meets(self, fault: str, fate: Mapping[str, bool]) -> bool:
        with self._one_at_a_time:
            self.met[fault] += fate[fault]
        return fate[fault]

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()
