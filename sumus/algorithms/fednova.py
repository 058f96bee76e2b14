"""FedNova: whoever takes more steps does not pull harder; each update counts per step, the mean is scaled back up.

    d̄ = Σ pᵢ (x − yᵢ) / ‖aᵢ‖₁,   pᵢ = nᵢ / Σn;     x ← x − (Σ pᵢ ‖aᵢ‖₁) d̄

‖aᵢ‖₁ is how far client i's optimizer goes on a gradient that stays one: its steps for plain SGD, more with momentum.
[Wang et al. 2020, arXiv:2007.07481, eqs. 8 to 10 and section 4.1]

    params    (x − y) / ‖a‖₁    weighted by examples    over the summed weights
    steps     ‖a‖₁              weighted by examples    over the summed weights; one number, with a bound of its own

A chain works on what is sent, which is the difference *per step*: a clip to C bounds a client's whole difference by C ‖a‖₁.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, cast

from sumus import optimizers
from sumus.aggregate import Aggregator, Part, mean, times
from sumus.algorithm import Algorithm
from sumus.errors import PlanError
from sumus.optimizers import ServerOptimizer
from sumus.spec import registered
from sumus.tree import tree_map
from sumus.types import Tensors, Tree
from sumus.update.transform import Transform, chain
from sumus.work import ClientState, ClientWork, LocalRun, Parts, expect_plain, sgd_rule

PARAMS = Part("params", weight="examples", denominator="weight")
STEPS = Part("steps", content="scalar", weight="examples", denominator="weight", bound=2.0**20)


def fednova(client: ClientWork, update: Transform | None = None, server: ServerOptimizer | None = None) -> Algorithm:
    """FedNova, for SGD with or without momentum."""
    return Algorithm(normalized(client), update or chain(), rescaled_mean(PARAMS, STEPS), server or optimizers.sgd(1.0))


@registered("client/normalized")
def normalized(client: ClientWork) -> ClientWork:
    """The client's half: the difference per step, and the steps."""
    expect_plain(client, "normalized")
    rule = client.optimizer.spec
    if rule.name != "rule/sgd":
        raise PlanError("normalized-needs-sgd", f"{client!r}: how far a step goes is only known for SGD; use sgd()")
    momentum, nesterov = float(cast(float, rule.params["momentum"])), bool(rule.params["nesterov"])

    def finish(broadcast: Parts, params: Tensors, state: ClientState, done: LocalRun) -> tuple[Parts, ClientState]:
        steps = reach(momentum, nesterov, done.steps)
        moved = tree_map(lambda base, trained: (base - trained) / steps, broadcast["params"], params)
        return {"params": moved, "steps": {"": steps}}, {}

    return replace(client, finish=finish, sends=("params", "steps"))


@cache
def reach(momentum: float, nesterov: bool, steps: int) -> float:
    """‖a‖₁: how far SGD at rate 1 goes in so many steps when every gradient is 1, found by running its rule."""
    rule = sgd_rule(momentum, nesterov)
    place: Any = 0.0
    state = rule.init(place)
    for step in range(1, steps + 1):
        place, state = rule.update(1.0, state, place, 1.0, step)
    return -float(place)


@registered("aggregator/rescaled_mean")
def rescaled_mean(*parts: Part) -> Aggregator:
    """The server's half: the mean of `params` times the mean of `steps`."""
    if {part.name for part in parts} != {"params", "steps"}:
        raise PlanError("part-words", f"rescaled_mean combines params and steps, not {[part.name for part in parts]}")
    plain = mean(*parts)

    def combine(sums: Mapping[str, Tree], divisors: Mapping[str, int]) -> Mapping[str, Tree]:
        means = plain.combine(sums, divisors)
        return {"params": times(means["params"], float(means["steps"][""]))}

    return Aggregator(parts=parts, combine=combine)
