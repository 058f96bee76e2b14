"""Staleness: how much an old update counts, as an integer weight; and FedBuff's sum that is made of such updates."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sumus
from sumus.aggregate import Fixed, Part, RunningSum, mean
from sumus.algorithm import Algorithm
from sumus.errors import PlanError
from sumus.fixed_point import FixedPoint
from sumus.rng import generator
from sumus.staleness import ONE, Staleness, constant, hinge, polynomial
from sumus.task import Description, Leaf
from sumus.types import Array, Tree
from sumus.update import chain, clip_by_global_norm, quantize, rotate

SHAPES = {"w": (2, 3), "b": (3,), "norm.mean": (2,)}
TASK = Description(
    "t", tuple(Leaf(name, shape, "float64", "shared", name != "norm.mean") for name, shape in SHAPES.items()), "l", ()
)
RULES: dict[str, tuple[Staleness, Callable[[int], float]]] = {
    "constant": (constant(), lambda s: 1.0),
    "polynomial": (polynomial(), lambda s: 1 / math.sqrt(1 + s)),
    "polynomial, steep": (polynomial(2.0), lambda s: 1 / (1 + s) ** 2),
    "hinge": (hinge(), lambda s: 1.0 if s <= 10 else 1 / (s - 9)),
    "hinge, at once": (hinge(0, 0.25), lambda s: 1 / (1 + s / 4)),
}
STALE = st.one_of(st.integers(0, 30), st.integers(0, 10**9))


# ── the weight ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", RULES)
@given(STALE)
def test_a_weight_is_its_formula_to_half_a_step_and_never_nothing(name: str, versions: int) -> None:
    """Xie et al., section 5.2. Whoever is counted at all weighs at least 1/1024, or a sum might have no weight."""
    rule, formula = RULES[name]
    weight = rule.weight(versions)
    assert type(weight) is int
    assert abs(weight / 1024 - formula(versions)) <= 1 / 2048 or (weight == 1 and formula(versions) < 1 / 1024)


@pytest.mark.parametrize("name", RULES)
@given(STALE, STALE)
def test_an_older_update_never_weighs_more(name: str, one: int, two: int) -> None:
    rule, _ = RULES[name]
    assert 1024 == rule.weight(0) >= rule.weight(min(one, two)) >= rule.weight(max(one, two)) >= 1


@given(st.floats(0, 1e300), STALE)
def test_no_rule_of_ones_own_weighs_more_than_the_sums_are_planned_for(factor: float, versions: int) -> None:
    """A plan leaves room for 1024, the weight of a fresh update."""
    part = Part("params", weight=Staleness(factor=lambda staleness: factor if staleness else 1.0))
    assert 1 <= part.weigh(5, cap=2**16, staleness=versions) <= ONE == part.largest_weight(cap=2**16)


@pytest.mark.parametrize(
    "make",
    [
        lambda: polynomial(0.0),
        lambda: polynomial(-1.0),
        lambda: polynomial(math.nan),
        lambda: hinge(after=-1),
        lambda: hinge(slope=0.0),
        lambda: hinge(slope=-1.0),
        lambda: hinge(slope=math.nan),
        lambda: hinge(slope=math.inf),  # times zero is no number
    ],
)
def test_a_rule_by_which_age_counts_more_or_nothing_at_all_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(PlanError) as error:
        make()
    assert error.value.rule == "positive"


# ── the sum ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def drawn(count: int, seed: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(count)]


def combined(
    plan: sumus.Plan, clients: Sequence[Tree], stale: Sequence[int], population: int = 100
) -> dict[str, Array]:
    """What comes of updates of these stalenesses: all combined leaves, statistics too."""
    by, total = plan.algorithm, RunningSum()
    for number, (tree, versions) in enumerate(zip(clients, stale, strict=True)):
        parts = {
            "params": {name: tree[name] for name in TASK.trained_layout},
            "buffers": {name: tree[name] for name in TASK.buffer_layout},
        }
        update = by.report(number, parts, 7, {}, b"round", generator(number))
        plan.first_hop.count_in(update, total, staleness=versions)
    found = by.combine(total.total, TASK, plan.sums, b"round", population)
    return {name: leaf for tree in found.values() for name, leaf in tree.items()}


def plan_of(part: Part, cohort: int = 10) -> sumus.Plan:
    return sumus.Plan(
        TASK, Algorithm(sumus.sgd(0.1), chain(), mean(part), sumus.optimizers.sgd()), sumus.Pacing(cohort)
    )


def close(ours: Array, theirs: Array, atol: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@given(st.lists(STALE, min_size=1, max_size=10), st.integers(0, 2**32))
def test_fedbuffs_sum_is_the_papers(stale: list[int], seed: int) -> None:
    """(1/K) Σ s(τᵢ) Δᵢ, where 1/K stays although the weights are below 1: off by the steps of 1/1024, and by nothing else."""
    clients, plan = drawn(len(stale), seed), sumus.Plan(TASK, sumus.fedbuff(sumus.sgd(0.1)), sumus.Pacing(10))
    ours = combined(plan, clients, stale)
    factors = [1 / math.sqrt(1 + versions) for versions in stale]
    weights = [polynomial(0.5).weight(versions) for versions in stale]
    for name in TASK.trained_layout:
        leaves = np.stack([client[name] for client in clients])
        largest = float(np.abs(leaves).max())
        close(ours[name], np.tensordot(factors, leaves, 1) / len(stale), atol=largest / 1024)
        exact = np.tensordot(weights, leaves, 1) / (1024 * len(stale))
        close(ours[name], exact, atol=2.0 ** -(plan.sums.fraction_bits + 9) + 1e-15)  # a rounding is weighed by 1/1024


DENOMINATORS: dict[str, Callable[[Sequence[float]], float]] = {
    "weight": sum,
    "count": len,
    "population": lambda factors: 100,
    "fixed": lambda factors: 8,
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_every_denominator_counts_a_fresh_update_as_one(name: str, denominator: Any) -> None:
    (rule, formula), stale, clients = RULES[name], [0, 3, 11, 40], drawn(4, 0)
    plan = plan_of(Part("params", weight=rule, denominator=Fixed(8) if denominator == "fixed" else denominator))
    ours = combined(plan, clients, stale)
    factors = [formula(versions) for versions in stale]
    for leaf in ("w", "b"):
        leaves = np.stack([client[leaf] for client in clients])
        wanted = np.tensordot(factors, leaves, 1) / DENOMINATORS[denominator](factors)
        close(ours[leaf], wanted, atol=2 * float(np.abs(leaves).max()) / 1024)


def test_statistics_are_averaged_by_the_same_weights() -> None:
    """Whatever params are divided by: 1/K of a stale variance would not be a variance."""
    stale, clients = [0, 3, 8], drawn(3, 0)
    ours = combined(sumus.Plan(TASK, sumus.fedbuff(sumus.sgd(0.1)), sumus.Pacing(10)), clients, stale)
    weights = [1024, 512, 341]
    wanted = sum(w * c["norm.mean"] for w, c in zip(weights, clients, strict=True)) / sum(weights)
    close(ours["norm.mean"], wanted, atol=1e-9)


def test_where_nothing_is_stale_fedbuff_is_fedavg_with_equal_weights() -> None:
    clients = drawn(5, 0)
    buffered, plain = (
        combined(sumus.Plan(TASK, by, sumus.Pacing(5)), clients, [0] * 5)
        for by in (sumus.fedbuff(sumus.sgd(0.1)), sumus.fedavg(sumus.sgd(0.1), weight="uniform"))
    )
    for name in SHAPES:
        close(buffered[name], plain[name], atol=1e-9)


def test_codes_are_weighed_by_staleness_too() -> None:
    """They come as integers, and are multiplied as they are: one old update is half of a fresh one."""
    coded = chain(clip_by_global_norm(1.0), rotate(), quantize(8))
    plan = sumus.Plan(TASK, sumus.fedbuff(sumus.sgd(0.1), coded), sumus.Pacing(5))
    fresh, old = (combined(plan, drawn(1, 0), [versions]) for versions in (0, 3))
    for name in TASK.trained_layout:
        close(old[name], fresh[name] / 2, atol=1e-15)


# ── the sum's limits ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", RULES)
def test_a_plan_fits_its_sums_for_the_weight_of_a_fresh_update(name: str) -> None:
    part = Part("params", weight=RULES[name][0], denominator="count")
    assert plan_of(part, cohort=64).sums == FixedPoint.fit(64, max_weight=ONE)


@given(st.integers(1, 30), st.sampled_from([-1, 1]))
def test_a_whole_cohort_of_fresh_updates_at_the_bound_does_not_overflow(cohort: int, sign: int) -> None:
    plan = sumus.Plan(TASK, sumus.fedbuff(sumus.sgd(0.1)), sumus.Pacing(cohort))
    far = {name: np.full(shape, sign * plan.sums.bound) for name, shape in SHAPES.items()}
    for leaf in combined(plan, [far] * cohort, [0] * cohort).values():
        assert (leaf == sign * plan.sums.bound).all()


def test_sums_are_planned_for_a_rule_that_rises() -> None:
    """A rule of one's own may let older updates count for more; the sums hold the most that any can weigh."""
    rising = Staleness(factor=lambda versions: 0.1 + 0.9 * (versions > 0))
    part = sumus.Part("params", weight=rising, denominator="count")
    assert rising.weight(0) < part.largest_weight(1) == rising.weight(5) == 1024
    assert part.divisor(0, 3, 9) == 3 * 1024


def test_a_factor_that_is_no_number_is_refused() -> None:
    with pytest.raises(sumus.PlanError, match="at staleness 3"):
        Staleness(factor=lambda versions: float("nan")).weight(3)
