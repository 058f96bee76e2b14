"""Sites as values: hierarchical FedAvg by hand, and sums that mean what they say."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sumus
from sumus.aggregate import RunningSum, Update
from sumus.errors import BeyondBoundError
from sumus.pacing import Pacing
from sumus.plan import Plan
from sumus.site import Site, seed_of
from sumus.task import Data, Description, Leaf
from sumus.update import Transform, chain, clip_buffers, clip_by_global_norm, quantize, rotate, weight

TASK = Description(
    "line",
    (Leaf("a", (5, 3), "float32", "shared", True), Leaf("b", (4,), "float32", "shared", True)),
    "loss",
    (),
    Data((3,), "float32", (), "int64", 2),
)
SEED = bytes(range(32))
CHAINS: dict[str, Transform] = {
    "plain": chain(),
    "clipped": clip_by_global_norm(10.0),
    "rotated": chain(clip_by_global_norm(10.0), rotate()),
    "8-bit codes": chain(clip_by_global_norm(10.0), rotate(), quantize(8)),
    "weighted first": chain(weight(cap=50), clip_by_global_norm(100.0)),
}


def plan(update: Transform | None = None, by: Any = "examples", **more: Any) -> Plan:
    return Plan(TASK, sumus.fedavg(sumus.sgd(0.1), update, weight=by), Pacing(8), 2, edges=sumus.Edges(3), **more)


def start(made: Plan, seed: bytes = SEED) -> Site:
    rng = np.random.default_rng(1)
    base = {leaf.name: rng.normal(size=leaf.shape).astype(np.float32) for leaf in TASK.leaves}
    return Site.of(made.algorithm, TASK, made.sums, seed, {"params": base})


def summed(made: Plan, moves: Sequence[Any], sizes: Sequence[int], seed: bytes) -> Any:
    """What devices with these examples report that have moved so."""
    total = RunningSum()
    for number, (moved, size) in enumerate(zip(moves, sizes, strict=True)):
        rng = np.random.default_rng(number)
        update = made.algorithm.report(number, {"params": moved}, size, {"loss": (0.5 * size, size)}, seed, rng)
        made.first_hop.count_in(update, total)
    return total.total


def moves(rng: np.random.Generator, people: int, scale: float = 0.1) -> list[Any]:
    return [
        {leaf.name: (scale * rng.normal(size=leaf.shape)).astype(np.float32) for leaf in TASK.leaves}
        for _ in range(people)
    ]


# ── hierarchical FedAvg, by hand ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("by", ["examples", "uniform"])
def test_it_is_hierarchical_fedavg(by: str) -> None:
    """A quadratic per device: w moves by lr·(w − centre) in a step. In float64, after Liu et al. 2020, Algorithm 1."""
    made, rng = plan(by=by), np.random.default_rng(0)
    sites = [[4, 9], [1, 20, 6]]  # examples of their devices
    centres = [[moves(rng, 1, 1.0)[0] for _ in sizes] for sizes in sites]
    begun = start(made)
    total, wanted, weights = RunningSum(), [], []
    for sizes, theirs in zip(sites, centres, strict=True):
        site, exact = begun, {name: leaf.astype(np.float64) for name, leaf in begun.base["params"].items()}
        shares = np.array(sizes if by == "examples" else [1] * len(sizes), np.float64)
        for _ in range(3):
            at = site.at["params"]
            reports = [{name: np.float32(0.3) * (at[name] - centre[name]) for name in at} for centre in theirs]
            site = site.after(summed(made, reports, sizes, site.seed_now))
            exact = {
                name: sum(
                    s * (leaf - 0.3 * (leaf - c[name].astype(np.float64))) for s, c in zip(shares, theirs, strict=True)
                )
                / shares.sum()
                for name, leaf in exact.items()
            }
        total.add(site.total(len(sizes)))
        wanted.append(exact)
        weights.append(shares.sum())
    combined = made.algorithm.combine(total.total, TASK, made.sums, SEED, 0)
    state = made.algorithm.step(combined, made.algorithm.start(begun.base["params"], TASK), TASK)
    for name, leaf in state.broadcast["params"].items():
        mean = sum(w * each[name] for w, each in zip(weights, wanted, strict=True)) / sum(weights)
        np.testing.assert_allclose(leaf, mean, rtol=0, atol=1e-6)
    assert int(total.total.count) == 5
    assert int(total.total.weights["params"]) == sum(weights)


# ── sums ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(CHAINS)),
    by=st.sampled_from(["examples", "uniform"]),
    people=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-6, 0.01, 1.0]),
)
def test_the_server_combines_a_sites_sum_to_what_its_model_has_moved_by(
    name: str, by: str, people: int, seed: int, scale: float
) -> None:
    if by == "uniform" and name in ("weighted first", "8-bit codes"):
        return
    made, rng = plan(CHAINS[name], by), np.random.default_rng(seed)
    sizes = rng.integers(1, 40, people).tolist()
    site = begun = start(made)
    for _ in range(3):
        site = site.after(summed(made, moves(rng, people, scale), sizes, site.seed_now))
    sent = site.total(people)
    made.first_hop.check_sum(sent, "site", people)
    combined = made.algorithm.combine(sent, TASK, made.sums, SEED, 0)
    step = 4.5 * 10.0 / np.sqrt(16) / 127 / int(sent.weights["params"]) if name == "8-bit codes" else 1e-9
    for leaf, moved in combined["params"].items():
        true = begun.base["params"][leaf].astype(np.float64) - site.at["params"][leaf]
        # a coordinate of an orthogonal transform of 16 or 64 roundings of half a step each
        np.testing.assert_allclose(moved, true, rtol=1e-9, atol=8 * step)


def test_a_site_whose_people_come_and_go_weighs_what_a_round_of_its_weighed() -> None:
    made, rng = plan(), np.random.default_rng(3)
    site = start(made)
    for people, sizes in ((3, [10, 20, 30]), (1, [10]), (2, [10, 20])):
        site = site.after(summed(made, moves(rng, people), sizes, site.seed_now))
    sent = site.total(3)
    assert int(sent.weights["params"]) == round((60 + 10 + 30) / 3)
    assert int(sent.count) == 3
    assert sent.metrics["loss"].tolist() == [15 * 2**20, 30], "of the last round"


def test_a_round_of_nobody_moves_nothing() -> None:
    made, rng = plan(), np.random.default_rng(3)
    site = start(made).after(summed(made, moves(rng, 2), [5, 5], SEED))
    again = site.after(RunningSum().total)
    assert all(np.array_equal(leaf, again.at["params"][name]) for name, leaf in site.at["params"].items())
    assert again.done == 2


def test_what_moved_further_than_reports_can_move_it_is_refused() -> None:
    made = plan(sums=sumus.FixedPoint.fit(8, bound=1.0))
    site = start(made)
    for _ in range(3):
        far = {leaf.name: np.full(leaf.shape, 0.9, np.float32) for leaf in TASK.leaves}
        site = site.after(summed(made, [far], [2**16], site.seed_now))
    with pytest.raises(BeyondBoundError, match="has moved further than the reports of this sum"):
        site.total(1)


@pytest.mark.parametrize("name", ["clipped", "rotated", "8-bit codes", "weighted first"])
@pytest.mark.parametrize("clip", [1e-3, 2.2e-6, 1e-7])
def test_a_site_whose_clip_is_tiny_against_its_model_is_counted(name: str, clip: float) -> None:
    """The model of length C · 10^4 to 10^8 is rounded to single precision in each round, by more than a share of the clip."""
    chains = {
        "clipped": clip_by_global_norm(clip),
        "rotated": chain(clip_by_global_norm(clip), rotate()),
        "8-bit codes": chain(clip_by_global_norm(clip), rotate(), quantize(8)),
        "weighted first": chain(weight(cap=50), clip_by_global_norm(clip)),
    }
    made = Plan(TASK, sumus.fedavg(sumus.sgd(0.1), chains[name]), Pacing(8), 2, edges=sumus.Edges(20))
    # each step is a little more than half of the last bit of the model, so that each is rounded up
    rng = np.random.default_rng(1)
    base = {leaf.name: (8.0 + rng.random(leaf.shape)).astype(np.float32) for leaf in TASK.leaves}
    for sign in (1.0, -1.0):
        site = Site.of(made.algorithm, TASK, made.sums, SEED, {"params": base})
        for _ in range(20):
            same = [{leaf.name: np.full(leaf.shape, sign, np.float32) for leaf in TASK.leaves}] * 3
            site = site.after(summed(made, same, [1, 1, 1], site.seed_now))
        made.first_hop.check_sum(site.total(3), "site", 3)


def test_a_site_that_moved_further_than_its_clip_and_rounding_is_refused() -> None:
    made = plan(clip_by_global_norm(1.0))
    site = start(made)
    far = {name: leaf - np.float32(0.99 * 3 / np.sqrt(19)) for name, leaf in site.at["params"].items()}
    honest = replace(site, at={"params": far}, done=3, weights={"params": 6})
    made.first_hop.check_sum(honest.total(2), "site", 2)
    further = {name: leaf - np.float32(1.005 * 3 / np.sqrt(19)) for name, leaf in site.at["params"].items()}
    with pytest.raises(BeyondBoundError, match="has a larger norm than 2 clipped updates can"):
        replace(honest, at={"params": further}).total(2)


@pytest.mark.parametrize("by", [{"cap": 40}, {"weight": "uniform"}])
@pytest.mark.parametrize("bound", [1e-3, 0.5, 1.3])
@pytest.mark.parametrize("start", [1.0, 100.0, 1000.0])
def test_a_site_whose_buffers_move_by_their_bound_in_every_round_is_counted(
    by: Any, bound: float, start: float
) -> None:
    """Each number of the buffers is rounded to single precision in each round, by more than the sum's unit."""
    task = replace(TASK, leaves=(*TASK.leaves, Leaf("mean", (8,), "float32", "shared", False)))
    update = chain(clip_by_global_norm(1.0), clip_buffers(bound))
    made = Plan(task, sumus.fedavg(sumus.sgd(0.1), update, **by), Pacing(8), 2, edges=sumus.Edges(4))
    rng = np.random.default_rng(0)
    base = {leaf.name: (start * (1 + rng.random(leaf.shape))).astype(np.float32) for leaf in task.leaves}
    still = {leaf.name: np.zeros(leaf.shape, np.float32) for leaf in TASK.leaves}
    for sign in (1, -1):
        far = {"params": still, "buffers": {"mean": np.full(8, sign * 3 * bound, np.float32)}}
        site = Site.of(made.algorithm, task, made.sums, SEED, made.algorithm.start(base, task).broadcast)
        for _ in range(4):
            total = RunningSum()
            for number in range(8):
                made.first_hop.count_in(made.algorithm.report(number, far, 40, {}, site.seed_now, rng), total)
            site = site.after(total.total)
        sent = site.total(8)
        made.first_hop.check_sum(sent, "site", 8)
        moved = made.algorithm.combine(sent, task, made.sums, SEED, 0)["buffers"]["mean"]
        np.testing.assert_allclose(moved, sign * 4 * bound, rtol=0, atol=8 * 2.0**-24 * start + bound * 1e-6)
    buffers = {"mean": base["mean"] - np.float32(4 * bound + 32 * 2.0**-24 * start + bound / 100)}
    with pytest.raises(BeyondBoundError, match="has moved further than the reports of this sum"):
        replace(site, at={**site.at, "buffers": buffers}).total(8)


def test_a_model_of_codes_that_moved_further_than_its_clip_is_refused() -> None:
    made = plan(CHAINS["8-bit codes"])
    site = start(made)
    gone = {name: leaf - np.float32(1e9) for name, leaf in site.at["params"].items()}
    with pytest.raises(BeyondBoundError, match="has a larger norm than 1 clipped updates can"):
        replace(site, at={"params": gone}, done=1, weights={"params": 2**16}).total(1)


def test_each_round_has_a_seed_of_its_own_and_the_first_the_servers() -> None:
    assert seed_of(SEED, 0) == SEED
    seeds = {seed_of(SEED, done) for done in range(9)}
    assert len(seeds) == 9
    assert seed_of(SEED, 3).hex() == "2a0e111d3fa43aee2b81b3a52e77d774054aff7f1b82190dc8b2c674ebb0fbf4"


def test_running_statistics_are_averaged_at_the_site_too() -> None:
    task = replace(TASK, leaves=(*TASK.leaves, Leaf("mean", (2,), "float32", "shared", False)))
    made = Plan(task, sumus.fedavg(sumus.sgd(0.1)), Pacing(8), 2, edges=sumus.Edges(2))
    base = {leaf.name: np.zeros(leaf.shape, np.float32) for leaf in task.leaves}
    state = made.algorithm.start(base, task)
    site = Site.of(made.algorithm, task, made.sums, SEED, state.broadcast)
    for value in (1.0, 3.0):
        moved = {name: np.zeros(leaf.shape, np.float32) for name, leaf in site.at["params"].items()}
        theirs = site.at["buffers"]["mean"] - np.float32(value)
        update = Update("one", {"params": moved, "buffers": {"mean": theirs}}, 4, {"loss": (1.0, 4)})
        site = site.after(made.first_hop.count_in(update))
    assert site.at["buffers"]["mean"].tolist() == [3.0, 3.0]
    combined = made.algorithm.combine(site.total(1), task, made.sums, SEED, 0)
    assert made.algorithm.step(combined, state, task).broadcast["buffers"]["mean"].tolist() == [3.0, 3.0]
