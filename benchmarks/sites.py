"""Edges with rounds of their own (sites): the traffic that they save upstream, and the accuracy that they cost if sites
differ.

    python -m benchmarks.sites                  three seeds of each (about a quarter of an hour on two cores)
    python -m benchmarks.sites --seeds 1        one seed
    python -m benchmarks.sites --write          also put table and picture into docs/

The data are activities, recorded with a phone at the waist. 21 people, each cut into ten stretches of time, give 210
clients of one to three activities each. 9 other people never train. There are seven sites of 30 clients each. In one
split a site has three people, who do everything that people do. In the other it has clients of similar activities, so a
site has never seen most activities. A round takes 70 clients, and devices train equally often in all runs: with κ₂
rounds of a site between two sums, there are 1/κ₂ as many sums. After Liu et al. 2020, arXiv:1905.06641.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import sumus
from benchmarks import data
from benchmarks.asynchronous import SmallNet, median, stretches
from benchmarks.figures import DOCS
from benchmarks.pool import played
from benchmarks.results import write_table
from sumus.plotting import colormap, figure, save

SITES, COHORT = 7, 70
WORK = 96
"""The number of rounds that devices train in, of the server's or of sites'."""
OWN: tuple[int, ...] = (1, 2, 4, 8)
TARGET = 0.75
ARRANGED = ("three people each", "of like activities")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        arranged: How clients are arranged, one of `ARRANGED`.
        own: The number of rounds that an edge runs between two of its sums.
        seed: The seed.
    """

    arranged: str
    own: int
    seed: int


@dataclass(frozen=True)
class Curve:
    """The result of a run.

    Attributes:
        work: At each evaluation, the rounds that devices have trained in.
        above: At each evaluation, the bytes of sums that went up.
        accuracy: At each evaluation, the accuracy.
        up: All bytes that devices sent.
    """

    work: Sequence[int]
    above: Sequence[int]
    accuracy: Sequence[float]
    up: int

    @property
    def last(self) -> float:
        """The accuracy over the last quarter."""
        return float(np.mean(self.accuracy[-max(1, len(self.accuracy) // 4) :]))

    def reached(self, target: float) -> tuple[float, float]:
        """Return the rounds of devices and the bytes upstream at which the accuracy is reached; infinite if it never
        is."""
        for work, above, accuracy in zip(self.work, self.above, self.accuracy, strict=True):
            if accuracy >= target:
                return work, above
        return np.inf, np.inf


def experiment(run: Run) -> sumus.Experiment:
    """Return the experiment of a run."""
    people, unseen = stretches()
    if run.arranged == ARRANGED[0]:
        persons = sorted({person for person, _ in people})
        order = {client: persons.index(client[0]) * 10 + client[1] for client in people}
    else:
        alike = sorted(people, key=lambda client: (float(np.mean(people[client][1])), client))
        order = {client: place for place, client in enumerate(alike)}
    task = sumus.Task(SmallNet, sumus.losses.cross_entropy, metrics={"accuracy": sumus.metrics.accuracy}, name="hapt")
    algorithm = sumus.fedavg(sumus.sgd(lr=0.1, epochs=1, batch_size=32, clip_norm=5.0))
    plan = sumus.Plan(task, algorithm, sumus.Pacing(COHORT), edges=sumus.Edges(run.own))
    evaluate = sumus.Evaluation(central=unseen)
    rounds = WORK // run.own
    return sumus.Experiment(
        plan, people, rounds, evaluate, run.seed, edge_groups=lambda client: order[client] * SITES // len(people)
    )


def play(run: Run) -> Curve:
    """Run it in one process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    history = sumus.run(
        experiment(run), compute=sumus.Compute(executor="autograd", workers=1), out=sumus.Output(progress=False)
    )
    records = history.rounds
    above = np.cumsum([record.traffic.above for record in records]).tolist()
    work = [record.round * run.own for record in records]
    accuracy = [record.metrics["accuracy"] for record in records]
    return Curve(work, above, accuracy, sum(record.traffic.up for record in records))


def rows(found: Mapping[Run, Curve]) -> list[list[str]]:
    """Return a row for each arrangement and κ₂: medians over seeds."""
    table: list[list[str]] = []
    for arranged in ARRANGED:
        plain: float | None = None
        for own in OWN:
            curves = [curve for run, curve in found.items() if (run.arranged, run.own) == (arranged, own)]
            last, above = median([curve.last for curve in curves]), median([curve.above[-1] for curve in curves])
            work, there = (median([curve.reached(TARGET)[which] for curve in curves]) for which in (0, 1))
            plain = last if plain is None else plain
            spread = f"{min(curve.last for curve in curves):.3f} to {max(curve.last for curve in curves):.3f}"
            table.append(
                [
                    arranged,
                    str(own),
                    f"{above / 1e6:.1f}",
                    f"{median([curve.up for curve in curves]) / 1e6:.0f}",
                    f"{last:.3f} ({spread})",
                    f"{last - plain:+.3f}",
                    f"{work:.0f}" if np.isfinite(work) else "never",
                    f"{there / 1e6:.1f}" if np.isfinite(there) else "never",
                ]
            )
    return table


def plot(found: Mapping[Run, Curve]) -> None:
    """Plot accuracy against the bytes that went up, for the first seed."""
    picture = figure(10.0, 4.0)
    axes = picture.subplots(1, len(ARRANGED), squeeze=False)[0]
    colors = dict(zip(OWN, colormap("viridis", len(OWN) + 1), strict=False))
    for axis, arranged in zip(axes, ARRANGED, strict=True):
        for run, curve in found.items():
            if (run.arranged, run.seed) == (arranged, 0):
                megabytes = [sent / 1e6 for sent in curve.above]
                axis.plot(megabytes, curve.accuracy, label=f"κ₂ = {run.own}", color=colors[run.own], linewidth=1)
        axis.set(xscale="log", xlabel="MB from edges to the server", ylabel="accuracy", title=f"sites {arranged}")
    axes[0].legend(frameon=False, fontsize=8)
    save(picture, DOCS / "sites.png")


def main() -> None:
    """Run and print; with --write also write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each (default 3)")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/")
    args = parser.parse_args()
    data.hapt()  # exits with a message if the data are missing
    runs = [Run(arranged, own, seed) for seed in range(args.seeds) for arranged in ARRANGED for own in OWN]
    found = dict(played(play, runs, lambda curve: f"accuracy {curve.last:.3f}"))
    header = ["sites", "κ₂", "MB from edges up", "MB from devices", "accuracy at the end (least to most)"]
    header += ["against κ₂ = 1", f"device rounds to {TARGET:.2f}", f"MB from edges to {TARGET:.2f}"]
    caption = (
        f"`python -m benchmarks.sites`: 210 clients behind {SITES} edges, {COHORT} a round, {WORK} rounds of work on devices in "
        f"every row, {args.seeds} seeds, medians; accuracy on unseen people over the last quarter"
    )
    write_table("sites", caption, header, rows(found), args.write)
    if args.write:
        plot(found)


if __name__ == "__main__":
    main()
