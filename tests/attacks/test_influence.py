"""Attack: one device of ten makes the model its own.

The device says that it trained on 2^53 examples, and sends an update as long as it likes. Nine honest devices send theirs.
Before the first hop bounded both, the attacker had 99.45 % of the weight and the model was what it sent, while the reported loss
was 1e-9.

Each attack here is as strong as the plan lets it be: the mean moves by `plan.influence.step`, to a millionth, and by no more.
Beside each attack stands its control, where honest devices pass.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sumus
from sumus import robust
from sumus.aggregate import Fixed, Part, RunningSum, Update
from sumus.algorithm import LEAST_POSITIVE
from sumus.errors import BeyondBoundError, DivergedError, ParticipantError, PlanError
from sumus.evaluation import BINS, evaluation_hop, evaluation_of, evaluation_report, medians_of
from sumus.first_hop import SLACK, FirstHop
from sumus.metrics import Range
from sumus.plan import Plan
from sumus.rng import generator
from sumus.site import Site
from sumus.task import Data, Description, Leaf
from sumus.types import Array
from sumus.update import Props, Transform, chain, clip_buffers, clip_by_global_norm, quantize, rotate, weight
from sumus.work import LocalRun, apply_gradients

SIZE, HONEST = 1024, 9
TASK = Description(
    "signs",
    (Leaf("w", (SIZE,), "float32", "shared", True),),
    "cross_entropy",
    ("accuracy",),
    Data((4,), "float32", (), "int64", classes=2),
    (Range(0.0, None), Range(0.0, 1.0)),
)
WORK, CLIP, SEED = sumus.sgd(lr=0.5, epochs=2), clip_by_global_norm(1.0), bytes(32)
BUFFERED = sumus.Pacing(10, concurrency=20)


def plan(algorithm: Any, pacing: sumus.Pacing | None = None, **options: Any) -> Plan:
    return Plan(TASK, algorithm, pacing or sumus.Pacing(10), **options).for_devices()


PLANS = {
    "alike": plan(sumus.fedavg(WORK, CLIP, weight="uniform")),
    "capped": plan(sumus.fedavg(WORK, CLIP, cap=40)),
    "weighed on the device": plan(sumus.fedavg(WORK, chain(weight(cap=40), CLIP))),
    "8-bit codes": plan(sumus.fedavg(WORK, chain(CLIP, rotate(), quantize(8)), weight="uniform")),
    "2-bit codes": plan(sumus.fedavg(WORK, chain(CLIP, rotate(), quantize(2)), weight="uniform")),
    "buffered": plan(sumus.fedbuff(WORK, CLIP), BUFFERED),
    "prox, capped": plan(sumus.fedprox(WORK, 0.1, CLIP, cap=40)),
}


def vector(length: float) -> Array:
    """A float32 update of this L2 norm, at most."""
    return np.full(SIZE, np.nextafter(np.float32(length / math.sqrt(SIZE)), np.float32(0.0)), np.float32)


def longest_codes(norm: float, bits: int) -> Array:
    """Codes whose squares add up to all that a norm allows, as far as codes of this width reach."""
    left, most = math.floor(Fraction(norm) ** 2), 2 ** (bits - 1) - 1
    codes = np.zeros(SIZE, np.int8)
    for place in range(SIZE):
        even = math.isqrt(left // (SIZE - place))
        codes[place] = min(most, even if place < SIZE - 8 else math.isqrt(left))
        left -= int(codes[place]) ** 2
    return codes


def worst_update(made: Plan) -> Update:
    """The update that moves the mean furthest, of all that the first hop counts."""
    hop = made.first_hop
    (norm,) = hop.norms
    assert norm is not None
    if hop.code_bits is not None:
        leaf, name = longest_codes(norm, hop.code_bits), "rotated"
    else:
        leaf, name = vector(norm * (1 + SLACK / 2)), "w"
    examples = 1 if hop.weight_cap is not None else 2**53
    return Update("attacker", {"params": {name: leaf}}, examples)


def still(made: Plan) -> Iterable[Update]:
    """Honest updates that move nothing and weigh 1, so that all that the mean moves by is the attacker's."""
    ((name, shape),) = made.first_hop.layouts[0]
    dtype = np.float32 if made.first_hop.code_bits is None else np.int8
    return [Update(number, {"params": {name: np.zeros(shape, dtype)}}, 1) for number in range(HONEST)]


def mean_of(made: Plan, updates: Iterable[Update]) -> Array:
    """The mean that the server steps by."""
    total = RunningSum()
    for update in updates:
        made.first_hop.count_in(update, total)
    return np.asarray(made.algorithm.combine(total.total, TASK, made.sums, SEED, 10)["params"]["w"])


@pytest.mark.parametrize("name", PLANS)
def test_one_of_ten_moves_the_mean_by_its_share_of_the_clip_and_no_further(name: str) -> None:
    made = PLANS[name]
    moved = float(np.linalg.norm(mean_of(made, [*still(made), worst_update(made)])))
    assert made.influence.step is not None
    assert moved <= made.influence.step * (1 + SLACK)
    assert moved == pytest.approx(made.influence.step, rel=1e-6)


PAGE = Path(__file__).parents[2] / "docs" / "security.md"
ROWS = re.findall(
    r"^\| ([a-z0-9, -]+): `.*\| ([0-9.]+) \| ([0-9.]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
)


def test_the_page_has_a_row_for_each_of_these_plans() -> None:
    assert [name for name, _, _ in ROWS] == [*PLANS, "scaffold"]


@pytest.mark.parametrize(("name", "share", "step"), [row for row in ROWS if row[0] in PLANS])
def test_the_page_says_what_the_attack_finds(name: str, share: str, step: str) -> None:
    made = PLANS[name]
    moved = float(np.linalg.norm(mean_of(made, [*still(made), worst_update(made)])))
    assert moved == pytest.approx(float(step), rel=1e-6)
    total = RunningSum()
    for update in [*still(made), replace(worst_update(made), examples=2**53)]:
        made.first_hop.count_in(update, total)
    weight_of_all = int(total.total.weights["params"])
    assert (weight_of_all - HONEST * weight_of_all_alike(made)) / weight_of_all == pytest.approx(float(share), rel=1e-6)


def weight_of_all_alike(made: Plan) -> int:
    """What one honest device weighs that has one example."""
    return int(made.first_hop.count_in(next(iter(still(made)))).weights["params"])


@pytest.mark.parametrize("name", PLANS)
def test_what_is_a_little_longer_is_refused(name: str) -> None:
    made, worst = PLANS[name], worst_update(PLANS[name])
    ((leaf, values),) = worst.parts["params"].items()
    if values.dtype.kind == "f":
        longer = values * np.float32(1 + 1e-5)
    else:
        longer = values.copy()
        longer[int(np.argmin(values))] += 1
    with pytest.raises(BeyondBoundError, match=r"the plan's clip allows a norm of at most .*clip it on the device"):
        made.first_hop.count_in(replace(worst, parts={"params": {leaf: longer}}))


@pytest.mark.parametrize("name", PLANS)
def test_control_what_honest_devices_send_is_counted(name: str) -> None:
    """Whatever a device has trained, its chain makes an update of it that the first hop takes."""
    made = PLANS[name]
    for number in range(20):
        rng = generator(3, name, number)
        trained = {"w": (rng.normal(size=SIZE) * 10.0 ** (number % 5 - 2)).astype(np.float32)}
        examples = 1 + number * 40
        update = made.algorithm.report(number, {"params": trained}, examples, {"loss": (1.0, 2)}, SEED, rng)
        assert int(made.first_hop.count_in(update).count) == 1


def test_an_attacker_does_not_hide_a_bad_model_behind_a_good_figure() -> None:
    hop = PLANS["alike"].first_hop
    honest = [replace(one, metrics={"loss": (24.0, 40), "accuracy": (32.0, 40)}) for one in still(PLANS["alike"])]
    said = {"loss": (1e-9 * 2**43, 2**43), "accuracy": (float(2**43), 2**43)}
    total = RunningSum()
    for update in [*honest, replace(worst_update(PLANS["alike"]), metrics=said)]:
        hop.count_in(update, total)
    means = total.total.metric_means()
    assert means["loss"] == pytest.approx(0.9 * 0.6, abs=1e-5)  # it has a tenth of the figure, and says 0
    assert means["accuracy"] == pytest.approx(0.9 * 0.8 + 0.1, abs=1e-5)


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": (-5.0, 1)},
        {"loss": (math.nan, 3)},
        {"loss": (1.0, 0)},
        {"loss": (1.0, -1)},
        {"accuracy": (1.1, 1)},
        {"accuracy": (-0.1, 1)},
        {"accuracy": (1e9, 10)},
    ],
)
def test_figures_that_no_client_can_have_are_refused(metrics: dict[str, tuple[float, int]]) -> None:
    update = replace(next(iter(still(PLANS["alike"]))), metrics=metrics)
    with pytest.raises(ParticipantError):
        PLANS["alike"].first_hop.count_in(update)


def test_control_figures_at_the_ends_of_their_ranges_are_counted() -> None:
    for metrics in ({"loss": (0.0, 3)}, {"accuracy": (0.0, 3)}, {"accuracy": (3.0, 3)}):
        PLANS["alike"].first_hop.count_in(replace(next(iter(still(PLANS["alike"]))), metrics=metrics))


EVALUATION = evaluation_hop(TASK, 10, 1)


@pytest.mark.parametrize("bins", [np.ones(BINS), np.eye(BINS)[0] * 0.5, -np.eye(BINS)[0], np.full(BINS, np.nan)])
def test_a_device_is_in_one_bin(bins: Array) -> None:
    honest = evaluation_report("attacker", {"loss": (1.0, 1), "accuracy": (1.0, 1)}, 1)
    said = {"histogram": {**honest.parts["histogram"], "accuracy": bins.astype(np.float32)}}
    with pytest.raises(ParticipantError, match="must hold a single 1, or only zeros"):
        EVALUATION.count_in(replace(honest, parts=said))


def test_the_median_of_an_evaluation_moves_by_one_device() -> None:
    total = RunningSum()
    for number in range(HONEST):
        measured = {"loss": (6.0, 10), "accuracy": (8.0 - number % 2, 10)}
        EVALUATION.count_in(evaluation_report(number, measured, 10), total)
    lie = {"loss": (1e12, 1), "accuracy": (1.0, 1)}
    EVALUATION.count_in(evaluation_report("attacker", lie, 1), total)
    means, histograms = evaluation_of(total.total, EVALUATION)
    assert means["loss"] > 1e10
    (low, high) = medians_of(histograms, EVALUATION)["loss"]
    assert low is not None
    assert high is not None
    assert low <= 0.6 < high


# ── an edge that lies ────────────────────────────────────────────────────────────────────────────────────────────────


def summed(hop: FirstHop, updates: Iterable[Update]) -> Any:
    total = RunningSum()
    for update in updates:
        hop.count_in(update, total)
    return total.total


@pytest.mark.parametrize("name", PLANS)
def test_an_edges_sum_is_no_longer_than_its_devices_updates(name: str) -> None:
    made = PLANS[name]
    honest = summed(made.first_hop, [worst_update(made)] * 5)
    made.first_hop.check_sum(honest, "edge", 5)  # the control: five of the longest updates
    longer = replace(
        honest, sums={"params": {leaf: array + array // 1000 + 1 for leaf, array in honest.sums["params"].items()}}
    )
    with pytest.raises(BeyondBoundError):
        made.first_hop.check_sum(longer, "edge", 5)


@pytest.mark.parametrize("metric", [np.array([-(2**20), 1]), np.array([0, 6]), np.array([2**30, 5])])
def test_an_edges_figures_are_those_of_its_devices(metric: Array) -> None:
    hop = PLANS["alike"].first_hop
    honest = summed(hop, [replace(one, metrics={"accuracy": (1.0, 2)}) for one in list(still(PLANS["alike"]))[:5]])
    hop.check_sum(honest, "edge", 5)
    with pytest.raises(BeyondBoundError):
        hop.check_sum(replace(honest, metrics={"accuracy": metric.astype(np.int64)}), "edge", 5)


# ── plans that bound nothing ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_that_bounds_nothing_is_refused_for_devices_in_words_that_name_share_and_remedy() -> None:
    with pytest.raises(PlanError) as error:
        plan(sumus.fedavg(WORK)).check_deployable()
    said = str(error.value)
    assert error.value.rule == "trusts-devices"
    for words in ("99.99%", "clip_by_global_norm", 'weight="uniform"', "cap=", "sumus check", "trusts_devices=True"):
        assert words in said


def test_a_plan_may_say_that_all_its_devices_are_its_own() -> None:
    plan(sumus.fedavg(WORK), trusts_devices=True).check_deployable()


def test_a_simulation_keeps_what_it_had_and_a_plan_for_devices_is_the_same_each_time() -> None:
    simulated = Plan(TASK, sumus.fedavg(WORK, CLIP, cap=40), sumus.Pacing(10))
    assert simulated.trusts_devices is None
    assert simulated.pacing.chosen == 10
    assert simulated.first_hop.metric_cap is None
    packed = simulated.for_devices()
    assert packed.pacing.chosen == 13
    assert packed.sums.max_count == 13
    assert packed.first_hop.metric_cap == 40
    assert packed.for_devices() == packed


@given(cap=st.integers(1, 2**16), contributors=st.integers(2, 1000))
def test_the_share_is_the_cap_against_devices_that_weigh_one(cap: int, contributors: int) -> None:
    made = Plan(TASK, sumus.fedavg(WORK, CLIP, cap=cap), sumus.Pacing(contributors), min_contributors=contributors)
    assert made.influence.share == cap / (cap + contributors - 1)


def test_parts_outside_the_chain_have_bounds_of_their_own() -> None:
    made = plan(sumus.scaffold(WORK, CLIP))
    control = next(part for part in made.algorithm.aggregator.parts if part.name == "control")
    assert made.influence.others == {"control": control.bound / 10}  # type: ignore[operator]
    assert "it moves a number of `control` by at most 6554" in str(made.influence)
    nova = plan(sumus.fednova(sumus.sgd(lr=0.5, steps=4), CLIP, cap=10))
    (steps,) = (part for part in nova.algorithm.aggregator.parts if part.name == "steps")
    assert steps.bound == 4.0
    assert nova.influence.step == pytest.approx(2 * 10 / 19 * 4.0)


@pytest.mark.parametrize(
    ("denominator", "step"), [(Fixed(1), 1.0), (Fixed(5), 0.2), (Fixed(1000), 0.001), ("weight", 0.1), ("count", 0.1)]
)
def test_a_weight_on_the_device_counts_by_what_the_sum_is_divided_by(denominator: Any, step: float) -> None:
    by = sumus.mean(Part("params", denominator=denominator))
    made = plan(sumus.fedavg(WORK, chain(weight(cap=40), CLIP), aggregator=by))
    moved = float(np.linalg.norm(mean_of(made, [*still(made), worst_update(made)])))
    assert made.influence.step == pytest.approx(step)
    assert moved == pytest.approx(step, rel=1e-6)


def test_a_site_may_do_rounds_of_its_fewest_devices() -> None:
    pacing = sumus.Pacing(20, least=1.0, deadline=60.0)
    alone = plan(sumus.fedavg(WORK, CLIP, cap=9), pacing, min_contributors=2, edges=sumus.Edges(rounds=5))
    assert alone.influence.contributors == 2
    assert alone.influence.step == pytest.approx(5 * 0.9)


def test_sums_are_never_coarser_for_a_clip_and_edges_may_send_all_who_are_chosen() -> None:
    assert plan(sumus.fedavg(WORK, clip_by_global_norm(1e12), cap=9)).sums.bound == 256.0
    own = plan(sumus.fedavg(WORK, CLIP, cap=9), sums=sumus.FixedPoint.fit(10, 9, bound=4.0))
    assert (own.sums.max_count, own.sums.bound) == (13, 4.0)


def test_the_median_of_a_metric_on_another_scale_is_open_at_its_end() -> None:
    hop = evaluation_hop(replace(TASK, ranges=(Range(0.0, None), Range(0.0, None))), 10)
    total = RunningSum()
    for number in range(HONEST):
        hop.count_in(evaluation_report(number, {"loss": (1.0, 1), "accuracy": (5.0, 1)}, 1), total)
    assert medians_of(evaluation_of(total.total, hop)[1], hop)["accuracy"] == (pytest.approx(0.95), None)


@pytest.mark.parametrize("name", ["capped", "weighed on the device"])
def test_an_edge_may_not_weigh_more_than_the_cap_whatever_the_sums_hold(name: str) -> None:
    made = replace(PLANS[name], sums=sumus.FixedPoint.fit(13))
    honest = summed(made.first_hop, [worst_update(made)] * 5)
    made.first_hop.check_sum(honest, "edge", 5)
    heavy = replace(honest, weights={"params": np.array(5 * 40 + 1)})
    with pytest.raises(ParticipantError, match="weighs more than 5 reports can"):
        made.first_hop.check_sum(heavy, "edge", 5)


def test_a_transform_that_makes_updates_longer_leaves_no_bound() -> None:
    longer = Transform(apply=lambda tree, context: tree, props=Props(keeps_norm=False))
    assert Plan(TASK, sumus.fedavg(WORK, chain(CLIP, longer)), sumus.Pacing(10)).influence.length is None


def test_bins_are_no_leaves_of_a_model() -> None:
    assert not Part("histogram", content="bins").in_chain


# ── parts beside the chain ───────────────────────────────────────────────────────────────────────────────────────────

NORMED = replace(TASK, leaves=(*TASK.leaves, Leaf("norm.running_var", (4,), "float32", "shared", False)))
VARIANCE = ("norm.running_var",)
NARROW = chain(CLIP, clip_buffers(0.3))


def normed(update: Transform, **options: Any) -> Plan:
    return Plan(
        NORMED, sumus.fedavg(WORK, update, weight="uniform"), options.pop("pacing", sumus.Pacing(10)), **options
    ).for_devices()


def with_buffers(client: object, value: float) -> Update:
    buffers = {"norm.running_var": np.full(4, value, np.float32)}
    return Update(client, {"params": {"w": np.zeros(SIZE, np.float32)}, "buffers": buffers}, 1)


def moved_buffers(made: Plan, updates: Iterable[Update]) -> float:
    total = RunningSum()
    for update in updates:
        made.first_hop.count_in(update, total)
    combined = made.algorithm.combine(total.total, NORMED, made.sums, SEED, 10)
    return float(np.max(np.abs(combined["buffers"]["norm.running_var"])))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (normed(CLIP), ("10.00% of a sum of 10", "each number of `buffers` by 25.6", "clip_buffers(...)", "GroupNorm")),
        (plan(sumus.scaffold(WORK, CLIP)), ("each number of `control` by 6554", "scaffold(control_bound=)")),
        (plan(sumus.fednova(WORK, CLIP, cap=9, most_steps=2**16)), ("each number of `steps`", "most_steps=")),
    ],
)
def test_a_part_that_nothing_bounds_is_refused_for_devices(made: Plan, words: tuple[str, ...]) -> None:
    with pytest.raises(PlanError) as error:
        made.check_deployable()
    assert error.value.rule == "trusts-devices"
    for word in (*words, "sumus check", "trusts_devices=True"):
        assert word in str(error.value)
    replace(made, trusts_devices=True).check_deployable()


def test_control_a_plan_that_names_the_bounds_of_its_parts_is_for_devices() -> None:
    normed(NARROW).check_deployable()
    plan(sumus.scaffold(WORK, CLIP, control_bound=0.8)).check_deployable()
    plan(sumus.fednova(WORK, CLIP, cap=9)).check_deployable()


def test_one_of_ten_moves_a_buffer_by_its_share_of_the_bound_and_no_further() -> None:
    made = normed(NARROW)
    with pytest.raises(BeyondBoundError, match="beyond the bound 0.3 of that part.*clip it on the device"):
        made.first_hop.count_in(with_buffers("attacker", 0.3001))
    bound = made.algorithm.update.buffer_bound
    assert bound is not None
    moved = moved_buffers(made, [*(with_buffers(n, 0.0) for n in range(HONEST)), with_buffers("attacker", -bound)])
    assert moved == pytest.approx(made.influence.others["buffers"], rel=1e-6)
    assert moved == pytest.approx(0.03, rel=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.3, 5.0, -1e30])
def test_control_an_honest_device_holds_its_buffers_within_the_bound(value: float) -> None:
    made = normed(NARROW)
    raw = with_buffers("honest", value)
    sent = made.algorithm.report("honest", raw.parts, 1, {}, SEED, generator(1))
    made.first_hop.count_in(sent)
    assert sent.parts["buffers"]["norm.running_var"].dtype == np.float32
    assert sent.parts["buffers"]["norm.running_var"] == pytest.approx(max(-0.3, min(0.3, value)))


def test_buffers_that_ran_to_infinity_are_not_hidden_by_the_bound() -> None:
    raw = with_buffers("honest", math.inf)
    with pytest.raises(DivergedError, match=r"norm\.running_var"):
        normed(NARROW).algorithm.report("honest", raw.parts, 1, {}, SEED, generator(1))


def test_control_a_site_may_move_buffers_by_the_bound_in_each_of_its_rounds() -> None:
    made = normed(NARROW, min_contributors=2, edges=sumus.Edges(rounds=5))
    assert made.influence.others["buffers"] == pytest.approx(5 * 0.3 / 2)
    base = {"params": {"w": np.zeros(SIZE, np.float32)}, "buffers": {"norm.running_var": np.ones(4, np.float32)}}
    site = Site.of(made.algorithm, NORMED, made.sums, SEED, base)
    bound = made.algorithm.update.buffer_bound
    assert bound is not None
    for _ in range(5):
        site = site.after(summed(made.first_hop, [with_buffers(n, bound) for n in range(10)]))
    made.first_hop.check_sum(site.total(10), "site", 10)
    further = replace(site, at={**site.at, "buffers": {"norm.running_var": np.full(4, -2.0, np.float32)}})
    with pytest.raises(BeyondBoundError):
        further.total(10)


def honest_of_scaffold(made: Plan, number: int, broadcast: Any) -> Update:
    """A device whose gradient is 0 wherever it stands, after its one step, and the update that its chain makes of that."""
    work, zeros = made.algorithm.client, {"w": np.zeros(SIZE, np.float32)}
    state = {"control": zeros}
    trained, _ = apply_gradients(work, broadcast["params"], zeros, {"w": ()}, broadcast, state, 0.5, 1)
    parts, _ = work.rules.finish(broadcast, trained, state, LocalRun(1, 0.5, 40))
    return made.algorithm.report(number, parts, 40, {}, SEED, generator(number))


@pytest.mark.parametrize(("attacks", "server"), [(True, None), (False, None), (True, sumus.optimizers.momentum(0.5))])
def test_one_control_turns_the_updates_of_all_and_the_clip_alone_bounds_that(attacks: bool, server: Any) -> None:
    """Nine devices want to stay where they are. The tenth sends an honest update first, and the bound as its control.

    Round by round the common control grows, and corrects the nine devices' steps, until each of their updates is as long as the
    clip: then the mean is too. What was printed before was a tenth of that.
    """
    made = plan(sumus.scaffold(WORK, CLIP, server=server, control_bound=0.1))
    made.check_deployable()
    said = made.influence
    state = made.algorithm.start({"w": np.zeros(SIZE, np.float32)}, TASK)
    length = 0.0
    for _ in range(12):
        before = state.broadcast
        sent = [honest_of_scaffold(made, n, before) for n in range(HONEST + 1)]
        if attacks:
            lie = {"w": np.full(SIZE, np.float32(made.first_hop.parts[1].bound))}
            sent[-1] = replace(sent[-1], parts={**sent[-1].parts, "control": lie})
        combined = made.algorithm.combine(summed(made.first_hop, sent), TASK, made.sums, SEED, 10)
        state = made.algorithm.step(combined, state, TASK)
        length = float(np.linalg.norm(combined["params"]["w"]))
        assert said.step is not None
        assert said.model.norm is not None
        assert length <= said.step * (1 + SLACK)
        moved = np.linalg.norm(state.broadcast["params"]["w"].astype(float) - before["params"]["w"])
        assert moved <= said.model.norm * (1 + 1e-6)
    assert length == pytest.approx(1.0 if attacks else 0.0, rel=1e-6)
    if attacks and server is None:
        ((_, share, step),) = (row for row in ROWS if row[0] == "scaffold")
        assert (float(share), float(step)) == (pytest.approx(said.share), pytest.approx(length, rel=1e-6))


OF_WEIGHT = sumus.mean(Part("params"), Part("control", weight="uniform", denominator="population", transformed=False))


def test_the_sentence_of_scaffold_says_that_it_turns_the_others() -> None:
    made = plan(sumus.scaffold(WORK, CLIP, control_bound=0.1))
    assert made.influence.steers == ("control",)
    assert made.influence.said == (
        "one device can have 10.00% of a sum of 10, and it turns the updates of all others through `control`: the mean has a "
        "norm of at most 1; it moves a number of `control` by at most 0.01 per round"
    )
    weighed = plan(replace(sumus.scaffold(WORK, chain(weight(cap=40), CLIP)), aggregator=OF_WEIGHT))
    assert weighed.influence.step == pytest.approx(1.0)
    assert plan(sumus.fedavg(WORK, CLIP, weight="uniform")).influence.steers == ()


@pytest.mark.parametrize("attacks", [True, False])
@pytest.mark.parametrize("at_a_site", [True, False])
def test_no_device_makes_a_variance_negative(attacks: bool, at_a_site: bool) -> None:
    """The bound lets one of ten move a variance by 0.03 a round. The variances are 0.02: they went below 0, and all became NaN.

    Now they end a little above 0, where honest devices bring them back from. Devices that do not attack change no bit of that.
    """
    described = Description(NORMED.name, NORMED.leaves, NORMED.loss, NORMED.metrics, NORMED.data, positive=VARIANCE)
    made = normed(NARROW, min_contributors=2, edges=sumus.Edges(rounds=5)) if at_a_site else normed(NARROW)
    made = replace(made, task=described)
    assert Plan.from_json(made.to_json()).description.positive == VARIANCE
    base = {"w": np.zeros(SIZE, np.float32), "norm.running_var": np.full(4, 0.02, np.float32)}
    state = made.algorithm.start(base, described)
    site = Site.of(made.algorithm, described, made.sums, SEED, state.broadcast)
    bound, fell = made.algorithm.update.buffer_bound, -1e-3
    assert bound is not None
    for _ in range(5):
        sent = [with_buffers(n, fell) for n in range(HONEST)] + [with_buffers("last", bound if attacks else fell)]
        total = summed(made.first_hop, sent)
        site = site.after(total)
        state = made.algorithm.step(made.algorithm.combine(total, described, made.sums, SEED, 10), state, described)
        variance = (site.at if at_a_site else state.broadcast)["buffers"]["norm.running_var"]
        assert (variance >= LEAST_POSITIVE).all()
    if attacks:
        assert variance == pytest.approx(LEAST_POSITIVE)
    else:
        assert variance == pytest.approx(0.02 + 5 * 1e-3)
    if at_a_site:
        made.first_hop.check_sum(site.total(10), "site", 10)


@pytest.mark.parametrize("option", [1, 2])
def test_a_client_keeps_of_its_control_what_it_sends(option: Any) -> None:
    """Else the server's control would drift from the mean of the clients' controls."""
    work = sumus.scaffold(sumus.sgd(lr=0.5, steps=1), CLIP, option=option, control_bound=0.1).client
    ones = {"w": np.ones(3, np.float32)}
    broadcast = {"params": ones, "control": {"w": ones["w"] * 0}}
    done = LocalRun(1, 0.5, 4, {"w": ones["w"] * np.float32(7)})
    parts, kept = work.rules.finish(
        broadcast, {"w": ones["w"] * np.float32(-2)}, {"control": {"w": ones["w"] * 0}}, done
    )
    assert float(np.max(parts["control"]["w"])) <= 0.1
    assert parts["control"]["w"] == pytest.approx(0.1)
    assert np.array_equal(kept["control"]["w"], parts["control"]["w"])


@pytest.mark.parametrize("steps", [-4.0, -1e-9, 0.0, 0.5, 1 - 1e-9, 4.001, math.nan])
def test_steps_that_no_client_takes_are_refused(steps: float) -> None:
    made = plan(sumus.fednova(sumus.sgd(lr=0.5, steps=4), CLIP, cap=10))
    update = Update("attacker", {"params": {"w": vector(1.0)}, "steps": {"": np.array(steps)}}, 1)
    with pytest.raises(ParticipantError):
        made.first_hop.count_in(update)


def test_control_steps_from_one_to_the_most_are_counted() -> None:
    for work in (sumus.sgd(lr=0.5, steps=4), sumus.sgd(lr=0.5, steps=4, momentum=0.9, nesterov=True)):
        made = plan(sumus.fednova(work, CLIP, cap=10))
        (part,) = (part for part in made.algorithm.aggregator.parts if part.name == "steps")
        for steps in (part.least, part.bound):
            update = Update("honest", {"params": {"w": vector(1.0)}, "steps": {"": np.array(steps)}}, 1)
            made.first_hop.check_sum(made.first_hop.count_in(update), "edge", 1)


def test_an_edges_sum_of_steps_is_of_one_step_each_at_least() -> None:
    made = plan(sumus.fednova(sumus.sgd(lr=0.5, steps=4), CLIP, cap=10))
    update = Update("honest", {"params": {"w": vector(1.0)}, "steps": {"": np.array(2.0)}}, 3)
    honest = summed(made.first_hop, [update] * 5)
    made.first_hop.check_sum(honest, "edge", 5)
    with pytest.raises(BeyondBoundError):
        made.first_hop.check_sum(replace(honest, sums={**honest.sums, "steps": {"": np.array(-1)}}), "edge", 5)


@pytest.mark.parametrize("most", [1, 4, 1024])
def test_one_of_ten_moves_fednovas_mean_by_no_more_than_is_said(most: int) -> None:
    """The attacker sends the longest difference and the most steps; the others are honest with any steps."""
    made = plan(sumus.fednova(WORK, CLIP, cap=40, most_steps=most))
    assert made.influence.step is not None

    def update(client: object, length: float, steps: float, examples: int) -> Update:
        return Update(client, {"params": {"w": vector(length)}, "steps": {"": np.array(steps)}}, examples)

    def mean(updates: Iterable[Update]) -> Array:
        total = summed(made.first_hop, updates)
        return np.asarray(made.algorithm.combine(total, TASK, made.sums, SEED, 10)["params"]["w"])

    for others in (1.0, float(most)):
        honest = [update(number, 0.0, others, 1) for number in range(HONEST)]
        moved = np.linalg.norm(mean([*honest, update("attacker", 1.0, float(most), 2**53)]))
        assert moved <= made.influence.step * (1 + SLACK)
        honest = [update(number, 1.0, others, 1) for number in range(HONEST)]
        alike = mean([*honest, update("attacker", 0.0, 1.0, 2**53)])
        moved = np.linalg.norm(mean([*honest, update("attacker", 1.0, float(most), 2**53)]) - alike)
        assert moved <= made.influence.step * (1 + SLACK)


# ── what says nothing of itself, and what chooses among updates ──────────────────────────────────────────────────────


def doubling(**says: Any) -> Transform:
    """An update is sent as half of it, and the server doubles the sum."""
    return Transform(
        apply=lambda tree, context: {name: leaf / 2 for name, leaf in tree.items()},
        invert=lambda tree, context: {name: leaf * 2 for name, leaf in tree.items()},
        **says,
    )


@pytest.mark.parametrize("update", [chain(CLIP, doubling()), chain(doubling(), CLIP)])
def test_a_stage_that_says_nothing_of_norms_is_refused_for_devices(update: Transform) -> None:
    """The first hop lets an update of length C through, and the server makes 2 C of it."""
    made = plan(sumus.fedavg(WORK, update, weight="uniform"))
    assert made.influence.length is None
    broken = dict(made.violations("deployed"))
    assert "does not say that it keeps norms" in broken["trusts-devices"]
    assert "Props(keeps_norm=True)" in broken["trusts-devices"]


def test_control_a_stage_that_says_how_long_is_counted_so() -> None:
    def half(context: Any) -> float | None:
        return None if context.norm_bound is None else context.norm_bound / 2

    made = plan(sumus.fedavg(WORK, chain(CLIP, doubling(longest=half, unit=lambda context: 2.0)), weight="uniform"))
    assert "trusts-devices" not in dict(made.violations("deployed"))
    moved = float(np.linalg.norm(mean_of(made, [*still(made), worst_update(made)])))
    assert made.influence.step == pytest.approx(moved, rel=1e-6) == pytest.approx(0.1)
    kept = Transform(apply=lambda tree, context: tree, props=Props(keeps_norm=True))
    assert plan(sumus.fedavg(WORK, chain(CLIP, kept), weight="uniform")).influence.step == pytest.approx(0.1)


@pytest.mark.parametrize("behind", [False, True])
def test_what_the_server_undoes_counts_before_the_clip_too(behind: bool) -> None:
    """The device clips thousandths, and the server multiplies what the clip has let through by a thousand."""

    def thousandth(context: Any) -> float | None:
        return None if context.norm_bound is None else context.norm_bound / 1000

    stage = Transform(
        apply=lambda tree, context: {name: leaf / np.float32(1000) for name, leaf in tree.items()},
        invert=lambda tree, context: {name: leaf * 1000 for name, leaf in tree.items()},
        longest=thousandth,
        unit=lambda context: 1000.0,
    )
    made = plan(sumus.fedavg(WORK, chain(CLIP, stage) if behind else chain(stage, CLIP), weight="uniform"))
    assert "trusts-devices" not in dict(made.violations("deployed"))
    moved = float(np.linalg.norm(mean_of(made, [*still(made), worst_update(made)])))
    assert made.influence.step == pytest.approx(moved, rel=1e-6) == pytest.approx(0.1 if behind else 100.0)


def test_an_aggregator_with_a_centre_that_says_nothing_is_refused_for_devices() -> None:
    """A server with --spool would give such an aggregator each update."""
    part = Part("params", weight="uniform", denominator="count")
    loud = sumus.Aggregator(
        parts=(part,),
        combine=sumus.mean(part).combine,
        centre=lambda ones, weights: {"params": {name: leaf * 1e6 for name, leaf in ones[-1]["params"].items()}},
    )
    made = plan(sumus.fedavg(WORK, CLIP, aggregator=loud))
    assert made.influence.step is None
    assert "Aggregator(chosen=)" in dict(made.violations("deployed"))["trusts-devices"]
    for aggregator in (robust.median(), robust.norm_bounded(max_norm=1.0)):  # the control
        assert "trusts-devices" not in dict(
            plan(sumus.fedavg(WORK, CLIP, aggregator=aggregator)).violations("deployed")
        )


def test_an_aggregator_that_says_nothing_is_refused_for_devices() -> None:
    part = Part("params", weight="uniform", denominator="count")
    doubled = sumus.Aggregator(
        parts=(part,), combine=lambda sums, by: {"params": {n: 2 * x / by["params"] for n, x in sums["params"].items()}}
    )
    made = plan(sumus.fedavg(WORK, CLIP, aggregator=doubled))
    assert made.influence.step is None
    assert "an Aggregator(longest=)" in dict(made.violations("deployed"))["trusts-devices"]


CHOOSING = {
    "krum": (robust.krum(attackers=1), 1.0, 1.0),
    "multi_krum": (robust.multi_krum(attackers=1), 1 / 7, 1.0),
    "median": (robust.median(), 1.0, math.sqrt(2)),
    "trimmed_mean": (robust.trimmed_mean(attackers=2), 1 / 6, math.sqrt(10 / 6)),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_an_aggregator_that_chooses_among_updates_gives_nothing_longer_than_is_said(name: str) -> None:
    aggregator, share, times = CHOOSING[name]
    made = plan(sumus.fedavg(WORK, CLIP, aggregator=aggregator))
    found = made.influence
    assert found.share == pytest.approx(share)
    assert found.step == pytest.approx(times)
    assert f"of what {aggregator!r} makes of 10 updates, and that has a norm of at most {times:.4g}" in found.said
    rng = np.random.default_rng(0)
    for number in range(30):
        common = rng.normal(size=SIZE)
        updates = [common * (number % 3) + rng.normal(size=SIZE) * rng.integers(1, 9) for _ in range(10)]
        sent = [
            Update(who, {"params": {"w": (u / np.linalg.norm(u) * 0.9999999).astype(np.float32)}}, 1)
            for who, u in enumerate(updates)
        ]
        ones = [made.first_hop.count_in(update) for update in sent]
        given = made.algorithm.combine_each(ones, TASK, made.sums, SEED, 10)["params"]["w"]
        assert np.linalg.norm(given) <= found.step * (1 + SLACK)  # type: ignore[operator]


NORMED_CHOOSING = {
    **{name: aggregator for name, (aggregator, _, _) in CHOOSING.items()},
    "few": robust.multi_krum(attackers=1, keep=2),
}


@pytest.mark.parametrize("count", [10, 11])
@pytest.mark.parametrize("name", NORMED_CHOOSING)
def test_buffers_that_an_aggregator_chooses_are_no_larger_than_is_said(name: str, count: int) -> None:
    """The attacker's `params` lie in the middle of all others, so that Krum takes its update; its buffers stand at the bound.

    The attackers of the test are as many as each aggregator lets decide: what is printed holds for any number of them.
    """
    made = Plan(NORMED, sumus.fedavg(WORK, NARROW, aggregator=NORMED_CHOOSING[name]), sumus.Pacing(10)).for_devices()
    said = made.influence.others["buffers"]
    assert f"a number of `buffers` in it is at most {said:.4g}" in made.influence.said
    bound = made.algorithm.update.buffer_bound
    assert bound is not None
    lies = 1 if "krum" in name else count - 2
    rng = np.random.default_rng(0)
    honest = [
        replace(one, parts={**one.parts, "params": {"w": (rng.normal(size=SIZE) * 0.02).astype(np.float32)}})
        for one in (with_buffers(n, (-1) ** n * 1e-3) for n in range(count - lies))
    ]
    ones = [made.first_hop.count_in(u) for u in [*honest, *(with_buffers(f"attacker {n}", bound) for n in range(lies))]]
    given = made.algorithm.combine_each(ones, NORMED, made.sums, SEED, count)["buffers"]["norm.running_var"]
    assert float(np.max(np.abs(given))) <= said * (1 + SLACK)
    if name in ("krum", "median", "trimmed_mean"):
        assert float(np.max(given)) == pytest.approx(said, rel=1e-6)


@pytest.mark.parametrize("count", [10, 11])
def test_a_median_may_be_one_devices_number(count: int) -> None:
    """A round may have more devices than the fewest, and an odd number: what is printed holds for both."""
    made = plan(sumus.fedavg(WORK, CLIP, aggregator=robust.median()))
    sides = [vector(0.9) if n % 2 else -vector(0.9) for n in range(count - 1)]
    attacker = vector(0.7)
    updates = [Update(n, {"params": {"w": u}}, 1) for n, u in enumerate([*sides, attacker])]
    ones = [made.first_hop.count_in(update) for update in updates]
    given = made.algorithm.combine_each(ones, TASK, made.sums, SEED, count)["params"]["w"]
    share = float(given[0] / attacker[0]) if count % 2 else 0.0
    assert made.influence.share == 1.0 >= share - 1e-6
    assert share == pytest.approx(1.0 if count % 2 else 0.0, rel=1e-6)


def test_krum_may_choose_the_attackers_update_alone() -> None:
    made = plan(sumus.fedavg(WORK, CLIP, aggregator=robust.krum(attackers=1)))
    honest = [Update(n, {"params": {"w": vector(0.9) * (1 + n % 2 * 1e-3)}}, 1) for n in range(HONEST)]
    between = Update("attacker", {"params": {"w": vector(0.9) * np.float32(1 + 4e-4)}}, 1)
    ones = [made.first_hop.count_in(update) for update in [*honest, between]]
    given = made.algorithm.combine_each(ones, TASK, made.sums, SEED, 10)["params"]["w"]
    np.testing.assert_allclose(given, between.parts["params"]["w"], atol=1e-9)


def test_the_sentence_of_a_plan_that_trusts_its_devices_says_so() -> None:
    assert plan(sumus.fedavg(WORK), trusts_devices=True).influence.said.startswith(
        "the plan trusts its devices: one device can have 99.99% of a sum of 10, and no clip bounds"
    )
    assert plan(sumus.fedavg(WORK, CLIP, weight="uniform")).influence.said == (
        "one device can have 10.00% of a sum of 10, which moves the mean by at most 0.1"
    )


# ── what the server optimizer makes of a mean ────────────────────────────────────────────────────────────────────────

SERVERS = {
    "sgd": (sumus.optimizers.sgd(0.5), ", and the model by at most 0.05 over this round and those that follow"),
    "momentum": (sumus.optimizers.momentum(), ", and the model by at most 1 over this round and those that follow"),
    "nesterov": (sumus.optimizers.momentum(0.5, 0.8, nesterov=True), ", and the model by at most 0.25 over this round"),
    "averaged": (
        sumus.optimizers.averaged(sumus.optimizers.momentum()),
        ", and the model by at most 1 over this round",
    ),
    "adam": (
        sumus.optimizers.adam(0.01),
        "; the server optimizer moves no number of the model by more than 0.02345 per round",
    ),
    "yogi": (
        sumus.optimizers.yogi(0.01),
        "; the server optimizer moves no number of the model by more than 0.1047 per round",
    ),
    "adagrad": (
        sumus.optimizers.adagrad(0.01),
        "; the server optimizer moves no number of the model by more than 0.01 per round",
    ),
    "adam without a bound": (
        sumus.optimizers.adam(0.01, (0.99, 0.9)),
        "; the server optimizer does not bound how far that moves the model",
    ),
}


@pytest.mark.parametrize("name", SERVERS)
def test_the_sentence_says_what_the_server_optimizer_makes_of_the_mean(name: str) -> None:
    server, words = SERVERS[name]
    said = plan(sumus.fedavg(WORK, CLIP, weight="uniform", server=server)).influence.said
    assert f"which moves the mean by at most 0.1{words}" in said


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "averaged"])
def test_one_of_ten_moves_the_model_by_what_is_said_over_the_rounds(name: str, repeats: bool) -> None:
    """The device lies once, and the rounds that follow carry the lie on; or it lies in every round, and each moves the model."""
    made = plan(sumus.fedavg(WORK, CLIP, weight="uniform", server=SERVERS[name][0]))
    lie, nothing = mean_of(made, [*still(made), worst_update(made)]), np.zeros(SIZE)
    state = made.algorithm.start(
        {"w": np.zeros(SIZE)}, replace(TASK, leaves=(replace(TASK.leaves[0], dtype="float64"),))
    )
    before = moved = nothing
    for number in range(200):
        state = made.algorithm.step({"params": {"w": lie if repeats or number == 0 else nothing}}, state, TASK)
        at = made.algorithm.release(state)["w"].astype(float)
        moved, before = at - before if repeats else at, at
        assert np.linalg.norm(moved) <= made.influence.model.norm * (1 + SLACK)  # type: ignore[operator]
    if not (name == "averaged" and not repeats):  # its mean of models is behind what it publishes next
        assert np.linalg.norm(moved) == pytest.approx(made.influence.model.norm, rel=1e-6)


def test_a_servers_state_that_keeps_every_lie_bounds_nothing() -> None:
    found = plan(sumus.feddyn(WORK, 0.1), trusts_devices=True).influence
    assert (found.model.norm, found.model.largest) == (None, None)
