"""sumus itself, by its public names: FedAvg of every client, one local epoch of SGD."""

import functools
import inspect
from collections.abc import Generator
from contextlib import contextmanager

import sumus
from benchmarks.lockstep import Turns
from benchmarks.peers.asked import parser, workload_of
from benchmarks.workloads import Workload
from sumus.simulator.history import RoundRecord
from sumus.simulator.progress import Show

HAS_EXECUTORS = "executor" in inspect.signature(sumus.run).parameters


class InTurn:
    """A progress that begins a round only when it is this runner's turn."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    @contextmanager
    def watching(self, experiment: sumus.Experiment, done: int) -> Generator[Show, None, None]:
        def show(record: RoundRecord) -> None:
            self._turns.next()

        self._turns.next()
        yield show


def experiment(workload: Workload, rounds: int, double: bool) -> sumus.Experiment:
    """What is run."""
    task = sumus.Task(functools.partial(workload.module, double), sumus.losses.cross_entropy)
    algorithm = sumus.fedavg(sumus.sgd(lr=workload.lr, epochs=1, batch_size=workload.batch))
    plan = sumus.Plan(task, algorithm, sumus.Pacing(cohort=workload.clients))
    people = sumus.Population(range(workload.clients), workload.examples(double).__getitem__)
    return sumus.Experiment(plan, people, rounds)


def main() -> None:
    """Train, a round a turn."""
    cli = parser(__doc__)
    cli.add_argument("--executor", help="as `sumus.run` takes it; by default its own default")
    args = cli.parse_args()
    turns = Turns()
    options = {"executor": args.executor} if args.executor else {}
    history = sumus.run(experiment(workload_of(args), turns.rounds, args.double), progress=InTurn(turns), **options)
    turns.finish({name: leaf.numpy() for name, leaf in history.model.items()})


if __name__ == "__main__":
    main()
