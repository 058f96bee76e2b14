"""The baseline: a loop over clients written by hand in torch, on one thread, or distributed over forked processes."""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, multiprocessing

from benchmarks.lockstep import Turns
from benchmarks.peers.asked import parser, workload_of
from benchmarks.torch_models import train_client
from benchmarks.workloads import Workload, batches

Rows = Callable[[int, int, int], Iterable[object]]
"""(round from 0, client, its number of examples) → the rows of each of its batches."""


def stored_order(workload: Workload) -> Rows:
    """Return batches in stored order."""
    return lambda number, client, size: batches(size, workload.batch)


def order_of_sumus(workload: Workload) -> Rows:
    """Return the batches that sumus draws from seed 0: with these, both must get the same model."""
    from sumus.rng import generator, key
    from sumus.work import sgd

    work = sgd(lr=workload.lr, epochs=1, batch_size=workload.batch)

    def rows(number: int, client: int, size: int) -> Iterable[object]:
        own = key(0, "round", number, "client", client, "training")
        return work.batches(size, generator(own, "batches"))

    return rows


class Clients:
    """Some clients, and the module that they share."""

    def __init__(self, workload: Workload, double: bool, rows: Rows) -> None:
        self._pairs = [tuple(map(torch.from_numpy, pair)) for pair in workload.examples(double)]
        self._module = workload.module(double)
        self._lr = workload.lr
        self._rows = rows

    def train(self, start: list[Tensor], clients: Iterable[int], number: int) -> list[Tensor]:
        """Return the sum of the clients' models, each times its number of examples."""
        total = [torch.zeros_like(leaf) for leaf in start]
        leaves = list(self._module.parameters())
        for client in clients:
            inputs, targets = self._pairs[client]
            with torch.no_grad():
                for leaf, value in zip(leaves, start, strict=True):
                    leaf.copy_(value)
            train_client(self._module, inputs, targets, self._rows(number, client, len(inputs)), self._lr)
            with torch.no_grad():
                for summed, leaf in zip(total, leaves, strict=True):
                    summed.add_(leaf, alpha=len(inputs))
        return total


def dealt(workload: Workload, processes: int) -> list[list[int]]:
    """Distribute clients over processes: the largest first, back and forth, so that all have about as much to do."""
    by_size = sorted(range(workload.clients), key=lambda client: -workload.sizes[client])
    there_and_back = itertools.cycle([*range(processes), *reversed(range(processes))])
    hands: list[list[int]] = [[] for _ in range(processes)]
    for client, process in zip(by_size, there_and_back, strict=False):
        hands[process].append(client)
    return hands


def main() -> None:
    """Train, one round in each turn."""
    cli = parser(__doc__)
    cli.add_argument("--processes", type=int, default=1)
    cli.add_argument("--order", choices=("stored", "sumus"), default="stored", help="of the examples")
    args = cli.parse_args()
    torch.set_num_threads(1)
    workload = workload_of(args)
    rows = (order_of_sumus if args.order == "sumus" else stored_order)(workload)
    names, leaves = zip(*workload.module(args.double).state_dict().items(), strict=True)
    model, examples = [leaf.clone() for leaf in leaves], int(workload.sizes.sum())
    turns = Turns()
    if args.processes == 1:
        clients = Clients(workload, args.double, rows)

        def sums(number: int) -> list[list[Tensor]]:
            return [clients.train(model, range(workload.clients), number)]
    else:
        sums = in_processes(workload, args.double, rows, model, args.processes)
    for number in itertools.takewhile(lambda number: turns.next(), itertools.count()):
        for leaf, *parts in zip(model, *sums(number), strict=True):
            leaf.copy_(sum(parts[1:], parts[0]) / examples)
    turns.finish({name: leaf.numpy() for name, leaf in zip(names, model, strict=True)})


def in_processes(
    workload: Workload, double: bool, rows: Rows, model: list[Tensor], processes: int
) -> Callable[[int], list[list[Tensor]]]:
    """Start forked workers that wait at a barrier; model and sums are in memory that all of them share."""
    context = multiprocessing.get_context("fork")
    start, done = context.Barrier(processes + 1), context.Barrier(processes + 1)
    for leaf in model:
        leaf.share_memory_()
    totals = [[torch.zeros_like(leaf).share_memory_() for leaf in model] for _ in range(processes)]

    def work(rank: int, mine: list[int]) -> None:
        clients = Clients(workload, double, rows)
        for number in itertools.count():
            start.wait()
            for total, part in zip(totals[rank], clients.train(model, mine, number), strict=True):
                total.copy_(part)
            done.wait()

    for rank, mine in enumerate(dealt(workload, processes)):
        context.Process(target=work, args=(rank, mine), daemon=True).start()

    def sums(number: int) -> list[list[Tensor]]:
        start.wait()
        done.wait()
        return totals

    return sums


if __name__ == "__main__":
    main()
