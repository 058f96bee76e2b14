"""The task: the model and how it learns. The same object is used in the simulator and on devices.

    task = Task(model=Net, loss=losses.cross_entropy, metrics={"accuracy": metrics.accuracy})

A task's model and loss use torch; this module does not import torch. Only the task's description is sent to other
machines: a list of leaves (names, shapes, dtypes, roles) and the shape of the data. A device refuses a plan whose
description differs from that of the device's own task.
"""

import copy
import fnmatch
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

from sumus.errors import TaskError, check_shape, expect
from sumus.figures import is_slot
from sumus.metrics import Range, binary_accuracy, range_of, sums_of
from sumus.spec import canonical_json, record, to_json

Role = Literal["shared", "personal", "frozen"]
ROLES = ("shared", "personal", "frozen")

_VARIANCE = "running_var"
"""The name of a running variance in torch's modules."""

RESERVED = frozenset(
    {
        *(
            "round",
            "rounds",
            "client",
            "clients",
            "examples",
            "loss",
            "metrics",
            "bytes_up",
            "bytes_down",
            "bytes_above",
        ),
        *("seconds", "dropped", "epsilon", "at", "staleness", "reasons", "evaluations", "spreads", "failed", "index"),
    }
)
"""Names that no metric may have, since a history has columns with these names."""

_FLOATS = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


@record("leaf")
@dataclass(frozen=True)
class Leaf:
    """One array of a model's state.

    Attributes:
        name: The name in the model's `state_dict`.
        shape: The shape.
        dtype: The dtype inside the model, such as "float32".
        role: "shared" leaves are averaged; "personal" leaves are trained and stay on the device; "frozen" leaves never
            change.
        trained: Whether the leaf is a parameter with a gradient. A shared float buffer (running statistics) is
            averaged, but not trained.
        aliases: Other names of the same tensor (tied weights). All names together are one leaf.
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
        """The dtype of this leaf outside the model: half precision is widened to float32."""
        return _FLOATS.get(self.dtype, self.dtype)


@record("data")
@dataclass(frozen=True)
class Data:
    """The shape and dtype of one input and one target as the model receives them, that is, after preparation.

    Attributes:
        inputs: The shape of one input.
        inputs_dtype: The dtype of inputs.
        targets: The shape of one target; `()` for a number.
        targets_dtype: The dtype of targets.
        classes: For integer targets, the number of classes: targets lie in [0, classes).
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
    """The part of a task that can be sent to other machines: everything except the code.

    Attributes:
        name: The task's name.
        leaves: The model's leaves.
        loss: The name of the loss function.
        metrics: The names of the sums that the metrics add up, sorted.
        data: The form of the examples; None if it is not declared.
        ranges: The ranges of the mean of the loss and of each metric on one client, in the order of `("loss",
            *metrics)`; empty if nothing is known.
        positive: The names of averaged buffers whose numbers are above 0 in every honest model, such as running
            variances. A step of the model never takes them below `sumus.algorithm.LEAST_POSITIVE`.
    """

    name: str
    leaves: tuple[Leaf, ...]
    loss: str
    metrics: tuple[str, ...]
    data: Data | None = None
    ranges: tuple[Range, ...] = ()
    positive: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over leaves and data. A server and a device with different fingerprints refuse each other."""
        essence = {"leaves": to_json(self.leaves), "data": to_json(self.data)}
        return hashlib.sha256(canonical_json(essence).encode()).hexdigest()

    def named(self, role: Role) -> tuple[Leaf, ...]:
        """Return the leaves with this role."""
        return tuple(leaf for leaf in self.leaves if leaf.role == role)

    @property
    def trained_layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the shared leaves that have a gradient."""
        return {leaf.name: leaf.shape for leaf in self.named("shared") if leaf.trained}

    @property
    def buffer_layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the shared leaves without a gradient: running statistics."""
        return {leaf.name: leaf.shape for leaf in self.named("shared") if not leaf.trained}


@dataclass(frozen=True, eq=False)
class Task:
    """A learning task: a model, a loss, metrics, and the form of the data.

    Attributes:
        model: An `nn.Module`, or a callable without arguments that makes one.
        loss: (outputs, targets) → one value per example, shape `(B,)`. A training step lowers the mean over a batch.
        metrics: Metrics by name; see `sumus.metrics`.
        leaves: Shell-style pattern → "shared", "personal" or "frozen", such as `{"*": "frozen", "head.*": "shared"}`.
            The last pattern that matches a leaf's name decides; a leaf that no pattern matches is "shared". A role that
            a leaf cannot have is refused: a parameter with requires_grad=False is "frozen", or "personal" on request,
            but never "shared". All names of one tensor have one role. Integer buffers are always frozen, also if a
            pattern matches them together with other leaves.
        prepare: (inputs, targets) → (inputs, targets): turns a client's examples from their stored form into the
            model's inputs, by cleaning, computing features or cutting windows. It runs on the device, once per client,
            and must be a pure function.
        data: The form of the examples that `prepare` returns; taken from the first client if it is not declared.
        name: The task's name.
        positive: Shell-style patterns of averaged buffers whose numbers are above 0 in every honest model, such as a
            variance or a scale of your own module. Buffers called `running_var`, as in torch's BatchNorm, do not need a
            pattern.
    """

    model: Any
    loss: Callable[[Any, Any], Any]
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict[str, Callable[[Any, Any], Any]])
    leaves: Mapping[str, Role] = field(default_factory=dict[str, Role])
    prepare: Callable[[Any, Any], tuple[Any, Any]] | None = None
    data: Data | None = None
    name: str = "task"
    positive: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expect(self.positive, tuple, "positive=")
        if not callable(self.model):
            raise TaskError(f"model= takes an nn.Module or a callable that makes one, not {type(self.model).__name__}")
        if not callable(self.loss):
            raise TaskError(f"loss= takes a function of (outputs, targets), not {type(self.loss).__name__}")
        for pattern, role in self.leaves.items():
            if role not in ROLES:
                raise TaskError(f"leaves[{pattern!r}] is {role!r}; it must be one of {', '.join(ROLES)}")
        for name, metric in self.metrics.items():
            _expect_name(name)
            if not callable(metric):
                raise TaskError(f"metric {name!r} takes a function of (outputs, targets), not {type(metric).__name__}")
            if metric is binary_accuracy and _is_on_logits(self.loss):
                raise TaskError(
                    f"metric {name!r} takes probabilities from 0 to 1, but the loss takes scores before a sigmoid: use "
                    "sumus.metrics.binary_accuracy_with_logits"
                )
        sums_of(self.metrics)  # refuses two sums with one name

    def make_model(self) -> Any:
        """Return the model: a new module if `model` is a callable, else `model` itself.

        Wrappers of torch.compile and DataParallel are removed, so that leaves have the names that the module's own
        class gives them.
        """
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
        """The task's description. Computing it makes the model once."""
        return self.describe(self.make_model())

    def pattern_of(self, leaf: Leaf) -> str | None:
        """Return the pattern of `leaves` that decides a leaf's role; None if no pattern matches the leaf."""
        return _pattern_of((leaf.name, *leaf.aliases), self.leaves)

    def describe(self, module: Any) -> Description:
        """Return the description of this task with this module as its model."""
        leaves = _leaves_of(module, self.leaves)
        sums = sums_of(self.metrics)
        metrics = tuple(sorted(sums))
        ranges = tuple(map(range_of, (self.loss, *(sums[name] for name in metrics))))
        positive = _positive(leaves, self.positive)
        return Description(self.name, leaves, _name_of(self.loss), metrics, self.data, ranges, positive)


def _expect_name(name: object) -> None:
    """Refuse a metric's name that cannot be the name of a column in a history.

    Args:
        name: The name.

    Raises:
        TaskError: The name is not a text, is empty, is not printable, holds a slash, or is in `RESERVED`.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise TaskError(f"a metric is called {name!r}: give it a printable name, as text")
    if name in RESERVED:
        raise TaskError(f"a metric cannot be called {name!r}: a history has a column of that name; choose another")
    if is_slot(name):
        raise TaskError(
            f"a metric cannot be called {name!r}: the sums behind a figure have names of this form; choose another"
        )
    if "/" in name:
        raise TaskError(f"a metric cannot be called {name!r}: a slash separates a source from its metric; leave it out")


def _is_on_logits(loss: Any) -> bool:
    """Return whether a loss of sumus or torch is known to take scores before a sigmoid."""
    return "WithLogits" in type(loss).__name__ or _name_of(loss).endswith("_with_logits")


def _unwrapped(module: Any) -> Any:
    """Remove wrappers from a module, inside it too. If a wrapper was inside, the result is a copy."""
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
    """Return the module that torch.compile or DataParallel has wrapped; None if `module` is not such a wrapper."""
    kind = type(module).__name__
    attribute = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}.get(
        kind
    )
    return None if attribute is None else getattr(module, attribute, None)


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _leaves_of(module: Any, roles: Mapping[str, Role]) -> tuple[Leaf, ...]:
    state = cast(Mapping[str, Any], module.state_dict(keep_vars=True))
    params = dict(module.named_parameters(remove_duplicate=False))
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    deciding = set[str]()
    leaves: list[Leaf] = []
    for name, *aliases in groups.values():
        tensor = state[name]
        _expect_plain(name, tensor)
        dtype = str(tensor.dtype).rpartition(".")[2]
        pattern = _pattern_of((name, *aliases), roles)
        asked = None if pattern is None else roles[pattern]
        trainable = name in params and bool(tensor.requires_grad)
        role: Role = asked or "shared"
        if "complex" in dtype:
            _expect_constant(name, dtype, role)
        if dtype not in _FLOATS:
            role = "frozen"  # an integer or boolean leaf, such as a counter or a mask
        elif name in params and not trainable:
            if asked == "shared":
                raise TaskError(
                    f"leaves={{{pattern!r}: 'shared'}} names `{name}`, which has requires_grad=False and is never trained: leave "
                    "it out, give it the role 'frozen' or 'personal', or set its requires_grad=True"
                )
            role = asked or "frozen"
        if pattern is not None and role == asked:
            deciding.add(pattern)
        trained = trainable and role != "frozen"
        leaves.append(Leaf(name, tuple(int(n) for n in tensor.shape), dtype, role, trained, tuple(aliases)))
    _expect_deciding(roles, deciding, leaves)
    if not any(leaf.role == "shared" and leaf.trained for leaf in leaves):
        raise TaskError("no leaf is both shared and trained: the server would have nothing to learn; see leaves=")
    return tuple(leaves)


def _positive(leaves: tuple[Leaf, ...], patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the averaged buffers that must stay above 0: those that match these patterns, and running variances."""
    buffers = [leaf for leaf in leaves if leaf.role == "shared" and not leaf.trained]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(own, pattern) for leaf in buffers for own in (leaf.name, *leaf.aliases)):
            raise TaskError(
                f"positive= names {pattern!r}, which matches no averaged buffer; the model has "
                f"{', '.join(leaf.name for leaf in buffers) or 'none'}"
            )
    wanted = (*patterns, _VARIANCE, f"*.{_VARIANCE}")
    return tuple(
        leaf.name
        for leaf in buffers
        if any(fnmatch.fnmatchcase(own, pattern) for own in (leaf.name, *leaf.aliases) for pattern in wanted)
    )


def _pattern_of(names: tuple[str, ...], roles: Mapping[str, Role]) -> str | None:
    """Return the pattern that decides the role of a tensor with these names: the last pattern that matches a name.

    Raises:
        TaskError: The tensor has several names, and their patterns ask for different roles.
    """
    deciding = {
        name: next((pattern for pattern in reversed(tuple(roles)) if fnmatch.fnmatchcase(name, pattern)), None)
        for name in names
    }
    found = {name: pattern for name, pattern in deciding.items() if pattern is not None}
    if len({roles[pattern] for pattern in found.values()}) > 1:
        asked = ", ".join(f"`{name}` {roles[pattern]!r}" for name, pattern in found.items())
        raise TaskError(f"leaves= asks for {asked}, but these are names of one tensor: give all of them one role")
    return next(reversed(found.values()), None)


def _expect_deciding(roles: Mapping[str, Role], deciding: set[str], leaves: Sequence[Leaf]) -> None:
    """Raise TaskError for a pattern that decides no leaf's role: the user's wish would be ignored silently."""
    for pattern, role in roles.items():
        if pattern in deciding:
            continue
        named = [
            leaf for leaf in leaves if any(fnmatch.fnmatchcase(name, pattern) for name in (leaf.name, *leaf.aliases))
        ]
        if not named:
            raise TaskError(
                f"leaves= names {pattern!r}, which matches no leaf; the model has {', '.join(leaf.name for leaf in leaves)}"
            )
        if all(leaf.dtype not in _FLOATS for leaf in named):
            raise TaskError(
                f"leaves={{{pattern!r}: {role!r}}} names `{named[0].name}`, which is {named[0].dtype} and can be neither "
                "averaged nor trained: leave it out; such leaves are frozen"
            )
        raise TaskError(
            f"leaves={{{pattern!r}: {role!r}}} has no effect: later patterns match all of its leaves, and the last matching one "
            "decides; put it after them"
        )


def _expect_constant(name: str, dtype: str, role: Role) -> None:
    """Raise TaskError for a complex leaf that would be summed, or whose dtype a model's file cannot hold."""
    if role != "frozen":
        raise TaskError(
            f"leaf `{name}` is {dtype}, and complex leaves cannot be summed: if it is a constant, pass "
            f'leaves={{"{name}": "frozen"}}; else keep its real and imaginary parts (torch.view_as_real)'
        )
    if dtype != "complex64":
        raise TaskError(
            f"leaf `{name}` is {dtype}; a frozen leaf may be complex64, which a model's file holds: convert it"
        )


def _expect_plain(name: str, tensor: Any) -> None:
    """Raise TaskError for an entry of a module's state that is not a dense tensor with a known shape and values."""
    if name.rpartition(".")[2] == "_extra_state":
        raise TaskError(
            f"`{name}` is what get_extra_state() returns, but only parameters and buffers are sent and kept: put it into a "
            "buffer, or remove get_extra_state() from the model"
        )
    if type(tensor).__name__.startswith("Uninitialized"):
        raise TaskError(f"`{name}` has no shape yet: initialize lazy layers first, by one forward pass inside model=")
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
    """Return the description of a task, or a description unchanged."""
    return value if isinstance(value, Description) else value.description
