"""What the algorithms ask for and refuse, and what they keep to under precision, personal leaves and compression."""

import ast
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sumus
from sumus.algorithms.feddyn import dynamic
from sumus.algorithms.fednova import normalized, reach
from sumus.algorithms.fedprox import prox
from sumus.algorithms.scaffold import control
from sumus.errors import PlanError

ROOT = Path(sumus.__file__).parent

COMPRESSED = sumus.chain(sumus.clip_by_global_norm(0.5), sumus.rotate(), sumus.quantize(bits=8))

WORK = sumus.sgd(0.1, epochs=2, batch_size=4)
ALGORITHMS: dict[str, sumus.Algorithm] = {
    "cyclic": sumus.cyclic(WORK),
    "fedadagrad": sumus.fedadagrad(WORK, 0.1),
    "fedadam": sumus.fedadam(WORK, 0.1),
    "fedavg": sumus.fedavg(WORK, COMPRESSED),
    "fedavgm": sumus.fedavgm(WORK),
    "fedbuff": sumus.fedbuff(WORK, staleness=sumus.staleness.hinge(4, 0.5)),
    "feddyn": sumus.feddyn(WORK, 0.05),
    "fednova": sumus.fednova(sumus.sgd(0.1, momentum=0.9, nesterov=True), server=sumus.optimizers.momentum(0.5)),
    "fedprox": sumus.fedprox(sumus.adam(0.01), 0.1),
    "fedsgd": sumus.fedsgd(0.1),
    "fedyogi": sumus.fedyogi(WORK, 0.1),
    "scaffold": sumus.scaffold(sumus.adamw(0.01), COMPRESSED, sumus.optimizers.adam(0.1), option=1),
}

RNG = np.random.default_rng(0)
PEOPLE = {
    f"client {number}": (RNG.normal(size=(size, 4)) * RNG.uniform(0.5, 1.5, 4), RNG.normal(size=(size, 1)) + number / 4)
    for number, size in enumerate((8, 5, 12, 9, 7, 10))
}
TASK = sumus.Task(lambda: nn.Linear(4, 1).double(), sumus.losses.mean_squared_error)


def loss_of(task: sumus.Task, algorithm: sumus.Algorithm, rounds: int = 8) -> tuple[float, float]:
    """Everyone's loss after the first round and after the last."""
    evaluate = sumus.Evaluation(seen=len(PEOPLE))
    history = sumus.simulate(
        task, algorithm, PEOPLE, rounds, sumus.Pacing(4), evaluate, out=sumus.Output(progress=False)
    )
    return history.rounds[0].metrics["loss"], history.rounds[-1].metrics["loss"]


# ── a file each ──────────────────────────────────────────────────────────────────────────────────────────────────────


def modules_of_public_algorithms() -> dict[str, str]:
    """Name → module of everything public that gives an `Algorithm`."""
    found = {name: getattr(sumus, name) for name in sumus.__all__}
    return {
        name: value.__module__
        for name, value in found.items()
        if inspect.isfunction(value) and inspect.signature(value).return_annotation in ("Algorithm", sumus.Algorithm)
    }


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions, and what it imports from them."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_public_algorithm_is_covered_here() -> None:
    assert set(modules_of_public_algorithms()) == set(ALGORITHMS)


def test_an_algorithm_is_a_file_and_a_line_in_the_list() -> None:
    """Each names its paper, all are public, and nothing else in sumus knows any of them."""
    modules = set(modules_of_public_algorithms().values())
    assert modules == {
        f"sumus.algorithms.{path.stem}" for path in (ROOT / "algorithms").glob("*.py") if path.stem != "__init__"
    }
    for module in modules:
        assert "arXiv:" in (said := sys.modules[module].__doc__ or "") or "doi:" in said, f"{module} names no paper"
    for path in ROOT.rglob("*.py"):
        assert imported(path) & modules == set(), f"{path} imports an algorithm"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_plan_survives_its_json_with_its_id(name: str) -> None:
    plan = sumus.Plan(TASK, ALGORITHMS[name], sumus.Pacing(6))
    again = sumus.Plan.from_json(plan.to_json())
    assert (again.id, again.to_json()) == (plan.id, plan.to_json())
    assert again.algorithm == plan.algorithm
    assert "custom-name" not in dict(plan.violations("deployed"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_plan_that_was_read_back_trains_to_the_same_model(name: str) -> None:
    plan = sumus.Plan(TASK, ALGORITHMS[name], sumus.Pacing(3))
    read = sumus.Plan.from_json(plan.to_json()).algorithm
    models = {
        sumus.simulate(TASK, algorithm, PEOPLE, 2, sumus.Pacing(3), out=sumus.Output(progress=False)).model_sha256
        for algorithm in (plan.algorithm, read)
    }
    assert len(models) == 1


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

NOT_PLAIN_SGD = {
    "momentum": sumus.sgd(0.05, steps=4, momentum=0.5),
    "adam": sumus.adam(0.05, steps=4),
    "clip_norm": sumus.sgd(0.05, steps=4, clip_norm=0.5),
}


@pytest.mark.parametrize("name", NOT_PLAIN_SGD)
def test_scaffolds_second_option_needs_plain_sgd_and_the_first_takes_any(name: str) -> None:
    work = NOT_PLAIN_SGD[name]
    for refused in (lambda: sumus.scaffold(work), lambda: control(work, 2)):
        with pytest.raises(PlanError, match="use option=1") as error:
            refused()
        assert error.value.rule == "control-needs-sgd"
    first, last = loss_of(TASK, sumus.scaffold(work, option=1))
    assert last < first


def test_fednova_refuses_an_optimizer_whose_reach_is_not_known() -> None:
    for work in (sumus.adam(0.01), sumus.adamw(0.01)):
        with pytest.raises(PlanError, match=r"use sgd\(\)") as error:
            sumus.fednova(work)
        assert error.value.rule == "normalized-needs-sgd"


WRAPS: dict[str, Callable[[sumus.ClientWork], sumus.ClientWork]] = {
    "control": control,
    "control, option 1": lambda work: control(work, 1),
    "dynamic": lambda work: dynamic(work, 0.1),
    "normalized": normalized,
    "prox": lambda work: prox(work, 0.1),
}


@pytest.mark.parametrize("outer", WRAPS)
@pytest.mark.parametrize("inner", WRAPS)
def test_a_client_is_changed_once(outer: str, inner: str) -> None:
    """Each of these reads the way from the broadcast to the trained model as its own steps made it."""
    with pytest.raises(PlanError, match="unchanged client work") as error:
        WRAPS[outer](WRAPS[inner](WORK))
    assert error.value.rule == "client-changed-twice"


# ── how far a client's steps reach ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)])
def test_reach_is_how_far_torch_goes_on_a_gradient_of_one(momentum: float, nesterov: bool, steps: int) -> None:
    place = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([place], lr=1.0, momentum=momentum, nesterov=nesterov)
    for _ in range(steps):
        place.grad = torch.ones((), dtype=torch.float64)
        optimizer.step()
    assert reach(momentum, nesterov, steps) == pytest.approx(-place.item(), rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_takes_clients_of_many_steps(momentum: float) -> None:
    """More than 256, the bound of what else is sent; with momentum 0.9 they count for nearly ten times as many."""
    work = sumus.sgd(1e-3, steps=300, batch_size=4, momentum=momentum)
    nova, average = (
        sumus.simulate(TASK, algorithm, PEOPLE, 1, sumus.Pacing(2), out=sumus.Output(progress=False))
        .model["weight"]
        .numpy()
        for algorithm in (sumus.fednova(work), sumus.fedavg(work))
    )
    np.testing.assert_allclose(nova, average, atol=1e-9)


# ── compression, precision, personal leaves ──────────────────────────────────────────────────────────────────────────


def disagreement(run: Any, name: str) -> float:
    """The server's tree against the mean over everyone of the clients', by the largest difference."""
    kept = [state[name] for who in PEOPLE if (state := run.clients.get(who))]
    mine, unit = ("control", 1.0) if name == "control" else ("shift", ALPHA)  # FedDyn's server keeps h/α
    return max(
        float(np.abs(leaf * unit - sum(tree[at].astype(np.float64) for tree in kept) / len(PEOPLE)).max())
        for at, leaf in run.server.memory[mine].items()
    )


def test_a_control_goes_past_the_chain(finished: Callable[..., Any]) -> None:
    """Clipped to a hundredth of its way and sent in 8 bits, the model hardly moves; the controls still agree."""
    chain = sumus.chain(sumus.clip_by_global_norm(0.01), sumus.rotate(), sumus.quantize(bits=8))
    for option in (1, 2):
        run = finished(TASK, sumus.scaffold(WORK, chain, option=option), PEOPLE, 6, 3, lost=0.2)
        assert np.abs(run.server.memory["control"]["weight"]).max() > 0.1
        assert disagreement(run, "control") < 1e-10


class Halves(nn.Module):
    """Two linear maps of two inputs each, one of them personal."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.own = nn.Linear(2, 1), nn.Linear(2, 1, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.common(inputs[:, :2]) + self.own(inputs[:, 2:])


ALPHA = 0.1
KEEPING = {
    "control": sumus.scaffold(sumus.sgd(0.1, steps=3)),
    "control, option 1": sumus.scaffold(sumus.sgd(0.1, steps=3), option=1),
    "slope": sumus.feddyn(sumus.sgd(0.1, steps=3), ALPHA),
}
keeping = pytest.mark.parametrize("which", KEEPING)


@keeping
def test_half_precision_trains_and_keeps_its_state_in_single(finished: Callable[..., Any], which: str) -> None:
    task = sumus.Task(lambda: Halves().to(torch.bfloat16), TASK.loss)
    name = which.partition(",")[0]
    run = finished(task, KEEPING[which], PEOPLE, 12, 3, lost=0.1)
    assert run.history.rounds[-1].loss < run.history.rounds[0].loss
    assert {leaf.dtype for who in PEOPLE for leaf in run.clients.get(who).get(name, {}).values()} == {np.dtype("f4")}
    assert {leaf.dtype for tree in run.server.memory.values() for leaf in tree.values()} == {np.dtype("f8")}
    assert disagreement(run, name) < 1e-6


@keeping
def test_personal_leaves_are_trained_and_not_corrected(finished: Callable[..., Any], which: str) -> None:
    """Each example has only the common inputs or only the personal ones, so that in full batches neither half's gradient
    depends on the other half: the personal one must walk as under FedAvg, whatever is done to the common one."""
    people = {
        who: (inputs * np.repeat((np.arange(len(inputs)) % 2)[:, None] == [[0, 1]], 2, axis=1), targets)
        for who, (inputs, targets) in PEOPLE.items()
    }

    class WithoutBias(Halves):
        def __init__(self) -> None:
            super().__init__()
            self.common = nn.Linear(2, 1, bias=False)

    task = sumus.Task(lambda: WithoutBias().double(), TASK.loss, leaves={"own.*": "personal"})
    run, plain = (
        finished(task, algorithm, people, 8, 3)
        for algorithm in (KEEPING[which], sumus.fedavg(sumus.sgd(0.1, steps=3), weight="uniform"))
    )
    name = which.partition(",")[0]
    for who in people:
        state = run.clients.get(who)
        assert (set(state), set(state[name])) == ({name, "personal"}, {"common.weight"})
        np.testing.assert_allclose(
            state["personal"]["own.weight"], plain.clients.get(who)["personal"]["own.weight"], rtol=1e-12
        )
    assert float((run.history.model["common.weight"] - plain.history.model["common.weight"]).abs().max()) > 1e-3
    assert disagreement(run, name) < 1e-10


# ── where a rule could go wrong quietly ──────────────────────────────────────────────────────────────────────────────


def test_a_chain_that_nothing_goes_through_is_refused() -> None:
    """FedDyn's clients keep what they sent exactly; clipped on its way, it would not be what the server counts."""
    bare = sumus.feddyn(WORK, 0.1)
    clipped = sumus.Algorithm(bare.client, sumus.chain(sumus.clip_by_global_norm(1.0)), bare.aggregator, bare.server)
    with pytest.raises(PlanError, match="leave it out") as error:
        sumus.Plan(TASK, clipped, sumus.Pacing(2))
    assert error.value.rule == "chain-unused"


def test_a_round_at_rate_zero_teaches_no_control(finished: Callable[..., Any]) -> None:
    work = sumus.sgd(sumus.schedules.cosine(0.1, 2), steps=3)
    run = finished(TASK, sumus.scaffold(work), PEOPLE, 5, 3)
    assert disagreement(run, "control") < 1e-10
    assert run.server.memory["control"]["weight"].any()


@pytest.mark.parametrize("option", [1, 2])
def test_controls_may_be_as_large_as_gradients(finished: Callable[..., Any], option: Any) -> None:
    """Large inputs and a small rate: gradients beyond 256, which is the bound of updates."""
    people = {who: (inputs * 30, targets) for who, (inputs, targets) in PEOPLE.items()}
    run = finished(TASK, sumus.scaffold(sumus.sgd(1e-5, steps=3), option=option), people, 8, 3)
    largest = max(np.abs(leaf).max() for who in people for leaf in run.clients.get(who).get("control", {}).values())
    assert largest > 256
    assert disagreement(run, "control") < 1e-8
