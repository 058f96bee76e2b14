"""SCAFFOLD: each client estimates how its gradient differs from the mean of all clients, and corrects every step by the
difference.

    y ← y − η (gᵢ(y) − cᵢ + c)                                                                  line 10
    cᵢ⁺ = ∇fᵢ(x)  (option 1)   or   cᵢ − c + (x − y) / (Kη)  (option 2)                         line 12
    x ← x + mean(y − x);   c ← c + Σ(cᵢ⁺ − cᵢ) / N                                              lines 16, 17

[Karimireddy et al. 2020, arXiv:1910.06378, Algorithm 1]. The client stores its control cᵢ, and keeps a new one only
after its update was counted: c stays the mean of all cᵢ only if both change, or neither.

    part       value        weight     divided by
    params     x − y        uniform    the number of contributors
    control    cᵢ⁺ − cᵢ     uniform    the population

The chain never clips or rounds `control`, since c would then drift away from Σcᵢ/N. The numbers of this part are as large
as gradients, so it has its own bound. With `control_bound=`, a client clips each number of cᵢ⁺ − cᵢ to that bound before it
keeps and sends the number, so that cᵢ and c still change by the same amount.

c is a sum of clients' reports, and corrects the steps of all clients. A client that lies about its control changes
all other updates. Only the clip of updates bounds the step of the model (`sumus.influence`).
"""

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from sumus import optimizers
from sumus.aggregate import WIDEST, Part, mean
from sumus.algorithm import Algorithm
from sumus.errors import PlanError
from sumus.optimizers import ServerOptimizer, ServerState
from sumus.spec import registered
from sumus.tree import tree_map
from sumus.types import Tensors, Tree
from sumus.update.clip import in_single
from sumus.update.transform import Transform, chain
from sumus.work import ClientRules, ClientState, ClientWork, LocalRun, Parts, expect_plain, zeros_as

PARAMS = Part("params", weight="uniform", denominator="count")
CONTROL = Part("control", weight="uniform", denominator="population", transformed=False, bound=WIDEST)
_BOUND = "control_bound"


def scaffold(
    client: ClientWork,
    update: Transform | None = None,
    server: ServerOptimizer | None = None,
    option: Literal[1, 2] = 2,
    control_bound: float | None = None,
) -> Algorithm:
    """Make SCAFFOLD.

    Args:
        client: The client's local training.
        update: The transform of an update before it is added; no transform by default.
        server: The server optimizer of the model; SGD with rate 1 by default.
        option: How cᵢ⁺ is computed: 2 costs nothing and needs plain SGD; 1 costs a pass over the client's examples.
        control_bound: The largest amount by which a client moves a number of its control in a round, in units of
            gradients. It is rounded down to single precision. None for 65536, which is too wide to protect anything: a
            plan for devices must name a bound.
    """
    part = CONTROL if control_bound is None else replace(CONTROL, bound=in_single(control_bound, _BOUND))
    work = control(client, option, control_bound)
    return Algorithm(work, update or chain(), mean(PARAMS, part), controlled(server or optimizers.sgd(1.0)))


@registered("client/control")
def control(client: ClientWork, option: Literal[1, 2] = 2, bound: float | None = None) -> ClientWork:
    """Make the client's half of SCAFFOLD: corrected steps, and a new cᵢ.

    Args:
        client: The client's local training. Option 1 works with any optimizer.
        option: How cᵢ⁺ is computed, see `scaffold`.
        bound: The bound of each number of cᵢ⁺ − cᵢ; None for no bound.
    """
    expect_plain(client, "control")
    most = None if bound is None else in_single(bound, _BOUND)
    rule = client.optimizer.spec
    if option == 2 and (rule.name != "rule/sgd" or rule.params["momentum"] or client.clip_norm is not None):
        raise PlanError(
            "control-needs-sgd",
            f"{client!r}: (x − y) / (Kη) is a mean gradient only for SGD without momentum and clip_norm; use option=1",
        )
    if option == 2 and any(group.lr_factor != 1.0 for group in client.groups):
        raise PlanError(
            "control-needs-sgd",
            f"{client!r}: (x − y) / (Kη) is a mean gradient only if all leaves have one rate; leave lr_factor out, or use "
            "option=1",
        )

    def correct(grads: Tensors, params: Tensors, broadcast: Parts, state: ClientState) -> Tensors:
        own, common = state["control"], broadcast["control"]
        return {name: grad - own[name] + common[name] for name, grad in grads.items()}

    def held(change: Any) -> Any:
        return change if most is None else change.clip(-most, most)

    def finish(broadcast: Parts, params: Tensors, state: ClientState, done: LocalRun) -> tuple[Parts, ClientState]:
        own, common = state["control"], broadcast["control"]
        moved = tree_map(lambda base, trained: base - trained, broadcast["params"], params)
        if option == 1 and done.gradient is not None:
            change = tree_map(lambda gradient, old: gradient - old, done.gradient, own)
        elif done.lr == 0:  # the model did not move, so there is nothing to learn about the gradient
            change = tree_map(lambda old: old * 0, own)
        else:
            change = tree_map(lambda way, all_: way / (done.steps * done.lr) - all_, moved, common)
        change = tree_map(held, change)
        return {"params": moved, "control": change}, {"control": tree_map(lambda old, by: old + by, own, change)}

    both = ("params", "control")
    rules = ClientRules(correct, finish, zeros_as("control"), needs_gradient=option == 1, sends=both, receives=both)
    return replace(client, rules=rules)


@registered("server/controlled")
def controlled(server: ServerOptimizer) -> ServerOptimizer:
    """Make the server's half of SCAFFOLD: `server` takes the model's step. The server stores c in float64, and sends it in the
    model's dtypes.
    """

    def sent(control: Tree, params: Tree) -> Tree:
        return tree_map(lambda leaf, like: leaf.astype(like.dtype), control, params)

    def init(params: Tree) -> ServerState:
        inner = server.init(params)
        zeros = tree_map(lambda leaf: np.zeros(leaf.shape), params)
        return ServerState({**inner.broadcast, "control": sent(zeros, params)}, {**inner.memory, "control": zeros})

    def update(parts: Parts, state: ServerState) -> ServerState:
        inner = server.update(parts, state)
        moved = tree_map(np.add, state.memory["control"], parts["control"])
        params = inner.broadcast["params"]
        return ServerState({**inner.broadcast, "control": sent(moved, params)}, {**inner.memory, "control": moved})

    takes, broadcasts = (*server.takes, "control"), (*server.broadcasts, "control")
    return replace(server, init=init, update=update, takes=takes, broadcasts=broadcasts)
