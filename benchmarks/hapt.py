"""Phone activity recognition: six activities, one client a person, the official split by person.

    python -m benchmarks.hapt                  every recipe, three seeds (about 12 minutes on two cores)
    python -m benchmarks.hapt --recipe running --seeds 0 --rounds 5
    python -m benchmarks.hapt --write          also put the table into docs/results.md

21 people train, 9 are never seen; figures are on the windows of the unseen people. Centralised training of such a net
reaches 0.93, with 0.76 for the worst person. Recipes were chosen on seed 0 among few (server rate 0.01, client rate 0.1,
two epochs, a prior of 100 or 300 windows) and are the same for all seeds; no unseen person was used to stop a run.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import sumus
from benchmarks import data
from benchmarks.results import write_table
from sumus import optimizers, preparation

# What a phone at the waist measures on most people: gravity along x, in g and rad/s. Public constants, not statistics.
CENTER, SCALE = (0.8, 0.0, 0.0, 0.0, 0.0, 0.0), (0.4, 0.4, 0.4, 0.5, 0.5, 0.5)


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
    """A named configuration of this benchmark."""

    what: str
    algorithm: sumus.Algorithm
    prepare: Callable[..., object]
    rounds: int


CLIENT = sumus.sgd(lr=0.1, epochs=2, batch_size=32)
FEDADAM = sumus.fedavg(CLIENT, server=optimizers.averaged(optimizers.adam(lr=0.01, bias_correction=True), decay=0.9))

RECIPES = {
    "fedavg": Recipe("FedAvg, public scale", sumus.fedavg(CLIENT), preparation.standardize(CENTER, SCALE), 100),
    "plain": Recipe("FedAdam 0.01, mean of models, public scale", FEDADAM, preparation.standardize(CENTER, SCALE), 100),
    "running": Recipe(
        "the same, standardised on the device by a running estimate",
        FEDADAM,
        preparation.standardize_running(prior=100, center=CENTER, scale=SCALE),
        100,
    ),
}


def experiment(recipe: Recipe, seed: int, rounds: int | None = None) -> sumus.Experiment:
    """One run of a recipe."""
    windows, labels, person, unseen = data.hapt()
    people = sumus.Population.from_arrays(windows, labels, by=person)
    task = sumus.Task(
        model=ActivityNet,
        loss=sumus.losses.cross_entropy,
        metrics={"accuracy": sumus.metrics.accuracy},
        prepare=recipe.prepare,
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
        f"`python -m benchmarks.hapt`: 21 people train, 9 unseen; cohort 10, SGD 0.1, two epochs, batch 32; seeds "
        f"{', '.join(map(str, args.seeds))}, one core a run, {args.processes} runs side by side."
    )
    write_table("hapt", caption, header, rows, write=args.write)


if __name__ == "__main__":
    main()
