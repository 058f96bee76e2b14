"""FedBuff: updates are counted as they come, whatever model they began from, and the server steps at every K of them.

    x ← x + η (1/K) Σ s(τᵢ) Δᵢ,     s(τ) = 1/√(1 + τ)

τ is how many steps the server took since the client was sent its model. [Nguyen et al. 2022, arXiv:2106.06639, Algorithm 1
and section 5] This file is the rule; when there are K, and how many clients train at once, is for the pacing to say. In
synchronous rounds nothing is stale, and the rule is FedAvg with equal weights.

    params    x − y    weighted by s(τ)    over the contributors: what a stale update lacks is not given to the others
"""

from sumus import optimizers
from sumus.aggregate import Part, mean
from sumus.algorithm import Algorithm
from sumus.errors import expect
from sumus.optimizers import ServerOptimizer
from sumus.staleness import Staleness, polynomial
from sumus.update.transform import Transform, chain
from sumus.work import ClientWork


def fedbuff(
    client: ClientWork,
    update: Transform | None = None,
    server: ServerOptimizer | None = None,
    staleness: Staleness | None = None,
) -> Algorithm:
    """FedBuff. staleness: s, by default the paper's (`sumus.staleness`)."""
    if staleness is not None:
        expect(staleness, Staleness, "fedbuff(staleness=)")
    part = Part("params", weight=staleness or polynomial(0.5), denominator="count")
    return Algorithm(client, update or chain(), mean(part), server or optimizers.sgd(1.0))
