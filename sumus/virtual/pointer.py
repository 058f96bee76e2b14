"""A tensor at a worker, as torch sees it in this process: a shape and a dtype, but no numbers.

    x = alice.send(torch.tensor([[1.0, 2.0]]))
    y = torch.nn.functional.linear(x, w)            computed at alice, since w is there too; a pointer to the result
    y.get()                                         the numbers

torch lets every subclass of Tensor define what a function does (`__torch_function__`), so no part of torch is replaced. Each
operation is one request; only shape and dtype are known in this process. When a pointer is freed, its tensor at the worker is
deleted with the next request.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from sumus.errors import UsageError
from sumus.virtual.messages import (
    Ask,
    Backward,
    Call,
    Dtype,
    EllipsisIndex,
    EmptyAnswer,
    Gradient,
    Items,
    Ref,
    SetGradient,
    SetRequiresGrad,
    Slice,
    TensorMade,
    TensorsMade,
    Value,
    number,
)
from sumus.virtual.operations import DTYPE_NAMES, DTYPES, OPERATIONS, SPELLINGS, Operation, tensors_in

A = TypeVar("A")

_KNOWN_HERE = frozenset({
    "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "is_sparse", "is_sparse_csr", "is_quantized", "is_meta",
    "is_cuda", "is_cpu", "is_mkldnn", "is_nested", "size", "dim", "numel", "nelement", "ndimension", "element_size", "__len__",
    "is_floating_point", "is_complex", "is_signed", "get_device", "is_same_size",
})  # fmt: skip
_SEVERAL_SIZES = frozenset({"view", "reshape", "expand", "repeat", "permute"})
"""Functions that take a shape, either as one argument or as separate numbers."""
_NO_MATTER = frozenset({"_stacklevel", "memory_format", "norm_type", "non_blocking"})
"""Arguments that have no effect on numbers, except together with another argument that a worker does not accept."""


class PointerError(UsageError):
    """Tensors are in different places, or an operation needs numbers, which a pointer does not have."""


class ValuesAndIndices(NamedTuple):
    """The result of `max(dim)` and `min(dim)`."""

    values: "Pointer"
    indices: "Pointer"


class PointerWorker(Protocol):
    """The part of a worker that the pointers to its tensors use.

    Attributes:
        name: The worker's name.
        gradients_changed: A number that grows with each request that may change a gradient at the worker.
    """

    name: str
    gradients_changed: int

    def ask(self, ask: Ask, wanted: type[A] | tuple[type[A], ...]) -> A:
        """Send a request, and return its answer, which must be an instance of a wanted class."""
        ...

    def fetch(self, pointer: "Pointer") -> Tensor:
        """Fetch the numbers of a tensor. The worker keeps its tensor."""
        ...

    def pointer(self, made: TensorMade) -> "Pointer":
        """Return the pointer to a tensor at the worker. If a pointer already exists, the same pointer is returned."""
        ...

    def call_by(self, pointer: "Pointer | None", number: int | None = None) -> None:
        """Let `pointer()` return this pointer for its tensor. With None and the tensor's number, the next call of `pointer()`
        makes a new pointer."""
        ...

    def let_go(self, number: int) -> None:
        """Delete a tensor at the worker with the next request."""
        ...


class _TensorHandle:
    """Keeps a tensor at a worker as long as its pointer exists. When this object is freed, the tensor may be deleted."""

    def __init__(self, worker: PointerWorker, number: int) -> None:
        self.worker, self.number = worker, number

    def __del__(self) -> None:
        try:
            self.worker.let_go(self.number)
        except Exception:  # the interpreter is shutting down
            return


class Pointer(Tensor):
    """A tensor at a worker. Two tables below the class give it further methods: `_NEED_NUMBERS` and `_CONVERSIONS`.

    Attributes:
        worker: The worker.
        id: The tensor's number at the worker.
    """

    worker: PointerWorker
    id: int
    _handle: _TensorHandle
    _learns: bool
    _leaf: bool
    _gradient: "tuple[int, Pointer | None]"

    @staticmethod
    def __new__(cls: "type[Pointer]", worker: PointerWorker, made: TensorMade) -> "Pointer":
        make = cast(Callable[..., Pointer], Tensor._make_wrapper_subclass)
        pointer = make(cls, made.shape, dtype=DTYPES[made.dtype], device="cpu")
        pointer.worker, pointer.id, pointer._handle = worker, made.id, _TensorHandle(worker, made.id)
        pointer._gradient = (-1, None)
        pointer.now(made)
        return pointer

    def __init__(self, worker: PointerWorker, made: TensorMade) -> None:
        super().__init__()

    def now(self, made: TensorMade) -> None:
        """Record the tensor's present autograd state at the worker."""
        self._learns, self._leaf = made.learns, made.leaf

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name_of(func)
        if name in _KNOWN_HERE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        operation = SPELLINGS.get(func)
        if operation is None:
            raise PointerError(
                f"`{name}` does not work on tensors at a worker: fetch the tensor with .get(), or use one of the operations in "
                "sumus.virtual.EVERYTHING"
            )
        return call(operation, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise PointerError(f"`{func}` needs numbers, which a pointer does not have: fetch the tensor with .get()")

    # ── fetching ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def get(self) -> Tensor:
        """Fetch the numbers as a tensor. The worker keeps its tensor.

        Raises:
            WorkerRefused: The worker's policy does not allow this.
        """
        return self.worker.fetch(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        learns = ", requires_grad=True" if self._learns else ""
        return f"Pointer({DTYPE_NAMES[self.dtype]}{list(self.shape)} at {self.worker.name!r}{learns})"

    def __format__(self, format_spec: str) -> str:
        return repr(self) if not format_spec else _no_numbers(self, "format")

    def __reduce_ex__(self, proto: Any) -> NoReturn:
        raise PointerError(
            f"a pointer cannot be used from a file or another process: fetch the tensor from {self.worker.name!r} first"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pointer":
        with torch.no_grad():
            copied = cast(Pointer, self.detach().clone()).requires_grad_(self._learns)
        if hasattr(self, "_is_param"):
            copied._is_param = True  # pyright: ignore[reportAttributeAccessIssue]
        memo[id(self)] = copied
        return copied

    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[Any]:
        return iter([self[row] for row in range(len(self))])

    # ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────

    def backward(
        self, gradient: Any = None, retain_graph: bool | None = None, create_graph: bool = False, inputs: Any = None
    ) -> None:
        """Compute the gradients of all leaves at the worker from which this tensor was computed."""
        if create_graph or inputs is not None:
            raise PointerError("backward() at a worker takes only gradient and retain_graph")
        if gradient is not None:
            _same_place(self.worker, gradient)
        self.worker.ask(Backward(self.id, None if gradient is None else gradient.id, bool(retain_graph)), EmptyAnswer)
        self.worker.gradients_changed += 1

    @property
    def grad(self) -> Any:
        """A pointer to the gradient, or None. The same pointer is returned until the gradient may have changed."""
        if not self._learns or not self._leaf:
            return None
        if self._gradient[0] != self.worker.gradients_changed:
            said = self.worker.ask(Gradient(self.id), (TensorMade, EmptyAnswer))
            found = self.worker.pointer(said) if isinstance(said, TensorMade) else None
            self._gradient = (self.worker.gradients_changed, found)
        return self._gradient[1]

    @grad.setter
    def grad(self, gradient: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if gradient is not None:
            _same_place(self.worker, gradient)
        elif self._gradient[0] == self.worker.gradients_changed and self._gradient[1] is None:
            return
        self.worker.ask(SetGradient(self.id, None if gradient is None else gradient.id), EmptyAnswer)
        self._gradient = (self.worker.gradients_changed, gradient)

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._learns

    @requires_grad.setter
    def requires_grad(self, learns: bool) -> None:
        self.requires_grad_(learns)

    def requires_grad_(self, mode: bool = True) -> "Pointer":
        """Set whether the tensor requires a gradient."""
        if mode != self._learns:
            self.now(self.worker.ask(SetRequiresGrad(self.id, mode), TensorMade))
        return self

    @property
    def is_leaf(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._leaf

    @property
    def retains_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @property
    def grad_fn(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Always None, since the graph is at the worker."""
        return None

    @property
    def data(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The same as `detach()`."""
        return self.detach()

    @data.setter
    def data(self, other: Any) -> NoReturn:
        raise PointerError(
            "the data of a pointer cannot be replaced: change them in place, with copy_() under no_grad()"
        )

    # ── other spellings ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def T(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.permute(*reversed(range(self.dim())))

    @property
    def mT(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.transpose(-2, -1)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Convert to another dtype. The device is always the worker's."""
        given = [*args, *kwargs.values()]
        if any(isinstance(each, str | torch.device) and torch.device(each).type != "cpu" for each in given):
            raise PointerError("a worker computes on its CPU: leave the device out")
        dtypes = [each for each in given if isinstance(each, torch.dtype)]
        return call(OPERATIONS["to"], (self, dtypes[0]), {}) if dtypes else self


_NEED_NUMBERS = {
    "item": "item",
    "tolist": "tolist",
    "numpy": "numpy",
    "__array__": "numpy",
    "__float__": "float",
    "__int__": "int",
    "__index__": "index",
    "__complex__": "complex",
    "__bool__": "bool",
    "__contains__": "in",
}
"""Methods of a tensor that return numbers, which a pointer does not have, with their names in messages."""
_CONVERSIONS = {
    "cpu": None,
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "int": torch.int32,
    "long": torch.int64,
    "bool": torch.bool,
}
"""Methods that are short forms of `to`, with their dtypes; None keeps the tensor's dtype."""


def _refusing(what: str) -> Callable[..., NoReturn]:
    """Return a method that refuses to return numbers."""

    def method(self: Pointer, *args: Any, **kwargs: Any) -> NoReturn:
        _no_numbers(self, what)

    return method


def _converting(dtype: torch.dtype | None) -> Callable[..., Any]:
    """Return a method that converts the tensor to another dtype."""

    def method(self: Pointer, *args: Any, **kwargs: Any) -> Any:
        return self if dtype is None else self.to(dtype)

    return method


for _name, _what in _NEED_NUMBERS.items():
    setattr(Pointer, _name, _refusing(_what))
for _name, _dtype in _CONVERSIONS.items():
    setattr(Pointer, _name, _converting(_dtype))


def call(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Perform an operation at the worker that holds its tensors.

    Raises:
        PointerError: The pointers are at different workers, or an argument cannot be sent.
    """
    named = dict(kwargs)
    if named.pop("inplace", False):
        operation = OPERATIONS[f"{operation.name}_"]
    if operation.name in _SEVERAL_SIZES and len(args) > 1 and not isinstance(args[1], list | tuple):
        args = (args[0], args[1:])
    for name in [name for name in named if name not in (*operation.takes, *operation.named)]:
        if name not in _NO_MATTER and named[name] is not None and named[name] is not False:
            raise PointerError(f"`{operation.name}` at a worker does not take {name}={named[name]!r}")
        del named[name]
    if len(args) > len(operation.takes):
        raise PointerError(
            f"`{operation.name}` at a worker takes ({', '.join(operation.takes)}), not {len(args)} arguments"
        )
    pointers = [each for each in tensors_in((*args, *named.values())) if isinstance(each, Pointer)]
    worker = pointers[0].worker
    asked = Call(
        operation.name,
        tuple(_value(worker, each) for each in args),
        {name: _value(worker, each) for name, each in named.items()},
        torch.is_grad_enabled(),
    )
    said = worker.ask(asked, (TensorMade, TensorsMade))
    if isinstance(said, TensorMade):
        return worker.pointer(said)
    return ValuesAndIndices(*(worker.pointer(made) for made in said.made))


def _value(worker: PointerWorker, given: Any) -> Value:
    """Return an argument in the form in which it is sent."""
    match given:
        case Tensor():
            return Ref(_same_place(worker, given).id)
        case None | bool() | int() | str():
            return given
        case float():
            return number(given)
        case np.generic():
            return _value(worker, given.item())
        case torch.dtype() if given in DTYPE_NAMES:
            return Dtype(cast(Any, DTYPE_NAMES[given]))
        case slice():
            return Slice(
                *(None if end is None else operator.index(end) for end in (given.start, given.stop, given.step))
            )
        case list() | tuple():
            several = cast(list[Any], given)
            return Items(tuple(_value(worker, each) for each in several), isinstance(given, list))
        case _ if given is ...:
            return EllipsisIndex()
        case _:
            raise PointerError(f"{given!r:.80} cannot be sent to a worker: give numbers, shapes, dtypes and pointers")


def _same_place(worker: PointerWorker, tensor: Any) -> Pointer:
    """Return a tensor if it is a pointer at this worker; refuse any other tensor."""
    if not isinstance(tensor, Pointer):
        raise PointerError(
            f"one tensor is in this process, but another is at {worker.name!r}: send the first one, with "
            "sumus.virtual.send(tensor, worker)"
        )
    if tensor.worker is not worker:
        raise PointerError(
            f"one tensor is at {worker.name!r}, but another is at {tensor.worker.name!r}: move one of them, with "
            "sumus.virtual.move(pointer, worker)"
        )
    return tensor


def _name_of(function: Any) -> str:
    """Return torch's name for a function; for a property, the property's name."""
    name = getattr(function, "__name__", repr(function))
    return getattr(function.__self__, "__name__", name) if name in ("__get__", "__set__") else name


def _no_numbers(pointer: Pointer, what: str) -> NoReturn:
    raise PointerError(
        f"`{what}` needs numbers, but they are at {pointer.worker.name!r}: fetch them first, with .get()"
    )
