"""The line of senders in doubt: who waits in it, for how long, and who does not."""

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.server.doubt import DOUBTED_S, EACH_S, LONGEST_S, Doubt
from sumus.wire.messages import Refused

DEVICE, OTHER = "a" * 64, "b" * 64
HERE, ELSEWHERE = "127.0.0.0/24", "127.1.0.0/24"


class Hall:
    """A line with a clock that a test moves. waited: seconds, of each request that has had its turn."""

    def __init__(self, most: int = 100) -> None:
        self.now = 100.0
        self.waited = list[float]()
        self.doubt = Doubt(most, lambda: self.now, self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.waited.append(seconds)

    def asks(self, device: str = DEVICE, where: str = HERE) -> str | float | None:
        """What becomes of a request: the seconds that it waits, None if it is not in the line, or the code of a refusal."""
        before = len(self.waited)
        try:
            asyncio.run(self.doubt.turn(device, where))
        except Refused as refused:
            return refused.problem.code
        return self.waited[-1] if len(self.waited) > before else None


def test_who_has_signed_well_does_not_wait() -> None:
    assert Hall().asks() is None


def test_a_bad_signature_makes_its_name_wait_in_its_neighbourhood_only() -> None:
    hall = Hall()
    hall.doubt.note(DEVICE, HERE)
    assert hall.asks() == 0.0
    assert hall.asks() == pytest.approx(EACH_S)
    assert hall.asks(OTHER) is None
    assert hall.asks(DEVICE, ELSEWHERE) is None


def test_doubt_ends() -> None:
    hall = Hall()
    hall.doubt.note(DEVICE, HERE)
    hall.now += DOUBTED_S
    assert hall.asks() is None


def test_each_turn_is_a_while_after_the_one_before_and_none_waits_too_long() -> None:
    hall = Hall()
    hall.doubt.note(DEVICE, HERE)
    found = [hall.asks() for _ in range(round(LONGEST_S / EACH_S) + 50)]
    waited = [each for each in found if isinstance(each, float)]
    assert waited == pytest.approx([number * EACH_S for number in range(len(waited))])
    assert len(found) - len(waited) == found.count("busy") > 40
    assert max(waited) <= LONGEST_S
    hall.now += LONGEST_S  # the line has gone on, and there is room again
    assert hall.asks() == pytest.approx(waited[-1] + EACH_S - LONGEST_S, abs=1e-9)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0.0, 5.0)), max_size=40), st.integers(1, 4))
def test_no_more_are_remembered_than_may_be(noted: Iterable[tuple[str, float]], most: int) -> None:
    hall = Hall(most)
    for device, later in noted:
        hall.doubt.note(device, HERE)
        hall.now += later
    assert sum(hall.doubt.has(device, HERE) for device in "abcdef") <= most


def test_the_one_that_was_noted_first_is_forgotten() -> None:
    hall = Hall(2)
    for device in (DEVICE, OTHER, DEVICE, "c" * 64):
        hall.doubt.note(device, HERE)
    assert [hall.doubt.has(device, HERE) for device in (DEVICE, OTHER, "c" * 64)] == [True, False, True]
