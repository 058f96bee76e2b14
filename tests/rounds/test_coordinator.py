"""A coordinator decides by its circumstances as they are, and counts the events that the table does not allow."""

from dataclasses import replace

import pytest

from sumus.pacing import Pacing
from sumus.protocol.round import AssignWork, CheckIn, CloseRound, ComeLater, State
from sumus.rounds.circumstances import Circumstances, Crowd
from sumus.rounds.coordinator import Coordinator

PACING = Pacing(2, deadline=60.0)


class Changing:
    """A coordinator whose circumstances a test changes."""

    def __init__(self) -> None:
        self.now = Circumstances(PACING, population=10)
        self.coordinator = Coordinator(lambda: self.now)
        self.serial = 0

    def asks(self) -> str:
        """What the next device is told."""
        self.serial += 1
        (answer,) = self.coordinator.check_in(f"d{self.serial}", CheckIn(f"d{self.serial}/1", 1), 1.0)
        assert isinstance(answer, AssignWork | ComeLater)
        return "work" if isinstance(answer, AssignWork) else answer.reason

    def played(self) -> None:
        """A round from its opening to its model."""
        self.coordinator.tick(0.0)
        number = self.coordinator.current.number
        for _ in range(2):
            self.asks()
            self.coordinator.report(f"d{self.serial}/1", 2.0)
        assert CloseRound(number) in self.coordinator.commit(3.0)
        self.coordinator.publish(number, 4.0)


# ── circumstances ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pause_holds_from_the_next_decision_on_and_ends_so() -> None:
    it = Changing()
    it.now = replace(it.now, paused=True)
    it.coordinator.tick(0.0)
    assert it.coordinator.current.state is State.PLANNED
    it.now = replace(it.now, paused=False)
    it.coordinator.tick(0.0)
    assert (it.asks(), it.coordinator.room()) == ("work", 1)
    it.now = replace(it.now, paused=True)
    assert (it.asks(), it.coordinator.room()) == ("paused", 0)


def test_the_pacing_of_an_open_round_may_change() -> None:
    it = Changing()
    it.coordinator.tick(0.0)
    assert [it.asks() for _ in range(3)] == ["work", "work", "full"]
    it.now = replace(it.now, pacing=replace(PACING, cohort=3))
    assert [it.asks() for _ in range(2)] == ["work", "full"]
    it.now = replace(it.now, pacing=replace(PACING, deadline=0.5))
    it.coordinator.tick(1.0)
    assert it.coordinator.round(0).state is State.ABANDONED  # pyright: ignore[reportOptionalMemberAccess]


def test_a_population_that_is_too_small_for_a_sum_gets_no_work() -> None:
    it = Changing()
    it.now = Circumstances(replace(PACING, least=1.0), population=1)
    it.coordinator.tick(0.0)
    assert it.asks() == "few"
    it.now = replace(it.now, population=2)
    assert it.asks() == "work"


def test_a_crowd_is_counted_when_it_is_asked_and_smooths_how_often_it_asks() -> None:
    there = [3]
    crowd = Crowd(lambda: there[0])
    assert (crowd.population, crowd.changed) == (0, True)
    assert (crowd.count(), crowd.population, crowd.changed) == (3, 3, False)
    there[0] = 4
    crowd.note_change()
    assert (crowd.population, crowd.changed) == (3, True)
    assert crowd.count() == 4
    crowd.note_checkins(10, 1.0)
    assert crowd.arriving == pytest.approx(2.0)
    crowd.note_checkins(10, 1.0)
    assert crowd.arriving == pytest.approx(3.6)
    for _ in range(100):
        crowd.note_checkins(0, 1.0)
    assert crowd.arriving == pytest.approx(0.0, abs=1e-6)


# ── events that the table does not allow ─────────────────────────────────────────────────────────────────────────────


def test_what_happens_in_a_round_and_a_recovery_is_all_allowed() -> None:
    it = Changing()
    it.played()
    it.coordinator.recover(5.0)
    it.coordinator.expire(6.0)
    it.played()
    it.coordinator.tick(7.0)
    it.coordinator.cancel(it.coordinator.current.number, 8.0)
    it.coordinator.recover(9.0)
    assert it.coordinator.illegal == {}


def test_an_event_that_the_table_does_not_allow_is_counted_by_state_and_name_and_changes_nothing() -> None:
    it = Changing()
    it.played()
    before = it.coordinator.round(0), it.coordinator.current
    for _ in range(2):
        assert it.coordinator.publish(0, 5.0) == ()
    assert it.coordinator.cancel(0, 5.0) == ()
    assert it.coordinator.publish(1, 5.0) == ()
    assert (it.coordinator.round(0), it.coordinator.current) == before
    assert it.coordinator.illegal == {
        ("published", "Published"): 2,
        ("published", "Cancelled"): 1,
        ("planned", "Published"): 1,
    }
