"""FedNova: more local steps give a client no more influence on the model. Each update is divided by its steps, and the
mean is scaled up again.

    d̄ = Σ pᵢ (x − yᵢ) / ‖aᵢ‖₁,   pᵢ = nᵢ / Σn;     x ← x − (Σ pᵢ ‖aᵢ‖₁) d̄

‖aᵢ‖₁ is how far client i's optimizer goes if every gradient is one: the number of steps for plain SGD, more with
momentum. [Wang et al. 2020, arXiv:2007.07481, eqs. 8 to 10 and section 4.1]

    part      value             weight      divided by
    params    (x − y) / ‖a‖₁    examples    the summed weights
    steps     ‖a‖₁              examples    the summed weights

`steps` is one number: at least ‖a‖₁ of one step, and at most ‖a‖₁ of the largest number of steps.

A chain changes the values that are sent, which are the differences *per step*. A clip to C therefore bounds a client's whole
difference by C ‖a‖₁.
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
STEPS = Part("steps", content="scalar", weight="examples", denominator="weight")
MOST_STEPS = 1024
"""The largest number of steps of a client in a round, if the client's work does not fix the number."""


def fednova(
    client: ClientWork,
    update: Transform | None = None,
    server: ServerOptimizer | None = None,
    cap: int | None = None,
    most_steps: int = MOST_STEPS,
) -> Algorithm:
    """Make FedNova, for SGD with or without momentum.

    Args:
        client: The client's local training.
        update: The transform of an update before it is added; no transform by default.
        server: The server optimizer; SGD with rate 1 by default.
        cap: The largest number of examples that counts towards a client's weight.
        most_steps: The largest number of steps of a client in a round, if `client.steps` does not fix the number. A
            report with more steps, or with less than one, is refused.
    """
    work = normalized(client)
    momentum, nesterov = _of_sgd(client)
    nearest, farthest = (reach(momentum, nesterov, number) for number in (1, client.steps or most_steps))
    steps = replace(STEPS, bound=farthest, least=nearest, cap=cap)
    return Algorithm(
        work, update or chain(), rescaled_mean(replace(PARAMS, cap=cap), steps), server or optimizers.sgd(1.0)
    )


@registered("client/normalized")
def normalized(client: ClientWork) -> ClientWork:
    """Make the client's half of FedNova: send the difference per step, and the steps."""
    expect_plain(client, "normalized")
    momentum, nesterov = _of_sgd(client)

    def finish(broadcast: Parts, params: Tensors, state: ClientState, done: LocalRun) -> tuple[Parts, ClientState]:
        steps = reach(momentum, nesterov, done.steps)
        moved = tree_map(lambda base, trained: (base - trained) / steps, broadcast["params"], params)
        return {"params": moved, "steps": {"": steps}}, {}

    return replace(client, rules=replace(client.rules, finish=finish, sends=("params", "steps")))


def _of_sgd(client: ClientWork) -> tuple[float, bool]:
    """Return the momentum of a client that trains by SGD, and whether it is Nesterov's.

    Raises:
        PlanError: The client trains by another rule, or not all of its steps and leaves have one rate.
    """
    rule = client.optimizer.spec
    if rule.name != "rule/sgd":
        raise PlanError("normalized-needs-sgd", f"{client!r}: how far a step goes is only known for SGD; use sgd()")
    if not client.has_one_rate:
        raise PlanError(
            "normalized-needs-sgd",
            f"{client!r}: how far a client goes is only known if all steps and leaves have one rate; leave out schedules "
            "within a round, and lr_factor",
        )
    return float(cast(float, rule.params["momentum"])), bool(rule.params["nesterov"])


@cache
def reach(momentum: float, nesterov: bool, steps: int) -> float:
    """Compute ‖a‖₁ by running the rule: the distance that SGD with rate 1 moves in `steps` steps if every gradient is 1."""
    rule = sgd_rule(momentum, nesterov)
    place: Any = 0.0
    state = rule.init(place)
    for step in range(1, steps + 1):
        place, state = rule.update(1.0, state, place, 1.0, step)
    return -float(place)


@registered("aggregator/rescaled_mean")
def rescaled_mean(*parts: Part) -> Aggregator:
    """Make the server's half of FedNova: the mean of `params` times the mean of `steps`."""
    if {part.name for part in parts} != {"params", "steps"}:
        raise PlanError("part-words", f"rescaled_mean combines params and steps, not {[part.name for part in parts]}")
    plain = mean(*parts)

    def combine(sums: Mapping[str, Tree], divisors: Mapping[str, int]) -> Mapping[str, Tree]:
        means = plain.combine(sums, divisors)
        return {"params": times(means["params"], float(means["steps"][""]))}

    def longest(reaches: Mapping[str, tuple[float, float]]) -> float:
        """Bound how far one client moves the product: it moves both factors, and neither mean is larger than one
        client's largest part.
        """
        (share, length), (steps_share, steps) = reaches["params"], reaches["steps"]
        return share * length * steps + length * steps_share * steps

    return Aggregator(parts=parts, combine=combine, longest=longest)
