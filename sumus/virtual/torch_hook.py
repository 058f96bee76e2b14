"""The interface of PySyft 0.2, as an option: `tensor.send(worker)`, and `model.send(worker)`, which changes the model itself.

    hook = sumus.virtual.TorchHook(torch)
    bob = sumus.virtual.VirtualWorker(hook, id="bob")

    data = data.send(bob)                   a pointer; data.location is bob
    model.send(bob)                         the same module with the same parameters, which are at Bob now
    optimizer.step()                        also works for an optimizer that was created before the model was sent
    model.get()

    hook.unhook()                           restores torch

A parameter that is sent stays the same object, so an optimizer that holds it then holds the tensor at the worker. The
parameter becomes a `Pointer`, and becomes a parameter again when it is fetched. Tensors that a worker keeps private
cannot be fetched by these methods either.
"""

from collections.abc import Callable, Iterator
from types import MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from sumus.errors import UsageError
from sumus.virtual import models
from sumus.virtual.pointer import Pointer, PointerError, PointerWorker
from sumus.virtual.worker import Worker, WorkerRefused

_ABSENT = object()
_OF_A_POINTER = ("worker", "id", "_handle", "_learns", "_leaf", "_gradient")
_before: dict[tuple[type, str], Any] = {}
"""The attributes that torch's classes had under the hooked names, while they are hooked."""


class TorchHook:
    """Adds `send`, `get`, `move` and `location` to tensors and modules, until `unhook`. A second hook in the meantime has
    no effect.

    Args:
        module: torch.
    """

    def __init__(self, module: ModuleType) -> None:
        if module is not torch:
            raise UsageError(f"TorchHook({module!r:.80}): give torch, the module")
        if _before:
            return
        for kind, methods in ((Tensor, _OF_TENSORS), (nn.Module, _OF_MODULES)):
            for name, method in methods.items():
                _before[kind, name] = vars(kind).get(name, _ABSENT)
                setattr(kind, name, method)

    def unhook(self) -> None:
        """Restore torch's classes. Tensors at workers stay there; `sumus.virtual.get` fetches them."""
        for (kind, name), was in _before.items():
            if was is _ABSENT:
                delattr(kind, name)
            else:
                setattr(kind, name, was)
        _before.clear()


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _send_tensor(self: Tensor, *workers: Worker) -> Pointer:
    """Send a copy of this tensor to a worker, and return a pointer to it."""
    return models.send(self, _one(workers))


def _get_tensor(self: Tensor) -> Tensor:
    """Fetch the numbers. Only a pointer has numbers to fetch."""
    return models.get(self)


def _move_tensor(self: Tensor, *workers: Worker) -> Pointer:
    """Send a tensor to another worker, through this process."""
    return models.move(self, _one(workers))


def _location_of_tensor(self: Tensor) -> PointerWorker:
    """Return the worker where this tensor is."""
    if not isinstance(self, Pointer):
        raise PointerError("this tensor is in this process, not at a worker: it has no location")
    return self.worker


# ── modules ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _send_module(self: nn.Module, *workers: Worker) -> nn.Module:
    """Send all parameters and buffers, which stay the same objects. A gradient is sent with its parameter."""
    worker = _one(workers)
    tensors = list(_tensors(self))
    if any(isinstance(tensor, Pointer) for tensor in tensors):
        raise PointerError(
            "this model, or a part of it, is already at a worker: fetch it with .get(), or move it with .move(worker)"
        )
    if not isinstance(cast(object, worker), Worker):
        models.send(self, worker)  # this call raises the error for an argument that is not a worker
    sent = [(tensor, worker.send(tensor), tensor.grad) for tensor in tensors]
    for _, pointer, gradient in sent:
        if gradient is not None:
            pointer.grad = worker.send(gradient)
    for tensor, pointer, _ in sent:  # from here on nothing can fail
        _go(tensor, pointer)
    return self


def _get_module(self: nn.Module) -> nn.Module:
    """Fetch all parameters and buffers, and their gradients if the worker allows it."""
    pointers = [_away(tensor) for tensor in _tensors(self)]
    fetched = [(pointer, pointer.get(), _fetched_gradient(pointer)) for pointer in pointers]
    for pointer, numbers, gradient in fetched:
        _come_back(pointer, numbers, gradient)
    return self


def _move_module(self: nn.Module, *workers: Worker) -> nn.Module:
    """Send a module to another worker, through this process."""
    worker = _one(workers)
    return _send_module(_get_module(self), worker)


def _location_of_module(self: nn.Module) -> PointerWorker:
    """Return the worker where this module is."""
    worker = next((_away(tensor).worker for tensor in _tensors(self)), None)
    if worker is None:
        raise PointerError("this model has no parameters, and is not at a worker")
    return worker


class _Spelling:
    """A method (or, with `called`, a property) that is added to a class of torch.

    If an object has a part of the same name, such as a submodule `location`, that part takes precedence.
    """

    def __init__(self, function: Callable[..., Any], called: bool = False) -> None:
        self._function, self._called = function, called
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        for held in ("_parameters", "_buffers", "_modules") if isinstance(instance, nn.Module) else ():
            if self._name in vars(instance).get(held, {}):
                return vars(instance)[held][self._name]
        return self._function(instance) if self._called else MethodType(self._function, instance)


def _spelt(send: Any, get: Any, move: Any, location: Any) -> dict[str, _Spelling]:
    """Return the attributes `send`, `get`, `move` and `location` for one class."""
    made = {"send": _Spelling(send), "get": _Spelling(get), "move": _Spelling(move)}
    made["location"] = _Spelling(location, called=True)
    for name, spelling in made.items():
        spelling.__set_name__(object, name)
    return made


_OF_TENSORS = _spelt(_send_tensor, _get_tensor, _move_tensor, _location_of_tensor)
_OF_MODULES = _spelt(_send_module, _get_module, _move_module, _location_of_module)


# ── a tensor that is sent and fetched in place ────────────────────────────────────────────────────────────────────────────────


def _go(tensor: Tensor, pointer: Pointer) -> None:
    """Turn a tensor into this pointer, without numbers in this process."""
    kind, is_param = type(tensor), isinstance(tensor, nn.Parameter)
    tensor.grad = None
    tensor.requires_grad_(False)
    tensor.data = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    tensor.__class__ = Pointer
    there = cast(Pointer, tensor)
    for name in _OF_A_POINTER:
        setattr(there, name, getattr(pointer, name))
    vars(there)["_was"] = kind
    if is_param:
        vars(there)["_is_param"] = True
    there.worker.call_by(there)


def _come_back(pointer: Pointer, numbers: Tensor, gradient: Tensor | None) -> None:
    """Turn a pointer into a tensor in this process again, with these numbers."""
    kind = vars(pointer).pop("_was", nn.Parameter if isinstance(pointer, nn.Parameter) else Tensor)
    learns, held = pointer.requires_grad, vars(pointer)
    pointer.worker.call_by(None, pointer.id)
    for name in (*_OF_A_POINTER, "_is_param"):
        held.pop(name, None)
    pointer.__class__ = kind
    here = cast(Tensor, pointer)
    here.data = numbers.detach()
    here.requires_grad_(learns)
    here.grad = gradient


def _fetched_gradient(pointer: Pointer) -> Tensor | None:
    """Fetch the gradient of a parameter; None if it has no gradient, or if the worker's policy keeps it."""
    gradient = pointer.grad
    if gradient is None:
        return None
    try:
        return gradient.get().detach()
    except WorkerRefused as refused:
        if refused.code != "private":
            raise
        return None


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers, each once."""
    yield from {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()


def _away(tensor: Tensor) -> Pointer:
    if not isinstance(tensor, Pointer):
        raise PointerError(
            "this model, or a part of it, is already in this process: only tensors at a worker can be fetched or moved"
        )
    return tensor


def _one(workers: tuple[Worker, ...]) -> Worker:
    if len(workers) != 1:
        raise PointerError(f"send and move take one worker, not {len(workers)}: call them once for each worker")
    return workers[0]
