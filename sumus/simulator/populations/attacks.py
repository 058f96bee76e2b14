"""Attacks, for tests of a defence: populations in which a share of the clients is dishonest.

    population = attacks.sign_flip(population, share=0.2)

The same share and seed choose the same clients, so attacks can be stacked: `scaled(label_flip(people, classes=10))` sends ten
times the update that was learned from wrong labels. All other clients stay honest. Measure the model on honest clients
(`Evaluation(unseen=)`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from sumus.aggregate import BUFFERS
from sumus.columns import array_of
from sumus.errors import ExperimentError
from sumus.experiment import Examples
from sumus.rng import generator
from sumus.simulator.populations.population import Population, as_population
from sumus.tree import tree_map
from sumus.types import Array, Tree

if TYPE_CHECKING:
    from sumus.executors.executor import Trained

Collusion = Callable[["Sequence[Trained]", int], "Iterable[Trained]"]
"""(results of a round's attackers, number of reports in the round) → the reports that the attackers send."""


class AttackedPopulation(Population):
    """A population whose `attackers` hold changed examples, or send changed updates.

    Attributes:
        attackers: The clients that attack.
        share: The share of the clients that are to attack; `attackers` is empty if this share is no whole client.
    """

    def __init__(
        self,
        people: Population,
        attackers: frozenset[Any],
        examples: Callable[[Any, Examples], Examples],
        collude: Collusion,
        described: str,
        share: float,
    ) -> None:
        super().__init__(
            people.ids, lambda client: examples(client, people[client]) if client in attackers else people[client]
        )
        self.attackers = attackers
        self.participation = people.participation
        self._people = people
        self._examples = examples
        self._collude = collude
        self._described = described
        self.share = share

    @property
    def described(self) -> str:
        since = "" if self.participation == self._people.participation else self.participation.described
        return f"{self._people.described}, {self._described}{since}"

    def _only(self, clients: list[Any]) -> Population:
        part, mine = self._people.subset(clients), self.attackers & frozenset(clients)
        some = AttackedPopulation(part, mine, self._examples, self._collude, self._described, self.share)
        some.participation = self.participation.of(frozenset(clients))
        return some

    def sent(self, results: "Iterator[Trained]") -> "Iterator[Trained]":
        """Yield the reports of honest clients as they arrive, then those of the attackers, who cooperate."""
        mine: list[Trained] = []
        count = 0
        for trained in self._people.sent(results):
            count += 1
            if trained.client in self.attackers:
                mine.append(trained)
            else:
                yield trained
        yield from self._collude(mine, count) if mine else ()


def label_flip(
    population: Mapping[Any, Examples], classes: int, share: float = 0.2, seed: int = 0
) -> AttackedPopulation:
    """Return a population whose attackers train on wrong labels: class c becomes classes − 1 − c.

    Args:
        population: The clients.
        classes: The number of classes.
        share: The share of clients that attack.
        seed: The seed that chooses the attackers.

    [Tolpegin et al. 2020, arXiv:2007.08432, the form of Fang et al. 2020, arXiv:1911.11815]
    """

    if classes < 2:
        raise ExperimentError(f"label_flip(classes={classes}): give at least two classes")

    def flipped(client: Any, examples: Examples) -> Examples:
        from sumus.training.examples import as_pair  # imports torch

        inputs, targets = as_pair(client, examples)
        labels = array_of(targets)
        largest = labels.max(initial=0)
        if labels.dtype.kind not in "iu" or largest >= classes:
            raise ExperimentError(
                f"label_flip(classes={classes}): client {client!r} holds targets of type {labels.dtype} up to {largest}; labels "
                "must be whole numbers below classes="
            )
        labels = labels.astype(np.int64)
        return inputs, labels + (classes - 1 - 2 * labels) * (labels >= 0)  # negative labels are padding, and stay

    return _attacked(population, f"label_flip({classes})", share, seed, examples=flipped)


def sign_flip(
    population: Mapping[Any, Examples], share: float = 0.2, factor: float = 1.0, seed: int = 0
) -> AttackedPopulation:
    """Return a population whose attackers send −`factor` times their update, which increases the loss.

    Args:
        population: The clients.
        share: The share of clients that attack.
        factor: The size of what they send, as a multiple of their update.
        seed: The seed that chooses the attackers.

    [Li et al. 2019, arXiv:1811.03761, section 4]
    """
    return _attacked(population, f"sign_flip({factor})", share, seed, collude=_multiplied(-factor))


def scaled(
    population: Mapping[Any, Examples], share: float = 0.2, factor: float = 10.0, seed: int = 0
) -> AttackedPopulation:
    """Return a population whose attackers send `factor` times their update, to outweigh all other clients.

    Args:
        population: The clients.
        share: The share of clients that attack.
        factor: The number by which they multiply their update.
        seed: The seed that chooses the attackers.

    [Bagdasaryan et al. 2020, arXiv:1807.00459, model replacement]
    """
    return _attacked(population, f"scaled({factor})", share, seed, collude=_multiplied(factor))


def a_little_is_enough(
    population: Mapping[Any, Examples], share: float = 0.2, z: float | None = None, seed: int = 0
) -> AttackedPopulation:
    """Return a population whose attackers all send the same update: μ − zσ of their own updates, entry by entry.

    This update is far enough from the mean to do harm, and close enough to it to look honest.

    Args:
        population: The clients.
        share: The share of clients that attack.
        z: The distance from the mean, in standard deviations. None for the paper's largest value,
            Φ⁻¹((n − m − s) / (n − m)) with s = ⌊n/2 + 1⌋ − m, for n reports of which m come from attackers. With 20 % attackers
            this value is small; try larger ones too.
        seed: The seed that chooses the attackers.

    [Baruch et al. 2019, arXiv:1902.06156, Algorithm 3]
    """

    def collude(mine: "Sequence[Trained]", count: int) -> "Iterable[Trained]":
        far = largest_z(count, len(mine)) if z is None else z

        def beside(part: str, leaf: str) -> Array:
            values = np.stack([one.parts[part][leaf] for one in mine])
            return (values.mean(axis=0) - far * values.std(axis=0)).astype(values.dtype)

        common = {part: {leaf: beside(part, leaf) for leaf in tree} for part, tree in mine[0].parts.items()}
        for one in mine:
            yield _with_leaves(one, lambda part, tree: common[part])

    return _attacked(population, f"a_little_is_enough({z})", share, seed, collude=collude)


def largest_z(count: int, attackers: int) -> float:
    """Return the paper's z for `count` reports, `attackers` of which are attackers'; 0 if no z lets them look honest.

    The paper's s is the number of honest reports that the attackers need on their side for a majority. Attackers who already
    are the majority need none; z is then computed for s = 1.
    """
    honest, needed = count - attackers, max(1, count // 2 + 1 - attackers)
    if honest <= needed:
        return 0.0
    return max(0.0, NormalDist().inv_cdf((honest - needed) / honest))


def _as_held(client: Any, examples: Examples) -> Examples:
    return examples


def _as_trained(mine: "Sequence[Trained]", count: int) -> "Iterable[Trained]":
    return mine


def _attacked(
    population: Mapping[Any, Examples],
    attack: str,
    share: float,
    seed: int,
    examples: Callable[[Any, Examples], Examples] = _as_held,
    collude: Collusion = _as_trained,
) -> AttackedPopulation:
    _check_share(share)
    people = as_population(population)
    described = f"{attack} by {share} of them, seed {seed}"
    chosen = generator(seed, "attackers").permutation(len(people))[: round(share * len(people))]
    return AttackedPopulation(
        people, frozenset(people.pick(int(index)) for index in chosen), examples, collude, described, share
    )


def _check_share(share: object) -> None:
    if not isinstance(share, int | float) or not 0 <= share < 1:
        raise ExperimentError(f"share={share!r}: give the share of clients that attack, a number from 0 to below 1")


def _multiplied(factor: float) -> Collusion:
    """Return a collusion in which every attacker sends `factor` times its update."""

    def scale(part: str, tree: Tree) -> Tree:
        return tree_map(lambda leaf: leaf * leaf.dtype.type(factor), tree)

    def collude(mine: "Sequence[Trained]", count: int) -> "Iterable[Trained]":
        return [_with_leaves(one, scale) for one in mine]

    return collude


def _with_leaves(trained: "Trained", change: Callable[[str, Tree], Tree]) -> "Trained":
    """Return a report with changed trees; its single numbers (steps, shares) and running statistics stay honest."""
    parts = {
        part: tree if part == BUFFERS or set(tree) == {""} else change(part, tree)
        for part, tree in trained.parts.items()
    }
    return replace(trained, parts=parts)
