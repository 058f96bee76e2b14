"""Chaining: two transforms are one, applied in order and undone in reverse."""

import dataclasses

import numpy as np
import pytest

import sumus
from sumus.errors import DivergedError, PlanError
from sumus.fixed_point import FixedPoint
from sumus.rng import generator, key
from sumus.task import Description, Leaf
from sumus.types import Layout, Tree
from sumus.update import Context, Props, Transform, chain, clip_by_global_norm, quantize, rotate, weight
from sumus.update.clip import global_norm

AROUND = Context({"w": (2,)}, b"seed", rng=generator("client"))


def noting(name: str, notes: list[str], props: Props = Props(keeps_norm=True)) -> Transform:  # noqa: B008
    def note(end: str):
        def through(tree: Tree, context: Context) -> Tree:
            notes.append(f"{end} {name} at {context.norm_bound}")
            return tree

        return through

    return Transform(apply=note("apply"), invert=note("invert"), props=props)


def test_stages_are_applied_in_order_and_inverted_in_reverse() -> None:
    notes: list[str] = []
    both = chain(noting("a", notes), noting("b", notes), noting("c", notes))
    both.invert(both.apply({}, AROUND), AROUND)
    assert [note.rpartition(" at ")[0] for note in notes] == [
        "apply a", "apply b", "apply c", "invert c", "invert b", "invert a",
    ]  # fmt: skip


def test_a_chain_does_what_its_stages_do() -> None:
    tree = {"w": np.array([3.0, -4.0], np.float32)}
    chained = chain(clip_by_global_norm(1.0), rotate()).apply(tree, AROUND)
    apart = rotate().apply(clip_by_global_norm(1.0).apply(tree, AROUND), AROUND)
    assert chained["rotated"].tolist() == apart["rotated"].tolist()


def test_a_stage_learns_the_bound_that_holds_before_it_on_both_ends() -> None:
    notes: list[str] = []
    wide, narrow = Props(clips_to=8.0, keeps_norm=True), Props(clips_to=2.0, keeps_norm=True)
    both = chain(
        noting("free", notes),
        noting("clip to 8", notes, wide),
        noting("kept", notes),
        noting("clip to 2", notes, narrow),
        noting("clip to 8 again", notes, wide),
        noting("grows", notes, Props(keeps_norm=False)),
        noting("last", notes),
    )
    both.apply({}, AROUND)
    assert notes == [
        "apply free at None",
        "apply clip to 8 at None",
        "apply kept at 8.0",
        "apply clip to 2 at 8.0",
        "apply clip to 8 again at 2.0",
        "apply grows at 2.0",
        "apply last at None",
    ]
    forth, notes[:] = list(notes), []
    both.invert({}, AROUND)
    assert notes == [note.replace("apply", "invert") for note in reversed(forth)]


def test_stages_that_change_the_layout_are_followed() -> None:
    shapes = {"a": (3, 5), "b": ()}
    assert chain(clip_by_global_norm(1.0), rotate(), quantize()).layout(shapes) == rotate().layout(shapes)
    tree = {"a": np.ones((3, 5), np.float32), "b": np.ones((), np.float32)}
    around = dataclasses.replace(AROUND, shapes=shapes)
    update = chain(clip_by_global_norm(1.0), rotate(), quantize(16))
    sent = update.apply(tree, around)
    back = update.invert({name: leaf.astype(np.float64) for name, leaf in sent.items()}, around)
    assert {name: leaf.shape for name, leaf in back.items()} == shapes
    np.testing.assert_allclose(back["a"], 0.25, atol=1e-3)


def test_chains_of_chains_are_flat() -> None:
    nested = chain(chain(clip_by_global_norm(1.0), rotate()), quantize())
    assert [repr(stage) for stage in nested.stages] == [
        "clip_by_global_norm(max_norm=1.0)", "rotate()", "quantize(bits=8, range=None)",
    ]  # fmt: skip


def test_the_empty_chain_is_the_identity_and_adds_no_stage() -> None:
    tree = {"w": np.array([1.0, 2.0])}
    assert chain().apply(tree, AROUND) is tree
    assert chain().invert(tree, AROUND) is tree
    assert chain().links == ()
    assert [repr(stage) for stage in chain(chain(), rotate(), chain()).stages] == ["rotate()"]


def test_a_chain_knows_the_width_of_its_codes_and_its_weight_stage() -> None:
    update = chain(weight(cap=7), clip_by_global_norm(1.0), rotate(), quantize(6))
    assert (update.code_bits, update.weight_cap) == (6, 7)
    assert (rotate().code_bits, rotate().weight_cap) == (None, None)


def test_codes_come_last() -> None:
    chain(rotate(), quantize(8, range=1.0))
    for wrong in ((quantize(8, range=1.0), rotate()), (chain(quantize(8, range=1.0)), clip_by_global_norm(1.0))):
        with pytest.raises(PlanError) as error:
            chain(*wrong)
        assert error.value.rule == "quantize-last"


# ── through the whole way of an update ───────────────────────────────────────────────────────────────────────────────


CHAINS = {
    "nothing": chain(),
    "clip": clip_by_global_norm(1.0),
    "clip, rotate": chain(clip_by_global_norm(1.0), rotate()),
    "rotate, clip": chain(rotate(), clip_by_global_norm(1.0)),
    "clip, rotate, quantize": chain(clip_by_global_norm(1.0), rotate(), quantize(16)),
    "weight, clip, rotate, quantize": chain(weight(cap=4), clip_by_global_norm(4.0), rotate(), quantize(16)),
}


def task_of(shapes: Layout) -> Description:
    return Description("t", tuple(Leaf(k, s, "float32", "shared", True) for k, s in shapes.items()), "l", ())


@pytest.mark.parametrize("name", CHAINS)
def test_the_server_gets_the_mean_of_the_clipped_updates_back(name: str) -> None:
    """Four clients with four examples each and norms below the bound: every chain gives the plain mean."""
    algorithm, sums = sumus.fedavg(sumus.sgd(0.1), CHAINS[name]), FixedPoint.fit(4, 4)
    rng = np.random.default_rng(0)
    shapes = {"fc.weight": (5, 7), "fc.bias": (5,)}
    task = task_of(shapes)
    updates = [{k: (rng.normal(size=s) / 8).astype(np.float32) for k, s in shapes.items()} for _ in range(4)]
    total = sumus.RunningSum()
    for client, tree in enumerate(updates):
        sent = algorithm.report(client, {"params": tree}, 4, {}, key("round"), generator(client))
        total.add(algorithm.first_hop(task, sums).count_in(sent))
    start = algorithm.start({k: np.zeros(s) for k, s in shapes.items()}, task)
    combined = algorithm.combine(total.total, task, sums, key("round"), 4)
    model = algorithm.release(algorithm.step(combined, start, task))
    for leaf in shapes:
        np.testing.assert_allclose(model[leaf], -np.mean([u[leaf] for u in updates], 0), atol=3e-4)


@pytest.mark.parametrize("name", ["clip", "clip, rotate", "rotate, clip"])
def test_the_bound_holds_in_the_bits_that_are_sent(name: str) -> None:
    """A single-precision model sends single precision, whatever its transforms computed in."""
    algorithm = sumus.fedavg(sumus.sgd(0.1), CHAINS[name])
    for seed in range(50):
        tree = {"w": np.random.default_rng(seed).normal(size=seed + 1).astype(np.float32) * 9}
        (sent,) = algorithm.report("c", {"params": tree}, 1, {}, key(seed), generator(seed)).parts.values()
        assert {leaf.dtype.name for leaf in sent.values()} == {"float32"}
        assert global_norm(sent) <= 1.0


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_client_is_refused_by_name_even_where_codes_could_not_tell(name: str, value: float) -> None:
    algorithm, sums = sumus.fedavg(sumus.sgd(0.1), CHAINS[name]), FixedPoint.fit(4)
    hop = algorithm.first_hop(task_of({"a": (3,), "fc.weight": (2,)}), sums)
    tree = {"a": np.zeros(3, np.float32), "fc.weight": np.array([1.0, value], np.float32)}
    with pytest.raises(DivergedError, match=r"client 'alice'.*`params\[fc.weight\]`"):
        hop.count_in(algorithm.report("alice", {"params": tree}, 1, {}, b"", generator(0)))
