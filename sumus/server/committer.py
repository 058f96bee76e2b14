"""The deciding thread: it takes all waiting items at once and passes them to `turn`.

    committer = Committer(turn)
    committer.start()
    answer = await committer.ask(item)          the answer that `turn` gives to the item
    committer.stop()

So a hundred check-ins are one transaction, and items that arrive while the disk is busy become the next transaction: the batch
grows with the load.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Post:
    """Delivers answers to an event loop. The loop is woken once for all waiting answers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._said: deque[tuple[asyncio.Future[Any], Any]] = deque()
        self._woken = False

    def send(self, to: "asyncio.Future[Any]", answer: Any) -> None:
        """Send an answer, from the deciding thread."""
        self._said.append((to, answer))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed, so the answers are no longer awaited
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before the loop below: a later answer must wake the event loop again
        while self._said:
            to, answer = self._said.popleft()
            if not to.done():
                _settle(to, answer)


@dataclass(eq=False)
class PendingRequest(Generic[T]):
    """An item to be decided, and the future for its answer. Either a thread waits for the future, or a coroutine does: then
    `post` delivers the answer to the coroutine's event loop.

    Attributes:
        item: The item.
        answer: The future for the answer.
        post: Delivers the answer to an event loop; None if a thread waits for the answer.
        since: The time at which the item came, on the monotonic clock.
        answered: Whether the item was answered.
    """

    item: T
    answer: "Future[Any] | asyncio.Future[Any]" = field(default_factory=lambda: Future[Any]())
    post: _Post | None = None
    since: float = field(default_factory=time.monotonic)
    answered: bool = False

    @property
    def gone(self) -> bool:
        """Whether the answer is no longer awaited."""
        return self.answer.cancelled()

    def say(self, answer: Any) -> None:
        """Answer the item. If the answer is an exception, it is raised in the caller that waits. Later answers are ignored."""
        if self.answered:
            return
        self.answered = True
        if isinstance(self.answer, Future):
            if self.answer.set_running_or_notify_cancel():
                _settle(self.answer, answer)
        elif self.post is not None:
            self.post.send(self.answer, answer)


def _settle(future: "Future[Any] | asyncio.Future[Any]", answer: Any) -> None:
    if isinstance(answer, BaseException):
        future.set_exception(answer)
    else:
        future.set_result(answer)


class Committer(Generic[T]):
    """Runs one thread that decides items, turn by turn."""

    def __init__(self, turn: Callable[[Sequence[PendingRequest[T]]], float], gather: float = 0.0) -> None:
        """Decide items with a function.

        Args:
            turn: Called with the waiting items. It answers each item, now or later, and raises no exception. It returns the
                time, in seconds, after which it must be called again even if no item waits.
            gather: The shortest time between two turns, in seconds, so that under load a turn decides many items.
        """
        self._turn, self._gather = turn, gather
        self._waiting: list[PendingRequest[T]] = []
        self._post: _Post | None = None
        self._wake = threading.Condition()
        self._stopping = False
        self._turn_began: float | None = None
        self._thread = threading.Thread(target=self._work, name="committer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the present turn; items that have come by then are decided in a last turn."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def stuck_s(self) -> float:
        """The duration of the present turn so far, in seconds; 0 between turns, infinity if the thread has died."""
        if self._thread.ident is not None and not self._thread.is_alive() and not self._stopping:
            return math.inf
        began = self._turn_began
        return 0.0 if began is None else time.monotonic() - began

    def put(self, item: T) -> "Future[Any]":
        """Queue an item for the next turn; return the future of its answer."""
        answer: Future[Any] = Future()
        self._put(PendingRequest(item, answer))
        return answer

    async def ask(self, item: T) -> Any:
        """Queue an item for the next turn, and await its answer. If the call is cancelled, the item may still be decided."""
        loop, post = asyncio.get_running_loop(), self._post
        if post is None or post.loop is not loop:
            self._post = post = _Post(loop)
        answer: asyncio.Future[Any] = loop.create_future()
        self._put(PendingRequest(item, answer, post))
        return await answer

    def _put(self, waiting: PendingRequest[T]) -> None:
        with self._wake:
            self._waiting.append(waiting)
            self._wake.notify()

    def _work(self) -> None:
        pause = last = 0.0
        while True:
            with self._wake:
                if not self._waiting and not self._stopping:
                    self._wake.wait(pause)
            if (left := last + self._gather - time.monotonic()) > 0:
                time.sleep(left)  # do not wait on the condition: each new item would end the wait
            with self._wake:
                taken, self._waiting = self._waiting, []
                stopping = self._stopping
            self._turn_began = time.monotonic()
            pause = self._turn(taken)
            self._turn_began, last = None, time.monotonic()
            if stopping and not self._waiting:
                return
