"""Send, fetch and move tensors, and models whose parameters are then at a worker.

    there = send(model, alice)                     a model of the same class; the original is unchanged
    optimizer = torch.optim.SGD(there.parameters(), lr=0.1)
    loss = loss_of(there(x), y)                    x and y are at alice
    loss.backward(); optimizer.step()
    model = get(there)

The code of a model runs in this process, but each of its operations runs at the worker. No code is sent.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

from torch import Tensor, nn

from sumus.virtual.pointer import Pointer, PointerError
from sumus.virtual.worker import Worker

M = TypeVar("M", bound=nn.Module)


@overload
def send(what: M, worker: Worker) -> M: ...
@overload
def send(what: Tensor, worker: Worker) -> Pointer: ...
def send(what: Any, worker: Worker) -> Any:
    """Send a tensor and return a pointer; or send a model and return a copy whose parameters and buffers are pointers.

    The original stays here, unchanged.
    """
    if not isinstance(worker, Worker):
        raise PointerError(
            f"{worker!r:.80} is not a worker: make one with sumus.virtual.VirtualWorker(name), or sumus.virtual.connect(url)"
        )
    if isinstance(what, nn.Module):
        return _replaced(
            what, lambda tensor: _as_parameter(worker.send(tensor), tensor), "is already at a worker", False
        )
    return worker.send(_tensor(what))


@overload
def get(what: M) -> M: ...
@overload
def get(what: Tensor) -> Tensor: ...
def get(what: Any) -> Any:
    """Fetch a tensor, or a copy of a model with its trained parameters. The worker keeps its tensors too."""
    if isinstance(what, nn.Module):
        return _replaced(what, _fetched, "is already in this process", True)
    return _pointer(what).get()


@overload
def move(what: M, worker: Worker) -> M: ...
@overload
def move(what: Tensor, worker: Worker) -> Pointer: ...
def move(what: Any, worker: Worker) -> Any:
    """Copy a tensor or model to another worker. It is fetched to this process first, which its worker's policy must allow."""
    return send(get(what), worker)


def _replaced(model: M, change: Callable[[Tensor], Tensor], otherwise: str, there: bool) -> M:
    """Copy a model with changed tensors. Parameters that share a tensor in the model also share one in the copy."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    if any(isinstance(tensor, Pointer) is not there for tensor in tensors.values()):
        raise PointerError(f"this model, or a part of it, {otherwise}")
    return copy.deepcopy(model, cast(Any, {at: change(tensor) for at, tensor in tensors.items()}))


def _as_parameter(pointer: Pointer, tensor: Tensor) -> Pointer:
    if isinstance(tensor, nn.Parameter):
        pointer._is_param = True  # pyright: ignore[reportAttributeAccessIssue]  # torch looks for it in parameters
    return pointer


def _fetched(tensor: Tensor) -> Tensor:
    found = _pointer(tensor).get()
    return nn.Parameter(found.detach(), found.requires_grad) if isinstance(tensor, nn.Parameter) else found.detach()


def _tensor(what: Any) -> Tensor:
    if not isinstance(what, Tensor):
        raise PointerError(f"a {type(what).__name__} cannot be sent: send a tensor, or a model")
    return what


def _pointer(what: Any) -> Pointer:
    if not isinstance(what, Pointer):
        raise PointerError(
            f"this {type(what).__name__} is already in this process: only tensors at a worker can be fetched or moved"
        )
    return what
