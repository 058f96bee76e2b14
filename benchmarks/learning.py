"""Common code of the learning benchmarks: recipes, seeds, parallel runs, and one table.

A module that uses this code has `RECIPES` by name, and calls `main(__name__, …)`. Each run uses one seed and one core,
and goes to its last round. Figures are those of the last round.
"""

import argparse
import importlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sumus
from benchmarks import data
from benchmarks.results import write_table


@dataclass(frozen=True)
class Recipe:
    """A named configuration.

    Attributes:
        what: Its description in the table.
        rounds: The number of rounds.
        experiment: (seed, rounds) → experiment.
        metric: The metric of its figure.
    """

    what: str
    rounds: int
    experiment: Callable[[int, int], sumus.Experiment]
    metric: str = "accuracy"


@dataclass(frozen=True)
class Run:
    """The result of one seed of one recipe. Median and worst are over clients; None if clients were not measured
    separately."""

    recipe: str
    seed: int
    accuracy: float
    median: float | None
    worst: float | None
    seconds: float

    def __str__(self) -> str:
        clients = f", median {self.median:.3f}, worst {self.worst:.3f}" if self.median is not None else ""
        return f"{self.recipe:10} seed {self.seed}: accuracy {self.accuracy:.3f}{clients}, {self.seconds:.0f} s"


def one_run(job: tuple[str, str, int, int]) -> Run:
    """Run (module, recipe, seed, rounds), print its figures and return them."""
    module, name, seed, rounds = job
    began = time.perf_counter()
    recipe: Recipe = importlib.import_module(module).RECIPES[name]
    history = sumus.run(recipe.experiment(seed, rounds), out=sumus.Output(progress=False))
    spread = history.spreads.get("unseen", {}).get(recipe.metric)
    median, worst = (spread.median, spread.worst) if spread else (None, None)
    run = Run(name, seed, history.metrics[recipe.metric], median, worst, time.perf_counter() - began)
    print(run, flush=True)
    return run


def main(
    module: str,
    doc: str | None,
    table: str,
    recipes: Mapping[str, Recipe],
    caption: str,
    client: str = "",
    data_set: str = "",
) -> None:
    """Run all recipes and print; with --write also write the table.

    Args:
        module: The module with `RECIPES`.
        doc: The text of --help.
        table: The table's name in docs/results.md.
        recipes: The recipes by name.
        caption: The table's caption.
        client: What a client is called, if the table has columns for the median and the worst client.
        data_set: The data set's folder, if it is not in a package.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=recipes, action="append", help="only these (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, help="instead of the recipe's")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md")
    args = parser.parse_args()
    if data_set:
        data.folder(data_set)
    chosen = {name: recipes[name] for name in args.recipe or recipes}
    jobs = [
        (module, name, seed, args.rounds or recipe.rounds) for name, recipe in chosen.items() for seed in args.seeds
    ]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        runs = pool.map(one_run, jobs, chunksize=1)
    rows = [
        [recipe.what, str(args.rounds or recipe.rounds), *_cells([r for r in runs if r.recipe == name], bool(client))]
        for name, recipe in chosen.items()
    ]
    header = ["recipe", "rounds", "accuracy, median (min to max)"]
    header += [f"median {client}", f"worst {client}"] if client else []
    seeds = ", ".join(map(str, args.seeds))
    told = f"{caption}; seeds {seeds}, one core a run, {args.processes} runs side by side."
    write_table(table, told, [*header, "seconds a run"], rows, write=args.write)


def _cells(runs: list[Run], clients: bool) -> list[str]:
    def median_and_range(values: list[float]) -> str:
        return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    middle, _, spread = median_and_range([run.accuracy for run in runs]).partition(" ")
    cells = [f"**{middle}** {spread}"]
    if clients:
        cells.append(f"{statistics.median(run.median for run in runs if run.median is not None):.3f}")
        cells.append(median_and_range([run.worst for run in runs if run.worst is not None]))
    return [*cells, f"{statistics.median(run.seconds for run in runs):.0f}"]
