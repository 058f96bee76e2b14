"""Robust aggregators: a few dishonest clients cannot move the result far, within the limits of each aggregator's theorem.

    algorithm = fedavg(sgd(lr=0.1), aggregator=robust.median())

These aggregators look at every update on its own. They run in the simulator, and on a server that keeps each update
until its round ends (`sumus serve --spool`). A server that keeps only sums refuses them by name.

`attackers` is the number of dishonest updates in one round that the aggregator must withstand. A round may have a
larger share of attackers than the population: if one client in five is dishonest, about every third random cohort has
more than one in five.

These aggregators limit how far attackers can move the result. Honest clients with unusual data look like attackers to all
of them. So compare their cost without an attack with what they save under attack (docs/results.md).
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
    """Make an aggregator of these parts that uses `centre` in place of the mean. If no part is named, it combines `params`."""
    plain = mean(*(parts or (PARAMS,)))
    return Aggregator(parts=plain.parts, combine=plain.combine, centre=centre, chosen=chosen, least=least)


def _coordinatewise(rule: Callable[[Array], Array]) -> Centre:
    """Make a centre that applies `rule` to every entry of every part: (clients, …) → (…)."""

    def centre(contributions: Sequence[Contribution], weights: Weights) -> Contribution:
        return {
            part: {name: np.asarray(rule(np.stack([one[part][name] for one in contributions]))) for name in tree}
            for part, tree in contributions[0].items()
        }

    return centre


@registered("aggregator/median")
def median(*parts: Part) -> Aggregator:
    """Take the median of every entry. [Yin et al. 2018, arXiv:1803.01498, Algorithm 1, option I]"""

    def chosen(count: int) -> tuple[float, float]:
        """Return the share and the factor: the median can be one update, and its norm is at most √2 times the largest norm.

        In each entry, at least half of the updates are at least as far from 0 as the median. The factor √2 follows from
        this. The share is 1, since a round may have an odd number of updates, and each entry of the median is then the
        entry of one update.
        """
        return 1.0, math.sqrt(2)

    return _around(_coordinatewise(lambda values: np.median(values, axis=0)), parts, chosen)


@registered("aggregator/trimmed_mean")
def trimmed_mean(*parts: Part, attackers: int) -> Aggregator:
    """Take the mean of every entry without its `attackers` largest and `attackers` smallest values. Needs 2f + 1
    contributors for f attackers. [Yin et al. 2018, arXiv:1803.01498, Algorithm 1, option II]
    """
    _check(attackers)

    def rule(values: Array) -> Array:
        return np.sort(values, axis=0)[attackers : len(values) - attackers].mean(axis=0)

    def chosen(count: int) -> tuple[float, float]:
        """Return the share, and the factor on the largest norm, for the mean of the values that are kept.

        The square of a mean is at most the mean of the squares, and the sum of the kept squares is at most that of all
        updates.
        """
        kept = count - 2 * attackers
        return 1 / kept, math.sqrt(count / kept)

    return _around(_coordinatewise(rule), parts, chosen, least=2 * attackers + 1)


@registered("aggregator/krum")
def krum(*parts: Part, attackers: int) -> Aggregator:
    """Choose the one update that is nearest to its n − f − 2 nearest other updates, for n updates and f attackers. Needs
    2f + 3 contributors. Distances are those of `params`. [Blanchard et al. 2017, section 3]
    """
    _check(attackers)
    return _around(_nearest(attackers, lambda count: 1), parts, lambda count: (1.0, 1.0), least=2 * attackers + 3)


@registered("aggregator/multi_krum")
def multi_krum(*parts: Part, attackers: int, keep: int | None = None) -> Aggregator:
    """Take the mean of the `keep` updates with the best Krum scores. `keep` is n − f − 2 by default, and never more.
    [Blanchard et al. 2017, section 4, m-Krum]
    """
    _check(attackers)
    if keep is not None and keep < 1:
        raise PlanError("positive", f"multi_krum(keep={keep}): keep at least one update")

    def kept(count: int) -> int:
        most = count - attackers - 2
        return most if keep is None else min(keep, most)

    return _around(_nearest(attackers, kept), parts, lambda count: (1 / kept(count), 1.0), least=2 * attackers + 3)


@registered("aggregator/norm_bounded")
def norm_bounded(*parts: Part, max_norm: float) -> Aggregator:
    """Take the weighted mean after scaling every update of `params` to an L2 norm of at most `max_norm`. Other parts
    are only averaged. [Sun et al. 2019, arXiv:1911.07963, section 5]

    `clip_by_global_norm` does the same on an honest device. This aggregator also bounds the update of a dishonest
    device.
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
    """Make a centre that takes the mean of the updates with the best Krum scores."""

    def centre(contributions: Sequence[Contribution], weights: Weights) -> Contribution:
        scores = krum_scores([one["params"] for one in contributions], attackers)
        best: list[int] = np.argsort(scores, kind="stable")[: keep(len(contributions))].tolist()
        return _mean_of([contributions[index] for index in best], {part: [1] * len(best) for part in weights})

    return centre


def krum_scores(updates: Sequence[Tree], attackers: int) -> Array:
    """Compute for each of n updates the sum of its squared distances to its n − f − 2 nearest other updates, shape `(n,)`."""
    count = len(updates)
    squares = np.zeros((count, count))
    for name in updates[0]:
        flat = np.stack([update[name].reshape(-1) for update in updates])
        for index, row in enumerate(flat):
            squares[index] += ((flat - row) ** 2).sum(axis=1)
    np.fill_diagonal(squares, np.inf)  # an update is not its own neighbour
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
