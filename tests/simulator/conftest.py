"""A small federation that trains in milliseconds."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from torch import nn

import sumus
from sumus.training.executor import Trained

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
        rounds: int = 6, seed: int = 0, algorithm: sumus.Algorithm | None = None, **evaluate: object
    ) -> sumus.Experiment:
        algorithm = algorithm or sumus.fedadam(sumus.sgd(lr=0.2, batch_size=8, momentum=0.5), lr=0.05)
        plan = sumus.Plan(task, algorithm, sumus.Pacing(cohort=4))
        return sumus.Experiment(
            plan,
            people.without([10, 11]),
            rounds,
            sumus.Evaluate(unseen=people.subset([10, 11]), seen=3, **evaluate),
            seed,
        )

    return make


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
