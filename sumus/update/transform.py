"""What happens to an update on its way: a transform has a client end and a server end, and two of them chain.

    chain(clip_by_global_norm(1.0), rotate(), quantize(bits=8))

`apply` runs on the device, on one update. `invert` runs on the server, once, on the *sum* of what devices sent, in reverse
order: so it must be linear. What is not linear on a sum (top-k, a scale per client) is a codec, undone before adding.
`lift` runs on a site, whose own sum was inverted: it gives a sum that `invert` takes for these values.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sumus.errors import PlanError, own_code
from sumus.spec import Value, registered
from sumus.types import Layout, Tree

_GIVES = "it must give a tree of arrays by name, in the shapes of its layout"


@dataclass(frozen=True)
class Context:
    """What a transform may know: nothing about other clients, and on the server nothing about any one.

    shapes: the leaves before this transform.
    seed: public, the same for everyone in the round (rotation).
    norm_bound: an L2 bound that an earlier clip guarantees, or None.
    examples, rng: on the device only; the client's number of examples and its private randomness.
    """

    shapes: Layout
    seed: bytes
    norm_bound: float | None = None
    examples: int = 1
    rng: np.random.Generator | None = None


@dataclass(frozen=True)
class Props:
    """What a transform declares about itself; the legality rules of `sumus.plan` read only this.

    clips_to: the L2 norm that it guarantees.
    keeps_norm: neither its client end nor its server end makes an L2 norm larger. A stage that says nothing may: then no clip
        bounds what one device can do, and a plan for devices is refused.
    mixes: it spreads a norm evenly over coordinates.
    code_bits: its output is integer codes of this width.
    has_range: the codes have an explicit range.
    weight_cap: it multiplies by min(examples, cap) itself.
    buffer_bound: the largest |number| that it leaves in an averaged buffer.
    """

    clips_to: float | None = None
    keeps_norm: bool = False
    mixes: bool = False
    code_bits: int | None = None
    has_range: bool = False
    weight_cap: int | None = None
    buffer_bound: float | None = None


def unchanged(tree: Tree, context: Context) -> Tree:
    """The identity, as a client or a server end."""
    return tree


def same_shapes(shapes: Layout) -> Layout:
    """The layout of a transform that keeps leaves as they are."""
    return shapes


def one_unit(context: Context) -> float:
    """The unit of a transform whose output is in parameters."""
    return 1.0


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Transform(Value):
    """apply(update, context) → update on the device; invert(sum, context) → sum on the server, float64 and linear;
    lift(values, context) → a sum on a site, float64, with invert(lift(values)) = values: nothing is clipped, rounded or drawn.

    layout: the shapes after `apply`, from the shapes before.
    longest: the L2 norm that no output of `apply` exceeds, in units of the output, from `context.norm_bound`; None if
        there is no such norm. If left out, it follows from `props.clips_to` and `props.keeps_norm`.
    unit: what a 1 of the output stands for, in parameters: the factor by which `invert` makes a norm larger, if
        `props.keeps_norm` is False.
    stages: the links of a chain, None where it is none.
    """

    apply: Callable[[Tree, Context], Tree] = unchanged
    invert: Callable[[Tree, Context], Tree] = unchanged
    lift: Callable[[Tree, Context], Tree] = unchanged
    layout: Callable[[Layout], Layout] = same_shapes
    longest: Callable[[Context], float | None] | None = None
    unit: Callable[[Context], float] = one_unit
    props: Props = Props()
    stages: tuple["Transform", ...] | None = None

    @property
    def links(self) -> tuple["Transform", ...]:
        """The stages of a chain, or this one alone."""
        return (self,) if self.stages is None else self.stages

    @property
    def weight_cap(self) -> int | None:
        """The cap of an explicit `weight` stage, if there is one."""
        return next((s.props.weight_cap for s in self.links if s.props.weight_cap is not None), None)

    @property
    def buffer_bound(self) -> float | None:
        """The largest |number| that a device sends in an averaged buffer; None if no stage names one."""
        return min((s.props.buffer_bound for s in self.links if s.props.buffer_bound is not None), default=None)

    @property
    def lifts(self) -> bool:
        """Whether each of its stages that inverts anything can also lift."""
        return all(stage.invert is unchanged or stage.lift is not unchanged for stage in self.links)

    @property
    def code_bits(self) -> int | None:
        """The width of the integer codes that come out, or None for floats."""
        return self.links[-1].props.code_bits if self.links else None

    @property
    def lengthening(self) -> "Transform | None":
        """A stage that may make an update longer without a bound that is known, behind the clip or on the server."""
        clipped = False
        for stage in self.links:
            unknown_at_server = stage.invert is not unchanged and stage.unit is one_unit
            unknown_here = clipped and stage.longest is None and stage.props.clips_to is None
            if not stage.props.keeps_norm and (unknown_at_server or unknown_here):
                return stage
            clipped = clipped or stage.props.clips_to is not None
        return None

    def reach(self, shapes: Layout) -> tuple[float | None, float]:
        """How long an update can be after these stages, and what one unit of that length is in parameters.

        Args:
            shapes: the leaves before the first stage.

        Returns:
            The L2 norm that no honest update exceeds (None if no stage bounds it, or if a stage may lengthen an update without
            saying how far), and the unit: the product of the units of all stages, since the server undoes all of them, those
            before the clip too. 1.0 for floats, the quantization step for integer codes.
        """
        if self.lengthening is not None:
            return None, 1.0
        steps = list(walk(self.links, Context(shapes, b"")))
        reached = steps[-1][2].norm_bound if steps else None
        if reached is None:
            return None, 1.0
        return reached, math.prod(_unit(stage, before) for stage, before, _ in steps)


def laid_out(transform: Transform, shapes: Layout) -> Layout:
    """The shapes after a transform."""
    with own_code("layout", transform, "it must give the shapes after apply, from the shapes before"):
        return transform.layout(shapes)


def walk(stages: Sequence[Transform], context: Context) -> Iterator[tuple[Transform, Context, Context]]:
    """Each stage with the context before it and the context after it."""
    for stage in stages:
        after = dataclasses.replace(
            context, shapes=laid_out(stage, context.shapes), norm_bound=_longest(stage, context)
        )
        yield stage, context, after
        context = after


def _unit(stage: Transform, context: Context) -> float:
    """What a 1 of a stage's output stands for, in parameters."""
    with own_code("unit", stage, "it must give a number"):
        return stage.unit(context)


def _longest(stage: Transform, context: Context) -> float | None:
    """The L2 norm that no output of a stage exceeds, in units of the output; None if there is no such norm."""
    if stage.longest is not None:
        with own_code("longest", stage, "it must give a number, or None"):
            return stage.longest(context)
    kept = context.norm_bound if stage.props.keeps_norm else None
    return min((limit for limit in (kept, stage.props.clips_to) if limit is not None), default=None)


@registered("update/chain")
def chain(*transforms: Transform) -> Transform:
    """One transform that applies these in order, and inverts them in reverse. `chain()` is the identity."""
    stages = tuple(stage for transform in transforms for stage in transform.links)
    for stage in stages[:-1]:
        if stage.props.code_bits is not None:
            raise PlanError("quantize-last", f"{stage!r} makes integer codes; put it last in the chain")

    def apply(update: Tree, context: Context) -> Tree:
        for stage, own, _ in walk(stages, context):
            with own_code("apply", stage, _GIVES):
                update = stage.apply(update, own)
        return update

    def invert(total: Tree, context: Context) -> Tree:
        for stage, own, _ in reversed(list(walk(stages, context))):
            with own_code("invert", stage, _GIVES):
                total = stage.invert(total, own)
        return total

    def lift(values: Tree, context: Context) -> Tree:
        for stage, own, _ in walk(stages, context):
            with own_code("lift", stage, _GIVES):
                values = stage.lift(values, own)
        return values

    def layout(shapes: Layout) -> Layout:
        for stage in stages:
            shapes = laid_out(stage, shapes)
        return shapes

    return Transform(apply=apply, invert=invert, lift=lift, layout=layout, stages=stages)
