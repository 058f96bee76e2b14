"""Transforms: functions that change an update before it is sent, and undo this on the sum. Transforms can be chained.

    chain(clip_by_global_norm(1.0), rotate(), quantize(bits=8))

A transform consists of three functions:

- `apply` runs on the device, on one update.
- `invert` runs on the server, once, on the *sum* of the devices' updates. In a chain, the stages are inverted in
  reverse order. `invert` must be linear. A change that is not linear on a sum (top-k, or a scale for each client)
  cannot be a transform; it is a codec, and is undone before updates are added.
- `lift` runs on a site (an edge that runs rounds of its own), which has already inverted the sums of its devices. From the
  result, it makes a sum that the server can invert.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sumus.errors import PlanError, own_code
from sumus.spec import Value, registered
from sumus.types import Layout, Tree

_GIVES = "it must return a tree of arrays by name, in the shapes of its layout"


@dataclass(frozen=True)
class Context:
    """The information that a transform receives. It contains nothing about other clients; on the server, about no client.

    Attributes:
        shapes: The shapes of the leaves before this transform.
        seed: The round's public seed, the same for all clients of the round (`rotate` uses it).
        norm_bound: The L2 norm that an earlier clip guarantees; None if there is no such clip.
        examples: The client's number of examples. On the device only.
        rng: The client's private randomness. On the device only.
    """

    shapes: Layout
    seed: bytes
    norm_bound: float | None = None
    examples: int = 1
    rng: np.random.Generator | None = None


@dataclass(frozen=True)
class Props:
    """The properties that a transform declares. The rules of `sumus.plan` read only these properties.

    Attributes:
        clips_to: The L2 norm that the transform guarantees.
        keeps_norm: Neither `apply` nor `invert` makes an L2 norm larger. If this is False and the transform gives no
            other bound, no clip bounds what one device can do, and a plan for devices is refused.
        mixes: The transform spreads a norm evenly over the coordinates.
        code_bits: The width of the integer codes that it makes; None if it makes floats.
        has_range: The codes have an explicit range.
        weight_cap: The transform itself multiplies by min(examples, cap); this is the cap.
        buffer_bound: The largest absolute value that it leaves in an averaged buffer.
    """

    clips_to: float | None = None
    keeps_norm: bool = False
    mixes: bool = False
    code_bits: int | None = None
    has_range: bool = False
    weight_cap: int | None = None
    buffer_bound: float | None = None


def unchanged(tree: Tree, context: Context) -> Tree:
    """Return the tree: the identity, as an `apply`, `invert` or `lift`."""
    return tree


def same_shapes(shapes: Layout) -> Layout:
    """Return the shapes: the layout of a transform that does not change them."""
    return shapes


def one_unit(context: Context) -> float:
    """Return 1: the unit of a transform whose output is in parameters."""
    return 1.0


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Transform(Value):
    """A stage that changes updates, as a set of pure functions.

    Attributes:
        apply: (update, context) → update. Runs on the device.
        invert: (sum, context) → sum, in float64. Runs on the server, and is linear.
        lift: (values, context) → sum, in float64, with invert(lift(values)) = values. Runs on a site, and neither clips
            nor rounds, and uses no randomness.
        layout: (shapes before `apply`) → shapes after it.
        longest: (context) → the L2 norm that no output of `apply` exceeds, in units of the output, given
            `context.norm_bound`; None if there is no such norm. If this field is left out, the norm follows from
            `props.clips_to` and `props.keeps_norm`.
        unit: (context) → the value, in parameters, of a 1 in the output. This is the factor by which `invert` makes a
            norm larger, if `props.keeps_norm` is False.
        props: The properties that the transform declares.
        stages: The stages of a chain; None if this is not a chain.
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
        """The stages of a chain; for any other transform, the transform alone."""
        return (self,) if self.stages is None else self.stages

    @property
    def weight_cap(self) -> int | None:
        """The cap of the `weight` stage; None if there is none."""
        return next((s.props.weight_cap for s in self.links if s.props.weight_cap is not None), None)

    @property
    def buffer_bound(self) -> float | None:
        """The largest absolute value that a device sends in an averaged buffer; None if no stage bounds it."""
        return min((s.props.buffer_bound for s in self.links if s.props.buffer_bound is not None), default=None)

    @property
    def lifts(self) -> bool:
        """Whether each stage that inverts anything can also lift."""
        return all(stage.invert is unchanged or stage.lift is not unchanged for stage in self.links)

    @property
    def code_bits(self) -> int | None:
        """The width of the integer codes that come out; None for floats."""
        return self.links[-1].props.code_bits if self.links else None

    @property
    def lengthening(self) -> "Transform | None":
        """The first stage, after the clip or on the server, that may increase a norm by an unknown factor; None if none does."""
        clipped = False
        for stage in self.links:
            unknown_at_server = stage.invert is not unchanged and stage.unit is one_unit
            unknown_here = clipped and stage.longest is None and stage.props.clips_to is None
            if not stage.props.keeps_norm and (unknown_at_server or unknown_here):
                return stage
            clipped = clipped or stage.props.clips_to is not None
        return None

    def reach(self, shapes: Layout) -> tuple[float | None, float]:
        """Return the largest norm of an update after these stages, and the value of one unit of that norm in parameters.

        Args:
            shapes: The shapes of the leaves before the first stage.

        Returns:
            The L2 norm that no honest update exceeds; None if no stage bounds it, or if a stage may increase a norm by
            an unknown factor. And the unit: the product of the units of all stages, including those before the clip,
            since the server undoes all of them. It is 1.0 for floats, and the quantization step for integer codes.
        """
        if self.lengthening is not None:
            return None, 1.0
        steps = list(walk(self.links, Context(shapes, b"")))
        reached = steps[-1][2].norm_bound if steps else None
        if reached is None:
            return None, 1.0
        return reached, math.prod(_unit(stage, before) for stage, before, _ in steps)


def laid_out(transform: Transform, shapes: Layout) -> Layout:
    """Return the shapes after a transform."""
    with own_code("layout", transform, "it must return the shapes after apply, from the shapes before"):
        return transform.layout(shapes)


def walk(stages: Sequence[Transform], context: Context) -> Iterator[tuple[Transform, Context, Context]]:
    """Yield each stage with the context before it and the context after it."""
    for stage in stages:
        after = dataclasses.replace(
            context, shapes=laid_out(stage, context.shapes), norm_bound=_longest(stage, context)
        )
        yield stage, context, after
        context = after


def _unit(stage: Transform, context: Context) -> float:
    """Return the value, in parameters, of a 1 in a stage's output."""
    with own_code("unit", stage, "it must return a number"):
        return stage.unit(context)


def _longest(stage: Transform, context: Context) -> float | None:
    """Return the L2 norm that no output of a stage exceeds, in units of the output; None if there is no such norm."""
    if stage.longest is not None:
        with own_code("longest", stage, "it must return a number, or None"):
            return stage.longest(context)
    kept = context.norm_bound if stage.props.keeps_norm else None
    return min((limit for limit in (kept, stage.props.clips_to) if limit is not None), default=None)


@registered("update/chain")
def chain(*transforms: Transform) -> Transform:
    """Make one transform that applies these transforms in order, and inverts them in reverse order. `chain()` is the identity."""
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
