"""The first hop: the process that receives the devices' updates, turns them into integers, and adds them.

    hop = plan.first_hop
    one = hop.count_in(update)                  # an aggregate of one
    hop.count_in(update, into=running_sum)      # the same, but added to a running sum at once

    checked = hop.check(update)                 # the same in two steps: check on any thread,
    checked.count_in(running_sum)               # then add on one thread, without checking again

An edge needs only this record from a plan: no model, no transform, no optimizer. The hop trusts nothing that a device sends.
Names, shapes, dtypes and magnitudes must be those of the plan. The norm of an update may not exceed the plan's clip,
and a client's weight may not exceed the plan's cap.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, cast

import numpy as np

from sumus.aggregate import METRIC_BITS, Aggregate, Part, RunningSum, Update
from sumus.errors import (
    BeyondBoundError,
    DivergedError,
    EmptyError,
    ParticipantError,
    PlanError,
    check_shape,
    expect,
    expect_number,
)
from sumus.fixed_point import FixedPoint
from sumus.metrics import Range
from sumus.spec import build, canonical_json, read_as, record, to_json
from sumus.tree import blocks, layout, tree_map
from sumus.types import Tree

LONGEST = 1e100
"""The largest norm that a part may have. Its square is still a finite float."""
SLACK = 2.0**-24
"""The relative amount by which rounding may increase a norm: in a rotation, or in a clip that is written in another language."""
_BLOCK = 1 << 16


@record("first-hop")
@dataclass(frozen=True)
class FirstHop:
    """The part of a plan that is needed to check updates and to add them.

    Attributes:
        parts: The parts that are sent, with their weights.
        layouts: The (leaf, shape) pairs of each part, as it is sent.
        sums: The rule that turns floats into integers.
        weight_cap: The cap of the plan's `weight` stage, in which devices multiply by their weights; None if there is no
            such stage and the first hop multiplies.
        code_bits: The width of integer codes; None if leaves are floats.
        metrics: The names of the metrics that a report may contain.
        norms: For each part, the largest L2 norm that may be sent, in parameters or codes; None for a part without a limit.
            Empty if no part has a limit.
        ranges: For each metric, the range of its mean. Empty if no range is known.
        metric_cap: The largest number of predictions that counts in a client's metrics; None for any number.
        rounds: The number of an edge's own rounds that its sum covers, and by which the largest norm of the sum is multiplied.
    """

    parts: tuple[Part, ...]
    layouts: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]
    sums: FixedPoint
    weight_cap: int | None
    code_bits: int | None
    metrics: tuple[str, ...]
    norms: tuple[float | None, ...] = ()
    ranges: tuple[Range, ...] = ()
    metric_cap: int | None = None
    rounds: int = 1

    @staticmethod
    def from_json(text: str) -> "FirstHop":
        """Read the hop that a server sends to its edges.

        Raises:
            PlanError: The text is not a first hop.
        """
        with read_as("a first hop"):
            hop: object = build(json.loads(text))
            expect(hop, FirstHop, "the hop of a task")
            canonical_json(to_json(hop)).encode()  # refuses infinite numbers, and text that is not Unicode
            return cast(FirstHop, hop)

    def __post_init__(self) -> None:
        if self.code_bits is not None and not 2 <= self.code_bits <= 16:
            raise PlanError("quantize-bits", f"codes of {self.code_bits} bits: give from 2 to 16 bits")
        for what, least in (("weight_cap", self.weight_cap), ("metric_cap", self.metric_cap), ("rounds", self.rounds)):
            if least is not None and least < 1:
                raise PlanError("positive", f"{what}={least}: it must be at least 1")
        for norm in self.norms:
            if norm is not None:
                expect_number(norm, 0, LONGEST, "the largest norm of a part")
        for shape in (shape for leaves in self.layouts for _, shape in leaves):
            check_shape(shape)
        for what, given, wanted in (
            ("layouts", self.layouts, {len(self.parts)}),
            ("norms", self.norms, {0, len(self.parts)}),
            ("ranges", self.ranges, {0, len(self.metrics)}),
        ):
            if len(given) not in wanted:
                raise PlanError(
                    "part-words",
                    f"{len(given)} {what}, but {max(wanted)} are needed: one for each part (ranges: each metric)",
                )
        for part in self.parts:
            if misfit := self.sums.misfit(part):
                raise PlanError("part-fits", misfit)
            self.sum_dtype(part, self.sums.max_count)

    @property
    def nbytes(self) -> int:
        """The size of a report's body in bytes, if its floats have four bytes."""
        coded = 4 if self.code_bits is None else 1 if self.code_bits <= 8 else 2
        return sum(size * (coded if part.in_chain else 4) for part, size in self._sizes())

    def count_in(self, update: Update, into: RunningSum | None = None, staleness: int = 0) -> Aggregate:
        """Check an update and add it: `check`, followed by `CheckedUpdate.count_in`."""
        return self.check(update).count_in(into, staleness)

    def check(self, update: Update) -> "CheckedUpdate":
        """Refuse an update that does not match the plan.

        Raises:
            DivergedError: A value is NaN.
            ParticipantError: The update does not match the plan in another way, or exceeds its bounds.
        """
        with np.errstate(invalid="ignore"):  # a signaling NaN makes NumPy warn; it is refused below, by name
            self._check_form(update)
            self._check_lengths(update)
            reaches = self.sums.check(update, self.parts)
            self._check_metrics(update)  # last: if training diverged, a leaf's name helps more than the loss
        return CheckedUpdate(self, replace(update, metrics=self._capped(update.metrics)), tuple(reaches))

    def largest(self, part: Part, count: int) -> int:
        """Return the largest |integer| that a sum of `count` updates can hold in a part's leaves."""
        weight = self.most_weight(part) if self._multiplies(part) else 1
        if part.in_chain and self.code_bits is not None:
            return count * weight * self.rounds * (2 ** (self.code_bits - 1) - 1)
        bound = self.sums.bound if part.bound is None else part.bound * self.rounds
        return count * math.ceil(weight * bound * 2.0 ** self.sums.bits(part))

    def sum_dtype(self, part: Part, count: int) -> np.dtype[np.signedinteger[Any]]:
        """Choose the narrowest integers that hold every sum of `count` updates in a part's leaves.

        Raises:
            PlanError: The sums need more than 64 bits.
        """
        largest = self.largest(part, count)
        fitting = [dtype for dtype in map(np.dtype, ("i1", "i2", "i4", "i8")) if largest <= np.iinfo(dtype).max]
        if not fitting:
            raise PlanError(
                "sum-overflow",
                f"sums of part {part.name!r} over {count} reports need more than 64 bits: lower max_count or max_weight",
            )
        return fitting[0]

    def sum_nbytes(self, count: int) -> int:
        """Return the encoded size of the leaves of a sum of `count` updates, in bytes."""
        return sum(self.sum_dtype(part, count).itemsize * size for part, size in self._sizes())

    def check_sum(self, total: Aggregate, sender: object, count: int, least: int | None = None) -> "CheckedSum":
        """Refuse a sum that `count` updates of this plan cannot add up to.

        Args:
            total: The sum.
            sender: The edge that sent the sum, for errors.
            count: The number of reports that the edge names.
            least: The smallest weight that the sum may have; `count` if None, since every update weighs at least 1. A site's
                sum may weigh less: its later rounds may have fewer devices than the first.

        Raises:
            ParticipantError: The sum has another plan or number of reports, or is larger than `count` reports can add up to.
        """
        least = count if least is None else least
        if int(total.count) != count:
            raise ParticipantError(sender, f"its sum counts {int(total.count)} reports, but it names {count} reports")
        if set(total.sums) != {part.name for part in self.parts} or set(total.metrics) - set(self.metrics):
            raise ParticipantError(
                sender, f"it sums {sorted(total.sums)} and {sorted(total.metrics)}, which do not belong to this plan"
            )
        for part, shapes in zip(self.parts, self.layouts, strict=True):
            tree, most = total.sums[part.name], self.largest(part, count)
            if layout(tree) != dict(shapes):
                raise ParticipantError(sender, f"`{part.name}` has other leaves or shapes than the plan's")
            weight = int(total.weights[part.name])
            if weight < least:
                raise EmptyError(sender, f"`{part.name}` weighs {weight}, but {count} reports weigh at least {least}")
            if weight > count * self.most_weight(part):
                raise ParticipantError(sender, f"`{part.name}` weighs more than {count} reports can")
            for name, leaf in tree.items():
                low = -most if part.least is None else weight * part.least * 2.0 ** self.sums.bits(part) - count
                if leaf.size and (int(leaf.max()) > most or int(leaf.min()) < low):
                    raise BeyondBoundError(sender, f"`{part.name}[{name}]` is more than {count} reports add up to")
            self._check_sum_length(total, part, sender, count)
        self._check_summed_metrics(total, sender, count)
        return CheckedSum(total)

    def _sizes(self) -> Iterator[tuple[Part, int]]:
        """Yield each part with the number of values that are sent for it."""
        for part, leaves in zip(self.parts, self.layouts, strict=True):
            yield part, sum(math.prod(shape) for _, shape in leaves)

    def most_weight(self, part: Part) -> int:
        """Return the largest weight of one report in a part."""
        cap, most = self.weight_cap, self.sums.max_weight
        if cap is None:
            return part.largest_weight(most)
        return part.largest_weight(min(cap, most) if self._multiplies(part) else cap)

    def _is_coded(self, part: Part) -> bool:
        """Return whether a part is sent as integer codes."""
        return part.in_chain and self.code_bits is not None

    def _multiplies(self, part: Part) -> bool:
        """Return whether a part is multiplied by its weight here, and not on the device."""
        return self.weight_cap is None or not part.in_chain

    def _norms(self) -> Iterator[tuple[Part, float]]:
        """Yield each part whose L2 norm is limited, with the limit."""
        for part, norm in zip(self.parts, self.norms, strict=bool(self.norms)):
            if norm is not None:
                yield part, norm

    def _check_lengths(self, update: Update) -> None:
        """Refuse an update whose norm is larger than the plan's clip. Norms of codes are exact, those of floats in float64."""
        for part, norm in self._norms():
            square = _square(update.parts[part.name])
            coded = self._is_coded(part)
            longest = math.floor(Fraction(norm) ** 2) if coded else (norm * (1 + SLACK)) ** 2
            if longest < square < math.inf:  # `FixedPoint.check` refuses infinite and NaN values
                raise BeyondBoundError(
                    update.client,
                    f"`{part.name}` has the norm {math.sqrt(square):.6g}, but the plan's clip allows a norm of at most "
                    f"{norm:.6g}: clip it on the device, as the plan says",
                )

    def _check_sum_length(self, total: Aggregate, part: Part, sender: object, count: int) -> None:
        """Refuse a sum with a larger norm, or with more devices in its bins, than `count` clipped updates can have."""
        tree, unit = total.sums[part.name], 2.0 ** self.sums.bits(part)
        if part.content == "bins":
            if any(int(leaf.min(initial=0)) < 0 or int(leaf.sum()) > count * unit for leaf in tree.values()):
                raise BeyondBoundError(sender, f"the bins of `{part.name}` count more devices than the {count} reports")
            return
        longest = self._longest_sum(part, int(total.weights[part.name]), count)
        if longest is None:
            return
        whole = self._is_coded(part) and self.rounds == 1  # codes are whole numbers, and nothing was rounded
        rounded = 0.0 if whole else 0.5 * count * math.sqrt(sum(leaf.size for leaf in tree.values()))
        if math.sqrt(_square(tree)) > longest * (1 + SLACK) + rounded:
            raise BeyondBoundError(sender, f"`{part.name}` has a larger norm than {count} clipped updates can")

    def _longest_sum(self, part: Part, weight: int, count: int) -> float | None:
        """Return the largest L2 norm of the sum of `count` clipped updates, up to rounding, in its units; None without a clip."""
        norm = next((norm for bounded, norm in self._norms() if bounded is part), None)
        if norm is None:
            return None
        times = weight if self._multiplies(part) else count
        if self.rounds > 1:  # the weight is a mean over its rounds, and the count may divide the sum
            times = max(times, part.divisor(weight, count, 0)) * self.rounds
        return times * norm * (1.0 if self._is_coded(part) else 2.0 ** self.sums.bits(part))

    def without_rounding(self, part: Part, tree: Tree, rounding: float, weight: int, count: int) -> Tree:
        """Scale a site's sum down to the largest allowed norm, if its norm is larger only because of rounding.

        A sum that exceeds the limit by more than its rounding stays as it is, and `check_sum` refuses it.

        Args:
            part: One of `parts`.
            tree: The part's sum, float64, in units of the sum.
            rounding: The largest L2 norm that rounding can have added, in units of the sum.
            weight: The part's weight.
            count: The number of contributors.
        """
        longest = self._longest_sum(part, weight, count)
        if longest is None:
            return tree
        length = math.sqrt(_square(tree))
        return (
            tree_map(lambda leaf: leaf * (longest / length), tree) if longest < length <= longest + rounding else tree
        )

    def _capped(self, metrics: Mapping[str, tuple[float, int]]) -> Mapping[str, tuple[float, int]]:
        """Return the metrics with the same means, but with no more predictions than the plan's cap."""
        cap = self.metric_cap
        if cap is None:
            return metrics
        return {
            name: (value, count) if count <= cap else (value / count * cap, cap)
            for name, (value, count) in metrics.items()
        }

    @property
    def range_of(self) -> Mapping[str, Range]:
        """The range of each metric's mean, by the metric's name; a metric without a range is left out."""
        return dict(zip(self.metrics, self.ranges, strict=bool(self.ranges)))

    def _check_metrics(self, update: Update) -> None:
        ranges = self.range_of
        for name, (value, count) in update.metrics.items():
            if not math.isfinite(value):
                raise DivergedError(update.client, "metrics", name)
            if count < 0 or (count == 0 and value != 0):
                raise ParticipantError(update.client, f"metric {name!r} is {value:g} over {count} predictions")
            if count and name in ranges and not ranges[name].holds(value, count):
                raise BeyondBoundError(
                    update.client,
                    f"metric {name!r} has a mean of {value / count:g}, but on every client it must be {ranges[name]}",
                )

    def _check_summed_metrics(self, total: Aggregate, sender: object, count: int) -> None:
        ranges, most = self.range_of, count * self.sums.most_metric
        counts = most if self.metric_cap is None else count * self.metric_cap
        for name, pair in total.metrics.items():
            if max(-int(pair.min()), int(pair.max())) > most or not 0 <= int(pair[1]) <= counts:
                raise BeyondBoundError(sender, f"metric {name!r} is larger than {count} reports can add up to")
            value = math.ldexp(float(pair[0]), -METRIC_BITS)
            if name in ranges and not ranges[name].holds(value, int(pair[1]), count):
                raise BeyondBoundError(
                    sender, f"the mean of metric {name!r} is out of range: on every client it must be {ranges[name]}"
                )

    def _check_form(self, update: Update) -> None:
        if set(update.parts) != (counted := {part.name for part in self.parts}):
            raise ParticipantError(
                update.client,
                f"it sends {sorted(update.parts)}, and the plan counts {sorted(counted)}: it does not belong to this plan",
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
                    f"`{part.name}[{wrong}]` has shape {found.get(wrong)}, but the plan's is {expected.get(wrong)}",
                )
            _check_numbers(update.client, part, tree, self.code_bits if part.in_chain else None)


@dataclass(frozen=True, slots=True, eq=False)
class CheckedUpdate:
    """An update that a first hop has checked. Only `FirstHop.check` makes such values, and a sum accepts only these from devices.

    An update's form and magnitude are therefore validated only once, even if the update is stored before it is added.

    Attributes:
        hop: The hop that has checked the update, and adds it.
        update: The update. Its metrics count no more predictions than the plan's cap.
        reaches: The largest |value| of each part.
    """

    hop: FirstHop
    update: Update
    reaches: tuple[float, ...]

    def count_in(self, into: RunningSum | None = None, staleness: int = 0) -> Aggregate:
        """Add the update to a running sum, or make an aggregate of one.

        Args:
            into: The running sum; None for an aggregate of one.
            staleness: How many versions old the model was that the client trained on. Only parts weighted by staleness use it.

        Returns:
            The running sum so far; or the aggregate of one.
        """
        hop = self.hop
        return hop.sums.encode_checked(self.update, hop.parts, self.reaches, hop.weight_cap, into, staleness)


@dataclass(frozen=True, slots=True, eq=False)
class CheckedSum:
    """A sum of many updates that a first hop has checked. Only `FirstHop.check_sum` makes such values."""

    total: Aggregate

    def count_in(self, into: RunningSum, staleness: int = 0) -> Aggregate:
        """Add the sum to a running sum, and return the running sum. An edge's sum is never weighted by staleness."""
        into.add(self.total)
        return into.total


def _check_numbers(client: object, part: Part, tree: Tree, codes: int | None) -> None:
    """Refuse leaves whose dtype differs from the plan's, and numbers that no honest client of the plan sends.

    Args:
        client: The client that sent the leaves, for errors.
        part: The part that the leaves belong to.
        tree: The leaves.
        codes: The width of the part's integer codes; None if its leaves are floats.
    """
    for name, leaf in tree.items():
        if codes is None:
            if leaf.dtype.kind != "f" or leaf.dtype.itemsize not in (4, 8):
                raise ParticipantError(client, f"`{part.name}[{name}]` is {leaf.dtype}, but the plan's are floats")
            if part.least is not None and not float(leaf) >= part.least and not math.isnan(float(leaf)):
                raise BeyondBoundError(
                    client, f"`{part.name}` is {float(leaf):g}, but the plan accepts no value below {part.least:g}"
                )
            if part.content == "bins" and not (set(np.unique(leaf).tolist()) <= {0.0, 1.0} and leaf.sum() <= 1):
                raise ParticipantError(client, f"`{part.name}[{name}]` must hold a single 1, or only zeros")
            continue
        largest = 2 ** (codes - 1) - 1
        if leaf.dtype != (np.int8 if codes <= 8 else np.int16):
            raise ParticipantError(
                client, f"`{part.name}[{name}]` is {leaf.dtype}, but the plan's are {codes}-bit codes"
            )
        if leaf.size and max(-int(leaf.min()), int(leaf.max())) > largest:
            raise ParticipantError(
                client, f"`{part.name}[{name}]` holds codes beyond ±{largest}, the largest {codes}-bit code"
            )


def _square(tree: Tree) -> int | float:
    """Compute Σ x² over all leaves: in float64 for floats, and exactly for integers of at most 16 bits."""
    total = 0
    for _, arrays in blocks(tree, _BLOCK):
        for array in arrays:
            block = array.astype(np.float64)
            square = float(np.einsum("i,i->", block, block))
            total += int(square) if array.dtype.kind == "i" and array.dtype.itemsize <= 2 else square
    return total
