"""Aggregators that a few dishonest clients cannot pull away, each within the limits of its theorem.

    algorithm = fedavg(sgd(lr=0.1), aggregator=robust.median())

They look at every update apart, so they run in the simulator; a server that keeps only sums refuses them by name.
`attackers` is the number of dishonest updates in one round that the rule is to withstand: where one in five of a population
is dishonest and cohorts are drawn from it, about every third holds more than one in five.

What is robust here is the position of the aggregate. Honest clients whose data differ look like attackers to all of these
rules: what they cost without any attack belongs beside what they save (docs/results.md).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from sumus.aggregate import Aggregator, Centre, Contribution, Part, mean, over, times
from sumus.errors import PlanError, expect_number
from sumus.spec import registered
from sumus.tree import tree_map
from sumus.types import Array, Tree
from sumus.update.clip import global_norm

Weights: TypeAlias = Mapping[str, Sequence[int]]
Chosen: TypeAlias = Callable[[int], tuple[float, float]]

PARAMS = Part("params", weight="uniform", denominator="count")


def _around(centre: Centre, parts: tuple[Part, ...], chosen: Chosen, least: int = 1) -> Aggregator:
    """The mean of these parts (of `params` alone, where none is named), with a centre in the mean's place."""
    plain = mean(*(parts or (PARAMS,)))
    return Aggregator(parts=plain.parts, combine=plain.combine, centre=centre, chosen=chosen, least=least)


def _coordinatewise(rule: Callable[[Array], Array]) -> Centre:
    """The same rule on every entry of every part: (clients, …) → (…)."""

    def centre(contributions: Sequence[Contribution], weights: Weights) -> Contribution:
        return {
            part: {name: np.asarray(rule(np.stack([one[part][name] for one in contributions]))) for name in tree}
            for part, tree in contributions[0].items()
        }

    return centre


@registered("aggregator/median")
def median(*parts: Part) -> Aggregator:
    """The median of every entry. [Yin et al. 2018, arXiv:1803.01498, Algorithm 1, option I]"""

    def chosen(count: int) -> tuple[float, float]:
        """In each entry, half of the updates are at least as far from 0 as the median: so it is at most √2 times as long.

        A round may be of more updates, and of an odd number: then the median is one update's entry.
        """
        return 1.0, math.sqrt(2)

    return _around(_coordinatewise(lambda values: np.median(values, axis=0)), parts, chosen)


@registered("aggregator/trimmed_mean")
def trimmed_mean(*parts: Part, attackers: int) -> Aggregator:
    """The mean of every entry without its `attackers` largest and as many smallest values; needs 2f + 1 contributors.
    [Yin et al. 2018, arXiv:1803.01498, Algorithm 1, option II]"""
    _check(attackers)

    def rule(values: Array) -> Array:
        return np.sort(values, axis=0)[attackers : len(values) - attackers].mean(axis=0)

    def chosen(count: int) -> tuple[float, float]:
        """A mean of the values that are kept: its square is at most the mean of their squares, and those are of all updates."""
        kept = count - 2 * attackers
        return 1 / kept, math.sqrt(count / kept)

    return _around(_coordinatewise(rule), parts, chosen, least=2 * attackers + 1)


@registered("aggregator/krum")
def krum(*parts: Part, attackers: int) -> Aggregator:
    """The one update whose n − f − 2 nearest others are nearest; needs 2f + 3 contributors. Distances are those of
    `params`. [Blanchard et al. 2017, section 3]"""
    _check(attackers)
    return _around(_nearest(attackers, lambda count: 1), parts, lambda count: (1.0, 1.0), least=2 * attackers + 3)


@registered("aggregator/multi_krum")
def multi_krum(*parts: Part, attackers: int, keep: int | None = None) -> Aggregator:
    """The mean of the `keep` updates of the best Krum scores, by default n − f − 2, and never more.
    [Blanchard et al. 2017, section 4, m-Krum]"""
    _check(attackers)
    if keep is not None and keep < 1:
        raise PlanError("positive", f"multi_krum(keep={keep}): keep at least one update")

    def kept(count: int) -> int:
        most = count - attackers - 2
        return most if keep is None else min(keep, most)

    return _around(_nearest(attackers, kept), parts, lambda count: (1 / kept(count), 1.0), least=2 * attackers + 3)


@registered("aggregator/norm_bounded")
def norm_bounded(*parts: Part, max_norm: float) -> Aggregator:
    """The mean, by the weights of its parts, with every update of `params` scaled to an L2 norm of at most `max_norm`;
    other parts are only averaged. [Sun et al. 2019, arXiv:1911.07963, section 5]

    `clip_by_global_norm` does the same on an honest device; this one also holds for a dishonest one.
    """
    expect_number(max_norm, 0, math.inf, "norm_bounded(max_norm=)", open_low=True)

    def centre(contributions: Sequence[Contribution], weights: Weights) -> Contribution:
        def bounded(one: Contribution) -> Contribution:
            factor = max_norm / max(global_norm(one["params"]), max_norm)
            return {**one, "params": times(one["params"], factor)}

        return _mean_of([bounded(one) for one in contributions], weights)

    plain = mean(*(parts or (PARAMS,)))
    return Aggregator(parts=plain.parts, combine=plain.combine, centre=centre, longest=plain.longest)


def _nearest(attackers: int, keep: Callable[[int], int]) -> Centre:
    """The mean of the updates with the best Krum scores."""

    def centre(contributions: Sequence[Contribution], weights: Weights) -> Contribution:
        scores = krum_scores([one["params"] for one in contributions], attackers)
        best: list[int] = np.argsort(scores, kind="stable")[: keep(len(contributions))].tolist()
        return _mean_of([contributions[index] for index in best], {part: [1] * len(best) for part in weights})

    return centre


def krum_scores(updates: Sequence[Tree], attackers: int) -> Array:
    """For each of n updates, the sum of its squared distances to its n − f − 2 nearest others, shape `(n,)`."""
    count = len(updates)
    squares = np.zeros((count, count))
    for name in updates[0]:
        flat = np.stack([update[name].reshape(-1) for update in updates])
        for index, row in enumerate(flat):
            squares[index] += ((flat - row) ** 2).sum(axis=1)
    np.fill_diagonal(squares, np.inf)  # not its own neighbour
    return np.sort(squares, axis=1)[:, : count - attackers - 2].sum(axis=1)


def _mean_of(contributions: Sequence[Contribution], weights: Weights) -> Contribution:
    total = {part: times(tree, weights[part][0]) for part, tree in contributions[0].items()}
    for index, one in enumerate(contributions[1:], 1):
        for part, tree in one.items():
            total[part] = tree_map(np.add, total[part], times(tree, weights[part][index]))
    return {part: over(tree, sum(weights[part])) for part, tree in total.items()}


def _check(attackers: int) -> None:
    if attackers < 0:
        raise PlanError("positive", f"attackers={attackers}: it is a number of updates in a round, 0 or more")
