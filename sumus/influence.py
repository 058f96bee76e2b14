"""Influence: the largest share of a sum that one dishonest device can have, and how far the device can move the mean.

    plan.influence.share        0.1: a tenth of the sum's weight
    plan.influence.step         0.1: the mean moves by at most this L2 norm, in parameters

A device can move the mean in two ways. The first is its weight, which decides its share of the sum. The device itself
states its number of examples, so only a cap limits the weight. The second is the norm of its update. Only a clip that
the first hop checks limits the norm. The mean moves by at most the product of share and norm, and the server optimizer
takes its step by this mean.

Some algorithms send devices more than the model. SCAFFOLD sends a control, which devices sum up and which corrects
every step of every device. A device that lies about its control changes the updates of all other devices, so its share
is not a bound. The clip of each update still is a bound: the norm of a mean of clipped updates is never larger than the clip.
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
    """How far the server optimizer moves the model in response to one device's effect on a sum.

    Attributes:
        norm: The L2 norm of the move, over this round and all later ones; None if the server optimizer does not bound
            it.
        largest: The largest amount by which a round moves any one number of the model, for any mean; None if nothing bounds it.
    """

    norm: float | None = None
    largest: float | None = None


@dataclass(frozen=True)
class Influence:
    """The most that one dishonest device can do to a sum of a plan.

    Attributes:
        contributors: The smallest number of devices whose sum is used.
        share: The device's largest share of the sum's weight, from 0 to 1, if every other device has weight 1. If the
            aggregator chooses among updates: the largest share of its result.
        length: The largest L2 norm of an update that is counted, in parameters; None if no clip bounds it.
        step: The L2 norm by which the device can move the mean of `params`, in parameters. If the aggregator chooses
            among updates: the L2 norm of its result. If the algorithm steers (see `steers`): the L2 norm of the mean.
            None if nothing bounds it.
        model: How far the server optimizer moves the model by that step.
        steers: The parts other than the model that devices sum up and receive. Through these parts, the device changes the
            updates of all other devices.
        others: For each part except `params`, how far the device can move any one number of the part's mean. If the
            aggregator chooses among updates: the largest possible number in its result.
        open: The names in `others` that are limited only by the width of the sums: the part has no bound of its own
            below `WIDEST`.
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
        """The influence in words: `one device can have 10.00% of a sum of 10, which moves the mean by at most 0.1`."""
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
            moves = f", and it turns the updates of all others through {through}: {mean} has a norm of at most {self.step:.4g}"
        elif self.chooses:
            moves = f", and that has a norm of at most {self.step:.4g}"
        else:
            moves = f", which moves the mean by at most {self.step:.4g}"
        if (norm := self.model.norm) is not None:
            of_model = f", and the model by at most {norm:.4g} over this round and those that follow"
            return moves + (of_model if norm != self.step else "") + self._of_each
        return moves + (self._of_each or "; the server optimizer does not bound how far that moves the model")

    @property
    def _of_each(self) -> str:
        """How far the server optimizer moves one number of the model, in words; empty if it does not bound that."""
        if (largest := self.model.largest) is None:
            return ""
        return f"; the server optimizer moves no number of the model by more than {largest:.4g} per round"

    @property
    def _others(self) -> str:
        """How far the device moves a number of each part except `params`, in words."""
        does = "it moves a number of `{0}` by at most {1:.4g} per round"
        if self.chooses:
            does = "a number of `{0}` in it is at most {1:.4g}"
        return "".join("; " + does.format(name, by) for name, by in self.others.items())


def influence_of(
    algorithm: Algorithm, task: Description, sums: FixedPoint, contributors: int, rounds: int = 1, trusted: bool = False
) -> Influence:
    """Compute the most that one device can do to a sum.

    Args:
        algorithm: The algorithm.
        task: The description of the task.
        sums: The plan's integers, whose largest weight caps all other caps.
        contributors: The smallest number of devices whose sum is used.
        rounds: The number of rounds that an edge runs for one sum. The device may take part in each of them.
        trusted: Whether the plan trusts its devices.
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
        # The device multiplies by its weight before it clips, so the norm of its contribution is at most C for any weight. It
        # moves the mean furthest if the divisor is smallest, which is the case with weight 1.
        factors["params"] = 1 / parts["params"].divisor(contributors, contributors, contributors)
    steers = tuple(name for name in algorithm.server.broadcasts if name != "params")
    if steers:  # the device also decides what the other devices send
        factors = {name: _of_all(part, hop, contributors) for name, part in parts.items()}
    share, step, longest = min(1.0, shares["params"]), None, reaches["params"]
    if aggregator.chosen is not None:
        with own_code("chosen", aggregator, "it must return (share, times)"):
            share, times = aggregator.chosen(max(contributors, aggregator.least))
        step = None if longest is None else longest * times * _scale(parts["params"], hop, contributors)
    elif longest is not None and aggregator.longest is not None:
        known = {name: (factors[name], reach or 0.0) for name, reach in reaches.items()}
        with own_code("longest", aggregator, "it must return a number"):
            step = aggregator.longest(known) * rounds
    if aggregator.chosen is not None:  # each number of the result lies between two numbers that devices sent
        shares = {name: _scale(part, hop, contributors) for name, part in parts.items()}
    others = {name: shares[name] * (reach or 0.0) * rounds for name, reach in reaches.items() if name != "params"}
    beside = [part for name, part in parts.items() if name != "params" and not part.in_chain]
    server, model = algorithm.server, None
    if step is not None and server.longest is not None:
        with own_code("longest", server, "it must return a number, or None"):
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
    """Return the largest ratio of one client's weight to the part's divisor. It exceeds 1 if the divisor does not count
    the weight.
    """
    weight = hop.most_weight(part)
    return weight / part.divisor(weight + contributors - 1, contributors, contributors)


def _of_all(part: Part, hop: FirstHop, contributors: int) -> float:
    """Return the largest ratio of all clients' summed weights to the part's divisor. The norm of their mean is at most this
    ratio times the largest norm of an update.
    """
    if hop.weight_cap is None or not part.in_chain:
        return _scale(part, hop, contributors)
    counts = (contributors, hop.sums.max_count)
    return max(n / part.divisor(n, n, n) for n in counts)  # devices multiply by their weights before they clip


def _scale(part: Part, hop: FirstHop, contributors: int) -> float:
    """Return the largest factor by which an update is multiplied if the aggregator chooses it. The update gets the weight of
    all clients, which is then divided by the part's divisor.
    """
    counts = (contributors, hop.sums.max_count)
    return max(n * hop.most_weight(part) / part.divisor(n * hop.most_weight(part), n, n) for n in counts)


def _reach(part: Part, sums: FixedPoint, length: float | None) -> float | None:
    """Return the largest size of one client's part; None if nothing bounds it.

    For a part in the chain this is an L2 norm; for another part, the largest absolute value of each number.
    """
    if part.in_chain or part.name == "params":
        return length if part.in_chain else None
    return sums.bound if part.bound is None else part.bound
