"""Workers, to which callers send tensors: in this process or elsewhere, with the same interface.

alice = VirtualWorker("alice")
carol = VirtualWorker("carol", {"inputs": inputs}, Policy(fetch="parameters"))     a worker that offers tensors

pointer = alice.send(torch.tensor([1.0, 2.0]))
carol["inputs"]                                                a pointer to a tensor that carol offers
"""

import threading
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from sumus.errors import ParticipantError, UsageError
from sumus.virtual.messages import (
    MOST_FORGOTTEN,
    OVERHEAD,
    Ask,
    CountHeld,
    FetchAnswer,
    FetchTensor,
    HeldAnswer,
    RefusalAnswer,
    SendTensor,
    TensorMade,
    UseOffered,
    WorkerAnswer,
    WorkerRequest,
    read,
    read_tensor,
    write,
)
from sumus.virtual.operations import DTYPE_NAMES
from sumus.virtual.pointer import Pointer, PointerError
from sumus.virtual.policy import Policy
from sumus.virtual.workbench import Workbench, as_tensor

A = TypeVar("A")


class WorkerRefused(UsageError):
    """A worker refuses a request.

    Attributes:
        worker: The worker's name.
        code: A key of `sumus.virtual.messages.STATUS`.
    """

    def __init__(self, worker: str, code: str, detail: str) -> None:
        super().__init__(f"worker {worker!r} refuses: {detail or code}")
        self.worker, self.code = worker, code


class Worker:
    """The common part of both kinds of workers. Any thread may use it.

    Attributes:
        name: The worker's name.
        names: The names of the tensors that its owner offers.
    """

    name: str
    names: tuple[str, ...]

    def __init__(self, name: str, names: tuple[str, ...]) -> None:
        self.name, self.names = name, names
        self._let_go: deque[int] = deque()  # garbage collection adds to it at any moment, so it has no lock
        self._pointers: WeakValueDictionary[int, Pointer] = WeakValueDictionary()
        self._serial = 0
        self._one_at_a_time = threading.RLock()
        self.gradients_changed = 0
        """A number that grows with each request that may change a gradient at the worker. A pointer whose gradient was read at
        a smaller number reads it again."""

    def __repr__(self) -> str:
        return f"<worker {self.name!r}>"

    @property
    def id(self) -> str:
        """The worker's name, under the attribute that PySyft 0.2 uses."""
        return self.name

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the worker. All tensors that the caller has at the worker are deleted."""
        raise NotImplementedError

    def _exchange(self, body: bytes, most: int) -> bytes:
        """Send a request, and return the bytes of the response, at most `most` bytes."""
        raise NotImplementedError

    def send(self, tensor: Tensor) -> Pointer:
        """Send a tensor, and return a pointer. The tensor at the worker is a leaf. It requires a gradient if the given
        tensor does."""
        return self.pointer(self.ask(SendTensor(tensor.requires_grad), TensorMade, as_array(tensor)))

    def __getitem__(self, name: str) -> Pointer:
        """Return a pointer to a tensor that the owner offers."""
        return self.pointer(self.ask(UseOffered(name), TensorMade))

    def fetch(self, pointer: Pointer) -> Tensor:
        """Fetch the numbers of a tensor. The worker keeps its tensor."""
        with self._one_at_a_time:
            said, behind = self._answer(FetchTensor(pointer.id), None, OVERHEAD + pointer.nbytes)
        fetched = self._checked(said, FetchAnswer)
        try:
            return as_tensor(read_tensor(behind)).requires_grad_(fetched.learns)
        except ParticipantError as error:
            raise self._strange(error) from error

    def held(self) -> HeldAnswer:
        """Return how many tensors and bytes the worker holds for this caller."""
        return self.ask(CountHeld(), HeldAnswer)

    def ask(self, ask: Ask, wanted: type[A] | tuple[type[A], ...], tensor: Any = None) -> A:
        """Send a request, and return the response, which must be an instance of a wanted class.

        Raises:
            WorkerRefused: The worker refuses the request.
        """
        with self._one_at_a_time:
            said, _ = self._answer(ask, tensor, OVERHEAD)
        return self._checked(said, wanted)

    def pointer(self, made: TensorMade) -> Pointer:
        """Return the pointer to a tensor at the worker. If a pointer already exists, the same pointer is returned."""
        found = self._pointers.get(made.id)
        if found is None:
            found = Pointer(self, made)
            self._pointers[made.id] = found
        else:
            found.now(made)
        return found

    def call_by(self, pointer: Pointer | None, number: int | None = None) -> None:
        """Set the pointer that `pointer()` returns for a tensor at the worker.

        Args:
            pointer: The pointer; None to create a new pointer at the next call of `pointer()`.
            number: The tensor's number, if `pointer` is None.
        """
        if pointer is not None:
            self._pointers[pointer.id] = pointer
        elif number is not None:
            self._pointers.pop(number, None)

    def let_go(self, number: int) -> None:
        """Delete a tensor at the worker with the next request. Garbage collection calls this, at any moment."""
        self._let_go.append(number)

    def _answer(self, ask: Ask, tensor: Any, most: int) -> tuple[WorkerAnswer, bytes]:
        gone: list[int] = []
        while self._let_go and len(gone) < MOST_FORGOTTEN:
            gone.append(self._let_go.popleft())
        self._serial += 1
        try:
            body = self._exchange(write(WorkerRequest(self._serial, ask, tuple(gone)), tensor), most)
        except BaseException:
            self._let_go.extend(gone)  # deleting a tensor twice does no harm
            raise
        try:
            return read(WorkerAnswer, body)
        except ParticipantError as error:
            raise self._strange(error) from error

    def _checked(self, said: WorkerAnswer, wanted: type[A] | tuple[type[A], ...]) -> A:
        if isinstance(said.answer, RefusalAnswer):
            raise WorkerRefused(self.name, said.answer.code, said.answer.detail)
        if not isinstance(said.answer, wanted):
            raise self._strange(ParticipantError(None, f"it sent {type(said.answer).__name__}"))
        return cast(A, said.answer)

    def _strange(self, error: Exception) -> ParticipantError:
        return ParticipantError(
            None,
            f"worker {self.name!r} sent an unexpected response ({error}): run the same version of sumus on both sides",
        )


class InstalledHook(Protocol):
    """A `TorchHook`. A worker uses it only as a sign that the worker's name follows."""

    def unhook(self) -> None:
        """Restore torch."""
        ...


class VirtualWorker(Worker):
    """A worker in this process. It has the same kind of policy, and gets the same bytes, as a worker on another machine.

    Args:
        name: Its name; or a `TorchHook`, as in PySyft 0.2. In the second case, `id` is the name.
        tensors: Its own tensors, which are private like those of a device. Tensors that a caller sends belong to the
            caller.
        policy: The policy for callers.
        id: Its name, if the first argument is a hook.
    """

    def __init__(
        self,
        name: str | InstalledHook,
        tensors: Mapping[str, Tensor] | None = None,
        policy: Policy | None = None,
        id: str | None = None,
    ) -> None:
        policy = policy or Policy()
        name = _name_of(name, id)
        own = offered(tensors or {}, policy.public)
        super().__init__(name, tuple(own))
        self._bench: Workbench | None = Workbench(own, policy)

    def _exchange(self, body: bytes, most: int) -> bytes:
        if self._bench is None:
            raise PointerError(f"worker {self.name!r} is closed, and its tensors are deleted: make another worker")
        with torch.inference_mode(False):  # inference mode belongs to this thread; a worker elsewhere would not see it
            return self._bench.answer(body)

    def close(self) -> None:
        """Delete everything that the worker holds."""
        self._bench = None


def _name_of(name: object, other: str | None) -> str:
    """Return a worker's name from the arguments, with or without a hook before it."""
    if callable(getattr(name, "unhook", None)):
        name, other = other, None
    if not isinstance(name, str) or other is not None:
        raise UsageError(
            f"VirtualWorker({name!r:.40}, id={other!r:.40}): give one name, as in VirtualWorker('alice'), or VirtualWorker(hook, "
            "id='alice')"
        )
    return name


def offered(tensors: Mapping[str, Any], public: Collection[str] = ()) -> dict[str, Tensor]:
    """Check the tensors that an owner offers, and return them.

    Args:
        tensors: Tensors or arrays, by name.
        public: The names of tensors that are not private. Such a tensor is copied if it shares memory with a private one.
    """
    found: dict[str, Tensor] = {}
    for name, given in tensors.items():
        tensor = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
        if not isinstance(tensor, Tensor) or isinstance(tensor, Pointer) or tensor.device.type != "cpu":
            raise UsageError(
                f"a worker offers CPU tensors or arrays by name, but {name!r} is not one: it is a {type(given).__name__}"
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise UsageError(
                f"the tensor {name!r} has the dtype {tensor.dtype}: use one of {', '.join(DTYPE_NAMES.values())}"
            )
        found[name] = tensor.detach()
    private = [tensor for name, tensor in found.items() if name not in public]
    return {
        name: tensor.clone() if name in public and any(_overlap(tensor, each) for each in private) else tensor
        for name, tensor in found.items()
    }


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two storages have a byte in common."""
    (begin, end), (first, last) = (
        (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
        for storage in (one.untyped_storage(), other.untyped_storage())
    )
    return begin < last and first < end


def as_array(tensor: Tensor) -> Any:
    """Return a tensor in the form in which it is sent."""
    if isinstance(tensor, Pointer):
        raise PointerError(f"this tensor is already at {tensor.worker.name!r}: use sumus.virtual.move(pointer, worker)")
    if tensor.dtype not in DTYPE_NAMES:
        raise PointerError(f"a tensor of {tensor.dtype} cannot be sent: use one of {', '.join(DTYPE_NAMES.values())}")
    if tensor.layout != torch.strided:
        raise PointerError(f"a tensor of layout {tensor.layout} cannot be sent: use to_dense()")
    return tensor.detach().cpu().resolve_neg().numpy()
