"""The two halves of a round: what a device reports, and what the server makes of the sum."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sumus
from sumus.aggregate import Fixed, Part, RunningSum, mean
from sumus.algorithm import LEAST_POSITIVE, Algorithm
from sumus.errors import ParticipantError, UsageError
from sumus.fixed_point import FixedPoint
from sumus.optimizers import ServerState, adam, averaged, momentum, sgd, yogi
from sumus.rng import generator
from sumus.task import Description, Leaf
from sumus.types import Array, Tree
from sumus.update import chain, clip_by_global_norm, quantize, rotate, weight
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


def parts_of(tree: Tree) -> dict[str, Tree]:
    """As an executor gives them: leaves with a gradient, and statistics apart."""
    return {
        "params": {name: leaf for name, leaf in tree.items() if name not in TASK.buffer_layout},
        "buffers": {name: tree[name] for name in TASK.buffer_layout},
    }


def total_of(
    algorithm: Algorithm, clients: Clients, sums: FixedPoint = SUMS, seed: bytes = b"round"
) -> sumus.Aggregate:
    total, hop = RunningSum(), algorithm.first_hop(TASK, sums)
    for who, (tree, examples) in clients.items():
        hop.count_in(algorithm.report(who, parts_of(tree), examples, {}, seed, generator(who)), into=total)
    return total.total


def after_a_round(
    algorithm: Algorithm, clients: Clients = CLIENTS, base: Tree = BASE, sums: FixedPoint = SUMS
) -> ServerState:
    combined = algorithm.combine(total_of(algorithm, clients, sums), TASK, sums, b"round", len(clients))
    return algorithm.step(combined, algorithm.start(base, TASK), TASK)


def model_after_a_round(algorithm: Algorithm, clients: Clients = CLIENTS) -> Tree:
    return algorithm.release(after_a_round(algorithm, clients))


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
    for name in TASK.trained_layout:
        assert np.array_equal(model[name], BASE[name] - sum(BASE[name] - trained[name] for trained in MODELS) / 8)


def test_the_clients_models_may_come_in_any_order() -> None:
    algorithm = sumus.fedadam(sumus.sgd(0.1), lr=0.1)
    forth, back = (model_after_a_round(algorithm, dict(order(list(CLIENTS.items())))) for order in (list, reversed))
    assert all(forth[name].tobytes() == back[name].tobytes() for name in BASE)


def test_a_round_without_weight_leaves_the_model_as_it_was() -> None:
    """Nobody came."""
    algorithm = sumus.fedadam(sumus.sgd(0.1), lr=0.1)
    state = algorithm.start(BASE, TASK)
    combined = algorithm.combine(sumus.Aggregate(), TASK, SUMS, b"", 4)
    assert combined == {}
    assert algorithm.step(combined, state, TASK) is state


def test_combined_parts_are_float64_means_by_name() -> None:
    algorithm = sumus.fedavg(sumus.sgd(0.1))
    combined = algorithm.combine(total_of(algorithm, CLIENTS), TASK, SUMS, b"", 4)
    assert {part: {name: leaf.dtype.name for name, leaf in tree.items()} for part, tree in combined.items()} == {
        "params": {"fc.weight": "float64", "fc.bias": "float64"},
        "buffers": {"norm.mean": "float64"},
    }
    for name in BASE:
        (mean_of,) = (tree[name] for tree in combined.values() if name in tree)
        assert np.array_equal(mean_of, sum(seen * tree[name] for tree, seen in CLIENTS.values()) / 16)


def test_a_sum_of_more_people_than_planned_is_refused() -> None:
    """It may have overflowed, and nothing in it would show."""
    algorithm = sumus.fedavg(sumus.sgd(0.1))
    total, sums = total_of(algorithm, CLIENTS), dataclasses.replace(SUMS, max_count=4)
    assert algorithm.combine(total, TASK, sums, b"", 4)
    with pytest.raises(
        ParticipantError, match="a sum has 8 contributors, but the plan allows 4: it may have overflowed"
    ) as error:
        algorithm.combine(total.merge(total), TASK, sums, b"", 4)
    assert error.value.client is None


def test_a_part_may_be_divided_by_everyone_there_is() -> None:
    part = Part("params", weight="uniform", denominator="population")
    algorithm = Algorithm(sumus.sgd(0.1), chain(), mean(part), sgd(1.0))
    combined = algorithm.combine(total_of(algorithm, CLIENTS), TASK, SUMS, b"", population=32)
    for name, leaf in combined["params"].items():
        assert np.array_equal(leaf, sum(tree[name] for tree, _ in CLIENTS.values()) / 32)


# ── reporting ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_nobody_combines_stays_on_the_device() -> None:
    """A client's work may give more than an algorithm asks for, and the first hop takes nothing that is not asked for."""
    work = dataclasses.replace(sumus.sgd(0.1), rules=sumus.ClientRules(sends=("params", "diary")))
    algorithm = sumus.fedavg(work)
    parts = {**parts_of(BASE), "diary": {"day": np.ones(3)}}
    update = algorithm.report("alice", parts, 3, {}, b"", generator(0))
    assert set(update.parts) == {"params", "buffers"}
    algorithm.first_hop(TASK, SUMS).count_in(update)


def test_only_what_is_in_the_chain_is_transformed() -> None:
    """Scalars, parts that are not transformed, and statistics go as they are."""
    parts = (Part("params"), Part("control", transformed=False), Part("steps", content="scalar"))
    work = dataclasses.replace(sumus.sgd(0.1), rules=sumus.ClientRules(sends=("params", "control", "steps")))
    update = chain(clip_by_global_norm(1e-3), rotate(), quantize(8))
    algorithm = Algorithm(work, update, mean(*parts), sgd(1.0))
    given = {**parts_of(BASE), "control": parts_of(BASE)["params"], "steps": {"": np.array(7.0)}}
    sent = algorithm.report("alice", given, 3, {}, b"", generator(0)).parts
    assert {name: leaf.dtype.name for name, leaf in sent["params"].items()} == {"rotated": "int8"}
    assert all(sent[name] is given[name] for name in ("control", "steps", "buffers"))
    assert algorithm.combine(
        algorithm.first_hop(TASK, SUMS).count_in(algorithm.report("alice", given, 3, {}, b"", generator(0))),
        TASK, SUMS, b"", 1,
    )["steps"] == {"": 7.0}  # fmt: skip


# ── the first hop: see also tests/test_first_hop.py ──────────────────────────────────────────────────────────────────


def test_counting_into_a_running_sum_equals_merging_aggregates_of_one() -> None:
    algorithm, merged, total = sumus.fedavg(sumus.sgd(0.1)), sumus.Aggregate(), RunningSum()
    hop = algorithm.first_hop(TASK, SUMS)
    for who, (tree, examples) in CLIENTS.items():
        update = algorithm.report(who, parts_of(tree), examples, {"loss": (0.5, 3)}, b"", generator(who))
        merged = merged.merge(hop.count_in(update))
        assert hop.count_in(update, into=total) is total.total
    assert encode_aggregate(total.total) == encode_aggregate(merged)


# ── statistics ───────────────────────────────────────────────────────────────────────────────────────────────────────


CHAINS = {
    "nothing": chain(),
    "weight": weight(cap=64),
    "clip, rotate": chain(clip_by_global_norm(1e-3), rotate()),
    "clip, rotate, quantize": chain(clip_by_global_norm(1e-3), rotate(), quantize(8)),
    "weight, clip, rotate, quantize": chain(weight(cap=64), clip_by_global_norm(1e-3), rotate(), quantize(6)),
}
SERVERS = [sgd(0.1), momentum(0.1), adam(0.1), yogi(0.1), averaged(adam(0.1), 0.9)]


@pytest.mark.parametrize("update", CHAINS)
@pytest.mark.parametrize("server", SERVERS, ids=repr)
def test_statistics_are_exactly_the_weighted_average(server: sumus.ServerOptimizer, update: str) -> None:
    """Whatever chain and server optimizer: a step on a running variance could make it negative, a clip or a rotation
    would mix it with weights."""
    algorithm = sumus.fedavg(sumus.sgd(0.1), CHAINS[update], server)
    state = after_a_round(algorithm)
    wanted = sum(seen * trained["norm.mean"] for seen, trained in zip(EXAMPLES, MODELS, strict=True)) / 16
    model = algorithm.release(state)
    assert np.array_equal(state.broadcast["buffers"]["norm.mean"], wanted)
    assert np.array_equal(model["norm.mean"], wanted)
    assert sorted(model) == sorted(SHAPES)
    assert set(state.broadcast["params"]) == set(TASK.trained_layout)
    assert all("norm.mean" not in tree for tree in state.memory.values())


@pytest.mark.parametrize("denominator", [Fixed(2), Fixed(100), "count", "population"])
def test_statistics_are_averaged_whatever_params_are_divided_by(denominator: Any) -> None:
    """Params over a fixed number may move too little or too far; a variance that does is none."""
    algorithm = Algorithm(sumus.sgd(0.1), chain(), mean(Part("params", denominator=denominator)), sgd(1.0))
    wanted = sum(seen * trained["norm.mean"] for seen, trained in zip(EXAMPLES, MODELS, strict=True)) / 16
    assert np.array_equal(model_after_a_round(algorithm)["norm.mean"], wanted)


def test_statistics_are_averaged_alike_where_weights_are_uniform() -> None:
    model = model_after_a_round(sumus.fedavg(sumus.sgd(0.1), server=adam(0.1), weight="uniform"))
    assert np.array_equal(model["norm.mean"], sum(trained["norm.mean"] for trained in MODELS) / 4)


def test_statistics_under_a_weight_stage_do_not_overflow_the_sum() -> None:
    """They are not multiplied on the device; the plan's sums leave room for the weight at the first hop."""
    algorithm = sumus.fedavg(sumus.sgd(0.1), chain(weight(cap=2**16), clip_by_global_norm(1.0)))
    sums = sumus.Plan(TASK, algorithm, sumus.Pacing(4)).sums
    far: Clients = {str(n): ({name: np.full(s, 255.75) for name, s in SHAPES.items()}, 2**16) for n in range(4)}
    state = after_a_round(algorithm, far, sums=sums)
    assert np.array_equal(state.broadcast["buffers"]["norm.mean"], BASE["norm.mean"] - 255.75)


def test_a_server_optimizer_never_sees_statistics() -> None:
    """One that does something to every part that it finds, and keeps nothing that it does not know."""

    def update(parts: Mapping[str, Tree], state: ServerState) -> ServerState:
        assert (set(parts), set(state.broadcast)) == ({"params"}, {"params"})
        return ServerState({"params": {name: leaf * 0 for name, leaf in state.broadcast["params"].items()}}, {})

    algorithm = sumus.fedavg(sumus.sgd(0.1), server=dataclasses.replace(sgd(1.0), update=update))
    model = model_after_a_round(algorithm)
    wanted = sum(seen * trained["norm.mean"] for seen, trained in zip(EXAMPLES, MODELS, strict=True)) / 16
    assert np.array_equal(model["norm.mean"], wanted)
    assert not model["fc.bias"].any()


def test_a_task_without_statistics_has_no_such_part() -> None:
    plain = dataclasses.replace(TASK, leaves=TASK.leaves[:2])
    algorithm = sumus.fedavg(sumus.sgd(0.1))
    assert [part.name for part in algorithm.parts(plain)] == ["params"]
    assert set(algorithm.start(BASE, plain).broadcast) == {"params"}


def test_the_broadcast_holds_every_shared_leaf_from_the_start() -> None:
    algorithm = sumus.fedadam(sumus.sgd(0.1), lr=0.1)
    state = algorithm.start(BASE, TASK)
    assert {part: set(tree) for part, tree in state.broadcast.items()} == {
        "params": {"fc.weight", "fc.bias"},
        "buffers": {"norm.mean"},
    }
    sent = {name: leaf.tolist() for tree in state.broadcast.values() for name, leaf in tree.items()}
    assert sent == {name: leaf.tolist() for name, leaf in BASE.items()}
    assert {name: leaf.tolist() for name, leaf in algorithm.release(state).items()} == sent


# ── what a step never publishes ──────────────────────────────────────────────────────────────────────────────────────

VARIANCES = dataclasses.replace(TASK, positive=("norm.mean",))


def stepped(before: Array, moved: Any, task: Description = VARIANCES) -> Array:
    """A buffer after a step by a mean."""
    algorithm = sumus.fedavg(sumus.sgd(0.1))
    state = algorithm.start({**BASE, "norm.mean": before}, task)
    still = {name: np.zeros(BASE[name].shape) for name in task.trained_layout}
    combined = {"params": still, "buffers": {"norm.mean": np.asarray(moved, np.float64)}}
    return np.asarray(algorithm.step(combined, state, task).broadcast["buffers"]["norm.mean"])


@given(st.integers(0, 2**32 - 1))
def test_a_variance_never_falls_below_the_floor_and_honest_bits_stay(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before = (rng.random(8) ** 40).astype(np.float32)
    moved = before - rng.normal(0.0, 1.0, 8) * 10.0 ** rng.integers(-9, 2, 8)
    plain = (before.astype(np.float64) - moved).astype(np.float32)
    after = stepped(before, moved)
    assert after.dtype == np.float32
    assert (after >= np.minimum(before, np.float32(LEAST_POSITIVE))).all()
    untouched = plain >= LEAST_POSITIVE
    assert np.array_equal(after[untouched], plain[untouched])
    assert np.array_equal(stepped(before, moved, TASK), plain)  # a buffer that may be negative is only averaged


@pytest.mark.parametrize("moved", [np.nan, np.inf, -1e39])
def test_a_step_to_what_is_not_finite_is_refused(moved: float) -> None:
    for task in (TASK, VARIANCES):
        with pytest.raises(UsageError, match=r"`buffers\[norm\.mean\]` became NaN or infinite"):
            stepped(np.ones(2, np.float32), [0.0, moved], task)


def test_a_servers_other_parts_are_finite_too() -> None:
    made = sumus.scaffold(sumus.sgd(0.1))
    state = made.start(BASE, TASK)
    still = {name: np.zeros(BASE[name].shape) for name in TASK.trained_layout}
    combined = {"params": still, "control": {name: leaf * np.nan for name, leaf in still.items()}}
    with pytest.raises(UsageError, match=r"`control\[.*\]` became NaN or infinite"):
        made.step(combined, state, TASK)
