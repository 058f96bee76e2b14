"""Stopping without losing anything."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

_ENDINGS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def undisturbed() -> Generator[None, None, None]:
    """No further Ctrl-C gets through while what there is is being kept."""
    with _handling(lambda number, frame: None):
        yield


@contextmanager
def whole() -> Generator[None, None, None]:
    """A Ctrl-C waits until this is done: what belongs together changes together."""
    waiting: list[int] = []
    try:
        with _handling(lambda number, frame: waiting.append(number)):
            yield
    finally:
        if waiting:
            signal.raise_signal(waiting[0])


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Generator[None, None, None]:
    """This handler for the signals that would end the run with an exception; those that end it at once still do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: old for number in _ENDINGS if callable(old := signal.getsignal(number))}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def unheard() -> Generator[None, None, None]:
    """Processes that are started in here hear neither Ctrl-C nor SIGTERM: whoever started them does, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def terminate_like_ctrl_c() -> None:
    """Let SIGTERM (a container's stop, a batch system's limit) end a run as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
