"""What one dishonest device can do to a sum: how much of it, and how far it moves the mean.

    plan.influence.share        0.1: a tenth of the sum's weight
    plan.influence.step         0.1: the mean moves by at most this L2 norm, in parameters

A device has two levers. The weight says how large its share of the sum is: the device names its examples itself, so that only a
cap limits the weight. The length says how far its update reaches: only a clip that the first hop checks limits the length. The
mean moves by the product of share and length. The server optimizer takes its step by this mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sumus.aggregate import Part
from sumus.algorithm import Algorithm
from sumus.errors import own_code
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.task import Description


@dataclass(frozen=True)
class Influence:
    """What one dishonest device can do to a sum of a plan, at most.

    contributors: the fewest devices whose sum is used.
    share: the largest share of the sum's weight, from 0 to 1, if each of the others weighs 1.
    length: the L2 norm of the longest update that is counted, in parameters; None if no clip bounds it.
    step: the L2 norm by which the device moves the mean of `params`, in parameters; None if nothing bounds it, or if the
        aggregator is no mean.
    others: for each further part, how far the device moves any one number of its mean.
    """

    contributors: int
    share: float
    length: float | None
    step: float | None
    others: Mapping[str, float] = field(default_factory=dict[str, float])

    def __str__(self) -> str:
        share = "over 99.99%" if self.share > 0.9999 else f"{self.share:.2%}"
        share += f" of a sum of {self.contributors}"
        others = "".join(f"; it moves a number of `{name}` by at most {by:.4g}" for name, by in self.others.items())
        if self.length is None:
            return f"{share}, and no clip bounds how far that moves the model{others}"
        if self.step is None:
            return f"one update of {self.contributors}, at most {self.length:.4g} long, for its aggregator to weigh{others}"
        return f"{share}, which moves the mean by at most {self.step:.4g}{others}"


def influence_of(
    algorithm: Algorithm, task: Description, sums: FixedPoint, contributors: int, rounds: int = 1
) -> Influence:
    """What one device can do to a sum.

    Args:
        sums: the plan's integers, whose largest weight caps all others.
        contributors: the fewest devices whose sum is used.
        rounds: of an edge's own, in each of which the device may take part.
    """
    length, unit = algorithm.update.reach(task.trained_layout)
    length = None if length is None else length * unit
    hop = algorithm.first_hop(task, sums)
    parts = {part.name: part for part in hop.parts}
    shares = {name: _share(part, hop, contributors) for name, part in parts.items()}
    reaches = {name: _reach(part, sums, length) for name, part in parts.items()}
    factors = dict(shares)
    if algorithm.update.weight_cap is not None and parts["params"].in_chain:
        # The device multiplied before it clipped, so that its part of the sum is at most C whatever it weighs. It moves the
        # mean furthest if the divisor is smallest: with weight 1.
        factors["params"] = 1 / parts["params"].divisor(contributors, contributors, contributors)
    step = None
    if reaches["params"] is not None and not algorithm.aggregator.needs_each_update:
        known = {name: (factors[name], reach or 0.0) for name, reach in reaches.items()}
        with own_code("longest", algorithm.aggregator, "it must give a number"):
            step = algorithm.aggregator.longest(known) * rounds
    others = {name: shares[name] * (reach or 0.0) for name, reach in reaches.items() if name != "params"}
    return Influence(contributors, min(1.0, shares["params"]), reaches["params"], step, others)


def _share(part: Part, hop: FirstHop, contributors: int) -> float:
    """The largest weight of one client over a part's divisor: above 1 where the divisor does not count that weight."""
    weight = hop.most_weight(part)
    return weight / part.divisor(weight + contributors - 1, contributors, contributors)


def _reach(part: Part, sums: FixedPoint, length: float | None) -> float | None:
    """How far one client's part reaches: its L2 norm if the chain bounds it, else each of its numbers; None if nothing does."""
    if part.in_chain or part.name == "params":
        return length if part.in_chain else None
    return sums.bound if part.bound is None else part.bound
