"""Quantizing: few bits a number, right on average."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.errors import PlanError
from sumus.rng import generator, key
from sumus.types import Tree
from sumus.update import Context, Transform, chain, clip_by_global_norm, quantize, rotate


def context(*words: object, count: int = 1, norm_bound: float | None = None) -> Context:
    return Context({"w": (count,)}, key("round"), norm_bound=norm_bound, rng=generator("quantize", *words))


def codes(transform: Transform, values: list[float], *words: object) -> np.ndarray:
    return transform.apply({"w": np.array(values, np.float32)}, context(*words, count=len(values)))["w"]


@pytest.mark.parametrize(("bits", "dtype"), [(2, "int8"), (7, "int8"), (8, "int8"), (9, "int16"), (16, "int16")])
def test_codes_are_as_narrow_as_their_bits(bits: int, dtype: str) -> None:
    sent = codes(quantize(bits, range=1.0), [-1.0, 0.0, 1.0])
    assert sent.dtype.name == dtype
    assert sent.tolist() == [-(2 ** (bits - 1) - 1), 0, 2 ** (bits - 1) - 1]


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20), st.integers(2, 16), st.integers(0, 99))
def test_codes_are_one_of_the_two_neighbours_and_saturate(values: list[float], bits: int, seed: int) -> None:
    largest = 2 ** (bits - 1) - 1
    exact = np.clip(np.array(values, np.float32).astype(np.float64) * largest, -largest, largest)
    sent = codes(quantize(bits, range=1.0), values, seed).astype(np.float64)
    assert (np.abs(sent) <= largest).all()
    assert (np.abs(sent - exact) < 1 + 1e-9).all()


def test_rounding_is_unbiased() -> None:
    """The mean of many codes of one number is that number: here within five standard errors."""
    count, unit = 200_000, 1 / 127
    for value in (0.3 * unit, -0.7 * unit, 0.123, -0.9):
        sent = codes(quantize(8, range=1.0), [value] * count)
        assert sent.mean() * unit == pytest.approx(value, abs=5 * 0.5 * unit / np.sqrt(count))


def test_whole_steps_have_their_own_code_always() -> None:
    values = (np.arange(-127, 128) / 127).astype(np.float64)
    sent = quantize(8, range=127.0).apply({"w": np.rint(values * 127)}, context(count=255))["w"]
    assert sent.tolist() == list(range(-127, 128))


@given(st.lists(st.lists(st.integers(-127, 127), min_size=3, max_size=3), min_size=1, max_size=5))
def test_the_sum_of_codes_inverts_to_the_sum_of_values(clients: list[list[int]]) -> None:
    transform = quantize(8, range=2.0)
    total = np.sum([np.array(client) for client in clients], axis=0).astype(np.float64)
    back = transform.invert({"w": total}, context(count=3))["w"]
    np.testing.assert_allclose(back, total * (2.0 / 127), rtol=1e-15)


def test_each_client_rounds_with_its_own_randomness_and_reproducibly() -> None:
    values = np.linspace(-1, 1, 100).tolist()
    first, again, other = (codes(quantize(8, range=1.0), values, who) for who in ("alice", "alice", "bob"))
    assert first.tolist() == again.tolist() != other.tolist()


def test_leaves_draw_their_randomness_in_canonical_order() -> None:
    tree: Tree = {"a": np.full(50, 0.1, np.float32), "b": np.full(50, 0.1, np.float32)}
    turned = dict(reversed(list(tree.items())))
    one, two = (quantize(8, range=1.0).apply(t, context()) for t in (tree, turned))
    assert one["a"].tolist() == two["a"].tolist() != one["b"].tolist()


def test_without_a_range_it_needs_the_clip_before_it() -> None:
    with pytest.raises(PlanError) as error:
        codes(quantize(8), [0.0])
    assert error.value.rule == "quantize-range"


def test_the_range_after_clip_and_rotate_is_four_and_a_half_deviations() -> None:
    """4.5 · C/√d: the largest code stands for exactly that."""
    back = quantize(8).invert({"w": np.full(100, 127.0)}, context(count=100, norm_bound=2.0))["w"]
    np.testing.assert_allclose(back, 4.5 * 2.0 / np.sqrt(100), rtol=1e-15)


def relative_error(update: Transform, tree: Tree) -> float:
    shapes = {name: leaf.shape for name, leaf in tree.items()}
    around = Context(shapes, key("round", 0), rng=generator("client"))
    sent = update.apply(tree, around)
    back = update.invert({name: leaf.astype(np.float64) for name, leaf in sent.items()}, around)
    error = np.sqrt(sum(float(np.square(back[name] - leaf).sum()) for name, leaf in tree.items()))
    return error / np.sqrt(sum(float(np.square(leaf).sum()) for leaf in tree.values()))


def a_model_like_update() -> Tree:
    """65 000 numbers, of which one layer's are large: unit norm, as after the clip."""
    rng = np.random.default_rng(0)
    tree = {"embedding": rng.normal(size=(640, 100)) * 0.01, "head": rng.normal(size=(10, 100)), "bias": np.ones(10)}
    whole = np.sqrt(sum(float(np.square(leaf).sum()) for leaf in tree.values()))
    return {name: (leaf / whole).astype(np.float32) for name, leaf in tree.items()}


def test_rotation_shrinks_the_error_of_eight_bits_many_times() -> None:
    """One range over an unrotated model is as wide as its largest entry; rotated, one range fits all."""
    tree = a_model_like_update()
    widest = max(float(np.abs(leaf).max()) for leaf in tree.values())
    plain = relative_error(quantize(8, range=widest), tree)
    rotated = relative_error(chain(clip_by_global_norm(1.0), rotate(), quantize(8)), tree)
    assert rotated < 0.03
    assert plain > 3 * rotated


def test_a_range_for_rotated_updates_cuts_unrotated_ones_off() -> None:
    tree = a_model_like_update()
    assert relative_error(chain(clip_by_global_norm(1.0), quantize(8)), tree) > 0.3


def test_after_rotation_more_bits_give_less_error() -> None:
    tree = a_model_like_update()
    errors = [relative_error(chain(clip_by_global_norm(1.0), rotate(), quantize(bits)), tree) for bits in (4, 6, 8, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] / errors[2] == pytest.approx(127 / 7, rel=0.1)


@pytest.mark.parametrize("bits", [1, 17, 0, -8])
def test_widths_from_2_to_16_are_known_and_no_others(bits: int) -> None:
    with pytest.raises(PlanError) as error:
        quantize(bits, range=1.0)
    assert error.value.rule == "quantize-bits"


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf")])
def test_a_range_that_is_no_positive_number_is_refused(width: float) -> None:
    with pytest.raises(PlanError) as error:
        quantize(8, range=width)
    assert error.value.rule == "positive"
