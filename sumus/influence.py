"""What one dishonest device can do to a sum: how much of it, and how far it moves the mean.

    plan.influence.share        0.1: a tenth of the sum's weight
    plan.influence.step         0.1: the mean moves by at most this L2 norm, in parameters

A device has two levers. The weight says how large its share of the sum is: the device names its examples itself, so that only a
cap limits the weight. The length says how far its update reaches: only a clip that the first hop checks limits the length. The
mean moves by the product of share and length. The server optimizer takes its step by this mean.

Some algorithms send devices more than the model: SCAFFOLD's control, which devices sum up and which corrects every step of all of
them. A device that lies there turns the updates of all others, and its share bounds nothing. What still holds is the clip of
each update: a mean of clipped updates is never longer.
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
class ModelMove:
    """How far the server optimizer moves the model by what one device does to a sum.

    Attributes:
        norm: The L2 norm, over this round and all that follow; None if the server optimizer does not bound it.
        largest: The most by which any one number of the model moves in a round, whatever the mean is; None if nothing bounds it.
    """

    norm: float | None = None
    largest: float | None = None


@dataclass(frozen=True)
class Influence:
    """What one dishonest device can do to a sum of a plan, at most.

    Attributes:
        contributors: The fewest devices whose sum is used.
        share: The largest share of the sum's weight, from 0 to 1, if each of the others weighs 1; or, of an aggregator that
            chooses among updates, the largest share of what it gives.
        length: The L2 norm of the longest update that is counted, in parameters; None if no clip bounds it.
        step: The L2 norm by which the device moves the mean of `params`, in parameters; or, of an aggregator that chooses among
            updates, or of an algorithm that `steers`, the L2 norm of what it gives, or of the mean. None if nothing bounds it.
        model: How far the server optimizer moves the model by that step.
        steers: What devices sum up and receive besides the model: through these parts the device turns the updates of all
            others.
        others: For each further part, how far the device moves any one number of its mean; or, of an aggregator that chooses
            among updates, how large any one number of what it gives is at most.
        open: Those of `others` that only the width of the sums limits: no bound of their own that is below `WIDEST`.
        chooses: The aggregator that chooses among updates; empty for a mean.
        trusted: Whether the plan trusts its devices.
    """

    contributors: int
    share: float
    length: float | None
    step: float | None
    model: ModelMove = ModelMove()
    steers: tuple[str, ...] = ()
    others: Mapping[str, float] = field(default_factory=dict[str, float])
    open: tuple[str, ...] = ()
    chooses: str = ""
    trusted: bool = False

    @property
    def said(self) -> str:
        """The sentence for people: `one device can have 10.00% of a sum of 10, which moves the mean by at most 0.1`."""
        return f"{'the plan trusts its devices: ' if self.trusted else ''}one device can have {self}"

    def __str__(self) -> str:
        share = "over 99.99%" if 0.9999 < self.share < 1 else f"{self.share:.2%}"
        what = (
            f"what {self.chooses} makes of {self.contributors} updates"
            if self.chooses
            else f"a sum of {self.contributors}"
        )
        return f"{share} of {what}{self._moves}{self._others}"

    @property
    def _moves(self) -> str:
        """How far the share moves the mean and the model, in words."""
        if self.length is None:
            return ", and no clip bounds how far that moves the model" + self._of_each
        if self.step is None:
            return ", and nothing says how far that moves the model" + self._of_each
        mean = "that" if self.chooses else "the mean"
        if self.steers:
            through = " and ".join(f"`{name}`" for name in self.steers)
            moves = (
                f", and it turns the updates of all others through {through}: {mean} is at most {self.step:.4g} long"
            )
        elif self.chooses:
            moves = f", and that is at most {self.step:.4g} long"
        else:
            moves = f", which moves the mean by at most {self.step:.4g}"
        if (norm := self.model.norm) is not None:
            of_model = f", and the model by at most {norm:.4g} over this round and those that follow"
            return moves + (of_model if norm != self.step else "") + self._of_each
        return moves + (self._of_each or "; the server optimizer does not bound how far that moves the model")

    @property
    def _of_each(self) -> str:
        """How far the server optimizer moves a number of the model, in words; empty if it does not bound that."""
        if (largest := self.model.largest) is None:
            return ""
        return f"; the server optimizer moves no number of the model by more than {largest:.4g} a round"

    @property
    def _others(self) -> str:
        """How far the device moves a number of each further part, in words."""
        does = "it moves a number of `{0}` by at most {1:.4g} a round"
        if self.chooses:
            does = "a number of `{0}` in it is at most {1:.4g}"
        return "".join("; " + does.format(name, by) for name, by in self.others.items())


def influence_of(
    algorithm: Algorithm, task: Description, sums: FixedPoint, contributors: int, rounds: int = 1, trusted: bool = False
) -> Influence:
    """What one device can do to a sum.

    Args:
        sums: the plan's integers, whose largest weight caps all others.
        contributors: the fewest devices whose sum is used.
        rounds: of an edge's own, in each of which the device may take part.
        trusted: whether the plan trusts its devices.
    """
    aggregator = algorithm.aggregator
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
    steers = tuple(name for name in algorithm.server.broadcasts if name != "params")
    if steers:  # what the others send is the device's too
        factors = {name: _of_all(part, hop, contributors) for name, part in parts.items()}
    share, step, longest = min(1.0, shares["params"]), None, reaches["params"]
    if aggregator.chosen is not None:
        with own_code("chosen", aggregator, "it must give (share, times)"):
            share, times = aggregator.chosen(max(contributors, aggregator.least))
        step = None if longest is None else longest * times * _scale(parts["params"], hop, contributors)
    elif longest is not None and aggregator.longest is not None:
        known = {name: (factors[name], reach or 0.0) for name, reach in reaches.items()}
        with own_code("longest", aggregator, "it must give a number"):
            step = aggregator.longest(known) * rounds
    if aggregator.chosen is not None:  # each number lies between those that were sent, whoever sent them
        shares = {name: _scale(part, hop, contributors) for name, part in parts.items()}
    others = {name: shares[name] * (reach or 0.0) * rounds for name, reach in reaches.items() if name != "params"}
    beside = [part for name, part in parts.items() if name != "params" and not part.in_chain]
    server, model = algorithm.server, None
    if step is not None and server.longest is not None:
        with own_code("longest", server, "it must give a number, or None"):
            model = server.longest(step)
    return Influence(
        contributors,
        share,
        longest,
        step,
        ModelMove(model, server.largest),
        steers,
        others,
        open=tuple(part.name for part in beside if not part.is_bounded),
        chooses="" if aggregator.chosen is None else repr(aggregator),
        trusted=trusted,
    )


def _share(part: Part, hop: FirstHop, contributors: int) -> float:
    """The largest weight of one client over a part's divisor: above 1 where the divisor does not count that weight."""
    weight = hop.most_weight(part)
    return weight / part.divisor(weight + contributors - 1, contributors, contributors)


def _of_all(part: Part, hop: FirstHop, contributors: int) -> float:
    """The summed weights of all clients over a part's divisor, at most: how much longer their mean is than the longest update."""
    if hop.weight_cap is None or not part.in_chain:
        return _scale(part, hop, contributors)
    counts = (contributors, hop.sums.max_count)
    return max(n / part.divisor(n, n, n) for n in counts)  # the device weighs before it clips


def _scale(part: Part, hop: FirstHop, contributors: int) -> float:
    """By how much what was chosen is scaled: it stands for everyone's weight, over the part's divisor."""
    counts = (contributors, hop.sums.max_count)
    return max(n * hop.most_weight(part) / part.divisor(n * hop.most_weight(part), n, n) for n in counts)


def _reach(part: Part, sums: FixedPoint, length: float | None) -> float | None:
    """How far one client's part reaches: its L2 norm if the chain bounds it, else each of its numbers; None if nothing does."""
    if part.in_chain or part.name == "params":
        return length if part.in_chain else None
    return sums.bound if part.bound is None else part.bound
