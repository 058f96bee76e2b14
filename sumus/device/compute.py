"""The contract for a device's computations: it is implemented with PyTorch, and could be with onnxruntime or plain numpy.

    class OnnxCompute:                              the methods of `DeviceCompute`, with numpy arrays
        ...

    device = Device(link, OnnxCompute("model.onnx"), examples)

All values that cross this boundary are plans, bytes, and trees of numpy arrays keyed by leaf name. An implementation keeps a
client's examples in a form of its own; the device only counts them and passes them back. Nothing here imports torch; only the
implementation in `sumus.device.training` does. The functions below do the steps that all implementations share: they read
plans, models and broadcasts, and make reports.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from sumus.aggregate import Update
from sumus.device.keys import Keys
from sumus.errors import DataError, DivergedError, ParticipantError, PlanError, SumusError
from sumus.evaluation import evaluation_report
from sumus.executors.executor import Trained
from sumus.plan import Plan
from sumus.rng import generator_of
from sumus.tree import first_non_finite, nested, unnested
from sumus.types import Array, Broadcast, Tree
from sumus.wire.reports import encode_report
from sumus.wire.tensors import decode_tree
from sumus.work import PERSONAL, ClientState

MOST_PLANS = 8
"""The number of plans that an implementation remembers; the newest ones are kept."""


class PreparedExamples(Protocol):
    """A client's examples, in a form chosen by the implementation."""

    @property
    def count(self) -> int:
        """The number of examples."""
        ...


E = TypeVar("E", bound=PreparedExamples)


@dataclass(frozen=True)
class DeviceJob(Generic[E]):
    """One client's work on one model.

    Attributes:
        client: The client's id.
        examples: The client's examples, as `DeviceCompute.read` returned them.
        version: The version of the model.
        seed: The seed of the sum to which the report is added, 32 bytes.
        keys: The source of the client's randomness.
        again: How often the client has already had work on this version.
        state: The state that the client kept from earlier rounds.
    """

    client: Any
    examples: E
    version: int
    seed: bytes
    keys: Keys
    again: int = 0
    state: ClientState = field(default_factory=dict[str, Any])

    def key(self, purpose: str) -> bytes:
        """Return 32 bytes for one purpose in this work, such as "training"."""
        again = [self.again] if self.again else []
        return self.keys("round", self.version, "client", self.client, purpose, *again)


@dataclass(frozen=True)
class JobResult:
    """The result of a job.

    Attributes:
        report: The report to the server, encoded.
        examples: The number of examples used.
        measured: For each metric, the sum over the examples and their count.
        steps: The number of local steps taken.
        state: The state that the client keeps if the report is counted.
    """

    report: bytes
    examples: int
    measured: Mapping[str, tuple[float, int]]
    steps: int = 0
    state: ClientState = field(default_factory=dict[str, Any])


class DeviceCompute(Protocol[E]):
    """A task, bound to the library that computes it. Several devices of a process may share one, each from its own thread."""

    @property
    def fingerprint(self) -> str:
        """The hash of the task's leaves and data, `Description.fingerprint`. A plan with a different hash is refused."""
        ...

    def read(self, client: Any, examples: Any) -> E:
        """Prepare and check a client's examples.

        Args:
            client: The client's id, for messages.
            examples: The owner's examples, or a function that returns them (see `loaded`).

        Raises:
            DataError: The examples do not fit the task.
        """
        ...

    def plan(self, sha256: str, body: Callable[[], bytes]) -> Plan:
        """Return the plan with a hash; `PlanCache` does this.

        Args:
            sha256: The plan's hash.
            body: Fetches the plan's JSON; called only if the plan is not known yet.

        Raises:
            PlanError: The JSON is not a plan.
        """
        ...

    def memory(self, plan: Plan, examples: E) -> int:
        """Return the minimum number of bytes that one local step of a plan can take; 0 if that is not known."""
        ...

    def broadcast(self, plan: Plan, sha256: str, body: bytes) -> Broadcast:
        """Decode and check a round's broadcast; `read_broadcast` does this.

        Raises:
            ParticipantError: The leaves or shapes are not those of the plan's broadcasts.
        """
        ...

    def model(self, body: bytes) -> Tree:
        """Decode and check a released model; `read_model` does this.

        Raises:
            ParticipantError: The leaves are not the task's shared leaves, or a value is not finite.
        """
        ...

    def train(self, plan: Plan, broadcast: Broadcast, job: DeviceJob[E]) -> JobResult:
        """Take the plan's local steps from the broadcast, and make the report; `training_result` makes it.

        Raises:
            DivergedError: The training diverged to NaN or infinity.
        """
        ...

    def evaluate(self, plan: Plan, broadcast: Broadcast, job: DeviceJob[E]) -> JobResult:
        """Measure the plan's metrics on the client's examples; `evaluation_result` makes the report."""
        ...

    def predict(self, model: Tree, state: ClientState, examples: Any, inputs: Any) -> Array:
        """Return the model's outputs, one row for each input.

        Args:
            model: The tree that `model` returned.
            state: The client's state, such as personal leaves.
            examples: The owner's examples, as `read` accepts them; they show how inputs are prepared.
            inputs: Inputs in the form in which the owner stores them.
        """
        ...


# ── steps that all implementations share ─────────────────────────────────────────────────────────────────────────────


class PlanCache:
    """The plans that were requested most recently, by their hash."""

    def __init__(self) -> None:
        self._plans: dict[str, Plan] = {}

    def get(self, sha256: str, body: Callable[[], bytes]) -> Plan:
        """See `DeviceCompute.plan`."""
        if sha256 not in self._plans:
            try:
                plan = Plan.from_json(body().decode())
            except UnicodeDecodeError as error:
                raise PlanError("malformed", f"this is not a plan: {error}") from error
            self._plans = {**dict(list(self._plans.items())[1 - MOST_PLANS :]), sha256: plan}
        return self._plans[sha256]


def loaded(client: Any, examples: Any) -> Any:
    """Return the owner's examples; if they are a function, return the examples that it loads.

    Raises:
        DataError: The owner's function failed.
    """
    if not callable(examples) or hasattr(examples, "__getitem__"):
        return examples
    try:
        return examples()
    except SumusError:
        raise
    except Exception as error:
        raise DataError(client, f"loading its examples failed: {type(error).__name__}: {error}") from error


def read_broadcast(plan: Plan, initial: Tree, body: bytes) -> Broadcast:
    """Decode a broadcast, and check its leaves and shapes against the plan.

    Args:
        plan: The plan.
        initial: The task's shared leaves; their values do not matter.
        body: The encoded broadcast.
    """
    start = plan.algorithm.start(initial, plan.description).broadcast
    return nested(decode_tree(body, _forms(unnested(start))))


def read_model(initial: Tree, body: bytes) -> Tree:
    """Decode a released model. It must have exactly the leaves of `initial`, and all values must be finite."""
    tree = decode_tree(body, _forms(initial))
    if (leaf := first_non_finite(tree)) is not None:
        raise ParticipantError(None, f"the model contains NaN or infinity at `{leaf}`")
    return tree


def state_for(plan: Plan, initial: Tree, state: ClientState) -> ClientState:
    """Return the part of a client's state that a plan's work uses; trees of other algorithms are left out."""
    known = {*plan.algorithm.client.rules.init(initial), PERSONAL}
    return {name: tree for name, tree in state.items() if name in known}


def training_result(plan: Plan, job: DeviceJob[Any], trained: Trained) -> JobResult:
    """Make the report of a training: transform it by the plan, check it as the server will, and encode it.

    Args:
        plan: The plan.
        job: The job.
        trained: The result of the training, as numpy arrays.

    Raises:
        DivergedError: A number is NaN or infinite.
        BeyondBoundError: A number exceeds the range of the plan's sums.
    """
    algorithm = plan.algorithm
    rng = generator_of(job.key("transform")) if algorithm.update.links else None
    update = algorithm.report(job.client, trained.parts, trained.examples, trained.metrics, job.seed, rng)
    _expect_finite(update)
    plan.first_hop.check(update)
    steps = algorithm.client.step_count(job.examples.count)
    return JobResult(encode_report(update), trained.examples, trained.metrics, steps, trained.state)


def evaluation_result(plan: Plan, job: DeviceJob[Any], measured: Mapping[str, tuple[float, int]]) -> JobResult:
    """Make the report of an evaluation: the loss and the plan's metrics, without any other measurements.

    Args:
        plan: The plan.
        job: The job.
        measured: (sum, count) for each metric and for "loss".

    Raises:
        PlanError: The plan asks for a metric that was not measured.
        DivergedError: A number is NaN or infinite.
    """
    wanted = ("loss", *plan.description.metrics)
    if missing := [name for name in wanted if name not in measured]:
        raise PlanError(
            "wrong-type", f"the plan measures {missing[0]!r}, but this device's task does not: update the task's file"
        )
    chosen = {name: measured[name] for name in wanted}
    update = evaluation_report(job.client, chosen, job.examples.count)
    _expect_finite(update)
    return JobResult(encode_report(update), job.examples.count, chosen)


def _forms(tree: Tree) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (leaf.dtype.name, leaf.shape) for name, leaf in tree.items()}


def _expect_finite(update: Update) -> None:
    for part, tree in update.parts.items():
        if (leaf := first_non_finite(tree)) is not None:
            raise DivergedError(update.client, part, leaf)
    for name, (total, _) in update.metrics.items():
        if not math.isfinite(total):
            raise DivergedError(update.client, "metrics", name)
