"""What an edge does between two sums that it sends: it only adds reports, or it runs rounds on a model of its own.

An edge of the second kind is called a site. "The server above" is the server, or another edge, that receives its sums.

    site = Site.of(algorithm, task, sums, seed, broadcast)
    site = site.after(total)            the sum of one of the site's rounds moves the site's model
    site = site.after(another)
    sent = site.total(count)            W · (base − model), as integers: an aggregate like any other

This is hierarchical FedAvg [Liu et al. 2020, arXiv:1905.06641, Algorithm 1]: a device takes κ₁ steps between two averages of
its site, and a site takes κ₂ averages between two averages of the server. A site computes plain averages; the server's
optimizer takes its step on the result.
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
"""The largest relative change of a number when it is rounded from double to single precision."""
_SEED = b"sumus site round "


@record("edges")
@dataclass(frozen=True)
class Edges:
    """The edge settings of a plan.

    Attributes:
        rounds: The number of rounds that an edge runs for each sum that it sends (κ₂ of Liu et al. 2020). With 1, an
            edge only adds, and the model has the same bits as without the edge. With more, the edge is a *site*.
        noise_at: The place where the noise of differential privacy will be added: at the "top" server, or at the "edges".
    """

    rounds: int = 1
    noise_at: NoiseAt = "top"

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        expect(self.rounds, int, "Edges(rounds=)")
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise PlanError("edge-words", f"Edges(rounds={self.rounds}): give from 1 to {MOST_ROUNDS} rounds")
        if self.noise_at not in get_args(NoiseAt):
            raise PlanError("edge-words", f"Edges(noise_at={self.noise_at!r}): it is 'top' or 'edges'")


@dataclass(frozen=True)
class Site:
    """A site's model and the totals of its rounds, as an immutable value.

    Attributes:
        algorithm: The plan's algorithm, with plain averaging in place of the server's optimizer.
        task: The plan's task.
        sums: The conversion of the plan's floats into integers.
        seed: The public seed of the round of the server above, 32 bytes.
        base: The broadcast of the server above, from which the site started.
        at: The site's own broadcast after its rounds so far.
        done: The number of the site's rounds so far.
        weights: The weight of each part, summed over these rounds.
        metrics: The metrics of the last of these rounds.
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
        """Return a site before its first round. The arguments are the attributes of `Site`."""
        return Site(replace(algorithm, server=sgd(1.0)), task, sums, seed, base, base)

    @property
    def seed_now(self) -> bytes:
        """The public seed of the next round, 32 bytes.

        The first round uses the seed of the server above, since its sum may be sent to that server unchanged.
        """
        return seed_of(self.seed, self.done)

    def after(self, total: Aggregate) -> "Site":
        """Return the site after one more round. A sum without reports or without weight does not move the model.

        Args:
            total: The sum of the round's reports.

        Raises:
            ParticipantError: The sum holds more reports than planned.
        """
        combined = self.algorithm.combine(total, self.task, self.sums, self.seed_now, 0)
        moved = self.algorithm.step(combined, ServerState(self.at, {}), self.task).broadcast
        weights = {part: self.weights.get(part, 0) + int(weight) for part, weight in total.weights.items()}
        return replace(self, at=moved, done=self.done + 1, weights=weights, metrics=total.metrics)

    def total(self, count: int) -> Aggregate:
        """Return the sum that the site sends to the server above.

        Args:
            count: The number of reports that the sum stands for. Each report keeps its mean weight over the rounds.

        Raises:
            BeyondBoundError: The model has moved further than a sum of `count` reports may.
        """
        weights = {part: (weight + self.done // 2) // self.done for part, weight in self.weights.items()}
        moved = {
            part: tree_map(lambda base, now: base.astype(np.float64) - now, tree, self.at[part])
            for part, tree in self.base.items()
        }
        # Each round has rounded every number by at most _EPSILON of its absolute value. A number whose move is near the bound
        # has moved in one direction. So its absolute value was never larger than the larger one of its first and its last
        # value, apart from what rounding had added.
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
    """Return the public seed of a site's next round, 32 bytes.

    Args:
        seed: The public seed of the round of the server above.
        done: The number of the site's rounds before the next one.
    """
    return seed if done == 0 else hashlib.sha256(_SEED + seed + done.to_bytes(8, "big")).digest()
