"""Who takes part: in passes, from a later round on, with a weight of its own."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import sumus
from sumus import attacks
from sumus.simulator.populations.participation import Passes
from tests.simulating import simulated

TASK = sumus.Task(lambda: nn.Linear(6, 2), sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy})
WORK = sumus.sgd(lr=0.1, batch_size=8)


def examples(client: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(client)
    inputs = rng.normal(size=(6 + client, 6)).astype(np.float32)
    return inputs, (inputs.sum(1) > 0).astype(np.int64)


PEOPLE = sumus.Population(range(10), examples)


def run(population: Any, rounds: int = 6, cohort: int = 3, algorithm: Any = None, **options: Any) -> sumus.History:
    chosen = algorithm or sumus.fedavg(WORK)
    options = {"pacing": sumus.Pacing(cohort), "executor": "autograd"} | options
    return simulated(TASK, chosen, population, rounds, **options)


def turns(history: sumus.History) -> list[int]:
    assert history.fleet is not None
    return history.fleet.participations.tolist()


# ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rounds", range(1, 9))
def test_each_once_before_any_twice(rounds: int) -> None:
    """Three of ten a round, so that passes end within rounds."""
    taken = turns(run(PEOPLE.in_passes(), rounds))
    assert sum(taken) == 3 * rounds
    assert max(taken) - min(taken) <= 1


def test_each_pass_is_in_a_new_order() -> None:
    passes, present = Passes(seed=0), np.arange(20)
    orders = [passes.draw(20, present, lambda who: np.ones(len(who), bool)) for _ in range(3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert Passes(seed=0).draw(20, present, lambda who: np.ones(len(who), bool)) == orders[0]
    assert Passes(seed=1).draw(20, present, lambda who: np.ones(len(who), bool)) != orders[0]


def test_who_cannot_come_keeps_its_place() -> None:
    passes, present, away = Passes(seed=0), np.arange(300), {7, 150}
    drawn = [who for _ in range(30) for who in passes.draw(10, present, lambda who: ~np.isin(who, list(away)))]
    assert Counter(drawn) == Counter({who: 1 for who in range(300) if who not in away})
    assert sorted(passes.draw(10, present, lambda who: np.isin(who, list(away)))) == sorted(away)


@pytest.mark.parametrize(
    "options",
    [
        {"fleet": sumus.Fleet(seconds=60, spread=5, lost=0.2, hours=20)},
        {"pacing": sumus.Pacing(3, separation=2)},
        {"pacing": sumus.Pacing(3, over_select=1.4)},
        {"algorithm": sumus.fedbuff(WORK), "pacing": sumus.Pacing(2, concurrency=4), "fleet": sumus.Fleet(seconds=9)},
    ],
    ids=str,
)
def test_passes_whatever_the_fleet(options: dict[str, Any]) -> None:
    history = run(PEOPLE.in_passes(), 12, **options)
    assert len(history.rounds) == 12
    if options == {"pacing": sumus.Pacing(3, separation=2)}:
        assert max(turns(history)) - min(turns(history)) <= 1


# ── joining ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nobody_takes_part_before_joining() -> None:
    for rounds, there in ((2, 8), (5, 9)):
        taken = turns(run(PEOPLE.joining({8: 3, 9: 6}), rounds, cohort=8))
        assert all(taken[:there])
        assert not any(taken[there:])
    assert any(turns(run(PEOPLE.joining(lambda client: 1 + client // 5), 4, cohort=5))[5:])


def test_who_joins_is_in_the_next_pass() -> None:
    """Rounds 1 and 2 are a pass of four, rounds 3 to 5 one of six."""
    assert turns(run(PEOPLE.subset(range(6)).joining({4: 3, 5: 3}).in_passes(), 5, cohort=2)) == [2, 2, 2, 2, 1, 1]


def test_only_who_is_there_is_asked_for_seen() -> None:
    history = run(PEOPLE.joining(dict.fromkeys(range(4, 10), 9)), evaluate=sumus.Evaluation(seen=10))
    assert history.spreads["seen"]["accuracy"].clients == 4


def test_parts_that_divide_by_the_population_divide_by_who_is_there() -> None:
    """Until the others join, a run is the run without them."""
    some = PEOPLE.subset(range(6))
    scaffold = sumus.scaffold(WORK)
    joined = run(PEOPLE.joining(dict.fromkeys(range(6, 10), 3)).in_passes(), 2, 6, scaffold)
    alone = run(some.in_passes(), 2, 6, scaffold)
    assert joined.model_sha256 == alone.model_sha256


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_weight_stands_for_examples() -> None:
    assert run(PEOPLE.weighed(lambda client: 6 + client)).model_sha256 == run(PEOPLE).model_sha256
    weights = {client: 1 + client**2 for client in range(10)}
    here = run(PEOPLE.weighed(weights), 1, cohort=10)
    each = {client: run(PEOPLE.subset([client]), 1, cohort=1).model["weight"].numpy() for client in range(10)}
    wanted = sum(weights[client] * each[client] for client in range(10)) / sum(weights.values())
    assert np.allclose(here.model["weight"].numpy(), wanted, atol=1e-6)
    assert here.rounds[0].examples == sum(6 + client for client in range(10))


def test_equal_weights_are_uniform() -> None:
    one, other = run(PEOPLE.weighed(lambda client: 4)), run(PEOPLE, algorithm=sumus.fedavg(WORK, weight="uniform"))
    assert np.allclose(one.model["weight"].numpy(), other.model["weight"].numpy(), atol=1e-6)


def test_weights_before_a_clip() -> None:
    stage = sumus.fedavg(WORK, sumus.chain(sumus.weight(cap=20), sumus.clip_by_global_norm(1.0)))
    assert (
        run(PEOPLE.weighed(lambda client: 6 + client), algorithm=stage).model_sha256
        == run(PEOPLE, algorithm=stage).model_sha256
    )


# ── everywhere ───────────────────────────────────────────────────────────────────────────────────────────────────────

WHO = PEOPLE.joining({8: 2, 9: 4}).in_passes()


@pytest.mark.parametrize("algorithm", [sumus.fedavg(WORK), sumus.scaffold(WORK)], ids=["fedavg", "scaffold"])
def test_through_the_wire_and_resumed_with_the_same_bits(algorithm: sumus.Algorithm, tmp_path: Path) -> None:
    straight = run(WHO, algorithm=algorithm)
    assert run(WHO, algorithm=algorithm, through="wire").model_sha256 == straight.model_sha256
    run(WHO, 3, algorithm=algorithm, out=tmp_path)
    assert run(WHO, algorithm=algorithm, out=tmp_path).model_sha256 == straight.model_sha256


def test_in_processes_and_stacks() -> None:
    people = WHO.weighed(lambda client: 1 + client)
    assert run(people, workers=2).model_sha256 == run(people).model_sha256
    stacked = run(people, 2, executor="vectorized:2")
    assert turns(stacked) == turns(run(people, 2))


def test_a_run_does_not_go_on_with_others(tmp_path: Path) -> None:
    run(WHO, 2, out=tmp_path)
    for other in (PEOPLE, WHO.joining({8: 3}), PEOPLE.in_passes(), WHO.weighed(dict.fromkeys(range(10), 2))):
        with pytest.raises(sumus.ExperimentError, match="holds a run with another population"):
            run(other, 3, out=tmp_path)


def test_subsets_and_attackers_take_part_alike() -> None:
    some = WHO.weighed({client: 1 + client for client in range(10)}).subset([1, 2, 8])
    assert (some.participation.in_passes, some.participation.joins, some.participation.weights) == (
        True,
        {8: 2},
        {1: 2, 2: 3, 8: 9},
    )
    attacked = attacks.sign_flip(WHO, share=0.3)
    assert attacked.participation == WHO.participation
    assert attacked.without([9]).participation.joins == {8: 2}
    assert attacked.in_passes().attackers == attacked.attackers


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PEOPLE.joining({77: 2}), r"joining\(\) names client 77, who is not in the population"),
        (lambda: PEOPLE.weighed({77: 2}), r"weighed\(\) names client 77"),
        (lambda: PEOPLE.joining(3), r"joining\(3\): give a mapping"),
        (lambda: run(PEOPLE.weighed({1: 2})), r"weighed\(\) does not name client 0"),
        (
            lambda: run(PEOPLE.weighed(lambda client: 0.5)),
            r"client \d: weighed\(\) gives 0.5; give a whole number from 1",
        ),
        (lambda: run(PEOPLE.weighed(lambda client: 1 / 0)), "ZeroDivisionError"),
        (
            lambda: run(PEOPLE.weighed(lambda client: 10**9)),
            "has a weight of 1000000000, and the plan allows at most 65536",
        ),
        (
            lambda: run(PEOPLE.weighed(lambda client: 9), algorithm=sumus.fedavg(WORK, cap=8)),
            "the plan allows at most 8",
        ),
        (lambda: run(PEOPLE.weighed(lambda client: 9), algorithm=sumus.scaffold(WORK)), "weighs all clients alike"),
        (lambda: run(PEOPLE.weighed(lambda client: 9), through="wire"), r"weighed\(\) is for simulations in memory"),
        (lambda: run(PEOPLE.joining({1: 0})), r"client 1: joining\(\) gives 0; give a whole number from 1"),
        (lambda: run(PEOPLE.joining(lambda client: 2)), "larger than the 0 clients that take part in round 1"),
        (lambda: run(PEOPLE.in_passes(), fleet=sumus.Fleet(seconds=9, waits=False)), "devices come by themselves"),
    ],
    ids=range(13),
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(sumus.UsageError, match=said):
        make()


def test_a_run_that_goes_on_reports_all_of_its_rounds(tmp_path: Path) -> None:
    """Also if its pacing limits how often a device is asked, so that all rounds are played in advance."""
    options: dict[str, Any] = {"pacing": sumus.Pacing(3, separation=2), "fleet": sumus.Fleet(seconds=60)}
    whole = run(PEOPLE, 6, **options)
    run(PEOPLE, 4, out=tmp_path, **options)
    resumed = run(PEOPLE, 6, out=tmp_path, **options)
    assert sum(turns(whole)) == 18
    assert turns(resumed) == turns(whole)
