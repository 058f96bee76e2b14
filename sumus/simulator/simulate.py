"""The simulator: every client of a round in this process, the same algebra as everywhere else.

for each round:   sample a cohort → train → report → count in → add
                  finish the sum → the next model → evaluate → settle client states, remember
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sumus.aggregate import Aggregate, RunningSum, Update
from sumus.algorithm import Algorithm
from sumus.errors import ExperimentError, Interrupted, ParticipantError, SumusError
from sumus.experiment import Evaluate, Examples, Experiment
from sumus.fleet import PERFECT, Fate, Fleet
from sumus.metrics import is_lower_better
from sumus.optimizers import ServerState
from sumus.pacing import Pacing
from sumus.plan import Plan
from sumus.rng import generator, key
from sumus.simulator.checkpoint import Checkpoint
from sumus.simulator.evaluation import Evaluation
from sumus.simulator.history import History, RoundRecord
from sumus.simulator.interrupt import undisturbed, whole
from sumus.simulator.population import as_population, sample
from sumus.simulator.progress import Progress, progress_of
from sumus.spec import canonical_json, to_json
from sumus.storage.client_states import ClientStates, DirectoryClientStates, MemoryClientStates
from sumus.task import Task
from sumus.training.executor import Assignment, Executor, Trained
from sumus.training.program import Program, one_thread, seeded
from sumus.training.sequential import SequentialExecutor
from sumus.tree import nbytes, sha256
from sumus.types import Tree
from sumus.work import ClientState


def simulate(
    task: Task,
    algorithm: Algorithm,
    population: Mapping[Any, Examples],
    rounds: int,
    pacing: Pacing | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    fleet: Fleet = PERFECT,
    **options: Any,
) -> History:
    """Train `task` by `algorithm` on `population`, in this process. `options` are those of `run`.

    Without `pacing`, every client takes part in every round, up to 100 of them.
    """
    pacing = pacing or Pacing(cohort=max(1, min(len(population), 100)))
    with seeded(seed):  # it may make the model
        plan = Plan(task, algorithm, pacing)
    return run(Experiment(plan, population, rounds, evaluate or Evaluate(), seed, fleet), **options)


def run(
    experiment: Experiment,
    *,
    out: str | Path | None = None,
    checkpoint_every: int = 10,
    restart: bool = False,
    device: str = "cpu",
    progress: Progress | bool | None = None,
    client_states: ClientStates | str | Path | None = None,
) -> History:
    """Run an experiment.

    out: a folder for checkpoint, model, history and plot. If it holds an earlier part of the same run, that run goes on
        to the same final model as without the break; `restart` starts over instead.
    checkpoint_every: rounds between checkpoints; the last round, and Ctrl-C, write one too.
    device: "cpu" or "cuda".
    progress: True for a bar in the terminal, False for none; by default, a bar where there is a terminal.
    client_states: where control variates and personal leaves are kept; by default in memory, and in the checkpoint.
        A folder takes more of them than memory holds.

    Raises ExperimentError and its like for what you can mend, DivergedError when training runs to NaN, Interrupted on
    Ctrl-C (its `history` is what there was).
    """
    with one_thread(), seeded(experiment.seed):
        states = MemoryClientStates() if client_states is None else client_states
        if isinstance(states, str | Path):
            states = DirectoryClientStates(states)
        simulation = Simulation(experiment, device, Path(out) if out is not None else None, restart, states)
        return simulation.run(checkpoint_every, progress_of(progress))


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


@dataclass
class Tally:
    """What a round adds up besides the sum. counted: for everyone in the cohort, whether the report is in the sum."""

    counted: dict[Any, bool]
    examples: int = 0
    bytes_up: int = 0
    loss: float = 0.0
    seen: int = 0

    def count(self, trained: Trained) -> None:
        """A report that is in the sum."""
        loss, seen = trained.metrics["loss"]
        self.counted[trained.client] = True
        self.examples += trained.examples
        self.loss += loss
        self.seen += seen


class Simulation:
    """One run: its model, its people, and where it stands (`self.at`, replaced once a round, as a whole)."""

    def __init__(
        self, experiment: Experiment, device: str, out: Path | None, restart: bool, states: ClientStates
    ) -> None:
        task = experiment.plan.task
        if not isinstance(task, Task):
            raise ExperimentError(
                "this plan holds a task's description without its code; simulate the file it came from"
            )
        self.experiment = experiment
        self.population = as_population(experiment.population)
        self.program = Program(task, device, experiment.seed)
        first = self.population.pick(0)  # tried before anything long begins
        data = self.program.learn_schema(first, *self.program.reader.read(self.population, first))
        self.plan = experiment.plan.with_data(data)
        self.task = self.plan.description
        self.executor: Executor = SequentialExecutor(self.program, self.plan.algorithm.client)
        self.out = _writable(out)
        self.again = "run the same again, without restart," if restart else "run the same again"
        self.notes: dict[str, None] = {}
        self.hop = self.plan.first_hop
        self.states = states
        identity = {
            "plan": self.plan.id,
            "seed": experiment.seed,
            "population": self.population.described,
            "fleet": canonical_json(to_json(experiment.fleet)),
        }
        self.at = Checkpoint(identity, self.plan.algorithm.start(self.program.initial_shared, self.task))
        self.evaluation = Evaluation(experiment.evaluate, self.population, self.program, experiment.seed)
        earlier = Checkpoint.read(out) if out is not None and not restart else None
        if earlier is not None and out is not None and earlier.rounds:
            earlier.check_same(identity, out, experiment.rounds)
            self.at = earlier
        elif not self.states.empty and not restart:
            raise ExperimentError(
                "client_states= holds the states of another run, or of one that was cut off before its first checkpoint: "
                "give an empty store, or restart=True (--restart) to delete them"
            )
        self.states.restore(self.at.clients)  # last: whatever can be wrong was found before states are forgotten

    def run(self, checkpoint_every: int, progress: Progress) -> History:
        """All rounds that are left."""
        saved = self.done
        try:
            with progress.watching(self.experiment, self.done) as show:
                while self.done < self.experiment.rounds and not self._reached_target():
                    self._round(self.done, self.at)
                    show(self.at.rounds[-1])
                    if self.done - saved >= checkpoint_every:
                        self._write(self._checkpoint())
                        saved = self.done
            history = self._history("target" if self._reached_target() else "rounds")
            if self.out is not None:
                self._write(self._checkpoint())
                history.write(self.out)
            return history
        except KeyboardInterrupt:
            with undisturbed():
                checkpoint = self._checkpoint()
                kept = f", kept in {self.out}: {self.again} to go on" if self._write(checkpoint) else ""
                message = f"stopped after round {self.done} of {self.experiment.rounds}{kept}"
                raise Interrupted(message, self._history("interrupted"), checkpoint) from None
        except Exception as error:
            with undisturbed():
                checkpoint = self._checkpoint()
                if isinstance(error, SumusError):
                    error.history, error.checkpoint = self._history("error"), checkpoint
                self._write(checkpoint)
            raise

    @property
    def done(self) -> int:
        """Whole rounds so far."""
        return len(self.at.rounds)

    def _round(self, number: int, at: Checkpoint) -> None:
        """Round `number`, counted from 0, from where the run stood before it; then `self.at` is where it stands after."""
        rng = generator(self.experiment.seed, "round", number, "cohort")
        cohort = sample(self.population, self.plan.pacing.cohort, rng)
        tally = Tally(dict.fromkeys(cohort, False))
        try:
            after = self._played(cohort, number, at, tally)
        except BaseException:
            with undisturbed():
                for client in cohort:
                    self.states.discarded(str(client))
            raise
        with whole():
            for client, counted in tally.counted.items():
                (self.states.counted if counted else self.states.discarded)(str(client))
            self.at = after

    def _played(self, cohort: list[Any], number: int, at: Checkpoint, tally: Tally) -> Checkpoint:
        """Train, sum, step, evaluate."""
        began = time.perf_counter()
        state = at.state
        if self.plan.algorithm.aggregator.one_by_one:  # the model travels
            for client in self.population.in_order(cohort):
                state = self._sum_and_step([client], number, state, tally)
        else:
            state = self._sum_and_step(cohort, number, state, tally)
        clients = sum(tally.counted.values())
        loss = tally.loss / tally.seen if clients else math.nan
        evaluations, spreads = self._evaluate(number, state, tally)
        record = RoundRecord(
            round=number + 1,
            clients=clients,
            dropped=len(cohort) - clients,
            examples=tally.examples,
            loss=loss,
            metrics=next(iter(evaluations.values()), {} if self.evaluation.wanted else {"loss": loss}),
            bytes_up=tally.bytes_up,
            bytes_down=len(cohort) * sum(nbytes(tree) for tree in at.state.broadcast.values()),
            seconds=time.perf_counter() - began,
            evaluations=evaluations,
            spreads=spreads,
        )
        return Checkpoint(at.identity, state, rounds=(*at.rounds, record))

    def _sum_and_step(self, group: Sequence[Any], number: int, state: ServerState, tally: Tally) -> ServerState:
        """Let clients train from a state, sum what arrives, take the server's step."""
        algorithm, people = self.plan.algorithm, len(self.population)
        public = key(self.experiment.seed, "round", number, "public")
        total, apart = RunningSum(), dict[Any, Aggregate]()
        arrived: dict[Any, Trained] = {}
        fates: dict[Any, Fate] = {}
        assignments = self._assignments(group, number, fates)
        for trained in self.population.sent(self.executor.run(state.broadcast, number, assignments)):
            if trained.state:
                self.states.propose(str(trained.client), trained.state)
            try:
                update = self._reported(trained, number, public)
                tally.bytes_up += update.nbytes
                if fates[trained.client].lost:
                    continue
                if algorithm.aggregator.needs_each_update:
                    apart[trained.client] = self.hop.count_in(update)
                else:
                    self.hop.count_in(update, into=total)
            except ParticipantError:
                if trained.client not in self.population.attackers:
                    raise
                self.notes["some attackers' reports were refused: not finite, or beyond the plan's bound"] = None
                continue
            arrived[trained.client] = replace(trained, parts={}, state={})
            self._note_cap(trained.examples)
        if algorithm.aggregator.needs_each_update:
            ones = [apart[client] for client in group if client in apart]
            combined = algorithm.combine_each(ones, self.task, self.plan.sums, public, people)
        else:
            combined = algorithm.combine(total.total, self.task, self.plan.sums, public, people)
        for client in group if combined else ():
            if client in arrived:
                tally.count(arrived[client])
        return algorithm.step(combined, state)

    def _reported(self, trained: Trained, number: int, public: bytes) -> Update:
        rng = generator(self.experiment.seed, "round", number, "client", trained.client, "transform")
        return self.plan.algorithm.report(trained.client, trained.parts, trained.examples, trained.metrics, public, rng)

    def _assignments(self, group: Sequence[Any], number: int, fates: dict[Any, Fate]) -> Iterator[Assignment]:
        """Each client's work, drawing what becomes of it; whoever will be late need not begin."""
        seed, work = self.experiment.seed, self.plan.algorithm.client
        for client in group:
            inputs, targets = self.program.reader.read(self.population, client)
            rng = generator(seed, "round", number, "client", client, "fleet")
            fate = fates[client] = self.experiment.fleet.fate(work.step_count(len(inputs)), rng)
            if not fate.late:
                own_key = key(seed, "round", number, "client", client, "training")
                yield Assignment(client, inputs, targets, self.states.get(str(client)), own_key, fate.most_steps)

    def _evaluate(self, number: int, state: ServerState, tally: Tally) -> tuple[Any, Any]:
        """What there is to measure after this round, each client with the state that it will have."""

        def state_of(client: str) -> ClientState:
            pending = self.states.pending(client) if client in counted else None
            return self.states.get(client) if pending is None else pending

        if (number + 1) % self.experiment.evaluate.every and number + 1 != self.experiment.rounds:
            return {}, {}
        counted = {str(client) for client, yes in tally.counted.items() if yes}
        return self.evaluation.measure(self._published(state), state_of)

    def _reached_target(self) -> bool:
        target = self.experiment.evaluate.target
        if not target or not self.at.rounds or self.done % self.experiment.evaluate.every:
            return False  # an earlier, shorter run may have measured its last round out of turn
        measured = self.at.rounds[-1].metrics
        return all(
            name in measured and (measured[name] <= goal if self._is_lower_better(name) else measured[name] >= goal)
            for name, goal in target.items()
        )

    def _is_lower_better(self, name: str) -> bool:
        return is_lower_better(name, self.program.task.metrics.get(name))

    def _note_cap(self, examples: int) -> None:
        cap = self.plan.algorithm.update.weight_cap or self.plan.sums.max_weight
        weighted = any(part.weight == "examples" for part in self.plan.algorithm.aggregator.parts)
        if weighted and examples > cap:
            self.notes[f"clients with more than {cap} examples weigh {cap}: raise max_weight of the plan's sums"] = None

    def _published(self, state: ServerState) -> Tree:
        return self.plan.algorithm.release(state)

    def _checkpoint(self) -> Checkpoint:
        return replace(self.at, clients=self.states.snapshot())

    def _write(self, checkpoint: Checkpoint) -> Path | None:
        return checkpoint.write(self.out) if self.out is not None and checkpoint.rounds else None

    def _history(self, stopped: str) -> History:
        model = self._published(self.at.state)
        return History(
            rounds=self.at.rounds,
            model=self.program.state_dict(model),
            model_sha256=sha256(model),
            plan_id=self.plan.id,
            seed=self.experiment.seed,
            stopped=stopped,
            notes=tuple(self.notes),
        )
