"""FedProx: FedAvg whose clients are held to the model they were sent, and who send whatever work they managed.

A client minimises h(w) = F_k(w) + μ/2 ‖w − wᵗ‖², in as many steps as its device has time for; every report counts, also a
partial one. [Li et al. 2020, arXiv:1812.06127, Algorithm 2]

    params    wᵗ − w    weighted by examples    over the summed weights

The paper draws devices by their number of examples and takes the plain mean; here they are drawn alike and weighted, as in
FedAvg. With μ = 0 and everyone's work done this is FedAvg.
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
    """FedProx.

    Args:
        mu: μ, how strongly a client is held; 0.001 to 1 in the paper.
        cap: the most examples that a client's weight counts.
    """
    return Algorithm(prox(client, mu), update or chain(), mean(replace(PARAMS, cap=cap)), server or optimizers.sgd(1.0))


@registered("client/prox")
def prox(client: ClientWork, mu: float) -> ClientWork:
    """g ← g + μ(w − wᵗ), whatever the client's optimizer."""
    expect_plain(client, "prox")
    expect_number(mu, 0, math.inf, "prox(mu=)")

    def correct(grads: Tensors, params: Tensors, broadcast: Parts, state: ClientState) -> Tensors:
        anchor = broadcast["params"]
        return {name: grad + mu * (params[name] - anchor[name]) for name, grad in grads.items()}

    return replace(client, rules=replace(client.rules, correct=correct))
