"""Through the wire is the same, bit for bit: real requests to a real server change nothing that is computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sumus
from sumus.experiment import Experiment
from tests.simulating import doors


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))


def person(number: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(number)
    inputs = rng.normal(size=(12 + number, 4)).astype("float32")
    return inputs, (inputs.sum(1) > 0).astype("int64")


PEOPLE = sumus.Population(range(6), load=person)
UNSEEN = sumus.Population(range(10, 13), load=person)
SGD = sumus.sgd(lr=0.1, epochs=2, batch_size=5)
ALGORITHMS = {
    "fedavg": sumus.fedavg(SGD),
    "adam, over narrow codes": sumus.fedadam(
        SGD, 0.1, update=sumus.chain(sumus.clip_by_global_norm(1.0), sumus.rotate(), sumus.quantize(bits=8))
    ),
    "scaffold": sumus.scaffold(SGD),
    "fednova": sumus.fednova(SGD),
    "feddyn": sumus.feddyn(SGD, alpha=0.1),
}


def simulated(algorithm: sumus.Algorithm, cohort: int, through: str, **more: Any) -> sumus.History:
    leaves: Any = more.pop("leaves", {})
    task = sumus.Task(net, sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, leaves=leaves)
    plan = sumus.Plan(task, algorithm, sumus.Pacing(cohort), min_contributors=2)
    experiment = Experiment(plan, PEOPLE, 4, sumus.Evaluation(unseen=UNSEEN, seen=3))
    return sumus.run(experiment, **doors({"executor": "sequential", "through": through, **more}))


def same(one: sumus.History, other: sumus.History) -> bool:
    measured = [[(r.clients, r.examples, r.traffic.up, r.evaluation) for r in h.rounds] for h in (one, other)]
    return one.model_sha256 == other.model_sha256 and measured[0] == measured[1]


@pytest.mark.parametrize("cohort", [6, 4], ids=["everyone", "four of six"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_through_the_wire_gives_the_same_model(algorithm: str, cohort: int) -> None:
    through = {way: simulated(ALGORITHMS[algorithm], cohort, way) for way in ("memory", "wire")}
    assert same(through["memory"], through["wire"])
    assert through["wire"].rounds[-1].loss == pytest.approx(through["memory"].rounds[-1].loss)


def test_what_clients_keep_for_themselves_stays_with_their_devices() -> None:
    through = {way: simulated(ALGORITHMS["fedavg"], 4, way, leaves={"3.*": "personal"}) for way in ("memory", "wire")}
    assert same(through["memory"], through["wire"])


@pytest.mark.parametrize(
    ("pacing", "fleet"),
    [
        (sumus.Pacing(4, over_select=1.5), sumus.Fleet()),
        (sumus.Pacing(4, concurrency=6), sumus.Fleet()),
        (sumus.Pacing(4), sumus.Fleet(lost=0.1)),
    ],
)
def test_what_only_a_virtual_clock_can_play_is_refused(pacing: sumus.Pacing, fleet: sumus.Fleet) -> None:
    task = sumus.Task(net, sumus.losses.cross_entropy)
    experiment = Experiment(sumus.Plan(task, ALGORITHMS["fedavg"], pacing, 2), PEOPLE, 2, fleet=fleet)
    with pytest.raises(sumus.ExperimentError, match="without through="):
        sumus.run(experiment, compute=sumus.Compute(through="wire"))


def test_a_plan_that_no_server_takes_is_refused() -> None:
    task = sumus.Task(net, sumus.losses.cross_entropy)
    krum = sumus.fedavg(SGD, aggregator=sumus.robust.krum(attackers=1))
    with pytest.raises(sumus.PlanError, match="needs each update separately"):
        sumus.run(
            Experiment(sumus.Plan(task, krum, sumus.Pacing(6), 2), PEOPLE, 2), compute=sumus.Compute(through="wire")
        )


def test_a_run_through_the_wire_starts_from_the_beginning(tmp_path: Path) -> None:
    simulated(ALGORITHMS["fedavg"], 4, "memory", out=tmp_path)
    with pytest.raises(sumus.ExperimentError, match="always starts from the beginning"):
        simulated(ALGORITHMS["fedavg"], 4, "wire", out=tmp_path)
    assert len(simulated(ALGORITHMS["fedavg"], 4, "wire", out=tmp_path, restart=True).rounds) == 4
