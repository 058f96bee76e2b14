"""Figures of several sums on a real server: what devices measured, and no more than the plan says of it."""

import json
from typing import Any

import numpy as np
from torch import nn

import sumus
from sumus.aggregate import Aggregate
from sumus.device.device import Device
from sumus.device.training import Training
from sumus.evaluation import medians_of
from sumus.figures import figures
from sumus.server.evaluation import Evaluating
from sumus.training.program import Program
from sumus.transport.inprocess import InProcess
from tests.device.served import FEDAVG, a_device
from tests.device.test_real_server import a_token, in_turn, serving

TRAINING, MEASURING = 3, 4


def examples(number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    inputs = rng.normal(size=(12 + number, 4)).astype(np.float32)
    return inputs, (inputs.sum(1, keepdims=True) + rng.normal(size=(len(inputs), 1)) > 0).astype(np.float32)


TASK = sumus.Task(
    lambda: nn.Linear(4, 1),
    sumus.losses.binary_cross_entropy_with_logits,
    {
        "auc": sumus.metrics.roc_auc_with_logits(50),
        "side": sumus.metrics.by_class(sumus.metrics.binary_accuracy_with_logits, ["no", "yes"]),
    },
)


def test_a_server_shows_figures_and_not_their_sums() -> None:
    training = Training(TASK, examples(0), "autograd")
    with serving(training, FEDAVG, TRAINING, evaluate=Evaluating(MEASURING)) as service:
        with InProcess(service.device_app) as transport:
            token, run = a_token(service), service.server.tasks[0].training
            devices: list[Device] = [
                a_device(
                    transport,
                    task=training,
                    examples=examples(number),
                    name=number,
                    token=token,
                    wait_s=0.0,
                    trains=number < TRAINING,
                    evaluates=number >= TRAINING,
                )
                for number in range(TRAINING + MEASURING)
            ]
            for device in devices:
                device.enrol()
            service.server.ask_to_do(lambda now: service.server.crowd.count()).result()

            def measured() -> dict[int, Any]:
                found = {v: json.loads(run.model(v).metrics).get("evaluate") for v in range(1, run.version + 1)}
                return {version: one for version, one in found.items() if one}

            in_turn(devices, measured)
            assert transport.failures == []
            version, shown = next(iter(measured().items()))
            model = run._shared(run.model(version))  # pyright: ignore[reportPrivateUsage]
    assert shown["devices"] == MEASURING
    names = {"loss", "auc", "side.no", "side.yes"}
    assert set(shown["means"]) == set(shown["histograms"]) == set(shown["medians"]) == names
    assert wanted_of(model)["auc"] == shown["means"]["auc"]
    assert wanted_of(model)["side.yes"] == shown["means"]["side.yes"]
    low, high = shown["medians"]["auc"]
    assert (low or 0.0) <= (high or 1.0)


def wanted_of(model: Any) -> dict[str, float]:
    """The figures of all measuring people's examples together."""
    program = Program(TASK)
    program.load(program.tensors_of(model))
    total: dict[str, tuple[float, int]] = {}
    for number in range(TRAINING, TRAINING + MEASURING):
        for name, (value, count) in program.evaluate(*program.reader.convert(number, examples(number))).items():
            before, counted = total.get(name, (0.0, 0))
            total[name] = (before + value, counted + count)
    return figures({name: value / count for name, (value, count) in total.items() if count})


def test_nothing_measured_is_no_figure() -> None:
    assert Aggregate().metric_means() == figures({}) == {}
    assert medians_of({"auc": [0] * 20}, None) == {}  # pyright: ignore[reportArgumentType]
