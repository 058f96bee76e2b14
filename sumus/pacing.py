"""Pacing decides which devices take part in a round, and when. A plan contains it, and `sumus.protocol.round` carries it out.

    Pacing(cohort=64, over_select=1.3, deadline=600)       synchronous: a round sums over the first 64 of 84 devices
    Pacing(cohort=10, concurrency=100)                     buffered: 100 devices train, and every 10 reports are a sum
    Pacing(cohort=64, every=86400)                         at most one round a day

If `concurrency` is given, devices train on the model that was newest when they checked in. A round is then a buffer:
the sum of the next reports, of any age. [Nguyen et al. 2022, arXiv:2106.06639]  The algorithm decides how much a stale
report counts (`sumus.staleness`).
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
    """The conditions that a device reports at check-in or, in a plan, those that it must meet.

    Attributes:
        charging: Whether the device is charging.
        unmetered: Whether its network does not charge per byte.
        idle: Whether nobody is using it.
        battery: Its battery level, 0 to 1.
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
        """Return the first of these conditions that a device does not meet."""
        if self == _NONE:
            return None
        return next((f.name for f in fields(self) if getattr(device, f.name) < getattr(self, f.name)), None)


_NONE = Conditions()


@record("pacing")
@dataclass(frozen=True)
class Pacing:
    """Which devices take part in a round, and when.

    Attributes:
        cohort: The number of reports that a round sums over; for a buffer, K.
        over_select: Devices to choose for each report that is wanted; reports after the last wanted one are not counted. None
            means 1.0 in a simulation, and 1.3 if the plan is made for devices.
        least: The share of the cohort that a round needs; with fewer reports it is abandoned at the deadline or, without a
            deadline, when the sessions of all chosen devices have ended.
        deadline: Seconds from a round's opening until it ends, even if reports are missing; None to wait for all of
            them. For a buffer: the seconds that a device may take. With a deadline, another device gets
            the work of a device that gives up, or is silent for much longer than the work takes (docs/protocol.md, "Places").
        concurrency: The number of devices that train at once. If it is given, rounds are buffers.
        most_stale: The number of versions that a report's model may be behind; None for no limit.
        separation: The smallest number of models from one contribution of a device to its next. With 5, at least four
            models in between come from sums without this device. An abandoned sum makes no model, so it does not count
            here. With 1, a device is in each sum at most once. The population must be at least `separation` times the
            number of devices per round, or rounds may wait for devices that may not come.
        most_rounds: The largest number of contributions of one device in the whole run; None for no limit.
        requires: The conditions that a device must report at check-in.
        checkins: Check-ins per second that the server is planned for; in a large population, the retry windows keep to this rate.
        every: The smallest number of seconds from the end of a round to the beginning of the next; None to begin at once, so that
            rounds follow one another as fast as devices train. For a buffer: the seconds from its opening until devices are
            given work for it; then only as many devices work at once as one buffer takes. The first round begins at once.
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
                "pacing-buffer",
                "most_stale= applies only to buffers, since synchronous reports are never stale: leave it out",
            )
        if self.concurrency is not None and (self.over_select not in (None, 1.0) or self.least):
            raise PlanError(
                "pacing-buffer",
                "over_select= and least= apply only to synchronous rounds, but with concurrency= rounds are "
                "buffers: leave them out",
            )

    @property
    def buffered(self) -> bool:
        """Whether a sum counts the next reports that arrive, of any age, instead of the reports of chosen devices."""
        return self.concurrency is not None

    @property
    def chosen(self) -> int:
        """The number of devices that are chosen for a synchronous round."""
        return math.ceil(self.cohort * (self.over_select or 1.0) - 1e-9)

    @property
    def fewest(self) -> int:
        """The number of reports that a sum must have. With fewer, a round is abandoned, and a buffer waits."""
        return self.cohort if self.buffered else max(1, math.ceil(self.least * self.cohort - 1e-9))
