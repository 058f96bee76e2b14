"""A task bound to torch on one machine. It computes for one device, or for all devices that a process simulates.

    training = Training(task, examples)
    done = training.train(plan, broadcast, job)          the report's bytes, and the client's new state
    measured = training.evaluate(plan, broadcast, job)
    outputs = training.predict(model, state, examples, inputs)

It does the same as the simulator's `Trainer` for one client: equal keys give equal bits. All callers share one module, so they
compute one at a time.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sumus.aggregate import BUFFERS
from sumus.device.compute import (
    MOST_PLANS,
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
from sumus.errors import TaskError
from sumus.executors.choice import AUTOGRAD, SEQUENTIAL, SHORT, ExecutorChoice, RunLength, checked
from sumus.executors.executor import ClientAssignment, Executor
from sumus.executors.own_loop import measured_by
from sumus.executors.witness import Witness
from sumus.plan import Plan
from sumus.task import Task
from sumus.training.cost import cost_of
from sumus.training.examples import as_pair
from sumus.training.observed import expect_means
from sumus.training.program import EVALUATION_BATCH, Program, one_thread
from sumus.types import Array, Broadcast, Tree
from sumus.work import PERSONAL, ClientState, ClientWork

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 100
"""The number of training rounds that a device is expected to do, for deciding whether to capture its step as a graph."""


_counting, _inside, _number = threading.Lock(), list[None](), ExitStack()


@contextmanager
def _one_thread() -> Generator[None, None, None]:
    """Limit torch to one thread while a `with` block runs. The limit holds for the whole process; if several callers use it at
    the same time, the last one to finish restores the old number."""
    with _counting:
        if not _inside:
            _number.enter_context(one_thread())
        _inside.append(None)
    try:
        yield
    finally:
        with _counting:
            _inside.pop()
            if not _inside:
                _number.close()


@dataclass(frozen=True)
class TensorExamples:
    """A client's examples as tensors, one row for each example.

    Attributes:
        inputs: The inputs.
        targets: The targets.
    """

    inputs: "Tensor"
    targets: "Tensor"

    @property
    def count(self) -> int:
        """The number of examples."""
        return len(self.inputs)


class Training:
    """A `DeviceCompute` by torch: one program, its executors, and the plans that were requested most recently.

    Args:
        task: The task.
        examples: The first device's examples, which show what the examples of all devices look like.
        executor: "auto" captures the step as a graph if that saves time and gives the same results as autograd. Other values
            are those of `--executor`.
        device: The torch device for all computations.
        seed: The seed for leaves that no server sends.
        witness: Makes a `Witness` for the program, in a simulation. Devices use none, as nobody would read its results.

    Attributes:
        program: The task's module, with all operations on it.
        description: The task's leaves and data.
        fingerprint: The hash of `description`.
        notes: Notes for the user, each one once.
    """

    def __init__(
        self,
        task: Task,
        examples: Any,
        executor: str = "auto",
        device: str = "cpu",
        seed: int = 0,
        witness: Callable[[Program], Witness] | None = None,
    ) -> None:
        self._wanted = None if executor == "auto" else ExecutorChoice.parse(executor)
        self._one_at_a_time = threading.RLock()
        with _one_thread():
            self.program = Program(task, device, seed)
            first = self.read("this device", examples)
            data = self.program.learn_schema("this device", first.inputs, first.targets)
            expect_means(self.program, first.inputs, first.targets)
        self.description = replace(self.program.description, data=data)
        self.fingerprint = self.description.fingerprint
        self.notes: dict[str, None] = {}
        self._witness = None if witness is None else witness(self.program)
        self._plans = PlanCache()
        self._executors: dict[str, Executor] = {}
        self._memory: dict[tuple[str, int], int] = {}
        self._broadcast: tuple[str, Broadcast] = ("", {})

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, client: Any, examples: Any) -> TensorExamples:
        """Prepare and check a device's examples, which may come from a function."""
        return TensorExamples(*self.program.reader.convert(client, loaded(client, examples)))

    def plan(self, sha256: str, body: Callable[[], bytes]) -> Plan:
        """Return the plan with this hash; its JSON is fetched if the plan is not known yet.

        Raises:
            PlanError: The JSON is not a plan, or it needs a function of the owner's that this process does not have.
        """
        with self._one_at_a_time:
            plan = self._plans.get(sha256, body)
            if (loop := plan.algorithm.client.loop) is not None:
                loop.expect_offered(self.program.task)
            return plan

    def memory(self, plan: Plan, examples: TensorExamples) -> int:
        """Return the minimum number of bytes that a local step of a plan can take."""
        work, count = plan.algorithm.client, examples.count
        step = (repr(work), min(work.batch_size or count, count))
        with self._one_at_a_time:
            if step not in self._memory:
                with _one_thread():
                    self._memory[step] = cost_of(self.program, work, examples.inputs, examples.targets).total
            return self._memory[step]

    def broadcast(self, plan: Plan, sha256: str, body: bytes) -> Broadcast:
        """Decode a broadcast. The last one is remembered by its hash."""
        with self._one_at_a_time:
            if self._broadcast[0] != sha256:
                self._broadcast = sha256, read_broadcast(plan, self.program.initial_shared, body)
            return self._broadcast[1]

    def model(self, body: bytes) -> Tree:
        """Decode a released model."""
        return read_model(self.program.initial_shared, body)

    # ── computing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self, plan: Plan, broadcast: Broadcast, job: DeviceJob[TensorExamples]) -> JobResult:
        """Train, and make the report. Errors in the client's training are raised."""
        examples = job.examples
        state = state_for(plan, self.program.initial_shared, job.state)
        own = ClientAssignment(job.client, examples.inputs, examples.targets, state, job.key("training"))
        with self._one_at_a_time, _one_thread():
            executor = self._executor(plan, broadcast, own)
            run = executor.run if self._witness is None else partial(self._witness.run, executor)
            (trained,) = run(broadcast, job.version, [own])
        return training_result(plan, job, trained)

    def evaluate(self, plan: Plan, broadcast: Broadcast, job: DeviceJob[TensorExamples]) -> JobResult:
        """Measure the plan's metrics on the client's examples, with its personal leaves."""
        with self._one_at_a_time, _one_thread():
            self._load({**broadcast["params"], **broadcast.get(BUFFERS, {})}, job.state)
            loop, inputs, targets = plan.algorithm.client.loop, job.examples.inputs, job.examples.targets
            try:
                if loop is None or loop.evaluate is None:
                    measured = self.program.evaluate(inputs, targets)
                else:
                    measured = measured_by(self.program, loop, job.client, inputs, targets)
            except TaskError as error:
                raise TaskError(f"client {job.client!r}: {error}") from error
        return evaluation_result(plan, job, measured)

    def predict(self, model: Tree, state: ClientState, examples: Any, inputs: Any) -> Array:
        """Return the model's outputs for inputs as this device stores them: one row for each prepared input."""
        _, targets = as_pair("this device", loaded("this device", examples))
        filled = np.repeat(np.asarray(targets)[:1], len(inputs), axis=0)  # `prepare` needs targets too
        with self._one_at_a_time:
            prepared, _ = self.program.reader.convert("the inputs", (inputs, filled))
            self._load(model, state)
            rows = range(0, len(prepared), EVALUATION_BATCH)
            return np.concatenate([self.program.predict(prepared[at : at + EVALUATION_BATCH]).numpy() for at in rows])

    def look_again(self) -> None:
        """Let the witness, if one is used, train its client again."""
        if self._witness is not None:
            with self._one_at_a_time, _one_thread():
                self._witness.look()

    def _load(self, shared: Tree, state: ClientState) -> None:
        program = self.program
        personal = program.tensors_of(state.get(PERSONAL, {}))
        program.load({**program.tensors_of(shared), **program.initial_personal, **personal})

    def _executor(self, plan: Plan, broadcast: Broadcast, first: ClientAssignment) -> Executor:
        work = plan.algorithm.client
        if repr(work) not in self._executors:
            kept = list(self._executors.items())[1 - MOST_PLANS :]
            choice = self._choice(work, broadcast, first)
            self._executors = {**dict(kept), repr(work): choice.executor(self.program, work)}
        return self._executors[repr(work)]

    def _choice(self, work: ClientWork, broadcast: Broadcast, first: ClientAssignment) -> ExecutorChoice:
        wanted = AUTOGRAD if work.loop is not None else self._wanted
        if wanted is None:
            short = RunLength.of(self.program, work, first, clients=ROUNDS).seconds < SHORT
            wanted = AUTOGRAD if short else SEQUENTIAL
        if wanted == AUTOGRAD:
            return wanted
        chosen = checked(wanted, self.program, work, [first], broadcast)
        if self._wanted not in (None, chosen.choice):
            self.notes[f"trained by {chosen.choice}, {chosen.reason}"] = None
        return chosen.choice
