"""What a fleet did in simulated time: who took part, what was wasted, how the server was reached."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sumus.fleet import DAY, DeviceArrays
from sumus.plotting import figure, save
from sumus.simulator.virtual_time.account import DeviceWork, Played, ServerLoad, Totals, Traffic
from sumus.simulator.virtual_time.fleet_model import RoundDemand
from sumus.types import Array, Floats

CLASSES = 10
"""Speed classes: tenths of the devices, the fastest first."""


@dataclass(frozen=True, eq=False, repr=False)
class FleetReport:
    """What a fleet did in a run.

    Attributes:
        seconds: How long the run took, in simulated seconds.
        rounds: Rounds that ended with a model.
        abandoned: Rounds that ended without one.
        participations: How many reports of each device were counted.
        pace: How long a round's work and transfers take each device, in seconds.
        work: The work of all devices, and why some of it came to nothing.
        load: What the server had to bear.
        traffic: The bytes of all devices.
    """

    seconds: float
    rounds: int
    abandoned: int
    participations: Array
    pace: Floats
    work: DeviceWork
    load: ServerLoad
    traffic: Traffic

    @property
    def rounds_a_day(self) -> float:
        """Models published in a simulated day."""
        return self.rounds * DAY / self.seconds if self.seconds else 0.0

    @property
    def wasted_share(self) -> float:
        """Of all device seconds of work, those in no published sum."""
        return self.work.wasted / max(self.work.useful + self.work.wasted, 1e-300)

    @property
    def idle_share(self) -> float:
        """Of all device time, that in which a device had no work."""
        total = self.seconds * len(self.pace)
        return 1.0 - min(1.0, (self.work.useful + self.work.wasted) / total) if total else 1.0

    @property
    def by_speed(self) -> list[float]:
        """Mean participations of each tenth of the devices, the fastest first: equal if no device is left out."""
        tenths = np.array_split(self.participations[np.argsort(self.pace, kind="stable")], CLASSES)
        return [float(tenth.mean()) for tenth in tenths if len(tenth)]

    @property
    def busiest(self) -> float:
        """Check-ins a second in the busiest minute."""
        return max(self.load.checkins, default=0) / 60

    def to_json(self) -> dict[str, Any]:
        """Give the figures by name, without those of each device."""
        return {
            "seconds": self.seconds,
            "rounds": self.rounds,
            "abandoned": self.abandoned,
            "useful": self.work.useful,
            "wasted": self.work.wasted,
            "reasons": dict(self.work.reasons),
            "planned": self.load.planned,
            "staged": self.load.staged,
            "waited": self.load.waited,
            "bytes_up": self.traffic.up,
            "bytes_down": self.traffic.down,
            "rounds_a_day": self.rounds_a_day,
            "wasted_share": self.wasted_share,
            "idle_share": self.idle_share,
            "by_speed": self.by_speed,
            "busiest": self.busiest,
            "devices": len(self.pace),
            "took_part": int((self.participations > 0).sum()),
        }

    def __repr__(self) -> str:
        return f"FleetReport({self.seconds / DAY:.2f} days, {self.rounds} models, {self.wasted_share:.0%} of the work wasted)"

    def plot(self, path: str | Path) -> Path:
        """Check-ins a second against the plan, and participations by speed (needs matplotlib)."""
        picture = figure(10.0, 3.6)
        left, right = picture.subplots(1, 2)
        rates = np.array(self.load.checkins, np.float64) / 60
        left.plot(np.arange(len(rates)) / 60, rates, linewidth=0.7)
        left.axhline(self.load.planned, color="black", linewidth=0.8, linestyle="--", label="plan")
        left.set(xlabel="hour", ylabel="check-ins a second", ylim=(0, None))
        left.legend(frameon=False)
        right.bar(range(1, len(self.by_speed) + 1), self.by_speed)
        right.set(xlabel="speed class, fastest first", ylabel="participations of a device")
        return save(picture, path)


class Attendance:
    """Who took part in the rounds that are over, and what they cost: what a `FleetReport` is made of."""

    def __init__(self, devices: DeviceArrays, work: RoundDemand, planned: float) -> None:
        self._pace = work.seconds(devices)
        self._participations = np.zeros(len(devices), np.int64)
        self._rounds = self._abandoned = 0
        self._ended, self._totals = 0.0, Totals(load=ServerLoad(planned))

    def note(self, played: Played) -> None:
        """Note that a round is over."""
        self._rounds += played.published
        self._abandoned += not played.published
        self._ended, self._totals = played.ended, played.totals
        if played.published:
            np.add.at(self._participations, [report.position for report in played.counted], 1)

    def report(self, seconds: float | None = None, totals: Totals | None = None) -> FleetReport:
        """Report on the run up to its last round.

        Args:
            seconds: A longer time to report on, in simulated seconds; None for the time until the last round was over.
            totals: What was done in that time.
        """
        totals = totals or self._totals
        return FleetReport(
            seconds=self._ended if seconds is None else seconds,
            rounds=self._rounds,
            abandoned=self._abandoned,
            participations=self._participations.copy(),
            pace=self._pace,
            work=totals.work,
            load=totals.load,
            traffic=totals.traffic,
        )
