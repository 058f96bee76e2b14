"""The first hop: whoever receives devices' updates turns them into integers, and adds.

    hop = plan.first_hop
    one = hop.count_in(update)                  # an aggregate of one
    hop.count_in(update, into=running_sum)      # the same, added at once

An edge needs this record and nothing else of a plan: no model, no transform, no optimizer. It is also the line behind
which nothing a device says is believed: names, shapes, dtypes and magnitudes must be those of the plan.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sumus.aggregate import Aggregate, Part, RunningSum, Update
from sumus.errors import BeyondBoundError, ParticipantError, PlanError
from sumus.fixed_point import FixedPoint
from sumus.spec import record
from sumus.tree import layout
from sumus.types import Tree


@record("first-hop")
@dataclass(frozen=True)
class FirstHop:
    """What of a plan it takes to count updates in.

    parts: what is sent, with its weights.  layouts: (leaf, shape) of each part, as it is sent.  sums: the integers.
    weight_cap: of an explicit `weight` stage, which multiplied on the device; None where the weight multiplies here.
    code_bits: the width of integer codes, None where leaves are floats.  metrics: the names that may come.
    """

    parts: tuple[Part, ...]
    layouts: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]
    sums: FixedPoint
    weight_cap: int | None
    code_bits: int | None
    metrics: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.layouts) != len(self.parts):
            raise PlanError(
                "part-words", f"{len(self.parts)} parts with {len(self.layouts)} layouts: give one for each"
            )
        for part in self.parts:
            if misfit := self.sums.misfit(part):
                raise PlanError("part-fits", misfit)

    @property
    def nbytes(self) -> int:
        """Bytes of a report's body, where its floats have four."""
        coded = 4 if self.code_bits is None else 1 if self.code_bits <= 8 else 2
        return sum(size * (coded if part.in_chain else 4) for part, size in self._sizes())

    def count_in(self, update: Update, into: RunningSum | None = None, staleness: int = 0) -> Aggregate:
        """An update as an aggregate of one; or, added `into` a running sum, that sum so far.

        staleness: how many versions old its model was, for parts that are weighted by it.
        Raises ParticipantError for anything that is not of the plan, DivergedError for NaN; then nothing was added.
        """
        self._check_form(update)
        return self.sums.encode(update, self.parts, self.weight_cap, into, staleness)

    def check(self, update: Update) -> None:
        """Refuse what `count_in` would, adding nothing: for whoever holds updates before they are added."""
        self._check_form(update)
        self.sums.check(update, self.parts)

    def largest(self, part: Part, count: int) -> int:
        """The largest |integer| that a sum of so many updates can hold in a part's leaves."""
        multiplies = self.weight_cap is None or not part.in_chain
        weight = part.largest_weight(self.sums.max_weight) if multiplies else 1
        if part.in_chain and self.code_bits is not None:
            return count * weight * (2 ** (self.code_bits - 1) - 1)
        bound = self.sums.bound if part.bound is None else part.bound
        return count * math.ceil(weight * bound * 2.0 ** self.sums.bits(part))

    def sum_dtype(self, part: Part, count: int) -> np.dtype[np.signedinteger[Any]]:
        """The narrowest integers that hold every sum of so many updates in a part's leaves."""
        largest = self.largest(part, count)
        return next(dtype for dtype in map(np.dtype, ("i1", "i2", "i4", "i8")) if largest <= np.iinfo(dtype).max)

    def sum_nbytes(self, count: int) -> int:
        """Bytes of the leaves of a sum of so many updates."""
        return sum(self.sum_dtype(part, count).itemsize * size for part, size in self._sizes())

    def check_sum(self, total: Aggregate, sender: object, count: int) -> None:
        """Refuse what cannot be a sum of so many updates of this plan."""
        if int(total.count) != count:
            raise ParticipantError(sender, f"its sum is of {int(total.count)} reports, and it names {count}")
        if set(total.sums) != {part.name for part in self.parts} or set(total.metrics) - set(self.metrics):
            raise ParticipantError(
                sender, f"it sums {sorted(total.sums)} and {sorted(total.metrics)}: not of this plan"
            )
        for part, shapes in zip(self.parts, self.layouts, strict=True):
            tree, most = total.sums[part.name], self.largest(part, count)
            if layout(tree) != dict(shapes):
                raise ParticipantError(sender, f"`{part.name}` has other leaves or shapes than the plan's")
            if not 0 <= int(total.weights[part.name]) <= count * self._most_weight(part):
                raise ParticipantError(sender, f"`{part.name}` weighs more than {count} reports can")
            for name, leaf in tree.items():
                if leaf.size and max(-int(leaf.min()), int(leaf.max())) > most:
                    raise BeyondBoundError(sender, f"`{part.name}[{name}]` is beyond what {count} reports add up to")
        most = count * self.sums.most_metric
        if any(max(-int(pair.min()), int(pair.max())) > most or int(pair[1]) < 0 for pair in total.metrics.values()):
            raise BeyondBoundError(sender, f"a metric is beyond what {count} reports add up to")

    def _sizes(self) -> Iterator[tuple[Part, int]]:
        """Numbers of each part, as it is sent."""
        for part, leaves in zip(self.parts, self.layouts, strict=True):
            yield part, sum(math.prod(shape) for _, shape in leaves)

    def _most_weight(self, part: Part) -> int:
        counted = self.sums.max_weight if self.weight_cap is None else max(self.weight_cap, self.sums.max_weight)
        return part.largest_weight(counted)

    def _check_form(self, update: Update) -> None:
        if set(update.parts) != (counted := {part.name for part in self.parts}):
            raise ParticipantError(
                update.client,
                f"it sends {sorted(update.parts)}, and the plan counts {sorted(counted)}: not of this plan",
            )
        if unknown := set(update.metrics) - set(self.metrics):
            raise ParticipantError(update.client, f"it reports {sorted(unknown)}, which the plan does not measure")
        for part, shapes in zip(self.parts, self.layouts, strict=True):
            tree = update.parts[part.name]
            found, expected = layout(tree), dict(shapes)
            if found != expected:
                wrong = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
                raise ParticipantError(
                    update.client,
                    f"`{part.name}[{wrong}]` has shape {found.get(wrong)}, and the plan's is {expected.get(wrong)}",
                )
            self._check_numbers(update.client, part, tree)

    def _check_numbers(self, client: object, part: Part, tree: Tree) -> None:
        codes = self.code_bits if part.in_chain else None
        for name, leaf in tree.items():
            if codes is None:
                if leaf.dtype.kind != "f" or leaf.dtype.itemsize not in (4, 8):
                    raise ParticipantError(client, f"`{part.name}[{name}]` is {leaf.dtype}, and the plan's are floats")
                continue
            largest = 2 ** (codes - 1) - 1
            if leaf.dtype != (np.int8 if codes <= 8 else np.int16):
                raise ParticipantError(
                    client, f"`{part.name}[{name}]` is {leaf.dtype}, and the plan's are {codes}-bit codes"
                )
            if leaf.size and max(-int(leaf.min()), int(leaf.max())) > largest:
                raise ParticipantError(client, f"`{part.name}[{name}]` holds codes beyond ±{largest}: not of this plan")
