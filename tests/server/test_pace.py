"""`Pacing(every=)`: rounds that leave time between them, whatever devices ask for, also after a restart."""

from pathlib import Path

import numpy as np
import pytest

import sumus
from sumus.fleet import Fleet
from sumus.pacing import Pacing
from sumus.plan import Plan
from sumus.protocol.round import AssignWork, CheckIn, ComeLater, State
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Coordinator
from sumus.storage.memory import MemoryStore
from sumus.storage.sql import SqlStore
from tests.server.devices import tiny

PACINGS = [Pacing(cohort=2, every=100.0), Pacing(cohort=2, concurrency=6, every=100.0)]


class Paced:
    """A coordinator whose devices ask, and report at once."""

    def __init__(self, pacing: Pacing, store: MemoryStore | SqlStore | None = None) -> None:
        self.server, self.serial = Coordinator(lambda: Circumstances(pacing, population=50), store), 0
        self.models = list[float]()

    def ask(self, device: str, now: float) -> AssignWork | ComeLater:
        self.server.tick(now)
        self.serial += 1
        (answer,) = self.server.check_in(device, CheckIn(f"{device}{self.serial}", self.serial), now)
        assert isinstance(answer, AssignWork | ComeLater)
        return answer

    def takes_part(self, device: str, now: float) -> str:
        answer = self.ask(device, now)
        if isinstance(answer, ComeLater):
            return answer.reason
        number = self.server.current.number
        self.server.report(answer.session.id, now)
        self.server.commit(now)
        if (row := self.server.round(number)) is not None and row.state is State.CLOSING:
            self.server.publish(number, now)
            self.models.append(now)
        return "counted"


@pytest.mark.parametrize("pacing", PACINGS, ids=["synchronous", "buffered"])
def test_no_model_is_made_sooner_than_the_plan_s_pace(pacing: Pacing) -> None:
    paced = Paced(pacing)
    said = {paced.takes_part(f"d{number % 50}", 1000.0 + number / 2) for number in range(1000)}
    assert said <= {"counted", "pace", "full", "separation"}
    assert len(paced.models) == 5
    assert min(np.diff(paced.models)) >= 100.0
    assert paced.models[0] < 1002.0, "the first is made at once"


@pytest.mark.parametrize("pacing", PACINGS, ids=["synchronous", "buffered"])
def test_a_device_that_comes_too_soon_is_told_when(pacing: Pacing) -> None:
    paced = Paced(pacing)
    assert [paced.takes_part(device, 1000.0) for device in "ab"] == ["counted"] * 2
    for now, least, most in ((1000.0, 70.0, 90.0), (1050.0, 35.0, 45.0), (1099.0, 0.5, 3.0)):
        answer = paced.ask("c", now)
        assert isinstance(answer, ComeLater)
        assert answer.reason == "pace"
        assert least <= answer.window[0] <= answer.window[1] <= most, "before its time, not long after it"
    assert isinstance(paced.ask("c", 1100.0), AssignWork)


def test_a_buffer_with_a_pace_gives_no_more_work_than_it_takes() -> None:
    paced = Paced(PACINGS[1])
    given = [isinstance(paced.ask(device, 1000.0), AssignWork) for device in "abcdef"]
    assert given == [True, True, False, False, False, False]


def test_a_server_that_starts_again_keeps_the_pace(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/run.db"
    first = Paced(PACINGS[0], SqlStore.open(url, "keyboard"))
    assert [first.takes_part(device, 1000.0) for device in "ab"] == ["counted"] * 2
    again = Paced(PACINGS[0], SqlStore.open(url, "keyboard"))
    again.server.recover(1010.0)
    again.serial = 10
    assert again.takes_part("c", 1090.0) == "pace"
    assert again.takes_part("c", 1101.0) == "counted"


def test_a_round_that_came_to_nothing_is_paced_too() -> None:
    paced = Paced(PACINGS[0])
    assert isinstance(paced.ask("a", 1000.0), AssignWork)
    paced.server.cancel(0, 1010.0)
    assert paced.takes_part("b", 1100.0) == "pace"
    assert paced.takes_part("b", 1110.0) == "counted"


def test_a_plan_without_a_pace_is_the_plan_that_it_was_and_one_with_a_pace_travels() -> None:
    plan = tiny().plan
    assert '"every"' not in plan.to_json()
    paced = tiny(every=60.0).plan
    assert paced.id != plan.id
    assert '"every":60.0' in paced.to_json()
    assert Plan.from_json(paced.to_json()).pacing.every == 60.0
    assert tiny(every=np.int64(60)).plan.id == tiny(every=60).plan.id


@pytest.mark.parametrize("every", [0, -1.0, float("inf"), float("nan"), "1 h", True])
def test_a_pace_is_a_number_of_seconds(every: object) -> None:
    with pytest.raises(sumus.PlanError, match=r"Pacing\(every=\)="):
        Pacing(cohort=2, every=every)  # type: ignore[arg-type]


@pytest.mark.parametrize("waits", [True, False], ids=["awake", "in windows"])
@pytest.mark.parametrize("concurrency", [None, 20], ids=["synchronous", "buffered"])
def test_a_rehearsal_and_a_simulation_keep_the_pace(waits: bool, concurrency: int | None) -> None:
    fleet = Fleet(seconds=60, waits=waits)
    pacing = Pacing(cohort=3, concurrency=concurrency, every=1800.0, checkins=1.0)
    report = sumus.rehearse(pacing, fleet, devices=40, days=0.125)
    assert 3 <= report.rounds_a_day * 0.125 <= 6, "three hours, a model each half hour"
