"""The simulator: every client of a round on this machine or on a cluster, the same algebra as everywhere else.

for each round:   who is in its sum, and when (`timeline`) → train all whose reports on this model are ever counted
                  finish the round's sum → the next model → evaluate → settle client states, remember
"""

import functools
import math
import time
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from sumus.aggregate import Aggregate
from sumus.errors import DataError, ExperimentError, Interrupted, SumusError, TaskError, at_client, own_code
from sumus.executors.choice import AUTOGRAD, ExecutorChoice, ExecutorChosen, RunLength, checked, choose, processes
from sumus.executors.executor import ClientAssignment
from sumus.executors.recall import recall_of_this_user
from sumus.executors.witness import examples_of, notes_of
from sumus.experiment import Experiment
from sumus.interrupt import undisturbed, whole
from sumus.optimizers import ServerState
from sumus.rng import generator, key
from sumus.simulator.after_round import AfterRound, RoundListener, RoundOutcome
from sumus.simulator.checkpoint import Checkpoint
from sumus.simulator.evaluation import MOST_NOTES, Evaluation
from sumus.simulator.history import BestModel, History, RoundRecord, RoundTally, failures_of
from sumus.simulator.populations.participation import joined_of, present_at
from sumus.simulator.populations.population import as_population
from sumus.simulator.processes.crew import crew_of, described
from sumus.simulator.processes.share import ClientJob, ClientResult, Crew, Group, RunSetting, Sums, Trainer, public_seed
from sumus.simulator.progress import Progress, ProgressFile, Show
from sumus.simulator.stopping import Stopping
from sumus.simulator.virtual_time.fleet_report import Attendance
from sumus.simulator.virtual_time.timeline import CountedReport, Played, RoundWork, Timeline
from sumus.simulator.virtual_time.traces import devices_of, trace_digest
from sumus.site import Site
from sumus.spec import canonical_json, to_json
from sumus.storage.client_states import ClientStates
from sumus.task import Task
from sumus.training.observed import expect_means, observe
from sumus.training.program import EVALUATION_BATCH, Program
from sumus.tree import nbytes, sha256
from sumus.types import Broadcast, Tree
from sumus.work import ClientState

_PROBED = 8
"""Examples that are measured together and apart, to see whether a loss or a metric compares them with one another."""
_REHEARSED = 100_000
"""Clients beyond which rounds are not played in advance."""


def _waves(counted: Sequence[CountedReport]) -> Iterator[list[CountedReport]]:
    """Each client at most once in a wave: who has work on one model twice begins with what was kept of the first."""
    for again in range(1 + max((one.again for one in counted), default=0)):
        if wave := [one for one in counted if one.again == again]:
            yield wave


def _part_of(most_steps: int | None, rounds: int) -> int | None:
    """What a client has time for in each of so many rounds."""
    return None if most_steps is None else -(-most_steps // rounds)


def _writable(out: Path | None) -> Path | None:
    """The folder, made; or an error now rather than after the first rounds."""
    if out is None:
        return None
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise ExperimentError(f"nothing can be written to {out}: {error.strerror}; give another folder") from error
    return out


@dataclass(frozen=True)
class RoundReports:
    """What clients have reported while a round is played. sums, tallies: of rounds, by number.  settled: for each client that
    trained, whether what it keeps is to be kept.  failed: clients whose part failed, each with why."""

    sums: Sums
    tallies: dict[int, RoundTally]
    settled: dict[str, bool]
    failed: dict[str, str] = field(default_factory=dict[str, str])


class Simulation:
    """One run: its model, its people, and where it stands (`self.at`, replaced once a round, as a whole)."""

    def __init__(
        self,
        experiment: Experiment,
        device: str,
        out: Path | None,
        restart: bool,
        states: ClientStates,
        skips: bool = False,
    ) -> None:
        task = experiment.plan.task
        if not isinstance(task, Task):
            raise ExperimentError(
                "this plan holds a task's description without its code; simulate the file it came from"
            )
        self.experiment = experiment
        self.population = as_population(experiment.population)
        self.program = Program(task, device, experiment.seed)
        self.skips = skips
        self.first, examples = self._first_readable()  # tried before anything long begins
        first = self.population.pick(self.first)
        data = self.program.learn_schema(first, *examples)
        with at_client(first):
            expect_means(self.program, *examples)
        self.plan = experiment.plan.with_data(data)
        self.task = self.plan.description
        self.joined = joined_of(self.population, experiment)
        self.setting = RunSetting(self.plan, self.population, experiment.seed, AUTOGRAD.executor, skips, self.first)
        self.trainer = Trainer(self.setting, self.program)
        self.crew: Crew = self.trainer
        self.how = ""
        self.sizes: dict[Any, int] = {}
        self.out = _writable(out)
        self.again = "run the same again, without restart," if restart else "run the same again"
        self.notes: dict[str, None] = dict.fromkeys(self._first_notes(first, *examples))
        self.states = states
        identity = {
            "plan": self.plan.id,
            "seed": experiment.seed,
            "population": self.population.described,
            "fleet": canonical_json(to_json(replace(experiment.fleet, trace=None))) + trace_digest(experiment.fleet),
        }
        if experiment.sites:
            identity["sites"] = key(*(str(self._site(at)) for at in range(len(self.population)))).hex()
        self.at = Checkpoint(identity, self.plan.algorithm.start(self.program.initial_shared, self.task))
        self.timeline = self._timeline()
        there = present_at(self.joined, 0, len(self.population))
        self.evaluation = Evaluation(experiment.evaluate, self.population, self.program, experiment.seed, there)
        self.stopping = Stopping(experiment.evaluate, self.evaluation.is_lower_better)
        self.stopping.check_names(self.evaluation.figures)
        earlier = Checkpoint.read(out) if out is not None and not restart else None
        if earlier is not None and out is not None and earlier.rounds:
            earlier.check_same(identity, out, experiment.rounds)
            with_keys = self.evaluation.with_keys
            start = None if earlier.start is None else with_keys(earlier.start)
            self.at = self._with_same_best(
                replace(earlier, start=start, rounds=list(map(with_keys, earlier.rounds))), out
            )
        elif not self.states.empty and not restart:
            raise ExperimentError(
                "client_states= holds the states of another run, or of one that was cut off before its first checkpoint: "
                "give an empty store, or restart=True (--restart) to delete them"
            )
        self._relive(self.at.rounds)
        self.states.restore(self.at.clients)  # last: whatever can be wrong was found before states are forgotten

    def run(
        self,
        checkpoint_every: int,
        progress: Progress,
        executor: ExecutorChoice | None,
        workers: int | str | None,
        insecure: bool,
        after_round: AfterRound | None = None,
    ) -> History:
        """All rounds that are left."""
        listener, self._stopped = RoundListener(after_round), ""
        try:
            self._rehearse()
            self._look()
            with progress.watching(self.experiment, self.done) as show:
                self._staff(executor, workers, insecure)
                with closing(self.crew):
                    self._rounds(checkpoint_every, show, listener)
                    self._look_again()
            history = self._history(self._stopped or self._why_over() or "rounds")
            if self.out is not None:
                self._write(self._checkpoint())
                history.write(self.out)
                ProgressFile(self.out, self.experiment.rounds).note(self.at.rounds, history.stopped)
            return history
        except KeyboardInterrupt:
            with undisturbed():
                checkpoint = self._checkpoint()
                kept = f", kept in {self.out}: {self.again} to go on" if self._write(checkpoint) else ""
                ProgressFile(self.out, self.experiment.rounds).note(self.at.rounds, "interrupted")
                message = f"stopped after round {self.done} of {self.experiment.rounds}{kept}"
                raise Interrupted(message, self._history("interrupted"), checkpoint) from None
        except Exception as error:
            with undisturbed():
                checkpoint = self._checkpoint()
                with suppress(SumusError, AttributeError):  # no model to release, no attributes
                    vars(error).update(history=self._history("error"), checkpoint=checkpoint)
                self._write(checkpoint)
                ProgressFile(self.out, self.experiment.rounds).note(self.at.rounds, "error")
            raise

    def _first_notes(self, client: Any, inputs: Any, targets: Any) -> Iterator[str]:
        """What the first client's examples show that the user should know."""
        if not self.program.reader.reads_alike(self.population, client):
            self.program.moved[examples_of(client)] = None
        evaluate = self.experiment.evaluate
        measures = evaluate.central is not None or evaluate.unseen is not None or evaluate.seen
        few = slice(0, _PROBED)
        if measures and evaluate.batch_size is None and self.program.depends_on_batch(inputs[few], targets[few]):
            yield (
                "the loss or a metric compares the examples of a batch with one another: training takes batches of "
                f"{self.experiment.plan.algorithm.client.batch_size or 'all examples'}, and evaluation batches of "
                f"{EVALUATION_BATCH}: give Evaluate(batch_size=) to measure as in training; if it is not meant to, look whether "
                "outputs and targets have one shape"
            )

    def _look(self) -> None:
        """Try the model on the first client's examples as in training: what no run could do rightly is refused before the first
        round."""
        client = self.population.pick(self.first)
        with at_client(client):
            if self.program.observed is None:
                self.program.observed = observe(self.program, *self.program.reader.read(self.population, client))

    def _staff(self, wanted: ExecutorChoice | None, workers: int | str | None, insecure: bool) -> None:
        """Decide how clients are trained, and by how many processes, and start these."""
        work, broadcast = self.plan.algorithm.client, self.at.state.broadcast
        cohort = 1 if self.plan.algorithm.aggregator.one_by_one else self.plan.pacing.cohort
        run = RunLength.of(self.program, work, *self._tried(1, 1), clients=self._left)
        if wanted == AUTOGRAD:
            chosen = ExecutorChosen(AUTOGRAD, "as asked for")
        elif wanted is not None:
            chosen = checked(wanted, self.program, work, self._tried(cohort, 4), broadcast)
        elif self.at.executor:
            chosen = ExecutorChosen(ExecutorChoice.parse(self.at.executor), "as in the rounds before")
        else:
            several = partial(self._tried, cohort)
            chosen = choose(self.program, work, several, broadcast, run, recall_of_this_user())
        if self.at.executor not in ("", str(chosen.choice)):
            self.notes[f"the rounds before were trained by {self.at.executor}, these by {chosen.choice}"] = None
        if wanted not in (None, chosen.choice):
            self.notes[f"trained by {chosen.choice}, {chosen.reason}"] = None
        self.at = replace(self.at, executor=str(chosen.choice))
        count = workers or processes(run.seconds_with(chosen), cohort, self.program.device.type)
        count = (
            min(count, self.plan.pacing.cohort) if isinstance(count, int) else count
        )  # more would have nothing to do
        clients = self._left // count if isinstance(count, int) else 0
        self.setting = replace(self.setting, executor=chosen.choice.executor, clients=clients)
        self.trainer = Trainer(self.setting, self.program)
        self.crew, alone = crew_of(self.trainer, self.setting, count, insecure)
        if alone:
            self.notes[alone] = None
        self.how = f"{chosen.choice} {described(1 if alone else count)}: {chosen.reason}"

    def end(self) -> None:
        """Leave the user's code as it was before the run."""
        with suppress(TaskError):  # said in the run
            self.program.end()

    @property
    def _left(self) -> int:
        """How often a client is still to train."""
        return (self.experiment.rounds - self.done) * self.plan.pacing.cohort

    def _tried(self, cohort: int, most: int) -> list[ClientAssignment]:
        """The first clients as they would train, to try executors on; one whose examples cannot be read is left out."""
        tried: list[ClientAssignment] = []
        last = min(self.first + min(cohort, most), len(self.population))
        for client in (self.population.pick(index) for index in range(self.first, last)):
            with suppress(DataError):  # the round that picks it will say so
                examples = self.program.reader.read(self.population, client)
                tried.append(ClientAssignment(client, *examples, {}, key("tried", client)))
        return tried

    def _rounds(self, checkpoint_every: int, show: Show, listener: RoundListener) -> None:
        """Play them, keep what there is now and then, and tell the user's function of each."""
        saved, standing = self.done, ProgressFile(self.out, self.experiment.rounds)
        if self.experiment.evaluate.first and self.at.start is None:
            self._measure_start()
            if self._is_told_to_stop(listener):
                return
        while self.done < self.experiment.rounds and not self._why_over():
            self._round(self.done, self.at)
            show(self.at.rounds[-1])
            standing.note(self.at.rounds)
            if self.done - saved >= checkpoint_every:
                self._write(self._checkpoint())
                saved = self.done
            if self._is_told_to_stop(listener):
                return

    def _look_again(self) -> None:
        """See whether the first clients still give what they gave (`sumus.executors.witness`)."""
        self.program.moved |= dict.fromkeys(self.crew.look_again())

    def _is_told_to_stop(self, listener: RoundListener) -> bool:
        """Tell the user's function of the last round; whether it ends the run."""
        state = self.at.state
        record = self.at.rounds[-1] if self.at.rounds else self.at.start
        assert record is not None
        is_best = self.at.best is not None and self.at.best.round == record.round
        outcome = RoundOutcome(record, is_best, lambda: self.program.state_dict(self._published(state)))
        if listener.wants_to_stop(outcome):
            self._stopped = "after_round"
        if len(self.experiment.population) != len(self.population):
            raise ExperimentError(
                f"the population has grown from {len(self.population)} clients to {len(self.experiment.population)} during the "
                "run: give all of them from the start, and say who comes later: population.joining({client: round})"
            )
        return bool(self._stopped)

    def _why_over(self) -> str | None:
        """Why the run ends before its last round, if it does."""
        return self.stopping.why(self.at.rounds, self.at.best)

    def _measure_start(self) -> None:
        """Measure the model before round 1, as a record of round 0; the same also where a run is taken up later."""
        began = time.perf_counter()
        state = self.plan.algorithm.start(self.program.initial_shared, self.task)
        evaluations, spreads = self.evaluation.measure(self._published(state), lambda client: {})
        record = RoundRecord(
            round=0,
            clients=0,
            examples=0,
            loss=math.nan,
            metrics=next(iter(evaluations.values())),
            bytes_up=0,
            bytes_down=0,
            seconds=time.perf_counter() - began,
            evaluations=evaluations,
            spreads=spreads,
        )
        at = replace(self.at, start=record)
        self.at = at if self.done else self._with_best(at, record)

    def _with_best(self, at: Checkpoint, record: RoundRecord) -> Checkpoint:
        """The same, with the model of its last record kept if that is the best so far."""
        if self.stopping.is_due(record) and self.stopping.improves(record, at.best):
            return replace(at, best=self.stopping.kept(record, self._published(at.state)))
        return at

    def _with_same_best(self, earlier: Checkpoint, out: Path) -> Checkpoint:
        """An earlier part of the run, if it kept the best model by the same metric, or none is wanted."""
        wanted = self.experiment.evaluate.best
        if wanted is None:
            return replace(earlier, best=None)
        if earlier.best is not None and earlier.best.metric != wanted:
            raise ExperimentError(
                f"{out} holds a run that keeps the best model by {earlier.best.metric!r}, and not by {wanted!r}: give "
                f"Evaluate(best={earlier.best.metric!r}), another folder, or restart=True (--restart) to start over there"
            )
        if earlier.best is None and any(self.stopping.is_due(record) for record in earlier.rounds):
            self.notes[f"the best model is the best since round {len(earlier.rounds) + 1}: none was kept before"] = None
        return earlier

    def _first_readable(self) -> tuple[int, tuple[Any, Any]]:
        """The first client, and its examples; where failures are left out, the first one whose examples can be read."""
        for position in range(len(self.population)):
            try:
                return position, self.program.reader.read(self.population, self.population.pick(position))
            except DataError:
                if not self.skips or position + 1 == len(self.population):
                    raise
        raise AssertionError("a population has clients")

    @property
    def done(self) -> int:
        """Whole rounds so far."""
        return len(self.at.rounds)

    def _timeline(self) -> Timeline:
        """Who will take part, and when."""
        experiment, population = self.experiment, self.population

        def examples(position: int) -> int:
            client = population.pick(position)
            if client not in self.sizes:
                (self.sizes[client],) = self.trainer.sizes([client])
            return max(1, self.sizes[client])  # one that fails is left out later

        @functools.cache
        def mean() -> float:
            return sum(map(examples, range(len(population)))) / len(population)

        rounds = self.plan.edges.rounds  # a site's devices have that many times the work
        up, down = self.plan.first_hop.nbytes, self._broadcast_bytes(self.at.state)
        work = RoundWork(
            lambda position: self.plan.algorithm.client.step_count(examples(position)) * rounds,
            lambda position: examples(position) / mean(),
            down * rounds,
            up * rounds,
            rounds,
        )
        devices = devices_of(experiment.fleet, len(population), generator(experiment.seed, "devices"))
        pacing, least = self.plan.pacing, self.plan.algorithm.aggregator.least
        if not pacing.buffered:
            pacing = replace(pacing, least=max(pacing.least, min(1.0, least / pacing.cohort)))
        self.attendance = Attendance(devices, work, pacing.checkins)
        in_passes = population.participation.in_passes
        seed, name = experiment.seed, population.pick
        return Timeline(pacing, experiment.fleet, devices, work, seed, name, joined=self.joined, in_passes=in_passes)

    def _rehearse(self) -> None:
        """Play all rounds without training, if devices may be asked only so often: an ExperimentError for a round that never ends
        comes before the first one. A run with a target may end earlier, and is not played."""
        pacing, experiment = self.plan.pacing, self.experiment
        limited = pacing.most_rounds is not None or pacing.separation > 1
        if not limited or experiment.evaluate.target or len(self.population) > _REHEARSED:
            return
        timeline, version = self._timeline(), 0
        for number in range(experiment.rounds):
            if timeline.ended(number).published:
                timeline.based_on(version)
                version += 1

    def _relive(self, rounds: Sequence[RoundRecord]) -> None:
        """Let the timeline go to where the run stands."""
        version = 0
        for number in range(len(rounds)):
            self.attendance.note(played := self.timeline.ended(number))
            if played.published:
                self.timeline.based_on(version)
                version += 1

    @staticmethod
    def _broadcast_bytes(state: ServerState) -> int:
        return sum(nbytes(tree) for tree in state.broadcast.values())

    def _round(self, number: int, at: Checkpoint) -> None:
        """Round `number`, counted from 0, from where the run stood before it; then `self.at` is where it stands after."""
        began = time.perf_counter()
        played = self.timeline.ended(number)
        counted = self.timeline.based_on(at.version) if played.published else []
        settled: dict[str, bool] = {}
        try:
            after = self._played(counted, played, began, at, settled)
        except BaseException:
            with undisturbed():
                for one in counted:
                    self.states.discarded(str(self.population.pick(one.position)))
            raise
        with whole():
            for client, yes in settled.items():
                (self.states.counted if yes else self.states.discarded)(client)
            self.attendance.note(played)
            self.at = after

    def _played(
        self, counted: list[CountedReport], played: Played, began: float, at: Checkpoint, settled: dict[str, bool]
    ) -> Checkpoint:
        """Train, sum, step, evaluate. settled: for each client that trained, whether what it keeps is to be kept."""
        state, pending = at.state, Sums()
        tallies = {number: tally.copy() for number, tally in at.tallies.items()}
        pending.add(at.pending)
        received = RoundReports(pending, tallies, settled)
        if self.plan.algorithm.aggregator.one_by_one:  # the model travels
            places = {self.population.pick(one.position): one for one in counted}
            for client in self.population.in_order(list(places)):
                state = self._sum_and_step([places[client]], played.number, state, replace(received, sums=Sums()))
        elif played.published:
            state = self._sum_and_step(counted, played.number, state, received)
        self._expect_some(received, played.number)
        tally = tallies.pop(played.number, RoundTally())
        loss = tally.loss / tally.seen if tally.clients else math.nan
        evaluations, spreads = self._evaluate(played.number, state, settled)
        failed, reasons = received.failed, played.dropped.copy()
        if failed:
            reasons["failed"] = len(failed)
        record = RoundRecord(
            round=played.number + 1,
            clients=tally.clients,
            dropped=sum(reasons.values()) if self.plan.pacing.buffered else played.given - tally.clients,
            examples=tally.examples,
            loss=loss,
            metrics=next(iter(evaluations.values()), {} if self.evaluation.wanted else {"loss": loss}),
            bytes_up=played.bytes_up,
            bytes_down=played.bytes_down,
            bytes_above=self._bytes_above(counted),
            seconds=time.perf_counter() - began,
            at=played.ended,
            staleness=dict(sorted(tally.staleness.items())),
            reasons=dict(sorted(reasons.items())),
            evaluations=evaluations,
            spreads=spreads,
            failed=failed,
        )
        pending.pop(played.number, None)
        after = replace(
            at,
            state=state,
            version=at.version + played.published,
            pending=pending.totals,
            tallies=tallies,
            rounds=(*at.rounds, record),
        )
        return self._with_best(after, record)

    @staticmethod
    def _expect_some(received: RoundReports, number: int) -> None:
        """Refuse a round in which the part of everyone who trained failed: there is more wrong than one client."""
        if received.failed and not any(received.settled.values()):
            client, why = next(iter(received.failed.items()))
            raise ExperimentError(
                f"the part of all {len(received.failed)} clients of round {number + 1} failed, so that leaving them out leaves "
                f"nobody; the first of them, {client}: {why}"
            )

    def _sum_and_step(
        self,
        counted: Sequence[CountedReport],
        number: int,
        state: ServerState,
        received: RoundReports,
    ) -> ServerState:
        """Let clients train from a state, add what they report to the sums that it is counted in, take the step of one."""
        algorithm, people = self.plan.algorithm, len(present_at(self.joined, number, len(self.population)))
        public = public_seed(self.plan, self.experiment.seed, number)
        alone = list[Aggregate]()
        if self.plan.edges.rounds > 1:
            self._through_sites(counted, number, public, state.broadcast, received)
        else:
            for wave in _waves(counted):
                alone += self._reported(wave, number, public, state.broadcast, received)
        if algorithm.aggregator.needs_each_update:
            combined = algorithm.combine_each(alone, self.task, self.plan.sums, public, people)
        else:
            combined = algorithm.combine(received.sums[number].total, self.task, self.plan.sums, public, people)
        if not combined:  # attackers' reports were refused, and too few are left
            received.tallies.pop(number, None)
            here = {str(self.population.pick(one.position)) for one in counted if one.into == number}
            received.settled.update(dict.fromkeys(here & received.settled.keys(), False))
        return algorithm.step(combined, state, self.task)

    def _through_sites(
        self,
        counted: Sequence[CountedReport],
        number: int,
        public: bytes,
        broadcast: Broadcast,
        received: RoundReports,
    ) -> None:
        """Let each site's clients do its rounds among themselves, and add what it sends up. Its last round is what is told of."""
        rounds = self.plan.edges.rounds
        for members in self._by_site(counted).values():
            site, count = Site.of(self.plan.algorithm, self.task, self.plan.sums, public, broadcast), 0
            told = dict[int, RoundTally]()  # of the last round
            for done in range(rounds):
                told.clear()
                own = RoundReports(Sums(), told, received.settled, received.failed)
                wave = [
                    replace(one, again=done, most_steps=_part_of(one.most_steps, rounds))
                    for one in members
                    if str(self.population.pick(one.position)) not in received.failed
                ]
                if wave:
                    self._reported(wave, number, site.seed_now, site.at, own)
                count = count or int(own.sums[number].total.count)
                site = site.after(own.sums[number].total)
            if count:
                received.sums[number].add(site.total(count))
            for into, tally in told.items():
                received.tallies.setdefault(into, RoundTally()).add(tally)

    def _by_site(self, counted: Sequence[CountedReport]) -> Mapping[tuple[Hashable, int], list[CountedReport]]:
        """Whose reports come through which edge, and into which sum."""
        found = defaultdict[tuple[Hashable, int], list[CountedReport]](list)
        for one in counted:
            found[self._site(one.position), one.into].append(one)
        return found

    def _site(self, position: int) -> Hashable:
        """The edge of the client at this place of the population."""
        sites = self.experiment.sites
        if callable(sites):
            client = self.population.pick(position)
            with (
                at_client(client),
                own_code("the function", "sites=", "it must give a site, which can be a key, for every client"),
            ):
                site = sites(client)
                hash(site)
            return site
        return position * sites // len(self.population)

    def _bytes_above(self, counted: Sequence[CountedReport]) -> int:
        if not self.experiment.sites:
            return 0
        return sum(self.plan.first_hop.sum_nbytes(len(members)) for members in self._by_site(counted).values())

    def _reported(
        self,
        wave: Sequence[CountedReport],
        number: int,
        public: bytes,
        broadcast: Broadcast,
        received: RoundReports,
    ) -> list[Aggregate]:
        """Let clients train, each once, and report; aggregates of one, where they are needed apart."""
        alone, results = list[Aggregate](), self._trained(wave, number, public, broadcast, received.sums)
        for one in wave:  # in the order in which they were accepted, whoever was trained first
            result = results[self.population.pick(one.position)]
            received.settled[str(result.client)] = result.became == "counted"
            if result.became == "failed":
                received.failed[str(result.client)] = result.why
            if result.became == "counted":
                tally = received.tallies.setdefault(one.into, RoundTally())
                tally.count(result.examples, result.metrics["loss"], one.staleness)
                alone += [result.alone] if result.alone is not None else []
        return alone

    def _trained(
        self, wave: Sequence[CountedReport], number: int, public: bytes, broadcast: Broadcast, sums: Sums
    ) -> dict[Any, ClientResult]:
        """Train clients, each once; what they keep is pending."""
        results, again = dict[Any, ClientResult](), wave[0].again > 0
        for result in self.crew.train(number, public, broadcast, self._groups(wave), sums):
            if result.state:
                if again:
                    self.states.discarded(str(result.client))  # of the wave before: this is what came after it
                self.states.propose(str(result.client), result.state)
            results[result.client] = result.settled
            self.sizes[result.client] = result.examples
            self._note(result)
        return results

    def _groups(self, wave: Sequence[CountedReport]) -> Iterator[Group]:
        """Who trains together, and what they kept, in the order to deal them; a group's states are read as it is asked for."""
        clients = [self.population.pick(one.position) for one in wave]
        if self.trainer.executor.needs_sizes:
            unknown = [client for client in clients if client not in self.sizes]
            self.sizes |= zip(unknown, self.crew.sizes(unknown), strict=True)
            places = self.trainer.executor.groups([self.sizes[client] for client in clients])
        else:
            places = [[place] for place in range(len(clients))]
            if self.crew is not self.trainer:  # the largest first, so that at the end nobody waits long for the last
                places.sort(key=lambda place: -self.sizes.get(clients[place[0]], math.inf))
        return ([self._errand(clients[place], wave[place]) for place in group] for group in places)

    def _errand(self, client: Any, one: CountedReport) -> ClientJob:
        kept = self.states.pending(str(client)) if one.again else None
        state = self.states.get(str(client)) if kept is None else kept
        return ClientJob(client, state, one.again, one.most_steps, one.into, one.staleness)

    def _evaluate(self, number: int, state: ServerState, settled: Mapping[str, bool]) -> tuple[Any, Any]:
        """What there is to measure after this round, each client with the state that it will have."""

        def state_of(client: str) -> ClientState:
            pending = self.states.pending(client) if settled.get(client) else None
            return self.states.get(client) if pending is None else pending

        if (number + 1) % self.experiment.evaluate.every and number + 1 != self.experiment.rounds:
            return {}, {}
        return self.evaluation.measure(self._published(state), state_of)

    def _note(self, result: ClientResult) -> None:
        """What the user should know of a client's report."""
        self.program.moved |= dict.fromkeys(result.moved)
        if result.became == "refused":
            self.notes["some attackers' reports were refused: not finite, or beyond the plan's bound"] = None
        cap = self.plan.algorithm.update.weight_cap or self.plan.sums.max_weight
        weighted = any(p.weight == "examples" and p.cap is None for p in self.plan.algorithm.aggregator.parts)
        if result.became == "counted" and weighted and result.examples > cap:
            self.notes[f"clients with more than {cap} examples weigh {cap}: raise max_weight of the plan's sums"] = None

    def _published(self, state: ServerState) -> Tree:
        return self.plan.algorithm.release(state)

    def _checkpoint(self) -> Checkpoint:
        return replace(self.at, clients=self.states.snapshot())

    def _write(self, checkpoint: Checkpoint) -> Path | None:
        return checkpoint.write(self.out) if self.out is not None and checkpoint.rounds else None

    def _history(self, stopped: str) -> History:
        model = self._published(self.at.state)
        try:
            self.program.begin_anew(whole=True)  # what the last code changed is known after it
        except TaskError as error:
            self.notes[str(error)] = None
        if refused := getattr(self.trainer.executor, "refused", None):
            self.notes[f"some clients were trained by autograd: {refused}"] = None
        self.notes |= self.evaluation.notes
        self.notes |= dict.fromkeys(notes_of(self.program.moved, MOST_NOTES))
        self.notes |= dict.fromkeys(failures_of(self.at.rounds))
        best = self.at.best
        if self.at.rounds and self.stopping.improves(
            self.at.rounds[-1], best
        ):  # measured out of its turn, as the last round is
            best = self.stopping.kept(self.at.rounds[-1], model)
        return History(
            rounds=self.at.rounds,
            model=self.program.state_dict(model),
            model_sha256=sha256(model),
            plan_id=self.plan.id,
            seed=self.experiment.seed,
            stopped=stopped,
            notes=tuple(self.notes),
            executor=self.how,
            fleet=self.attendance.report(),
            start=self.at.start,
            best=None
            if best is None
            else BestModel(
                best.round, best.metric, best.value, self.program.state_dict(best.model), sha256(best.model)
            ),
        )
