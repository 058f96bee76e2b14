"""Spreading an update evenly, so that one narrow range fits every coordinate."""

import math

import numpy as np

from sumus.rng import signs
from sumus.spec import registered
from sumus.tree import flatten, size, unflatten
from sumus.types import Array, Floats, Layout, Tree
from sumus.update.transform import Context, Props, Transform

ROTATED = "rotated"
_LARGEST_BLOCK = 4096


@registered("update/rotate")
def rotate() -> Transform:
    """u ← (1/√n) H D u: random signs D from the round's public seed, then Walsh–Hadamard in blocks.

    A block is a power of four (so 1/√n is exact), at most 4096, and takes every k-th coordinate of the update, so that
    each block holds a share of each layer. All leaves become one vector `rotated`, padded to whole blocks. The server
    undoes it on the sum. Norms are kept. [Suresh et al. 2017, arXiv:1611.00429, section 3]

    The update is first rounded to 40-bit integers on a grid set by its largest entry; their transform is exact in
    float64 whatever the order, hence the same bits from BLAS, from butterflies and from another language.
    """

    def apply(update: Tree, context: Context) -> Tree:
        block, blocks = _blocks(context.shapes)
        vector = flatten(update).astype(np.float64)
        largest = float(np.max(np.abs(vector), initial=0.0))
        grid = 40 - math.frexp(largest)[1] if largest and math.isfinite(largest) else 0
        padded = np.zeros(block * blocks)
        padded[: vector.size] = np.rint(np.ldexp(vector, grid))
        padded *= signs(context.seed, padded.size)
        rotated = _hadamard_by_matrix(padded.reshape(block, blocks).T)
        return {ROTATED: np.ldexp(rotated.reshape(-1), -grid - _log2(block) // 2)}

    def invert(total: Tree, context: Context) -> Tree:
        block, blocks = _blocks(context.shapes)
        columns = _hadamard_by_butterflies(total[ROTATED].reshape(blocks, block)) / math.isqrt(block)
        vector = columns.T.reshape(-1) * signs(context.seed, block * blocks)
        return unflatten(vector[: size(context.shapes)], context.shapes)

    def layout(shapes: Layout) -> Layout:
        block, blocks = _blocks(shapes)
        return {ROTATED: (block * blocks,)}

    return Transform(apply=apply, invert=invert, lift=apply, layout=layout, props=Props(keeps_norm=True, mixes=True))


def _blocks(shapes: Layout) -> tuple[int, int]:
    """The block length and the number of blocks for these leaves."""
    count, block = max(size(shapes), 1), 1
    while block < min(count, _LARGEST_BLOCK):
        block *= 4
    return block, -(-count // block)


def _log2(power: int) -> int:
    return power.bit_length() - 1


def _sylvester(order: int) -> Floats:
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _hadamard_by_matrix(rows: Array) -> Array:
    """H applied to each row: two matrix products of side √n, since H(n) = H(√n) ⊗ H(√n). Exact on 40-bit integers."""
    side = math.isqrt(rows.shape[1])
    small = _sylvester(side)
    squares = rows.reshape(-1, side, side)
    return (small @ squares @ small).reshape(rows.shape)


def _hadamard_by_butterflies(rows: Array) -> Array:
    """The same by log₂ n passes of sums and differences in a fixed order, for sums too wide to be exact."""
    half = 1
    while half < rows.shape[1]:
        pairs = rows.reshape(len(rows), -1, 2, half)
        rows = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        half *= 2
        rows = rows.reshape(len(pairs), -1)
    return rows
