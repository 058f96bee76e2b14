"""Rotation: an orthogonal map that everyone derives from one public seed, undone on the sum."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.rng import key, signs
from sumus.tree import flatten, size
from sumus.types import Array, Layout, Tree
from sumus.update import Context, rotate
from sumus.update.rotate import ROTATED, _hadamard_by_butterflies, _hadamard_by_matrix

SIZES = [1, 2, 3, 4, 5, 15, 16, 17, 64, 100, 1000, 4095, 4096, 4097, 5000]


def context(shapes: Layout, round_number: int = 0) -> Context:
    return Context(shapes, key("seed", round_number))


def update(count: int, seed: int = 0, dtype: str = "float64") -> Tree:
    """`count` numbers of very different sizes, in a leaf with one row and one with the rest."""
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=count) * 10.0 ** rng.uniform(-3, 0, count)).astype(dtype)
    return {"fc.weight": values[: count // 2].reshape(1, -1), "fc.bias": values[count // 2 :]}


def shapes_of(tree: Tree) -> Layout:
    return {name: leaf.shape for name, leaf in tree.items()}


def norm(tree: Tree) -> float:
    return float(np.linalg.norm(flatten(tree)))


@pytest.mark.parametrize("count", SIZES)
def test_the_norm_is_kept(count: int) -> None:
    tree = update(count)
    assert norm(rotate().apply(tree, context(shapes_of(tree)))) == pytest.approx(norm(tree), rel=1e-10)


@pytest.mark.parametrize("count", SIZES)
def test_inverting_gives_the_update_back(count: int) -> None:
    """To 2⁻⁴⁰ of the largest entry, the grid on which it is rotated."""
    tree = update(count)
    around = context(shapes_of(tree))
    back = rotate().invert(rotate().apply(tree, around), around)
    largest = max(float(np.abs(leaf).max(initial=0.0)) for leaf in tree.values())
    for name, leaf in tree.items():
        assert back[name].shape == leaf.shape
        np.testing.assert_allclose(back[name], leaf, rtol=0, atol=largest * 2.0**-40)


def test_a_single_precision_update_on_the_grid_comes_back_exactly() -> None:
    tree = {"w": np.array([0.5, -0.25, 0.125, 1.0, -0.75], np.float32)}
    around = context(shapes_of(tree))
    assert rotate().invert(rotate().apply(tree, around), around)["w"].tolist() == tree["w"].tolist()


@given(st.integers(1, 5000), st.integers(0, 2**32))
def test_the_server_may_invert_the_sum_instead_of_each(count: int, seed: int) -> None:
    clients = [update(count, seed + number) for number in range(3)]
    around = context(shapes_of(clients[0]))
    total = {ROTATED: sum(rotate().apply(client, around)[ROTATED] for client in clients)}
    back = rotate().invert(total, around)
    for name in clients[0]:
        np.testing.assert_allclose(back[name], sum(client[name] for client in clients), rtol=0, atol=1e-10)


@given(st.integers(1, 20000))
def test_the_layout_is_whole_blocks_and_announced(count: int) -> None:
    tree = update(count)
    around = context(shapes_of(tree))
    sent = rotate().apply(tree, around)
    padded = rotate().layout(around.shapes)
    assert {name: leaf.shape for name, leaf in sent.items()} == dict(padded)
    assert count <= size(padded) < max(4 * count, count + 4096)


@pytest.mark.parametrize("block", [1, 4, 16, 64, 256, 1024, 4096])
def test_the_matrix_and_the_butterflies_agree_exactly_on_integers(block: int) -> None:
    """Up to 40 bits, where the transform of 4096 of them still has an exact float64."""
    rng = np.random.default_rng(block)
    rows: Array = rng.integers(-(2**40), 2**40, (3, block)).astype(np.float64)
    rows[0] = 2.0**40  # the widest sum
    assert np.array_equal(_hadamard_by_matrix(rows.copy()), _hadamard_by_butterflies(rows.copy()))


def test_the_transform_is_walsh_hadamards() -> None:
    """H(n)[i, j] = (−1)^popcount(i & j)."""
    wanted = np.array([[(-1.0) ** (i & j).bit_count() for j in range(64)] for i in range(64)])
    assert np.array_equal(_hadamard_by_matrix(np.eye(64)), wanted)


def test_one_seed_gives_one_set_of_bits_and_another_seed_another() -> None:
    tree = update(300, dtype="float32")
    first, again, other = (rotate().apply(tree, context(shapes_of(tree), r))[ROTATED] for r in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_the_order_of_leaves_does_not_matter() -> None:
    tree = update(300)
    turned = dict(reversed(list(tree.items())))
    one, two = (rotate().apply(t, context(shapes_of(t)))[ROTATED] for t in (tree, turned))
    assert one.tobytes() == two.tobytes()


def test_one_large_coordinate_is_spread_evenly() -> None:
    tree = {"w": np.zeros(4096)}
    tree["w"][1234] = 1.0
    rotated = rotate().apply(tree, context(shapes_of(tree)))[ROTATED]
    assert np.array_equal(np.abs(rotated), np.full(4096, 1 / 64))


def test_every_block_holds_a_share_of_every_layer() -> None:
    """A layer of 100 equal numbers among 8192: both blocks get half of it."""
    tree = {"a": np.zeros(4000), "b": np.ones(100), "c": np.zeros(4092)}
    rotated = rotate().apply(tree, context(shapes_of(tree)))[ROTATED].reshape(2, 4096)
    assert np.linalg.norm(rotated, axis=1) == pytest.approx(np.sqrt([50, 50]))


def test_zero_stays_zero() -> None:
    assert not rotate().apply({"w": np.zeros(5)}, context({"w": (5,)}))[ROTATED].any()


def test_signs_follow_the_stream_that_another_language_computes() -> None:
    """SHA-256(seed ‖ counter) with 8-byte counters, bits of a byte from the lowest, a set bit for −1."""
    seed, drawn = b"seed", signs(b"seed", 600)
    stream = b"".join(hashlib.sha256(seed + bytes([block, 0, 0, 0, 0, 0, 0, 0])).digest() for block in range(3))
    assert drawn.tolist() == [-1.0 if stream[i // 8] >> (i % 8) & 1 else 1.0 for i in range(600)]
    assert signs(bytes(32), 8).tolist() == [1, 1, -1, -1, 1, -1, 1, 1]  # SHA-256 of 40 zero bytes begins with 2c


def test_signs_are_balanced() -> None:
    assert abs(signs(b"seed", 10_000).sum()) < 400  # four standard deviations
