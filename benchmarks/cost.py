"""The cost of a simulation: the memory of a round by the size of its cohort, and the start of a large population.

    python -m benchmarks.cost                          10,000 clients of a million parameters in one round (3 minutes)
    python -m benchmarks.cost --cohorts 20 200         shorter
    python -m benchmarks.cost --write                  also put the tables into docs/results.md

Each cohort runs in a process of its own, whose peak resident memory is reported.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
from torch import nn

import sumus
from benchmarks.results import write_table

SIDE = 1000  # a linear layer of SIDE x SIDE and a bias: 1,001,000 parameters


def load(client: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the four examples of a client."""
    rng = np.random.default_rng(client)
    return rng.normal(size=(4, SIDE)).astype(np.float32), rng.integers(0, SIDE, 4)


def one_round(population: int, cohort: int) -> dict[str, float]:
    """Start a population, and run one round with a cohort of it."""
    task = sumus.Task(lambda: nn.Linear(SIDE, SIDE), sumus.losses.cross_entropy)
    algorithm = sumus.fedavg(sumus.sgd(lr=0.1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    people = sumus.Population(range(population), load)
    experiment = sumus.Experiment(sumus.Plan(task, algorithm, sumus.Pacing(cohort)), people, rounds=1)
    started = time.perf_counter() - began
    history = sumus.run(experiment, out=sumus.Output(progress=False))
    return {
        "start": started,
        "seconds": history.rounds[0].seconds,
        "imported_mb": before / 1024,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_a_process(population: int, cohort: int) -> dict[str, float]:
    """Return `one_round` of a new process."""
    command = [sys.executable, "-m", "benchmarks.cost", "--child", str(population), str(cohort)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print; with --write also write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--populations", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/results.md")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(one_round(*args.child)))
        return
    rows: list[list[str]] = []
    for cohort in args.cohorts:
        cost = in_a_process(max(20_000, cohort), cohort)
        rows.append(
            [
                f"{cohort:,}",
                f"{cost['peak_mb']:.0f} MB",
                f"{cost['peak_mb'] - cost['imported_mb']:.0f} MB",
                f"{1000 * cost['seconds'] / cohort:.1f} ms",
            ]
        )
    caption = "`python -m benchmarks.cost`: one round, 1,001,000 parameters, one step of four examples a client."
    write_table("cost-cohort", caption, ["cohort", "peak memory", "of it not imports", "a client"], rows, args.write)
    print()
    rows = []
    for population in args.populations:
        cost = in_a_process(population, 5)
        rows.append([f"{population:,}", f"{1000 * cost['start']:.1f} ms", f"{cost['peak_mb']:.0f} MB"])
    caption = "`python -m benchmarks.cost`: from a lazy population to an experiment that is ready to run."
    write_table("cost-population", caption, ["clients", "start", "peak memory after a round of 5"], rows, args.write)


if __name__ == "__main__":
    main()
