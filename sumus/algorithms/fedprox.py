"""FedProx: FedAvg in which clients stay near the server's model, and send as much work as they had time for.

A client minimizes h(w) = F_k(w) + μ/2 ‖w − wᵗ‖², in as many steps as its device has time for. Every report counts, even
if it contains only a part of the work. [Li et al. 2020, arXiv:1812.06127, Algorithm 2]

    part      value     weight      divided by
    params    wᵗ − w    examples    the summed weights

The paper draws devices with probabilities by their number of examples, and takes the plain mean. Here, devices are
drawn uniformly and weighted by their examples, as in FedAvg. If μ = 0 and every client finishes its work, this is
FedAvg.
"""

import math
from dataclasses import replace

from sumus import optimizers
from sumus.aggregate import Part, mean
from sumus.algorithm import Algorithm
from sumus.errors import expect_number
from sumus.optimizers import ServerOptimizer
from sumus.spec import registered
from sumus.types import Tensors
from sumus.update.transform import Transform, chain
from sumus.work import ClientState, ClientWork, Parts, expect_plain

PARAMS = Part("params", weight="examples", denominator="weight")


def fedprox(
    client: ClientWork,
    mu: float,
    update: Transform | None = None,
    server: ServerOptimizer | None = None,
    cap: int | None = None,
) -> Algorithm:
    """Make FedProx.

    Args:
        client: The client's local training.
        mu: μ, how strongly a client is pulled towards the server's model; from 0.001 to 1 in the paper.
        update: The transform of an update before it is added; no transform by default.
        server: The server optimizer; SGD with rate 1 by default.
        cap: The largest number of examples that counts towards a client's weight.
    """
    return Algorithm(prox(client, mu), update or chain(), mean(replace(PARAMS, cap=cap)), server or optimizers.sgd(1.0))


@registered("client/prox")
def prox(client: ClientWork, mu: float) -> ClientWork:
    """Make the client's half of FedProx, for any client optimizer: g ← g + μ(w − wᵗ)."""
    expect_plain(client, "prox")
    expect_number(mu, 0, math.inf, "prox(mu=)")

    def correct(grads: Tensors, params: Tensors, broadcast: Parts, state: ClientState) -> Tensors:
        anchor = broadcast["params"]
        return {name: grad + mu * (params[name] - anchor[name]) for name, grad in grads.items()}

    return replace(client, rules=replace(client.rules, correct=correct))
