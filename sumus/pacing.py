"""Who takes part in a round, and when: what a plan fixes, and `protocol.round` carries out.

    Pacing(cohort=64, over_select=1.3, deadline=600)       synchronous: a round sums over the first 64 of 84 devices
    Pacing(cohort=10, concurrency=100)                     buffered: 100 devices train, and every 10 reports are a sum
    Pacing(cohort=64, every=86400)                         a round a day, at most

Where `concurrency` is given, devices train on whatever model was newest when they checked in, and a round is a buffer of
reports of any age. [Nguyen et al. 2022, arXiv:2106.06639]  How much a stale one counts is the algorithm's to say
(`sumus.staleness`).
"""

import math
from dataclasses import dataclass, field, fields
from typing import cast

from sumus.errors import PlanError, expect, expect_number
from sumus.spec import UNSAID, record
from sumus.types import hold_plain_numbers


@record("conditions")
@dataclass(frozen=True)
class Conditions:
    """The conditions that a device reports at check-in; in a plan, those that it must meet.

    Attributes:
        charging: Whether the device is on its charger.
        unmetered: Whether its network costs nothing by the byte.
        idle: Whether it is not in use.
        battery: Its charge, 0 to 1.
        version: The version of the client software: an integer that increases with each release.
    """

    charging: bool = False
    unmetered: bool = False
    idle: bool = False
    battery: float = 0.0
    version: int = 0

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        expect_number(self.battery, 0, 1, "Conditions(battery=)")
        expect(self.version, int, "Conditions(version=)")

    def unmet(self, device: "Conditions") -> str | None:
        """The first of these conditions that a device does not meet."""
        if self == _NONE:
            return None
        return next((f.name for f in fields(self) if getattr(device, f.name) < getattr(self, f.name)), None)


_NONE = Conditions()


@record("pacing")
@dataclass(frozen=True)
class Pacing:
    """Who takes part in a round, and when.

    Attributes:
        cohort: How many reports a round sums over; of a buffer, K.
        over_select: Devices to choose for each report that is wanted; reports after the last wanted one are not counted. None is
            1.0 in a simulation, and 1.3 once the plan is made for devices.
        least: The share of the cohort below which a round is abandoned once it is over: at the deadline; without a deadline, when
            all chosen devices have ended.
        deadline: Seconds from a round's opening to its end, whoever is missing; None to wait for everyone. Of a buffer: the
            seconds that a device may take. With a deadline, the place of a device that gives up, or is silent for much longer
            than the work takes, is given to another device (docs/protocol.md, "Places").
        concurrency: Devices that train at once. If it is given, rounds are buffers.
        most_stale: Versions that a report's model may be behind; None for any.
        separation: The least number of models from one contribution of a device to its next: with 5, four models of other sums
            are made in between. A sum that was abandoned makes no model, and ends no device's separation. With 1, a device is in
            each sum at most once. The population must be at least `separation` times the devices that a round is given to, or
            rounds may wait for devices that may not come.
        most_rounds: Contributions of one device in the whole run; None for any number.
        requires: What a device must say of itself at check-in.
        checkins: Check-ins a second that the server is planned for; the retry windows of a large population spread to this rate.
        every: The least number of seconds from the end of a round to the beginning of the next; None for at once, so that rounds
            follow one another as fast as devices train. Of a buffer: the seconds from its opening until devices are given work
            for it; then no more devices work at once than one buffer takes. The first round begins at once.
    """

    cohort: int
    over_select: float | None = None
    least: float = 0.0
    deadline: float | None = None
    concurrency: int | None = None
    most_stale: int | None = None
    separation: int = 1
    most_rounds: int | None = None
    requires: Conditions = Conditions()
    checkins: float = 100.0
    every: float | None = field(default=None, metadata=UNSAID)

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        for name in ("cohort", "concurrency", "separation", "most_rounds"):
            value: int | None = getattr(self, name)
            if value is None and name in ("concurrency", "most_rounds"):
                continue
            expect(value, int, f"Pacing({name}=)")
            if cast(int, value) < 1:
                raise PlanError("positive", f"Pacing({name}={value}): it must be at least 1")
        if self.over_select is not None:
            expect_number(self.over_select, 1, 100, "Pacing(over_select=)")
        expect_number(self.least, 0, 1, "Pacing(least=)")
        expect(self.requires, Conditions, "Pacing(requires=)")
        if self.deadline is not None:
            expect_number(self.deadline, 0, math.inf, "Pacing(deadline=)", open_low=True)
        if self.every is not None:
            expect_number(self.every, 0, math.inf, "Pacing(every=)", open_low=True)
        expect_number(self.checkins, 0, math.inf, "Pacing(checkins=)", open_low=True)
        if self.most_stale is not None:
            expect(self.most_stale, int, "Pacing(most_stale=)")
            expect_number(int(self.most_stale), 0, math.inf, "Pacing(most_stale=)")
        if self.concurrency is None and self.most_stale is not None:
            raise PlanError(
                "pacing-buffer", "most_stale= is of buffers, and synchronous reports are never stale: leave it out"
            )
        if self.concurrency is not None and (self.over_select not in (None, 1.0) or self.least):
            raise PlanError(
                "pacing-buffer",
                "over_select= and least= are of synchronous rounds, and with concurrency= rounds are buffers: leave them out",
            )

    @property
    def buffered(self) -> bool:
        """Whether a sum is over the next reports of any age, not over chosen devices."""
        return self.concurrency is not None

    @property
    def chosen(self) -> int:
        """Devices that a synchronous round is given to."""
        return math.ceil(self.cohort * (self.over_select or 1.0) - 1e-9)

    @property
    def fewest(self) -> int:
        """Reports that a sum must have: below, a round is abandoned, and a buffer waits."""
        return self.cohort if self.buffered else max(1, math.ceil(self.least * self.cohort - 1e-9))
