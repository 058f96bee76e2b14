"""Ctrl-C and SIGTERM: context managers that delay or ignore these signals, so that stopping a program loses nothing."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

_ENDINGS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def undisturbed() -> Generator[None, None, None]:
    """Ignore further Ctrl-C and SIGTERM in the block, while results are being saved."""
    with _handling(lambda number, frame: None):
        yield


@contextmanager
def whole() -> Generator[None, None, None]:
    """Delay Ctrl-C and SIGTERM until the block ends, so that values that belong together change together."""
    waiting: list[int] = []
    try:
        with _handling(lambda number, frame: waiting.append(number)):
            yield
    finally:
        if waiting:
            signal.raise_signal(waiting[0])


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Generator[None, None, None]:
    """Replace the handlers of Ctrl-C and SIGTERM in the block, if they are Python functions. A signal that ends the process
    at once still does so.
    """
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
    """Block Ctrl-C and SIGTERM in processes that are started in the block. The process that started them receives the signals,
    and ends these processes.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def terminate_like_ctrl_c() -> None:
    """Let SIGTERM end a run as Ctrl-C does. Containers and batch systems send SIGTERM to stop a program."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
