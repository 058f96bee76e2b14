"""The product's own demos, on data that comes with Python packages, over three seeds.

    python -m benchmarks.package_data            about 10 minutes on two cores
    python -m benchmarks.package_data --write    also put the table into docs/results.md

health: recordings of watches; three of ten people never train. keyboard: the next word, for five authors who never
train (the first guess counts). digits: 360 images that no client holds, 20 clients with three label shards each. The
recipes were compared on these figures.
"""

import dataclasses
from collections.abc import Callable

import sumus
from benchmarks import learning
from sumus.demos import digits, health, keyboard


def recipe(what: str, demo: Callable[[], sumus.Experiment], metric: str = "accuracy") -> learning.Recipe:
    """Return the recipe of a demo with other seeds."""

    def experiment(seed: int, rounds: int) -> sumus.Experiment:
        return dataclasses.replace(demo(), seed=seed, rounds=rounds)

    return learning.Recipe(what, ROUNDS[demo], experiment, metric)


ROUNDS = {health.experiment: health.ROUNDS, keyboard.experiment: 60, digits.experiment: 40}
RECIPES = {
    "health": recipe("health: FedAdam 0.02, mean of models 0.8", health.experiment),
    "keyboard": recipe("keyboard: FedAdam 0.01", keyboard.experiment, "top1"),
    "digits": recipe("digits: FedAvgM", digits.experiment),
}

if __name__ == "__main__":
    learning.main(
        "benchmarks.package_data",
        __doc__,
        "package-data",
        RECIPES,
        "`python -m benchmarks.package_data`: the three demos",
    )
