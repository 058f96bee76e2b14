"""Tensors and models at a *worker*, another process or machine: they are sent there, used in computations, and fetched.

    alice = sumus.virtual.VirtualWorker("alice")                          in this process
    bob = sumus.virtual.connect("http://127.0.0.1:8090", token="…")       another person's device, under its own policy

    x = sumus.virtual.send(torch.tensor([1.0, 2.0]), alice)
    (x * 2).sum().get()                                                   computed at alice

Sending a tensor returns a `Pointer`. To torch, a pointer is a tensor, but it holds no numbers. Importing this package
is fast: torch is imported when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sumus.virtual.models import get, move, send
    from sumus.virtual.operations import ARITHMETIC, EVERYTHING
    from sumus.virtual.pointer import Pointer, PointerError
    from sumus.virtual.policy import Policy
    from sumus.virtual.remote import connect
    from sumus.virtual.serving import serve
    from sumus.virtual.torch_hook import TorchHook
    from sumus.virtual.worker import VirtualWorker, Worker, WorkerRefused

_PUBLIC = {
    "VirtualWorker": "sumus.virtual.worker",
    "connect": "sumus.virtual.remote",
    "Worker": "sumus.virtual.worker",
    "send": "sumus.virtual.models",
    "get": "sumus.virtual.models",
    "move": "sumus.virtual.models",
    "Pointer": "sumus.virtual.pointer",
    "serve": "sumus.virtual.serving",
    "Policy": "sumus.virtual.policy",
    "ARITHMETIC": "sumus.virtual.operations",
    "EVERYTHING": "sumus.virtual.operations",
    "PointerError": "sumus.virtual.pointer",
    "WorkerRefused": "sumus.virtual.worker",
    "TorchHook": "sumus.virtual.torch_hook",
}

__all__ = [
    "ARITHMETIC",
    "EVERYTHING",
    "Pointer",
    "PointerError",
    "Policy",
    "TorchHook",
    "VirtualWorker",
    "Worker",
    "WorkerRefused",
    "connect",
    "get",
    "move",
    "send",
    "serve",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sumus.virtual' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
