"""Weighting on the device, so that a clip after it bounds the weighted update."""

import numpy as np
import pytest

import sumus
from sumus.errors import PlanError
from sumus.fixed_point import FixedPoint
from sumus.rng import generator
from sumus.task import Description, Leaf
from sumus.types import Tree
from sumus.update import Context, chain, clip_by_global_norm, weight
from sumus.update.clip import global_norm

TASK = Description("t", (Leaf("w", (1,), "float64", "shared", True),), "l", ())


def context(examples: int) -> Context:
    return Context({"w": (2,)}, b"", examples=examples)


@pytest.mark.parametrize(("examples", "factor"), [(0, 0), (1, 1), (7, 7), (10, 10), (11, 10), (10**9, 10)])
def test_the_update_is_multiplied_by_its_examples_up_to_the_cap(examples: int, factor: int) -> None:
    update: Tree = {"w": np.array([1.5, -2.0], np.float32)}
    sent = weight(cap=10).apply(update, context(examples))["w"]
    assert (sent.dtype.name, sent.tolist()) == ("float32", [1.5 * factor, -2.0 * factor])


def test_the_clip_after_it_bounds_the_weighted_update() -> None:
    update = chain(weight(cap=100), clip_by_global_norm(1.0))
    sent = update.apply({"w": np.array([3.0, 4.0], np.float32)}, context(50))
    assert global_norm(sent) <= 1.0
    np.testing.assert_allclose(sent["w"], [0.6, 0.8], rtol=1e-6)


def test_the_first_hop_counts_the_weight_and_does_not_multiply_again() -> None:
    """Σ clip(w·Δ) / Σ w, where without the stage it is Σ w·clip(Δ) / Σ w."""

    def mean_of(update: sumus.Transform) -> float:
        algorithm, sums = sumus.fedavg(sumus.sgd(0.1), update), FixedPoint.fit(2, 10)
        total = sumus.RunningSum()
        for client, (move, examples) in enumerate(((8.0, 2), (1.0, 20))):
            parts = {"params": {"w": np.array([move])}}
            sent = algorithm.report(client, parts, examples, {}, b"", generator(client))
            total.add(algorithm.first_hop(TASK, sums).count_in(sent))
        combined = algorithm.combine(total.total, TASK, sums, b"", 2)
        state = algorithm.step(combined, algorithm.start({"w": np.zeros(1)}, TASK), TASK)
        return -float(algorithm.release(state)["w"][0])

    inside, above = 2 * 8.0, 10 * 1.0
    assert mean_of(weight(cap=10)) == pytest.approx((inside + above) / 12)
    assert mean_of(chain(weight(cap=10), clip_by_global_norm(4.0))) == pytest.approx((4 + 4) / 12)
    assert mean_of(clip_by_global_norm(4.0)) == pytest.approx((2 * 4 + 10 * 1) / 12)


def test_it_multiplies_norms_and_so_ends_an_earlier_bound() -> None:
    assert weight(cap=2**16).props.keeps_norm is False
    assert weight(cap=5).weight_cap == 5


@pytest.mark.parametrize("cap", [0, -1])
def test_a_cap_below_one_is_refused(cap: int) -> None:
    with pytest.raises(PlanError) as error:
        weight(cap=cap)
    assert error.value.rule == "positive"


def test_only_examples_are_known_as_a_weight() -> None:
    with pytest.raises(PlanError, match="does not accept by='words'") as error:
        weight(cap=9, by="words")  # pyright: ignore[reportArgumentType]
    assert error.value.rule == "wrong-type"
