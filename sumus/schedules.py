"""Learning-rate schedules: a client's rate by round (counted from 0) and by local step within a round (counted from 1)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from sumus.errors import expect_number, own_code
from sumus.spec import Value, registered


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Schedule(Value):
    """A learning-rate schedule.

    Attributes:
        at: (round, from 0) → the rate of the round.
        within: (local step, from 1 in each round) → the factor on the round's rate; None for a factor of 1.
    """

    at: Callable[[int], float]
    within: Callable[[int], float] | None = None

    def rate(self, round_number: int) -> float:
        """Return the rate of a round.

        Args:
            round_number: The round, counted from 0.

        Raises:
            UsageError: `at` raised an exception, or did not return a finite number of at least 0.
        """
        with own_code("the rate", self, "at must return a number for every round, counted from 0"):
            rate = float(self.at(round_number))
        expect_number(rate, 0, math.inf, f"the learning rate of round {round_number + 1}, by {self!r:.200},")
        return rate

    def factor(self, step: int) -> float:
        """Return the factor on the round's rate in a local step.

        Args:
            step: The local step, counted from 1.

        Raises:
            UsageError: `within` raised an exception, or did not return a finite number of at least 0.
        """
        if self.within is None:
            return 1.0
        with own_code("the rate", self, "within must return a number for every local step, counted from 1"):
            factor = float(self.within(step))
        expect_number(factor, 0, math.inf, f"the factor of local step {step}, by {self!r:.200},")
        return factor


@registered("schedule/constant")
def constant(rate: float) -> Schedule:
    """Use the same rate in every round."""
    expect_number(rate, 0, math.inf, "lr")
    return Schedule(at=lambda round_number: rate)


@registered("schedule/exponential")
def exponential(rate: float, decay: float) -> Schedule:
    """Multiply the rate by `decay` after each round: rate · decay^round, with 0 < decay ≤ 1."""
    expect_number(rate, 0, math.inf, "rate")
    expect_number(decay, 0, 1, "decay", open_low=True)
    return Schedule(at=lambda round_number: rate * decay**round_number)


@registered("schedule/cosine")
def cosine(rate: float, rounds: int, floor: float = 0.0) -> Schedule:
    """Lower the rate along half a cosine, from `rate` to `floor · rate` over `rounds` rounds; then keep that rate. [Loshchilov &
    Hutter 2017, arXiv:1608.03983, eq. 5, without restarts]
    """
    expect_number(rate, 0, math.inf, "rate")
    expect_number(floor, 0, 1, "floor")

    def at(round_number: int) -> float:
        share = min(round_number / max(rounds, 1), 1.0)
        return rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))

    return Schedule(at=at)


@registered("schedule/steps")
def steps(rate: float, boundaries: tuple[int, ...], factor: float = 0.1) -> Schedule:
    """Start with `rate`, and multiply it by `factor` at each of the rounds in `boundaries`."""
    expect_number(rate, 0, math.inf, "rate")
    expect_number(factor, 0, math.inf, "factor")
    return Schedule(at=lambda round_number: rate * factor ** sum(round_number >= edge for edge in boundaries))


@registered("schedule/warmup")
def warmup(rate: float | Schedule, steps: int) -> Schedule:
    """In each round, raise the rate evenly over the first `steps` local steps: rate · min(1, step / steps). [Goyal et
    al. 2017, arXiv:1706.02677, section 2.2, within a round]
    """
    expect_number(steps, 1, math.inf, "steps")
    return _times(as_schedule(rate), lambda step: min(1.0, step / steps))


@registered("schedule/local_decay")
def local_decay(rate: float | Schedule, decay: float) -> Schedule:
    """In each round, multiply the rate by `decay` after each local step, with 0 < decay ≤ 1. The first step has the
    round's rate.
    """
    expect_number(decay, 0, 1, "decay", open_low=True)
    return _times(as_schedule(rate), lambda step: decay ** (step - 1))


def _times(schedule: Schedule, within: Callable[[int], float]) -> Schedule:
    """Return a schedule with one more factor within a round."""
    before = schedule.within
    return Schedule(at=schedule.at, within=within if before is None else lambda step: before(step) * within(step))


def as_schedule(rate: float | Schedule) -> Schedule:
    """Return a schedule unchanged; turn a number into a constant schedule."""
    return rate if isinstance(rate, Schedule) else constant(rate)
