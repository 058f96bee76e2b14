"""A Ctrl-C neither gets lost nor comes between what belongs together."""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from sumus.interrupt import terminate_like_ctrl_c, undisturbed, whole


@pytest.fixture(autouse=True)
def handlers_given_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def steps_within(block: AbstractContextManager[None], *numbers: int) -> list[str]:
    """What was reached, where these signals come in the middle of a block."""
    reached: list[str] = []
    try:
        with block:
            reached.append("begun")
            for number in numbers:
                signal.raise_signal(number)
            reached.append("done")
        reached.append("after")
    except KeyboardInterrupt:
        reached.append("stopped")
    return reached


def test_ctrl_c_waits_until_the_block_is_done_and_comes_then() -> None:
    assert steps_within(whole(), signal.SIGINT) == ["begun", "done", "stopped"]
    assert steps_within(whole(), signal.SIGINT, signal.SIGINT) == ["begun", "done", "stopped"]
    assert steps_within(whole()) == ["begun", "done", "after"]


def test_sigterm_waits_too_where_it_ends_a_run_like_ctrl_c() -> None:
    terminate_like_ctrl_c()
    assert steps_within(whole(), signal.SIGTERM) == ["begun", "done", "stopped"]


def test_ctrl_c_comes_also_where_the_block_fails() -> None:
    def pressed_and_failed() -> None:
        with whole():
            signal.raise_signal(signal.SIGINT)
            1 / 0

    with pytest.raises(KeyboardInterrupt) as stop:
        pressed_and_failed()
    assert isinstance(stop.value.__context__, ZeroDivisionError)


def test_after_the_block_signals_are_heard_as_before() -> None:
    terminate_like_ctrl_c()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    steps_within(whole(), signal.SIGINT)
    with pytest.raises(ZeroDivisionError), whole():
        1 / 0
    steps_within(undisturbed(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_further_ctrl_c_does_not_disturb_what_is_being_kept() -> None:
    assert steps_within(undisturbed(), signal.SIGINT) == ["begun", "done", "after"]


def test_a_further_sigterm_does_not_disturb_it_either() -> None:
    """A batch system repeats its SIGTERM, and people press Ctrl-C beside it."""
    terminate_like_ctrl_c()
    assert steps_within(undisturbed(), signal.SIGTERM, signal.SIGINT, signal.SIGTERM) == ["begun", "done", "after"]


def test_what_runs_beside_the_main_thread_touches_no_signals() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        for block in (whole(), undisturbed()):
            with block:
                seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, before]
