"""The requests of one caller at a worker: bytes in, bytes out. A repeated request is done only once.

    bench = Workbench({"inputs": inputs}, policy)
    answer = bench.answer(body)                    request and response have the forms of sumus/virtual/messages.py

This class does the work of both kinds of workers: those in this process, and those behind a socket.

    held.py        the caller's tensors, and the limits of the policy
    calls.py       operations on them
    gradients.py   backward passes

**Privacy.** The owner's tensors are private, and so is everything computed from them: results, gradients, and tensors
into which either is written. Privacy is a property of memory (`Memories`). The header of `calls.py` explains what responses
reveal about private tensors.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sumus.errors import ParticipantError
from sumus.logs import logger
from sumus.types import Array
from sumus.virtual.calls import OperationCalls
from sumus.virtual.gradients import backward, gradient_of, set_gradient, set_requires_grad
from sumus.virtual.held import HeldTensors
from sumus.virtual.messages import (
    OVERHEAD,
    Backward,
    Call,
    CountHeld,
    FetchAnswer,
    FetchTensor,
    Gradient,
    HeldAnswer,
    RefusalAnswer,
    SendTensor,
    SetGradient,
    SetRequiresGrad,
    TensorMade,
    UseOffered,
    WorkerAnswer,
    WorkerRequest,
    read,
    read_tensor,
    write,
)
from sumus.virtual.operations import DTYPE_NAMES
from sumus.virtual.outline import bytes_of
from sumus.virtual.policy import Policy
from sumus.virtual.refusal import RequestRefused

LOG = logger("sumus.worker")


class Workbench:
    """Performs the requests of one caller.

    Args:
        tensors: The owner's tensors, by name; they are never changed.
        policy: The owner's policy.
    """

    def __init__(self, tensors: Mapping[str, Tensor], policy: Policy) -> None:
        self.held = HeldTensors(tensors, policy)
        self.calls = OperationCalls(self.held)
        self._last, self._said = -1, b""
        self._lock = threading.Lock()

    def answer(self, body: bytes) -> bytes:
        """Perform a request, and return the response. Any thread may call this method.

        A repeated request is done only once, and gets the same response.
        """
        with self._lock:
            try:
                asked, behind = read(WorkerRequest, body)
                if asked.serial == self._last and self._said:
                    return self._said
                if asked.serial < self._last:
                    raise RequestRefused("replayed", "this request is older than one that was answered: connect again")
                self._last = asked.serial
                self._said = b""
                for number in asked.forget:
                    self.held.forget(number)
                if isinstance(asked.ask, FetchTensor):
                    # The response is not kept: it may be large, and fetching again is harmless.
                    return write(*_fetch(self.held, asked.ask))
                self._said = write(WorkerAnswer(_DOES[type(asked.ask)](self, asked.ask, behind)))
                return self._said
            except ParticipantError as error:
                return write(WorkerAnswer(RefusalAnswer("malformed", str(error))))
            except RequestRefused as no:
                self._said = write(WorkerAnswer(RefusalAnswer(no.code, no.detail)))
                return self._said
            except Exception as error:  # a defect does not end the worker; the log gets the traceback
                LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
                self._said = write(
                    WorkerAnswer(
                        RefusalAnswer("failed", "the worker has a defect: ask its owner for the traceback in its log")
                    )
                )
                return self._said


def _send(held: HeldTensors, ask: SendTensor, body: bytes) -> TensorMade:
    """Keep a tensor that the caller sends."""
    if len(body) > held.policy.largest + OVERHEAD:
        held.check_size(len(body))
    held.check_memory(2 * len(body))  # it is read, and then copied to memory that torch allocates
    tensor = as_tensor(read_tensor(body))
    if ask.learns and not tensor.is_floating_point():
        raise RequestRefused("impossible", f"a tensor of {DTYPE_NAMES[tensor.dtype]} has no gradient: send floats")
    return held.keep(tensor.requires_grad_(ask.learns), sent=True)


def _use(held: HeldTensors, ask: UseOffered) -> TensorMade:
    """Let the caller use a tensor that the owner offers."""
    if ask.name not in held.offered:
        known = ", ".join(sorted(held.offered)) or "none"
        raise RequestRefused(
            "unknown_name", f"the owner offers no tensor {ask.name!r}; the tensors on offer are: {known}"
        )
    return held.keep(held.offered[ask.name].detach())


def _fetch(held: HeldTensors, ask: FetchTensor) -> tuple[WorkerAnswer, Array]:
    """Return the numbers of a tensor to the caller, if the policy allows it."""
    kept = held.of(ask.id)
    fetch = held.policy.fetch
    if held.is_private(kept.tensor) and not (fetch == "all" or (fetch == "parameters" and kept.sent)):
        if fetch == "parameters":
            only = "of such tensors, only a model that you sent and trained may be fetched"
        else:
            only = "it may be fetched only if the owner's policy allows it"
        raise RequestRefused("private", f"this tensor depends on the owner's data; {only}")
    held.check_memory(2 * bytes_of(kept.tensor.shape, kept.tensor.dtype))
    return WorkerAnswer(FetchAnswer(kept.tensor.requires_grad)), kept.tensor.detach().resolve_neg().numpy()


def _count(held: HeldTensors) -> HeldAnswer:
    """Count the tensors and bytes that the caller holds."""
    return HeldAnswer(len(held.tensors), held.bytes_in_use())


_DOES: dict[type, Callable[[Workbench, Any, bytes], Any]] = {
    SendTensor: lambda bench, ask, body: _send(bench.held, ask, body),
    UseOffered: lambda bench, ask, body: _use(bench.held, ask),
    Call: lambda bench, ask, body: bench.calls.do(ask),
    Backward: lambda bench, ask, body: backward(bench.held, ask),
    Gradient: lambda bench, ask, body: gradient_of(bench.held, ask),
    SetGradient: lambda bench, ask, body: set_gradient(bench.held, ask),
    SetRequiresGrad: lambda bench, ask, body: set_requires_grad(bench.held, ask),
    CountHeld: lambda bench, ask, body: _count(bench.held),
}
"""The function for each kind of request. The table is not an attribute of a workbench: an object that holds its own methods
is part of a reference cycle, and is not freed at once."""


def as_tensor(array: Array) -> Tensor:
    """Copy an array to a tensor in memory that torch allocates.

    The order in which torch's kernels add numbers, and so the last bits of a sum, depends on a tensor's alignment.
    """
    return torch.from_numpy(array).clone()
