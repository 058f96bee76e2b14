"""The simulator's input: a plan, a population to run it on, and the measurements to take on the way."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sumus.errors import ExperimentError, PlanError, expect
from sumus.fleet import PERFECT, Fleet
from sumus.plan import Plan
from sumus.types import hold_plain_numbers, plain_number

Examples = Any
"""`(inputs, targets)`, arrays or tensors with one row per example; or a torch `Dataset` of such pairs."""


def seed_of(seed: Any) -> int:
    """Return a seed as a whole number that fits into 64 bits; raise PlanError or ExperimentError for any other value."""
    seed = plain_number(seed)
    expect(seed, int, "seed=")
    if not -(2**63) <= seed < 2**63:
        raise ExperimentError(f"seed={seed}: it must fit into 64 bits")
    return int(seed)


def expect_population(population: object) -> None:
    """Refuse an object that is not a population: a mapping from clients' ids to their examples."""
    if not isinstance(population, Mapping):
        raise ExperimentError(
            f"population= takes a mapping from each client's id to its examples, not a {type(population).__name__}: give a "
            "dict, or sumus.Population(ids, load), where load is a function of an id"
        )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The data that a run is measured on, and how often it is measured.

    Attributes:
        central: Held-out `(inputs, targets)` in one place, held by no client.
        unseen: Clients that never train, as a population; personal leaves have their initial values there.
        seen: The number of training clients to measure on too, drawn once by the seed; each has its own personal leaves.
        every: The number of rounds between evaluations; the last round is always evaluated.
        target: Stop as soon as every metric here is reached, such as `{"accuracy": 0.9}`.
        batch_size: The number of examples that the model, the loss and the metrics receive at once. It affects a figure only if
            a loss or a metric compares the examples of a batch with one another; then give the batch size of training.
        first: Whether the model is measured before round 1 too (`History.start`).
        best: A metric, or "loss": the model that is best by it is kept (`History.best`), as well as the last one.
        patience: Stop after this number of measurements in a row without an improvement. It needs `best`.

    A record's `metrics` come from the first of central, unseen and seen that is given, else from local training.
    """

    central: Examples | None = None
    unseen: Mapping[Any, Examples] | None = None
    seen: int = 0
    every: int = 1
    target: Mapping[str, float] = field(default_factory=dict[str, float])
    batch_size: int | None = None
    first: bool = False
    best: str | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        expect(self.every, int, "Evaluation(every=)")
        expect(self.first, bool, "Evaluation(first=)")
        measures = self.central is not None or self.unseen is not None or bool(self.seen)
        for name, given in (("first", self.first), ("best", self.best)):
            if given and not measures:
                raise ExperimentError(f"Evaluation({name}=) needs something to measure on: central=, unseen= or seen=")
        if self.best is not None:
            expect(self.best, str, "Evaluation(best=)")
        if self.patience is not None:
            expect(self.patience, int, "Evaluation(patience=)")
            if self.patience < 1:
                raise ExperimentError(f"Evaluation(patience={self.patience}): wait for 1 or more measurements")
            if self.best is None:
                raise ExperimentError("Evaluation(patience=) needs best=, the metric that says which model is better")
        if self.batch_size is not None:
            expect(self.batch_size, int, "Evaluation(batch_size=)")
            if self.batch_size < 1:
                raise ExperimentError(f"Evaluation(batch_size={self.batch_size}): measure 1 or more examples at once")
        expect(self.seen, int, "Evaluation(seen=)")
        if self.unseen is not None:
            expect(self.unseen, Mapping, "Evaluation(unseen=)")
            if not len(self.unseen):
                raise ExperimentError("Evaluation(unseen=) is empty: give clients, or leave it out")
        if self.target and self.central is None and self.unseen is None and not self.seen:
            raise ExperimentError("Evaluation(target=) needs something to measure on: central=, unseen= or seen=")
        if self.seen < 0:
            raise ExperimentError(f"Evaluation(seen={self.seen}): measure 0 or more of the training clients")
        if self.every < 1:
            raise ExperimentError(f"Evaluation(every={self.every}): evaluate every 1 or more rounds")


@dataclass(frozen=True, eq=False)
class Experiment:
    """A plan on a population.

    Attributes:
        plan: The plan.
        population: Client id → examples, which are read only when the client is picked.
        rounds: The number of rounds.
        evaluate: The measurements, and how often they are taken.
        seed: The seed of everything random; two runs with the same seed give the same model, bit for bit.
        fleet: The properties of the devices; by default all of them finish, and every report arrives.
        edge_groups: The edges of clients: a number of edges, which divide the population equally and in order; or a function
            from a client's id to the name of its edge. By default there are no edges. The plan decides what edges do.
    """

    plan: Plan
    population: Mapping[Any, Examples]
    rounds: int
    evaluate: Evaluation = Evaluation()
    seed: int = 0
    fleet: Fleet = PERFECT
    edge_groups: int | Callable[[Any], Hashable] = 0

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        expect(self.plan, Plan, "plan=")
        expect_population(self.population)
        expect(self.rounds, int, "rounds=")
        expect(self.evaluate, Evaluation, "evaluate=")
        expect(self.fleet, Fleet, "fleet=")
        object.__setattr__(self, "seed", seed_of(self.seed))
        if self.rounds < 1:
            raise ExperimentError(f"rounds={self.rounds}: an experiment needs at least one round")
        if not len(self.population):
            raise ExperimentError("the population is empty: give at least one client")
        if not callable(self.edge_groups):
            expect(self.edge_groups, int, "edge_groups=")
            if not 0 <= self.edge_groups <= len(self.population):
                raise ExperimentError(
                    f"edge_groups={self.edge_groups}: give from 1 to {len(self.population)} (all clients), or "
                    "a function of a client's id"
                )
        self._expect_whole_work()
        if self.plan.edges.rounds > 1 and not self.edge_groups:
            raise ExperimentError(
                f"the plan lets edges do {self.plan.edges.rounds} rounds of their own, but there are no edges: give edge_groups= "
                "(--edge-groups)"
            )
        if self.plan.pacing.cohort > len(self.population):
            raise ExperimentError(
                f"a cohort of {self.plan.pacing.cohort} is larger than the population of {len(self.population)}: "
                "lower Pacing(cohort=), or add clients"
            )

    def _expect_whole_work(self) -> None:
        """Raise PlanError if the user's own code would have to stop after some of its steps, or to measure in batches."""
        loop = self.plan.algorithm.client.loop
        if loop is None:
            return
        if self.fleet.stragglers and self.fleet.partial_work:
            raise PlanError(
                "own-loop",
                f"stragglers take only some of their steps, but sumus cannot stop `{loop.train}` after some steps: give "
                "Fleet(partial_work=False), so that a straggler is not counted, or train by sgd(), adam() or adamw()",
            )
        if loop.evaluate is not None and self.evaluate.batch_size is not None:
            raise PlanError(
                "own-loop",
                f"Evaluation(batch_size=) is for the task's metrics, but `{loop.evaluate}` measures all examples of a client "
                "at once: leave batch_size= out",
            )
