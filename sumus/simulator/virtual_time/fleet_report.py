"""What a fleet did in simulated time: who took part, what was wasted, how the server was reached."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sumus.fleet import DAY, DeviceArrays
from sumus.plotting import figure, save
from sumus.simulator.virtual_time.timeline import Played, RoundWork, Totals
from sumus.types import Array, Floats

CLASSES = 10
"""Speed classes: tenths of the devices, the fastest first."""


@dataclass(frozen=True, eq=False, repr=False)
class FleetReport:
    """Figures of a run.

    seconds: simulated.  rounds, abandoned: that ended with a model, and without.  participations: reports counted, of each
    device.  pace: of each device, its seconds for a round's work and transfers.  useful, wasted: device seconds of both, of work
    that was counted, and that was not.  reasons: check-ins and work that came to nothing, by why.
    checkins: in each minute, of devices that come by themselves.  planned: a second.  staged: the most reports that waited for a
    commit at once.  waited: seconds that the last of them waited at most.  bytes_up, bytes_down: of all devices.
    """

    seconds: float
    rounds: int
    abandoned: int
    participations: Array
    pace: Floats
    useful: float
    wasted: float
    reasons: Mapping[str, int]
    checkins: Sequence[int]
    planned: float
    staged: int
    waited: float
    bytes_up: int
    bytes_down: int

    @property
    def rounds_a_day(self) -> float:
        """Models published in a simulated day."""
        return self.rounds * DAY / self.seconds if self.seconds else 0.0

    @property
    def wasted_share(self) -> float:
        """Of all device seconds of work, those in no published sum."""
        return self.wasted / max(self.useful + self.wasted, 1e-300)

    @property
    def idle_share(self) -> float:
        """Of all device time, that in which a device had no work."""
        total = self.seconds * len(self.pace)
        return 1.0 - min(1.0, (self.useful + self.wasted) / total) if total else 1.0

    @property
    def by_speed(self) -> list[float]:
        """Mean participations of each tenth of the devices, the fastest first: equal where nobody is left out."""
        tenths = np.array_split(self.participations[np.argsort(self.pace, kind="stable")], CLASSES)
        return [float(tenth.mean()) for tenth in tenths if len(tenth)]

    @property
    def busiest(self) -> float:
        """Check-ins a second in the busiest minute."""
        return max(self.checkins, default=0) / 60

    def to_json(self) -> dict[str, Any]:
        """The figures, without those of each device."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("participations", "pace", "checkins"):
            del fields[name]
        fields |= {
            name: getattr(self, name) for name in ("rounds_a_day", "wasted_share", "idle_share", "by_speed", "busiest")
        }
        return {
            **fields,
            "devices": len(self.pace),
            "reasons": dict(self.reasons),
            "took_part": int((self.participations > 0).sum()),
        }

    def __repr__(self) -> str:
        return f"FleetReport({self.seconds / DAY:.2f} days, {self.rounds} models, {self.wasted_share:.0%} of the work wasted)"

    def plot(self, path: str | Path) -> Path:
        """Check-ins a second against the plan, and participations by speed (needs matplotlib)."""
        picture = figure(10.0, 3.6)
        left, right = picture.subplots(1, 2)
        rates = np.array(self.checkins, np.float64) / 60
        left.plot(np.arange(len(rates)) / 60, rates, linewidth=0.7)
        left.axhline(self.planned, color="black", linewidth=0.8, linestyle="--", label="plan")
        left.set(xlabel="hour", ylabel="check-ins a second", ylim=(0, None))
        left.legend(frameon=False)
        right.bar(range(1, len(self.by_speed) + 1), self.by_speed)
        right.set(xlabel="speed class, fastest first", ylabel="participations of a device")
        return save(picture, path)


class Attendance:
    """Who took part in the rounds that are over, and what they cost: what a `FleetReport` is made of."""

    def __init__(self, devices: DeviceArrays, work: RoundWork, planned: float) -> None:
        self._pace, self._planned = work.seconds(devices), planned
        self._participations = np.zeros(len(devices), np.int64)
        self._rounds = self._abandoned = 0
        self._last: Played | None = None

    def note(self, played: Played) -> None:
        """A round is over."""
        self._rounds += played.published
        self._abandoned += not played.published
        self._last = played
        if played.published:
            np.add.at(self._participations, [one.position for one in played.counted], 1)

    def report(self, seconds: float | None = None, totals: Totals | None = None) -> FleetReport:
        """The figures up to the last round; of a longer time, if one is given with what was done in it."""
        totals = totals or (self._last.totals if self._last is not None else Totals())
        return FleetReport(
            seconds if seconds is not None else self._last.ended if self._last is not None else 0.0,
            self._rounds,
            self._abandoned,
            self._participations.copy(),
            self._pace,
            totals.useful,
            totals.wasted,
            totals.reasons,
            tuple(totals.checkins),
            self._planned,
            totals.staged,
            totals.waited,
            totals.bytes_up,
            totals.bytes_down,
        )
