"""Weighting on the device, before the clip."""

from typing import Literal

from sumus.errors import PlanError
from sumus.spec import registered
from sumus.tree import tree_map
from sumus.types import Tree
from sumus.update.transform import Context, Props, Transform


@registered("update/weight")
def weight(cap: int, by: Literal["examples"] = "examples") -> Transform:
    """u ← u · min(examples, cap), on the device: Σ clip(w·Δ) / Σ w.

    Without this stage the weight multiplies at the first hop, after the chain: Σ w·clip(Δ) / Σ w, where the sensitivity
    to one client is cap · C. With it, and the clip after it, it is C.
    """
    if cap < 1:
        raise PlanError("positive", f"weight(cap={cap}): the cap must be at least 1")

    def apply(update: Tree, context: Context) -> Tree:
        factor = min(context.examples, cap)
        return tree_map(lambda leaf: leaf * leaf.dtype.type(factor), update)

    return Transform(apply=apply, props=Props(keeps_norm=False, weight_cap=cap))
