"""A share of a round: the same sums and results however the clients are cut up, and only what was counted in the sum."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import sumus
from sumus.aggregate import RunningSum
from sumus.executors.executor import ClientAssignment, Trained
from sumus.executors.sequential import SequentialExecutor
from sumus.simulator.populations.population import as_population
from sumus.simulator.processes.share import ClientJob, ClientResult, RunSetting, Sums, Trainer
from sumus.training.program import Program
from sumus.tree import sha256
from sumus.types import Broadcast

Make = Callable[..., sumus.Experiment]
Cut = Sequence[Sequence[Any]]


PUBLIC = bytes(32)


class InPairs(SequentialExecutor):
    """Says that groups matter to it, and remembers them."""

    needs_sizes = True
    calls: list[list[Any]]  # made by whoever looks

    def run(
        self, broadcast: Broadcast, round_number: int, assignments: Iterable[ClientAssignment]
    ) -> Iterator[Trained]:
        assignments = list(assignments)
        self.calls.append([assignment.client for assignment in assignments])
        return super().run(broadcast, round_number, assignments)


def trainer(experiment: sumus.Experiment, executor: Any = SequentialExecutor) -> Trainer:
    population = as_population(experiment.population)
    program = Program(experiment.plan.task, seed=0)
    data = program.learn_schema(0, *program.reader.read(population, 0))
    setting = RunSetting(experiment.plan.with_data(data), population, 0, executor)
    return Trainer(setting, program)


def trained(trainer: Trainer, cut: Cut, number: int = 0) -> tuple[RunningSum, list[ClientResult]]:
    """Round `number` from the initial model."""
    plan = trainer._setting.plan
    broadcast = plan.algorithm.start(trainer.program.initial_shared, plan.description).broadcast
    sums = Sums()
    results = list(
        trainer.train(number, PUBLIC, broadcast, [[ClientJob(client) for client in group] for group in cut], sums)
    )
    return sums[0], results


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fleet"])
def test_shares_add_up_to_the_whole_in_any_order(anywhere: Make, name: str) -> None:
    one, other = trainer(anywhere(name)), trainer(anywhere(name))
    whole, results = trained(one, [[client] for client in range(10)])
    merged = RunningSum()
    by_client: dict[Any, ClientResult] = {}
    for place, cut in enumerate([[[7], [2], [9]], [[0, 1]], [[8, 6], [5, 4, 3]]]):
        total, part = trained((one, other)[place % 2], cut)
        merged.add(total.total)
        by_client |= {result.client: result for result in part}
    assert sha256(merged.total.slots()) == sha256(whole.total.slots())
    assert [result.client for result in results] == sorted(by_client)
    for result in results:
        again = by_client[result.client]
        assert (result.examples, result.metrics, result.nbytes, result.became) == (
            again.examples, again.metrics, again.nbytes, again.became,
        )  # fmt: skip
        assert {name: sha256(tree) for name, tree in result.state.items()} == {
            name: sha256(tree) for name, tree in again.state.items()
        }


def test_an_errand_says_how_long_which_sum_and_how_stale(anywhere: Make) -> None:
    """A report goes into its own sum, with the weight of its staleness; who has no time takes fewer steps."""
    experiment = anywhere("buffered")
    one = trainer(experiment)
    broadcast = one._setting.plan.algorithm.start(one.program.initial_shared, one._setting.plan.description).broadcast
    sums = Sums()
    group = [
        ClientJob(3, into=7),
        ClientJob(4, into=8, staleness=3),
        ClientJob(5, into=8, most_steps=1),
        ClientJob(6, again=1, into=8),
    ]
    results = {result.client: result for result in one.train(0, PUBLIC, broadcast, [group], sums)}
    assert {client: result.into for client, result in results.items()} == {3: 7, 4: 8, 5: 8, 6: 8}
    assert {number: int(sums[number].total.count) for number in sums} == {7: 1, 8: 3}
    assert int(sums[7].total.weights["params"]) == 1024
    assert int(sums[8].total.weights["params"]) == 1024 + 512 + 1024
    assert results[5].metrics["loss"][1] == 8
    again = {result.client: result for result in one.train(0, PUBLIC, broadcast, [[ClientJob(6)]], Sums())}
    assert again[6].metrics != results[6].metrics, "a client's second work on one model has other batches"


def test_an_aggregator_that_needs_each_update_gets_each_and_no_sum(anywhere: Make) -> None:
    total, results = trained(trainer(anywhere("median")), [[client] for client in range(10)])
    assert total.total.empty
    assert {result.became for result in results} == {"counted"}
    for result in results:
        assert (result.alone is not None) == (result.became == "counted")
        assert result.alone is None or int(result.alone.count) == 1


def test_where_groups_matter_each_is_one_call_and_else_all_of_them_are(anywhere: Make) -> None:
    pairs = trainer(anywhere("fedavg"), InPairs)
    assert isinstance(pairs.executor, InPairs)
    pairs.executor.calls = []
    total, _ = trained(pairs, [[3, 1], [0], [4, 2]])
    assert pairs.executor.calls == [[3, 1], [0], [4, 2]]
    other, _ = trained(trainer(anywhere("fedavg")), [[0, 1], [2, 3, 4]])
    assert sha256(total.total.slots()) == sha256(other.total.slots())


def test_groups_are_taken_only_as_they_are_trained(anywhere: Make) -> None:
    """So a worker can be dealt more, and a client's state is read when it begins."""
    taken: list[int] = []

    def groups() -> Iterator[list[ClientJob]]:
        for client in range(4):
            taken.append(client)
            yield [ClientJob(client)]

    one = trainer(anywhere("fedavg"))
    broadcast = {"params": one.program.initial_shared}
    for done, _ in enumerate(one.train(0, PUBLIC, broadcast, groups(), Sums()), 1):
        assert len(taken) == done


def test_sizes_are_those_that_the_model_sees(anywhere: Make) -> None:
    assert trainer(anywhere("fedavg")).sizes([3, 0, 9]) == [23, 8, 53]


def test_a_result_is_settled_without_its_state() -> None:
    settled = ClientResult("alice", 0, 3, {"loss": (1.0, 3)}, 8, "counted", {"control": {"w": np.ones(2)}}).settled
    assert (settled.client, settled.examples, settled.state) == ("alice", 3, {})
    assert settled.settled is settled
