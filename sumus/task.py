"""What is learned: the same object in the simulator, on Python devices and, as a graph, on phones.

    task = Task(model=Net, loss=losses.cross_entropy, metrics={"accuracy": metrics.accuracy})

A task brings its own torch; this module never imports it. What travels is only the task's description: a manifest of
leaves (names, shapes, dtypes, roles) and the shape of the data. A device whose own task describes itself otherwise refuses.
"""

import copy
import fnmatch
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

from sumus.errors import TaskError, check_shape
from sumus.metrics import Range, range_of
from sumus.spec import canonical_json, record, to_json

Role = Literal["shared", "personal", "frozen"]
ROLES = ("shared", "personal", "frozen")

_FLOATS = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


@record("leaf")
@dataclass(frozen=True)
class Leaf:
    """One array of a model's state.

    role: "shared" leaves are averaged; "personal" ones are trained and stay on the device; "frozen" ones never change.
    trained: it is a parameter with a gradient; a shared float buffer (running statistics) is averaged, not trained.
    aliases: other names of the same tensor (tied weights): they are one leaf.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    trained: bool
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_shape(self.shape)

    @property
    def sum_dtype(self) -> str:
        """The dtype in which this leaf is kept outside the model: half precision is widened to float32."""
        return _FLOATS.get(self.dtype, self.dtype)


@record("data")
@dataclass(frozen=True)
class Data:
    """The examples as the model sees them, after preparation: shape and dtype of one input and of one target.

    classes: for integer targets, they lie in [0, classes).
    """

    inputs: tuple[int, ...]
    inputs_dtype: str
    targets: tuple[int, ...]
    targets_dtype: str
    classes: int | None = None

    def __post_init__(self) -> None:
        check_shape(self.inputs)
        check_shape(self.targets)


@record("task")
@dataclass(frozen=True)
class Description:
    """What of a task can travel: everything but the code.

    ranges: where the mean of the loss and of each metric can lie on one client, in the order of `("loss", *metrics)`; empty if
        nothing is known.
    """

    name: str
    leaves: tuple[Leaf, ...]
    loss: str
    metrics: tuple[str, ...]
    data: Data | None = None
    ranges: tuple[Range, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over leaves and data: equal on server and device, or they refuse each other."""
        essence = {"leaves": to_json(self.leaves), "data": to_json(self.data)}
        return hashlib.sha256(canonical_json(essence).encode()).hexdigest()

    def named(self, role: Role) -> tuple[Leaf, ...]:
        """The leaves of one role."""
        return tuple(leaf for leaf in self.leaves if leaf.role == role)

    @property
    def trained_layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the shared leaves that have a gradient."""
        return {leaf.name: leaf.shape for leaf in self.named("shared") if leaf.trained}

    @property
    def buffer_layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the shared leaves that have none: running statistics."""
        return {leaf.name: leaf.shape for leaf in self.named("shared") if not leaf.trained}


@dataclass(frozen=True, eq=False)
class Task:
    """What is learned.

    model: a callable without arguments that makes an `nn.Module`, or a module.
    loss: (outputs, targets) → one value an example, shape `(B,)`; its mean over a batch is what a step descends.
    metrics: by name, see `sumus.metrics`.
    leaves: pattern → "shared" | "personal" | "frozen"; the last pattern that matches a name decides, "shared" without
        any. Patterns are shell-style: `{"*": "frozen", "head.*": "shared"}`.
    prepare: (inputs, targets) → (inputs, targets), a client's examples as stored to what the model takes: cleaning,
        features, windows. Runs on the device; a pure function, called once per client.
    data: what `prepare` gives; taken from the first client when it is not declared.
    """

    model: Any
    loss: Callable[[Any, Any], Any]
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict[str, Callable[[Any, Any], Any]])
    leaves: Mapping[str, Role] = field(default_factory=dict[str, Role])
    prepare: Callable[[Any, Any], tuple[Any, Any]] | None = None
    data: Data | None = None
    name: str = "task"

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise TaskError(f"model= takes an nn.Module or a callable that makes one, not {type(self.model).__name__}")
        if not callable(self.loss):
            raise TaskError(f"loss= takes a function of (outputs, targets), not {type(self.loss).__name__}")
        for pattern, role in self.leaves.items():
            if role not in ROLES:
                raise TaskError(f"leaves[{pattern!r}] is {role!r}; it must be one of {', '.join(ROLES)}")
        if "loss" in self.metrics:
            raise TaskError("a metric cannot be called 'loss': that name is the task's loss; choose another")

    def make_model(self) -> Any:
        """A module: a new one where `model` is a callable, else the module itself; without the wrappers of torch.compile and
        DataParallel, so that leaves have the names that the module's own class gives them."""
        if hasattr(self.model, "named_parameters") and not isinstance(self.model, type):
            return _unwrapped(self.model)
        try:
            module = self.model()
        except Exception as error:
            raise TaskError(
                f"model= could not be made: {type(error).__name__}: {error}; give a callable that needs no arguments"
            ) from error
        if not hasattr(module, "named_parameters"):
            raise TaskError(f"model= made a {type(module).__name__}; it must make an nn.Module")
        return _unwrapped(module)

    @cached_property
    def description(self) -> Description:
        """The manifest; makes the model once."""
        return self.describe(self.make_model())

    def describe(self, module: Any) -> Description:
        """The manifest of a module of this task."""
        leaves = _leaves_of(module, self.leaves)
        metrics = tuple(sorted(self.metrics))
        ranges = tuple(map(range_of, (self.loss, *(self.metrics[name] for name in metrics))))
        return Description(self.name, leaves, _name_of(self.loss), metrics, self.data, ranges)


def _unwrapped(module: Any) -> Any:
    """A module without wrappers, also inside; a copy, if there is one inside."""
    while (inner := _wrapped_by(module)) is not None:
        module = inner
    if any(_wrapped_by(child) is not None for child in module.modules()):
        module = copy.deepcopy(module)
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                while (inner := _wrapped_by(child)) is not None:
                    child = inner
                    setattr(parent, name, child)
    return module


def _wrapped_by(module: Any) -> Any:
    """The module that torch.compile or DataParallel has wrapped in this one; None where it is no such wrapper."""
    kind = type(module).__name__
    attribute = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}.get(
        kind
    )
    return None if attribute is None else getattr(module, attribute, None)


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _leaves_of(module: Any, roles: Mapping[str, Role]) -> tuple[Leaf, ...]:
    state = cast(Mapping[str, Any], module.state_dict(keep_vars=True))
    trainable = {name: param for name, param in module.named_parameters(remove_duplicate=False) if param.requires_grad}
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    unused = set(roles)
    leaves: list[Leaf] = []
    for name, *aliases in groups.values():
        tensor = state[name]
        _expect_plain(name, tensor)
        dtype = str(tensor.dtype).rpartition(".")[2]
        matching = [pattern for pattern in roles for own in (name, *aliases) if fnmatch.fnmatchcase(own, pattern)]
        unused -= set(matching)
        role: Role = roles[matching[-1]] if matching else "shared"
        trained = name in trainable and role != "frozen"
        if "complex" in dtype and role == "frozen" and dtype != "complex64":
            raise TaskError(
                f"leaf `{name}` is {dtype}; a frozen leaf may be complex64, which a model's file holds: convert it"
            )
        if "complex" in dtype and role != "frozen":
            raise TaskError(
                f"leaf `{name}` is {dtype}, and complex leaves cannot be summed: if it is a constant, pass "
                f'leaves={{"{name}": "frozen"}}; else keep its real and imaginary parts (torch.view_as_real)'
            )
        if dtype not in _FLOATS or (name not in trainable and name in dict(module.named_parameters())):
            role, trained = "frozen", False  # integer buffers, and parameters with requires_grad=False
        leaves.append(Leaf(name, tuple(int(n) for n in tensor.shape), dtype, role, trained, tuple(aliases)))
    if unused:
        raise TaskError(
            f"leaves= names {sorted(unused)}, which match no leaf; the model has {', '.join(leaf.name for leaf in leaves)}"
        )
    if not any(leaf.role == "shared" and leaf.trained for leaf in leaves):
        raise TaskError("no leaf is both shared and trained: the server would have nothing to learn; see leaves=")
    return tuple(leaves)


def _expect_plain(name: str, tensor: Any) -> None:
    """Refuse what stands in a module's state and is no array of known shape with values."""
    if name.rpartition(".")[2] == "_extra_state":
        raise TaskError(
            f"`{name}` is what get_extra_state() gives, and only parameters and buffers are sent and kept: put it into a "
            "buffer, or take get_extra_state() off the model"
        )
    if type(tensor).__name__.startswith("Uninitialized"):
        raise TaskError(f"`{name}` has no shape yet: initialise lazy layers first, by one forward pass inside model=")
    if not hasattr(tensor, "requires_grad"):
        raise TaskError(f"`{name}` is a {type(tensor).__name__}: leaves must be tensors; keep it as an attribute")
    if str(tensor.device) == "meta":
        raise TaskError(f"leaf `{name}` is on the meta device and has no values: make the model on the CPU")
    if str(tensor.layout) != "torch.strided":
        kind = str(tensor.layout).rpartition(".")[2]
        raise TaskError(
            f"leaf `{name}` is {kind}: leaves are dense; register tensor.to_dense(), or register_buffer(..., persistent=False), "
            "which keeps it out of the state"
        )
    if tensor.is_quantized or "float8" in str(tensor.dtype):
        raise TaskError(
            f"leaf `{name}` is {str(tensor.dtype).rpartition('.')[2]}: train the model before it is quantized"
        )


def description_of(value: Task | Description) -> Description:
    """A task's description, or the description itself."""
    return value if isinstance(value, Description) else value.description
