"""How well each aggregator withstands attacks: handwritten digits, 40 clients in every round, eight of them dishonest.

    python -m benchmarks.attacks               about 15 minutes on two cores
    python -m benchmarks.attacks --write       also put the tables into docs/results.md

Every aggregator meets every attack, with honest clients that are alike (IID) and that differ (Dirichlet 0.5). The
aggregators are given the true number of attackers. The norm bound is the one that costs nothing without an attack
(IID). Accuracy is measured on images that no client holds, after 40 rounds, as the mean of three seeds. A defence has
failed if its accuracy is more than ten points below that of the plain mean without an attack; such figures are in
italics.
"""

import multiprocessing
import statistics
from collections.abc import Callable

import sumus
from benchmarks import compare
from benchmarks.digits import CLIENTS, Split, trial
from benchmarks.results import write_table
from sumus import attacks, robust

ROUNDS, ATTACKERS, SHARE = 40, 8, 0.2
FAILED = 0.10

AGGREGATORS: dict[str, sumus.Aggregator] = {
    "mean": sumus.mean(robust.PARAMS),
    "median": robust.median(),
    "trimmed mean": robust.trimmed_mean(attackers=ATTACKERS),
    "Krum": robust.krum(attackers=ATTACKERS),
    "multi-Krum": robust.multi_krum(attackers=ATTACKERS),
    "norm bound 1": robust.norm_bounded(max_norm=1.0),
}
ATTACKS: dict[str, Callable[[sumus.Population, int], sumus.Population]] = {
    "none": lambda people, seed: people,
    "label flip": lambda people, seed: attacks.label_flip(people, 10, SHARE, seed),
    "sign flip": lambda people, seed: attacks.sign_flip(people, SHARE, 1.0, seed),
    "sign flip × 4": lambda people, seed: attacks.sign_flip(people, SHARE, 4.0, seed),
    "label flip × 10": lambda people, seed: attacks.scaled(
        attacks.label_flip(people, 10, SHARE, seed), SHARE, 10.0, seed
    ),
    "a little (z = 1.5)": lambda people, seed: attacks.a_little_is_enough(people, SHARE, 1.5, seed),
}
SPLITS: dict[Split, str] = {"iid": "IID", "dirichlet": "Dirichlet 0.5"}


def one_run(job: tuple[Split, str, str, int]) -> float:
    """Run (split, aggregator, attack, seed), and return the accuracy of the last round."""
    split, aggregator, attack, seed = job
    algorithm = sumus.fedavg(sumus.sgd(0.2, epochs=2, batch_size=10), aggregator=AGGREGATORS[aggregator])
    experiment = trial(algorithm, split, ROUNDS, CLIENTS, ATTACKS[attack])(seed)
    return sumus.run(experiment, out=sumus.Output(progress=False)).metrics["accuracy"]


def main() -> None:
    """Run and print; with --write also write the tables."""
    args = compare.arguments(__doc__, seeds=3)
    cells = [(split, rule, attack) for split in SPLITS for rule in AGGREGATORS for attack in ATTACKS]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        runs = pool.map(one_run, [(*cell, seed) for cell in cells for seed in args.seeds], chunksize=1)
    count = len(args.seeds)
    figures = {cell: statistics.mean(runs[i * count : (i + 1) * count]) for i, cell in enumerate(cells)}
    for split, word in SPLITS.items():
        fine = figures[split, "mean", "none"] - FAILED

        def cell(rule: str, attack: str, split: Split = split, fine: float = fine) -> str:
            value = figures[split, rule, attack]
            return f"{value:.3f}" if value >= fine else f"*{value:.3f}*"

        rows = [[rule, *(cell(rule, attack) for attack in ATTACKS)] for rule in AGGREGATORS]
        caption = (
            f"`python -m benchmarks.attacks`: {word}, {ATTACKERS} of {CLIENTS} clients attack in every round; accuracy after "
            f"{ROUNDS} rounds, mean of {count} seeds; in italics where the defence failed."
        )
        write_table(f"attacks-{split}", caption, ["aggregator", *ATTACKS], rows, write=args.write)


if __name__ == "__main__":
    main()
