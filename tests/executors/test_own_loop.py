"""Client work by code of the user's own: what it is given, what it may give, and which errors name the client and a remedy."""

import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sumus
from sumus.device.compute import DeviceJob
from sumus.device.training import Training
from sumus.plan import Plan
from sumus.training.program import Program
from sumus.training.trace import trace_step
from sumus.work import apply_gradients
from tests import own_loops
from tests.device.in_numpy import NumpyLinear

SEEN: list[Any] = []


class Tied(nn.Module):
    """Two names of one tensor, a buffer that is averaged, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4, bias=False)
        self.other = nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.other(self.one(inputs))))


def person(number: int) -> tuple[Any, Any]:
    inputs = np.random.default_rng(number).normal(size=(10, 4)).astype("float32")
    return inputs, (inputs[:, 0] > 0).astype("int64")


PEOPLE = sumus.Population(range(3), load=person)


def simulated(train: Any, evaluate: Any = None, model: Any = None, **more: Any) -> sumus.History:
    metrics = {"accuracy": sumus.metrics.accuracy}
    task = sumus.Task(model or (lambda: nn.Linear(4, 2)), sumus.losses.cross_entropy, metrics, more.pop("leaves", {}))
    plan = sumus.Plan(task, sumus.fedavg(sumus.client(train, evaluate)), sumus.Pacing(cohort=2))
    options = {name: more.pop(name) for name in ("out", "compute") if name in more}
    measured = sumus.Evaluation(unseen=sumus.Population([9], load=person))
    return sumus.run(sumus.Experiment(plan, PEOPLE, **{"rounds": 1, "evaluate": measured, **more}), **options)


def shifted(state: Any, examples: Any) -> tuple[Any, int, dict[str, float]]:
    return {name: leaf + 1 if leaf.is_floating_point() else leaf for name, leaf in state.items()}, 5, {"loss": 1.0}


# ── what it is given ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_mean_of_what_it_gives_is_the_new_model() -> None:
    start = Program(sumus.Task(lambda: nn.Linear(4, 2), sumus.losses.cross_entropy)).initial
    history = simulated(shifted)
    for name, leaf in history.model.items():
        assert np.allclose(leaf.numpy(), start[name] + 1, atol=1e-6)
    assert history.rounds[0].examples == 10, "the counts that it gave"
    assert history.rounds[0].loss == 1.0


def test_tied_leaves_buffers_and_counters_are_in_the_state_and_the_caller_keeps_its_examples() -> None:
    def train(state: Any, examples: Any) -> Any:
        assert set(state) == set(Tied().state_dict())
        model = Tied()
        model.load_state_dict(state)
        model.train()(examples[0])
        examples[0].zero_()
        for leaf in state.values():
            leaf.zero_()
        return model.state_dict(), len(examples[1]), {"loss": 0.5}

    history = simulated(train, model=Tied, rounds=2)
    assert int(history.model["norm.num_batches_tracked"]) == 0
    assert float(history.model["norm.running_mean"].abs().sum()) > 0
    assert torch.equal(history.model["one.weight"], history.model["other.weight"])


def test_personal_leaves_go_on_at_their_client() -> None:
    begun: list[tuple[Any, float]] = []  # a list that only grows is a log, and is kept

    def train(state: Any, examples: Any, about: Any) -> Any:
        begun.append((about.client, float(state["bias"].sum())))
        return {**state, "bias": state["bias"] + 1}, 4, {"loss": 1.0}

    task = sumus.Task(lambda: nn.Linear(4, 2), sumus.losses.cross_entropy, leaves={"bias": "personal"})
    sumus.simulate(task, sumus.fedavg(sumus.client(train)), PEOPLE, rounds=3)
    own = [bias for client, bias in begun if client == 0][:3]
    assert own == pytest.approx([own[0], own[0] + 2, own[0] + 4])


def test_numbers_are_drawn_anew_for_each_client_and_round_and_the_callers_generators_stand_still() -> None:
    drawn: list[tuple[float, float, float, int]] = []

    def train(state: Any, examples: Any, about: Any) -> Any:
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(())), about.seed))
        return state, 1, {"loss": 1.0}

    experiment = sumus.Experiment(
        sumus.Plan(TASK, sumus.fedavg(sumus.client(train)), sumus.Pacing(cohort=2)), PEOPLE, 2
    )
    stood = generators()
    sumus.run(experiment)
    assert stood == generators()
    first = list(drawn)
    drawn.clear()
    sumus.run(experiment)
    assert first == drawn
    assert len(set(first)) == 4, "two clients in two rounds; the witness draws the first one's numbers again"
    assert all(0 <= seed < 2**32 for *_, seed in first)


def generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # pyright: ignore


def counting(state: Any, examples: Any) -> tuple[Any, int, dict[str, float]]:
    SEEN.append(len(SEEN))
    return state, 1, {"loss": float(len(SEEN))}


def test_what_it_keeps_outside_the_leaves_is_put_back_before_each_client_and_said() -> None:
    history = simulated(counting, rounds=3)
    assert [record.loss for record in history.rounds] == [1.0, 1.0, 1.0]
    assert any("SEEN" in note for note in history.notes)


def test_without_a_loss_the_tasks_own_is_measured_on_the_trained_model() -> None:
    def silent(state: Any, examples: Any) -> Any:
        return state, len(examples[1]), {}

    start = simulated(silent, evaluate=None, rounds=1)
    assert 0 < start.rounds[0].loss < 3


def test_its_own_measurement_takes_the_place_of_the_tasks() -> None:
    history = simulated(shifted, lambda state, examples: (10, {"loss": 2.0, "accuracy": 0.25}))
    assert history.metrics == {"loss": 2.0, "accuracy": 0.25}


# ── what it may give ─────────────────────────────────────────────────────────────────────────────────────────────────

STATE = {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}


def giving(*given: Any) -> Callable[[Any, Any], Any]:
    return lambda state, examples: given


def raising(error: BaseException) -> Callable[[Any, Any], Any]:
    def train(state: Any, examples: Any) -> Any:
        raise error

    return train


WRONG = {
    "an exception": (raising(ValueError("no such column")), "failed: ValueError: no such column; call it on this client's"),
    "the end of the program": (raising(SystemExit(3)), "ended the program: SystemExit: 3; call it on"),
    "NaN": (giving({**STATE, "bias": torch.tensor([0.0, np.nan])}, 5, {"loss": 1.0}), r"`params\[bias\]`.*clip its gradients"),
    "a loss of NaN": (giving(STATE, 5, {"loss": float("nan")}), r"`metrics\[loss\]`.*clip its gradients"),
    "another shape": (giving({**STATE, "bias": torch.zeros(3)}, 5, {}), r"shape \(3,\) for the leaf `bias`.* \(2,\): return"),
    "complex numbers": (giving({**STATE, "bias": torch.zeros(2) * 1j}, 5, {}), "complex64 of shape .*: return real numbers"),
    "text": (giving({**STATE, "bias": "none"}, 5, {}), "a str for the leaf `bias`: return a tensor|for the leaf `bias`"),
    "a missing leaf": (giving({"weight": STATE["weight"]}, 5, {}), "lacks `bias`: return a state dict with exactly"),
    "one more leaf": (giving({**STATE, "extra": 1}, 5, {}), "has `extra`, which the model does not have: return a state dict"),
    "no state": (giving(None, 5, {}), "returned nothing as its state: it must return a state dict"),
    "no count": (giving(STATE, {}), r"returned a tuple of 2: it must return \(state, count, metrics\)"),
    "nothing": (lambda state, examples: None, r"returned nothing: it must return \(state, count, metrics\)"),
    "a count of 0": (giving(STATE, 0, {}), "returned 0 as the number of examples .* a whole number of at least 1"),
    "a negative count": (giving(STATE, -3, {}), "returned -3 as the number"),
    "half a count": (giving(STATE, 2.5, {}), "returned 2.5 as the number"),
    "a truth as a count": (giving(STATE, True, {}), "returned True as the number"),
    "an unknown metric": (giving(STATE, 5, {"f1": 1.0}), "metric 'f1', but the task measures only loss, accuracy: leave the"),
    "a metric of text": (giving(STATE, 5, {"loss": "low"}), "returned a str as the mean of 'loss': return a number"),
    "no metrics": (giving(STATE, 5, 1.0), "returned a float as its metrics: return means by name"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_an_error_names_the_client_and_a_remedy_and_loses_no_round(what: str) -> None:
    train, message = WRONG[what]

    def at_first_well(state: Any, examples: Any, about: Any) -> Any:
        return (state, 5, {"loss": 1.0}) if about.number == 0 else train(state, examples)

    with pytest.raises(sumus.SumusError, match=message) as caught:
        simulated(at_first_well, rounds=2)
    assert re.search(r"client [012]: ", str(caught.value))
    assert len(caught.value.history.rounds) == 1
    assert caught.value.checkpoint is not None


def test_a_client_that_fails_can_be_left_out() -> None:
    def train(state: Any, examples: Any, about: Any) -> Any:
        if about.client == 1:
            raise OSError("the disk is gone")
        return shifted(state, examples)

    history = simulated(train, compute=sumus.Compute(failures="skip"), rounds=3)
    failed = [name for record in history.rounds for name in record.reports.failed]
    assert failed
    assert set(failed) == {"1"}


def test_no_examples_name_the_client() -> None:
    empty = sumus.Population([4], load=lambda number: (np.zeros((0, 4), "float32"), np.zeros(0, "int64")))
    task = sumus.Task(lambda: nn.Linear(4, 2), sumus.losses.cross_entropy)
    with pytest.raises(sumus.DataError, match="client 4: it has no examples; leave empty clients out"):
        sumus.simulate(task, sumus.fedavg(sumus.client(shifted)), empty, rounds=1)


def test_a_frozen_leaf_stays_as_it_is_and_may_be_left_out() -> None:
    roles = {"weight": "frozen"}
    simulated(lambda state, examples: ({"bias": state["bias"] + 1}, 5, {"loss": 1.0}), leaves=roles)
    with pytest.raises(
        sumus.TaskError, match=r"client \d: `shifted` changed `weight`, but this leaf is frozen .* requires_grad_"
    ):
        simulated(shifted, leaves=roles)


def test_two_numbers_for_one_tied_leaf_are_refused() -> None:
    def train(state: Any, examples: Any) -> Any:
        return {**state, "other.weight": state["one.weight"] + 1}, 5, {"loss": 1.0}

    with pytest.raises(sumus.TaskError, match="different numbers for `other.weight` and `one.weight`"):
        simulated(train, model=Tied)


MEASURED = {
    "a missing metric": (lambda state, examples: (3, {"loss": 1.0}), "returned no 'accuracy', but the task measures loss"),
    "no count": (lambda state, examples: {"loss": 1.0}, r"it must return \(count, metrics\)"),
    "an exception": (raising(KeyError("x")), "failed: KeyError"),
}  # fmt: skip


@pytest.mark.parametrize("what", MEASURED)
def test_an_error_of_its_measurement_names_the_client(what: str) -> None:
    evaluate, message = MEASURED[what]
    with pytest.raises(sumus.TaskError, match=f"client 9: .*{message}"):
        simulated(shifted, evaluate)


# ── what it cannot go with ───────────────────────────────────────────────────────────────────────────────────────────

OWN = sumus.client(own_loops.train)
NEEDS_STEPS: dict[str, Callable[[], object]] = {
    "scaffold": lambda: sumus.scaffold(OWN),
    "scaffold, by a gradient": lambda: sumus.scaffold(OWN, option=1),
    "fedprox": lambda: sumus.fedprox(OWN, mu=0.1),
    "fednova": lambda: sumus.fednova(OWN),
    "feddyn": lambda: sumus.feddyn(OWN, alpha=0.1),
    "epochs": lambda: dataclasses.replace(OWN, epochs=2),
    "a clip of gradients": lambda: dataclasses.replace(OWN, clip_norm=1.0),
    "a gradient": lambda: dataclasses.replace(OWN, rules=sumus.ClientRules(needs_gradient=True)),
    "batches": lambda: list(OWN.batches(10, np.random.default_rng(0))),
    "a step": lambda: apply_gradients(OWN, {}, {}, {}, {}, {}, 0.1, 1),
    "stragglers": lambda: sumus.Experiment(
        sumus.Plan(TASK, sumus.fedavg(OWN), sumus.Pacing(cohort=2)), PEOPLE, 1, fleet=sumus.Fleet(stragglers=0.5)
    ),
    "batches of a measurement": lambda: sumus.Experiment(
        sumus.Plan(TASK, sumus.fedavg(sumus.client(own_loops.train, own_loops.evaluate)), sumus.Pacing(cohort=2)),
        PEOPLE,
        1,
        sumus.Evaluation(seen=1, batch_size=4),
    ),
    "a program for a phone": lambda: trace_step(
        Program(TASK), OWN, torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    ),
    "a device without torch": lambda: a_step_in_numpy(),
}
TASK = sumus.Task(lambda: nn.Linear(4, 2), sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy})


def a_step_in_numpy() -> None:
    compute = NumpyLinear()
    plan = Plan(compute.description, sumus.fedavg(OWN), sumus.Pacing(cohort=2))
    rows = compute.read("phone", (np.zeros((3, 4), "float32"), np.zeros((3, 1), "float32")))
    job = DeviceJob("phone", rows, 0, bytes(32), lambda *words: bytes(32))
    compute.train(plan, {"params": compute.initial}, job)


@pytest.mark.parametrize("what", NEEDS_STEPS)
def test_where_a_gradient_or_a_step_is_needed_it_is_refused_by_rule_and_with_a_remedy(what: str) -> None:
    with pytest.raises(sumus.PlanError, match=r"train by sgd\(\)|by sgd\(\), adam\(\)|leave batch_size= out") as caught:
        NEEDS_STEPS[what]()
    assert caught.value.rule == "own-loop"


@pytest.mark.parametrize(
    "algorithm",
    [
        sumus.fedavg(OWN, update=sumus.chain(sumus.clip_by_global_norm(1.0), sumus.rotate(), sumus.quantize(bits=8))),
        sumus.fedadam(OWN, lr=0.1),
        sumus.fedbuff(OWN),
        sumus.cyclic(OWN),
        sumus.fedavg(OWN, aggregator=sumus.robust.median()),
    ],
    ids=lambda algorithm: algorithm.aggregator.spec.name + algorithm.server.spec.name,
)
def test_where_only_its_difference_is_needed_it_goes(algorithm: sumus.Algorithm) -> None:
    plan = sumus.Plan(TASK, algorithm, sumus.Pacing(cohort=2))
    assert Plan.from_json(plan.to_json()) == plan


def test_a_function_that_cannot_be_called_so_is_refused_at_once() -> None:
    with pytest.raises(sumus.PlanError, match=r"takes \(state\), but is called with \(state, examples\)"):
        sumus.client(lambda state: state)
    with pytest.raises(sumus.PlanError, match="takes functions, not 3"):
        sumus.client(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(sumus.PlanError, match="give them different names"):
        sumus.client(own_loops.train, own_loops.train)


# ── its name in a plan ───────────────────────────────────────────────────────────────────────────────────────────────


def plan_of(work: sumus.ClientWork) -> Plan:
    return sumus.Plan(TASK, sumus.fedavg(work), sumus.Pacing(cohort=10), trusts_devices=True)


def test_a_plan_holds_names_and_no_code() -> None:
    text = plan_of(sumus.client(own_loops.train, own_loops.evaluate)).to_json()
    client = json.loads(text)["algorithm"]["with"]["client"]
    assert client == {"name": "client/client", "with": {"train": "train", "evaluate": "evaluate"}}


@pytest.mark.parametrize("train", [lambda state, examples: 0, functools.partial(shifted)], ids=["lambda", "partial"])
def test_code_that_no_device_could_find_is_for_simulations(train: Any) -> None:
    with pytest.raises(sumus.PlanError, match=r"is a lambda, .*: define it at the top of a module.*rule custom-name"):
        plan_of(sumus.client(train)).check_deployable()


def test_a_device_calls_no_function_that_its_owner_has_not_offered() -> None:
    training = Training(TASK, person(0), "autograd")
    text = plan_of(sumus.client(own_loops.train)).to_json().replace('"train":"train"', '"train":"person"')
    with pytest.raises(
        sumus.PlanError, match=r"offers none of that name: .* add the line sumus\.client\(train=person\)"
    ):
        training.plan("hash", text.encode)


def test_of_two_functions_with_one_name_the_tasks_own_module_has_the_right_one() -> None:
    spaces = [{"__name__": name} for name in ("first_file", "second_file")]
    for number, space in enumerate(spaces):
        exec(f"def both(state, examples): return {number}\ndef net(): pass", space)
        sumus.client(space["both"])
    loop = Plan.from_json(plan_of(sumus.client(spaces[1]["both"])).to_json()).algorithm.client.loop
    assert loop is not None
    assert loop.function("both", sumus.Task(spaces[0]["net"], sumus.losses.cross_entropy))(None, None) == 0
    assert loop.function("both", sumus.Task(spaces[1]["net"], sumus.losses.cross_entropy))(None, None) == 1
    with pytest.raises(sumus.PlanError, match="first_file and second_file each define one: rename all"):
        loop.function("both", TASK)


def test_its_memory_is_that_of_the_model_and_its_check_runs_it() -> None:
    report = sumus.check(plan_of(sumus.client(shifted)), PEOPLE)
    assert report.model.cost.total == 40
    assert report.first.loss == 1.0
