"""Accuracy of each algorithm if clients differ in kind: handwritten digits, two label shards for each client.

    python -m benchmarks.algorithms            about 10 minutes on two cores
    python -m benchmarks.algorithms --write    also put the table into docs/results.md

40 clients have about 36 images each, most of them of two digits. Eight clients take part in a round, with five epochs
each, for 60 rounds. Every algorithm is tuned on one grid of client rates and of its own parameters (μ, α, a server
rate), on three seeds. It is then measured on ten other seeds. A seed draws the split, the initial model and the
cohorts, so differences are taken seed by seed.
"""

import sumus
from benchmarks import compare
from benchmarks.digits import DigitNet, trial
from benchmarks.results import write_table
from sumus import optimizers
from sumus.aggregate import Part

ROUNDS, COHORT = 60, 8
RATES = (0.03, 0.1, 0.3, 1.0)


def client(rate: float) -> sumus.ClientWork:
    """Return the work of a client: five epochs of SGD."""
    return sumus.sgd(rate, epochs=5, batch_size=10)


def adam(rate: float) -> sumus.ServerOptimizer:
    """Return FedAdam's server optimizer, with bias correction in its first rounds."""
    return optimizers.adam(rate, bias_correction=True)


ALGORITHMS: dict[str, dict[str, sumus.Algorithm]] = {
    "FedAvg": {f"rate {r}": sumus.fedavg(client(r)) for r in RATES},
    "FedAvgM": {f"rate {r}, β {b}": sumus.fedavgm(client(r), 1.0, b) for r in RATES for b in (0.5, 0.9)},
    "FedAdam": {
        f"rate {r}, server {s}": sumus.fedavg(client(r), server=adam(s)) for r in RATES for s in (0.01, 0.03, 0.1)
    },
    "FedProx": {f"rate {r}, μ {mu}": sumus.fedprox(client(r), mu) for r in RATES for mu in (0.01, 0.1, 1.0)},
    "SCAFFOLD, option 1": {f"rate {r}": sumus.scaffold(client(r), option=1) for r in RATES},
    "SCAFFOLD, option 2": {f"rate {r}": sumus.scaffold(client(r)) for r in RATES},
    "FedNova": {f"rate {r}": sumus.fednova(client(r)) for r in RATES},
    "FedDyn": {f"rate {r}, α {a}": sumus.feddyn(client(r), a) for r in RATES for a in (0.01, 0.1, 1.0)},
    "FedBuff's rule": {f"rate {r}": sumus.fedbuff(client(r)) for r in RATES},
    "Cyclic": {f"rate {r}": sumus.cyclic(client(r)) for r in (0.003, 0.01, *RATES)},
}
METHODS = {
    name: {label: trial(algorithm, "shards", ROUNDS, COHORT) for label, algorithm in settings.items()}
    for name, settings in ALGORITHMS.items()
}


def bytes_up(algorithm: sumus.Algorithm) -> int:
    """Return how many bytes a client of this algorithm sends."""
    parameters = sum(parameter.numel() for parameter in DigitNet().parameters())
    return sum(4 * (parameters if part.content == "leaves" else 1) for part in algorithm.aggregator.parts)


def weighing(part: Part) -> str:
    """Describe a part's weight and denominator in words."""
    weight = part.weight if isinstance(part.weight, str) else f"{part.weight!r}"
    return f"{part.name}: {weight} / {part.denominator}"


def main() -> None:
    """Tune, measure and print; with --write also write the table."""
    args = compare.arguments(__doc__, seeds=10)
    figures = compare.tuned("benchmarks.algorithms", METHODS, args.seeds, args.processes)
    rows: list[list[str]] = []
    for row in compare.rows(figures, "FedAvg"):
        algorithm = ALGORITHMS[row[0]][row[1]]
        up = bytes_up(algorithm) / bytes_up(ALGORITHMS["FedAvg"]["rate 0.1"])
        parts = "; ".join(weighing(part) for part in algorithm.aggregator.parts)
        rows.append([*row, f"{up:.1f}", "yes" if algorithm.client.keeps_state else "no", parts])
    caption = (
        f"`python -m benchmarks.algorithms`: {ROUNDS} rounds, cohort {COHORT} of 40, mean of the last five of 20 evaluations, "
        f"{len(args.seeds)} seeds, 95 % intervals."
    )
    header = [
        "algorithm",
        "tuned to",
        "accuracy",
        "against FedAvg",
        "bytes up",
        "client state",
        "parts: weight / denominator",
    ]
    write_table("algorithms", caption, header, rows, write=args.write)


if __name__ == "__main__":
    main()
