"""A run before its first round: the experiment, with its model built and its first client read."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sumus.errors import DataError, ExperimentError, TaskError, at_client
from sumus.executors.choice import AUTOGRAD
from sumus.executors.witness import examples_of
from sumus.experiment import Experiment
from sumus.plan import Plan
from sumus.simulator.client_sizes import ClientSizes
from sumus.simulator.edge_map import EdgeMap
from sumus.simulator.populations.participation import joined_of
from sumus.simulator.populations.population import Population, as_population
from sumus.simulator.processes.share import RunSetting, Trainer
from sumus.simulator.surprises import notes_on_attackers, notes_on_personal
from sumus.simulator.virtual_time.traces import fleet_identity
from sumus.task import Task
from sumus.training.observed import expect_means, observe
from sumus.training.program import EVALUATION_BATCH, Program
from sumus.types import Array

_PROBED = 8
"""The number of examples that are measured both as one batch and one by one, to see whether a metric compares examples."""


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """An experiment that is ready for its first round.

    Attributes:
        experiment: The experiment.
        program: The task's model, on its device.
        setting: The setting in which its rounds are trained: the plan, with its data's shapes and dtypes, and the population.
        trainer: Trains clients in this process, by autograd.
        joined: The first round of each client, counted from 1, int64 `(clients,)`; None if all take part from the start.
        sizes: The numbers of examples that the clients hold.
        edges: The edge through which each client reports.
        notes: Notes for the user, without duplicates, in order. The run adds to them.
    """

    experiment: Experiment
    program: Program
    setting: RunSetting
    trainer: Trainer
    joined: Array | None
    sizes: ClientSizes
    edges: EdgeMap
    notes: dict[str, None]

    @property
    def plan(self) -> Plan:
        """The plan, with the shapes and dtypes of its data."""
        return self.setting.plan

    @property
    def population(self) -> Population:
        """The clients."""
        return self.setting.population

    def identity(self) -> dict[str, Any]:
        """The values that must be equal to continue a run."""
        identity = {
            "plan": self.plan.id,
            "seed": self.setting.seed,
            "population": self.population.described,
            "fleet": fleet_identity(self.experiment.fleet),
        }
        if (edges := self.edges.identity) is not None:
            identity["sites"] = edges  # the folders of existing runs use this name
        return identity

    def observe(self) -> None:
        """Try the model on the first client's examples, as in training, to refuse an unsuitable model before the first round.

        A user's own training code is not tried, since it may use a loss that is not known here.
        """
        if self.plan.algorithm.client.loop is not None:
            return
        client = self.population.pick(self.setting.first)
        with at_client(client):
            if self.program.observed is None:
                self.program.observed = observe(self.program, *self.program.reader.read(self.population, client))

    def end(self) -> None:
        """Restore the user's code to its state before the run."""
        with suppress(TaskError):  # the run has already reported it
            self.program.end()


def prepare(experiment: Experiment, device: str, skips: bool) -> PreparedRun:
    """Build an experiment's model, and read its first client, so that errors show before any long work begins.

    Args:
        experiment: The experiment.
        device: "cpu", or another device that torch knows.
        skips: Whether a client that fails in a round is left out of that round.
    """
    task = experiment.plan.task
    if not isinstance(task, Task):
        raise ExperimentError(
            "this plan holds a task's description but not its code: simulate the plan of the Python file that it came from"
        )
    population = as_population(experiment.population)
    program = Program(task, device, experiment.seed)
    first, examples = _first_readable(program, population, skips)
    client = population.pick(first)
    data = program.learn_schema(client, *examples)
    with at_client(client):
        expect_means(program, *examples)
    plan = experiment.plan.with_data(data)
    joined = joined_of(population.participation, population.ids, experiment)
    setting = RunSetting(plan, population, experiment.seed, AUTOGRAD.executor, skips, first)
    trainer = Trainer(setting, program)
    notes = dict.fromkeys(_notes(experiment, population, program, client, examples))
    edges = EdgeMap(population, experiment.edge_groups)
    return PreparedRun(experiment, program, setting, trainer, joined, ClientSizes(trainer), edges, notes)


def _first_readable(program: Program, population: Population, skips: bool) -> tuple[int, tuple[Any, Any]]:
    """Return the first client and its examples; if failures are skipped, the first client whose examples can be read."""
    for position in range(len(population)):
        try:
            return position, program.reader.read(population, population.pick(position))
        except DataError:
            if not skips or position + 1 == len(population):
                raise
    raise AssertionError("a population has clients")


def _notes(
    experiment: Experiment, population: Population, program: Program, client: Any, examples: tuple[Any, Any]
) -> Iterator[str]:
    """Return notes for the user about the population, the evaluation, and the first client's examples."""
    yield from notes_on_attackers(population)
    yield from notes_on_personal(experiment.evaluate, program.description)
    if not program.reader.reads_alike(population, client):
        program.moved[examples_of(client)] = None
    evaluate, (inputs, targets) = experiment.evaluate, examples
    measures = evaluate.central is not None or evaluate.unseen is not None or evaluate.seen
    few = slice(0, _PROBED)
    if measures and evaluate.batch_size is None and program.depends_on_batch(inputs[few], targets[few]):
        yield (
            "the loss or a metric compares the examples of a batch with one another: training uses batches of "
            f"{experiment.plan.algorithm.client.batch_size or 'all examples'}, but evaluation uses batches "
            f"of {EVALUATION_BATCH}: give Evaluation(batch_size=) to measure as in training; if no comparison is intended, "
            "check that outputs and targets have the same shape"
        )
