"""Every algorithm against its paper: the recursion as the page has it, in numpy, and what `sumus.simulate` makes.

The transcriptions keep the papers' letters and signs (Δ = y − x, where sumus sends x − y), and share no arithmetic with
sumus. The problem is least squares in float64, whose gradients are a formula; clients differ in data and in number of
examples, and a few of them take part in a round. Cohorts, batches and stragglers are drawn by the simulator's keys, so that
both see the same ones. Sums are fixed point: models agree to 1e-9 of the way that they went.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sumus
from sumus.executors.executor import ClientAssignment
from sumus.executors.sequential import SequentialExecutor
from sumus.rng import generator, key
from sumus.training.program import Program, one_thread
from sumus.types import Floats

SEED, ROUNDS, COHORT = 7, 6, 3
N = {"g": 3, "b": 9, "e": 5, "a": 14, "f": 6, "c": 11, "d": 4}
"""Client → n_k; the population's order is not the alphabet's."""
START = np.array([0.5, -0.25, 1.0, 0.125])
"""Three weights and the bias."""
RATE, DECAY = 0.06, 0.9

RNG = np.random.default_rng(1)
INPUTS = {who: RNG.normal(size=(n, 3)) * RNG.uniform(0.3, 1.3, 3) for who, n in N.items()}
TARGETS = {who: INPUTS[who] @ RNG.normal(size=(3, 1)) * 2 + RNG.normal(size=(n, 1)) for who, n in N.items()}
PEOPLE = sumus.Population(list(N), lambda who: (INPUTS[who], TARGETS[who]))


def model() -> nn.Module:
    layer = nn.Linear(3, 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(START[None, :3]))
        layer.bias.copy_(torch.from_numpy(START[3:]))
    return layer


TASK = sumus.Task(model, sumus.losses.mean_squared_error)

Gradient = Callable[[Floats], Floats]


def gradient(who: str, rows: Any = slice(None)) -> Gradient:
    """∇ of the mean of (⟨(input, 1), x⟩ − target)² over some of a client's examples."""
    features = np.hstack([INPUTS[who], np.ones((N[who], 1))])[rows]
    wanted = TARGETS[who][rows, 0]
    return lambda x: 2 * features.T @ (features @ x - wanted) / len(wanted)


@dataclass(frozen=True)
class Setting:
    """How clients train, and what the simulator drew for them."""

    work: dict[str, Any]
    fleet: sumus.Fleet = field(default_factory=sumus.Fleet)

    def sgd(self, **more: Any) -> sumus.ClientWork:
        return sumus.sgd(sumus.schedules.exponential(RATE, DECAY), **self.work, **more)

    def gradients(self, number: int, who: str) -> Iterator[Gradient]:
        """The mini-batch gradient g of each of the K local steps of a client's round."""
        own, work = ("round", number, "client", who), self.sgd()
        fate = self.fleet.fate(work.step_count(N[who]), generator(SEED, *own, "fleet"))
        rng = generator(key(SEED, *own, "training"), "batches")
        return (gradient(who, rows) for rows in work.batches(N[who], rng, fate.most_steps))


def cohort(number: int) -> list[str]:
    rng = generator(SEED, "round", number, "cohort")
    return [list(N)[index] for index in rng.choice(len(N), size=COHORT, replace=False)]


def rate(number: int) -> float:
    return RATE * DECAY**number


SETTINGS = {
    "full batches": Setting({"steps": 5}),
    "mini-batches, unequal steps": Setting({"epochs": 2, "batch_size": 4}),
    "stragglers": Setting({"steps": 8, "batch_size": 3}, sumus.Fleet(stragglers=0.6)),
}
everywhere = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def vector(leaves: Any) -> Floats:
    return np.append(np.asarray(leaves["weight"])[0], np.asarray(leaves["bias"]))


def simulated(algorithm: sumus.Algorithm, setting: Setting) -> Floats:
    history = sumus.run(
        sumus.Experiment(
            sumus.Plan(TASK, algorithm, sumus.Pacing(COHORT)), PEOPLE, ROUNDS, seed=SEED, fleet=setting.fleet
        ),
        out=sumus.Output(progress=False),
    )
    return vector(history.model)


def assert_agree(ours: Floats, papers: Floats, within: float = 1e-9) -> None:
    way = np.linalg.norm(papers - START)
    assert way > 0.3
    assert np.linalg.norm(ours - papers) < within * way


# ── Li et al. 2020, arXiv:1812.06127 ─────────────────────────────────────────────────────────────────────────────────


def fedprox(setting: Setting, mu: float) -> Floats:
    """Algorithm 2, its proximal term; devices are drawn alike and weigh by n_k, as in the FedAvg that the paper recalls."""
    w = START
    for t in range(ROUNDS):
        total = np.zeros(4)
        for k in cohort(t):
            w_k = w  # w_k ≈ argmin h_k(w; wᵗ) = F_k(w) + μ/2 ‖w − wᵗ‖²
            for grad in setting.gradients(t, k):
                w_k = w_k - rate(t) * (grad(w_k) + mu * (w_k - w))
            total += N[k] * w_k
        w = total / sum(N[k] for k in cohort(t))
    return w


@everywhere
@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_fedprox(setting: Setting, mu: float) -> None:
    assert_agree(simulated(sumus.fedprox(setting.sgd(), mu), setting), fedprox(setting, mu))


# ── Karimireddy et al. 2020, arXiv:1910.06378 ────────────────────────────────────────────────────────────────────────


def scaffold(setting: Setting, option: int, eta_g: float) -> Floats:
    """Algorithm 1; option I with the gradient over all of a client's data."""
    x, c = START, np.zeros(4)
    c_i = {i: np.zeros(4) for i in N}
    for r in range(ROUNDS):
        eta_l, S = rate(r), cohort(r)  # 4: sample clients S ⊆ {1, …, N}
        delta_y, delta_c = [], []
        for i in S:
            y, K = x, 0  # 7: yᵢ ← x
            for g in setting.gradients(r, i):
                y = y - eta_l * (g(y) - c_i[i] + c)  # 10: yᵢ ← yᵢ − η_l (gᵢ(yᵢ) − cᵢ + c)
                K += 1
            # 12: cᵢ⁺ ← (i) gᵢ(x), or (ii) cᵢ − c + 1/(K η_l) (x − yᵢ)
            c_plus = gradient(i)(x) if option == 1 else c_i[i] - c + (x - y) / (K * eta_l)
            delta_y.append(y - x)  # 13: communicate (Δyᵢ, Δcᵢ) ← (yᵢ − x, cᵢ⁺ − cᵢ)
            delta_c.append(c_plus - c_i[i])
            c_i[i] = c_plus  # 14: cᵢ ← cᵢ⁺
        # 16: (Δx, Δc) ← 1/|S| Σ (Δyᵢ, Δcᵢ);  17: x ← x + η_g Δx and c ← c + |S|/N Δc
        x = x + eta_g * np.mean(delta_y, axis=0)
        c = c + len(S) / len(N) * np.mean(delta_c, axis=0)
    return x


@everywhere
@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("eta_g", [1.0, 0.6])
def test_scaffold(setting: Setting, option: Any, eta_g: float) -> None:
    algorithm = sumus.scaffold(setting.sgd(), server=sumus.optimizers.sgd(eta_g), option=option)
    assert_agree(simulated(algorithm, setting), scaffold(setting, option, eta_g))


# ── Wang et al. 2020, arXiv:2007.07481 ───────────────────────────────────────────────────────────────────────────────


def fednova(setting: Setting, rho: float) -> Floats:
    """Equations 8 to 10: x ← x − τ_eff Σ pᵢ η dᵢ, dᵢ = Gᵢ aᵢ / ‖aᵢ‖₁, τ_eff = Σ pᵢ ‖aᵢ‖₁; pᵢ is over the round's cohort."""
    x = START
    for t in range(ROUNDS):
        eta, n = rate(t), sum(N[i] for i in cohort(t))
        mean_d, tau_eff = np.zeros(4), 0.0
        for i in cohort(t):
            y, v, G_i = x, np.zeros(4), []
            for g in setting.gradients(t, i):
                G_i.append(g(y))
                v = rho * v + G_i[-1]
                y = y - eta * v
            tau = len(G_i)
            # section 4.1: aᵢ = [1 − ρ^τ, 1 − ρ^(τ−1), …, 1 − ρ] / (1 − ρ); without momentum, ones
            a_i = np.array([(1 - rho ** (tau - j)) / (1 - rho) for j in range(tau)])
            p_i = N[i] / n
            mean_d += p_i * (np.stack(G_i, axis=1) @ a_i) / a_i.sum()
            tau_eff += p_i * a_i.sum()
        x = x - tau_eff * eta * mean_d
    return x


@everywhere
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_fednova(setting: Setting, rho: float) -> None:
    assert_agree(simulated(sumus.fednova(setting.sgd(momentum=rho)), setting), fednova(setting, rho))


# ── Acar et al. 2021, arXiv:2111.04263 ───────────────────────────────────────────────────────────────────────────────


def feddyn(setting: Setting, alpha: float) -> Floats:
    """Algorithm 1, the argmin approached by K steps of its gradient."""
    theta, h = START, np.zeros(4)
    grad_L = {k: np.zeros(4) for k in N}  # ∇L_k(θ_k⁰) = 0
    for t in range(ROUNDS):
        P = cohort(t)
        theta_k = {}
        for k in P:
            y = theta  # θ_k ≈ argmin L_k(θ) − ⟨∇L_k(θ_kᵗ⁻¹), θ⟩ + α/2 ‖θ − θᵗ⁻¹‖²
            for g in setting.gradients(t, k):
                y = y - rate(t) * (g(y) - grad_L[k] + alpha * (y - theta))
            theta_k[k] = y
            grad_L[k] = grad_L[k] - alpha * (y - theta)  # ∇L_k(θ_kᵗ) = ∇L_k(θ_kᵗ⁻¹) − α (θ_kᵗ − θᵗ⁻¹)
        h = h - alpha / len(N) * sum(theta_k[k] - theta for k in P)  # hᵗ = hᵗ⁻¹ − α/m Σ (θ_kᵗ − θᵗ⁻¹)
        theta = sum(theta_k.values()) / len(P) - h / alpha  # θᵗ = 1/|P| Σ θ_kᵗ − hᵗ/α
    return theta


@everywhere
@pytest.mark.parametrize("alpha", [0.05, 0.8])
def test_feddyn(setting: Setting, alpha: float) -> None:
    assert_agree(simulated(sumus.feddyn(setting.sgd(), alpha), setting), feddyn(setting, alpha))


# ── Nguyen et al. 2022, arXiv:2106.06639 ─────────────────────────────────────────────────────────────────────────────


def delta(setting: Setting, number: int, who: str, x: Floats) -> Floats:
    """What local SGD adds to x."""
    y = x
    for g in setting.gradients(number, who):
        y = y - rate(number) * g(y)
    return y - x


@everywhere
def test_fedbuff_in_synchronous_rounds_is_fedavg_with_equal_weights(setting: Setting) -> None:
    x = START
    for t in range(ROUNDS):
        x = x + sum(delta(setting, t, i, x) for i in cohort(t)) / COHORT
    assert_agree(simulated(sumus.fedbuff(setting.sgd()), setting), x)


@pytest.mark.parametrize(
    ("stalenesses", "within"),
    [((0, 3, 15), 1e-9), ((1, 4, 2), 1e-3)],
    ids=["square roots that 1/1024 measures", "others, to 1/1024"],
)
def test_fedbuff_with_stale_updates(stalenesses: tuple[int, ...], within: float) -> None:
    """Algorithm 1 with s(τ) = 1/√(1 + τ): x ← x + η_g/K Σ s(τᵢ) Δᵢ, each Δᵢ from the model of τᵢ steps ago."""
    setting, eta_g = SETTINGS["mini-batches, unequal steps"], 0.7
    algorithm = sumus.fedbuff(setting.sgd(), server=sumus.optimizers.sgd(eta_g))
    plan, program = sumus.Plan(TASK, algorithm, sumus.Pacing(COHORT)), Program(TASK)
    executor, hop = SequentialExecutor(program, algorithm.client), plan.first_hop
    states = [algorithm.start(program.initial_shared, plan.description)]
    x = [START]
    for t in range(20):
        total, change = sumus.RunningSum(), np.zeros(4)
        for i, wanted in zip(cohort(t), stalenesses, strict=True):
            tau = wanted if wanted <= t else 0
            own = key(SEED, "round", t, "client", i, "training")
            held = ClientAssignment(i, torch.from_numpy(INPUTS[i]), torch.from_numpy(TARGETS[i]), {}, own)
            with one_thread():
                (done,) = executor.run(states[t - tau].broadcast, t, [held])
            update = algorithm.report(i, done.parts, done.examples, done.metrics, b"", generator(i))
            hop.count_in(update, into=total, staleness=tau)
            change += delta(setting, t, i, x[t - tau]) / np.sqrt(1 + tau)
        combined = algorithm.combine(total.total, plan.description, plan.sums, b"", population=len(N))
        states.append(algorithm.step(combined, states[-1], plan.description))
        x.append(x[-1] + eta_g * change / COHORT)
    assert_agree(vector(algorithm.release(states[-1])), x[-1], within)


# ── Chang et al. 2018, doi:10.1093/jamia/ocy017 ──────────────────────────────────────────────────────────────────────


@everywhere
def test_cyclic_training_goes_on_where_the_last_client_stopped(setting: Setting) -> None:
    """In the population's order, whatever the order of the draw."""
    x = START
    for t in range(ROUNDS):
        for i in sorted(cohort(t), key=list(N).index):
            x = x + delta(setting, t, i, x)
    assert_agree(simulated(sumus.cyclic(setting.sgd()), setting), x)


# ── identities ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("work", [sumus.adam(0.02, batch_size=4), sumus.sgd(0.1, batch_size=4, momentum=0.9)], ids=repr)
def test_fedprox_without_a_pull_is_fedavg_bit_for_bit(work: sumus.ClientWork) -> None:
    """In float64 also for SGD, whose steps are fused where nothing is corrected: the last bit lies below the sums' grain."""
    task = sumus.Task(lambda: nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1)).double(), TASK.loss)
    with_fedavg, with_fedprox = (
        sumus.simulate(
            task, algorithm, PEOPLE, ROUNDS, sumus.Pacing(COHORT), out=sumus.Output(progress=False)
        ).model_sha256
        for algorithm in (sumus.fedavg(work), sumus.fedprox(work, 0.0))
    )
    assert with_fedavg == with_fedprox


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_is_fedavg_where_everyone_takes_as_many_steps(momentum: float) -> None:
    setting = Setting({"steps": 4, "batch_size": 3})
    work = setting.sgd(momentum=momentum)
    assert_agree(simulated(sumus.fednova(work), setting), simulated(sumus.fedavg(work), setting))


def test_scaffold_corrects_nothing_where_all_clients_are_alike_and_take_part() -> None:
    alike = dict.fromkeys(N, (INPUTS["a"], TARGETS["a"]))
    work = SETTINGS["full batches"].sgd()
    one, other = (
        vector(sumus.simulate(TASK, algorithm, alike, ROUNDS, out=sumus.Output(progress=False)).model)
        for algorithm in (sumus.scaffold(work), sumus.fedavg(work, weight="uniform"))
    )
    assert_agree(one, other)
