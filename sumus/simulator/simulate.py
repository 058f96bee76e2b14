"""The simulator: every client of a round in this process, the same algebra as everywhere else.

for each round:   sample a cohort → train → report → count in → add
                  finish the sum → the next model → evaluate → remember
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sumus.aggregate import RunningSum
from sumus.algorithm import Algorithm
from sumus.errors import ExperimentError, Interrupted
from sumus.experiment import Evaluate, Examples, Experiment
from sumus.metrics import is_lower_better
from sumus.optimizers import ServerState
from sumus.pacing import Pacing
from sumus.plan import Plan
from sumus.rng import generator, key
from sumus.simulator.checkpoint import Checkpoint, ClientState
from sumus.simulator.evaluation import Evaluation
from sumus.simulator.history import History, RoundRecord
from sumus.simulator.interrupt import undisturbed
from sumus.simulator.population import as_population, sample
from sumus.simulator.progress import Progress, progress_of
from sumus.task import Task
from sumus.training.executor import Assignment, Executor
from sumus.training.program import Program, one_thread, seeded
from sumus.training.sequential import SequentialExecutor
from sumus.tree import nbytes, sha256
from sumus.types import Tree


def simulate(
    task: Task,
    algorithm: Algorithm,
    population: Mapping[Any, Examples],
    rounds: int,
    pacing: Pacing | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    **options: Any,
) -> History:
    """Train `task` by `algorithm` on `population`, in this process. `options` are those of `run`.

    Without `pacing`, every client takes part in every round, up to 100 of them.
    """
    pacing = pacing or Pacing(cohort=max(1, min(len(population), 100)))
    with seeded(seed):  # it may make the model
        plan = Plan(task, algorithm, pacing)
    return run(Experiment(plan, population, rounds, evaluate or Evaluate(), seed), **options)


def run(
    experiment: Experiment,
    *,
    out: str | Path | None = None,
    checkpoint_every: int = 10,
    restart: bool = False,
    device: str = "cpu",
    progress: Progress | bool | None = None,
) -> History:
    """Run an experiment.

    out: a folder for checkpoint, model, history and plot. If it holds an earlier part of the same run, that run goes on
        to the same final model as without the break; `restart` starts over instead.
    checkpoint_every: rounds between checkpoints; the last round, and Ctrl-C, write one too.
    device: "cpu" or "cuda".
    progress: True for a bar in the terminal, False for none; by default, a bar where there is a terminal.

    Raises ExperimentError and its like for what you can mend, DivergedError when training runs to NaN, Interrupted on
    Ctrl-C (its `history` is what there was).
    """
    with one_thread(), seeded(experiment.seed):
        simulation = Simulation(experiment, device, Path(out) if out is not None else None, restart)
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


class Simulation:
    """One run: its model, its people, and where it stands (`self.at`, replaced once a round, as a whole)."""

    def __init__(self, experiment: Experiment, device: str, out: Path | None, restart: bool) -> None:
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
        self.notes: dict[str, None] = {}
        self.hop = self.plan.first_hop
        identity = {"plan": self.plan.id, "seed": experiment.seed, "population": len(self.population)}
        self.at = Checkpoint(identity, self.plan.algorithm.start(self.program.initial_shared, self.task))
        earlier = Checkpoint.read(out) if out is not None and not restart else None
        if earlier is not None and out is not None and earlier.rounds:
            earlier.check_same(identity, out, experiment.rounds)
            self.at = earlier
        self.evaluation = Evaluation(experiment.evaluate, self.population, self.program, experiment.seed)

    def run(self, checkpoint_every: int, progress: Progress) -> History:
        """All rounds that are left."""
        saved = self.done
        try:
            with progress.watching(self.experiment, self.done) as show:
                while self.done < self.experiment.rounds and not self._reached_target():
                    self.at = self._round(self.done, self.at)
                    show(self.at.rounds[-1])
                    if self.done - saved >= checkpoint_every:
                        self._save()
                        saved = self.done
        except KeyboardInterrupt:
            with undisturbed():
                kept = f", kept in {self.out}: run the same again to go on" if self._save() else ""
                message = f"stopped after round {self.done} of {self.experiment.rounds}{kept}"
                raise Interrupted(message, self._history("interrupted"), self.at) from None
        except Exception:
            self._save()
            raise
        history = self._history("target" if self._reached_target() else "rounds")
        if self.out is not None:
            self._save()
            history.write(self.out)
        return history

    @property
    def done(self) -> int:
        """Whole rounds so far."""
        return len(self.at.rounds)

    def _round(self, number: int, at: Checkpoint) -> Checkpoint:
        """Round `number`, counted from 0: where the run stands after it, from where it stood before."""
        began, seed = time.perf_counter(), self.experiment.seed
        algorithm = self.plan.algorithm
        public = key(seed, "round", number, "public")
        cohort = sample(self.population, self.plan.pacing.cohort, generator(seed, "round", number, "cohort"))
        total = RunningSum()
        clients: dict[str, ClientState] = {}
        examples, bytes_up, losses = 0, 0, [(0.0, 0)]
        for trained in self.executor.run(at.state.broadcast, number, self._assignments(cohort, number, at)):
            rng = generator(seed, "round", number, "client", trained.client, "transform")
            update = algorithm.report(trained.client, trained.parts, trained.examples, trained.metrics, public, rng)
            self.hop.count_in(update, into=total)
            if trained.state:
                clients[str(trained.client)] = trained.state
            examples += trained.examples
            bytes_up += update.nbytes
            losses.append(trained.metrics["loss"])
            self._note_cap(trained.examples)
        combined = algorithm.combine(total.total, self.task, self.plan.sums, public, len(self.population))
        state = algorithm.step(combined, at.state)
        clients = {**at.clients, **clients}  # pending until the sum was counted: now
        loss = sum(value for value, _ in losses) / sum(count for _, count in losses)
        evaluations, spreads = self._evaluate(number, state, clients)
        record = RoundRecord(
            round=number + 1,
            clients=int(total.total.count),
            examples=examples,
            loss=loss,
            metrics=next(iter(evaluations.values()), {} if self.evaluation.wanted else {"loss": loss}),
            bytes_up=bytes_up,
            bytes_down=len(cohort) * sum(nbytes(tree) for tree in at.state.broadcast.values()),
            seconds=time.perf_counter() - began,
            evaluations=evaluations,
            spreads=spreads,
        )
        return Checkpoint(at.identity, state, clients, (*at.rounds, record))

    def _assignments(self, cohort: Iterable[Any], number: int, at: Checkpoint) -> Iterator[Assignment]:
        for client in cohort:
            inputs, targets = self.program.reader.read(self.population, client)
            own_key = key(self.experiment.seed, "round", number, "client", client, "training")
            yield Assignment(client, inputs, targets, at.clients.get(str(client), {}), own_key)

    def _evaluate(self, number: int, state: ServerState, clients: Mapping[str, ClientState]) -> tuple[Any, Any]:
        due = (number + 1) % self.experiment.evaluate.every == 0 or number + 1 == self.experiment.rounds
        return self.evaluation.measure(self._published(state), clients) if due else ({}, {})

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

    def _save(self) -> Path | None:
        return self.at.write(self.out) if self.out is not None and self.done else None

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
