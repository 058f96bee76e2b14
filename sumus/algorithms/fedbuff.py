"""FedBuff: asynchronous training. Updates are counted as they arrive, including those from older models. The server takes
a step after every K updates.

    x ← x + η (1/K) Σ s(τᵢ) Δᵢ,     s(τ) = 1/√(1 + τ)

τ is the number of steps that the server took since it sent the client its model. [Nguyen et al. 2022, arXiv:2106.06639,
Algorithm 1 and section 5] This file contains only the weighting rule. The pacing decides K, and how many clients train
at once. In synchronous rounds no update is stale, and the rule is FedAvg with equal weights.

    part      value    weight    divided by
    params    x − y    s(τᵢ)     the number of contributors, so stale updates do not increase the weight of the others
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
    """Make FedBuff.

    Args:
        client: The client's local training.
        update: The transform of an update before it is added; no transform by default.
        server: The server optimizer; SGD with rate 1 by default.
        staleness: The rule s; by default the paper's. See `sumus.staleness`.
    """
    if staleness is not None:
        expect(staleness, Staleness, "fedbuff(staleness=)")
    part = Part("params", weight=staleness or polynomial(0.5), denominator="count")
    return Algorithm(client, update or chain(), mean(part), server or optimizers.sgd(1.0))
