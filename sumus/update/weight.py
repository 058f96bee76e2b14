"""Weighting: a transform that multiplies an update by the client's number of examples, on the device, before the clip."""

from typing import Literal

from sumus.errors import PlanError
from sumus.spec import registered
from sumus.tree import tree_map
from sumus.types import Tree
from sumus.update.transform import Context, Props, Transform


@registered("update/weight")
def weight(cap: int, by: Literal["examples"] = "examples") -> Transform:
    """Multiply an update by the client's weight on the device: u ← u · min(examples, cap). The mean is Σ clip(w·Δ) / Σ w.

    Without this stage, the first hop multiplies by the weight, after the chain: the mean is Σ w·clip(Δ) / Σ w, and the
    sum's sensitivity to one client is cap · C. With this stage followed by the clip, the sensitivity is C.

    Args:
        cap: The largest number of examples that counts, at least 1.
        by: The quantity to weight by. Only "examples", the number of examples, is possible.
    """
    if cap < 1:
        raise PlanError("positive", f"weight(cap={cap}): the cap must be at least 1")

    def apply(update: Tree, context: Context) -> Tree:
        factor = min(context.examples, cap)
        return tree_map(lambda leaf: leaf * leaf.dtype.type(factor), update)

    return Transform(apply=apply, props=Props(keeps_norm=False, weight_cap=cap))
