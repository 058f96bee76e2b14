"""The report on a fleet in simulated time: participation, wasted work, and the load of the server."""

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
"""The number of speed classes. Each class holds a tenth of the devices; the fastest class comes first."""


@dataclass(frozen=True, eq=False, repr=False)
class FleetReport:
    """The report on a fleet in a run.

    Attributes:
        seconds: The duration of the run, in simulated seconds.
        rounds: The number of rounds that ended with a model.
        abandoned: The number of rounds that ended without a model.
        participations: The number of counted reports of each device.
        pace: The seconds that a round's work and transfers take on each device.
        work: The work of all devices, and the reasons why some of it was wasted.
        load: The load of the server.
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
        """The number of models published per simulated day."""
        return self.rounds * DAY / self.seconds if self.seconds else 0.0

    @property
    def wasted_share(self) -> float:
        """The share of the devices' working time whose result is not in a published sum."""
        return self.work.wasted / max(self.work.useful + self.work.wasted, 1e-300)

    @property
    def idle_share(self) -> float:
        """The share of all device time in which a device had no work."""
        total = self.seconds * len(self.pace)
        return 1.0 - min(1.0, (self.work.useful + self.work.wasted) / total) if total else 1.0

    @property
    def by_speed(self) -> list[float]:
        """The mean number of participations per device in each speed class, the fastest class first.

        If the numbers are equal, slow devices take part as often as fast ones.
        """
        tenths = np.array_split(self.participations[np.argsort(self.pace, kind="stable")], CLASSES)
        return [float(tenth.mean()) for tenth in tenths if len(tenth)]

    @property
    def busiest(self) -> float:
        """The check-ins per second in the busiest minute."""
        return max(self.load.checkins, default=0) / 60

    def to_json(self) -> dict[str, Any]:
        """Return the totals by name, without the values of single devices."""
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
        """Draw the check-ins per second against the plan, and the participations by speed (needs matplotlib)."""
        picture = figure(10.0, 3.6)
        left, right = picture.subplots(1, 2)
        rates = np.array(self.load.checkins, np.float64) / 60
        left.plot(np.arange(len(rates)) / 60, rates, linewidth=0.7)
        left.axhline(self.load.planned, color="black", linewidth=0.8, linestyle="--", label="plan")
        left.set(xlabel="hour", ylabel="check-ins per second", ylim=(0, None))
        left.legend(frameon=False)
        right.bar(range(1, len(self.by_speed) + 1), self.by_speed)
        right.set(xlabel="speed class, fastest first", ylabel="participations per device")
        return save(picture, path)


class Attendance:
    """Collects the participation in the rounds that have ended, and their cost, for a `FleetReport`."""

    def __init__(self, devices: DeviceArrays, work: RoundDemand, planned: float) -> None:
        self._pace = work.seconds(devices)
        self._participations = np.zeros(len(devices), np.int64)
        self._rounds = self._abandoned = 0
        self._ended, self._totals = 0.0, Totals(load=ServerLoad(planned))

    def note(self, played: Played) -> None:
        """Note that a round has ended."""
        self._rounds += played.published
        self._abandoned += not played.published
        self._ended, self._totals = played.ended, played.totals
        if played.published:
            np.add.at(self._participations, [report.position for report in played.counted], 1)

    def report(self, seconds: float | None = None, totals: Totals | None = None) -> FleetReport:
        """Report on the run up to its last round.

        Args:
            seconds: The time to report on, in simulated seconds; None for the time until the end of the last round.
            totals: The totals up to that time; None for those at the end of the last round.
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
