"""Which clients take part in each round of a run, and when: the timeline of an experiment, and its outcome."""

import functools
from collections.abc import Sequence
from dataclasses import replace

from sumus.rng import generator
from sumus.simulator.prepared import PreparedRun
from sumus.simulator.records import RoundRecord
from sumus.simulator.virtual_time.account import CountedReport, Played
from sumus.simulator.virtual_time.fleet_model import RoundDemand
from sumus.simulator.virtual_time.fleet_report import Attendance, FleetReport
from sumus.simulator.virtual_time.timeline import Timeline
from sumus.simulator.virtual_time.traces import devices_of

_REHEARSED = 100_000
"""The largest population for which rounds are played in advance."""


class Turnout:
    """The timeline of a run (its rounds in simulated time), played up to the current round.

    Args:
        prepared: The experiment.
        broadcast_nbytes: Bytes sent to each client in a round.
    """

    def __init__(self, prepared: PreparedRun, broadcast_nbytes: int) -> None:
        plan, experiment, population = prepared.plan, prepared.experiment, prepared.population
        self._experiment, self._population, self._joined = experiment, population, prepared.joined

        def examples(position: int) -> int:
            return max(1, prepared.sizes.of(population.pick(position)))  # a client that fails is left out later

        @functools.cache
        def mean() -> float:
            return sum(map(examples, range(len(population)))) / len(population)

        rounds = plan.edges.rounds  # each device of a site trains in this many of the site's rounds
        self._work = RoundDemand(
            steps=lambda position: plan.algorithm.client.step_count(examples(position)) * rounds,
            share=lambda position: examples(position) / mean(),
            down=broadcast_nbytes * rounds,
            up=plan.first_hop.nbytes * rounds,
            times=rounds,
        )
        self._devices = devices_of(experiment.fleet, len(population), generator(experiment.seed, "devices"))
        pacing = plan.pacing
        if not pacing.buffered:
            least = min(1.0, plan.algorithm.aggregator.least / pacing.cohort)
            pacing = replace(pacing, least=max(pacing.least, least))
        self._pacing = pacing
        self._timeline = self._new_timeline()
        self._attendance = Attendance(self._devices, self._work, pacing.checkins)

    def play(self, number: int, version: int) -> tuple[Played, list[CountedReport]]:
        """Simulate a round, and then the time until all work on the round's model has ended.

        Args:
            number: The round's number, counted from 0.
            version: The number of models published before the round.

        Returns:
            The round, and the reports on its model that are counted in this or a later sum. If the round published no model,
            there are no such reports.
        """
        played = self._timeline.ended(number)
        return played, self._timeline.based_on(version) if played.published else []

    def note(self, played: Played) -> None:
        """Record that a round has ended and was trained."""
        self._attendance.note(played)

    def relive(self, rounds: Sequence[RoundRecord]) -> None:
        """Simulate again the rounds that were trained in an earlier part of the run."""
        version = 0
        for number in range(len(rounds)):
            played, _ = self.play(number, version)
            self.note(played)
            version += played.published

    def rehearse(self) -> None:
        """Play all rounds without training, if the pacing limits how often a device may take part.

        A run with a target is not rehearsed, since it may end earlier.

        Raises:
            ExperimentError: A round would never end. The user learns this before the first round, not after hours.
        """
        pacing, experiment = self._pacing, self._experiment
        limited = pacing.most_rounds is not None or pacing.separation > 1
        if not limited or experiment.evaluate.target or len(self._population) > _REHEARSED:
            return
        timeline, version = self._new_timeline(), 0
        for number in range(experiment.rounds):
            if timeline.ended(number).published:
                timeline.based_on(version)
                version += 1

    def report(self) -> FleetReport:
        """Report what the fleet did in the rounds so far."""
        return self._attendance.report()

    def _new_timeline(self) -> Timeline:
        return Timeline(
            self._pacing,
            self._experiment.fleet,
            self._devices,
            self._work,
            self._experiment.seed,
            self._population.pick,
            joined=self._joined,
            in_passes=self._population.participation.in_passes,
        )
