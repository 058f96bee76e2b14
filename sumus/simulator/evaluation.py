"""Measurements of the model: on central data, on clients that never train, and on clients that do."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from sumus.errors import ExperimentError, TaskError, at_client
from sumus.executors.own_loop import measured_by
from sumus.experiment import Evaluation
from sumus.figures import figure_names, figure_of
from sumus.metrics import Spread, is_lower_better, pooled, sums_of
from sumus.own_loop import OwnLoop
from sumus.rng import generator
from sumus.simulator.populations.population import Population, as_population, sample
from sumus.simulator.records import RoundRecord
from sumus.simulator.surprises import notes_on_held_out
from sumus.training.program import EVALUATION_BATCH, Program
from sumus.types import Array, Tree
from sumus.work import PERSONAL, ClientState

Measured: TypeAlias = Mapping[str, tuple[float, int]]
"""(sum, count) by metric, including the loss."""
MOST_NOTES = 10
"""The largest number of notes that name clients and metrics with NaN or infinite values."""
Evaluations = dict[str, dict[str, float]]
Spreads = dict[str, dict[str, Spread]]


class Evaluator:
    """Measures models as an `Evaluation` requests, with one program (the task's model on its device).

    Attributes:
        notes: Notes for the user about the measurements, without duplicates.

    Args:
        wanted: The requested measurements.
        population: The training clients.
        program: The model.
        seed: The seed that draws the training clients to measure on.
        present: Positions of the training clients that may be drawn; None for all.
        loop: The user's own code that trains clients. If this code can also evaluate, it makes the measurements.
    """

    def __init__(
        self,
        wanted: Evaluation,
        population: Population,
        program: Program,
        seed: int,
        present: Array | None = None,
        loop: OwnLoop | None = None,
    ) -> None:
        self.notes: dict[str, None] = {}
        self._program = program
        self._loop = loop if loop is not None and loop.evaluate is not None else None
        self._batch_size = wanted.batch_size or EVALUATION_BATCH
        self._central = (
            program.reader.convert("central held-out data", wanted.central) if wanted.central is not None else None
        )
        if self._central is not None:
            self.notes |= dict.fromkeys(notes_on_held_out(self._central[1]))
        self._unseen = as_population(wanted.unseen) if wanted.unseen is not None else None
        self._population = population
        if self._unseen is not None and (both := next((c for c in self._unseen if c in population), None)) is not None:
            raise ExperimentError(
                f"client {both!r} of Evaluation(unseen=) is in the population too: remove it from unseen= or from the "
                "population"
            )
        there = len(population) if present is None else len(present)
        count = min(wanted.seen, there)
        self._seen = sample(population, count, generator(seed, "seen"), present) if count else []

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the measured figures."""
        return figure_names(("loss", *sums_of(self._program.task.metrics)))

    def is_lower_better(self, name: str) -> bool:
        """Return whether a lower value of a figure is better."""
        found = (metric for own, metric in sums_of(self._program.task.metrics).items() if figure_of(own) == name)
        return is_lower_better(name, next(found, None))

    @property
    def wanted(self) -> bool:
        """Whether there is anything to measure on."""
        return self._central is not None or self._unseen is not None or bool(self._seen)

    def measure(self, model: Tree, state_of: Callable[[str], ClientState]) -> tuple[Evaluations, Spreads]:
        """Measure a model.

        Args:
            model: The published leaves.
            state_of: Function that returns the state that a training client keeps.

        Returns:
            Metrics by source over all examples, and their spread over clients.
        """
        program = self._program
        unpersonal = {**program.tensors_of(model), **program.initial_personal}
        evaluations: Evaluations = {}
        spreads: Spreads = {}
        if self._central is not None:
            program.load(unpersonal)
            try:
                measured = self._by_code("central held-out data", *self._central)
            except TaskError as error:
                raise TaskError(f"Evaluation(central=): {error}") from error
            self._note_nan("the central held-out data", measured)
            evaluations["central"] = pooled(measured)
        groups: list[tuple[str, Population, Iterable[Any], Callable[[str], ClientState]]] = []
        if self._unseen is not None:
            groups.append(("unseen", self._unseen, self._unseen, lambda client: {}))
        if self._seen:
            groups.append(("seen", self._population, self._seen, state_of))
        for source, population, chosen, kept_by in groups:
            by_client: dict[Any, Measured] = {}
            for client in chosen:
                program.load({**unpersonal, **program.tensors_of(kept_by(str(client)).get(PERSONAL, {}))})
                by_client[client] = self._measured(population, client)
            evaluations[source] = pooled(added(by_client.values()))
            spreads[source] = self._spreads(by_client)
        return evaluations, spreads

    def with_keys(self, record: RoundRecord) -> RoundRecord:
        """Return a record that was read from a file, in which the key of each worst client replaces the key's text."""
        spreads = dict(record.evaluation.spreads)
        for source, people in (("unseen", self._unseen), ("seen", self._population)):
            if people is not None and source in spreads:
                spreads[source] = {
                    name: replace(spread, worst_client=people.key_of(spread.worst_client))
                    for name, spread in spreads[source].items()
                }
        return replace(record, evaluation=replace(record.evaluation, spreads=spreads))

    def _measured(self, population: Population, client: Any) -> Measured:
        """Measure the leaves that the module holds now on a client's examples."""
        program = self._program
        with at_client(client):
            measured = self._by_code(client, *program.reader.read(population, client))
        self._note_nan(f"client {client!r}", measured)
        return measured

    def _by_code(self, client: Any, inputs: Any, targets: Any) -> Measured:
        """Return the sums of the loss and the metrics over examples, computed by the task's code or by the user's own code."""
        if self._loop is None:
            return self._program.evaluate(inputs, targets, self._batch_size)
        return measured_by(self._program, self._loop, client, inputs, targets)

    def _note_nan(self, where: str, measured: Measured) -> None:
        """Add a note for the user on each mean that is NaN or infinite, until there are `MOST_NOTES` notes."""
        for name, (value, count) in measured.items():
            if count and not math.isfinite(value) and len(self.notes) < MOST_NOTES:
                what = "infinite" if math.isinf(value) else "NaN"
                self.notes[
                    f"{figure_of(name)!r} is {what} on {where}, and so is the mean: NaN counts as the worst value"
                ] = None

    def _spreads(self, by_client: Mapping[Any, Measured]) -> dict[str, Spread]:
        """Return the spread of each metric over the clients on which it was counted."""
        values: dict[str, dict[Any, float]] = {}
        for client, measured in by_client.items():
            for name, mean in pooled(measured).items():
                values.setdefault(name, {})[client] = mean
        return {
            name: Spread.over(list(means), list(means.values()), self.is_lower_better(name))
            for name, means in values.items()
        }


def added(each: Iterable[Measured]) -> dict[str, tuple[float, int]]:
    """Add up the measurements of several clients."""
    totals: dict[str, tuple[float, int]] = {}
    for measured in each:
        for name, (value, count) in measured.items():
            before, counted = totals.get(name, (0.0, 0))
            totals[name] = (before + value, counted + count)
    return totals
