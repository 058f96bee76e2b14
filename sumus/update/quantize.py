"""Quantization: a transform that sends a few bits for each number of an update."""

import math

import numpy as np

from sumus.errors import PlanError
from sumus.spec import registered
from sumus.tree import size, tree_map
from sumus.types import Array, Tree
from sumus.update.clip import root_rounded_up
from sumus.update.transform import Context, Props, Transform

_DEVIATIONS = 4.5
_LIKELY = 8.0
"""The number of standard deviations by which Σ code² may exceed its mean. One honest update in e^32 exceeds this limit."""


@registered("update/quantize")
def quantize(bits: int = 8, range: float | None = None) -> Transform:
    """Round an update to integer codes without bias: u ← ⌊u/s + r⌋ with r uniform in [0, 1).

    Codes lie in ±(2^(bits−1) − 1); the step s is public. Codes are int8 for up to 8 bits, int16 for up to 16. `invert`
    multiplies the sum of the codes by s. [Suresh et al. 2017, arXiv:1611.00429, section 2.2]

    Args:
        bits: The width of the codes, from 2 to 16.
        range: The largest |u| that has a code; larger values get the outermost code. If it is None, the range is 4.5 ·
            C/√d, which suits an update of d numbers and norm at most C after `rotate`; so the chain must clip and
            rotate before this stage. For a model of a million parameters, one 8-bit range without rotation would have a
            relative error above 2; with rotation, the error is 0.014.
    """
    if not 2 <= bits <= 16:
        raise PlanError("quantize-bits", f"quantize(bits={bits}): give from 2 to 16 bits")
    if range is not None and not (range > 0 and math.isfinite(range)):
        raise PlanError("positive", f"quantize(range={range}): the range must be positive and finite")
    largest = 2 ** (bits - 1) - 1
    dtype = np.int8 if bits <= 8 else np.int16

    def step(context: Context) -> float:
        if range is not None:
            return range / largest
        if context.norm_bound is None:
            raise PlanError("quantize-range", "quantize needs a clip before it, or an explicit range=")
        return _DEVIATIONS * context.norm_bound / math.sqrt(size(context.shapes)) / largest

    def longest(context: Context) -> float | None:
        """Return the root of the largest Σ code² of an update with norm C: the mean (C/s)² + d/4, plus eight standard deviations.

        A code is ⌊x⌋ or ⌊x⌋ + 1 for x = u/s. Its square has a mean of at most x² + 1/4 and a range of at most 2|x| + 1.
        So Σ code² is sub-Gaussian with a deviation of at most C/s + √d/2 [Hoeffding 1963]. A value outside the range
        gets the outermost code, which is smaller.
        """
        if context.norm_bound is None:
            return None
        numbers, length = size(context.shapes), context.norm_bound / step(context)
        likely = length**2 + numbers / 4 + _LIKELY * (length + math.sqrt(numbers) / 2)
        return root_rounded_up(math.floor(min(likely, float(numbers) * largest**2)))

    def apply(update: Tree, context: Context) -> Tree:
        assert context.rng is not None, "stochastic rounding needs the client's randomness"
        rng, unit = context.rng, step(context)

        def code(leaf: Array) -> Array:
            rounded = np.floor(leaf.astype(np.float64) / unit + rng.random(leaf.shape))
            return np.clip(rounded, -largest, largest).astype(dtype)

        return {name: code(update[name]) for name in sorted(update)}

    def invert(total: Tree, context: Context) -> Tree:
        return tree_map(lambda codes: codes * step(context), total)

    def lift(values: Tree, context: Context) -> Tree:
        return tree_map(lambda leaf: leaf / step(context), values)

    return Transform(
        apply=apply,
        invert=invert,
        lift=lift,
        longest=longest,
        unit=step,
        props=Props(keeps_norm=False, code_bits=bits, has_range=range is not None),
    )
