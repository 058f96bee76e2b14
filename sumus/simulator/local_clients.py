"""The clients of a simulation in memory: they train in this process, in other processes, or on a cluster."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from sumus.aggregate import Aggregate
from sumus.optimizers import ServerState
from sumus.simulator.checkpoint import Checkpoint
from sumus.simulator.options import Compute
from sumus.simulator.participants import RoundReports
from sumus.simulator.populations.participation import present_at
from sumus.simulator.prepared import PreparedRun
from sumus.simulator.processes.share import ClientJob, ClientResult, Crew, Group, Sums, Trainer, public_seed
from sumus.simulator.records import RoundTally
from sumus.simulator.staffing import staff
from sumus.simulator.surprises import notes_on_lengths
from sumus.simulator.virtual_time.account import CountedReport
from sumus.site import Site
from sumus.storage.client_states import ClientStates
from sumus.types import Broadcast


def _waves(counted: Sequence[CountedReport]) -> Iterator[list[CountedReport]]:
    """Group reports into waves, each of which holds a client at most once.

    If a client trains twice on the same model, its second training begins with the state that it kept after the first.
    """
    for again in range(1 + max((report.again for report in counted), default=0)):
        if wave := [report for report in counted if report.again == again]:
            yield wave


def _part_of(most_steps: int | None, rounds: int) -> int | None:
    """Return the number of steps that a client has time for in each of `rounds` rounds."""
    return None if most_steps is None else -(-most_steps // rounds)


class LocalClients:
    """`Participants` that train on this machine or on a cluster.

    Args:
        prepared: The experiment.
        states: The states that clients keep between rounds.
        compute: The options of their training.
    """

    def __init__(self, prepared: PreparedRun, states: ClientStates, compute: Compute) -> None:
        self._prepared, self._states, self._compute = prepared, states, compute
        self._plan, self._population = prepared.plan, prepared.population
        self._trainer: Trainer = prepared.trainer
        self._crew: Crew = prepared.trainer
        self._how = ""
        self._lengths: list[float] = []

    @property
    def how(self) -> str:
        """A sentence on how clients are trained, and why."""
        return self._how

    def begin(self, at: Checkpoint, left: int) -> str:
        """Decide how clients are trained, and start the processes."""
        staffed = staff(self._prepared, at, self._compute, left)
        self._trainer, self._crew, self._how = staffed.trainer, staffed.crew, staffed.how
        return staffed.executor

    def look_again(self) -> None:
        """Train the first client of each process once more."""
        self._prepared.program.moved |= dict.fromkeys(self._crew.look_again())

    def last_notes(self) -> Iterable[str]:
        """Return notes on the clients that the executor could not train, and on the lengths of their updates."""
        yield from notes_on_lengths(self._plan.algorithm.update, self._lengths)
        if refused := getattr(self._trainer.executor, "refused", None):
            yield f"some clients were trained by autograd: {refused}"

    def close(self) -> None:
        """Stop the processes."""
        self._crew.close()

    def end(self) -> None:
        """Do nothing: `PreparedRun.end` restores the user's code."""

    def play(
        self, counted: Sequence[CountedReport], number: int, state: ServerState, received: RoundReports
    ) -> ServerState:
        """Train the clients of a round, wave by wave, and take the server's step."""
        plan, task, algorithm = self._plan, self._plan.description, self._plan.algorithm
        people = len(present_at(self._prepared.joined, number, len(self._population)))
        public = public_seed(plan, self._prepared.setting.seed, number)
        alone = list[Aggregate]()
        if plan.edges.rounds > 1:
            self._play_through_sites(counted, number, public, state.broadcast, received)
        else:
            for wave in _waves(counted):
                alone += self._reported(wave, number, public, state.broadcast, received)
        if algorithm.aggregator.needs_each_update:
            combined = algorithm.combine_each(alone, task, plan.sums, public, people)
        else:
            combined = algorithm.combine(received.sums[number].total, task, plan.sums, public, people)
        if not combined:  # attackers' reports were refused, and too few are left
            received.tallies.pop(number, None)
            here = {str(self._population.pick(report.position)) for report in counted if report.into == number}
            received.settled.update(dict.fromkeys(here & received.settled.keys(), False))
        return algorithm.step(combined, state, task)

    def _play_through_sites(
        self,
        counted: Sequence[CountedReport],
        number: int,
        public: bytes,
        broadcast: Broadcast,
        received: RoundReports,
    ) -> None:
        """Run each site's rounds among its clients, and add the sum that the site sends up.

        The result of a client is that of the site's last round.
        """
        plan, rounds = self._plan, self._plan.edges.rounds
        for members in self._prepared.edges.grouped(counted).values():
            site, count = Site.of(plan.algorithm, plan.description, plan.sums, public, broadcast), 0
            told = dict[int, RoundTally]()  # the tallies of the site's last round
            for done in range(rounds):
                told.clear()
                own = RoundReports(Sums(), told, received.settled, received.failed)
                wave = [
                    replace(report, again=done, most_steps=_part_of(report.most_steps, rounds))
                    for report in members
                    if str(self._population.pick(report.position)) not in received.failed
                ]
                if wave:
                    self._reported(wave, number, site.seed_now, site.at, own)
                count = count or int(own.sums[number].total.count)
                site = site.after(own.sums[number].total)
            if count:
                received.sums[number].add(site.total(count))
            for into, tally in told.items():
                received.tallies.setdefault(into, RoundTally()).add(tally)

    def _reported(
        self,
        wave: Sequence[CountedReport],
        number: int,
        public: bytes,
        broadcast: Broadcast,
        received: RoundReports,
    ) -> list[Aggregate]:
        """Train clients, each once, and add their reports.

        Returns:
            Their reports as aggregates of one, if the aggregator needs each update; else an empty result.
        """
        alone, results = list[Aggregate](), self._trained(wave, number, public, broadcast, received.sums)
        for report in wave:  # in the order of acceptance, which may differ from the order of training
            result = results[self._population.pick(report.position)]
            received.settled[str(result.client)] = result.became == "counted"
            if result.became == "failed":
                received.failed[str(result.client)] = result.why
            if result.became == "counted":
                tally = received.tallies.setdefault(report.into, RoundTally())
                tally.count(result.examples, result.metrics["loss"], report.staleness)
                alone += [result.alone] if result.alone is not None else []
        return alone

    def _trained(
        self, wave: Sequence[CountedReport], number: int, public: bytes, broadcast: Broadcast, sums: Sums
    ) -> dict[Any, ClientResult]:
        """Train clients, each once; their new states are then pending."""
        results, again = dict[Any, ClientResult](), wave[0].again > 0
        for result in self._crew.train(number, public, broadcast, self._groups(wave), sums):
            if result.state:
                if again:
                    self._states.discarded(str(result.client))  # the state of the earlier wave, which this one replaces
                self._states.propose(str(result.client), result.state)
            results[result.client] = result.settled
            self._prepared.sizes.note(result.client, result.examples)
            self._note(result)
        return results

    def _groups(self, wave: Sequence[CountedReport]) -> Iterator[Group]:
        """Yield groups of clients that train together, in the order in which processes receive them.

        The states of a group's clients are read when the group is requested.
        """
        clients = [self._population.pick(report.position) for report in wave]
        sizes = self._prepared.sizes
        if self._trainer.executor.needs_sizes:
            places = self._trainer.executor.groups(sizes.learn(clients, self._crew))
        else:
            places = [[place] for place in range(len(clients))]
            if self._crew is not self._trainer:  # largest first: no process then waits long for the last one
                places.sort(key=lambda place: -sizes.known(clients[place[0]], math.inf))
        return ([self._job(clients[place], wave[place]) for place in group] for group in places)

    def _job(self, client: Any, report: CountedReport) -> ClientJob:
        kept = self._states.pending(str(client)) if report.again else None
        state = self._states.get(str(client)) if kept is None else kept
        return ClientJob(client, state, report.again, report.most_steps, report.into, report.staleness)

    def _note(self, result: ClientResult) -> None:
        """Add notes for the user about a client's report."""
        plan, notes = self._plan, self._prepared.notes
        self._prepared.program.moved |= dict.fromkeys(result.moved)
        if result.length is not None:
            self._lengths.append(result.length)
        if result.became == "refused":
            notes["some attackers' reports were refused: they were not finite, or exceeded the plan's bound"] = None
        cap = plan.algorithm.update.weight_cap or plan.sums.max_weight
        weighted = any(part.weight == "examples" and part.cap is None for part in plan.algorithm.aggregator.parts)
        if result.became == "counted" and weighted and result.examples > cap:
            notes[f"clients with more than {cap} examples weigh {cap}: raise max_weight of the plan's sums"] = None
