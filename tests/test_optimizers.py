"""Server optimizers, each against its paper's recursion, transcribed here in the paper's own signs and symbols.

With x_t the model, Δ_t is the clients' mean of (trained − x_t), as in the papers. What the server is given is the mean of
(broadcast − trained), hence −Δ_t.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from sumus.optimizers import ServerOptimizer, ServerState, adagrad, adam, averaged, momentum, sgd, yogi
from sumus.types import Tree

ROUNDS = 20
Vector = np.ndarray
Recursion = Callable[[Vector, Iterator[Vector]], Iterator[Vector]]
"""(x_0, the Δ_t one after the other) → x_1, x_2, …"""


# ── Reddi et al. 2021, arXiv:2003.00295, Algorithm 2 ─────────────────────────────────────────────────────────────────


def reddi(eta: float, beta1: float, tau: float, next_v: Callable[[Vector, Vector], Vector]) -> Recursion:
    """v_{−1} = τ², m_{−1} = 0;  m_t = β₁m_{t−1} + (1−β₁)Δ_t;  x_{t+1} = x_t + η m_t / (√v_t + τ)."""

    def run(x: Vector, deltas: Iterator[Vector]) -> Iterator[Vector]:
        m, v = np.zeros_like(x), np.full_like(x, tau**2)
        for delta in deltas:
            m = beta1 * m + (1 - beta1) * delta
            v = next_v(v, delta**2)
            x = x + eta * m / (np.sqrt(v) + tau)
            yield x

    return run


def fed_adagrad(eta: float, beta1: float, tau: float) -> Recursion:
    """v_t = v_{t−1} + Δ_t²."""
    return reddi(eta, beta1, tau, lambda v, square: v + square)


def fed_adam(eta: float, beta1: float, beta2: float, tau: float) -> Recursion:
    """v_t = β₂v_{t−1} + (1−β₂)Δ_t²."""
    return reddi(eta, beta1, tau, lambda v, square: beta2 * v + (1 - beta2) * square)


def fed_yogi(eta: float, beta1: float, beta2: float, tau: float) -> Recursion:
    """v_t = v_{t−1} − (1−β₂)Δ_t² sign(v_{t−1} − Δ_t²)."""
    return reddi(eta, beta1, tau, lambda v, square: v - (1 - beta2) * square * np.sign(v - square))


# ── the others ───────────────────────────────────────────────────────────────────────────────────────────────────────


def kingma_ba(eta: float, beta1: float, beta2: float, epsilon: float) -> Recursion:
    """Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1, on the gradient g_t = −Δ_t."""

    def run(x: Vector, deltas: Iterator[Vector]) -> Iterator[Vector]:
        m, v = np.zeros_like(x), np.zeros_like(x)
        for t, delta in enumerate(deltas, 1):
            g = -delta
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            x = x - eta * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + epsilon)
            yield x

    return run


def hsu(eta: float, beta: float) -> Recursion:
    """Hsu et al. 2019, arXiv:1909.06335, section 4.3, with Δw = −Δ:  v ← βv + Δw;  w ← w − ηv."""

    def run(w: Vector, deltas: Iterator[Vector]) -> Iterator[Vector]:
        v = np.zeros_like(w)
        for delta in deltas:
            v = beta * v + -delta
            w = w - eta * v
            yield w

    return run


def nesterov(eta: float, beta: float) -> Recursion:
    """The same, looking ahead:  w ← w − η(Δw + βv)."""

    def run(w: Vector, deltas: Iterator[Vector]) -> Iterator[Vector]:
        v = np.zeros_like(w)
        for delta in deltas:
            v = beta * v + -delta
            w = w - eta * (-delta + beta * v)
            yield w

    return run


def mcmahan(eta: float) -> Recursion:
    """McMahan et al. 2017, arXiv:1602.05629, Algorithm 1, where η = 1:  w ← w + ηΔ."""

    def run(w: Vector, deltas: Iterator[Vector]) -> Iterator[Vector]:
        for delta in deltas:
            w = w + eta * delta
            yield w

    return run


RECURSIONS: dict[str, tuple[ServerOptimizer, Recursion]] = {
    "FedAvg": (sgd(), mcmahan(1.0)),
    "FedAvg with a rate": (sgd(0.3), mcmahan(0.3)),
    "FedAvgM": (momentum(), hsu(1.0, 0.9)),
    "FedAvgM with a rate": (momentum(0.1, 0.7), hsu(0.1, 0.7)),
    "FedAvgM by Nesterov": (momentum(0.1, 0.9, nesterov=True), nesterov(0.1, 0.9)),
    "FedAdagrad": (adagrad(0.1), fed_adagrad(0.1, 0.0, 1e-3)),
    "FedAdagrad with momentum": (adagrad(0.1, beta=0.9, tau=1e-2), fed_adagrad(0.1, 0.9, 1e-2)),
    "FedAdam": (adam(0.05), fed_adam(0.05, 0.9, 0.99, 1e-3)),
    "FedAdam without momentum": (adam(0.05, (0.0, 0.9), 1e-2), fed_adam(0.05, 0.0, 0.9, 1e-2)),
    "FedAdam with bias correction": (adam(0.05, bias_correction=True), kingma_ba(0.05, 0.9, 0.99, 1e-3)),
    "FedYogi": (yogi(0.05), fed_yogi(0.05, 0.9, 0.99, 1e-3)),
    "FedYogi without momentum": (yogi(0.05, (0.0, 0.9), 1e-2), fed_yogi(0.05, 0.0, 0.9, 1e-2)),
}


def clients_deltas(seed: int) -> Iterator[Vector]:
    """Δ_t of rounds whose clients end at random places around the model; scales differ by coordinate and round."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-4, 1, 7)
    while True:
        yield (scale * 10.0 ** rng.uniform(-1, 0) * rng.normal(size=(5, 7))).mean(0)


def models(server: ServerOptimizer, start: Vector, deltas: Iterator[Vector]) -> Iterator[Tree]:
    """The server's own path, its seven numbers held in two leaves."""
    state = server.init({"w": start[:6].reshape(2, 3), "b": start[6]})
    for delta in deltas:
        state = server.update({"params": {"w": -delta[:6].reshape(2, 3), "b": -delta[6]}}, state)
        yield server.release(state)


@pytest.mark.parametrize("name", RECURSIONS)
def test_a_server_optimizer_follows_its_paper(name: str) -> None:
    server, recursion = RECURSIONS[name]
    start = np.random.default_rng(1).normal(size=7)
    ours = models(server, start, clients_deltas(2))
    theirs = recursion(start, clients_deltas(2))
    for own, x in itertools.islice(zip(ours, theirs, strict=True), ROUNDS):
        np.testing.assert_allclose(own["w"].reshape(-1), x[:6], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(own["b"], x[6], rtol=1e-12, atol=1e-14)


def test_the_recursions_are_all_different() -> None:
    """Else the test above could pass for the wrong rule."""
    start = np.random.default_rng(1).normal(size=7)
    ends = [next(itertools.islice(run(start, clients_deltas(2)), 4, None)) for _, run in RECURSIONS.values()]
    for (one, first), (two, second) in itertools.combinations(zip(RECURSIONS, ends, strict=True), 2):
        if {one, two} != {"FedAvg", "FedAvgM"}:
            assert not np.allclose(first, second, rtol=1e-6), (one, two)


# ── what is published ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_averaged_publishes_a_running_mean_of_its_servers_models(dtype: str) -> None:
    """a_1 = x_1;  a ← γa + (1−γ)x, in float64 whatever the model holds."""
    decay, server, start = 0.8, momentum(0.2, 0.5), np.linspace(-1, 1, 7).astype(dtype)
    a: Vector | None = None
    for own, inner in itertools.islice(
        zip(
            models(averaged(server, decay), start, clients_deltas(3)),
            models(server, start, clients_deltas(3)),
            strict=True,
        ),
        ROUNDS,
    ):
        x = inner["w"].astype(np.float64)
        a = x if a is None else decay * a + (1 - decay) * x
        assert own["w"].dtype == dtype
        assert np.array_equal(own["w"], a.astype(dtype))


def test_clients_of_an_averaged_server_go_on_from_its_own_model() -> None:
    server, start = averaged(sgd(1.0), 0.9), {"w": np.zeros(1)}
    state = server.init(start)
    assert server.release(state)["w"].tolist() == [0.0]
    for _ in range(3):
        state = server.update({"params": {"w": np.array([-1.0])}}, state)
    assert state.broadcast["params"]["w"].tolist() == [3.0]
    assert server.release(state)["w"].tolist() == pytest.approx([0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3])


# ── state and dtypes ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", RECURSIONS)
def test_memory_is_float64_and_the_model_keeps_its_dtype(name: str) -> None:
    server, _ = RECURSIONS[name]
    state = server.init({"w": np.ones(3, np.float32), "b": np.ones((), np.float64)})
    state = server.update({"params": {"w": np.full(3, 0.5), "b": np.array(0.5)}}, state)
    assert {leaf: value.dtype.name for leaf, value in state.broadcast["params"].items()} == {
        "w": "float32",
        "b": "float64",
    }
    assert {slot.dtype.name for tree in state.memory.values() for slot in tree.values()} <= {"float64"}


@pytest.mark.parametrize("name", RECURSIONS)
def test_an_update_changes_neither_the_state_before_nor_the_sum(name: str) -> None:
    server, _ = RECURSIONS[name]
    first = server.update({"params": {"w": np.array([0.5])}}, server.init({"w": np.array([1.0])}))

    def numbers(state: ServerState) -> list[list[float]]:
        return [
            leaf.reshape(-1).tolist()
            for tree in (state.broadcast["params"], *state.memory.values())
            for leaf in tree.values()
        ]

    before, mean = numbers(first), np.array([0.25])
    server.update({"params": {"w": mean}}, first)
    assert numbers(first) == before
    assert mean.tolist() == [0.25]


# ── how far a round moves one number ─────────────────────────────────────────────────────────────────────────────────

ADAPTIVE = {
    "adagrad": adagrad(0.5),
    "adagrad, momentum": adagrad(0.5, beta=0.9),
    "adam": adam(0.5),
    "adam, corrected": adam(0.5, bias_correction=True),
    "adam, slow, corrected": adam(0.5, (0.95, 0.92), bias_correction=True),
    "adam, fast": adam(0.5, (0.0, 0.5)),
    "yogi": yogi(0.5),
    "yogi, fast": yogi(0.5, (0.5, 0.5)),
    "averaged adam": averaged(adam(0.5)),
}


def hostile_means(ratio: float, rng: np.random.Generator) -> Iterator[Vector]:
    """Means of eight numbers, round by round: the worst for Adam of this ratio β₁/β₂, and such as grow, turn and vanish."""
    for number in range(400):
        late = 399 - number
        wild = rng.normal(size=5) * 10.0 ** rng.integers(-4, 4, 5)
        yield np.array([min(ratio, 0.999) ** late, 1e3**-number, (-1.0) ** number, *wild])


@pytest.mark.parametrize("name", ADAPTIVE)
def test_no_mean_moves_a_number_further_than_an_adaptive_optimizer_says(name: str) -> None:
    optimizer = ADAPTIVE[name]
    assert optimizer.largest is not None
    state, before, furthest = optimizer.init({"w": np.zeros(8)}), np.zeros(8), 0.0
    for mean in hostile_means(0.9 / 0.99, np.random.default_rng(0)):
        state = optimizer.update({"params": {"w": mean}}, state)
        at = optimizer.release(state)["w"]
        furthest, before = max(furthest, float(np.abs(at - before).max())), at
    assert furthest <= optimizer.largest * (1 + 1e-12)
    if name == "adam":  # the bound is reached, but for tau
        assert furthest >= 0.99 * optimizer.largest


def test_what_forgets_the_past_of_squares_too_fast_bounds_no_number() -> None:
    for optimizer in (adam(0.5, (0.99, 0.9)), yogi(0.5, (0.99, 0.9)), adam(0.5, (0.9, 0.0))):
        assert optimizer.largest is None
        assert optimizer.longest is None
