"""A small federation that trains in milliseconds."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from torch import nn

import sumus
from sumus.executors.executor import Trained

WEIGHTS = np.linspace(-1, 1, 6, dtype=np.float32)


def examples(client: int, count: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(client)
    inputs = rng.normal(size=(count, 6)).astype(np.float32)
    return inputs, (inputs @ WEIGHTS > 0).astype(np.int64)


@pytest.fixture
def task() -> sumus.Task:
    return sumus.Task(
        model=lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2)),
        loss=sumus.losses.cross_entropy,
        metrics={"accuracy": sumus.metrics.accuracy},
    )


@pytest.fixture
def people() -> sumus.Population:
    return sumus.Population(range(12), examples)


@pytest.fixture
def experiment(task: sumus.Task, people: sumus.Population) -> Callable[..., sumus.Experiment]:
    def make(
        rounds: int = 6,
        seed: int = 0,
        algorithm: sumus.Algorithm | None = None,
        pacing: sumus.Pacing | None = None,
        **evaluate: object,
    ) -> sumus.Experiment:
        algorithm = algorithm or sumus.fedadam(sumus.sgd(lr=0.2, batch_size=8, momentum=0.5), lr=0.05)
        plan = sumus.Plan(task, algorithm, pacing or sumus.Pacing(cohort=4))
        return sumus.Experiment(
            plan,
            people.without([10, 11]),
            rounds,
            sumus.Evaluation(unseen=people.subset([10, 11]), seen=3, **evaluate),
            seed,
        )

    return make


COHORT = sumus.Pacing(cohort=5)
EVERYWHERE: dict[str, Callable[[], tuple[sumus.Algorithm, sumus.Fleet, sumus.Pacing]]] = {
    "fedavg": lambda: (sumus.fedavg(sumus.sgd(lr=0.2, batch_size=8)), sumus.Fleet(), COHORT),
    "scaffold": lambda: (sumus.scaffold(sumus.sgd(lr=0.2, batch_size=8)), sumus.Fleet(lost=0.3), COHORT),
    "median": lambda: (
        sumus.fedavg(sumus.adam(lr=0.05, batch_size=8), aggregator=sumus.robust.median()),
        sumus.Fleet(lost=0.2),
        COHORT,
    ),
    "fleet": lambda: (
        sumus.fedprox(sumus.sgd(lr=0.2, batch_size=8), mu=0.1, update=sumus.quantize(bits=8, range=2.0)),
        sumus.Fleet(lost=0.2, stragglers=0.5, partial_work=False),
        COHORT,
    ),
    "buffered": lambda: (
        sumus.fedbuff(sumus.sgd(lr=0.2, batch_size=8)),
        sumus.Fleet(seconds=60, spread=10, lost=0.1),
        sumus.Pacing(cohort=3, concurrency=6),
    ),
    "buffered scaffold": lambda: (
        sumus.scaffold(sumus.sgd(lr=0.2, batch_size=8)),
        sumus.Fleet(seconds=60, spread=10, network=sumus.FleetNetwork(flaky=0.2)),
        sumus.Pacing(cohort=2, concurrency=6),
    ),
}
"""By name: algorithms and fleets whose rounds are the same wherever their clients train."""


@pytest.fixture
def anywhere(experiment: Callable[..., sumus.Experiment]) -> Callable[..., sumus.Experiment]:
    """One of `EVERYWHERE`, with clients of different sizes."""

    def make(name: str, rounds: int = 3) -> sumus.Experiment:
        algorithm, fleet, pacing = EVERYWHERE[name]()
        made = experiment(rounds=rounds, algorithm=algorithm, pacing=pacing)
        people = sumus.Population(made.population, lambda client: examples(client, 8 + 5 * client))
        return dataclasses.replace(made, population=people, fleet=fleet)

    return make


def told(history: sumus.History) -> dict[str, Any]:
    """Everything in a history but the time it took."""
    rounds = [{**record.to_json(), "seconds": 0} for record in history.rounds]
    return {"model": history.model_sha256, "plan": history.provenance.plan_id, "rounds": rounds}


@pytest.fixture(name="told")
def _told() -> Callable[[sumus.History], dict[str, Any]]:
    return told


class Watched(sumus.Population):
    """A population that remembers what its clients trained, in order."""

    def __init__(self, people: sumus.Population) -> None:
        super().__init__(people.ids, people.__getitem__)
        self.trained: list[Trained] = []

    def sent(self, results: Iterator[Trained]) -> Iterator[Trained]:
        for trained in results:
            self.trained.append(trained)
            yield trained


@pytest.fixture
def remembering() -> Callable[[sumus.Population], Watched]:
    """The same people, with what they trained remembered under `trained`."""
    return Watched
