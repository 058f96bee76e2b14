"""The simulator: every client of a round on this machine or on a cluster, with the same arithmetic as on a server.

for each round:   find its reports and their times (`turnout`) → train the clients whose reports on this model will be counted,
                  and apply the round's sum to the model (`participants`) → evaluate → settle client states, write a checkpoint
"""

import math
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace

from sumus.errors import ExperimentError, Interrupted, SumusError, TaskError
from sumus.executors.witness import notes_of
from sumus.interrupt import undisturbed, whole
from sumus.optimizers import ServerState
from sumus.simulator.after_round import RoundListener, RoundOutcome
from sumus.simulator.checkpoint import Checkpoint
from sumus.simulator.evaluation import MOST_NOTES, Evaluator
from sumus.simulator.history import BestModel, History, Provenance, failures_of
from sumus.simulator.kept import BestSoFar
from sumus.simulator.participants import Participants, RoundReports
from sumus.simulator.populations.participation import present_at
from sumus.simulator.prepared import PreparedRun
from sumus.simulator.processes.share import Sums
from sumus.simulator.progress import Progress, Show
from sumus.simulator.records import ReportCounts, RoundEvaluation, RoundRecord, RoundTally, RoundTraffic
from sumus.simulator.run_folder import RunFolder
from sumus.simulator.stopping import Stopping
from sumus.simulator.surprises import notes_on_contributors
from sumus.simulator.task_code import changed, digests_of
from sumus.simulator.turnout import Turnout
from sumus.simulator.virtual_time.account import CountedReport, Played
from sumus.storage.client_states import ClientStates
from sumus.training.program import Program
from sumus.tree import nbytes, sha256
from sumus.types import Tree
from sumus.work import ClientState


class Simulation:
    """One run: a new run, or the continuation of a run that ended early.

    Attributes:
        at: The state of the run. Each round replaces it as a whole.

    Args:
        prepared: The experiment.
        folder: The folder of the run.
        states: The states that clients keep between rounds.
    """

    def __init__(self, prepared: PreparedRun, folder: RunFolder, states: ClientStates) -> None:
        self._prepared, self._folder, self._states = prepared, folder, states
        self._experiment, self._plan, self._program = prepared.experiment, prepared.plan, prepared.program
        self._stopped = ""
        self.at = Checkpoint(prepared.identity(), self._first_state(), code=digests_of(prepared.experiment.plan))
        self._turnout = Turnout(prepared, sum(nbytes(tree) for tree in self.at.state.broadcast.values()))
        wanted, population = self._experiment.evaluate, prepared.population
        there = present_at(prepared.joined, 0, len(population))
        loop = self._plan.algorithm.client.loop
        self._evaluation = Evaluator(wanted, population, self._program, self._experiment.seed, there, loop)
        self._stopping = Stopping(wanted, self._evaluation.is_lower_better)
        self._stopping.check_names(self._evaluation.figures)
        if (earlier := folder.earlier()) is not None:
            self.at = self._taken_up(earlier)
        elif not states.empty and not folder.restart:
            raise ExperimentError(
                "client_states= holds the states of another run, or of a run that was killed before its first checkpoint: "
                "give an empty store, or restart=True (--restart) to delete them"
            )
        self._turnout.relive(self.at.rounds)
        states.restore(self.at.clients)  # last, after all checks: it replaces the states in the store

    @property
    def done(self) -> int:
        """The number of complete rounds so far."""
        return len(self.at.rounds)

    def run(
        self, participants: Participants, listener: RoundListener, progress: Progress, checkpoint_every: int
    ) -> History:
        """Play all remaining rounds.

        Args:
            participants: The participants in the rounds.
            listener: Called after each round.
            progress: Shows each round.
            checkpoint_every: The number of rounds between two checkpoints.
        """
        rounds = self._experiment.rounds
        try:
            self._turnout.rehearse()
            self._prepared.observe()
            with progress.watching(self._experiment, self.done) as show, closing(participants):
                executor = participants.begin(self.at, (rounds - self.done) * self._plan.pacing.cohort)
                self.at = replace(self.at, executor=executor or self.at.executor)
                self._play_all(participants, listener, show, checkpoint_every)
                participants.look_again()
            history = self._history(participants, self._stopped or self._why_over() or "rounds")
            self._folder.write(self._checkpoint())
            self._folder.finish(history)
            self._folder.note(self.at.rounds, history.stopped)
            return history
        except KeyboardInterrupt:
            with undisturbed():
                checkpoint = self._checkpoint()
                kept = self._folder.write(checkpoint)
                self._folder.note(self.at.rounds, "interrupted")
                message = f"stopped after round {self.done} of {rounds}{kept}"
                raise Interrupted(message, self._history(participants, "interrupted"), checkpoint) from None
        except Exception as error:
            with undisturbed():
                checkpoint = self._checkpoint()
                with suppress(SumusError, AttributeError):  # no model yet, or a read-only error
                    vars(error).update(history=self._history(participants, "error"), checkpoint=checkpoint)
                self._folder.write(checkpoint)
                self._folder.note(self.at.rounds, "error")
            raise

    # ── where it begins ──────────────────────────────────────────────────────────────────────────────────────────────

    def _first_state(self) -> ServerState:
        return self._plan.algorithm.start(self._program.initial_shared, self._plan.description)

    def _taken_up(self, earlier: Checkpoint) -> Checkpoint:
        """Return an earlier part of the run, from which the run continues.

        Refuse a part that belongs to another experiment, or that keeps the best model by another metric.
        """
        folder, wanted = self._folder.path, self._experiment.evaluate.best
        assert folder is not None, "the earlier part was read there"
        earlier.check_same(self.at.identity, folder, self._experiment.rounds)
        with_keys = self._evaluation.with_keys
        start = None if earlier.start is None else with_keys(earlier.start)
        if names := changed(earlier.code, self.at.code):
            self._prepared.notes[
                f"the code of {', '.join(names)} has changed since round {len(earlier.rounds)}, but the run continues after "
                "this round: give Output(restart=True) (--restart) to train all rounds with the new code"
            ] = None
        earlier = replace(earlier, start=start, rounds=list(map(with_keys, earlier.rounds)), code=self.at.code)
        if wanted is None:
            return replace(earlier, best=None)
        if earlier.best is not None and earlier.best.metric != wanted:
            raise ExperimentError(
                f"{folder} holds a run that keeps the best model by {earlier.best.metric!r}, not by {wanted!r}: give "
                f"Evaluation(best={earlier.best.metric!r}), another folder, or restart=True (--restart) to start over there"
            )
        if earlier.best is None and any(self._stopping.is_due(record) for record in earlier.rounds):
            self._prepared.notes[
                f"the best model is the best since round {len(earlier.rounds) + 1}, because none was kept in earlier rounds"
            ] = None
        return earlier

    def _measure_start(self) -> None:
        """Measure the model before round 1, as a record of round 0. New and continued runs get the same record."""
        began = time.perf_counter()
        evaluations, spreads = self._evaluation.measure(self._published(self._first_state()), lambda client: {})
        record = RoundRecord(
            round=0,
            clients=0,
            examples=0,
            loss=math.nan,
            seconds=time.perf_counter() - began,
            evaluation=RoundEvaluation(next(iter(evaluations.values())), evaluations, spreads),
        )
        at = replace(self.at, start=record)
        self.at = at if self.done else self._with_best(at, record)

    # ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _play_all(self, participants: Participants, listener: RoundListener, show: Show, checkpoint_every: int) -> None:
        """Play rounds, write a checkpoint every `checkpoint_every` rounds, and call the user's function after each round."""
        saved, progress = self.done, self._folder.progress()
        if self._experiment.evaluate.first and self.at.start is None:
            self._measure_start()
            if self._is_told_to_stop(listener):
                return
        while self.done < self._experiment.rounds and not self._why_over():
            self._play_round(participants, self.done, self.at)
            show(self.at.rounds[-1])
            progress.note(self.at.rounds)
            if self.done - saved >= checkpoint_every:
                self._folder.write(self._checkpoint())
                saved = self.done
            if self._is_told_to_stop(listener):
                return

    def _play_round(self, participants: Participants, number: int, at: Checkpoint) -> None:
        """Play the round with this number (from 0), from the state `at`; afterwards `self.at` is the state after the round."""
        began = time.perf_counter()
        played, counted = self._turnout.play(number, at.version)
        settled: dict[str, bool] = {}
        try:
            after = self._trained(participants, played, counted, began, at, settled)
        except BaseException:
            with undisturbed():
                for report in counted:
                    self._states.discarded(str(self._prepared.population.pick(report.position)))
            raise
        with whole():
            for client, is_counted in settled.items():
                (self._states.counted if is_counted else self._states.discarded)(client)
            self._turnout.note(played)
            self.at = after

    def _trained(
        self,
        participants: Participants,
        played: Played,
        counted: list[CountedReport],
        began: float,
        at: Checkpoint,
        settled: dict[str, bool],
    ) -> Checkpoint:
        """Train clients, sum their updates, take the server's step, and evaluate.

        Args:
            participants: The participants.
            played: The round, as simulated by the timeline.
            counted: The reports on the round's model that will be counted.
            began: The start of the round, by `time.perf_counter`.
            at: The state of the run before the round.
            settled: The method fills this in: for each client that trained, whether to keep its new state.

        Returns:
            The state of the run after the round.
        """
        state, pending, number = at.state, Sums(), played.number
        pending.add(at.pending)
        received = RoundReports(pending, {number: tally.copy() for number, tally in at.tallies.items()}, settled)
        if self._plan.algorithm.aggregator.one_by_one:  # the model travels from client to client
            population = self._prepared.population
            reports = {population.pick(report.position): report for report in counted}
            for client in population.in_order(list(reports)):
                state = participants.play([reports[client]], number, state, replace(received, sums=Sums()))
        elif played.published:
            state = participants.play(counted, number, state, received)
        _expect_some(received, number)
        tally = received.tallies.pop(number, RoundTally())
        loss = tally.loss / tally.seen if tally.clients else math.nan
        record = RoundRecord(
            round=number + 1,
            clients=tally.clients,
            examples=tally.examples,
            loss=loss,
            evaluation=self._evaluated(number, state, loss, settled),
            traffic=RoundTraffic(
                up=played.bytes_up,
                down=played.bytes_down,
                above=self._prepared.edges.bytes_above(counted, self._plan.first_hop),
            ),
            seconds=time.perf_counter() - began,
            at=played.ended,
            reports=_report_counts(played, tally, received.failed, self._plan.pacing.buffered),
        )
        pending.pop(number, None)
        after = replace(
            at,
            state=state,
            version=at.version + played.published,
            pending=pending.totals,
            tallies=received.tallies,
            rounds=(*at.rounds, record),
        )
        return self._with_best(after, record)

    def _evaluated(self, number: int, state: ServerState, loss: float, settled: Mapping[str, bool]) -> RoundEvaluation:
        """Measure the model after a round if an evaluation is due, with each client's state as of the end of the round."""

        def state_of(client: str) -> ClientState:
            pending = self._states.pending(client) if settled.get(client) else None
            return self._states.get(client) if pending is None else pending

        evaluations, spreads = {}, {}
        if (number + 1) % self._experiment.evaluate.every == 0 or number + 1 == self._experiment.rounds:
            evaluations, spreads = self._evaluation.measure(self._published(state), state_of)
        metrics = next(iter(evaluations.values()), {} if self._evaluation.wanted else {"loss": loss})
        return RoundEvaluation(metrics, evaluations, spreads)

    def _with_best(self, at: Checkpoint, record: RoundRecord) -> Checkpoint:
        """Return the state of the run, with its published model kept if `record` is the best so far."""
        if self._stopping.is_due(record) and self._stopping.improves(record, at.best):
            return replace(at, best=self._stopping.kept(record, self._published(at.state)))
        return at

    # ── how it ends ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _is_told_to_stop(self, listener: RoundListener) -> bool:
        """Call the user's function after the latest round. Returns whether it ends the run."""
        state = self.at.state
        record = self.at.rounds[-1] if self.at.rounds else self.at.start
        assert record is not None
        is_best = self.at.best is not None and self.at.best.round == record.round
        outcome = RoundOutcome(record, is_best, lambda: self._program.state_dict(self._published(state)))
        if listener.wants_to_stop(outcome):
            self._stopped = "after_round"
        before, now = len(self._prepared.population), len(self._experiment.population)
        if now != before:
            raise ExperimentError(
                f"the population has grown from {before} clients to {now} during the "
                "run: give all of them from the start, and name those that join later: population.joining({client: round})"
            )
        return bool(self._stopped)

    def _why_over(self) -> str | None:
        """Return the reason why the run ends before its last round; None if it goes on."""
        return self._stopping.why(self.at.rounds, self.at.best)

    def _published(self, state: ServerState) -> Tree:
        return self._plan.algorithm.release(state)

    def _checkpoint(self) -> Checkpoint:
        return replace(self.at, clients=self._states.snapshot())

    def _history(self, participants: Participants, stopped: str) -> History:
        model, notes, rounds = self._published(self.at.state), self._prepared.notes, self.at.rounds
        notes |= dict.fromkeys(participants.last_notes())
        try:
            self._program.begin_anew(whole=True)  # finds what the last client's code changed
        except TaskError as error:
            notes[str(error)] = None
        notes |= self._evaluation.notes
        notes |= dict.fromkeys(notes_of(self._program.moved, MOST_NOTES))
        notes |= dict.fromkeys([*failures_of(rounds), *notes_on_contributors(self._plan, rounds)])
        best = self.at.best
        if rounds and self._stopping.improves(rounds[-1], best):  # the last round is always measured
            best = self._stopping.kept(rounds[-1], model)
        return History(
            rounds=rounds,
            model=self._program.state_dict(model),
            model_sha256=sha256(model),
            provenance=Provenance(self._plan.id, self._experiment.seed, participants.how),
            stopped=stopped,
            notes=tuple(notes),
            fleet=self._turnout.report(),
            start=self.at.start,
            best=None if best is None else _best_model(best, self._program),
        )


def _expect_some(received: RoundReports, number: int) -> None:
    """Refuse a round in which every client failed: the cause is then not a single client."""
    if received.failed and not any(received.settled.values()):
        client, why = next(iter(received.failed.items()))
        raise ExperimentError(
            f"all {len(received.failed)} clients of round {number + 1} failed, so that no client is left in it; the first "
            f"failure is that of client {client}: {why}"
        )


def _report_counts(played: Played, tally: RoundTally, failed: Mapping[str, str], buffered: bool) -> ReportCounts:
    """Count a round's reports that were late or not counted. buffered: whether a sum may hold reports on earlier models."""
    reasons = played.dropped.copy()
    if failed:
        reasons["failed"] = len(failed)
    return ReportCounts(
        dropped=sum(reasons.values()) if buffered else played.given - tally.clients,
        staleness=dict(sorted(tally.staleness.items())),
        reasons=dict(sorted(reasons.items())),
        failed=failed,
    )


def _best_model(best: BestSoFar, program: Program) -> BestModel:
    """Return the best model of a run, as a history holds it."""
    model = program.state_dict(best.model)
    return BestModel(best.round, best.metric, best.value, model, sha256(best.model))
