"""What is learned: the same object in the simulator, on Python devices and, as a graph, on phones.

    task = Task(model=Net, loss=losses.cross_entropy, metrics={"accuracy": metrics.accuracy})

A task brings its own torch; this module never imports it. What travels is only the task's description: a manifest of
leaves (names, shapes, dtypes, roles) and the shape of the data. A device whose own task describes itself otherwise refuses.
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
"""What torch's modules call a running variance."""

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
"""Names that no metric can have: the columns of a history."""

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
    positive: names of averaged buffers whose numbers are above 0 in every honest model, such as running variances. A step of the
        model never takes them below `sumus.algorithm.LEAST_POSITIVE`.
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
        any. Patterns are shell-style: `{"*": "frozen", "head.*": "shared"}`. A role that a leaf cannot have is refused.
        Parameters with requires_grad=False are "frozen", or "personal" if asked for, and never "shared"; names of one tensor have
        one role. Integer buffers are frozen, also where a pattern matches them beside other leaves.
    prepare: (inputs, targets) → (inputs, targets), a client's examples as stored to what the model takes: cleaning,
        features, windows. Runs on the device; a pure function, called once per client.
    data: what `prepare` gives; taken from the first client when it is not declared.
    positive: shell-style patterns of averaged buffers whose numbers are above 0 in every honest model: a variance, or a scale, of
        a module of your own. Buffers that are called `running_var`, as in torch's BatchNorm, need no pattern.
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
                    f"metric {name!r} takes chances from 0 to 1, and the loss takes scores before a sigmoid: take "
                    "sumus.metrics.binary_accuracy_with_logits"
                )
        sums_of(self.metrics)  # refuses two of one name

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

    def pattern_of(self, leaf: Leaf) -> str | None:
        """The pattern of `leaves` that decides a leaf's role; None for one that no pattern names."""
        return _pattern_of((leaf.name, *leaf.aliases), self.leaves)

    def describe(self, module: Any) -> Description:
        """The manifest of a module of this task."""
        leaves = _leaves_of(module, self.leaves)
        sums = sums_of(self.metrics)
        metrics = tuple(sorted(sums))
        ranges = tuple(map(range_of, (self.loss, *(sums[name] for name in metrics))))
        positive = _positive(leaves, self.positive)
        return Description(self.name, leaves, _name_of(self.loss), metrics, self.data, ranges, positive)


def _expect_name(name: object) -> None:
    """Refuse a name of a metric that would take the place of another column in a history.

    Args:
        name: The name.

    Raises:
        TaskError: The name is no text, is empty, does not print, holds a slash, or is `RESERVED`.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise TaskError(f"a metric is called {name!r}: give it a name that prints, as text")
    if name in RESERVED:
        raise TaskError(f"a metric cannot be called {name!r}: a history has a column of that name; choose another")
    if is_slot(name):
        raise TaskError(
            f"a metric cannot be called {name!r}: so are the sums called that a figure is made of; choose another"
        )
    if "/" in name:
        raise TaskError(
            f"a metric cannot be called {name!r}: a slash stands between a source and its metric; leave it out"
        )


def _is_on_logits(loss: Any) -> bool:
    """Whether a loss, of sumus or of torch, is known to take scores before a sigmoid."""
    return "WithLogits" in type(loss).__name__ or _name_of(loss).endswith("_with_logits")


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
            role = "frozen"  # a counter, or a mask
        elif name in params and not trainable:
            if asked == "shared":
                raise TaskError(
                    f"leaves={{{pattern!r}: 'shared'}} names `{name}`, which has requires_grad=False and is never trained: leave "
                    "it out, call it 'frozen' or 'personal', or let it be trained"
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
    """The averaged buffers that stay above 0: those that these patterns name, and running variances."""
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
    """The pattern that decides the role of a tensor with these names: for each of them the last one that matches."""
    deciding = {
        name: next((pattern for pattern in reversed(tuple(roles)) if fnmatch.fnmatchcase(name, pattern)), None)
        for name in names
    }
    found = {name: pattern for name, pattern in deciding.items() if pattern is not None}
    if len({roles[pattern] for pattern in found.values()}) > 1:
        asked = ", ".join(f"`{name}` {roles[pattern]!r}" for name, pattern in found.items())
        raise TaskError(
            f"leaves= asks for {asked}, and they are one tensor with several names: give all of them one role"
        )
    return next(reversed(found.values()), None)


def _expect_deciding(roles: Mapping[str, Role], deciding: set[str], leaves: Sequence[Leaf]) -> None:
    """Refuse a pattern that decides nothing: what it asks for would be overruled without a word."""
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
            f"leaves={{{pattern!r}: {role!r}}} decides nothing: a pattern after it matches all of its leaves, and the last one "
            "decides; put it after them"
        )


def _expect_constant(name: str, dtype: str, role: Role) -> None:
    """Refuse a complex leaf that is summed, or that a model's file does not hold."""
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
