"""Seeded fault schedules: what must hold, holds; and each planted bug is found. The long form: `python -m benchmarks.faults`."""

import pytest

from benchmarks.faults import BUGS, PACINGS, Broken, Schedule, schedules
from sumus.protocol.round import State

EACH = 170
"""Schedules of each of the three pacings."""


@pytest.mark.parametrize("pacing", PACINGS)
def test_what_must_hold_holds(pacing: str) -> None:
    published = accepted = abandoned = 0
    for seed, broken, schedule in schedules(0, EACH, PACINGS[pacing]):
        assert broken is None, (
            f"seed {seed}: {broken}; python -m benchmarks.faults --pacing '{pacing}' --seed {seed} --tell"
        )
        published += len(schedule.published)
        accepted += sum(outcome == "counted" for outcome in schedule.told.values())
        abandoned += sum(row.state is State.ABANDONED for row in schedule.store.rounds.values())
    assert published > 3 * EACH, "schedules in which nothing happens show nothing"
    assert accepted > 6 * EACH
    assert abandoned > 0 or pacing == "buffered"


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    tried = (broken for pacing in PACINGS.values() for _, broken, _ in schedules(0, 20, pacing, bug))
    assert any(broken is not None for broken in tried)


def test_a_seed_replays_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    for _ in range(2):
        Schedule(7, PACINGS["buffered"], tell=True).run()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(said[0].splitlines()) > 100


def test_a_failing_seed_fails_again() -> None:
    seed = next(seed for seed, broken, _ in schedules(0, 50, PACINGS["synchronous"], "keeps-early") if broken)
    with pytest.raises(Broken):
        Schedule(seed, PACINGS["synchronous"], *BUGS["keeps-early"]).run()
