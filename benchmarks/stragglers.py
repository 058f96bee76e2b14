"""The value of partial work: devices of unequal speed, on data of unequal kind.

    python -m benchmarks.stragglers            about 20 minutes on two cores
    python -m benchmarks.stragglers --write    also put the tables into docs/results.md

The data are the synthetic(1, 1) set of Li et al. 2020 (arXiv:1812.06127, appendix C.1): 30 devices of unequal sizes,
each with its own softmax regression on its own inputs. A fifth of every device's data is held out. Ten devices take
part in a round, with five epochs each. In each round, a share of them has time for a random part of its steps. There
are four methods:

    FedAvg, drop       stragglers are not counted, as in McMahan et al. 2017
    FedAvg, partial    partial work is counted
    FedProx            the same, with a proximal term that holds clients to the model that was sent
    FedNova            the same as FedAvg, partial, but counted per step

Each method is tuned on one grid of rates (FedProx: also three μ) with three seeds, and measured with ten others. A seed
draws the data, the initial model, the cohorts and the stragglers, so differences are taken seed by seed.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from torch import nn

import sumus
from benchmarks import compare
from benchmarks.results import write_table
from sumus.rng import generator

DEVICES, INPUTS, CLASSES, ROUNDS = 30, 60, 10, 80
RATES, MUS = (0.01, 0.03, 0.1, 0.3), (0.01, 0.1, 1.0)
SHARES = {"half": 0.5, "most": 0.9}


@cache
def devices(seed: int) -> tuple[sumus.Population, sumus.Population]:
    """Return the first four fifths of each device's examples, and the last fifth: synthetic(1, 1)."""
    rng = generator(seed, "synthetic")
    sizes = np.clip(rng.lognormal(4, 1, DEVICES).astype(int), 20, 400)
    deviations = np.arange(1, INPUTS + 1) ** -0.6  # covariance j^-1.2
    held: list[tuple[np.ndarray, np.ndarray]] = []
    for size, mean_model, mean_input in zip(sizes, rng.normal(0, 1, DEVICES), rng.normal(0, 1, DEVICES), strict=True):
        weights, bias = rng.normal(mean_model, 1, (INPUTS, CLASSES)), rng.normal(mean_model, 1, CLASSES)
        inputs = rng.normal(mean_input, 1, INPUTS) + rng.normal(size=(size, INPUTS)) * deviations
        held.append((inputs.astype(np.float32), (inputs @ weights + bias).argmax(1)))

    def part(first: float, last: float) -> list[tuple[np.ndarray, np.ndarray]]:
        cuts = [(int(first * len(y)), int(last * len(y))) for _, y in held]
        return [(x[start:stop], y[start:stop]) for (x, y), (start, stop) in zip(held, cuts, strict=True)]

    return (
        sumus.Population.from_pairs(enumerate(part(0.0, 0.8))),
        sumus.Population.from_pairs((f"{name}, held out", pair) for name, pair in enumerate(part(0.8, 1.0))),
    )


def trial(algorithm: sumus.Algorithm, fleet: sumus.Fleet) -> Callable[[int], sumus.Experiment]:
    """Return a function (seed) → experiment."""

    def experiment(seed: int) -> sumus.Experiment:
        training, held_out = devices(seed)
        task = sumus.Task(
            lambda: nn.Linear(INPUTS, CLASSES), sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}
        )
        plan = sumus.Plan(task, algorithm, sumus.Pacing(cohort=10))
        return sumus.Experiment(plan, training, ROUNDS, sumus.Evaluation(unseen=held_out, every=4), seed, fleet)

    return experiment


def client(rate: float) -> sumus.ClientWork:
    """Return the work of a client: five epochs of SGD."""
    return sumus.sgd(rate, epochs=5, batch_size=10)


def methods(share: float) -> dict[str, compare.Settings]:
    """Return the four methods under this share of stragglers, with their grids."""
    late, partial = sumus.Fleet(stragglers=share, partial_work=False), sumus.Fleet(stragglers=share)
    return {
        "FedAvg, drop": {f"rate {r}": trial(sumus.fedavg(client(r)), late) for r in RATES},
        "FedAvg, partial": {f"rate {r}": trial(sumus.fedavg(client(r)), partial) for r in RATES},
        "FedProx": {f"rate {r}, μ {mu}": trial(sumus.fedprox(client(r), mu), partial) for r in RATES for mu in MUS},
        "FedNova": {f"rate {r}": trial(sumus.fednova(client(r)), partial) for r in RATES},
    }


METHODS = {f"{word}: {name}": settings for word, share in SHARES.items() for name, settings in methods(share).items()}


def main() -> None:
    """Tune, measure and print; with --write also write the tables."""
    args = compare.arguments(__doc__, seeds=10)
    figures = compare.tuned("benchmarks.stragglers", METHODS, args.seeds, args.processes)
    for word, share in SHARES.items():
        mine = {name.partition(": ")[2]: figure for name, figure in figures.items() if name.startswith(word)}
        caption = (
            f"`python -m benchmarks.stragglers`: {share:.0%} stragglers, {ROUNDS} rounds; accuracy on everyone's held-out fifth, "
            f"mean of the last five of {ROUNDS // 4} evaluations, {len(args.seeds)} seeds, 95 % intervals."
        )
        header = ["method", "tuned to", "accuracy", "against FedAvg, drop"]
        write_table(f"stragglers-{word}", caption, header, compare.rows(mine, "FedAvg, drop"), write=args.write)


if __name__ == "__main__":
    main()
