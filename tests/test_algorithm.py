"""The two halves of a round: what a device reports, and what the server makes of the sum."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

import sumus
from sumus.aggregate import Fixed, Part, RunningSum, mean
from sumus.algorithm import Algorithm
from sumus.errors import ParticipantError
from sumus.fixed_point import FixedPoint
from sumus.optimizers import ServerState, adam, averaged, momentum, sgd
from sumus.rng import generator
from sumus.task import Description, Leaf
from sumus.types import Array, Tree
from sumus.update import chain
from sumus.wire.tensors import encode_aggregate

SUMS = FixedPoint.fit(max_count=16, max_weight=64)
SHAPES = {"fc.weight": (2, 3), "fc.bias": (3,), "norm.mean": (3,)}
TASK = Description(
    "t", tuple(Leaf(name, shape, "float64", "shared", name != "norm.mean") for name, shape in SHAPES.items()), "l", ()
)
Clients = Mapping[str, tuple[Tree, int]]
"""Who → what it sends (base − trained), and its examples."""


def quarters(rng: np.random.Generator) -> dict[str, Array]:
    """Whole multiples of a quarter, which fixed point holds without rounding."""
    return {name: rng.integers(-8, 8, shape) / 4.0 for name, shape in SHAPES.items()}


RNG = np.random.default_rng(0)
BASE = quarters(RNG)
MODELS = [quarters(RNG) for _ in range(4)]
EXAMPLES = [1, 2, 4, 9]  # sixteen in all: the division is exact
CLIENTS: Clients = {
    str(number): ({name: BASE[name] - model[name] for name in BASE}, seen)
    for number, (model, seen) in enumerate(zip(MODELS, EXAMPLES, strict=True))
}


def total_of(algorithm: Algorithm, clients: Clients, sums: FixedPoint = SUMS) -> sumus.Aggregate:
    total = RunningSum()
    for who, (tree, examples) in clients.items():
        algorithm.count_in(algorithm.report(who, {"params": tree}, examples, {}, b"", generator(who)), sums, into=total)
    return total.total


def after_a_round(algorithm: Algorithm, clients: Clients = CLIENTS, base: Tree = BASE) -> ServerState:
    total = total_of(algorithm, clients)
    return algorithm.finish(total, algorithm.start(base, TASK), TASK, SUMS, b"", len(clients))


def model_after_a_round(algorithm: Algorithm, clients: Clients = CLIENTS) -> Tree:
    return algorithm.release(after_a_round(algorithm, clients), TASK)


# ── combining ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fedavg_gives_the_weighted_mean_of_the_client_models() -> None:
    model = model_after_a_round(sumus.fedavg(sumus.sgd(0.1)))
    for name in BASE:
        wanted = sum(seen * trained[name] for seen, trained in zip(EXAMPLES, MODELS, strict=True)) / 16
        assert np.array_equal(model[name], wanted)


def test_uniform_weights_give_the_plain_mean() -> None:
    model = model_after_a_round(sumus.fedavg(sumus.sgd(0.1), weight="uniform"))
    for name in BASE:
        assert np.array_equal(model[name], sum(trained[name] for trained in MODELS) / 4)


def test_a_fixed_denominator_divides_by_what_the_plan_says_whoever_came() -> None:
    part = Part("params", weight="uniform", denominator=Fixed(8))
    model = model_after_a_round(Algorithm(sumus.sgd(0.1), chain(), mean(part), sgd(1.0)))
    for name in BASE:
        assert np.array_equal(model[name], BASE[name] - sum(BASE[name] - trained[name] for trained in MODELS) / 8)


def test_the_clients_models_may_come_in_any_order() -> None:
    algorithm = sumus.fedadam(sumus.sgd(0.1), lr=0.1)
    forth, back = (model_after_a_round(algorithm, dict(order(list(CLIENTS.items())))) for order in (list, reversed))
    assert all(forth[name].tobytes() == back[name].tobytes() for name in BASE)


def test_a_round_without_weight_leaves_the_model_as_it_was() -> None:
    """Nobody came, or nobody had examples."""
    algorithm = sumus.fedadam(sumus.sgd(0.1), lr=0.1)
    state = algorithm.start(BASE, TASK)
    idle = {who: (tree, 0) for who, (tree, _) in CLIENTS.items()}
    for total in (sumus.Aggregate(), total_of(algorithm, idle)):
        assert algorithm.finish(total, state, TASK, SUMS, b"", 4) is state


# ── the first hop ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_counting_into_a_running_sum_equals_merging_aggregates_of_one() -> None:
    algorithm, merged = sumus.fedavg(sumus.sgd(0.1)), sumus.Aggregate()
    for who, (tree, examples) in CLIENTS.items():
        update = algorithm.report(who, {"params": tree}, examples, {"loss": (0.5, 3)}, b"", generator(who))
        merged = merged.merge(algorithm.count_in(update, SUMS))
    total = RunningSum()
    for who, (tree, examples) in CLIENTS.items():
        update = algorithm.report(who, {"params": tree}, examples, {"loss": (0.5, 3)}, b"", generator(who))
        assert algorithm.count_in(update, SUMS, into=total) is total.total
    assert encode_aggregate(total.total) == encode_aggregate(merged)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fc.bias": np.full(3, np.nan)},
        {"fc.bias": np.full(3, 1e9)},
        {"fc.bias": np.zeros(4)},
        {"fc.more": np.zeros(1)},
    ],
)
def test_what_is_refused_at_the_first_hop_has_added_nothing(wrong: Tree) -> None:
    algorithm, total = sumus.fedavg(sumus.sgd(0.1)), RunningSum()
    tree, examples = CLIENTS["0"]
    algorithm.count_in(algorithm.report("good", {"params": tree}, examples, {}, b"", generator(0)), SUMS, into=total)
    before = encode_aggregate(total.total)
    bad = algorithm.report("bad", {"params": {**tree, **wrong}}, 1, {}, b"", generator(0))
    with pytest.raises(ParticipantError):
        algorithm.count_in(bad, SUMS, into=total)
    assert encode_aggregate(total.total) == before


# ── statistics ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("server", [sgd(0.1), momentum(0.1), adam(0.1), averaged(adam(0.1), 0.9)], ids=repr)
def test_statistics_are_averaged_whatever_the_server_optimizer(server: sumus.ServerOptimizer) -> None:
    """It sees only leaves that have a gradient; a step on a running variance could make it negative."""
    algorithm = dataclasses.replace(sumus.fedavg(sumus.sgd(0.1)), server=server)
    state = after_a_round(algorithm)
    wanted = sum(seen * trained["norm.mean"] for seen, trained in zip(EXAMPLES, MODELS, strict=True)) / 16
    for model in (state.broadcast["params"], algorithm.release(state, TASK)):
        assert np.array_equal(model["norm.mean"], wanted)
        assert sorted(model) == sorted(SHAPES)
    assert all("norm.mean" not in tree for tree in state.memory.values())


def test_the_broadcast_holds_every_shared_leaf_from_the_start() -> None:
    state = sumus.fedadam(sumus.sgd(0.1), lr=0.1).start(BASE, TASK)
    assert {name: leaf.tolist() for name, leaf in state.broadcast["params"].items()} == {
        name: leaf.tolist() for name, leaf in BASE.items()
    }
