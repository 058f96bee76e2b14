"""A device's compute without torch: a linear model with a squared error, in numpy alone.

It is an example of an implementation of `sumus.device.compute.DeviceCompute`, such as one for onnxruntime.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sumus.device.compute import (
    DeviceJob,
    JobResult,
    PlanCache,
    evaluation_result,
    loaded,
    read_broadcast,
    read_model,
    state_for,
    training_result,
)
from sumus.errors import DataError
from sumus.executors.executor import Trained
from sumus.plan import Plan
from sumus.rng import generator
from sumus.task import Data, Description, Leaf
from sumus.types import Array, Broadcast, Tree
from sumus.work import ClientState, LocalRun, apply_gradients


@dataclass(frozen=True)
class Rows:
    """A client's examples."""

    inputs: Array
    targets: Array

    @property
    def count(self) -> int:
        return len(self.inputs)


class NumpyLinear:
    """outputs = inputs · weightᵀ + bias, for inputs of some width and one target."""

    def __init__(self, width: int = 4) -> None:
        self.width = width
        self.initial: Tree = {"weight": np.zeros((1, width), np.float32), "bias": np.zeros(1, np.float32)}
        leaves = tuple(Leaf(name, leaf.shape, "float32", "shared", True) for name, leaf in self.initial.items())
        data = Data((width,), "float32", (1,), "float32")
        self.description = Description("linear", leaves, "mean_squared_error", (), data)
        self._plans = PlanCache()

    @property
    def fingerprint(self) -> str:
        return self.description.fingerprint

    def read(self, client: Any, examples: Any) -> Rows:
        inputs, targets = (np.asarray(each, np.float32) for each in loaded(client, examples))
        if inputs.shape[1:] != (self.width,) or targets.shape != (len(inputs), 1):
            raise DataError(client, f"inputs {inputs.shape} and targets {targets.shape} do not fit")
        return Rows(inputs, targets)

    def plan(self, sha256: str, body: Callable[[], bytes]) -> Plan:
        return self._plans.get(sha256, body)

    def memory(self, plan: Plan, examples: Rows) -> int:
        return 4 * sum(leaf.nbytes for leaf in self.initial.values())

    def broadcast(self, plan: Plan, sha256: str, body: bytes) -> Broadcast:
        return read_broadcast(plan, self.initial, body)

    def model(self, body: bytes) -> Tree:
        return read_model(self.initial, body)

    def train(self, plan: Plan, broadcast: Broadcast, job: DeviceJob[Rows]) -> JobResult:
        work, rows, sent = plan.algorithm.client, job.examples, broadcast["params"]
        own = state_for(plan, self.initial, job.state) or dict(work.rules.init(sent))
        params: dict[str, Any] = dict(sent)
        states = {name: work.rule_of(name).init(leaf) for name, leaf in params.items()}
        rate, steps, total, seen = work.lr.rate(job.version), 0, 0.0, 0
        for batch in work.batches(rows.count, generator(job.key("training"), "batches")):
            steps += 1
            losses, gradient = squared_error(params, rows.inputs[batch], rows.targets[batch])
            params, states = apply_gradients(work, params, gradient, states, broadcast, own, rate, steps)
            total, seen = total + float(losses.sum()), seen + len(losses)
        parts, state = work.rules.finish(broadcast, params, own, LocalRun(steps, rate, rows.count, None))
        trained = Trained(job.client, parts, rows.count, {"loss": (total, seen)}, state)
        return training_result(plan, job, trained)

    def evaluate(self, plan: Plan, broadcast: Broadcast, job: DeviceJob[Rows]) -> JobResult:
        losses, _ = squared_error(broadcast["params"], job.examples.inputs, job.examples.targets)
        return evaluation_result(plan, job, {"loss": (float(losses.sum()), len(losses))})

    def predict(self, model: Tree, state: ClientState, examples: Any, inputs: Any) -> Array:
        return outputs_of(model, np.asarray(inputs, np.float32))


def outputs_of(params: Tree, inputs: Array) -> Array:
    return inputs @ params["weight"].T + params["bias"]


def squared_error(params: Tree, inputs: Array, targets: Array) -> tuple[Array, dict[str, Array]]:
    """Return the loss of each example, and the gradient of their mean."""
    off = outputs_of(params, inputs) - targets
    slope = 2 * off / len(inputs)
    return (off**2).mean(1), {"weight": slope.T @ inputs, "bias": slope.sum(0)}
