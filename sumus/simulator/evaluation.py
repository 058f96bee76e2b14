"""How good the model is: on central data, on people who never trained, and on people who did."""

from collections.abc import Callable, Iterable
from typing import Any

from sumus.errors import ExperimentError, TaskError, at_client
from sumus.experiment import Evaluate
from sumus.metrics import Spread, is_lower_better, pooled
from sumus.rng import generator
from sumus.simulator.population import Population, as_population, sample
from sumus.training.program import Program
from sumus.types import Tree
from sumus.work import PERSONAL, ClientState

Evaluations = dict[str, dict[str, float]]
Spreads = dict[str, dict[str, Spread]]


class Evaluation:
    """The measurements that `Evaluate` asks for, on one program."""

    def __init__(self, wanted: Evaluate, population: Population, program: Program, seed: int) -> None:
        self._program = program
        self._central = (
            program.reader.convert("central held-out data", wanted.central) if wanted.central is not None else None
        )
        self._unseen = as_population(wanted.unseen) if wanted.unseen is not None else None
        self._population = population
        for name in wanted.target:
            if name not in program.task.metrics and name != "loss":
                known = ", ".join(("loss", *program.task.metrics))
                raise ExperimentError(f"the target names {name!r}, which is not measured; there is {known}")
        if self._unseen is not None and (both := next((c for c in self._unseen if c in population), None)) is not None:
            raise ExperimentError(
                f"client {both!r} of Evaluate(unseen=) is in the population too: hold it out of one of them"
            )
        count = min(wanted.seen, len(population))
        self._seen = sample(population, count, generator(seed, "seen")) if count else []

    @property
    def wanted(self) -> bool:
        """Whether there is anything to measure on."""
        return self._central is not None or self._unseen is not None or bool(self._seen)

    def measure(self, model: Tree, state_of: Callable[[str], ClientState]) -> tuple[Evaluations, Spreads]:
        """Metrics by source over all examples, and their spread over clients. state_of: what a training client keeps."""
        program = self._program
        unpersonal = {**program.tensors_of(model), **program.initial_personal}
        evaluations: Evaluations = {}
        spreads: Spreads = {}
        if self._central is not None:
            program.load(unpersonal)
            try:
                evaluations["central"] = pooled(program.evaluate(*self._central))
            except TaskError as error:
                raise TaskError(f"Evaluate(central=): {error}") from error
        groups: list[tuple[str, Population, Iterable[Any], Callable[[str], ClientState]]] = []
        if self._unseen is not None:
            groups.append(("unseen", self._unseen, self._unseen, lambda client: {}))
        if self._seen:
            groups.append(("seen", self._population, self._seen, state_of))
        for source, population, chosen, kept_by in groups:
            totals: dict[str, tuple[float, int]] = {}
            by_client: dict[str, dict[Any, float]] = {}
            for client in chosen:
                program.load({**unpersonal, **program.tensors_of(kept_by(str(client)).get(PERSONAL, {}))})
                with at_client(client):
                    measured = program.evaluate(*program.reader.read(population, client))
                for name, (value, count) in measured.items():
                    before, counted = totals.get(name, (0.0, 0))
                    totals[name] = (before + value, counted + count)
                for name, mean in pooled(measured).items():
                    by_client.setdefault(name, {})[client] = mean
            evaluations[source] = pooled(totals)
            spreads[source] = {
                name: Spread.over(
                    list(means), list(means.values()), is_lower_better(name, program.task.metrics.get(name))
                )
                for name, means in by_client.items()
            }
        return evaluations, spreads
