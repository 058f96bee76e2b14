"""A client whose part of a round fails: the run ends, or, on request, goes on without it, and says so."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import sumus
from sumus import attacks
from tests.simulating import simulated

Load = Callable[[int], tuple[np.ndarray, np.ndarray]]


def examples(client: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(client)
    inputs = rng.normal(size=(8 + client, 6)).astype(np.float32)
    return inputs, (inputs.sum(1) > 0).astype(np.int64)


def narrow(client: int) -> tuple[np.ndarray, np.ndarray]:
    return examples(client)[0][:, :5], examples(client)[1]


def broken(client: int) -> tuple[np.ndarray, np.ndarray]:
    raise OSError("the disk is gone")


def wild(client: int) -> tuple[np.ndarray, np.ndarray]:
    return examples(client)[0] * np.float32(1e30), examples(client)[1]


def unlabelled(client: int) -> tuple[np.ndarray, np.ndarray]:
    return examples(client)[0], examples(client)[1] + 7


def empty(client: int) -> tuple[np.ndarray, np.ndarray]:
    return examples(client)[0][:0], examples(client)[1][:0]


FAILURES: dict[str, tuple[Load, str]] = {
    "shape": (narrow, "float32 of shape"),
    "load": (broken, "OSError: the disk is gone"),
    "runs to infinity": (wild, "not finite"),
    "labels": (unlabelled, "class"),
    "empty": (empty, "no examples"),
}
WORK = sumus.sgd(lr=0.1, batch_size=4)


def people(bad: Load, *who: int) -> sumus.Population:
    return sumus.Population(range(8), lambda client: (bad if client in who else examples)(client))


def task() -> sumus.Task:
    return sumus.Task(lambda: nn.Sequential(nn.Linear(6, 2)), sumus.losses.cross_entropy)


def skipped(population: sumus.Population, algorithm: sumus.Algorithm | None = None, **options: Any) -> sumus.History:
    options = {"pacing": sumus.Pacing(4), "executor": "autograd", "rounds": 5, "failures": "skip"} | options
    return simulated(task(), algorithm or sumus.fedavg(WORK), population, **options)


@pytest.mark.parametrize("kind", FAILURES)
def test_the_client_is_named_counted_and_left_out(kind: str) -> None:
    bad, said = FAILURES[kind]
    history = skipped(people(bad, 5))
    out = [record for record in history.rounds if record.reports.failed]
    assert out
    for record in out:
        assert list(record.reports.failed) == ["5"]
        assert said in record.reports.failed["5"]
        assert (record.clients, record.reports.dropped, record.reports.reasons) == (3, 1, {"failed": 1})
    assert all(record.clients == 4 for record in history.rounds if not record.reports.failed)
    (note,) = (note for note in history.notes if "left out" in note)
    assert f"client '5' was left out of {len(out)} round" in note
    assert said in note


@pytest.mark.parametrize("kind", FAILURES)
def test_by_default_it_ends_the_run(kind: str) -> None:
    with pytest.raises(sumus.SumusError, match="client 5"):
        skipped(people(FAILURES[kind][0], 5), failures="refuse")


def test_the_others_train_as_if_it_had_not_been_asked() -> None:
    """One round of everyone, with and without the client."""
    with_it = skipped(people(narrow, 5), pacing=sumus.Pacing(8), rounds=1)
    without = skipped(people(narrow).without([5]), pacing=sumus.Pacing(7), rounds=1)
    one, other = (history.model["0.weight"].numpy() for history in (with_it, without))
    assert np.allclose(one, other, atol=1e-7)


@pytest.mark.parametrize(("executor", "kind"), [("autograd", "runs to infinity"), ("vectorized:2", "shape")])
def test_processes_and_a_resumed_run_give_the_same_bits(executor: str, kind: str, tmp_path: Path) -> None:
    population = people(FAILURES[kind][0], 2, 5)
    alone = skipped(population, executor=executor)
    several = skipped(population, executor=executor, workers=2, out=tmp_path, rounds=3)
    resumed = skipped(population, executor=executor, out=tmp_path)
    assert alone.model_sha256 == resumed.model_sha256
    assert any(record.reports.failed for record in alone.rounds)
    for other in (several, resumed):
        those = alone.rounds[: len(other.rounds)]
        assert [list(record.reports.failed) for record in other.rounds] == [
            list(record.reports.failed) for record in those
        ]


ALGORITHMS: dict[str, tuple[sumus.Algorithm, dict[str, Any]]] = {
    "median": (sumus.fedavg(WORK, aggregator=sumus.robust.median()), {}),
    "buffered": (
        sumus.fedbuff(WORK),
        {"pacing": sumus.Pacing(cohort=2, concurrency=4), "fleet": sumus.Fleet(spread=3, seconds=9)},
    ),
    "sites": (sumus.fedavg(WORK), {"edge_groups": 2, "edges": sumus.Edges(rounds=2)}),
    "cyclic": (sumus.cyclic(WORK), {}),
    "stragglers": (sumus.fedavg(WORK), {"fleet": sumus.Fleet(stragglers=0.5, lost=0.1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_whatever_the_algorithm(name: str) -> None:
    algorithm, options = ALGORITHMS[name]
    history = skipped(people(broken, 3), algorithm, **options)
    assert len(history.rounds) == 5
    assert any("'3' was left out" in note for note in history.notes)
    assert all(np.isfinite(record.loss) for record in history.rounds if record.clients)


def test_what_it_keeps_is_not_changed_by_a_round_that_failed() -> None:
    states = sumus.MemoryClientStates()
    skipped(people(unlabelled, 5), sumus.scaffold(WORK), client_states=states)
    assert not states.get("5")
    assert not states.pending("5")
    assert states.get("1")


def test_the_first_client_may_be_the_one() -> None:
    history = skipped(people(broken, 0), pacing=sumus.Pacing(8))
    assert all(list(record.reports.failed) == ["0"] for record in history.rounds)


def test_attackers_beside_it() -> None:
    population = attacks.sign_flip(people(broken, 3), share=0.3)
    assert any("'3' was left out" in note for note in skipped(population, pacing=sumus.Pacing(8)).notes)


def test_a_round_of_failures_alone_is_an_error() -> None:
    with pytest.raises(
        sumus.ExperimentError, match=r"all 4 clients of round 1 failed.*the first failure.*lower the learning rate"
    ):
        skipped(people(wild, *range(8)))
    with pytest.raises(sumus.DataError, match="the disk is gone"):
        skipped(people(broken, *range(8)))


def test_many_are_counted_and_the_first_ten_named() -> None:
    population = sumus.Population(range(40), lambda client: (broken if client % 2 else examples)(client))
    notes = [note for note in skipped(population, pacing=sumus.Pacing(40), rounds=1).notes if "left out" in note]
    assert len(notes) == 11
    assert notes[-1].startswith("10 more clients were left out")


def test_other_words_and_the_wire_are_refused() -> None:
    with pytest.raises(sumus.ExperimentError, match=r"failures='ignore': give one of refuse, skip"):
        skipped(people(narrow), failures="ignore")
    with pytest.raises(sumus.ExperimentError, match=r"failures='skip' is for simulations in memory"):
        skipped(people(narrow), through="wire")


def test_a_record_travels_with_its_failures() -> None:
    (record,) = skipped(people(narrow, 5), pacing=sumus.Pacing(8), rounds=1).rounds
    assert sumus.RoundRecord.from_json(record.to_json()) == dataclasses.replace(
        record, evaluation=dataclasses.replace(record.evaluation, spreads={})
    )
