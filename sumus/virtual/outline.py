"""The results and the cost of a call, derived from shapes alone before any number is computed.

    call = BoundCall(OPERATIONS["add"], (x, y), {}, graph=True)
    outline = outline_of(call, closed=True)
    outline.results[0].shape, outline.bytes, outline.steps

The call runs with tensors on torch's device `meta`, which have shapes but no numbers. For every operation of torch in
the call, three things are counted: the memory of its results, the memory that its kernel needs internally, and its
steps. So the shape of a result cannot depend on numbers, and a call that exceeds the limits is refused before it uses
memory or time.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sumus.virtual.operations import Operation, tensors_in

STEPS_A_SECOND = 2e8
"""The steps per second of the slowest kernel on one core (measured: 1.9e8 for `pow` of float64). One element of a tensor is
one step, and so is one product in a sum of products."""
PRODUCTS_A_STEP = 16
"""In a product of two float matrices, this many multiplications count as one step (measured: at least 3.5e10 per second)."""
STEPS_OF_HALF = 10_000
"""The steps of one product in a convolution of float16 with groups, whose kernel may take minutes for a few million."""
LONGEST_FORM = 4096
"""The largest number of characters in the description of a call whose outline is kept."""

Aten: Any = torch.ops.aten
_PRODUCTS = (Aten.mm, Aten.bmm, Aten.mv, Aten.dot, Aten.addmm, Aten.baddbmm, Aten.addmv)
_POOLS = (Aten.max_pool2d_with_indices, Aten.avg_pool2d)

Form: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class BoundCall:
    """An operation and its arguments.

    Attributes:
        operation: The operation.
        arguments: Its arguments, in order.
        named: Its arguments by name.
        graph: Whether autograd records it.
    """

    operation: Operation
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    graph: bool

    def tensors(self) -> list[Tensor]:
        """List all tensors among the arguments."""
        return list(tensors_in((*self.arguments, *self.named.values())))

    def changed(self) -> list[Tensor]:
        """List the tensors to which the operation writes."""
        takes = self.operation.takes
        bound = (*self.arguments, *(self.named.get(name) for name in takes[len(self.arguments) :]))
        return list(tensors_in(bound[at] for at in self.operation.changes))

    def replaced(self, replace: Callable[[Tensor], Tensor]) -> "BoundCall":
        """Return the same call with other tensors."""
        named = {name: _replaced(value, replace) for name, value in self.named.items()}
        return BoundCall(self.operation, _replaced(self.arguments, replace), named, self.graph)

    def results(self, closed: bool) -> list[Tensor]:
        """Perform the call. With `closed`, the function for private tensors is used."""
        function = self.operation.closed if closed else self.operation.function
        with torch.set_grad_enabled(self.graph):
            found = list(tensors_in([function(*self.arguments, **self.named)]))
        if not found:
            raise TypeError("the operation returns no tensor")
        given = {id(tensor) for tensor in self.tensors()}
        # A view without history would fail wherever it is used, once its base has got a history.
        return [
            each.detach() if not self.graph and each._is_view() and id(each) not in given else each for each in found
        ]

    def form(self, private: Collection[int]) -> Form | None:
        """Return everything on which the call's outline depends; None if this is too long to be kept.

        Args:
            private: The `id()` of each private tensor.
        """
        storages: dict[int, int] = {}

        def described(value: Any) -> Any:
            if isinstance(value, Tensor):
                at = storages.setdefault(storage_of(value), len(storages))
                return (at, value.untyped_storage().nbytes(), id(value) in private, *_geometry(value), *_history(value))
            if isinstance(value, list | tuple):
                return (type(value), *(described(each) for each in cast(Sequence[Any], value)))
            return repr(value), type(value)

        named = tuple((name, described(value)) for name, value in sorted(self.named.items()))
        form = (self.operation.name, self.graph, described(self.arguments), named)
        return form if len(repr(form)) <= LONGEST_FORM else None


@dataclass(frozen=True)
class OutlineResult:
    """One tensor that a call returns.

    Attributes:
        shape: The tensor's shape.
        dtype: The tensor's dtype.
        learns: Whether the tensor requires a gradient.
        same: If the result is one of the call's own tensors: the tensor's position among them; None for a new tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    learns: bool
    same: int | None


@dataclass
class Outline:
    """The results of a call, and its cost.

    Attributes:
        results: The tensors that it returns, in the order of the operation.
        bytes: An upper bound of the bytes of the results and of all intermediate memory.
        steps: The steps that it takes, see `STEPS_A_SECOND`.
        tried: Whether a trial with zeros in place of private tensors has succeeded.
    """

    results: list[OutlineResult]
    bytes: int
    steps: int
    tried: bool = False


def outline_of(call: BoundCall, closed: bool) -> Outline:
    """Compute the outline of a call.

    Args:
        call: The call.
        closed: Whether the function for private tensors is used.

    Raises:
        Exception: Any exception that torch raises for these shapes and dtypes.
    """
    there = call.replaced(_Hollow())
    given = [id(tensor) for tensor in there.tensors()]
    with _Counting() as counting:
        made = there.results(closed)
    results = [
        OutlineResult(
            tuple(each.shape), each.dtype, each.requires_grad, given.index(id(each)) if id(each) in given else None
        )
        for each in made
    ]
    return Outline(results, counting.bytes, counting.steps)


class _Twins:
    """Creates tensors with the same geometry as given tensors. If two given tensors share memory, their copies do too."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._storages: dict[int, torch.UntypedStorage] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the same geometry, without history and with arbitrary numbers."""
        at = storage_of(tensor)
        if at not in self._storages:
            self._storages[at] = torch.UntypedStorage(tensor.untyped_storage().nbytes(), device=self._device)
        with torch.no_grad():
            twin = torch.empty(0, dtype=tensor.dtype, device=self._device)
            return twin.set_(cast(Any, self._storages[at]), *_geometry(tensor)[1:])


class _Hollow:
    """Creates tensors without numbers that torch treats like given tensors, since geometry and history are the same."""

    def __init__(self) -> None:
        self._twins = _Twins("meta")
        self._made: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._made:
            self._made[id(tensor)] = self._make(tensor)
        return self._made[id(tensor)]

    def _make(self, tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._is_view() else None
        if base is None or not base.requires_grad:
            return self._with_history(tensor)
        with torch.enable_grad():
            return self._with_history(base).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _with_history(self, tensor: Tensor) -> Tensor:
        bare = self._twins.of(tensor)
        if not tensor.requires_grad:
            return bare
        if tensor.is_leaf:
            return bare.requires_grad_()
        with torch.enable_grad():
            return bare.mul_(torch.empty((), dtype=bare.dtype, device="meta", requires_grad=True))


def with_blanks(call: BoundCall, hidden: Callable[[Tensor], bool]) -> BoundCall:
    """Return the same call without autograd, with zeros in place of hidden tensors and of tensors that the call changes."""
    twins = _Twins("cpu")
    changed = {storage_of(tensor) for tensor in call.changed()}

    def replace(tensor: Tensor) -> Tensor:
        blank = hidden(tensor) or storage_of(tensor) in changed
        return twins.of(tensor).zero_() if blank else tensor.detach()

    return dataclasses.replace(call.replaced(replace), graph=False)


def storage_of(tensor: Tensor) -> int:
    """Return the address of a tensor's storage. It stays unique while any reference to the storage exists, even a weak one."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def bytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the size in bytes of a tensor with this shape. `numel()` would overflow for shapes that no memory can hold."""
    return math.prod(shape) * dtype.itemsize


class _Counting(TorchDispatchMode):
    """A mode that counts the cost of operations on tensors.

    Attributes:
        bytes: As in `Outline`.
        steps: As in `Outline`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.steps = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            taken, given = list(tensors_in((*args, *(kwargs or {}).values()))), list(tensors_in([made]))
            self.bytes += _new_bytes(taken, given) + _kernel_bytes(func, args, taken, given)
            self.steps += _steps(func, args, taken, given)
        return made


def _new_bytes(taken: list[Tensor], given: list[Tensor]) -> int:
    old = {id(tensor) for tensor in taken}
    return sum(bytes_of(tensor.shape, tensor.dtype) for tensor in given if id(tensor) not in old)


def _kernel_bytes(func: Any, args: Sequence[Any], taken: list[Tensor], given: list[Tensor]) -> int:
    """Estimate the memory that a kernel needs internally, in bytes.

    A convolution needs memory for its columns; another kernel needs at most the size of all operands in the widest dtype
    (measured), since kernels convert operands, change their layout, or have intermediate results of that size.
    """
    widest = max((tensor.dtype.itemsize for tensor in (*taken, *given)), default=0)
    if func.overloadpacket is Aten.convolution:
        weight, groups = taken[1], args[8]
        columns = given[0].numel() // max(1, weight.shape[0]) * (weight.numel() // max(1, weight.shape[0])) * groups
        return 2 * columns * max(4, widest)
    return sum(tensor.numel() for tensor in taken) * max(4, widest)


def _steps(func: Any, args: Sequence[Any], taken: list[Tensor], given: list[Tensor]) -> int:
    largest = max((tensor.numel() for tensor in (*taken, *given)), default=0)
    if func.overloadpacket in _PRODUCTS:
        products = given[0].numel() * taken[-2].shape[-1]
        return largest + (products // PRODUCTS_A_STEP if given[0].is_floating_point() else products)
    if func.overloadpacket is Aten.convolution:
        weight, groups = taken[1], args[8]
        products = given[0].numel() * (weight.numel() // max(1, weight.shape[0]))
        return largest + products * (STEPS_OF_HALF if groups > 1 and weight.dtype == torch.float16 else 1)
    if func.overloadpacket in _POOLS:
        window = args[1] if isinstance(args[1], list | tuple) else [args[1]] * 2
        return largest + given[0].numel() * math.prod(cast(Sequence[int], window)) ** (2 // len(cast(Any, window)))
    return largest


def _geometry(tensor: Tensor) -> tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]:
    return tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def _history(tensor: Tensor) -> tuple[Any, ...]:
    """Return the autograd state of a tensor that may make an operation fail, or make its result require a gradient."""
    base = tensor._base if tensor._is_view() else None
    if base is None or not base.requires_grad:
        return tensor.requires_grad, tensor.is_leaf
    return tensor.requires_grad, tensor.is_leaf, base.is_leaf, *_geometry(base)


def _replaced(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, list | tuple):
        return type(value)(_replaced(each, replace) for each in cast(Sequence[Any], value))
    return value
