"""The sum: integers that do not care who adds what to what, in which order."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.aggregate import METRIC_BITS, Aggregate, Fixed, Part, RunningSum, Update, mean
from sumus.errors import DivergedError, EmptyError, ParticipantError, PlanError
from sumus.fixed_point import FixedPoint
from sumus.staleness import polynomial

PARTS = (Part("params"), Part("steps", content="scalar", weight="uniform", denominator="count"))
SUMS = FixedPoint.fit(max_count=32, max_weight=2**16)
EDGES_OF_A_CLIENT = [0.0, -0.0, SUMS.bound, -SUMS.bound, 1e-45, -(2.0**-149), 1.0]


# ── how updates, and trees of edges, are drawn ───────────────────────────────────────────────────────────────────────


def floats32() -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from(EDGES_OF_A_CLIENT), st.floats(-SUMS.bound, SUMS.bound, width=32))


@st.composite
def updates(draw: st.DrawFn) -> Update:
    matrix = np.array(draw(st.lists(floats32(), min_size=4, max_size=4)), np.float32).reshape(2, 2)
    bias = np.array(draw(st.floats(-SUMS.bound, SUMS.bound)), np.float64)
    examples = draw(st.one_of(st.sampled_from([1, 2**16, 2**16 + 1, 2**30]), st.integers(1, 2**16)))
    metrics = draw(
        st.dictionaries(
            st.sampled_from(["loss", "accuracy"]), st.tuples(st.floats(-1e6, 1e6), st.integers(0, 10**6)), max_size=2
        )
    )
    parts = {"params": {"fc.weight": matrix, "fc.bias": bias}, "steps": {"": np.array(float(examples % 256))}}
    return Update("someone", parts, examples, metrics)


def aggregates() -> st.SearchStrategy[Aggregate]:
    """One client's aggregate, or the empty one that an edge without clients sends."""
    return st.one_of(updates().map(lambda update: SUMS.encode(update, PARTS)), st.just(Aggregate()))


def flat(clients: Sequence[Aggregate]) -> Aggregate:
    return functools.reduce(Aggregate.merge, clients, Aggregate())


def running(clients: Sequence[Aggregate]) -> Aggregate:
    total = RunningSum()
    for client in clients:
        total.add(client)
    return total.total


def tree_of_edges(draw: st.DrawFn, clients: Sequence[Aggregate]) -> Aggregate:
    """A random tree: each edge merges or runs a sum over its children, of which some are edges themselves."""
    if len(clients) <= 1:
        return flat(clients)
    cuts = sorted(draw(st.lists(st.integers(0, len(clients)), max_size=3)))
    if not cuts or len(clients) in (len(clients[a:b]) for a, b in zip([0, *cuts], [*cuts, len(clients)], strict=True)):
        return draw(st.sampled_from([flat, running]))(clients)
    groups = [clients[a:b] for a, b in zip([0, *cuts], [*cuts, len(clients)], strict=True)]
    return draw(st.sampled_from([flat, running]))([tree_of_edges(draw, group) for group in groups])


def bits(aggregate: Aggregate) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every slot's dtype, shape and bytes: equal only for equal bits."""
    return {name: (slot.dtype.name, slot.shape, slot.tobytes()) for name, slot in aggregate.slots().items()}


def one(values: list[float], examples: int = 1, client: str = "alice", dtype: str = "float32") -> Update:
    return Update(client, {"params": {"w": np.array(values, dtype)}}, examples)


# ── the monoid ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(aggregates(), aggregates())
def test_merging_is_commutative(a: Aggregate, b: Aggregate) -> None:
    assert bits(a.merge(b)) == bits(b.merge(a))


@given(aggregates(), aggregates(), aggregates())
def test_merging_is_associative(a: Aggregate, b: Aggregate, c: Aggregate) -> None:
    assert bits(a.merge(b).merge(c)) == bits(a.merge(b.merge(c)))


@given(aggregates())
def test_the_empty_aggregate_is_zero(a: Aggregate) -> None:
    assert bits(a.merge(Aggregate())) == bits(Aggregate().merge(a)) == bits(a)


def test_two_empty_aggregates_make_an_empty_one() -> None:
    assert Aggregate().merge(Aggregate()).empty


@given(st.data())
def test_any_order_and_any_tree_of_edges_give_the_same_bits(data: st.DataObject) -> None:
    clients = data.draw(st.lists(aggregates(), min_size=1, max_size=12))
    shuffled = data.draw(st.permutations(clients))
    total = data.draw(st.composite(lambda draw: tree_of_edges(draw, shuffled))())
    assert bits(total) == bits(flat(clients))


@given(st.lists(aggregates(), min_size=6, max_size=6))
def test_a_tree_of_two_levels_equals_the_flat_sum(clients: list[Aggregate]) -> None:
    left, right = running(clients[:2]), flat(clients[2:])
    assert bits(running([left, right])) == bits(running(clients))


@given(st.lists(updates(), min_size=1, max_size=8))
def test_the_sum_is_exactly_the_sum_of_rounded_integers(clients: list[Update]) -> None:
    """Against Python's integers, which cannot overflow and do not round."""
    total = flat([SUMS.encode(client, PARTS) for client in clients])
    exact = 0
    for client in clients:
        weight = min(client.examples, SUMS.max_weight)
        exact += round(float(client.parts["params"]["fc.bias"]) * (weight * 2.0**SUMS.fraction_bits))
    assert int(total.sums["params"]["fc.bias"]) == exact
    assert int(total.weights["params"]) == sum(min(client.examples, SUMS.max_weight) for client in clients)
    assert int(total.weights["steps"]) == int(total.count) == len(clients)


def test_a_zero_update_counts_as_a_person_and_changes_no_sum() -> None:
    someone, nothing = SUMS.encode(one([1.0, -2.0], 3), PARTS[:1]), SUMS.encode(one([0.0, 0.0], 5), PARTS[:1])
    total = someone.merge(nothing)
    assert total.sums["params"]["w"].tolist() == someone.sums["params"]["w"].tolist()
    assert (int(total.count), int(total.weights["params"])) == (2, 8)


def test_a_client_without_examples_is_no_contributor() -> None:
    with pytest.raises(EmptyError, match="'alice': its update was trained on 0 examples"):
        SUMS.encode(one([1.0], examples=0), PARTS[:1])


@given(st.lists(aggregates(), max_size=8))
def test_a_running_sum_equals_merging(clients: list[Aggregate]) -> None:
    assert bits(running(clients)) == bits(flat(clients))


@given(st.lists(updates(), min_size=1, max_size=8))
def test_encoding_into_a_running_sum_equals_merging(clients: list[Update]) -> None:
    total = RunningSum()
    for client in clients:
        assert SUMS.encode(client, PARTS, into=total) is total.total
    assert bits(total.total) == bits(flat([SUMS.encode(client, PARTS) for client in clients]))


def test_a_running_sum_leaves_what_it_adds_alone() -> None:
    first, second = (SUMS.encode(one([value]), PARTS[:1]) for value in (1.0, 2.0))
    before = bits(first), bits(second)
    running([first, second, first])
    assert (bits(first), bits(second)) == before


@given(aggregates())
def test_slots_hold_everything(a: Aggregate) -> None:
    assert bits(Aggregate.from_slots(a.slots())) == bits(a)


def test_sums_of_different_plans_are_refused() -> None:
    base = SUMS.encode(one([1.0, 2.0]), PARTS[:1])
    strangers = {
        "another shape": SUMS.encode(one([1.0, 2.0, 3.0]), PARTS[:1]),
        "another leaf": SUMS.encode(Update("bob", {"params": {"v": np.zeros(2)}}, 1), PARTS[:1]),
        "another part": SUMS.encode(Update("bob", {"control": {"w": np.zeros(2)}}, 1), (Part("control"),)),
    }
    for what, stranger in strangers.items():
        for add in (lambda: base.merge(stranger), lambda: running([base, stranger])):  # noqa: B023
            with pytest.raises(ParticipantError, match="do not belong to the same plan") as error:
                add()
            assert error.value.client is None
        assert what


# ── the overflow rule ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sum_that_can_reach_2_to_the_62_is_refused_and_one_just_below_is_not() -> None:
    FixedPoint(fraction_bits=61, bound=1.0, max_weight=1, max_count=1)
    FixedPoint(fraction_bits=62, bound=math.nextafter(1.0, 0.0), max_weight=1, max_count=1)
    FixedPoint(fraction_bits=40, bound=1.0, max_weight=2**11 - 1, max_count=2**11)
    for refused in (
        (62, 1.0, 1, 1),
        (61, math.nextafter(1.0, 2.0), 2, 1),
        (40, 1.0, 2**11, 2**11),
        (40, 2.0**21, 2, 1),
    ):
        with pytest.raises(PlanError) as error:
            FixedPoint(*refused)
        assert error.value.rule == "sum-overflow"


def test_limits_so_large_that_no_float_holds_them_are_refused_alike() -> None:
    for refused in ((5000, 1.0, 1, 1), (0, 1.0, 1, 10**400), (10**12, 1.0, 1, 1)):
        with pytest.raises(PlanError) as error:
            FixedPoint(*refused)
        assert error.value.rule == "sum-overflow"


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_is_no_positive_number_is_refused(bound: float) -> None:
    with pytest.raises(PlanError) as error:
        FixedPoint(20, bound, 1, 1)
    assert error.value.rule == "positive"


@pytest.mark.parametrize(("max_weight", "max_count"), [(0, 1), (1, 0), (-1, 1)])
def test_a_cap_below_one_is_refused(max_weight: int, max_count: int) -> None:
    with pytest.raises(PlanError) as error:
        FixedPoint(20, 1.0, max_weight, max_count)
    assert error.value.rule == "positive"


@given(st.integers(1, 2**30), st.integers(1, 2**16), st.floats(2.0**-30, 2.0**15))
def test_fit_takes_the_most_fraction_bits_that_are_legal(max_count: int, max_weight: int, bound: float) -> None:
    fitted = FixedPoint.fit(max_count, max_weight, bound)
    assert fitted.fraction_bits <= 40
    if fitted.fraction_bits < 40:
        with pytest.raises(PlanError, match="sum-overflow"):
            dataclasses.replace(fitted, fraction_bits=fitted.fraction_bits + 1)


def test_fit_is_strict_where_the_room_is_a_power_of_two() -> None:
    assert FixedPoint.fit(max_count=2**14, max_weight=2**16, bound=2.0**8).fraction_bits == 23  # 14+16+8+23 < 62
    assert FixedPoint.fit(max_count=2**14 - 1, max_weight=2**16, bound=2.0**8).fraction_bits == 24


def test_fit_refuses_limits_that_leave_no_bits() -> None:
    with pytest.raises(PlanError, match="sum-overflow"):
        FixedPoint.fit(max_count=2**40, max_weight=2**16, bound=2.0**20)


def finest(count: int, weight: int, bound: float) -> FixedPoint:
    """With the most fraction bits that are legal, without fit's cap at 40."""
    sums = FixedPoint.fit(count, weight, bound)
    while True:
        try:
            sums = dataclasses.replace(sums, fraction_bits=sums.fraction_bits + 1)
        except PlanError:
            return sums


@given(
    st.integers(1, 9), st.integers(1, 2**16), st.floats(0.125, 1e3, width=32), st.sampled_from([-1, 1]), st.booleans()
)
def test_the_worst_case_at_the_legal_boundary_does_not_overflow(
    count: int, weight: int, bound: float, sign: int, narrow: bool
) -> None:
    """Every client at the cap, with every value at the bound."""
    sums = finest(count, weight, bound)
    update = one([sign * bound], examples=weight, dtype="float32" if narrow else "float64")
    total = flat([sums.encode(update, PARTS[:1])] * count)
    exact = count * round(bound * (weight * 2.0**sums.fraction_bits)) * sign
    assert int(total.sums["params"]["w"][0]) == exact
    assert 2**61 <= abs(exact) < 2**62


@given(st.integers(1, 9), st.integers(1, 2**16), st.floats(2.0**-30, 2.0**30), st.floats(2.0**-30, 2.0**30))
def test_a_part_with_a_bound_of_its_own_takes_the_plans_bits_or_the_most_that_are_legal_for_it(
    count: int, weight: int, bound: float, own: float
) -> None:
    """n · w · B · 2^b < 2^62, and one bit more would be too many: exactly, in fractions."""
    sums = FixedPoint.fit(count, weight, bound)
    bits = sums.bits(Part("params", bound=own))
    reach = Fraction(own) * weight * count
    assert bits <= sums.fraction_bits
    assert reach * Fraction(2) ** bits < 2**62
    assert bits == sums.fraction_bits or reach * Fraction(2) ** (bits + 1) >= 2**62
    assert sums.bits(Part("params", bound=bound)) == sums.bits(Part("params")) == sums.fraction_bits


@given(st.integers(1, 9), st.integers(1, 2**16), st.floats(0.125, 1e3), st.floats(1, 2.0**40), st.sampled_from([-1, 1]))
def test_a_part_at_its_own_bound_does_not_overflow_either(
    count: int, weight: int, bound: float, own: float, sign: int
) -> None:
    """Every client at the cap and at the part's bound, far beyond the plan's; against Python's integers."""
    sums, part = finest(count, weight, bound), Part("params", bound=own)
    bits = sums.bits(part)
    update = one([sign * own], examples=weight, dtype="float64")
    total = flat([sums.encode(update, (part,))] * count)
    exact = count * round(own * math.ldexp(weight, bits)) * sign
    assert int(total.sums["params"]["w"][0]) == exact
    assert abs(exact) < 2**62
    assert bits in (40, sums.fraction_bits) or abs(exact) >= 2**60
    near = pytest.approx(sign * own * weight * count, abs=count * 2.0**-bits, rel=1e-15)
    assert sums.decode(part, total.sums["params"])["w"][0] == near
    with pytest.raises(ParticipantError, match="client 'alice': .*beyond the bound .* of that part"):
        sums.encode(one([sign * math.nextafter(own, math.inf)], examples=weight, dtype="float64"), (part,))


# ── what is refused at the first hop ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_by_client_and_leaf(value: float) -> None:
    update = Update("alice", {"params": {"a": np.zeros(3), "fc.weight": np.array([0.0, value])}}, 1)
    with pytest.raises(DivergedError, match=r"client 'alice': .*`params\[fc.weight\]`") as error:
        SUMS.encode(update, PARTS[:1])
    assert error.value.client == "alice"


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_value_at_the_bound_is_counted_and_one_beyond_is_refused(sign: int, dtype: str) -> None:
    edge = np.array(sign * SUMS.bound, dtype)
    beyond = np.nextafter(edge, np.array(sign * np.inf, dtype))
    SUMS.encode(one([0.0, float(edge)], dtype=dtype), PARTS[:1])
    with pytest.raises(ParticipantError, match=r"client 'alice': .*`params\[w\]`, beyond the plan's bound 256"):
        SUMS.encode(one([0.0, float(beyond)], dtype=dtype), PARTS[:1])


def test_narrow_codes_are_added_as_they_are() -> None:
    update = Update("alice", {"params": {"w": np.array([-128, 127], np.int8)}}, 7)
    assert SUMS.encode(update, PARTS[:1]).sums["params"]["w"].tolist() == [-896, 889]


def test_wide_codes_cannot_break_the_overflow_rule() -> None:
    """A participant's integers obey the same bound: at most U · 2^f before the weight."""
    largest = int(SUMS.bound * 2**SUMS.fraction_bits)
    for sign in (-1, 1):
        SUMS.encode(Update("alice", {"params": {"w": np.array([sign * largest])}}, 1), PARTS[:1])
        with pytest.raises(ParticipantError, match=r"client 'alice': .*`params\[w\]`"):
            SUMS.encode(Update("alice", {"params": {"w": np.array([sign * (largest + 1)])}}, 1), PARTS[:1])


def test_an_update_without_one_of_the_parts_is_refused() -> None:
    with pytest.raises(ParticipantError, match="client 'alice'.*steps"):
        SUMS.encode(one([1.0]), PARTS)


def test_a_negative_number_of_examples_is_refused() -> None:
    with pytest.raises(ParticipantError, match="client 'alice'"):
        SUMS.encode(one([1.0], examples=-1), PARTS[:1])


# ── weights and denominators ─────────────────────────────────────────────────────────────────────────────────────────


def test_examples_weigh_up_to_the_cap() -> None:
    capped = FixedPoint.fit(max_count=2, max_weight=10)
    total = capped.encode(one([1.0], examples=25), PARTS[:1])
    assert int(total.weights["params"]) == 10
    assert int(total.sums["params"]["w"][0]) == 10 * 2**capped.fraction_bits


def test_a_weight_that_the_device_applied_is_only_counted() -> None:
    uncapped = FixedPoint.fit(max_count=2, max_weight=1)
    total = uncapped.encode(one([21.0], examples=7), PARTS[:1], weighted=5)
    assert int(total.weights["params"]) == 5
    assert int(total.sums["params"]["w"][0]) == 21 * 2**uncapped.fraction_bits


def test_a_scalar_goes_through_no_chain_and_is_weighed_here_all_the_same() -> None:
    """FedNova's w·τ beside leaves that a weight stage multiplied."""
    parts = (Part("params"), Part("steps", content="scalar"))
    update = Update("alice", {"params": {"w": np.array([35.0])}, "steps": {"": np.array(3.0)}}, 5)
    total = SUMS.encode(update, parts, weighted=100)
    assert int(total.sums["params"]["w"][0]) == 35 * 2**SUMS.fraction_bits
    assert int(total.sums["steps"][""]) == 5 * 3 * 2**SUMS.fraction_bits


def test_what_goes_through_no_chain_is_weighed_here_all_the_same() -> None:
    """Buffers, and any part that is not transformed."""
    parts = (Part("params"), Part("buffers", transformed=False))
    update = Update("alice", {"params": {"w": np.array([35.0])}, "buffers": {"m": np.array([3.0])}}, 5)
    total = SUMS.encode(update, parts, weighted=100)
    assert int(total.sums["params"]["w"][0]) == 35 * 2**SUMS.fraction_bits
    assert int(total.sums["buffers"]["m"][0]) == 5 * 3 * 2**SUMS.fraction_bits
    assert {name: int(weight) for name, weight in total.weights.items()} == {"params": 5, "buffers": 5}


def test_what_multiplies_here_never_weighs_more_than_the_sums_allow() -> None:
    """A weight stage with a larger cap: its leaves come multiplied, the rest must not overflow."""
    sums = FixedPoint(50, 256.0, 1, 2)
    parts = (Part("params"), Part("buffers", transformed=False))
    update = Update("alice", {"params": {"w": np.array([1.0])}, "buffers": {"m": np.array([256.0])}}, 2**16)
    total = sums.encode(update, parts, weighted=2**16)
    assert int(total.sums["buffers"]["m"][0]) == 2**58
    assert {name: int(weight) for name, weight in total.weights.items()} == {"params": 2**16, "buffers": 1}


def test_each_part_has_its_own_denominator() -> None:
    divisors = {
        denominator: Part("p", denominator=denominator).divisor(weight=30, count=4, population=100)
        for denominator in ("weight", "count", "population")
    }
    assert divisors == {"weight": 30, "count": 4, "population": 100}
    assert Part("p", denominator=Fixed(64)).divisor(30, 4, 100) == 64


def test_a_part_takes_only_words_that_it_knows() -> None:
    for wrong in (
        {"weight": "exmaples"},
        {"denominator": "sum"},
        {"content": "leaf"},
        {"name": ""},
        {"name": "a/b"},  # a slash separates the parts of a sum's slots
        {"denominator": 7},
        {"weight": 7},
        {"weight": Fixed(3)},  # a denominator's
        {"denominator": polynomial()},  # a weight's
        {"content": Fixed(3)},
        {"content": polynomial()},
    ):
        with pytest.raises(PlanError) as error:
            Part(**{"name": "params", **wrong})  # pyright: ignore[reportArgumentType]
        assert error.value.rule == "part-words"


def test_a_truth_value_is_no_bound() -> None:
    with pytest.raises(PlanError, match="positive"):
        Part("params", bound=True)


@pytest.mark.parametrize("count", [0, -3])
def test_a_fixed_denominator_is_positive(count: int) -> None:
    with pytest.raises(PlanError, match="positive"):
        Fixed(count)


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 1000)), min_size=1, max_size=9))
def test_the_mean_is_the_weighted_mean_to_the_last_fraction_bit(clients: list[tuple[float, int]]) -> None:
    total = flat([SUMS.encode(one([value], examples, dtype="float64"), PARTS[:1]) for value, examples in clients])
    divisor = PARTS[0].divisor(int(total.weights["params"]), len(clients), 0)
    decoded = SUMS.decode(PARTS[0], total.sums["params"])
    combined = mean(PARTS[0]).combine({"params": decoded}, {"params": divisor})["params"]
    exact = math.fsum(value * examples for value, examples in clients) / sum(examples for _, examples in clients)
    assert combined["w"][0] == pytest.approx(exact, abs=2.0**-SUMS.fraction_bits + 1e-12)


def test_each_part_is_divided_by_its_own() -> None:
    two = mean(PARTS[0], Part("control", denominator="population"))
    sums = {"params": {"w": np.array([6.0])}, "control": {"w": np.array([10.0]), "b": np.array(5.0)}}
    combined = two.combine(sums, {"params": 3, "control": 5})
    assert {name: {leaf: value.tolist() for leaf, value in tree.items()} for name, tree in combined.items()} == {
        "params": {"w": [2.0]},
        "control": {"w": [2.0], "b": 1.0},
    }


@pytest.mark.parametrize("names", [(), ("control",), ("params", "params"), ("params", "buffers"), ("buffers",)])
def test_an_aggregator_combines_params_each_part_once_and_no_buffers(names: tuple[str, ...]) -> None:
    with pytest.raises(PlanError) as error:
        mean(*map(Part, names))
    assert error.value.rule == "part-words"


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_metrics(metrics: dict[str, tuple[float, int]]) -> Aggregate:
    return SUMS.encode(dataclasses.replace(one([0.0]), metrics=metrics), PARTS[:1])


def test_metrics_are_sums_over_examples() -> None:
    total = flat([with_metrics({"loss": (3.0, 2)}), with_metrics({"loss": (1.0, 6), "accuracy": (4.0, 8)})])
    assert total.metric_means() == {"loss": 0.5, "accuracy": 0.5}
    assert total.metrics["loss"].tolist() == [4 * 2**METRIC_BITS, 8]


def test_a_metric_that_was_counted_on_nothing_has_no_mean() -> None:
    assert with_metrics({"loss": (0.0, 0)}).metric_means() == {}


@pytest.mark.parametrize("value", [1e300, -1e300])
@pytest.mark.parametrize("count", [10**30, -(10**30)])
def test_a_wild_metric_cannot_overflow_the_sum(value: float, count: int) -> None:
    """Not with as many contributors as the plan allows."""
    slots = with_metrics({"loss": (value, count)}).metrics["loss"].tolist()
    assert all(abs(slot) * SUMS.max_count <= 2**61 for slot in slots)
    assert slots[1] == (2**61 // SUMS.max_count if count > 0 else 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [7, 10**30])
def test_a_metric_that_is_no_number_counts_as_nothing(value: float, count: int) -> None:
    """Neither in the sum nor among what it was counted on: the others' mean stays theirs."""
    assert with_metrics({"loss": (value, count)}).metrics["loss"].tolist() == [0, 0]
    total = flat([with_metrics({"loss": (value, count)}), with_metrics({"loss": (3.0, 2)})])
    assert total.metric_means() == {"loss": 1.5}
