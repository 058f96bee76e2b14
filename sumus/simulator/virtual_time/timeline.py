"""Virtual time: a fleet's devices and a server, both by the protocol's own tables, on a clock that needs no real waiting.

    timeline = Timeline(pacing, fleet, devices, work, seed)
    played = timeline.ended(0)             # runs until round 0 has ended: its reports, their times, wasted work
    timeline.based_on(0)                   # all reports on model 0 that are counted, in this or a later sum

Participation does not depend on the results of training. So the system is simulated by itself, and clients are trained
afterwards, all clients of a model together. Everything random is keyed by the seed, and events of the same moment have a
fixed order. So two runs are the same, event for event.

A timeline consists of these parts:

    clock          events, by the moment at which they are due
    arrivals       devices that ask the server for work: they wait at the server (drawn from the `roster`, which keeps who
                   may take part), or come by themselves (`sleepers`, which holds idle devices in arrays)
    devices        devices that have work, or a report with an unknown outcome; `fleet_model` draws their events
    server, watch  the coordinator of the rounds, on the clock
    account        the sum that each report is in, and the cost of all work
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sumus.errors import ExperimentError
from sumus.fleet import DAY, DeviceArrays, Fleet
from sumus.pacing import Pacing
from sumus.rng import generator
from sumus.simulator.virtual_time.account import Account, CountedReport, Played, Totals
from sumus.simulator.virtual_time.arrivals import Arrivals, CohortDraw, SleepingArrivals, WaitingArrivals
from sumus.simulator.virtual_time.clock import VirtualClock
from sumus.simulator.virtual_time.devices import VirtualDevices
from sumus.simulator.virtual_time.fleet_model import FleetModel, RoundDemand
from sumus.simulator.virtual_time.roster import Roster
from sumus.simulator.virtual_time.server import NO_COST, ServerCost, VirtualServer
from sumus.simulator.virtual_time.sleepers import Sleepers
from sumus.text import many
from sumus.types import Array

_VOID = 10_000
"""A timeline is stuck after this number of consecutive rounds that are abandoned without any time passing."""


class Timeline:
    """The run of a fleet, simulated as far as requested.

    Args:
        pacing: The plan's pacing.
        fleet: The properties of the devices.
        devices: The devices.
        work: The work that a round requires of them.
        seed: The experiment's seed.
        name: Function from a position to its client's id, from which the outcome of its work is drawn. None if no client trains.
        cost: The time that the server takes for its work.
        outages: Periods (from, to), in seconds, in which the server cannot be reached.
        joined: The first round of each device, from 1, int64 `(n,)`; None if all take part from the start.
        in_passes: Whether every device is drawn once before any device is drawn again.
    """

    def __init__(
        self,
        pacing: Pacing,
        fleet: Fleet,
        devices: DeviceArrays,
        work: RoundDemand,
        seed: int,
        name: Callable[[int], Any] | None = None,
        cost: ServerCost = NO_COST,
        outages: Sequence[tuple[float, float]] = (),
        joined: Array | None = None,
        in_passes: bool = False,
    ) -> None:
        count, rng = len(devices), generator(seed, "fleet")
        self._pacing, self._clock, self._account = pacing, VirtualClock(), Account(pacing.checkins)
        self._patience = max(
            7 * DAY, 10 * (pacing.deadline or 0.0), 10 * (pacing.every or 0.0), 100 * float(work.seconds(devices).max())
        )
        self._yielded = 0
        roster = Roster(pacing, devices, joined)
        books = self._account, roster
        model = FleetModel(fleet, devices, work, seed, name, rng)
        sleepers = None if fleet.waits else Sleepers(pacing, devices, rng)
        self._server = VirtualServer(pacing, count, self._clock, books, cost, outages, self._answer)
        self._devices = VirtualDevices(pacing, count, self._clock, model, self._server, books, sleepers)
        self._arrivals: Arrivals
        if sleepers is None:
            draw = CohortDraw(seed, rng, joined, count, in_passes)
            self._arrivals = WaitingArrivals(self._clock, self._server, self._devices, roster, draw, count)
        else:
            self._arrivals = SleepingArrivals(
                self._clock, self._server, self._devices, sleepers, model, self._account.totals
            )

    @property
    def now(self) -> float:
        """The current moment, in simulated seconds."""
        return self._clock.now

    @property
    def totals(self) -> Totals:
        """The cost of the run so far."""
        return self._account.totals

    @property
    def version(self) -> int:
        """The number of models published."""
        return self._server.version

    def ended(self, number: int) -> Played:
        """Run until a round has ended, and return it. Raises ExperimentError if it can never end."""
        while (played := self._account.played(number)) is None:
            if not self._advance() or self._is_stuck():
                raise ExperimentError(self._why_stuck(number))
        return played

    def based_on(self, version: int) -> list[CountedReport]:
        """Run until all devices that were given a published model have ended their work.

        Returns:
            Those of their reports that are in a sum, in the order in which they were counted.
        """
        assert version < self.version, "this model's round is not over"
        while self._account.is_at_work(version) and self._advance() and not self._is_stuck():
            pass
        return self._account.take_based_on(version)

    def until(self, seconds: float) -> Iterator[Played]:
        """Run until a moment, in simulated seconds; yield every round as soon as it has ended."""
        while min(self._clock.next(), self._arrivals.next()) <= seconds and self._advance():
            if self._account.void > _VOID:
                raise ExperimentError(self._why_stuck(self._server.watch.oldest))
            while (played := self._account.take_played(self._yielded)) is not None:
                yield played
                self._yielded += 1
        self._clock.go_to(seconds)

    def _answer(self, session: str, outcome: str) -> None:
        self._devices.answer(session, outcome)

    def _advance(self) -> bool:
        """Process the next event. Returns False if no event is left."""
        arrives, due = self._arrivals.next(), self._clock.next()
        if arrives == due == math.inf:
            return False
        if arrives < due:
            self._arrivals.come(due)
        else:
            self._clock.go_on()
        if self._clock.next() > self._clock.now:  # no event of this moment is left: its model, if any, is published
            self._arrivals.fill()
            self._server.watch.look_at_places()
        return True

    def _is_stuck(self) -> bool:
        """Return whether no report was counted for a very long time, or rounds end without any time passing."""
        return self._account.void > _VOID or self.now - self._account.progressed > self._patience

    def _why_stuck(self, number: int) -> str:
        row, reasons = self._server.current, self.totals.work.reasons.most_common(3)
        why = ", ".join(f"{reason} {many(count, 'time')}" for reason, count in reasons)
        return (
            f"round {number + 1} never ends: {many(row.given, 'place')} were given, {row.counted} of {self._pacing.cohort} "
            "reports are counted, and no other device may come"
            + (f" (work without a counted report: {why})" if why else "")
            + "; lower the cohort, separation= or the fleet's losses, raise most_rounds= or the fleet's online hours, or give a "
            "deadline= to publish the reports that have arrived by then"
        )
