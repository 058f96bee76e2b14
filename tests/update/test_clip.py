"""Clipping: the bound holds in the bits that are sent, checked in exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sumus.errors import PlanError
from sumus.types import Array, Tree
from sumus.update import Context, clip_by_global_norm
from sumus.update.clip import global_norm, narrowed, root_rounded_up

CONTEXT = Context({}, b"")
SMALLEST, LARGEST = 2.0**-149, float(np.finfo(np.float32).max)


def entries() -> st.SearchStrategy[float]:
    """float32 from the smallest denormal to the largest number."""
    usual = st.floats(-1e3, 1e3, width=32)
    return st.one_of(
        usual, st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, SMALLEST])
    )


def trees() -> st.SearchStrategy[Tree]:
    leaf = st.lists(entries(), min_size=1, max_size=5).map(lambda values: np.array(values, np.float32))
    return st.dictionaries(st.sampled_from(["a", "b", "c"]), leaf, min_size=1)


def bounds() -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from([1.0, 5.0, 0.1, SMALLEST, LARGEST]), st.floats(1e-44, 1e38))


def square(tree: Tree) -> Fraction:
    """‖tree‖₂², exactly."""
    return sum((Fraction(float(entry)) ** 2 for leaf in tree.values() for entry in leaf.reshape(-1)), Fraction(0))


def clipped(tree: Tree, max_norm: float) -> Tree:
    return clip_by_global_norm(max_norm).apply(tree, CONTEXT)


@given(trees(), bounds())
def test_the_norm_is_never_above_the_bound(tree: Tree, max_norm: float) -> None:
    assert square(clipped(tree, max_norm)) <= Fraction(max_norm) ** 2


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.floats(1e-3, 1e6))
def test_nor_is_it_in_double_precision(values: list[float], max_norm: float) -> None:
    assert square(clipped({"w": np.array(values)}, max_norm)) <= Fraction(max_norm) ** 2


@given(st.integers(0, 2**32), st.integers(1, 400))
def test_nor_with_entries_whose_norm_is_the_bound_to_the_last_bit(seed: int, size: int) -> None:
    tree = {"w": np.random.default_rng(seed).normal(size=size).astype(np.float32)}
    for max_norm in (float(np.sqrt(np.square(tree["w"], dtype=np.float64).sum())), float(np.linalg.norm(tree["w"]))):
        assert square(clipped(tree, max_norm)) <= Fraction(max_norm) ** 2


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("whole", [True, False])
def test_nor_where_a_quotient_or_a_root_rounds_up(size: int, whole: bool) -> None:
    """Few entries leave no slack: half of these would be over by a last place, if roots and products only rounded."""
    rng = np.random.default_rng(size)
    for _ in range(500):
        values = rng.integers(1, 9, size).astype(np.float64) if whole else rng.normal(size=size)
        for max_norm in (float(rng.uniform(0.1, 2)), math.sqrt(math.fsum(values * values))):
            assert square(clipped({"w": values}, max_norm)) <= Fraction(max_norm) ** 2


@given(trees(), bounds())
def test_what_is_within_the_bound_is_unchanged_bit_for_bit(tree: Tree, max_norm: float) -> None:
    assume(global_norm(tree) <= max_norm)
    after = clipped(tree, max_norm)
    assert {name: leaf.tobytes() for name, leaf in after.items()} == {
        name: leaf.tobytes() for name, leaf in tree.items()
    }


def test_a_norm_of_exactly_the_bound_is_within_it() -> None:
    tree = {"a": np.array([3.0], np.float32), "b": np.array([[4.0]], np.float32)}
    assert {name: leaf.tolist() for name, leaf in clipped(tree, 5.0).items()} == {"a": [3.0], "b": [[4.0]]}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_zero_is_unchanged(dtype: str) -> None:
    after = clipped({"w": np.zeros((2, 3), dtype), "empty": np.zeros(0, dtype)}, 1e-3)
    assert (after["w"].dtype.name, after["w"].tolist()) == (dtype, [[0.0] * 3] * 2)


@given(st.lists(st.floats(-1e3, 1e3, width=32).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=9))
def test_beyond_the_bound_every_leaf_is_scaled_alike_to_it(values: list[float]) -> None:
    tree = {"a": np.array(values[:1], np.float32), "b": np.array(values[1:], np.float32)}
    norm = math.sqrt(math.fsum(float(value) ** 2 for value in np.array(values, np.float32)))
    after = clipped(tree, norm / 3)
    for name, leaf in tree.items():
        np.testing.assert_allclose(after[name], leaf / 3, rtol=1e-6)
    assert all(leaf.dtype == np.float32 for leaf in after.values())


@given(st.lists(st.floats(-1e3, 1e3, width=32), max_size=50), st.integers(1, 5))
def test_the_global_norm_is_the_norm_over_all_leaves(values: list[float], leaves: int) -> None:
    """Never below the true norm, and above it by less than 2⁻²⁹ · largest · √size."""
    tree = {str(number): np.array(values[number::leaves]) for number in range(leaves)}
    exact = math.sqrt(math.fsum(value * value for value in values))
    slack = 2.0**-29 * max(map(abs, values), default=0.0) * math.sqrt(len(values))
    assert exact * (1 - 1e-15) <= global_norm(tree) <= exact * (1 + 1e-15) + slack
    assert Fraction(global_norm(tree)) ** 2 >= square(tree)


@given(st.integers(1, 2**45))
def test_roots_are_exact_or_rounded_up(whole: int) -> None:
    """Squares of millions of entries add up to more than a float holds."""
    assert root_rounded_up(2**140 + 1) > 2**70
    assert root_rounded_up(whole**2) == whole
    for total in (whole**2 + 1, whole**2 - 1, whole, 2 * whole**2):
        assert Fraction(root_rounded_up(total)) ** 2 >= total
        assert root_rounded_up(total) <= math.sqrt(total) * (1 + 2.0**-51)


@given(st.integers(0, 2**32))
def test_the_global_norm_does_not_depend_on_how_numbers_are_laid_out(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=300).astype(np.float32)
    one = global_norm({"all": values})
    assert global_norm({"b": values[:17], "a": values[17:].reshape(-1, 1)}) == one
    assert global_norm({"all": np.random.default_rng(seed + 1).permutation(values)}) == one


def test_a_whole_update_is_clipped_where_every_leaf_alone_would_pass() -> None:
    tree = {str(leaf): np.ones(1, np.float32) for leaf in range(100)}
    assert global_norm(clipped(tree, 1.0)) <= 1.0


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=6))
def test_narrowing_rounds_towards_zero(values: list[float]) -> None:
    exact: Array = np.array(values)
    narrow = narrowed(exact, np.dtype(np.float32))
    assert narrow.dtype == np.float32
    assert (np.abs(narrow, dtype=np.float64) <= np.abs(exact)).all()
    np.testing.assert_allclose(narrow, exact, rtol=2.0**-22, atol=SMALLEST)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_is_no_positive_number_is_refused(max_norm: float) -> None:
    with pytest.raises(PlanError) as error:
        clip_by_global_norm(max_norm)
    assert error.value.rule == "positive"
