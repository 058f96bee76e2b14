"""Bounding what one client can do."""

import math

import numpy as np

from sumus.errors import PlanError
from sumus.spec import registered
from sumus.tree import narrowed, tree_map
from sumus.types import Tree
from sumus.update.transform import Context, Props, Transform

_SLACK = 1 - 2.0**-50
"""More than a quotient and a product can be rounded up by."""


@registered("update/clip_by_global_norm")
def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale an update so that its L2 norm is at most `max_norm`.

        u ← u · min(1, C / ‖u‖₂),   ‖u‖₂² = Σ over all leaves of the part

    The norm is over the whole tree, as differential privacy needs (sensitivity C per client); clipping each leaf on
    its own bounds something else. An update within the bound passes unchanged; a scaled one is rounded towards zero,
    so that the bound holds in the bits that are sent. `invert` is the identity: a sum of clipped updates is what the
    server wants.

    max_norm: C > 0, in units of the parameters.  [McMahan et al. 2018, arXiv:1710.06963, Algorithm 1]
    """
    if not (max_norm > 0 and math.isfinite(max_norm)):
        raise PlanError("positive", f"clip_by_global_norm({max_norm}): the norm must be positive and finite")

    def apply(update: Tree, context: Context) -> Tree:
        norm = global_norm(update)
        if norm <= max_norm:
            return update
        factor = max_norm / norm * _SLACK
        return tree_map(lambda leaf: narrowed(leaf.astype(np.float64) * factor, leaf.dtype), update)

    return Transform(apply=apply, props=Props(clips_to=max_norm))


def global_norm(tree: Tree) -> float:
    """‖tree‖₂, never below the true value and above it by less than 2⁻²⁹ of the largest entry times √size.

    Entries are rounded up to 30-bit integers on a grid set by the largest, and their squares added exactly: no order
    of summation and no language gives another bit.
    """
    largest = max((float(np.max(np.abs(leaf), initial=0.0)) for leaf in tree.values()), default=0.0)
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    grid = 30 - math.frexp(largest)[1]
    total = 0
    for leaf in tree.values():
        whole = np.ceil(np.ldexp(np.abs(leaf, dtype=np.float64), grid)).astype(np.uint64)
        square = whole * whole  # at most 2^60
        high, low = np.sum(square >> np.uint64(32), dtype=np.uint64), np.sum(square & np.uint64(2**32 - 1))
        total += (int(high) << 32) + int(low)
    return math.ldexp(root_rounded_up(total), -grid)


def root_rounded_up(total: int) -> float:
    """√total, exact where it is a whole number, else the next float above."""
    root = math.isqrt(total << 128)  # √total · 2^64, rounded down
    root += root * root < total << 128
    above = float(root)
    return math.ldexp(above if int(above) >= root else math.nextafter(above, math.inf), -64)
