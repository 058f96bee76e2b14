"""The small parts of a device: when it is due, what its owner is told, which serial comes next, what is a defect."""

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sumus.protocol.session as session
from sumus.device.keys import keyed
from sumus.device.news import CLEAN, DeviceNews, NewsFeed
from sumus.device.options import Consent, DeviceProfile, ServerConnection
from sumus.device.rounds import HIGHEST, SPREAD, next_serial
from sumus.device.training import Training
from sumus.device.waits import LEAST, WakeTimer, longer, ordered
from sumus.errors import TaskError
from sumus.protocol.session import DeviceState, Floor
from tests.device.served import Clock, Served, a_device, a_task, some_examples

SECONDS = st.floats(0, 1e6)


@given(SECONDS, SECONDS)
def test_a_window_has_its_ends_in_order_and_is_never_over_at_once(one: float, other: float) -> None:
    first, last = ordered((one, other))
    assert first <= last
    assert last >= LEAST
    assert {first, last} <= {one, other, LEAST}


@given(SECONDS, SECONDS, st.integers(0, 100))
def test_after_failures_a_device_waits_longer_each_time_up_to_an_hour(one: float, other: float, failures: int) -> None:
    window = ordered((one, other))
    first, last = longer(window, failures)
    assert first >= window[0]
    assert last >= window[1]
    assert longer(window, failures + 1) >= (first, last)
    assert longer((0.0, 0.0), failures)[1] <= session.LONGEST


@given(SECONDS, SECONDS, st.integers(0, 5))
def test_the_moment_lies_in_the_window_and_is_the_same_for_the_same_keys(one: float, other: float, serial: int) -> None:
    window, clock = ordered((one, other)), Clock()
    timers = [WakeTimer(clock, keyed(1), "alice") for _ in range(2)]
    for timer in timers:
        timer.sleep_within(window, DeviceState(serial=serial))
    assert timers[0].left() == timers[1].left()
    assert window[0] <= timers[0].left() <= window[1]


@given(st.integers(0, 2**53), st.integers(0, 2**53), st.floats(0, 1, exclude_max=True))
def test_the_next_serial_is_beyond_the_servers_and_by_no_more_than_the_spread(own: int, its: int, share: float) -> None:
    serial = next_serial(own, its, share)
    assert min(its, HIGHEST) <= serial <= min(its + SPREAD, HIGHEST)
    assert (serial == min(its, HIGHEST)) or its > own


def test_trouble_is_over_with_the_next_answer_and_a_copied_folder_after_many() -> None:
    news = list[DeviceNews]()
    feed = NewsFeed(news.append)
    feed.tell_trouble("one\x1b[31m", again_s=5.0)
    feed.folder_was_copied("copied")
    assert (feed.all_trouble.count("; "), "\x1b" in feed.all_trouble) == (1, False)
    assert news[0].said.isprintable()
    feed.trouble_is_over()
    assert (feed.trouble, feed.all_trouble) == ("", "copied")
    for _ in range(CLEAN):
        assert feed.all_trouble == "copied"
        feed.check_in_went_well()
    assert feed.all_trouble == ""


def test_a_floor_stands_for_the_consent_to_it() -> None:
    server = Served()
    device = sumus_device(server, Floor(contributors=11))
    device.wake()
    assert server.named("abort") == ["floor-contributors"]


def sumus_device(server: Served, consent: Consent | Floor) -> Any:
    from sumus.device.device import Device

    return Device(
        "https://example.org",
        a_task(),
        some_examples(),
        token="token",
        consent=consent,
        connection=ServerConnection(transport=server),
        profile=DeviceProfile(executor="autograd"),
    )


@pytest.mark.parametrize(
    ("trains", "evaluates", "kinds"),
    [(True, True, ("train", "evaluate")), (True, False, ("train",)), (False, True, ("evaluate",)), (False, False, ())],
)
def test_a_consent_says_which_kinds_of_work_are_taken(trains: bool, evaluates: bool, kinds: tuple[str, ...]) -> None:
    assert Consent(trains=trains, evaluates=evaluates).kinds == kinds


# ── defects ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Failing(Training):
    """A compute that raises an error where it is told to."""

    def __init__(self, error: Exception, where: str) -> None:
        super().__init__(a_task(), some_examples(), "autograd")
        self._error, self._where = error, where

    def memory(self, *arguments: Any) -> int:
        if self._where == "offer":
            raise self._error
        return super().memory(*arguments)

    def train(self, *arguments: Any) -> Any:
        raise self._error


@pytest.mark.parametrize("where", ["offer", "work"])
@pytest.mark.parametrize(
    ("error", "reason", "is_defect"),
    [
        (KeyError("ours"), "other", True),
        (TaskError("the user's"), "task", False),
        (MemoryError("no room"), "memory", False),
        (ConnectionError("no server"), "other", True),
    ],
    ids=["a defect", "a user's mistake", "memory", "a library"],
)
def test_a_defect_leaves_a_traceback_in_the_log_and_a_mistake_of_the_users_none(
    where: str, error: Exception, reason: str, is_defect: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server = Served()
    device = a_device(server, task=Failing(error, where))
    with caplog.at_level(logging.ERROR, "sumus.device"):
        device.wake()
    assert server.named("abort") == [reason], "the server is told one word"
    assert str(error).strip("'") in device.status.trouble
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [error] * is_defect
    for record in caplog.records:
        assert (record.name, record.levelname) == ("sumus.device", "ERROR")
        assert "alice" not in record.getMessage(), "no log names a device"
