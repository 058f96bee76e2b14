"""Trees of arrays, as one vector and in blocks of it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sumus.tree import blocks, flatten
from sumus.types import Tree

LEAVES = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from([np.float32, np.float64, np.int8])),
    max_size=6,
)


def tree_of(leaves: dict[str, tuple[list[int], type]]) -> Tree:
    count = iter(range(10_000))
    return {
        name: np.array([next(count) % 100 for _ in range(int(np.prod(shape)))], dtype).reshape(shape)
        for name, (shape, dtype) in leaves.items()
    }


@given(LEAVES, st.integers(1, 20))
def test_blocks_are_the_flat_vector_in_pieces(leaves: dict[str, tuple[list[int], type]], most: int) -> None:
    tree = tree_of(leaves)
    vector = flatten(tree)
    at = 0
    for start, arrays in blocks(tree, most):
        block = np.concatenate(arrays)
        assert start == at
        assert 0 < block.size <= most
        assert len({array.dtype for array in arrays}) == 1
        assert np.array_equal(block, vector[start : start + block.size])
        at += block.size
    assert at == vector.size


def test_small_leaves_share_a_block() -> None:
    tree = {"a": np.zeros((2, 3)), "b": np.zeros(0), "c": np.zeros(4), "d": np.zeros(30)}
    assert [(start, [array.size for array in arrays]) for start, arrays in blocks(tree, 16)] == [
        (0, [6, 4]),
        (10, [16]),
        (26, [14]),
    ]
