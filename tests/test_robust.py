"""Robust aggregators: the papers' definitions, written out again; and what one dishonest client can and cannot do."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sumus
from sumus import robust
from sumus.aggregate import Aggregate, Aggregator, Part, RunningSum, mean
from sumus.algorithm import Algorithm
from sumus.errors import EmptyError, PlanError, UsageError
from sumus.fixed_point import FixedPoint
from sumus.rng import generator
from sumus.task import Description, Leaf
from sumus.types import Array, Tree
from sumus.update import Transform, chain, clip_by_global_norm, quantize, rotate, weight
from sumus.update.transform import Context

SHAPES = {"fc.weight": (2, 3), "fc.bias": (3,), "norm.mean": (2,)}
TASK = Description(
    "t", tuple(Leaf(name, shape, "float64", "shared", name != "norm.mean") for name, shape in SHAPES.items()), "l", ()
)
SUMS = FixedPoint.fit(max_count=16, max_weight=64)
FINE = 4 * 2.0**-SUMS.fraction_bits
"""How far a mean of sums may be from the mean of floats: one rounding a client, and float64's own."""
WEIGHED = Part("params")
ALL: dict[str, Callable[..., Aggregator]] = {
    "median": robust.median,
    "trimmed_mean": lambda *parts: robust.trimmed_mean(*parts, attackers=1),
    "krum": lambda *parts: robust.krum(*parts, attackers=1),
    "multi_krum": lambda *parts: robust.multi_krum(*parts, attackers=1),
    "norm_bounded": lambda *parts: robust.norm_bounded(*parts, max_norm=3.0),
}
Trees: TypeAlias = Sequence[Tree]
"""Each client's whole update, statistics too."""


def drawn(count: int, seed: int) -> list[dict[str, Array]]:
    """Updates of so many clients, in no way alike."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.1, 3.0, count)
    return [{name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()} for scale in scales]


def algorithm(aggregator: Aggregator, update: Transform | None = None) -> Algorithm:
    client = dataclasses.replace(
        sumus.sgd(0.1), rules=sumus.ClientRules(sends=tuple(part.name for part in aggregator.parts))
    )
    return Algorithm(client, update or chain(), aggregator, sumus.optimizers.sgd(1.0))


def ones_of(
    by: Algorithm, clients: Trees, examples: Sequence[int] | None = None, more: Sequence[Any] | None = None
) -> list[Aggregate]:
    """Each client's aggregate of one. more: what it sends besides `params`, by part."""
    hop, ones = by.first_hop(TASK, SUMS), list[Aggregate]()
    for number, tree in enumerate(clients):
        parts = {
            "params": {name: tree[name] for name in TASK.trained_layout},
            "buffers": {name: tree[name] for name in TASK.buffer_layout},
            **(more[number] if more else {}),
        }
        seen = examples[number] if examples else 5
        ones.append(hop.count_in(by.report(number, parts, seen, {}, b"round", generator(number))))
    return ones


def combined(by: Algorithm, clients: Trees, examples: Sequence[int] | None = None) -> dict[str, Array]:
    """What stands for everyone's update, in one tree; nothing where the round is void."""
    parts = by.combine_each(ones_of(by, clients, examples), TASK, SUMS, b"round", len(clients))
    return {name: leaf for tree in parts.values() for name, leaf in tree.items()}


def close(ours: Tree, theirs: Tree, atol: float = FINE) -> None:
    assert set(ours) == set(theirs) == set(SHAPES)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-12, atol=atol, err_msg=name)


# ── the papers, number by number ─────────────────────────────────────────────────────────────────────────────────────


def numbers(tree: Tree, names: Sequence[str] = ("fc.weight", "fc.bias")) -> list[float]:
    """The entries of a client's `params`."""
    return [float(value) for name in names for value in np.ravel(tree[name])]


def entry_by_entry(rule: Callable[[list[float]], float], clients: Trees) -> Tree:
    tree: dict[str, Array] = {}
    for name, shape in SHAPES.items():
        tree[name] = np.empty(shape)
        for place in np.ndindex(shape):
            tree[name][place] = rule([float(client[name][place]) for client in clients])
    return tree


def median_by_definition(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def trimmed_by_definition(values: list[float], cut: int) -> float:
    """Definition 2 of Yin et al., where βm = `cut`: remove the largest and the smallest β fraction."""
    kept = sorted(values)
    for _ in range(cut):
        kept.remove(max(kept))
        kept.remove(min(kept))
    return math.fsum(kept) / len(kept)


def scores_by_definition(clients: Trees, attackers: int) -> list[float]:
    """s(i) = Σ ‖Vᵢ − Vⱼ‖² over the n − f − 2 closest Vⱼ, j ≠ i."""
    scores: list[float] = []
    for i, mine in enumerate(clients):
        distances = [
            math.fsum((a - b) ** 2 for a, b in zip(numbers(mine), numbers(theirs), strict=True))
            for j, theirs in enumerate(clients)
            if j != i
        ]
        scores.append(math.fsum(sorted(distances)[: len(clients) - attackers - 2]))
    return scores


def krum_by_definition(clients: Trees, attackers: int, keep: int) -> Tree:
    scores = scores_by_definition(clients, attackers)
    best = sorted(range(len(clients)), key=lambda i: (scores[i], i))[:keep]
    return entry_by_entry(lambda values: math.fsum(values[i] for i in best) / keep, clients)


def bounded_by_definition(clients: Trees, examples: Sequence[int], bound: float) -> Tree:
    """Σ nₖ/n · Δₖ / max(1, ‖Δₖ‖/M); statistics are only averaged."""
    factors = [1 / max(1.0, math.sqrt(math.fsum(v * v for v in numbers(client))) / bound) for client in clients]
    scaled = [
        {name: leaf * (1.0 if name == "norm.mean" else factor) for name, leaf in client.items()}
        for client, factor in zip(clients, factors, strict=True)
    ]

    def rule(values: list[float]) -> float:
        return math.fsum(n * v for n, v in zip(examples, values, strict=True)) / sum(examples)

    return entry_by_entry(rule, scaled)


@given(st.integers(1, 10), st.integers(0, 2**32))
def test_the_median_is_that_of_every_entry(count: int, seed: int) -> None:
    clients = drawn(count, seed)
    close(combined(algorithm(robust.median()), clients), entry_by_entry(median_by_definition, clients))


@given(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2**32))
def test_the_trimmed_mean_is_that_without_the_largest_and_smallest(attackers: int, more: int, seed: int) -> None:
    clients = drawn(2 * attackers + 1 + more, seed)
    ours = combined(algorithm(robust.trimmed_mean(attackers=attackers)), clients)
    close(ours, entry_by_entry(lambda values: trimmed_by_definition(values, attackers), clients))


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**32))
def test_krum_takes_the_update_whose_nearest_are_nearest(attackers: int, more: int, seed: int) -> None:
    clients = drawn(2 * attackers + 3 + more, seed)
    ours = combined(algorithm(robust.krum(attackers=attackers)), clients)
    close(ours, krum_by_definition(clients, attackers, 1))
    assert any(np.allclose(ours["fc.bias"], client["fc.bias"], atol=FINE) for client in clients)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**32), st.sampled_from([None, 1, 2, 100]))
def test_multi_krum_averages_the_best_that_the_theorem_allows(
    attackers: int, more: int, seed: int, keep: int | None
) -> None:
    clients = drawn(2 * attackers + 3 + more, seed)
    most = len(clients) - attackers - 2
    ours = combined(algorithm(robust.multi_krum(attackers=attackers, keep=keep)), clients)
    close(ours, krum_by_definition(clients, attackers, most if keep is None else min(keep, most)))


@given(st.lists(st.integers(1, 64), min_size=1, max_size=9), st.floats(0.1, 9.0), st.integers(0, 2**32))
def test_norm_bounded_is_the_mean_of_updates_of_at_most_this_norm(examples: list[int], bound: float, seed: int) -> None:
    """Weighted by examples, or alike; and where no update is as long, the mean itself."""
    clients = drawn(len(examples), seed)
    for parts, limit, weights in (
        ((), bound, [1] * len(examples)),
        ((WEIGHED,), bound, examples),
        ((WEIGHED,), 1e6, examples),
    ):
        ours = combined(algorithm(robust.norm_bounded(*parts, max_norm=limit)), clients, examples)
        close(ours, bounded_by_definition(clients, weights, limit), atol=1e-7)  # a norm is rounded up, by 2^-29


def test_equal_scores_are_decided_by_who_came_first() -> None:
    """Blanchard et al. break ties by the smallest identifier: here two between one neighbour on either side."""
    values = [-3.0, -1.0, 1.0, 3.0, 100.0]
    clients = [{name: np.full(shape, value) for name, shape in SHAPES.items()} for value in values]
    by = algorithm(robust.krum(attackers=1))
    assert combined(by, clients)["fc.bias"].tolist() == [-1.0] * 3
    assert combined(by, clients[::-1])["fc.bias"].tolist() == [1.0] * 3


# ── what one client can do ───────────────────────────────────────────────────────────────────────────────────────────

BAD = st.floats(-SUMS.bound, SUMS.bound)


def with_one_bad(values: Sequence[float], place: int, seed: int, count: int = 6) -> tuple[list[Tree], list[Tree]]:
    """(the honest, everyone): one client sends these values, each in its own entries."""
    honest = drawn(count, seed)
    bad = {name: np.resize(values, shape) for name, shape in SHAPES.items()}
    return honest, [*honest[:place], bad, *honest[place:]]


def within(ours: Tree, honest: Trees) -> bool:
    """Whether every entry lies between the honest clients' smallest and largest."""
    return all(
        (ours[name] >= np.min([client[name] for client in honest], axis=0) - FINE).all()
        and (ours[name] <= np.max([client[name] for client in honest], axis=0) + FINE).all()
        for name in SHAPES
    )


@given(st.lists(BAD, min_size=1, max_size=6), st.integers(0, 6), st.integers(0, 2**32))
def test_whatever_one_client_sends_the_median_and_the_trimmed_mean_stay_among_the_honest(
    values: list[float], place: int, seed: int
) -> None:
    honest, everyone = with_one_bad(values, place, seed)
    for name in ("median", "trimmed_mean"):
        assert within(combined(algorithm(ALL[name]()), everyone), honest)


@given(st.lists(BAD, min_size=1, max_size=6), st.integers(0, 6), st.integers(0, 2**32))
def test_whatever_one_client_sends_krum_is_as_near_to_the_honest_as_they_are_to_each_other(
    values: list[float], place: int, seed: int
) -> None:
    """The winner's nearest are never farther than those of the best honest one, and at least one of them is honest. So a bad
    update wins only from among the honest, and one that is far away never."""
    honest, everyone = with_one_bad(values, place, seed)
    reach = min(score for i, score in enumerate(scores_by_definition(everyone, 1)) if i != place) ** 0.5 + 1e-6

    def gap(one: Tree) -> float:
        return min(math.dist(numbers(one), numbers(client)) for client in honest)

    winner = combined(algorithm(robust.krum(attackers=1)), everyone)
    assert gap(winner) <= reach
    if gap(everyone[place]) > reach:
        assert gap(winner) < 1e-6
        assert within(winner, honest)


@given(st.floats(50.0, SUMS.bound), st.sampled_from([-1.0, 1.0]), st.integers(0, 6), st.integers(0, 2**32))
def test_one_far_away_client_moves_the_mean_and_no_robust_rule(size: float, sign: float, place: int, seed: int) -> None:
    honest, everyone = with_one_bad([sign * size], place, seed)
    plain = algorithm(mean(robust.PARAMS))
    total = RunningSum()
    for one in ones_of(plain, everyone):
        total.add(one)
    moved = plain.combine(total.total, TASK, SUMS, b"round", len(everyone))
    assert not within({**moved["params"], **moved["buffers"]}, honest)
    for name in ("median", "trimmed_mean", "krum", "multi_krum"):
        assert within(combined(algorithm(ALL[name]()), everyone), honest)
    bounded = combined(algorithm(robust.norm_bounded(max_norm=0.7)), everyone)
    others = combined(algorithm(robust.norm_bounded(max_norm=0.7)), honest)
    pull = math.dist([7 * v for v in numbers(bounded)], [6 * v for v in numbers(others)])
    assert pull == pytest.approx(0.7, rel=1e-6)


# ── a round ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LEAST = {
    "median": (robust.median(), 1),
    "trimmed_mean": (robust.trimmed_mean(attackers=2), 5),
    "krum": (robust.krum(attackers=2), 7),
    "multi_krum": (robust.multi_krum(attackers=2), 7),
    "norm_bounded": (robust.norm_bounded(max_norm=1.0), 1),
}


@pytest.mark.parametrize("name", LEAST)
def test_with_too_few_contributors_the_round_is_void(name: str) -> None:
    aggregator, least = LEAST[name]
    by, clients = algorithm(aggregator), drawn(least, 0)
    state = by.start(drawn(1, 9)[0], TASK)
    enough = by.combine_each(ones_of(by, clients), TASK, SUMS, b"round", 20)
    few = by.combine_each(ones_of(by, clients[1:]), TASK, SUMS, b"round", 20)
    assert set(enough) == {"params", "buffers"}
    assert by.step(enough, state, TASK) is not state
    assert few == {}
    assert by.step(few, state, TASK) is state


def test_a_client_without_examples_is_refused_and_no_contributor() -> None:
    """It is neither one of the three that are needed, nor a value among theirs."""
    by, clients = algorithm(robust.trimmed_mean(WEIGHED, attackers=1)), drawn(4, 0)
    with pytest.raises(EmptyError, match="a client without examples cannot contribute"):
        combined(by, clients, [5, 0, 7, 9])


def test_a_sum_of_too_few_is_void_too() -> None:
    """An aggregator of one's own that works on the sum, and wants three."""
    by = algorithm(dataclasses.replace(mean(robust.PARAMS), least=3))
    one, two, three = ones_of(by, drawn(3, 0))
    assert by.combine(one.merge(two), TASK, SUMS, b"round", 9) == {}
    assert set(by.combine(one.merge(two).merge(three), TASK, SUMS, b"round", 9)) == {"params", "buffers"}


@pytest.mark.parametrize("name", ALL)
def test_the_model_moves_by_the_centre_and_the_statistics_with_it(name: str) -> None:
    by, clients, before = algorithm(ALL[name]()), drawn(7, 3), drawn(1, 9)[0]
    moved = by.combine_each(ones_of(by, clients), TASK, SUMS, b"round", 7)
    after = by.release(by.step(moved, by.start(before, TASK), TASK))
    centre = combined(by, clients)
    close(after, {name: before[name] - centre[name] for name in SHAPES}, atol=0)


@pytest.mark.parametrize("name", ["krum", "multi_krum"])
def test_statistics_do_not_decide_whose_update_is_taken(name: str) -> None:
    """They go with the updates that are: those of one and the same client."""
    by, clients = algorithm(ALL[name]()), drawn(7, 3)
    strange = [{**client, "norm.mean": np.full(2, 200.0 * (-1) ** i)} for i, client in enumerate(clients)]
    plain, moved = combined(by, clients), combined(by, strange)
    assert all(np.array_equal(plain[name], moved[name]) for name in TASK.trained_layout)
    if name == "krum":
        (winner,) = (i for i, client in enumerate(clients) if np.allclose(client["fc.bias"], plain["fc.bias"]))
        assert moved["norm.mean"].tolist() == strange[winner]["norm.mean"].tolist()


def test_every_part_has_a_centre_and_its_own_denominator() -> None:
    """As SCAFFOLD's: the median of `control` stands for the mean of three, of a population of twelve."""
    parts = (robust.PARAMS, Part("control", weight="uniform", denominator="population", transformed=False))
    by, clients, controls = algorithm(robust.median(*parts)), drawn(3, 0), drawn(3, 1)
    more = [{"control": {name: control[name] for name in TASK.trained_layout}} for control in controls]
    found = by.combine_each(ones_of(by, clients, more=more), TASK, SUMS, b"round", population=12)
    medians = entry_by_entry(median_by_definition, controls)
    for name, leaf in found["control"].items():
        np.testing.assert_allclose(leaf, medians[name] * 3 / 12, atol=FINE)


def test_every_part_is_averaged_by_its_own_weights() -> None:
    """`params` by examples, `control` alike, statistics as params: where no update is long, it is the mean."""
    parts = (WEIGHED, Part("control", weight="uniform", denominator="population", transformed=False))
    clients, examples = drawn(3, 0), [1, 7, 40]
    more = [{"control": {name: leaf for name, leaf in tree.items() if name != "norm.mean"}} for tree in drawn(3, 1)]
    bounded, plain = algorithm(robust.norm_bounded(*parts, max_norm=1e6)), algorithm(mean(*parts))
    total = RunningSum()
    for one in ones_of(plain, clients, examples, more):
        total.add(one)
    wanted = plain.combine(total.total, TASK, SUMS, b"round", population=12)
    found = bounded.combine_each(ones_of(bounded, clients, examples, more), TASK, SUMS, b"round", population=12)
    assert set(found) == set(wanted) == {"params", "control", "buffers"}
    for part, tree in wanted.items():
        for name, leaf in tree.items():
            np.testing.assert_allclose(found[part][name], leaf, rtol=1e-12, atol=FINE, err_msg=f"{part}[{name}]")


# ── on the way ───────────────────────────────────────────────────────────────────────────────────────────────────────

CODED = chain(clip_by_global_norm(2.0), rotate(), quantize(8))


@pytest.mark.parametrize("name", ALL)
def test_transforms_are_undone_for_each_client_before_anything_is_compared(name: str) -> None:
    """Rotated, an entry is a mixture: a median of codes is not the code of a median."""
    by, clients, plain = algorithm(ALL[name](), CODED), drawn(7, 3), algorithm(ALL[name]())
    shapes = TASK.trained_layout
    seen: list[Tree] = []
    for number, client in enumerate(clients):
        params = {leaf: client[leaf] for leaf in shapes}
        codes = CODED.apply(params, Context(shapes, b"round", examples=5, rng=generator(number)))
        assert {leaf.dtype.name for leaf in codes.values()} == {"int8"}
        back = CODED.invert({leaf: code.astype(np.float64) for leaf, code in codes.items()}, Context(shapes, b"round"))
        seen.append({**client, **back})
    close(combined(by, clients), combined(plain, seen))


def test_a_weight_that_the_device_applied_is_taken_off_before_anything_is_compared() -> None:
    """Else whoever has more examples would be an outlier."""
    clients, examples = drawn(5, 3), [1, 5, 9, 40, 2]
    for make in ALL.values():
        by, plain = algorithm(make(WEIGHED), weight(cap=9)), algorithm(make(WEIGHED))
        close(combined(by, clients, examples), combined(plain, clients, [min(n, 9) for n in examples]))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ALL)
def test_a_sum_is_refused(name: str) -> None:
    by, total = algorithm(ALL[name]()), RunningSum()
    for one in ones_of(by, drawn(7, 0)):
        total.add(one)
    with pytest.raises(
        UsageError, match=rf"^{name}\(.* cannot work on a sum: give each update separately, to combine_each$"
    ):
        by.combine(total.total, TASK, SUMS, b"round", 7)


@pytest.mark.parametrize("name", ALL)
def test_a_server_refuses_them_by_the_rules_name_and_the_simulator_does_not(name: str) -> None:
    plan = sumus.Plan(TASK, sumus.fedavg(sumus.sgd(0.1), aggregator=ALL[name]()), sumus.Pacing(10))
    with pytest.raises(PlanError, match=rf"^{name}\(.* needs each update separately") as error:
        plan.check_deployable()
    assert error.value.rule == "needs-each-update"
    assert sumus.Plan.from_json(plan.to_json()) == plan


def test_a_centre_that_forgets_a_part_is_named() -> None:
    """One of one's own, which gives only `params`, where statistics must have a centre too."""
    own = dataclasses.replace(robust.median(), centre=lambda ones, weights: {"params": ones[0]["params"]})
    by = algorithm(own)
    with pytest.raises(UsageError, match=r"returned \['params'\], but must return \['buffers', 'params'\]"):
        combined(by, drawn(3, 0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: robust.trimmed_mean(attackers=-1),
        lambda: robust.krum(attackers=-1),
        lambda: robust.multi_krum(attackers=-1),
        lambda: robust.multi_krum(attackers=1, keep=0),
        lambda: robust.norm_bounded(max_norm=0.0),
        lambda: robust.norm_bounded(max_norm=-1.0),
        lambda: robust.norm_bounded(max_norm=math.inf),
        lambda: robust.norm_bounded(max_norm=math.nan),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(make: Callable[[], Aggregator]) -> None:
    with pytest.raises(PlanError) as error:
        make()
    assert error.value.rule == "positive"
