"""Turn floats into integers at the first hop, so that a plan's sums never overflow and never round.

    sums = FixedPoint.fit(max_count=64)                  # as precise as 64 bits allow for 64 clients
    one = sums.encode(update, parts)                     # an aggregate of one
    values = sums.decode(part, total.sums[part.name])    # the server's end

The first hop is the process that receives a device's floats or codes: an edge, the server, or the simulator. After it, all
values are integers, and their sum has the same bits in any order.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sumus.aggregate import METRIC_BITS, Aggregate, Part, RunningSum, Update, views, zeros
from sumus.errors import BeyondBoundError, DivergedError, EmptyError, ParticipantError, PlanError
from sumus.spec import record
from sumus.staleness import Staleness
from sumus.tree import blocks, tree_map
from sumus.types import Array, Tree, hold_plain_numbers

_BLOCK = 1 << 16
_SHIFT = np.float64(1.5 * 2.0**52)


@record("sums/fixed-point")
@dataclass(frozen=True)
class FixedPoint:
    """The rule that turns floats into integers: a value u with weight w is added as rint(u · w · 2^f). 64 bits hold every sum.

    The constructor refuses limits unless max_count · max_weight · U · 2^f < 2^62.

    Attributes:
        fraction_bits: f.
        bound: U, the largest |u| that is accepted.
        max_weight: The largest integer weight.
        max_count: The largest number of contributors to one sum.
    """

    fraction_bits: int
    bound: float
    max_weight: int
    max_count: int

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        positive = 0 < self.bound < math.inf and self.max_weight >= 1 and self.max_count >= 1
        if not (positive and self.fraction_bits >= 0):
            raise PlanError(
                "positive",
                f"{self}: bound, max_weight and max_count must be positive and finite, and fraction_bits not negative",
            )
        object.__setattr__(self, "bound", float(self.bound))
        reach = math.log2(self.bound) + math.log2(self.max_weight) + math.log2(self.max_count) + self.fraction_bits
        limits = Fraction(self.bound) * self.max_weight * self.max_count
        if reach > 63 or not limits * 2**self.fraction_bits < 2**62:  # the first check keeps this power small
            raise PlanError(
                "sum-overflow",
                f"a sum of {self.max_count} clients with weights up to {self.max_weight}, values up to {self.bound:g} and "
                f"{self.fraction_bits} fraction bits can reach 2^{reach:.1f}, but must stay below 2^62: lower one of these",
            )

    @classmethod
    def fit(cls, max_count: int, max_weight: int = 2**16, bound: float = 2.0**8) -> "FixedPoint":
        """Make the rule with as many fraction bits as the overflow rule allows for these limits, at most 40."""
        return cls(max(0, _most_bits(max_count, max_weight, bound)), bound, max_weight, max_count)

    def encode(
        self,
        update: Update,
        parts: tuple[Part, ...],
        weighted: int | None = None,
        into: RunningSum | None = None,
        staleness: int = 0,
    ) -> Aggregate:
        """Check an update, and turn it into an aggregate of one. See `encode_checked` for the arguments.

        Raises:
            EmptyError: The update has no examples.
            ParticipantError: A value is not finite, or exceeds the bound.
            DivergedError: A value is NaN.
        """
        return self.encode_checked(update, parts, self.check(update, parts), weighted, into, staleness)

    def encode_checked(
        self,
        update: Update,
        parts: tuple[Part, ...],
        reaches: Sequence[float],
        weighted: int | None = None,
        into: RunningSum | None = None,
        staleness: int = 0,
    ) -> Aggregate:
        """Turn an update that `check` has accepted into an aggregate of one, or add it to a running sum.

        Args:
            update: The update.
            parts: The parts that are added.
            reaches: The largest |value| of each part, as `check` returned them.
            weighted: The cap of an explicit `weight` stage that the device has already applied; the weight of leaves is then
                only counted here. None to multiply by the weight here.
            into: The running sum to add to, without any intermediate array; None for an aggregate of one.
            staleness: How many versions old the model was that the client trained on.

        Returns:
            The aggregate of one; or the running sum so far.
        """
        trees = {part.name: update.parts[part.name] for part in parts}
        multiplies = {part.name: weighted is None or not part.in_chain for part in parts}
        counted = self.max_weight if weighted is None else weighted
        here = min(counted, self.max_weight)  # the overflow rule limits only weights that are multiplied here
        weights = {p.name: p.weigh(update.examples, here if multiplies[p.name] else counted, staleness) for p in parts}
        metrics = {name: self._metric(value, count) for name, (value, count) in update.metrics.items()}
        vectors = zeros(trees) if into is None else into.vectors_for(trees)
        one = Aggregate(
            views(vectors, trees) if into is None else {},
            {name: np.array(weight, np.int64) for name, weight in weights.items()},
            np.array(1, np.int64),
            metrics,
        )
        for part, reach in zip(parts, reaches, strict=True):
            factor = weights[part.name] if multiplies[part.name] else 1
            scale = math.ldexp(float(factor), self.bits(part))
            _add(trees[part.name], factor, scale, reach, vectors[part.name])
        if into is None:
            return one
        into.add_counts(one)
        return into.total

    def check(self, update: Update, parts: tuple[Part, ...]) -> list[float]:
        """Refuse an update that cannot be added.

        Returns:
            The largest |value| of each part.

        Raises:
            EmptyError: The update has no examples.
            ParticipantError: A value is not finite, or exceeds the bound.
            DivergedError: A value is NaN.
        """
        if update.examples < 1:
            raise EmptyError(
                update.client,
                f"its update was trained on {update.examples} examples: a client without examples cannot contribute, "
                "whatever weights the plan uses",
            )
        if missing := {part.name for part in parts} - set(update.parts):
            raise ParticipantError(update.client, f"it sends no {sorted(missing)}, which the plan's algorithm combines")
        return [self._reach(update.client, part, update.parts[part.name]) for part in parts]

    def bits(self, part: Part) -> int:
        """Return the fraction bits of a part: f, or fewer if the part has its own bound and that bound leaves fewer.

        The number is negative if the bound leaves no fraction bits.
        """
        if part.bound is None:
            return self.fraction_bits
        return min(self.fraction_bits, _most_bits(self.max_count, self.max_weight, part.bound))

    def misfit(self, part: Part) -> str | None:
        """Return why sums of this part could overflow, and what to do about it; None if they cannot overflow."""
        if self.bits(part) < 0:
            return (
                f"part {part.name!r} with values up to {part.bound:g} leaves no bits for sums of {self.max_count} clients with "
                f"weights up to {self.max_weight}: lower its bound, the cohort, or max_weight of the sums"
            )
        if isinstance(part.weight, Staleness) and part.largest_weight(1) > self.max_weight:
            return (
                f"part {part.name!r} weighs up to {part.largest_weight(1)}, but the sums are planned for weights up to "
                f"{self.max_weight}: give FixedPoint.fit(..., max_weight={part.largest_weight(1)}), or leave sums out"
            )
        return None

    def decode(self, part: Part, sums: Tree) -> dict[str, Array]:
        """Turn a part's integer sums into float64 by dividing them by 2^f."""
        bits = self.bits(part)
        return tree_map(lambda leaf: np.ldexp(leaf.astype(np.float64), -bits), sums)

    def _reach(self, client: object, part: Part, tree: Tree) -> float:
        """Find the largest |value| of a part.

        Raises:
            ParticipantError: The value exceeds the bound.
            DivergedError: A value is NaN.
        """
        largest = 0.0
        for _, arrays in blocks(tree, _BLOCK):
            block = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            reach = max(-float(block.min()), float(block.max()))
            if not reach <= self._limit(part, block.dtype):
                raise self._refusal(client, part, tree)
            largest = max(largest, reach)
        return largest

    def _limit(self, part: Part, dtype: np.dtype[Any]) -> float:
        """Return the largest |value| that is accepted; for codes, the largest that a sum can hold."""
        if dtype.kind == "i":
            return self.bound * 2.0**self.fraction_bits
        return self.bound if part.bound is None else part.bound

    def _refusal(self, client: object, part: Part, tree: Tree) -> ParticipantError:
        """Return the error for the first leaf that is not accepted."""
        for name, leaf in tree.items():
            reach = max(-float(leaf.min()), float(leaf.max())) if leaf.size else 0.0
            limit = self._limit(part, leaf.dtype)
            if reach <= limit:
                continue
            if leaf.dtype.kind == "i":
                said = f"the codes reach {reach:.0f} at `{part.name}[{name}]`, but a sum of the plan holds "
                return BeyondBoundError(client, f"{said}{self.bound:g}·2^{self.fraction_bits}")
            if not math.isfinite(reach):
                return DivergedError(client, part.name, name)
            said = f"the update reaches {reach:g} at `{part.name}[{name}]`, beyond the "
            if part.bound is None:
                said += f"plan's bound {limit:g}; lower the learning rate, clip the update, or raise the bound: "
                return BeyondBoundError(client, said + "Plan(sums=FixedPoint.fit(..., bound=))")
            said += f"bound {limit:g} of that part; "
            if part.content == "scalar":
                said += "raise that bound where the algorithm is made (fednova(most_steps=), Part(bound=))"
            else:
                said += "clip it on the device, as the plan says; or lower the learning rate, or scale the inputs"
            return BeyondBoundError(client, said)
        raise AssertionError("a block reaches further than every leaf")

    @property
    def most_metric(self) -> int:
        """The largest |integer| that one report adds to a metric."""
        return 2**61 // self.max_count

    def _metric(self, value: float, count: int) -> NDArray[np.int64]:
        """Turn a metric into integers: (value · 2^20, count), limited so that no sum of `max_count` overflows.

        A value that is not finite adds nothing.
        """
        if not math.isfinite(value):
            return np.zeros(2, np.int64)
        limit = self.most_metric
        whole = round(min(max(value * 2**METRIC_BITS, -limit), limit))
        return np.array([whole, min(max(count, 0), limit)], np.int64)


def _add(tree: Tree, factor: int, scale: float, reach: float, into: Array) -> None:
    """Add rint(values · scale), or codes · factor, to a vector, in blocks that stay in the cache.

    Adding 1.5 · 2^52 to a float64 below 2^51 rounds it, half to even like rint, and leaves the rounded number in the low
    bits. So no conversion and no intermediate array is needed.

    Args:
        tree: The values or codes.
        factor: The factor on codes.
        scale: The factor on values.
        reach: The largest |value|.
        into: The vector.
    """
    room = np.empty(min(into.size, _BLOCK))
    small = reach * scale < 2.0**51
    for start, arrays in blocks(tree, _BLOCK):
        if arrays[0].dtype.kind == "i":
            whole = np.concatenate(arrays).astype(np.int64) * factor
        else:
            floats = np.concatenate(arrays, out=room[: sum(array.size for array in arrays)])
            floats *= scale
            if small:
                floats += _SHIFT
                whole = floats.view(np.int64)
                whole -= _SHIFT.view(np.int64)
            else:
                whole = np.rint(floats).astype(np.int64)
        into[start : start + whole.size] += whole


@functools.cache
def _most_bits(max_count: int, max_weight: int, bound: float) -> int:
    """Compute how many fraction bits the overflow rule allows, at most 40; negative if it allows none."""
    reach = Fraction(bound) * max_weight * max_count
    bits = 40
    while bits >= 0 and not reach * 2**bits < 2**62:
        bits -= 1
    return bits
