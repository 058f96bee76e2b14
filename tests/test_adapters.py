"""Flower's clients in sumus: its own FedAvg weights with flwr 1.42 in an environment of its own, and clients without flwr."""

import json
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

import sumus
from benchmarks.peers.environments import KEPT, Environment, EnvironmentAbsent, prepare

ROOT = Path(__file__).parents[1]
FLOWER = Environment("flower-adapter", ("flwr==1.42.0",), False, ("flwr",), loosened=("certifi",))
"""flwr without Ray; torch and what sumus needs are those of this environment."""


def test_it_gives_the_weights_of_flowers_own_fedavg(tmp_path: Path) -> None:
    try:
        python = prepare(FLOWER, KEPT, print)
    except (EnvironmentAbsent, OSError) as error:
        pytest.skip(f"flwr 1.42 cannot be installed here: {error}")
    command = [str(python), "-m", "tests.flower_peer", sysconfig.get_paths()["purelib"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["differences"]) == {"app", "app on devices", "NumPyClient"}
    assert max(found["differences"].values()) < 1e-6
    assert found["measured"] == {"loss": 0.25, "accuracy": 0.75}
    assert found["spec"]["with"] == {"train": "train.fit", "evaluate": "evaluate.evaluate"}


def person(number: int) -> tuple[Any, Any]:
    inputs = np.random.default_rng(number).normal(size=(10, 4)).astype("float32")
    return inputs, (inputs[:, 0] > 0).astype("int64")


class Shifting:
    """Like a NumPyClient: it adds one, and measures nothing."""

    def __init__(self, context: Any) -> None:
        self.inputs, self.context = context.examples[0], context

    def fit(self, parameters: Any, config: Any) -> Any:
        return [leaf + config["step"] for leaf in parameters], len(self.inputs), {"train_loss": 0.5, "other": 7}

    def evaluate(self, parameters: Any, config: Any) -> Any:
        return 0.125, 10, {"acc": 0.5}


def shifting(context: Any) -> Any:
    return SimpleNamespace(numpy_client=Shifting(context))  # what `to_client()` gives


def simulated(work: sumus.ClientWork) -> sumus.History:
    task = sumus.Task(nn.Linear(4, 2), sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy})
    people = sumus.Population(range(3), load=person)
    unseen = sumus.Evaluation(unseen=sumus.Population([9], load=person))
    return sumus.simulate(task, sumus.fedavg(work), people, rounds=2, evaluate=unseen)


def test_a_numpy_client_needs_no_flower() -> None:
    work = sumus.adapters.flower(
        shifting, shifting, config=lambda number: {"step": number}, metrics={"accuracy": "acc"}
    )
    assert work.spec.to_json()["with"] == {"train": "shifting.fit", "evaluate": "shifting.evaluate"}
    history = simulated(work)
    assert history.metrics == {"loss": 0.125, "accuracy": 0.5}
    assert [record.loss for record in history.rounds] == [0.5, 0.5]


WRONG = {
    "too few arrays": ({"fit": lambda parameters, config: (parameters[:1], 3, {})}, "returned 1 arrays, but the model"),
    "no values": ({"fit": lambda parameters, config: None}, "did not return three values"),
    "no method": ({}, "which has no `fit`: return a NumPyClient"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_an_error_names_the_client_and_a_remedy(what: str) -> None:
    methods, message = WRONG[what]
    with pytest.raises(sumus.UsageError, match=rf"client \d: .*{message}"):
        simulated(sumus.adapters.flower(lambda context: SimpleNamespace(**methods)))


def test_a_state_that_would_be_lost_is_refused() -> None:
    def keeping(context: Any) -> Any:
        context.state["head"] = 1
        return Shifting(context)

    with pytest.raises(sumus.UsageError, match=r"client \d: the code keeps head in context.state.*personal"):
        simulated(sumus.adapters.flower(keeping, config={"step": 1}))


def test_another_function_is_refused_at_once() -> None:
    with pytest.raises(sumus.PlanError, match=r"takes a function of \(context\)"):
        sumus.adapters.flower(lambda: None)


def test_a_client_app_without_flower_says_what_to_install() -> None:
    with pytest.raises(sumus.UsageError, match=r"client \d: .*need flwr, .*pip install flwr"):
        simulated(sumus.adapters.flower(lambda message, context: message))


def test_a_numpy_client_gives_one_model_in_processes_on_devices_and_resumed(tmp_path: Path) -> None:
    task = sumus.Task(lambda: nn.Linear(4, 2), sumus.losses.cross_entropy)
    work = sumus.adapters.flower(shifting, config={"step": 0.5})
    plan = sumus.Plan(task, sumus.fedavg(work), sumus.Pacing(cohort=3), 2)
    experiment = sumus.Experiment(plan, sumus.Population(range(3), load=person), rounds=2)
    alone = sumus.run(experiment, compute=sumus.Compute(workers=1))
    sumus.run(replace(experiment, rounds=1), out=str(tmp_path))
    others = {
        "two processes": sumus.run(experiment, compute=sumus.Compute(workers=2)),
        "devices": sumus.run(experiment, compute=sumus.Compute(through="wire")),
        "resumed": sumus.run(experiment, out=str(tmp_path)),
    }
    assert {history.model_sha256 for history in others.values()} == {alone.model_sha256}
    assert not others["two processes"].notes
