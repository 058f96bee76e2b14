"""Bounds that hold whatever arrives: of requests, of names remembered, of bytes in memory."""

import random
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.server.limits import EMPTY, LONGEST_S, Bucket, Buckets, Limits, Rate, Room, _rounded, neighbourhood, take
from sumus.wire.messages import Refused, Window

# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Plain:
    """The token bucket of a textbook, to compare with."""

    def __init__(self, rate: Rate, now: float) -> None:
        self.rate, self.tokens, self.at = rate, float(rate.burst), now

    def take(self, now: float) -> bool:
        self.tokens = min(self.rate.burst, self.tokens + (now - self.at) * self.rate.per_s)
        self.at = now
        if self.tokens < 1 - 1e-6:
            return False
        self.tokens -= 1
        return True


STEPS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 4.0, 60.0]), max_size=80)


@given(per_s=st.sampled_from([0.25, 1.0, 2.0, 8.0]), burst=st.integers(1, 6), steps=STEPS)
def test_it_is_the_token_bucket(per_s: float, burst: int, steps: list[float]) -> None:
    rate, now, bucket = Rate(per_s, burst), 0.0, EMPTY
    plain = Plain(rate, now)
    for step in steps:
        now += step
        bucket, window = take(rate, bucket, now)
        assert (window is None) == plain.take(now)


@given(per_s=st.sampled_from([0.25, 3.0, 7.0]), burst=st.integers(1, 6), steps=STEPS)
def test_a_window_begins_when_there_is_a_token_again(per_s: float, burst: int, steps: list[float]) -> None:
    rate, now, bucket = Rate(per_s, burst), 0.0, EMPTY
    for step in steps:
        now += step
        bucket, window = take(rate, bucket, now)
        if window is not None:
            assert 0 < window[0] <= window[1] <= 2 * (LONGEST_S + burst / per_s)
            assert take(rate, bucket, now + window[0])[1] is None
            assert take(rate, bucket, now + window[0] - 0.01 / per_s)[1] is not None


def test_windows_grow_with_those_who_wait_so_that_nobody_is_refused_twice() -> None:
    """A thousand devices come at one moment, ten a second are served, and each comes back within its window."""
    rate, dice = Rate(10.0, 10), random.Random(0)
    arrivals, bucket, tries = [(0.0, device) for device in range(1000)], EMPTY, Counter[int]()
    while arrivals:
        arrivals.sort()
        now, device = arrivals.pop(0)
        tries[device] += 1
        bucket, window = take(rate, bucket, now)
        if window is not None:
            arrivals.append((now + dice.uniform(*window), device))
    assert max(tries.values()) < 12
    assert sum(tries.values()) < 4000


def test_a_crowd_is_sent_away_for_an_hour_at_most() -> None:
    rate, bucket, window = Rate(1.0, 1), EMPTY, None
    for _ in range(100_000):
        bucket, window = take(rate, bucket, 0.0)
    assert window is not None
    assert window[1] <= LONGEST_S + 2
    assert take(rate, bucket, 1.0)[1] is None
    assert bucket == Bucket(1.0, LONGEST_S + 1)


def test_names_are_bounded_and_the_longest_unheard_of_is_forgotten() -> None:
    buckets = Buckets(Rate(0.001, 1), most=10)
    assert buckets.take("a", 0.0) is None
    assert buckets.take("a", 0.0) is not None
    for number in range(9):
        buckets.take(f"b{number}", 1.0)
    assert buckets.take("a", 2.0) is not None
    for number in range(1000):
        buckets.take(f"c{number}", 3.0)
    assert len(buckets) == 10
    assert buckets.take("a", 4.0) is None


def refused(asked: Any) -> Window:
    with pytest.raises(Refused) as error:
        asked()
    assert error.value.problem.code == "rate"
    window = error.value.problem.retry_after_s
    assert window is not None
    return window


def test_one_device_asks_too_much_and_the_others_do_not_notice() -> None:
    limits = Limits(device=Rate(1.0, 3))
    for _ in range(3):
        limits.request("alice", 0.0)
    refused(lambda: limits.request("alice", 0.0))
    refused(lambda: limits.check_in("phones", "alice", 0.0))
    limits.check_in("phones", "bob", 0.0)
    limits.request("alice", 1.0)


def test_a_population_has_its_own_measure_and_a_refused_device_does_not_use_it() -> None:
    limits = Limits(device=Rate(1.0, 1), population=Rate(1.0, 2))
    limits.check_in("phones", "alice", 0.0)
    for _ in range(5):
        refused(lambda: limits.check_in("phones", "alice", 0.0))
    limits.check_in("phones", "bob", 0.0)
    refused(lambda: limits.check_in("phones", "carol", 0.0))
    limits.check_in("edges", "dan", 0.0)


def test_enrolments_are_counted_by_neighbourhood() -> None:
    limits = Limits(source=Rate(1.0, 2))
    limits.enrolment("192.0.2.1", 0.0)
    limits.enrolment("192.0.2.200", 0.0)
    refused(lambda: limits.enrolment("192.0.2.77", 0.0))
    limits.enrolment("192.0.3.1", 0.0)


def test_windows_are_moved_by_chance() -> None:
    for chance, last in ((0.0, (1.0, 100.0)), (0.5, (25.75, 124.75))):
        limits = Limits(population=Rate(1.0, 1), random=lambda chance=chance: chance)
        limits.check_in("phones", "first", 0.0)
        ask = partial(limits.check_in, "phones", now=0.0)
        assert [refused(partial(ask, str(device))) for device in range(99)][-1] == last


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2:3::4", "2001:db8:1::/48"),
        ("fe80::1%eth0", "fe80::/48"),
        ("", "elsewhere"),
        ("testclient", "elsewhere"),
        ("192.0.2.77\n", "elsewhere"),
    ],
)
def test_neighbourhoods(address: str, name: str) -> None:
    assert neighbourhood(address) == name


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────

MIB = 2**20


def test_a_body_is_as_long_as_asked_and_can_be_written() -> None:
    room = Room(MIB)
    for size in (0, 1, 4095, 4097, 100_000):
        body = room.take(size)
        assert (len(body), body.readonly, body.format, body.contiguous) == (size, False, "B", True)
        body[:] = bytes([7]) * size


def test_beyond_the_room_it_is_busy_until_a_body_is_dropped() -> None:
    room = Room(MIB, retry_after_s=(2.0, 3.0))
    first, second = room.take(MIB // 2), room.take(MIB // 2)
    with pytest.raises(Refused) as error:
        room.take(1)
    assert (error.value.problem.code, error.value.problem.retry_after_s) == ("busy", (2.0, 3.0))
    del first
    assert len(room.take(MIB // 2)) == MIB // 2
    del second
    assert room.lent == 0


def test_a_body_that_can_never_fit_is_too_large() -> None:
    with pytest.raises(Refused, match="too_large"):
        Room(MIB).take(MIB + 1)


def test_it_is_out_until_the_last_view_is_gone() -> None:
    """Else the next body would be written under an array that is still read."""
    room = Room(MIB)
    body = room.take(MIB)
    array, part = np.frombuffer(body[8:1032], np.float32), body[100:200]
    body.release()
    with pytest.raises(Refused, match="busy"):
        room.take(1)
    part.release()
    view = array[:4].reshape(2, 2)
    del array
    with pytest.raises(Refused, match="busy"):
        room.take(1)
    del view
    assert room.lent == 0
    assert room.take(1)


def test_a_block_gives_back_even_when_it_fails() -> None:
    room = Room(MIB)
    with suppress(ZeroDivisionError), room.take(MIB):
        assert room.lent == MIB
        raise ZeroDivisionError
    assert room.lent == 0


def address_of(body: memoryview) -> int:
    return np.frombuffer(body, np.uint8).__array_interface__["data"][0]


def test_buffers_are_used_again() -> None:
    room = Room(MIB)
    addresses = set[int]()
    for size in range(100_000, 104_000, 40):
        with room.take(size) as body:
            addresses.add(address_of(body))
    assert len(addresses) == 1


def test_idle_buffers_make_room_for_other_lengths() -> None:
    room = Room(MIB)
    for size in (4096, 8192, 100_000, 500_000, MIB, 1, 700_000, 4096):
        with room.take(size):
            pass
    many = [room.take(4096) for _ in range(256)]
    with pytest.raises(Refused, match="busy"):
        room.take(1)
    many.clear()
    assert len(room.take(MIB)) == MIB


@given(st.lists(st.integers(0, 70_000), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_what_is_out_and_idle_never_exceeds_the_room(sizes: list[int], dice: random.Random) -> None:
    room, out = Room(2**18), list[memoryview]()
    for size in sizes:
        try:
            out.append(room.take(size))
        except Refused:
            assert sum(_rounded(len(body)) for body in out) + _rounded(size) > 2**18
        while out and dice.random() < 0.4:
            out.pop(dice.randrange(len(out)))
        assert room.lent == sum(_rounded(len(body)) for body in out)
        assert room._held == room.lent + sum(length * len(bodies) for length, bodies in room._idle.items()) <= 2**18


def test_many_threads_share_it_and_no_body_is_anothers() -> None:
    room, start, defects, refusals = Room(MIB), threading.Barrier(8), list[str](), Counter[int]()

    def send(number: int) -> None:
        dice, mark = random.Random(number), bytes([number + 1])
        start.wait()
        for _ in range(400):
            size = dice.choice([100, 5_000, 70_000, 200_000, 300_000])
            try:
                body = room.take(size)
            except Refused:
                refusals[number] += 1
                continue
            body[:] = mark * size
            array = np.frombuffer(body, np.uint8)
            del body
            if not (array == number + 1).all():
                defects.append(f"{number} read another's bytes")
            if room.lent > room.bytes:
                defects.append("more is out than there is room")

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert defects == []
    assert room.lent == 0
    assert len(room.take(MIB)) == MIB
