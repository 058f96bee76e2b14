"""Handwritten digits (scikit-learn's 1,797 images) split over clients: the small real problem of several comparisons."""

from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
from torch import nn

import sumus
from sumus import splits
from sumus.demos import sources
from sumus.rng import generator

CLIENTS = 40
Split = Literal["iid", "shards", "dirichlet"]


class DigitNet(nn.Module):
    """Two linear layers: 5 thousand parameters. (B, 64) → (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images):
        """Return the scores of the ten digits."""
        return self.layers(images)


@cache
def images() -> tuple[np.ndarray, np.ndarray]:
    """Return the images (1797, 64) float32 in [0, 1], and the digits, in one random order."""
    pixels, labels = sources.digits()
    order = generator("digits").permutation(len(pixels))
    return pixels.reshape(len(pixels), -1)[order], labels[order]


def people(split: Split, seed: int) -> sumus.Population:
    """Split 1,437 images over 40 clients: at random, two label shards each, or Dirichlet 0.5."""
    pixels, labels = images()
    pixels, labels = pixels[360:], labels[360:]
    by = {
        "iid": lambda: splits.iid(len(labels), CLIENTS, seed),
        "shards": lambda: splits.shards(labels, CLIENTS, 2, seed),
        "dirichlet": lambda: splits.dirichlet(labels, CLIENTS, 0.5, seed, at_least=5),
    }[split]()
    return sumus.Population.from_arrays(pixels, labels, by=by)


def trial(
    algorithm: sumus.Algorithm,
    split: Split,
    rounds: int,
    cohort: int,
    population: Callable[[sumus.Population, int], sumus.Population] = lambda honest, seed: honest,
    fleet: sumus.Fleet | None = None,
) -> Callable[[int], sumus.Experiment]:
    """Return a function (seed) → experiment. Accuracy is measured on 360 images that no client holds.

    Args:
        algorithm: The algorithm.
        split: The split.
        rounds: The number of rounds.
        cohort: The clients of a round.
        population: (honest population, seed) → the population that takes part.
        fleet: The fleet, if there is one.
    """

    def experiment(seed: int) -> sumus.Experiment:
        pixels, labels = images()
        task = sumus.Task(DigitNet, sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, name="digits")
        return sumus.Experiment(
            sumus.Plan(task, algorithm, sumus.Pacing(cohort)),
            population(people(split, seed), seed),
            rounds,
            sumus.Evaluation(central=(pixels[:360], labels[:360]), every=max(1, rounds // 20)),
            seed,
            fleet or sumus.Fleet(),
        )

    return experiment
