"""FedDyn: each client's loss is changed from round to round until all clients have the same minimum.

    yᵢ = argmin fᵢ(y) − ⟨hᵢ, y⟩ + α/2 ‖y − x‖²;     hᵢ ← hᵢ − α (yᵢ − x)                        lines 5, 6
    h ← h − α (1/N) Σ (yᵢ − x);                      x ← (1/|P|) Σ yᵢ − h / α                    lines 10, 11

[Acar et al. 2021, arXiv:2111.04263, Algorithm 1, where hᵢ is written ∇Lᵢ]. The client's own optimizer approximates the
argmin. Each client stores its hᵢ, and keeps a new hᵢ only after its update was counted, since h must stay the mean of
all hᵢ. For the same reason, no chain may clip or round the update. The server stores h/α, and α cancels in its
formulas.

    part      value    weight     divided by
    params    x − y    uniform    the number of contributors; never changed by a chain
    share     1        uniform    the population: |P| / N, which turns a mean over P into a sum over N
"""

import math
from dataclasses import replace

import numpy as np

from sumus.aggregate import Part, mean
from sumus.algorithm import Algorithm
from sumus.errors import expect_number
from sumus.optimizers import ServerOptimizer, ServerState
from sumus.spec import registered
from sumus.tree import tree_map
from sumus.types import Tensors, Tree
from sumus.update.transform import chain
from sumus.work import ClientState, ClientWork, LocalRun, Parts, expect_plain, zeros_as

PARAMS = Part("params", weight="uniform", denominator="count", transformed=False)
SHARE = Part("share", content="scalar", weight="uniform", denominator="population", bound=1.0, least=1.0)


def feddyn(client: ClientWork, alpha: float) -> Algorithm:
    """Make FedDyn.

    Args:
        client: The client's local training.
        alpha: α, from 0.01 to 0.1 in the paper. A larger α keeps the clients closer to the server's model within a
            round.
    """
    return Algorithm(dynamic(client, alpha), chain(), mean(PARAMS, SHARE), shifted())


@registered("client/dynamic")
def dynamic(client: ClientWork, alpha: float) -> ClientWork:
    """Make the client's half of FedDyn: g ← g − hᵢ + α(y − x), and a new hᵢ."""
    expect_plain(client, "dynamic")
    expect_number(alpha, 0, math.inf, "dynamic(alpha=)", open_low=True)

    def correct(grads: Tensors, params: Tensors, broadcast: Parts, state: ClientState) -> Tensors:
        own, anchor = state["slope"], broadcast["params"]
        return {name: grad - own[name] + alpha * (params[name] - anchor[name]) for name, grad in grads.items()}

    def finish(broadcast: Parts, params: Tensors, state: ClientState, done: LocalRun) -> tuple[Parts, ClientState]:
        moved = tree_map(lambda base, trained: base - trained, broadcast["params"], params)
        slope = tree_map(lambda old, by: old + alpha * by, state["slope"], moved)
        return {"params": moved, "share": {"": 1.0}}, {"slope": slope}

    rules = replace(client.rules, correct=correct, finish=finish, init=zeros_as("slope"), sends=("params", "share"))
    return replace(client, rules=rules)


@registered("server/shifted")
def shifted() -> ServerOptimizer:
    """Make the server's half of FedDyn: the mean of the clients' models, minus h/α. The server stores h/α in float64.

    Each round subtracts h/α again, and a client's past additions to h stay there. So nothing bounds how far one
    client moves the model.
    """

    def init(params: Tree) -> ServerState:
        return ServerState({"params": params}, {"shift": tree_map(lambda leaf: np.zeros(leaf.shape), params)})

    def update(parts: Parts, state: ServerState) -> ServerState:
        mean_of, share = parts["params"], float(parts["share"][""])
        shift = tree_map(lambda old, by: old + share * by, state.memory["shift"], mean_of)
        params = {
            name: (leaf.astype(np.float64) - mean_of[name] - shift[name]).astype(leaf.dtype)
            for name, leaf in state.broadcast["params"].items()
        }
        return ServerState({**state.broadcast, "params": params}, {"shift": shift})

    return ServerOptimizer(init=init, update=update, takes=("params", "share"))
