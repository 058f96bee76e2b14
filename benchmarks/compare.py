"""Common code of the comparisons: every method is tuned on one grid with tuning seeds, and then measured with other
seeds.

A module that uses this code has `METHODS`: method → label → a function (seed) → experiment. The figure of a run is its
mean accuracy over the last five evaluations. Intervals are Student's t intervals at 95 % over the measured seeds.
"""

import argparse
import importlib
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence

from scipy import stats

import sumus

Settings = Mapping[str, Callable[[int], sumus.Experiment]]
Figures = Mapping[str, tuple[str, Sequence[float]]]
"""Method → (the chosen setting, its figure for each measured seed)."""

TUNING = (1000, 1001, 1002)


def one_run(job: tuple[str, str, str, int]) -> float:
    """Run (module, method, setting, seed), and return its figure; 0 if training gave NaN, or numbers beyond what sums
    can hold."""
    module, method, setting, seed = job
    experiment = importlib.import_module(module).METHODS[method][setting](seed)
    try:
        history = sumus.run(experiment, out=sumus.Output(progress=False))
    except sumus.ParticipantError:
        return 0.0
    return statistics.mean(record.metrics["accuracy"] for record in history.evaluated[-5:])


def tuned(module: str, methods: Mapping[str, Settings], seeds: Sequence[int], processes: int) -> Figures:
    """Choose each method's best setting on the tuning seeds, then measure it."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:

        def measure(settings: Mapping[str, Sequence[str]], on: Sequence[int]) -> dict[tuple[str, str], list[float]]:
            pairs = [(name, setting) for name, labels in settings.items() for setting in labels]
            runs = pool.map(one_run, [(module, *pair, seed) for pair in pairs for seed in on], chunksize=1)
            return {pair: runs[i * len(on) : (i + 1) * len(on)] for i, pair in enumerate(pairs)}

        trials = measure({name: list(settings) for name, settings in methods.items()}, TUNING)
        best: dict[str, str] = {}
        for name, settings in methods.items():
            best[name] = max(settings, key=lambda setting: statistics.mean(trials[name, setting]))
            tried = ", ".join(f"{label} {statistics.mean(trials[name, label]):.3f}" for label in settings)
            print(f"{name}: {best[name]} (of {tried})", flush=True)
        measured = measure({name: [setting] for name, setting in best.items()}, seeds)
        return {name: (setting, measured[name, setting]) for name, setting in best.items()}


def interval(values: Sequence[float], signed: bool = False) -> str:
    """Return mean and 95 % interval as text."""
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):{'+' if signed else ''}.3f} ± {half:.3f}"


def rows(figures: Figures, reference: str) -> list[list[str]]:
    """Return one row for each method: name, setting, figure, and its difference from a reference on the same seeds."""
    base = figures[reference][1]
    return [
        [
            name,
            setting,
            interval(values),
            "" if name == reference else interval([a - b for a, b in zip(values, base, strict=True)], signed=True),
        ]
        for name, (setting, values) in figures.items()
    ]


def arguments(doc: str | None, seeds: int) -> argparse.Namespace:
    """Read the command line of a comparison."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md")
    return parser.parse_args()
