"""Rotation: a transform that spreads an update evenly over its coordinates, so that one narrow range suits all of them."""

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
    """Rotate an update by random signs and a Hadamard matrix: u ← (1/√n) H D u.

    The signs D come from the round's public seed; then a Walsh–Hadamard transform H is applied in blocks of n numbers.
    The block size is a power of four, so that 1/√n is exact, and at most 4096. Each block takes every k-th coordinate
    of the update, so that it holds a share of each layer. All leaves become one vector `rotated`, padded to whole
    blocks. The server undoes the rotation on the sum. L2 norms do not change. [Suresh et al. 2017, arXiv:1611.00429,
    section 3]

    The update is first rounded to 40-bit integers on a grid that its largest entry sets. The transform of such integers
    is exact in float64 in any order of operations, so matrix products, butterflies and other languages give the same
    bits.
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
    """Return the block size and the number of blocks for these leaves."""
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
    """Apply H to each row by two matrix products of side √n, since H(n) = H(√n) ⊗ H(√n). This is exact on 40-bit integers."""
    side = math.isqrt(rows.shape[1])
    small = _sylvester(side)
    squares = rows.reshape(-1, side, side)
    return (small @ squares @ small).reshape(rows.shape)


def _hadamard_by_butterflies(rows: Array) -> Array:
    """Apply H to each row by log₂ n passes of sums and differences in a fixed order, for sums that are too wide to be exact."""
    half = 1
    while half < rows.shape[1]:
        pairs = rows.reshape(len(rows), -1, 2, half)
        rows = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        half *= 2
        rows = rows.reshape(len(pairs), -1)
    return rows
