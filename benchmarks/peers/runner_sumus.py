"""sumus itself, by its public names: FedAvg of every client, with one local epoch of SGD."""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager

import sumus
from benchmarks.lockstep import Turns
from benchmarks.peers.asked import parser, workload_of
from benchmarks.workloads import Workload
from sumus.simulator.progress import Show
from sumus.simulator.records import RoundRecord

PLANNED = 1000  # rounds of the run that is begun: long enough for a probe; it is stopped when its turns are over


class InTurn:
    """A progress that begins a round only in this runner's turn, and stops the run after the last turn."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    @contextmanager
    def watching(self, experiment: sumus.Experiment, done: int) -> Generator[Show, None, None]:
        def show(record: RoundRecord) -> None:
            if not self._turns.next():
                raise KeyboardInterrupt

        self._turns.next()
        yield show


def experiment(workload: Workload, rounds: int, double: bool) -> sumus.Experiment:
    """Return the experiment."""
    task = sumus.Task(functools.partial(workload.module, double), sumus.losses.cross_entropy)
    algorithm = sumus.fedavg(sumus.sgd(lr=workload.lr, epochs=1, batch_size=workload.batch))
    plan = sumus.Plan(task, algorithm, sumus.Pacing(cohort=workload.clients))
    people = sumus.Population(range(workload.clients), workload.examples(double).__getitem__)
    return sumus.Experiment(plan, people, rounds)


def main() -> None:
    """Train, one round in each turn."""
    cli = parser(__doc__)
    cli.add_argument("--executor", default="auto", help="as `sumus.run` takes it")
    cli.add_argument("--workers", type=int, help="as `sumus.run` takes it")
    args = cli.parse_args()
    turns = Turns()
    with tempfile.TemporaryDirectory() as nothing_found_before:
        os.environ["XDG_CACHE_HOME"] = nothing_found_before
        _run(args, turns)


def _run(args: argparse.Namespace, turns: Turns) -> None:
    try:
        sumus.run(
            experiment(workload_of(args), PLANNED, args.double),
            compute=sumus.Compute(executor=args.executor, workers=args.workers),
            out=sumus.Output(progress=InTurn(turns)),
        )
    except sumus.Interrupted as stop:
        print(stop.history.provenance.executor, file=sys.stderr)
        turns.finish({name: leaf.numpy() for name, leaf in stop.history.model.items()})


if __name__ == "__main__":
    main()
