"""What a device computes is a contract: by torch, or by numpy in a process in which torch is not there."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import sumus
from sumus.device.compute import DeviceCompute, DeviceJob
from sumus.device.keys import keyed
from sumus.device.training import Training
from sumus.errors import DataError, DivergedError, ParticipantError, PlanError
from sumus.plan import Plan
from sumus.tree import unnested
from sumus.wire.reports import decode_report
from sumus.wire.tensors import encode_tree
from tests.device.in_numpy import NumpyLinear
from tests.device.served import FEDAVG, SCAFFOLD, SEED, TEN, Served, a_device, a_task, some_examples


def by_torch() -> DeviceCompute[Any]:
    return Training(a_task(metrics={}), some_examples(), "autograd")


KINDS = {"torch": by_torch, "numpy": NumpyLinear}


@pytest.fixture(params=KINDS)
def compute(request: pytest.FixtureRequest) -> DeviceCompute[Any]:
    return KINDS[request.param]()


def a_plan(algorithm: sumus.Algorithm = FEDAVG) -> Plan:
    return Plan(NumpyLinear().description, algorithm, TEN, trusts_devices=True)


def sent(plan: Plan, weight: float = 0.5) -> tuple[bytes, Any]:
    initial = {"weight": np.full((1, 4), weight, np.float32), "bias": np.zeros(1, np.float32)}
    start = plan.algorithm.start(initial, plan.description)
    return encode_tree(unnested(start.broadcast)), start


def job_of(compute: DeviceCompute[Any], **changes: Any) -> DeviceJob[Any]:
    return DeviceJob("alice", compute.read("alice", some_examples()), 3, SEED, keyed(7), **changes)


def test_both_have_the_fingerprint_of_the_same_task(compute: DeviceCompute[Any]) -> None:
    assert compute.fingerprint == NumpyLinear().description.fingerprint


def test_examples_are_counted_and_may_come_from_a_function(compute: DeviceCompute[Any]) -> None:
    assert compute.read("alice", some_examples(0, 7)).count == 7
    assert compute.read("alice", lambda: some_examples(0, 5)).count == 5
    with pytest.raises(DataError, match="alice"):
        compute.read("alice", (np.zeros((3, 5), np.float32), np.zeros((3, 1), np.float32)))


def test_a_plan_is_fetched_once(compute: DeviceCompute[Any]) -> None:
    asked, plan = list[int](), a_plan()

    def body() -> bytes:
        asked.append(1)
        return plan.to_json().encode()

    assert compute.plan("hash", body).id == compute.plan("hash", body).id == plan.id
    assert asked == [1]
    with pytest.raises(PlanError):
        compute.plan("other", lambda: b"\xff")


def test_a_broadcast_and_a_model_of_other_leaves_are_refused(compute: DeviceCompute[Any]) -> None:
    plan = a_plan()
    body, _ = sent(plan)
    assert set(compute.broadcast(plan, "hash", body)["params"]) == {"weight", "bias"}
    other = {"params/weight": np.zeros((2, 4), np.float32), "params/bias": np.zeros(1, np.float32)}
    with pytest.raises(ParticipantError):
        compute.broadcast(plan, "other", encode_tree(other))
    broken = {"weight": np.full((1, 4), np.nan, np.float32), "bias": np.zeros(1, np.float32)}
    with pytest.raises(ParticipantError, match="NaN or infinity at `weight`"):
        compute.model(encode_tree(broken))


@pytest.mark.parametrize("algorithm", [FEDAVG, SCAFFOLD], ids=["fedavg", "scaffold"])
def test_numpy_trains_as_torch_does_up_to_rounding(algorithm: sumus.Algorithm) -> None:
    plan, found = a_plan(algorithm), []
    body, _ = sent(plan)
    for make in KINDS.values():
        compute = make()
        result = compute.train(plan, compute.broadcast(plan, "hash", body), job_of(compute))
        update = decode_report(result.report, "alice", plan.first_hop)
        found.append((result, update))
    (one, mine), (other, its) = found
    assert (one.examples, one.steps, one.state.keys()) == (other.examples, other.steps, other.state.keys())
    assert mine.parts.keys() == its.parts.keys()
    for part, tree in mine.parts.items():
        for name, leaf in tree.items():
            np.testing.assert_allclose(leaf, its.parts[part][name], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mine.metrics["loss"], its.metrics["loss"], rtol=1e-4)


def test_a_report_is_what_the_plan_takes(compute: DeviceCompute[Any]) -> None:
    plan = a_plan()
    body, _ = sent(plan)
    result = compute.train(plan, compute.broadcast(plan, "hash", body), job_of(compute))
    assert decode_report(result.report, "alice", plan.first_hop).examples == 12


def test_a_training_that_runs_to_infinity_is_refused_here(compute: DeviceCompute[Any]) -> None:
    plan = a_plan(sumus.fedavg(sumus.sgd(lr=1e30, epochs=20, batch_size=5)))
    body, _ = sent(plan)
    with np.errstate(all="ignore"), pytest.raises(DivergedError):
        compute.train(plan, compute.broadcast(plan, "hash", body), job_of(compute))


def test_an_evaluation_and_predictions(compute: DeviceCompute[Any]) -> None:
    plan = a_plan()
    body, start = sent(plan)
    inputs, targets = some_examples()
    result = compute.evaluate(plan, compute.broadcast(plan, "hash", body), job_of(compute))
    wanted = float(((inputs.sum(1, keepdims=True) * 0.5 - targets) ** 2).sum())
    assert result.measured["loss"] == (pytest.approx(wanted, rel=1e-5), 12)
    model = compute.model(encode_tree(plan.algorithm.release(start)))
    outputs = compute.predict(model, {}, some_examples(), inputs)
    np.testing.assert_allclose(outputs, inputs.sum(1, keepdims=True) * 0.5, rtol=1e-5, atol=1e-6)


def test_a_device_takes_a_compute_in_place_of_a_task() -> None:
    server = Served(task=a_task(metrics={}), releases=True)
    device = a_device(server, task=NumpyLinear())
    device.run(rounds=1)
    assert len(server.counted) == 1
    assert device.predict(some_examples()[0]).shape == (12, 1)


CONTRACTS = """
import sys
import sumus.executors, sumus.executors.executor, sumus.device.compute, sumus.device.device, sumus.device.commands
assert "torch" not in sys.modules
assert not [name for name in sys.modules if name.startswith("sumus.simulator")], "a device needs no simulator"
"""

A_ROUND = """
import sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import sumus
from sumus.operations.service import open_service
from sumus.transport.inprocess import InProcess
from sumus.wire.bundle import Bundle
from tests.device.in_numpy import NumpyLinear

compute = NumpyLinear()
plan = sumus.Plan(
    compute.description, sumus.fedavg(sumus.sgd(0.1, epochs=2, batch_size=5)), sumus.Pacing(2, deadline=60.0),
    min_contributors=2, trusts_devices=True,
)
service = open_service({"linear": Bundle(plan, compute.initial)})
service.server.start()
token = service.server.roll.new_token(service.server.population, service.server.clock(), uses=2)


class AtHome:
    def read(self):
        return sumus.Conditions(charging=True, unmetered=True, idle=True, battery=1.0)


with InProcess(service.device_app) as network:
    rng, devices = np.random.default_rng(0), []
    for number in range(2):
        inputs = rng.normal(size=(12, 4)).astype(np.float32)
        devices.append(sumus.Device(
            "http://127.0.0.1", compute, (inputs, inputs.sum(1, keepdims=True)), token=token,
            consent=sumus.Floor(contributors=2),
            connection=sumus.ServerConnection(wait_s=0.0, transport=network),
            profile=sumus.DeviceProfile(f"device {number}", sensors=AtHome()),
        ))
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda device: device.run(rounds=1), devices))
    print(devices[0].predict(np.ones((3, 4))).shape, "torch" in sys.modules)
service.close()
"""


@pytest.mark.parametrize(("code", "said"), [(CONTRACTS, ""), (A_ROUND, "(3, 1) False")], ids=["contracts", "a round"])
def test_without_torch(code: str, said: str) -> None:
    """In a process of its own."""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == said, run.stderr
