"""An algorithm of one's own is one file: SCAFFOLD, from the paper, with nothing of sumus changed for it.

[Karimireddy et al. 2020, arXiv:1910.06378, Algorithm 1, option II], in our signs: sent is broadcast − trained.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

import sumus
from sumus.aggregate import Part, mean
from sumus.executors.executor import ClientAssignment
from sumus.executors.sequential import SequentialExecutor
from sumus.optimizers import ServerState
from sumus.rng import generator, key
from sumus.task import Description
from sumus.training.program import Program
from sumus.types import Tree
from sumus.work import sgd_rule, zeros_as


def scaffold(lr: float, steps: int) -> sumus.Algorithm:
    """y ← y − η(g − cᵢ + c);  cᵢ⁺ = cᵢ − c + (x − y)/(Kη);  x ← x + mean Δy;  c ← c + Σ Δcᵢ / N."""

    def correct(grads: Any, params: Any, broadcast: Any, state: Any) -> Any:
        own, common = state["control"], broadcast["control"]
        return {name: grad + common[name] - own[name] for name, grad in grads.items()}

    def finish(broadcast: Any, params: Any, state: Any, done: Any) -> Any:
        own, common = state["control"], broadcast["control"]
        moved = {name: leaf - params[name] for name, leaf in broadcast["params"].items()}
        change = {name: leaf / (done.steps * done.lr) - common[name] for name, leaf in moved.items()}
        new = {name: leaf + own[name] for name, leaf in change.items()}
        return {"params": moved, "control": change}, {"control": new}

    def init(params: Tree) -> ServerState:
        return ServerState({"params": params, "control": {name: leaf * 0 for name, leaf in params.items()}}, {})

    def update(parts: Any, state: ServerState) -> ServerState:
        x = {name: leaf - parts["params"][name] for name, leaf in state.broadcast["params"].items()}
        c = {name: leaf + parts["control"][name] for name, leaf in state.broadcast["control"].items()}
        return ServerState({"params": x, "control": c}, {})

    both = ("params", "control")
    schedule = sumus.schedules.constant(lr)
    return sumus.Algorithm(
        sumus.ClientWork(
            optimizer=sgd_rule(),
            lr=schedule,
            steps=steps,
            rules=sumus.ClientRules(
                correct=correct, finish=finish, init=zeros_as("control"), sends=both, receives=both
            ),
        ),
        sumus.chain(),
        mean(Part("params", "leaves", "uniform", "count"), Part("control", "leaves", "uniform", "population")),
        sumus.ServerOptimizer(init=init, update=update, takes=both, broadcasts=both),
    )


# ── ten clients whose least squares have little in common ────────────────────────────────────────────────────────────

RNG = np.random.default_rng(0)
SCALES = RNG.uniform(0.2, 1.5, (10, 1, 2))
INPUTS = torch.from_numpy(RNG.normal(size=(10, 6, 2)) * SCALES)
TARGETS = torch.from_numpy((INPUTS.numpy() @ RNG.normal(size=(10, 2, 1)) * 2) + RNG.normal(size=(10, 6, 1)) / 9)
OPTIMUM = np.linalg.lstsq(INPUTS.reshape(60, 2).numpy(), TARGETS.reshape(60).numpy(), rcond=None)[0]
COHORT, ROUNDS = 5, 150


def distance_after(algorithm: sumus.Algorithm) -> float:
    """How far from the minimum over everyone's examples, when half of the clients take part in a round."""
    task = sumus.Task(lambda: nn.Linear(2, 1, bias=False).double(), sumus.losses.mean_squared_error)
    plan, program = sumus.Plan(task, algorithm, sumus.Pacing(COHORT)), Program(task)
    executor, described = SequentialExecutor(program, algorithm.client), plan.description
    assert isinstance(described, Description)
    state, kept, hop = algorithm.start(program.initial_shared, described), dict[int, Any](), plan.first_hop
    for number in range(ROUNDS):
        cohort = generator(number, "cohort").permutation(10)[:COHORT].tolist()
        total, pending = sumus.RunningSum(), dict[int, Any]()
        who = [ClientAssignment(i, INPUTS[i], TARGETS[i], kept.get(i, {}), key(number, i)) for i in cohort]
        for done in executor.run(state.broadcast, number, who):
            update = algorithm.report(done.client, done.parts, done.examples, done.metrics, b"", generator(number))
            hop.count_in(update, into=total)
            pending[done.client] = done.state
        combined = algorithm.combine(total.total, described, plan.sums, b"", population=10)
        state = algorithm.step(combined, state, described)
        kept |= pending
    return float(np.abs(algorithm.release(state)["weight"][0] - OPTIMUM).max())


def test_scaffold_reaches_the_optimum_that_fedavg_misses() -> None:
    fedavg = sumus.fedavg(sumus.sgd(0.2, steps=5), weight="uniform")
    assert distance_after(fedavg) > 0.05
    assert distance_after(scaffold(0.2, steps=5)) < 1e-6
