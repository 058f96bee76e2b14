"""What edges do between two sums: nothing but add; or rounds of their own, on models of their own.

    site = Site.of(algorithm, task, sums, seed, broadcast)
    site = site.after(total)            a round of its own: the model moves by what its devices' sum says
    site = site.after(another)
    sent = site.total(count)            W · (base − model), as integers: an aggregate like any other

Hierarchical FedAvg [Liu et al. 2020, arXiv:1905.06641, Algorithm 1]: κ₁ steps on a device between two averages of its site, κ₂ of
these between two of the server's. A site averages plainly; the server's optimizer takes its step on what comes of it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import numpy as np

from sumus.aggregate import Aggregate
from sumus.algorithm import Algorithm
from sumus.errors import PlanError, expect
from sumus.fixed_point import FixedPoint
from sumus.optimizers import ServerState, sgd
from sumus.spec import record
from sumus.task import Description
from sumus.tree import tree_map
from sumus.types import Broadcast, Tree, hold_plain_numbers

NoiseAt: TypeAlias = Literal["top", "edges"]
MOST_ROUNDS = 1000
_EPSILON = 2.0**-24 + 2.0**-48
"""The share of a number that rounding it to single precision changes, at most, where it was computed in double precision."""
_SEED = b"sumus site round "


@record("edges")
@dataclass(frozen=True)
class Edges:
    """What a plan asks of edges.

    rounds: of their own, between two sums that they send (κ₂ of Liu et al. 2020). With 1 an edge adds, and the model is the one
        that there were without it, bit for bit; with more it is a *site*.
    noise_at: where the noise of differential privacy is added, once there is some: by the "top" server, or by "edges".
    """

    rounds: int = 1
    noise_at: NoiseAt = "top"

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        expect(self.rounds, int, "Edges(rounds=)")
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise PlanError("edge-words", f"Edges(rounds={self.rounds}): from 1 to {MOST_ROUNDS} rounds")
        if self.noise_at not in get_args(NoiseAt):
            raise PlanError("edge-words", f"Edges(noise_at={self.noise_at!r}): it is 'top' or 'edges'")


@dataclass(frozen=True)
class Site:
    """Where a site stands, as a value.

    algorithm: with plain averaging at the end.  sums: the plan's integers.  seed: public, of the sum of the server above.
    base: what that server sent.  at: the same now.  done: rounds.  weights: of each part, added up over these.
    metrics: of the last of them.
    """

    algorithm: Algorithm
    task: Description
    sums: FixedPoint
    seed: bytes
    base: Broadcast
    at: Broadcast
    done: int = 0
    weights: Mapping[str, int] = field(default_factory=dict[str, int])
    metrics: Tree = field(default_factory=dict[str, np.ndarray])

    @staticmethod
    def of(algorithm: Algorithm, task: Description, sums: FixedPoint, seed: bytes, base: Broadcast) -> "Site":
        """Before its first round."""
        return Site(replace(algorithm, server=sgd(1.0)), task, sums, seed, base, base)

    @property
    def seed_now(self) -> bytes:
        """What all who report into the round that comes share. In the first it is the server's own: its sum may still go up as
        it is."""
        return seed_of(self.seed, self.done)

    def after(self, total: Aggregate) -> "Site":
        """One round on. ParticipantError for a sum of more than planned. A sum of nobody, or without weight, moves nothing."""
        combined = self.algorithm.combine(total, self.task, self.sums, self.seed_now, 0)
        moved = self.algorithm.step(combined, ServerState(self.at, {}), self.task).broadcast
        weights = {part: self.weights.get(part, 0) + int(weight) for part, weight in total.weights.items()}
        return replace(self, at=moved, done=self.done + 1, weights=weights, metrics=total.metrics)

    def total(self, count: int) -> Aggregate:
        """What the server above adds. count: whose reports it stands for; each weighs what it did in a round, on average.

        Raises BeyondBoundError where the model has moved further than a sum of so many reports may.
        """
        weights = {part: (weight + self.done // 2) // self.done for part, weight in self.weights.items()}
        moved = {
            part: tree_map(lambda base, now: base.astype(np.float64) - now, tree, self.at[part])
            for part, tree in self.base.items()
        }
        # Each round has rounded every number by _EPSILON of its size. Near its bound a number moves one way, so that its size was
        # at most the larger of where it began and where it is, and what rounding had added.
        share = self.done * _EPSILON / (1 - self.done * _EPSILON)
        rounding = {
            part: tree_map(
                lambda base, now: share * (np.abs(base, dtype=np.float64) + np.abs(now)), tree, self.at[part]
            )
            for part, tree in self.base.items()
        }
        return self.algorithm.as_sum(
            moved, weights, count, self.metrics, self.task, self.sums, self.seed, self.done, rounding
        )


def seed_of(seed: bytes, done: int) -> bytes:
    """What all who report into a site's next round share, after so many. 32 bytes."""
    return seed if done == 0 else hashlib.sha256(_SEED + seed + done.to_bytes(8, "big")).digest()
