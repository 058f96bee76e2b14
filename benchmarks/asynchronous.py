"""Synchronous rounds, over-selection and buffers on fleets of fast and slow devices: simulated time and traffic to a
target.

    python -m benchmarks.asynchronous                     tune, then five seeds of each (about an hour on two cores)
    python -m benchmarks.asynchronous --seeds 1           one seed
    python -m benchmarks.asynchronous --write             also put table and picture into docs/

The data are activities, recorded with a phone at the waist. 21 people, each cut into ten stretches of time, give 210
clients of one to three activities each. 9 other people never train. Speeds are spread log-uniformly, 1:10 and 1:100;
the device of median speed takes a minute for a round's work. In each way of training, at most 100 devices work at once.
Step sizes are tuned for each way and rule on one grid, with a seed of its own, at 1:10. The target is an accuracy on
the people who never train: the mean of three evaluations in a row, one every hundred uploads.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import sumus
from benchmarks import data
from benchmarks.figures import DOCS
from benchmarks.pool import played
from benchmarks.results import write_table
from sumus import optimizers, staleness
from sumus.plotting import colormap, figure, save

STRETCHES, AT_ONCE, BUFFER = 10, 100, 10
UPLOADS = 5000
TARGETS = (0.75, 0.80, 0.85)
TUNED_FOR = 0.80
TUNING_SEED = 99
SPREADS = (10, 100)
GRIDS = {"average": (0.1, 0.2, 0.4, 0.8), "adam": (0.005, 0.01, 0.02, 0.04)}
"""The rates of each grid: the clients' under plain averaging; the server's under Adam, with a clients' rate of 0.1."""
WAYS: Mapping[str, sumus.Pacing] = {
    "synchronous, 100": sumus.Pacing(100),
    "synchronous, 30": sumus.Pacing(30),
    "synchronous, 10": sumus.Pacing(10),
    "first 77 of 100": sumus.Pacing(77, over_select=AT_ONCE / 77),
    "buffered, K 10": sumus.Pacing(BUFFER, concurrency=AT_ONCE),
}
PLAIN, BUFFERED = "synchronous, 100", "buffered, K 10"


class SmallNet(nn.Module):
    """Three convolutions over time, their mean, and a linear layer: 11 thousand parameters. (B, 128, 6) → (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (6, 32, 32):
            layers += [nn.Conv1d(channels, 32, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)]
        self.features = nn.Sequential(*layers[:-1])
        self.head = nn.Linear(32, 6)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the scores of the six activities."""
        return self.head(self.features(windows.transpose(1, 2)).mean(2))


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        way: The way of training, a key of `WAYS`.
        rule: "average" or "adam".
        rate: The clients' rate under "average"; the server's under "adam".
        spread: How many times the fastest device is as fast as the slowest.
        seed: The seed.
    """

    way: str
    rule: str
    rate: float
    spread: int
    seed: int


@dataclass(frozen=True)
class Curve:
    """The result of a run.

    Attributes:
        seconds: Simulated seconds at each evaluation.
        uploads: Uploads at each evaluation.
        accuracy: Accuracy at each evaluation.
        fastest: Contributions of the fastest tenth of the devices.
        slowest: Contributions of the slowest tenth.
        wasted: The share of the device time that is in no model.
    """

    seconds: Sequence[float]
    uploads: Sequence[int]
    accuracy: Sequence[float]
    fastest: float
    slowest: float
    wasted: float

    def reached(self, target: float) -> tuple[float, int] | None:
        """Return seconds and uploads when the mean of three evaluations reaches the target; None if it never does."""
        for last in range(2, len(self.accuracy)):
            if np.mean(self.accuracy[last - 2 : last + 1]) >= target:
                return self.seconds[last], self.uploads[last]
        return None


def algorithm(way: str, rule: str, rate: float) -> sumus.Algorithm:
    """Return an algorithm. The clients are the same in all. The mean weights all clients equally, and stale updates
    less."""
    client = sumus.sgd(lr=rate if rule == "average" else 0.1, epochs=1, batch_size=32, clip_norm=5.0)
    server = optimizers.sgd(1.0)
    if rule == "adam":
        server = optimizers.averaged(optimizers.adam(lr=rate, bias_correction=True), 0.95 if way == BUFFERED else 0.8)
    return sumus.fedbuff(client, server=server, staleness=staleness.polynomial(0.5))


def stretches() -> tuple[dict[tuple[int, int], tuple[np.ndarray, np.ndarray]], tuple[np.ndarray, np.ndarray]]:
    """Return the clients by person and stretch of time, and the windows of the people who never train; standardized."""
    windows, labels, person, unseen = data.hapt()
    training = windows[~np.isin(person, unseen)]
    center, scale = training.mean((0, 1)), training.std((0, 1))
    windows = ((windows - center) / scale).astype(np.float32)
    people: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for one in sorted(set(person.tolist()) - set(unseen)):
        rows = np.flatnonzero(person == one)
        for number, some in enumerate(np.array_split(rows, STRETCHES)):
            people[int(one), number] = windows[some], labels[some]
    held_out = np.isin(person, unseen)
    return people, (windows[held_out], labels[held_out])


def experiment(run: Run) -> sumus.Experiment:
    """Return the experiment of a run."""
    people, unseen = stretches()
    task = sumus.Task(SmallNet, sumus.losses.cross_entropy, metrics={"accuracy": sumus.metrics.accuracy}, name="hapt")
    pacing = WAYS[run.way]
    plan = sumus.Plan(task, algorithm(run.way, run.rule, run.rate), pacing)
    every = max(1, round(AT_ONCE / pacing.cohort))
    evaluate = sumus.Evaluation(central=unseen, every=every)
    fleet = sumus.Fleet(seconds=60, spread=run.spread, timing=sumus.FleetTiming(jitter=0.1))
    rounds = UPLOADS // pacing.cohort // every * every
    return sumus.Experiment(plan, people, rounds, evaluate, run.seed, fleet)


def play(run: Run) -> Curve:
    """Run it in one process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    history = sumus.run(
        experiment(run), compute=sumus.Compute(executor="autograd", workers=1), out=sumus.Output(progress=False)
    )
    uploads = np.cumsum([record.traffic.up for record in history.rounds]) // max(
        1, history.rounds[0].traffic.up // history.rounds[0].clients
    )
    seen = [(record.at, int(uploads[record.round - 1]), record.metrics["accuracy"]) for record in history.evaluated]
    seconds, sent, accuracy = zip(*seen, strict=True)
    assert history.fleet is not None
    by_speed = history.fleet.by_speed
    return Curve(seconds, sent, accuracy, by_speed[0], by_speed[-1], history.fleet.wasted_share)


def _said(curve: Curve) -> object:
    return curve.reached(TUNED_FOR)


def tuned() -> dict[tuple[str, str], float]:
    """Return the best rate of each way and rule."""
    runs = [
        Run(way, rule, rate, SPREADS[0], TUNING_SEED) for way in WAYS for rule, grid in GRIDS.items() for rate in grid
    ]
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for run, curve in played(play, runs, _said):
        reached = curve.reached(TUNED_FOR)
        score = reached[0] if reached else 1e9 - float(np.mean(curve.accuracy[-3:]))
        best[run.way, run.rule] = min(best.get((run.way, run.rule), (np.inf, 0.0)), (score, run.rate))
    return {where: rate for where, (_, rate) in best.items()}


def median(values: Sequence[float]) -> float:
    """Return the median over seeds; infinite if most seeds never reach the target."""
    return float(np.median(values)) if values else np.inf


def shown(values: Sequence[float]) -> str:
    """Return "median (least to most)" as text."""
    middle = median(values)
    if not np.isfinite(middle):
        return "never"
    most = max(values)
    return (
        f"{middle:,.0f} ({min(values):,.0f} to {most:,.0f})"
        if np.isfinite(most)
        else f"{middle:,.0f} ({min(values):,.0f} to never)"
    )


def rows(found: Mapping[Run, Curve]) -> list[list[str]]:
    """Return the table's rows: one for each spread, rule and way."""
    table: list[list[str]] = []
    for spread in SPREADS:
        for rule in GRIDS:
            of_way = {
                way: [curve for run, curve in found.items() if (run.way, run.rule, run.spread) == (way, rule, spread)]
                for way in WAYS
            }
            plain = median([reached[0] if (reached := curve.reached(TUNED_FOR)) else np.inf for curve in of_way[PLAIN]])
            for way, curves in of_way.items():
                (rate,) = {run.rate for run in found if (run.way, run.rule) == (way, rule)}
                times = {t: [r[0] if (r := curve.reached(t)) else np.inf for curve in curves] for t in TARGETS}
                sent = [float(r[1]) if (r := curve.reached(TUNED_FOR)) else np.inf for curve in curves]
                ratio = median(times[TUNED_FOR]) / plain
                contributions = [f"{curve.fastest:.0f} / {curve.slowest:.0f}" for curve in curves[:1]]
                table.append(
                    [
                        f"1:{spread}",
                        rule,
                        way,
                        f"{rate:g}",
                        *(shown(times[target]) for target in TARGETS),
                        f"{ratio:.2f}" if np.isfinite(ratio) else "",
                        shown(sent),
                        f"{np.median([curve.wasted for curve in curves]):.0%}",
                        *contributions,
                    ]
                )
    return table


def plot(found: Mapping[Run, Curve], seed: int) -> None:
    """Plot accuracy against simulated time."""
    picture = figure(11.0, 7.0)
    axes = picture.subplots(len(GRIDS), len(SPREADS), squeeze=False)
    colors = dict(zip(WAYS, colormap("tab10", len(WAYS)), strict=True))
    for row, rule in zip(axes, GRIDS, strict=True):
        for axis, spread in zip(row, SPREADS, strict=True):
            for run, curve in found.items():
                if (run.rule, run.spread, run.seed) == (rule, spread, seed):
                    axis.plot(curve.seconds, curve.accuracy, label=run.way, color=colors[run.way], linewidth=1)
            axis.axhline(TUNED_FOR, color="black", linewidth=0.6, linestyle=":")
            axis.set(
                xscale="log",
                xlabel="simulated seconds",
                ylabel="accuracy",
                title=f"{rule}, speeds 1:{spread}",
                ylim=(0.3, 0.95),
            )
    axes[0][0].legend(frameon=False, fontsize=8)
    save(picture, DOCS / "asynchronous.png")


def main() -> None:
    """Tune, run and print; with --write also write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each (default 5)")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/")
    args = parser.parse_args()
    data.hapt()  # exits with a message if the data are missing
    rates = tuned()
    runs = [
        Run(way, rule, rates[way, rule], spread, seed)
        for seed in range(args.seeds)
        for spread in SPREADS
        for rule in GRIDS
        for way in WAYS
    ]
    found: dict[Run, Curve] = dict(played(play, runs, _said))
    header = ["speeds", "server", "way", "rate", *(f"seconds to {target:.2f}" for target in TARGETS)]
    header += [f"of plain synchronous, at {TUNED_FOR:.2f}", f"uploads to {TUNED_FOR:.2f}", "wasted work"]
    header += ["contributions of a device, fastest / slowest tenth"]
    caption = (
        f"`python -m benchmarks.asynchronous`: 210 clients, at most {AT_ONCE} at once, {args.seeds} seeds, median (least to "
        f"most); simulated seconds until unseen people's accuracy is there, in {UPLOADS} uploads"
    )
    write_table("asynchronous", caption, header, rows(found), args.write)
    if args.write:
        plot(found, 0)


if __name__ == "__main__":
    main()
