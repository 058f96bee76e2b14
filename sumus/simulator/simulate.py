"""The simulator: every client of a round on this machine or on a cluster, the same algebra as everywhere else.

for each round:   sample a cohort → train → report → count in → add
                  finish the sum → the next model → evaluate → settle client states, remember
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sumus.aggregate import RunningSum
from sumus.algorithm import Algorithm
from sumus.errors import DataError, ExperimentError, Interrupted, SumusError
from sumus.experiment import Evaluate, Examples, Experiment
from sumus.fleet import PERFECT, Fleet
from sumus.metrics import is_lower_better
from sumus.optimizers import ServerState
from sumus.pacing import Pacing
from sumus.plan import Plan
from sumus.rng import generator, key
from sumus.simulator.checkpoint import Checkpoint
from sumus.simulator.choice import AUTOGRAD, Choice, Chosen, RunLength, checked, choose, processes
from sumus.simulator.crew import check_workers, crew_of, described
from sumus.simulator.evaluation import Evaluation
from sumus.simulator.history import History, RoundRecord
from sumus.simulator.interrupt import undisturbed, whole
from sumus.simulator.population import as_population, sample
from sumus.simulator.progress import Progress, Show, progress_of
from sumus.simulator.recall import recall_of_this_user
from sumus.simulator.share import Crew, Group, Result, Setting, Trainer
from sumus.spec import canonical_json, to_json
from sumus.storage.client_states import ClientStates, DirectoryClientStates, MemoryClientStates
from sumus.task import Task
from sumus.training.executor import Assignment
from sumus.training.program import Program, one_thread, seeded
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
    """Train `task` by `algorithm` on `population`. `options` are those of `run`.

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
    executor: str = "auto",
    workers: int | str | None = None,
    insecure: bool = False,
) -> History:
    """Run an experiment.

    out: a folder for checkpoint, model, history and plot. If it holds an earlier part of the same run, that run goes on
        to the same final model as without the break; `restart` starts over instead.
    checkpoint_every: rounds between checkpoints; the last round, and Ctrl-C, write one too.
    device: "cpu" or "cuda".
    progress: True for a bar in the terminal, False for none; by default, a bar where there is a terminal.
    client_states: where control variates and personal leaves are kept; by default in memory, and in the checkpoint.
        A folder takes more of them than memory holds.
    executor: "auto" tries them on this model and these clients, unless the run is short, and remembers what was fastest;
        else "autograd", "sequential", "sequential+onednn" or "vectorized:K". They agree to rounding. `history.executor` says
        which it was, and why.
    workers: processes that train at once, this one among them; by default one for each core, where that saves time. Or
        "ray" for a Ray cluster on this machine, or the address of one that runs. The result is the same, bit for bit. Where
        it takes one process, a note of the history says why.
    insecure: whether a cluster may be one that lets everyone in: who reaches it can run code on it.

    Raises ExperimentError and its like for what you can mend, DivergedError when training runs to NaN, Interrupted on
    Ctrl-C (its `history` is what there was).
    """
    check_workers(workers, device)
    wanted = None if executor == "auto" else Choice.parse(executor)
    with one_thread(), seeded(experiment.seed):
        states = MemoryClientStates() if client_states is None else client_states
        if isinstance(states, str | Path):
            states = DirectoryClientStates(states)
        simulation = Simulation(experiment, device, Path(out) if out is not None else None, restart, states)
        return simulation.run(checkpoint_every, progress_of(progress), wanted, workers, insecure)


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

    def count(self, result: Result) -> None:
        """A report that is in the sum."""
        loss, seen = result.metrics["loss"]
        self.counted[result.client] = True
        self.examples += result.examples
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
        self.setting = Setting(self.plan, self.population, experiment.seed, experiment.fleet, AUTOGRAD.executor)
        self.trainer = Trainer(self.setting, self.program)
        self.crew: Crew = self.trainer
        self.how = ""
        self.sizes: dict[Any, int] = {}
        self.out = _writable(out)
        self.again = "run the same again, without restart," if restart else "run the same again"
        self.notes: dict[str, None] = {}
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

    def run(
        self,
        checkpoint_every: int,
        progress: Progress,
        executor: Choice | None,
        workers: int | str | None,
        insecure: bool,
    ) -> History:
        """All rounds that are left."""
        try:
            with progress.watching(self.experiment, self.done) as show:
                self._staff(executor, workers, insecure)
                with closing(self.crew):
                    self._rounds(checkpoint_every, show)
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

    def _staff(self, wanted: Choice | None, workers: int | str | None, insecure: bool) -> None:
        """Decide how clients are trained, and by how many processes, and start these."""
        work, broadcast = self.plan.algorithm.client, self.at.state.broadcast
        cohort = 1 if self.plan.algorithm.aggregator.one_by_one else self.plan.pacing.cohort
        run = RunLength.of(self.program, work, *self._tried(1, 1), clients=self._left)
        if wanted == AUTOGRAD:
            chosen = Chosen(AUTOGRAD, "as asked for")
        elif wanted is not None:
            chosen = checked(wanted, self.program, work, self._tried(cohort, 4), broadcast)
        elif self.at.executor:
            chosen = Chosen(Choice.parse(self.at.executor), "as in the rounds before")
        else:
            several = partial(self._tried, cohort)
            chosen = choose(self.program, work, several, broadcast, run, recall_of_this_user())
        if self.at.executor not in ("", str(chosen.choice)):
            self.notes[f"the rounds before were trained by {self.at.executor}, these by {chosen.choice}"] = None
        self.at = replace(self.at, executor=str(chosen.choice))
        self.setting = replace(self.setting, executor=chosen.choice.executor)
        self.trainer = Trainer(self.setting, self.program)
        count = workers or processes(run.seconds_with(chosen), cohort, self.program.device.type)
        count = (
            min(count, self.plan.pacing.cohort) if isinstance(count, int) else count
        )  # more would have nothing to do
        self.crew, alone = crew_of(self.trainer, self.setting, count, insecure)
        if alone:
            self.notes[alone] = None
        self.how = f"{chosen.choice} {described(1 if alone else count)}: {chosen.reason}"

    @property
    def _left(self) -> int:
        """How often a client is still to train."""
        return (self.experiment.rounds - self.done) * self.plan.pacing.cohort

    def _tried(self, cohort: int, most: int) -> list[Assignment]:
        """The first clients as they would train, to try executors on; one whose examples cannot be read is left out."""
        tried: list[Assignment] = []
        for client in (self.population.pick(index) for index in range(min(cohort, most))):
            with suppress(DataError):  # the round that picks it will say so
                examples = self.program.reader.read(self.population, client)
                tried.append(Assignment(client, *examples, {}, key("tried", client)))
        return tried

    def _rounds(self, checkpoint_every: int, show: Show) -> None:
        """Play them, and keep what there is now and then."""
        saved = self.done
        while self.done < self.experiment.rounds and not self._reached_target():
            self._round(self.done, self.at)
            show(self.at.rounds[-1])
            if self.done - saved >= checkpoint_every:
                self._write(self._checkpoint())
                saved = self.done

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
        return replace(at, state=state, rounds=(*at.rounds, record))

    def _sum_and_step(self, clients: Sequence[Any], number: int, state: ServerState, tally: Tally) -> ServerState:
        """Let clients train from a state, sum what arrives, take the server's step."""
        algorithm, people = self.plan.algorithm, len(self.population)
        public = key(self.experiment.seed, "round", number, "public")
        total, results = RunningSum(), dict[Any, Result]()
        for result in self.crew.train(number, state.broadcast, self._groups(clients), total):
            if result.state:
                self.states.propose(str(result.client), result.state)
            results[result.client] = result.settled
            self.sizes[result.client] = result.examples
            tally.bytes_up += result.nbytes
            self._note(result)
        arrived = [results[one] for one in clients if one in results and results[one].became == "counted"]
        if algorithm.aggregator.needs_each_update:
            ones = [result.alone for result in arrived if result.alone is not None]
            combined = algorithm.combine_each(ones, self.task, self.plan.sums, public, people)
        else:
            combined = algorithm.combine(total.total, self.task, self.plan.sums, public, people)
        for result in arrived if combined else ():  # in the cohort's order, whoever was first
            tally.count(result)
        return algorithm.step(combined, state)

    def _groups(self, clients: Sequence[Any]) -> Iterator[Group]:
        """Who trains together, and what they kept, in the order to deal them; a group's states are read as it is asked for."""
        if self.trainer.executor.needs_sizes:
            unknown = [client for client in clients if client not in self.sizes]
            self.sizes |= zip(unknown, self.crew.sizes(unknown), strict=True)
            places = self.trainer.executor.groups([self.sizes[client] for client in clients])
        else:
            places = [[place] for place in range(len(clients))]
            if self.crew is not self.trainer:  # the largest first, so that at the end nobody waits long for the last
                places.sort(key=lambda place: -self.sizes.get(clients[place[0]], math.inf))
        return ([(clients[place], self.states.get(str(clients[place]))) for place in group] for group in places)

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

    def _note(self, result: Result) -> None:
        """What the user should know of a client's report."""
        if result.became == "refused":
            self.notes["some attackers' reports were refused: not finite, or beyond the plan's bound"] = None
        cap = self.plan.algorithm.update.weight_cap or self.plan.sums.max_weight
        weighted = any(part.weight == "examples" for part in self.plan.algorithm.aggregator.parts)
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
        if refused := getattr(self.trainer.executor, "refused", None):
            self.notes[f"some clients were trained by autograd: {refused}"] = None
        return History(
            rounds=self.at.rounds,
            model=self.program.state_dict(model),
            model_sha256=sha256(model),
            plan_id=self.plan.id,
            seed=self.experiment.seed,
            stopped=stopped,
            notes=tuple(self.notes),
            executor=self.how,
        )
