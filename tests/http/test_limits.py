"""Bounds that hold whatever arrives: of requests, and of names remembered."""

import random
from collections import Counter
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.http.limits import EMPTY, LONGEST_S, Bucket, Buckets, Limits, Rate, take
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


def test_an_edges_devices_are_charged_to_the_edge_and_then_to_the_population() -> None:
    limits = Limits(device=Rate(1.0, 2), population=Rate(1.0, 5))
    for number in range(4):
        limits.relayed("phones", "edge", 2, f"invented {number}", 0.0)
    refused(lambda: limits.relayed("phones", "edge", 2, "invented 4", 0.0))
    limits.check_in("phones", "bob", 0.0)
    refused(lambda: limits.check_in("phones", "carol", 0.0))
    limits.request("invented 0", 0.0)
    limits.request("invented 0", 0.0)
