"""What becomes of rounds that have closed, in their order; and a defect leaves its traceback in the log."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from sumus.errors import ExperimentError, ParticipantError, PlanError
from sumus.pacing import Pacing
from sumus.protocol.round import CheckIn, State
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.closing import ClosedRounds, Unusable, usable
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.sealed_sums import SealedSums
from sumus.storage.blobs import MemoryBlobs
from sumus.storage.keyring import KeyRing, SealError


class Closing:
    """Buffers of one report, which close as fast as devices report; and what is made of them.

    Attributes:
        fails: Why the model of a round cannot be made, by the round's number.
        said: What became of rounds, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.coordinator = Coordinator(lambda: Circumstances(Pacing(1, concurrency=9), population=9))
        sums = SealedSums(self.coordinator, KeyRing(folder / "keys"), MemoryBlobs())
        self.fails: dict[int, Exception] = {}
        self.said: list[object] = []
        self.closed = ClosedRounds(
            "tiny",
            self.coordinator,
            sums,
            self.conclude,
            self.give_up,
            lambda why: self.said.append(("waits", why)),
            lambda: self.said.append("goes on"),
        )
        self.coordinator.tick(0.0)
        self._devices = 0

    def closes(self) -> int:
        """A device reports, and the buffer closes; its number."""
        number, device = self.coordinator.current.number, f"d{self._devices}"
        self._devices += 1
        self.coordinator.check_in(device, CheckIn(f"{device}/1", 1), 1.0)
        self.coordinator.report(f"{device}/1", 2.0)
        self.coordinator.commit(3.0)
        return number

    def conclude(self, number: int, now: float) -> None:
        if number in self.fails:
            raise self.fails[number]
        self.coordinator.publish(number, now)
        self.said.append(("made", number))

    def give_up(self, number: int, why: str, now: float) -> None:
        self.coordinator.cancel(number, now)
        self.said.append(("given up", number, why))


@pytest.fixture
def it(tmp_path: Path) -> Closing:
    return Closing(tmp_path)


def test_models_are_made_in_the_order_of_their_rounds(it: Closing) -> None:
    numbers = [it.closes() for _ in range(3)]
    it.closed.close_up_to(numbers[1], 4.0)
    assert it.said == [("made", 0), ("made", 1)]
    it.closed.close_up_to(numbers[2], 4.0)
    assert it.said[2:] == [("made", 2)]


def test_rounds_wait_behind_one_that_cannot_be_closed_yet_and_follow_it(it: Closing) -> None:
    for _ in range(2):
        it.closes()
    it.fails[0] = ExperimentError("a blob is missing")
    it.closed.close_up_to(1, 4.0)
    assert it.said == [("waits", "round 0 cannot be closed yet: a blob is missing")]
    assert it.closed.unfinished == [0, 1]
    it.closed.close_up_to(1, 4.0)
    assert it.closed.unfinished == [0, 1], "each waits once"
    it.closed.finish(5.0)
    assert (it.said[-1], it.closed.unfinished) == (it.said[0], [0, 1])
    del it.fails[0]
    it.closed.finish(6.0)
    assert it.said[-3:] == [("made", 0), ("made", 1), "goes on"]


@pytest.mark.parametrize(
    "error", [Unusable("it overflows"), SealError("the ring has no key"), ParticipantError(None, "x")]
)
def test_a_sum_of_which_no_model_can_be_made_is_given_up_at_once(it: Closing, error: Exception) -> None:
    it.fails[it.closes()] = error
    it.closes()
    it.closed.close_up_to(1, 4.0)
    assert it.said == [("given up", 0, str(error)), ("made", 1)]
    row = it.coordinator.round(0)
    assert row is None or row.state is State.ABANDONED


def test_what_is_about_to_end_is_not_tried_again(it: Closing) -> None:
    it.fails[it.closes()] = ExperimentError("the disk is full")
    it.closed.close_up_to(0, 4.0)
    it.closed.forget_unfinished()
    assert (it.closed.unfinished, it.said[-1]) == ([], "goes on")
    it.closed.forget_unfinished()
    assert it.said.count("goes on") == 1


def _broken() -> None:
    raise KeyError("a defect")


def _known() -> None:
    raise PlanError("positive", "the plan divides by nothing")


@pytest.mark.parametrize(
    ("fails", "said", "traceback"),
    [(_broken, "the plan failed with KeyError", True), (_known, "the plan divides by nothing", False)],
)
def test_a_defect_leaves_its_traceback_and_an_error_of_the_plan_does_not(
    caplog: pytest.LogCaptureFixture, fails: Callable[[], None], said: str, traceback: bool
) -> None:
    with caplog.at_level(logging.ERROR, "sumus.server"), pytest.raises(Unusable, match=said), usable():
        fails()
    assert ["_broken" in caplog.text, "Traceback" in caplog.text] == [traceback, traceback]
