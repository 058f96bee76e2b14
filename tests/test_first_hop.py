"""The first hop: what a device says is counted if it is of the plan, and refused by name otherwise, having added nothing."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sumus
from sumus.aggregate import Aggregate, Part, RunningSum, Update, mean
from sumus.algorithm import Algorithm
from sumus.errors import BeyondBoundError, DivergedError, EmptyError, ParticipantError, PlanError
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.optimizers import sgd
from sumus.rng import generator
from sumus.spec import build, canonical_json, to_json
from sumus.task import Description, Leaf
from sumus.types import Array, Tree
from sumus.update import Transform, chain, clip_by_global_norm, quantize, rotate, weight
from sumus.wire.tensors import decode_aggregate, encode_aggregate

TASK = Description(
    "t",
    (
        Leaf("fc.weight", (2, 3), "float32", "shared", True),
        Leaf("fc.bias", (3,), "float32", "shared", True),
        Leaf("scale", (), "float32", "shared", True),
        Leaf("norm.mean", (3,), "float32", "shared", False),
    ),
    "loss",
    ("accuracy",),
)
SUMS = FixedPoint.fit(max_count=16, max_weight=64)
CODES = {bits: chain(clip_by_global_norm(1.0), rotate(), quantize(bits)) for bits in (6, 8, 12, 16)}
PARTS = (Part("params"), Part("control", transformed=False, weight="uniform"), Part("steps", content="scalar"))


def algorithm(update: Transform | None = None, parts: tuple[Part, ...] = PARTS) -> Algorithm:
    work = dataclasses.replace(sumus.sgd(0.1), rules=sumus.ClientRules(sends=tuple(part.name for part in parts)))
    return Algorithm(work, update or chain(), mean(*parts), sgd(1.0))


def hop_of(update: Transform | None = None, sums: FixedPoint = SUMS) -> FirstHop:
    return algorithm(update).first_hop(TASK, sums)


def leaves(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in TASK.trained_layout.items()}


def an_update(update: Transform | None = None, seed: int = 0, client: object = "alice", examples: int = 5) -> Update:
    parts: Mapping[str, Tree] = {
        "params": leaves(seed),
        "control": leaves(seed + 100),
        "steps": {"": np.array(3.0)},
        "buffers": {"norm.mean": np.array([1.0, -2.0, seed], np.float32)},
    }
    metrics = {"loss": (1.5, 5), "accuracy": (4.0, 5)}
    return algorithm(update).report(client, parts, examples, metrics, b"round", generator(client, seed))


def changed(update: Update, part: str, **changes: Any) -> Update:
    """With other leaves in a part; None takes one away. Names may not hold a dot here: `fc_bias`."""
    tree = {**update.parts[part], **{name.replace("_", "."): leaf for name, leaf in changes.items()}}
    kept = {name: leaf for name, leaf in tree.items() if leaf is not None}
    return dataclasses.replace(update, parts={**update.parts, part: kept})


def decoded(total: Aggregate, name: str, hop: FirstHop | None = None) -> dict[str, Array]:
    """A part's sum as floats."""
    hop = hop or hop_of()
    (part,) = (part for part in hop.parts if part.name == name)
    return hop.sums.decode(part, total.sums[name])


def refused(
    hop: FirstHop,
    update: Update,
    match: str,
    kind: type[ParticipantError] = ParticipantError,
    good: Update | None = None,
) -> None:
    """By the client's name, alone and into a sum, whose every bit stays as it was; and into a fresh one, which stays empty."""
    total, fresh = RunningSum(), RunningSum()
    hop.count_in(good or an_update_for(hop), into=total)
    before = encode_aggregate(total.total)
    for into in (None, total, fresh):
        with pytest.raises(ParticipantError, match=f"^client 'mallory': .*{match}") as error:
            hop.count_in(dataclasses.replace(update, client="mallory"), into)
        assert type(error.value) is (BeyondBoundError if "reach" in str(error.value) else kind)
        assert error.value.client == "mallory"
    assert encode_aggregate(total.total) == before
    assert fresh.total.empty
    assert encode_aggregate(fresh.total) == encode_aggregate(Aggregate())


def an_update_for(hop: FirstHop) -> Update:
    return an_update(CODES.get(hop.code_bits or 0))


# ── what is of the plan ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("update", [None, weight(cap=2**16), rotate(), *CODES.values()], ids=repr)
def test_what_a_device_reports_is_counted(update: Transform | None) -> None:
    sums = FixedPoint.fit(16, 2**16)
    total = hop_of(update, sums).count_in(an_update(update))
    assert (int(total.count), set(total.sums)) == (1, {"params", "control", "steps", "buffers"})
    assert {name: int(number) for name, number in total.weights.items()} == {
        "params": 5, "control": 1, "steps": 5, "buffers": 5,
    }  # fmt: skip
    assert total.metric_means() == pytest.approx({"loss": 0.3, "accuracy": 0.8})
    assert {slot.dtype.name for slot in total.slots().values()} == {"int64"}


def test_scalars_untransformed_parts_and_buffers_are_counted_as_they_came() -> None:
    sent = an_update(CODES[8])
    total = hop_of(CODES[8]).count_in(sent)
    assert float(decoded(total, "steps")[""]) == 5 * 3.0
    assert decoded(total, "buffers")["norm.mean"].tolist() == [5.0, -10.0, 0.0]
    for name, leaf in decoded(total, "control").items():
        np.testing.assert_allclose(leaf, sent.parts["control"][name], rtol=0, atol=2.0**-SUMS.fraction_bits)
    assert np.array_equal(total.sums["params"]["rotated"], 5 * sent.parts["params"]["rotated"].astype(np.int64))


def test_a_weight_stage_multiplied_its_leaves_and_nothing_else() -> None:
    """Leaves come multiplied and are only counted; scalars, untransformed parts and buffers are multiplied here."""
    sent = an_update(weight(cap=4), examples=9)
    total = hop_of(weight(cap=4)).count_in(sent)
    assert {name: int(number) for name, number in total.weights.items()} == {
        "params": 4, "control": 1, "steps": 4, "buffers": 4,
    }  # fmt: skip
    for name, leaf in decoded(total, "params").items():
        np.testing.assert_allclose(leaf, 4 * leaves(0)[name], rtol=1e-6)
    assert float(decoded(total, "steps")[""]) == 4 * 3.0
    assert decoded(total, "buffers")["norm.mean"].tolist() == [4.0, -8.0, 0.0]
    for name, leaf in decoded(total, "control").items():
        np.testing.assert_allclose(leaf, leaves(100)[name], rtol=1e-6)


def test_metrics_need_not_all_come_and_those_that_are_no_number_are_refused_by_client() -> None:
    hop = hop_of()
    assert hop.count_in(dataclasses.replace(an_update(), metrics={})).metric_means() == {}
    for name, value in (("loss", math.nan), ("accuracy", math.inf), ("accuracy", -math.inf)):
        wild = {**an_update().metrics, name: (value, 5)}
        with pytest.raises(DivergedError, match=rf"client 'alice': .*metrics\[{name}\].*correct the {name}"):
            hop.count_in(dataclasses.replace(an_update(), metrics=wild))


def fortran(leaf: Array) -> Array:
    return np.array(leaf, order="F")


def test_double_precision_and_other_memory_layouts_are_counted_alike() -> None:
    sent, hop = an_update(), hop_of()
    wanted = encode_aggregate(hop.count_in(sent))
    for other in (lambda leaf: leaf.astype(np.float64), lambda leaf: leaf.astype(">f4"), fortran):
        tree = {name: other(leaf) for name, leaf in sent.parts["params"].items()}
        assert encode_aggregate(hop.count_in(changed(sent, "params", **tree))) == wanted


# ── what is not: form ────────────────────────────────────────────────────────────────────────────────────────────────

NOTHING = {"": np.zeros(())}
FORMS: dict[str, tuple[Callable[[Update], Update], str]] = {
    "a part too few": (
        lambda sent: dataclasses.replace(sent, parts={n: t for n, t in sent.parts.items() if n != "steps"}),
        r"it sends \['buffers', 'control', 'params'\], and the plan counts .*'steps'.*: it does not belong to this plan",
    ),
    "buffers too few": (
        lambda sent: dataclasses.replace(sent, parts={n: t for n, t in sent.parts.items() if n != "buffers"}),
        r"it sends \['control', 'params', 'steps'\], and the plan counts \['buffers'",
    ),
    "a part too many": (
        lambda sent: dataclasses.replace(sent, parts={**sent.parts, "diary": NOTHING}),
        r"it sends .*'diary'.*: it does not belong to this plan",
    ),
    "no parts": (lambda sent: dataclasses.replace(sent, parts={}), r"it sends \[\], and the plan counts"),
    "a leaf too few": (
        lambda sent: changed(sent, "params", fc_bias=None),
        r"`params\[fc.bias\]` has shape None, but the plan's is \(3,\)",
    ),
    "a leaf too many": (
        lambda sent: changed(sent, "params", fc_more=np.zeros(2)),
        r"`params\[fc.more\]` has shape \(2,\), but the plan's is None",
    ),
    "no leaves": (lambda sent: dataclasses.replace(sent, parts={**sent.parts, "control": {}}), r"`control\[fc.bias\]`"),
    "another shape": (
        lambda sent: changed(sent, "params", fc_bias=np.zeros(4)),
        r"`params\[fc.bias\]` has shape \(4,\), but the plan's is \(3,\)",
    ),
    "as many numbers in another shape": (
        lambda sent: changed(sent, "params", fc_weight=np.zeros((3, 2))),
        r"`params\[fc.weight\]` has shape \(3, 2\)",
    ),
    "a shape that would broadcast": (
        lambda sent: changed(sent, "params", fc_bias=np.zeros((1, 3))),
        r"`params\[fc.bias\]` has shape \(1, 3\)",
    ),
    "one number for all": (
        lambda sent: changed(sent, "params", fc_bias=np.zeros(())),
        r"`params\[fc.bias\]` has shape \(\)",
    ),
    "a scalar that is a vector": (
        lambda sent: dataclasses.replace(sent, parts={**sent.parts, "steps": {"": np.zeros(1)}}),
        r"`steps\[\]` has shape \(1,\), but the plan's is \(\)",
    ),
    "a scalar by another name": (
        lambda sent: dataclasses.replace(sent, parts={**sent.parts, "steps": {"tau": np.zeros(())}}),
        r"`steps\[\]` has shape None",
    ),
    "another leaf among the buffers": (
        lambda sent: changed(sent, "buffers", norm_var=np.zeros(3)),
        r"`buffers\[norm.var\]` has shape \(3,\), but the plan's is None",
    ),
    "weights among the buffers": (
        lambda sent: dataclasses.replace(sent, parts={**sent.parts, "buffers": sent.parts["params"]}),
        r"`buffers\[fc.bias\]`",
    ),
    "integers for floats": (
        lambda sent: changed(sent, "params", fc_bias=np.zeros(3, np.int8)),
        r"`params\[fc.bias\]` is int8, but the plan's are floats",
    ),
    "half precision": (
        lambda sent: changed(sent, "params", fc_bias=np.zeros(3, np.float16)),
        r"`params\[fc.bias\]` is float16, but the plan's are floats",
    ),
    "truth values": (lambda sent: changed(sent, "params", fc_bias=np.ones(3, bool)), r"is bool, but the plan's are"),
    "complex numbers": (lambda sent: changed(sent, "control", fc_bias=np.ones(3, complex)), r"is complex128, but the"),
    "unsigned integers": (lambda sent: changed(sent, "params", fc_bias=np.ones(3, np.uint64)), r"is uint64, but the"),
    "text": (lambda sent: changed(sent, "params", fc_bias=np.array(["a", "b", "c"])), r"is <U1, but the plan's are"),
    "objects": (lambda sent: changed(sent, "params", fc_bias=np.array([None] * 3)), r"is object, but the plan's are"),
    "a scalar of integers": (
        lambda sent: dataclasses.replace(sent, parts={**sent.parts, "steps": {"": np.array(3)}}),
        r"`steps\[\]` is int64, but the plan's are floats",
    ),
    "an unknown metric": (
        lambda sent: dataclasses.replace(sent, metrics={**sent.metrics, "steps walked": (1.0, 1)}),
        r"it reports \['steps walked'\], which the plan does not measure",
    ),
    "a value beyond the bound": (
        lambda sent: changed(sent, "params", fc_bias=np.array([0, 0, 256.5])),
        r"the update reaches 256.5 at `params\[fc.bias\]`, beyond the plan's bound 256",
    ),
    "a scalar beyond the bound": (
        lambda sent: dataclasses.replace(sent, parts={**sent.parts, "steps": {"": np.array(-1e9)}}),
        r"the update reaches 1e\+09 at `steps\[\]`, beyond",
    ),
}


@pytest.mark.parametrize("what", FORMS)
def test_what_is_not_of_the_plan_is_refused_and_adds_nothing(what: str) -> None:
    make, match = FORMS[what]
    refused(hop_of(), make(an_update()), match)


@pytest.mark.parametrize("examples", [0, -1])
def test_an_update_of_no_examples_is_refused_and_adds_nothing(examples: int) -> None:
    refused(hop_of(), an_update(examples=examples), f"trained on {examples} examples", EmptyError)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("part", "leaf"), [("params", "fc.weight"), ("control", "scale"), ("steps", ""), ("buffers", "norm.mean")]
)
def test_what_is_not_finite_is_refused_by_part_and_leaf(part: str, leaf: str, value: float) -> None:
    sent = an_update()
    tree = {**sent.parts[part], leaf: np.full_like(sent.parts[part][leaf], value)}
    sent = dataclasses.replace(sent, parts={**sent.parts, part: tree})
    refused(hop_of(), sent, rf"not finite at `{part}\[{leaf}\]`", DivergedError)


@pytest.mark.parametrize("bits", [np.array(0x7F900000, np.uint32), np.array(0x7FF4000000000000, np.uint64)])
@pytest.mark.parametrize("part", ["params", "control", "steps", "buffers"])
def test_a_signaling_nan_is_refused_without_a_warning(part: str, bits: np.ndarray) -> None:
    """NumPy warns where it converts such a number: a log must not be filled by who sends them."""
    sent = an_update()
    tree = {name: np.full(leaf.shape, bits).view(f"f{bits.itemsize}") for name, leaf in sent.parts[part].items()}
    sent = dataclasses.replace(sent, parts={**sent.parts, part: tree})
    refused(hop_of(), sent, "not finite", DivergedError)
    norms = tuple(100.0 if each.in_chain else None for each in hop_of().parts)
    refused(dataclasses.replace(hop_of(), norms=norms), sent, "not finite", DivergedError)


def test_the_last_part_is_checked_before_the_first_is_added() -> None:
    """Each part in turn is the bad one."""
    for part in ("params", "control", "buffers"):
        name = min(an_update().parts[part])
        refused(hop_of(), changed(an_update(), part, **{name: np.full(3, 1e9)}), "beyond the plan's bound")


# ── a bound of its own ───────────────────────────────────────────────────────────────────────────────────────────────

FAR = Part("steps", content="scalar", bound=2.0**20)
NEAR = Part("control", transformed=False, weight="uniform", bound=0.5)


def bounded_hop() -> FirstHop:
    return algorithm(parts=(PARTS[0], NEAR, FAR)).first_hop(TASK, SUMS)


def bounded_update(control: float = 0.5, steps: float = 2.0**20) -> Update:
    sent = changed(an_update(), "control", **{name: np.full_like(leaf, control) for name, leaf in leaves(0).items()})
    return changed(sent, "steps", **{"": np.array(steps)})


def test_a_part_with_a_bound_of_its_own_is_held_to_that_and_the_others_to_the_plans() -> None:
    """More than the plan's 256 for a number of steps, less for what is known to be small."""
    hop = bounded_hop()
    total = hop.count_in(bounded_update())
    assert decoded(total, "steps", hop)[""] == 5 * 2.0**20
    assert all((leaf == 0.5).all() for leaf in decoded(total, "control", hop).values())
    beyond = math.nextafter(2.0**20, math.inf)
    for wrong, match in (
        (
            bounded_update(steps=beyond),
            r"reaches 1.04858e\+06 at `steps\[\]`, beyond the bound 1.04858e\+06 of that part;",
        ),
        (
            bounded_update(steps=-beyond),
            r"reaches 1.04858e\+06 at `steps\[\]`, beyond the bound 1.04858e\+06 of that part;",
        ),
        (bounded_update(control=0.75), r"reaches 0.75 at `control\[\S+\]`, beyond the bound 0.5 of that part;"),
        (
            changed(bounded_update(), "params", fc_bias=np.array([0, 0, 256.5])),
            r"reaches 256.5 at `params\[fc.bias\]`, beyond the plan's bound 256;",
        ),
    ):
        refused(hop, wrong, match, good=bounded_update())


def test_the_bound_of_params_is_not_that_of_statistics() -> None:
    """Updates may be known to be small; a running mean moves as far as the data lie."""
    hop = algorithm(parts=(Part("params", bound=0.5), *PARTS[1:])).first_hop(TASK, SUMS)
    small = {name: np.full_like(leaf, 0.5) for name, leaf in leaves(0).items()}
    sent = dataclasses.replace(an_update(), parts={**an_update().parts, "params": small})
    far = changed(sent, "buffers", norm_mean=np.array([200.0, -256.0, 0.0]))
    assert decoded(hop.count_in(far), "buffers", hop)["norm.mean"].tolist() == [1000.0, -1280.0, 0.0]
    match = r"reaches 257 at `buffers\[norm.mean\]`, beyond the plan's bound 256;"
    refused(hop, changed(sent, "buffers", norm_mean=np.full(3, 257.0)), match, good=sent)


def test_parts_with_bounds_of_their_own_are_summed_on_grids_of_their_own() -> None:
    """A grid is the plan's, or as fine as the part's bound leaves room for: here 2^9 times coarser."""
    hop = bounded_hop()
    grids = {part.name: 2.0 ** -hop.sums.bits(part) for part in hop.parts}
    plain = 2.0**-SUMS.fraction_bits
    assert grids == {"params": plain, "control": plain, "steps": plain * 2**9, "buffers": plain}
    total = hop.count_in(bounded_update(control=3 * grids["control"], steps=1.4 * grids["steps"]))
    assert float(decoded(total, "control", hop)["fc.bias"][0]) == 3 * grids["control"]
    assert float(decoded(total, "steps", hop)[""]) == 7 * grids["steps"]  # rounded once, after the weight of five


# ── staleness ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_staleness_weighs_the_parts_that_ask_for_it_and_no_other() -> None:
    stale = Part("control", transformed=False, weight=sumus.staleness.polynomial(0.5))
    hop = algorithm(parts=(PARTS[0], stale, PARTS[2])).first_hop(TASK, FixedPoint.fit(16, 1024))
    fresh, old = hop.count_in(an_update()), hop.count_in(an_update(), staleness=3)
    weights = [{name: int(weight) for name, weight in total.weights.items()} for total in (fresh, old)]
    assert weights[0] == {"params": 5, "control": 1024, "steps": 5, "buffers": 5}
    assert weights[1] == {**weights[0], "control": 512}
    for part, tree in old.sums.items():
        halved = 2 if part == "control" else 1
        for name, leaf in tree.items():
            np.testing.assert_allclose(leaf * halved, fresh.sums[part][name], rtol=0, atol=1)
    total = RunningSum()
    hop.count_in(an_update(), into=total)
    hop.count_in(an_update(seed=1), total, staleness=3)
    assert encode_aggregate(total.total) == encode_aggregate(fresh.merge(hop.count_in(an_update(seed=1), staleness=3)))


# ── sums that could overflow ─────────────────────────────────────────────────────────────────────────────────────────

STALE = Part("control", transformed=False, weight=sumus.staleness.polynomial(0.5))
MISFITS: dict[str, tuple[Part, FixedPoint, FixedPoint, str]] = {
    "staleness": (
        STALE,
        FixedPoint.fit(16, 1024),
        FixedPoint.fit(16, 1023),
        "weighs up to 1024, .* weights up to 1023",
    ),
    "bound": (
        Part("steps", content="scalar", bound=2.0**51),
        FixedPoint.fit(16, 64),
        FixedPoint.fit(32, 64),
        "leaves no bits for sums of 32",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_hop_whose_sums_could_overflow_is_refused_however_it_is_made(what: str) -> None:
    """By whoever makes it, and by the edge that is sent it as text."""
    part, fits, too_small, match = MISFITS[what]
    others = tuple(other for other in PARTS if other.name != part.name)
    by = algorithm(parts=(*others, part))
    hop = by.first_hop(TASK, fits)
    text = canonical_json(to_json(hop))
    assert build(json.loads(text)) == hop
    small = text.replace(canonical_json(to_json(fits)), canonical_json(to_json(too_small)))
    assert small != text
    for make in (
        lambda: by.first_hop(TASK, too_small),
        lambda: dataclasses.replace(hop, sums=too_small),
        lambda: build(json.loads(small)),
    ):
        with pytest.raises(PlanError, match=match) as error:
            make()
        assert error.value.rule == "part-fits"


# ── what is not: codes ───────────────────────────────────────────────────────────────────────────────────────────────


def with_codes(bits: int, values: Any) -> Update:
    sent = an_update(CODES[bits])
    return changed(sent, "params", rotated=values)


@pytest.mark.parametrize("bits", CODES)
def test_codes_of_the_plans_width_are_counted_and_wider_ones_refused(bits: int) -> None:
    hop, largest = hop_of(CODES[bits]), 2 ** (bits - 1) - 1
    dtype = np.int8 if bits <= 8 else np.int16
    codes = np.zeros(hop_size(hop), dtype)
    alone = min(largest, math.floor(hop.norms[0] or 0.0))  # the clip may leave no update of a single, largest code
    for edge in (alone, -alone):
        codes[3] = edge
        assert int(hop.count_in(with_codes(bits, codes)).sums["params"]["rotated"][3]) == 5 * edge
    codes[3] = -largest - 1
    refused(
        hop,
        with_codes(bits, codes),
        rf"`params\[rotated\]` holds codes beyond ±{largest}, the largest \d+-bit code",
    )
    if largest < np.iinfo(dtype).max:
        codes[3] = largest + 1
        refused(hop, with_codes(bits, codes), rf"`params\[rotated\]` holds codes beyond ±{largest}")


@pytest.mark.parametrize("bits", CODES)
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "float32", "float64", "bool"])
def test_codes_of_another_dtype_are_refused(bits: int, dtype: str) -> None:
    hop = hop_of(CODES[bits])
    if dtype == ("int8" if bits <= 8 else "int16"):
        return
    refused(
        hop,
        with_codes(bits, np.zeros(hop_size(hop), dtype)),
        rf"`params\[rotated\]` is {dtype}, but the plan's are {bits}-bit codes",
    )


def hop_size(hop: FirstHop) -> int:
    ((_, (size,)),) = hop.layouts[0]
    return size


def test_codes_where_the_plan_has_floats_and_floats_where_it_has_codes_are_refused() -> None:
    refused(hop_of(), an_update(CODES[8]), r"`params\[fc.bias\]` has shape None")
    refused(hop_of(CODES[8]), an_update(), r"`params\[fc.bias\]` has shape \(3,\), but the plan's is None")
    refused(hop_of(CODES[8]), changed(an_update(CODES[8]), "control", scale=np.zeros((), np.int8)), "is int8, but the")


# ── a first update defines nothing ───────────────────────────────────────────────────────────────────────────────────


def test_a_first_update_cannot_define_the_sum() -> None:
    """Into a fresh sum, a stranger's leaves would otherwise be the form that everyone after is held to."""
    hop, total = hop_of(), RunningSum()
    foreign = dataclasses.replace(an_update(), parts={part: {"evil": np.zeros(2)} for part in an_update().parts})
    with pytest.raises(ParticipantError, match="evil"):
        hop.count_in(foreign, into=total)
    for seed in range(3):
        hop.count_in(an_update(seed=seed, client=seed), into=total)
    assert int(total.total.count) == 3
    assert {leaf for tree in total.total.sums.values() for leaf in tree} == {
        "fc.weight", "fc.bias", "scale", "norm.mean", "",
    }  # fmt: skip


# ── edges ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("update", [None, weight(cap=9), CODES[8]], ids=repr)
@given(st.data())
def test_a_tree_of_hops_gives_the_bits_of_one_hop(update: Transform | None, data: st.DataObject) -> None:
    """Each edge counts its own devices in, and sends its sum as bytes; the server merges, in any order."""
    hop = hop_of(update)
    clients = [an_update(update, seed, client=seed, examples=1 + seed * 7) for seed in range(6)]
    flat = RunningSum()
    for one in clients:
        hop.count_in(one, into=flat)
    where = [data.draw(st.integers(0, 2)) for _ in clients]
    sent: list[bytes] = []
    for edge in data.draw(st.permutations(range(3))):
        total = RunningSum()
        for one, at in zip(clients, where, strict=True):
            if at == edge:
                hop.count_in(one, into=total)
        sent.append(encode_aggregate(total.total))
    server = functools.reduce(Aggregate.merge, map(decode_aggregate, sent))
    assert encode_aggregate(server) == encode_aggregate(flat.total)
    ones = functools.reduce(Aggregate.merge, (hop.count_in(one) for one in reversed(clients)))
    assert encode_aggregate(ones) == encode_aggregate(flat.total)


def test_an_edge_can_be_sent_its_hop_as_text() -> None:
    """It needs this and nothing else of the plan, and refuses and counts alike."""
    plan = sumus.Plan(TASK, sumus.fedavg(sumus.sgd(0.1), CODES[6]), sumus.Pacing(10))
    again = build(json.loads(canonical_json(to_json(plan.first_hop))))
    assert again == plan.first_hop
    assert hash(again) == hash(plan.first_hop)
    parts = {"params": leaves(1), "buffers": {"norm.mean": np.ones(3, np.float32)}}
    sent = plan.algorithm.report("alice", parts, 5, {}, b"round", generator(0))
    assert encode_aggregate(again.count_in(sent)) == encode_aggregate(plan.first_hop.count_in(sent))
    refused_here = dataclasses.replace(sent, parts={"params": sent.parts["params"]})
    with pytest.raises(ParticipantError, match="does not belong to this plan"):
        again.count_in(refused_here)


def test_a_hop_has_a_layout_for_each_part() -> None:
    for layouts in ((), hop_of().layouts[:-1]):
        with pytest.raises(PlanError):
            dataclasses.replace(hop_of(), layouts=layouts)
