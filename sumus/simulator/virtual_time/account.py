"""The account of a timeline: the sum that holds each report, the outcome of all other work, and the cost of each round."""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from sumus.fleet import MINUTE
from sumus.protocol.round import Round, State
from sumus.types import Floats


@dataclass(frozen=True)
class CountedReport:
    """A report in a sum.

    Attributes:
        position: The client's place in the population.
        again: The number of times that the client had trained on this model before.
        into: The number of the round in which the report is counted.
        staleness: The number of models published since the model with which the client began.
        most_steps: The number of local steps that the client had time for; None for all.
        seconds: The duration of the client's work, in simulated seconds.
    """

    position: int
    again: int
    into: int
    staleness: int
    most_steps: int | None
    seconds: float = 0.0


@dataclass
class DeviceWork:
    """The work of all devices.

    Attributes:
        useful: Device seconds of work that is in a published sum.
        wasted: Device seconds of all other work.
        reasons: The number of check-ins and jobs without a result, by reason.
    """

    useful: float = 0.0
    wasted: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter[str])


@dataclass
class ServerLoad:
    """The load of a server.

    Attributes:
        planned: The number of check-ins per second that the plan expects.
        checkins: The number of check-ins in each minute, by devices that are not waiting at the server.
        staged: The largest number of reports that waited for the same commit.
        waited: The longest wait of a report for its commit, in seconds.
    """

    planned: float = 0.0
    checkins: list[int] = field(default_factory=list[int])
    staged: int = 0
    waited: float = 0.0

    def checked_in(self, moments: Floats) -> None:
        """Count check-ins at these moments, which are in ascending order."""
        first, last = int(moments[0] // MINUTE), int(moments[-1] // MINUTE)
        self.checkins += [0] * (last + 1 - len(self.checkins))
        if first == last:
            self.checkins[first] += len(moments)
            return
        for minute in (moments // MINUTE).astype(np.int64).tolist():
            self.checkins[minute] += 1

    @property
    def rate(self) -> float:
        """Return the check-ins per second over the last five minutes."""
        recent = self.checkins[-5:]
        return sum(recent) / (MINUTE * max(1, len(recent)))


@dataclass
class Traffic:
    """Bytes of all devices together: of their reports (up), and of the data sent to them (down)."""

    up: int = 0
    down: int = 0


@dataclass
class Totals:
    """The cost of a whole run so far, for the devices, the server and the network."""

    work: DeviceWork = field(default_factory=DeviceWork)
    load: ServerLoad = field(default_factory=ServerLoad)
    traffic: Traffic = field(default_factory=Traffic)

    def snapshot(self) -> "Totals":
        """Copy the totals as they are now, without the check-ins per minute."""
        work = replace(self.work, reasons=self.work.reasons.copy())
        return Totals(work, replace(self.load, checkins=list[int]()), replace(self.traffic))


@dataclass
class Played:
    """A round that has ended.

    Attributes:
        number: The round's number, from 0.
        ended: The time of its end, in simulated seconds.
        published: Whether it ended with a model.
        counted: The reports in its sum, even if the sum was abandoned.
        given: The number of devices that were given work for the round.
        dropped: The number of jobs that ended since the previous round without being counted, by reason.
        bytes_up: Bytes of reports since the previous round.
        bytes_down: Bytes sent to devices since the previous round.
        totals: The cost of the run up to the end of the round.
    """

    number: int
    ended: float
    published: bool
    counted: list[CountedReport]
    given: int
    dropped: Counter[str]
    bytes_up: int
    bytes_down: int
    totals: Totals


class Account:
    """Keeps the account of a timeline, round by round.

    Attributes:
        totals: The cost of the whole run so far.
        progressed: The time at which the last report was counted, in simulated seconds.
        void: The number of consecutive rounds that were abandoned without any time passing.
    """

    def __init__(self, planned: float) -> None:
        self.totals = Totals(load=ServerLoad(planned))
        self.progressed, self.void = 0.0, 0
        self._times: tuple[int, Counter[int]] = (-1, Counter())
        self._at_work: Counter[int] = Counter()
        self._counted: dict[int, list[CountedReport]] = {}
        self._by_version: dict[int, list[CountedReport]] = {}
        self._dropped: dict[int, Counter[str]] = {}
        self._played: dict[int, Played] = {}
        self._ended, self._traffic = 0.0, Traffic()

    def times_given(self, who: int, number: int) -> int:
        """Note that a device is given work.

        Args:
            who: The device's position.
            number: The round that the work is for; in asynchronous rounds, the version of the model with which it begins.

        Returns:
            The number of times that the device had been given work of this number before.
        """
        if self._times[0] != number:
            self._times = (number, Counter())
        times = self._times[1]
        times[who] += 1
        return times[who] - 1

    def begin_work(self, version: int, down: int) -> None:
        """Note that a device begins work on a model, and the number of bytes that it receives for this work."""
        self._at_work[version] += 1
        self.totals.traffic.down += down

    def end_work(self, version: int, seconds: float, reason: str | None, number: int) -> None:
        """Note that work on a model has ended.

        Args:
            version: The model with which the work began.
            seconds: The duration of the work.
            reason: The reason why the report is not in a sum; None if it is in one.
            number: The newest round.
        """
        self._at_work[version] -= 1
        if reason is not None:
            self.totals.work.wasted += seconds
            self.totals.work.reasons[reason] += 1
            self._dropped.setdefault(number, Counter())[reason] += 1

    def count(self, report: CountedReport, version: int, now: float) -> None:
        """Note a report that is in a sum. version: the model with which the client's work began."""
        self._counted.setdefault(report.into, []).append(report)
        self._by_version.setdefault(version, []).append(report)
        self.progressed = now

    def close(self, row: Round) -> Played:
        """Note that a round has ended."""
        published = row.state is State.PUBLISHED
        if not published:
            for version, reports in self._by_version.items():
                self._by_version[version] = [report for report in reports if report.into != row.number]
        counted = self._counted.pop(row.number, [])
        worked = sum(report.seconds for report in counted)
        self.totals.work.useful += worked if published else 0.0
        self.totals.work.wasted += 0.0 if published else worked
        self.void = 0 if published or row.since > self._ended else self.void + 1
        traffic, before = replace(self.totals.traffic), self._traffic
        self._played[row.number] = played = Played(
            number=row.number,
            ended=row.since,
            published=published,
            counted=counted,
            given=row.given,
            dropped=self._dropped.pop(row.number, Counter()),
            bytes_up=traffic.up - before.up,
            bytes_down=traffic.down - before.down,
            totals=self.totals.snapshot(),
        )
        self._ended, self._traffic = row.since, traffic
        return played

    def is_at_work(self, version: int) -> bool:
        """Return whether a device still works on a model."""
        return bool(self._at_work[version])

    def played(self, number: int) -> Played | None:
        """Return a round that has ended; None if it has not."""
        return self._played.get(number)

    def take_played(self, number: int) -> Played | None:
        """Return a round that has ended, and forget the round and its reports; None if it has not ended."""
        played = self._played.pop(number, None)
        if played is not None:
            self._by_version.clear()
        return played

    def take_based_on(self, version: int) -> list[CountedReport]:
        """Return the reports on a model, in the order in which they were counted, and forget them."""
        return self._by_version.pop(version, [])
