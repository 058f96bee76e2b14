"""Clipping: transforms that bound how far one client can move the model or an averaged buffer."""

import math

import numpy as np

from sumus.errors import PlanError, expect_number
from sumus.spec import registered
from sumus.tree import narrowed, tree_map
from sumus.types import Tree
from sumus.update.transform import Context, Props, Transform

_SLACK = 1 - 2.0**-50
"""Just below 1, so that the roundings of a quotient and a product cannot exceed the bound."""


@registered("update/clip_by_global_norm")
def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale an update so that its L2 norm is at most `max_norm`.

        u ← u · min(1, C / ‖u‖₂),   ‖u‖₂² = Σ over all leaves of the part

    The norm is over the whole tree, as differential privacy needs (sensitivity C per client). If each leaf were clipped
    to its own bound, this norm could exceed C. An update within the bound is not changed. A scaled update is rounded
    towards zero, so that the bound also holds for the bits that are sent. `invert` is the identity, since the server
    wants the sum of the clipped updates. [McMahan et al. 2018, arXiv:1710.06963, Algorithm 1]

    Args:
        max_norm: C > 0, in units of the parameters.
    """
    if not (max_norm > 0 and math.isfinite(max_norm)):
        raise PlanError("positive", f"clip_by_global_norm({max_norm}): the norm must be positive and finite")

    def apply(update: Tree, context: Context) -> Tree:
        norm = global_norm(update)
        if norm <= max_norm:
            return update
        factor = max_norm / norm * _SLACK
        return tree_map(lambda leaf: narrowed(leaf.astype(np.float64) * factor, leaf.dtype), update)

    return Transform(apply=apply, props=Props(clips_to=max_norm, keeps_norm=True))


@registered("update/clip_buffers")
def clip_buffers(max_value: float) -> Transform:
    """Clip each number by which a device moves an averaged buffer to ±`max_value`.

    Averaged buffers (the running means and variances of BatchNorm) do not pass through the chain, so no other stage
    changes them. A device clips each number on its own, and the first hop refuses a larger number. Other parts are not
    changed.

    Args:
        max_value: The bound, > 0, in units of the buffer. It is rounded down to single precision.
    """
    bound = in_single(max_value, "clip_buffers(max_value=)")
    return Transform(props=Props(keeps_norm=True, buffer_bound=bound))


def in_single(bound: float, what: str) -> float:
    """Round a bound down to single precision, so that a float32 that is clipped to the bound is never rounded beyond it.

    Args:
        bound: The bound.
        what: The bound's name, for errors.

    Raises:
        PlanError: The bound is not positive and finite in single precision.
    """
    expect_number(bound, 0, float(np.finfo(np.float32).max), what, open_low=True)
    rounded = float(narrowed(np.asarray(bound, np.float64), np.dtype(np.float32)))
    if rounded == 0:
        raise PlanError("positive", f"{what}={bound}: it must be positive in single precision")
    return rounded


def held_within(tree: Tree, bound: float) -> Tree:
    """Clip each number of a tree to ±`bound`, which must be exact in single precision."""
    return tree_map(lambda leaf: np.clip(leaf, -bound, bound), tree)


def global_norm(tree: Tree) -> float:
    """Compute ‖tree‖₂, rounded up: never below the true value, and above it by less than 2⁻²⁹ times the largest entry
    times √size.

    Entries are rounded up to 30-bit integers on a grid that the largest entry sets, and the squares are added exactly.
    The result therefore has the same bits in any order of summation and in any language.
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
    """Compute √total: exactly if it is a whole number, else the next larger float."""
    root = math.isqrt(total << 128)  # √total · 2^64, rounded down
    root += root * root < total << 128
    above = float(root)
    return math.ldexp(above if int(above) >= root else math.nextafter(above, math.inf), -64)
