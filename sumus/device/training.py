"""A task bound to torch on one machine: what its devices compute, one of them or all that a process plays.

    training = Training(task, examples)
    done = training.train(plan, broadcast, errand)       the report's bytes, and what the client would keep
    measured = training.evaluate(plan, broadcast, errand)
    outputs = training.predict(model, state, inputs)

It is what the simulator's `Trainer` does for one client: the same keys give the same bits. There is one module, so one caller
computes at a time.
"""

import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sumus.aggregate import BUFFERS, Update
from sumus.device.keys import Keys
from sumus.errors import DataError, DivergedError, ParticipantError, PlanError, SumusError, TaskError
from sumus.evaluation import evaluation_report
from sumus.executors.choice import AUTOGRAD, SEQUENTIAL, SHORT, ExecutorChoice, RunLength, checked
from sumus.executors.executor import ClientAssignment, Executor
from sumus.plan import Plan
from sumus.rng import generator_of
from sumus.task import Task
from sumus.training.cost import cost_of
from sumus.training.examples import as_pair
from sumus.training.observed import expect_means
from sumus.training.program import EVALUATION_BATCH, Program, one_thread
from sumus.tree import first_non_finite, nested, unnested
from sumus.types import Array, Broadcast, Tree
from sumus.wire.reports import encode_report
from sumus.wire.tensors import decode_tree
from sumus.work import PERSONAL, ClientState, ClientWork

if TYPE_CHECKING:
    from torch import Tensor

    from sumus.executors.witness import Witness

ROUNDS = 100
"""That a device is expected to train, when it is weighed whether capturing its step pays."""
_PLANS = 8


_counting, _inside, _number = threading.Lock(), list[None](), ExitStack()


@contextmanager
def _one_thread() -> Generator[None, None, None]:
    """`one_thread`, for several threads at once: the number is the process's, and the last of them gives it back."""
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
class DeviceJob:
    """One client's work. client: its id.  version: of the model.  seed: of the sum.  again: how often it had work on this model
    before.  state: what it kept."""

    client: Any
    inputs: "Tensor"
    targets: "Tensor"
    version: int
    seed: bytes
    keys: Keys
    again: int = 0
    state: ClientState = field(default_factory=dict[str, Any])

    def key(self, purpose: str) -> bytes:
        """For what is random about it."""
        again = [self.again] if self.again else []
        return self.keys("round", self.version, "client", self.client, purpose, *again)


@dataclass(frozen=True)
class JobResult:
    """What came of an errand. report: encoded.  state: what the client keeps if it is counted.  measured: (sum, count) by metric.
    seconds: that it took."""

    report: bytes
    examples: int
    measured: Mapping[str, tuple[float, int]]
    steps: int = 0
    seconds: float = 0.0
    state: ClientState = field(default_factory=dict[str, Any])


class Training:
    """One program, its executors, and the plans that it was asked for last.

    examples: of the first device, which say what all of them look like.  executor: "auto" captures the step as a graph where
    that pays and gives what autograd gives; or a name of `--executor`.  seed: of leaves that no server sends.  notes: what the
    user should know, once each.  witness: trains the first client again where a simulation asks for it; None on
    real devices, which have nobody to tell.
    """

    def __init__(self, task: Task, examples: Any, executor: str = "auto", device: str = "cpu", seed: int = 0) -> None:
        self._wanted = None if executor == "auto" else ExecutorChoice.parse(executor)
        self._one_at_a_time = threading.RLock()
        with _one_thread():
            self.program = Program(task, device, seed)
            pair = self.read("this device", examples)
            data = self.program.learn_schema("this device", *pair)
            expect_means(self.program, *pair)
        self.description = replace(self.program.description, data=data)
        self.fingerprint = self.description.fingerprint
        self.notes: dict[str, None] = {}
        self.witness: Witness | None = None
        self._plans: dict[str, Plan] = {}
        self._executors: dict[str, Executor] = {}
        self._memory: dict[tuple[str, int], int] = {}
        self._broadcast: tuple[str, Broadcast] = ("", {})

    # ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, client: Any, examples: Any) -> "tuple[Tensor, Tensor]":
        """A device's examples, prepared and checked. examples: or a function that gives them."""
        return self.program.reader.convert(client, loaded(client, examples))

    def plan(self, sha256: str, body: Callable[[], bytes]) -> Plan:
        """The plan with this hash. body: its JSON, asked for where it was not seen before. PlanError where it is none."""
        with self._one_at_a_time:
            if sha256 not in self._plans:
                try:
                    plan = Plan.from_json(body().decode())
                except UnicodeDecodeError as error:
                    raise PlanError("malformed", f"this is not a plan: {error}") from error
                self._plans = {**dict(list(self._plans.items())[1 - _PLANS :]), sha256: plan}
            return self._plans[sha256]

    def memory(self, plan: Plan, inputs: "Tensor", targets: "Tensor") -> int:
        """Bytes that a local step of a plan takes at least."""
        work = plan.algorithm.client
        what = (repr(work), min(work.batch_size or len(inputs), len(inputs)))
        with self._one_at_a_time:
            if what not in self._memory:
                with _one_thread():
                    self._memory[what] = cost_of(self.program, work, inputs, targets).total
            return self._memory[what]

    def broadcast(self, plan: Plan, sha256: str, body: bytes) -> Broadcast:
        """A broadcast, of bytes with this hash, of the leaves and shapes that the plan sends; ParticipantError for others."""
        with self._one_at_a_time:
            if self._broadcast[0] != sha256:
                start = plan.algorithm.start(self.program.initial_shared, plan.description).broadcast
                self._broadcast = sha256, nested(decode_tree(body, _forms(unnested(start))))
            return self._broadcast[1]

    def model(self, body: bytes) -> Tree:
        """A model to answer with: every shared leaf, finite; ParticipantError for others."""
        tree = decode_tree(body, _forms(self.program.initial_shared))
        if (leaf := first_non_finite(tree)) is not None:
            raise ParticipantError(None, f"the model holds NaN or infinity at `{leaf}`")
        return tree

    # ── what is done ─────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self, plan: Plan, broadcast: Broadcast, errand: DeviceJob) -> JobResult:
        """Train, and report. Raises what a client's training raises, DivergedError where it ran to NaN."""
        algorithm, began = plan.algorithm, time.perf_counter()
        own = ClientAssignment(
            errand.client, errand.inputs, errand.targets, self._fitting(plan, errand.state), errand.key("training")
        )
        with self._one_at_a_time, _one_thread():
            executor = self._executor(plan, broadcast, own)
            run = executor.run if self.witness is None else partial(self.witness.run, executor)
            (trained,) = run(broadcast, errand.version, [own])
        rng = generator_of(errand.key("transform")) if algorithm.update.links else None
        update = algorithm.report(errand.client, trained.parts, trained.examples, trained.metrics, errand.seed, rng)
        _check_finite(update)
        plan.first_hop.check(update)
        return JobResult(
            encode_report(update),
            trained.examples,
            trained.metrics,
            algorithm.client.step_count(len(errand.inputs)),
            time.perf_counter() - began,
            trained.state,
        )

    def look_again(self) -> None:
        """Let the witness train its client again, if there is one."""
        if self.witness is not None:
            with self._one_at_a_time, _one_thread():
                self.witness.look()

    def evaluate(self, plan: Plan, broadcast: Broadcast, errand: DeviceJob) -> JobResult:
        """Measure the plan's metrics on the client's examples, with its personal leaves."""
        began = time.perf_counter()
        with self._one_at_a_time, _one_thread():
            self._load({**broadcast["params"], **broadcast.get(BUFFERS, {})}, errand.state)
            try:
                measured = self.program.evaluate(errand.inputs, errand.targets)
            except TaskError as error:
                raise TaskError(f"client {errand.client!r}: {error}") from error
        wanted = ("loss", *plan.description.metrics)
        if missing := [name for name in wanted if name not in measured]:
            raise PlanError(
                "wrong-type", f"the plan measures {missing[0]!r}, and this device's task does not: update it"
            )
        chosen = {name: measured[name] for name in wanted}
        update = evaluation_report(errand.client, chosen, len(errand.inputs))
        _check_finite(update)
        return JobResult(encode_report(update), len(errand.inputs), chosen, seconds=time.perf_counter() - began)

    def predict(self, model: Tree, state: ClientState, examples: Any, inputs: Any) -> Array:
        """The model's outputs for inputs as this device stores them; they are prepared like its examples. One row for each that
        the preparation gives."""
        _, targets = as_pair("this device", loaded("this device", examples))
        filled = np.repeat(np.asarray(targets)[:1], len(inputs), axis=0)  # preparations take targets too
        with self._one_at_a_time:
            prepared, _ = self.program.reader.convert("the inputs", (inputs, filled))
            self._load(model, state)
            rows = range(0, len(prepared), EVALUATION_BATCH)
            return np.concatenate([self.program.predict(prepared[at : at + EVALUATION_BATCH]).numpy() for at in rows])

    def _load(self, shared: Tree, state: ClientState) -> None:
        program = self.program
        personal = program.tensors_of(state.get(PERSONAL, {}))
        program.load({**program.tensors_of(shared), **program.initial_personal, **personal})

    def _fitting(self, plan: Plan, state: ClientState) -> ClientState:
        """What a client kept, as far as the plan's work knows it: another algorithm's trees mean nothing to it."""
        known = {*plan.algorithm.client.rules.init(self.program.initial_shared), PERSONAL}
        return {name: tree for name, tree in state.items() if name in known}

    def _executor(self, plan: Plan, broadcast: Broadcast, first: ClientAssignment) -> Executor:
        work = plan.algorithm.client
        if repr(work) not in self._executors:
            kept = list(self._executors.items())[1 - _PLANS :]
            choice = self._choice(work, broadcast, first)
            self._executors = {**dict(kept), repr(work): choice.executor(self.program, work)}
        return self._executors[repr(work)]

    def _choice(self, work: ClientWork, broadcast: Broadcast, first: ClientAssignment) -> ExecutorChoice:
        wanted = self._wanted
        if wanted is None:
            short = RunLength.of(self.program, work, first, clients=ROUNDS).seconds < SHORT
            wanted = AUTOGRAD if short else SEQUENTIAL
        if wanted == AUTOGRAD:
            return wanted
        chosen = checked(wanted, self.program, work, [first], broadcast)
        if self._wanted not in (None, chosen.choice):
            self.notes[f"trained by {chosen.choice}, {chosen.reason}"] = None
        return chosen.choice


def loaded(client: Any, examples: Any) -> Any:
    """Examples, or what a function gives that loads them."""
    if not callable(examples) or hasattr(examples, "__getitem__"):
        return examples
    try:
        return examples()
    except SumusError:
        raise
    except Exception as error:
        raise DataError(client, f"loading its examples failed: {type(error).__name__}: {error}") from error


def _forms(tree: Tree) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (leaf.dtype.name, leaf.shape) for name, leaf in tree.items()}


def _check_finite(update: Update) -> None:
    for part, tree in update.parts.items():
        if (leaf := first_non_finite(tree)) is not None:
            raise DivergedError(update.client, part, leaf)
    for name, (total, _) in update.metrics.items():
        if not np.isfinite(total):
            raise DivergedError(update.client, "metrics", name)
