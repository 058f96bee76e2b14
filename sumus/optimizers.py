"""Server optimizers: the rules by which the server applies the combined update. They compute elementwise, in float64.

    server = optimizers.adam(lr=1e-2)
    state  = server.init(params)
    state  = server.update({"params": mean}, state)        # mean = base − trained, so the server subtracts
    model  = server.release(state)

Papers write Δ for the mean of the clients' (trained − base); the mean in this file is −Δ. With that sign, each rule
here computes the recursion of its paper. FedAvg is `sgd(1.0)`. [Reddi et al. 2021, arXiv:2003.00295, Algorithm 2; Hsu
et al. 2019, arXiv:1909.06335]

The rules use only + − × ÷ and √. IEEE 754 rounds these operations alike everywhere, so the same sums give the same
model on any machine.

In the formulas, x is the model and η is `lr`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sumus.errors import PlanError, expect_number
from sumus.spec import Value, registered
from sumus.types import Array, Broadcast, Tree


@dataclass(frozen=True)
class ServerState:
    """The state that the server keeps between rounds.

    Attributes:
        broadcast: The parts that are sent to devices, by name.
        memory: The optimizer's own trees, by name.
    """

    broadcast: Broadcast
    memory: Mapping[str, Tree]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ServerOptimizer(Value):
    """A server optimizer, as three pure functions and some bounds.

    Attributes:
        init: (the shared leaves with a gradient) → the state before the first round.
        update: (combined parts by name, state) → the next state.
        release: (state) → the model to publish.
        takes: The names of the combined parts that `update` needs.
        broadcasts: The names of the parts that are sent to devices.
        longest: (the L2 norm by which one client moves the mean of a round) → the L2 norm by which that client moves
            the model, over this round and all later ones, if the other clients' means stay as they are. None if the
            optimizer does not bound this.
        largest: The largest amount by which a round moves any one number of the model, for any means; None if nothing
            bounds this.
    """

    init: Callable[[Tree], ServerState]
    update: Callable[[Mapping[str, Tree], ServerState], ServerState]
    release: Callable[[ServerState], Tree] = lambda state: state.broadcast["params"]
    takes: tuple[str, ...] = ("params",)
    broadcasts: tuple[str, ...] = ("params",)
    longest: Callable[[float], float] | None = None
    largest: float | None = None


def _elementwise(
    slots: Mapping[str, float],
    rule: Callable[[Any, Mapping[str, Any], Any], tuple[Any, Mapping[str, Any]]],
    gain: float | None = None,
    largest: float | None = None,
) -> ServerOptimizer:
    """Make an optimizer of the part `params` from a rule on float64 arrays.

    Args:
        slots: The names and starting values of the memory. A slot called `*_power` is one number for all leaves.
        rule: (mean, memory, param) → (param, memory), for one leaf.
        gain: If the rule is linear in the means: the factor on one mean in the model, summed over its round and all
            later ones.
        largest: The largest amount by which a round moves any one number of the model.
    """

    def init(params: Tree) -> ServerState:
        def start(name: str, value: float, leaf: Array) -> Array:
            return np.full(() if name.endswith("_power") else leaf.shape, value, np.float64)

        memory = {name: {k: start(name, v, leaf) for k, leaf in params.items()} for name, v in slots.items()}
        return ServerState({"params": params}, memory)

    def update(parts: Mapping[str, Tree], state: ServerState) -> ServerState:
        params: dict[str, Array] = {}
        memory: dict[str, dict[str, Array]] = {name: {} for name in slots}
        for leaf, old in state.broadcast["params"].items():
            before = {name: state.memory[name][leaf] for name in slots}
            new, after = rule(parts["params"][leaf], before, old.astype(np.float64))
            params[leaf] = np.asarray(new).astype(old.dtype)
            for name in slots:
                memory[name][leaf] = np.asarray(after[name], np.float64)
        return ServerState({**state.broadcast, "params": params}, memory)

    def longest(step: float) -> float:
        return step * (gain or 0.0)

    bound = None if gain is None else longest
    return ServerOptimizer(init=init, update=update, longest=bound, largest=largest)


def _check(lr: float, *betas: float) -> None:
    expect_number(lr, 0, math.inf, "lr")
    for beta in betas:
        expect_number(beta, 0, math.nextafter(1.0, 0.0), "beta")


@registered("server/sgd")
def sgd(lr: float = 1.0) -> ServerOptimizer:
    """Make an optimizer that does gradient descent: x ← x + ηΔ.

    With η = 1, the new model is the mean of the clients' models.

    [McMahan et al. 2017, arXiv:1602.05629, Algorithm 1]

    Args:
        lr: η.
    """
    expect_number(lr, 0, math.inf, "lr")
    return _elementwise({}, lambda mean, memory, x: (x - lr * mean, {}), gain=lr)


@registered("server/momentum")
def momentum(lr: float = 1.0, beta: float = 0.9, nesterov: bool = False) -> ServerOptimizer:
    """Make the optimizer momentum (FedAvgM): v ← βv + Δ;  x ← x + ηv. [Hsu et al. 2019, arXiv:1909.06335, section 4.3]

    Over all rounds, one Δ moves the model by η(1 + β + β² + …)Δ = η/(1 − β) Δ, with `nesterov` too.

    Args:
        lr: η.
        beta: β.
        nesterov: Whether to use Nesterov momentum, with the step x ← x + η(Δ + βv).
    """
    _check(lr, beta)

    def rule(mean: Any, memory: Mapping[str, Any], x: Any) -> tuple[Any, Mapping[str, Any]]:
        velocity = beta * memory["velocity"] + mean
        return x - lr * (mean + beta * velocity if nesterov else velocity), {"velocity": velocity}

    return _elementwise({"velocity": 0.0}, rule, gain=lr / (1 - beta))


@registered("server/adagrad")
def adagrad(lr: float, beta: float = 0.0, tau: float = 1e-3) -> ServerOptimizer:
    """Make the optimizer Adagrad: m ← βm + (1−β)Δ;  v ← v + Δ²;  x ← x + ηm/(√v + τ), where v starts at τ².

    [Reddi et al. 2021, arXiv:2003.00295, Algorithm 2, line FedAdagrad]

    Since |m| ≤ (1−β) √(1 + β² + β⁴ + …) √(ΣΔ²) ≤ √((1−β)/(1+β)) √v, no number moves by more than η √((1−β)/(1+β)) in a round.

    Args:
        lr: η.
        beta: β.
        tau: τ.
    """
    _check(lr, beta)

    def rule(mean: Any, memory: Mapping[str, Any], x: Any) -> tuple[Any, Mapping[str, Any]]:
        first = beta * memory["first"] + (1 - beta) * mean
        second = memory["second"] + mean * mean
        return x - lr * first / (np.sqrt(second) + tau), {"first": first, "second": second}

    return _elementwise({"first": 0.0, "second": tau * tau}, rule, largest=lr * math.sqrt((1 - beta) / (1 + beta)))


@registered("server/adam")
def adam(
    lr: float, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3, bias_correction: bool = False
) -> ServerOptimizer:
    """Make the optimizer Adam: m ← β₁m + (1−β₁)Δ;  v ← β₂v + (1−β₂)Δ²;  x ← x + ηm/(√v + τ), where v starts at τ².

    [Reddi et al. 2021, arXiv:2003.00295, Algorithm 2, line FedAdam]

    By the Cauchy–Schwarz inequality, |m| ≤ (1−β₁) √(Σ (β₁²/β₂)^k) √(Σ β₂^k Δ²). So no number moves in a round by more
    than η times (1−β₁) / √((1−β₂)(1 − β₁²/β₂)), which is 2.35 by default. There is no such bound if β₁² ≥ β₂.

    Args:
        lr: η.
        betas: (β₁, β₂).
        tau: τ.
        bias_correction: Start v at 0, and divide m and v by 1 − β^t, as Kingma & Ba (2015) do; Reddi et al. do not. The
            first rounds then take full steps, which helps in short runs.
    """
    _check(lr, *betas)
    beta1, beta2 = betas

    def rule(mean: Any, memory: Mapping[str, Any], x: Any) -> tuple[Any, Mapping[str, Any]]:
        first = beta1 * memory["first"] + (1 - beta1) * mean
        second = beta2 * memory["second"] + (1 - beta2) * mean * mean
        if not bias_correction:
            return x - lr * first / (np.sqrt(second) + tau), {"first": first, "second": second}
        power1, power2 = beta1 * memory["beta1_power"], beta2 * memory["beta2_power"]
        x = x - lr * (first / (1 - power1)) / (np.sqrt(second / (1 - power2)) + tau)
        return x, {"first": first, "second": second, "beta1_power": power1, "beta2_power": power2}

    ratio = _adam_ratio(beta1, beta2, bias_correction)
    largest = None if ratio is None else lr * ratio
    if bias_correction:
        slots = {"first": 0.0, "second": 0.0, "beta1_power": 1.0, "beta2_power": 1.0}
        return _elementwise(slots, rule, largest=largest)
    return _elementwise({"first": 0.0, "second": tau * tau}, rule, largest=largest)


_EXACT_ROUNDS = 4096


def _adam_ratio(beta1: float, beta2: float, bias_correction: bool) -> float | None:
    """Return the largest |m| / √v that any means can give; None if it is not bounded. With `bias_correction`, m and v
    are the corrected ones.
    """
    if not beta1 * beta1 < beta2:
        return 1.0 if beta1 == 0 == beta2 else None
    square = (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1 * beta1 / beta2))
    if bias_correction:  # in round t, |m|² / v is at most `square` · (1 − (β₁²/β₂)^t) · (1 − β₂^t) / (1 − β₁^t)²
        rounds = np.arange(1, _EXACT_ROUNDS + 1)
        shares = (1 - (beta1 * beta1 / beta2) ** rounds) * (1 - beta2**rounds) / (1 - beta1**rounds) ** 2
        square *= max(float(shares.max()), 1 / (1 - beta1**_EXACT_ROUNDS) ** 2)  # later rounds have no larger term
    return math.sqrt(square)


@registered("server/yogi")
def yogi(lr: float, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3) -> ServerOptimizer:
    """Make Yogi: `adam` with v ← v − (1−β₂)Δ² sign(v − Δ²), so v moves by (1−β₂)Δ² for any v. Arguments: as in `adam`.

    [Reddi et al. 2021, arXiv:2003.00295, Algorithm 2, line FedYogi]

    After each round, v is at least β₂ times the v before it, and at least min(β₂, 1−β₂) Δ². So |m| ≤ (1−β₁) Σ
    (β₁/√β₂)^k √v / √min(β₂, 1−β₂), and no number moves in a round by more than η times (1−β₁) / ((1 − β₁/√β₂) √min(β₂,
    1−β₂)), which is 10.5 by default. There is no such bound if β₁² ≥ β₂.
    """
    _check(lr, *betas)
    beta1, beta2 = betas

    def rule(mean: Any, memory: Mapping[str, Any], x: Any) -> tuple[Any, Mapping[str, Any]]:
        first = beta1 * memory["first"] + (1 - beta1) * mean
        square = mean * mean
        second = memory["second"] - (1 - beta2) * square * np.sign(memory["second"] - square)
        return x - lr * first / (np.sqrt(second) + tau), {"first": first, "second": second}

    fading = beta1 / math.sqrt(beta2) if beta2 else math.inf
    ratio = (1 - beta1) / ((1 - fading) * math.sqrt(min(beta2, 1 - beta2))) if fading < 1 else None
    largest = None if ratio is None else lr * ratio
    return _elementwise({"first": 0.0, "second": tau * tau}, rule, largest=largest)


@registered("server/averaged")
def averaged(server: ServerOptimizer, decay: float = 0.9) -> ServerOptimizer:
    """Make an optimizer that trains with `server`, and publishes a running mean of its models: a ← γa + (1−γ)x.

    After the first round, a = x. Clients continue from x. Evaluation and `history.model` use a. The mean reduces the
    fluctuation of adaptive server optimizers. [Polyak & Juditsky 1992, as an exponential mean]

    A mean of models moves no further than the model that moves furthest, so the bounds of `server` hold for a too.

    Args:
        server: The optimizer that trains.
        decay: γ.
    """
    _check(0.0, decay)

    if server.spec.name == "server/averaged":
        raise PlanError("averaged-twice", f"{server!r} is averaged already; average once")

    def init(params: Tree) -> ServerState:
        inner = server.init(params)
        average = {name: leaf.astype(np.float64) for name, leaf in params.items()}
        return ServerState(inner.broadcast, {**inner.memory, "average": average, "average_weight": {"": np.zeros(())}})

    def update(parts: Mapping[str, Tree], state: ServerState) -> ServerState:
        inner = server.update(parts, state)
        started = float(state.memory["average_weight"][""])
        keep = decay * started
        average = {
            name: keep * state.memory["average"][name] + (1 - keep) * leaf.astype(np.float64)
            for name, leaf in inner.broadcast["params"].items()
        }
        return ServerState(inner.broadcast, {**inner.memory, "average": average, "average_weight": {"": np.ones(())}})

    def release(state: ServerState) -> Tree:
        params = state.broadcast["params"]
        return {name: state.memory["average"][name].astype(leaf.dtype) for name, leaf in params.items()}

    return replace(server, init=init, update=update, release=release)
