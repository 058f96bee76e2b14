"""A caller's tensors at a worker: what may be done with them, how many there may be, and what may leave. Bytes in, bytes out.

    bench = Workbench({"inputs": inputs}, policy)
    answer = bench.answer(body)                    both of sumus/virtual/messages.py

The in-process worker and the one that listens on a socket are this, and nothing beside it. Autograd runs here: a pointer knows of
it only whether it requires a gradient.

**What is private.** The owner's tensors are, and what is computed from them: results, gradients, and whatever either is written
into. It belongs to memory, not to pointers: a view of what has become private is private. What would go wrong because of numbers
in private tensors is not reported, since whether it does would tell: the result is NaN, or the operation is refused in any case.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sumus.errors import ParticipantError
from sumus.logs import logger
from sumus.text import printable
from sumus.types import Array
from sumus.virtual.messages import (
    OVERHEAD,
    Asked,
    Backward,
    Call,
    Code,
    Count,
    Dots,
    Dtype,
    Fetch,
    Fetched,
    Gradient,
    Held,
    Items,
    Learn,
    Made,
    MadeSeveral,
    NotFinite,
    Nothing,
    Offered,
    Ref,
    Refusal,
    Said,
    Send,
    SetGradient,
    Slice,
    read,
    read_tensor,
    write,
)
from sumus.virtual.operations import DTYPE_NAMES, DTYPES, OPERATIONS, TELLS, TENSORS, Operation, tensors_in
from sumus.virtual.policy import Policy

LOG = logger("sumus.worker")
NODE = 1024
"""Bytes that a step of autograd's graph counts as, beside its tensors."""


class Refused(Exception):
    """A request is answered with a refusal."""

    def __init__(self, code: Code, detail: str) -> None:
        super().__init__(printable(f"{code}: {detail}"))
        self.code: Code = code
        self.detail = detail


@dataclass
class _Kept:
    """A tensor. sent: by the caller.  private, gradient_private: depends on the owner's data.  reserved: bytes for a gradient."""

    tensor: Tensor
    sent: bool = False
    private: bool = False
    gradient_private: bool = False
    reserved: int = 0


class _Memory:
    """What several tensors may share. tensors: how many of them are kept."""

    def __init__(self, tensor: Tensor) -> None:
        self.bytes, self.tensors = tensor.untyped_storage().nbytes(), 0


class Workbench:
    """One caller's. tensors: the owner's, by name; they are never changed."""

    def __init__(self, tensors: Mapping[str, Tensor], policy: Policy) -> None:
        self._offered, self._policy = tensors, policy
        self._owned = {_memory(tensor) for tensor in tensors.values()} - {0}
        self._kept: dict[int, _Kept] = {}
        self._memories: dict[int, _Memory] = {}
        self._next = 0
        self._bytes = 0
        self._graph = _Tally()
        self._last, self._said = -1, b""
        self._lock = threading.Lock()
        self._does: dict[type, Callable[[Any, bytes], Any]] = {
            Send: self._send,
            Offered: self._use,
            Call: self._call,
            Backward: self._backward,
            Gradient: self._gradient,
            SetGradient: self._set_gradient,
            Learn: self._learn,
            Count: lambda ask, behind: Held(len(self._kept), self._held),
        }

    def answer(self, body: bytes) -> bytes:
        """The answer to a request. Any thread may call; the same request again has the same answer, and is done once."""
        with self._lock:
            try:
                asked, behind = read(Asked, body)
                if asked.serial == self._last and self._said:
                    return self._said
                if asked.serial < self._last:
                    raise Refused("replayed", "this request is older than one that was answered: connect again")
                self._last = asked.serial
                self._said = b""
                for number in asked.forget:
                    self._forget(number)
                if isinstance(asked.ask, Fetch):
                    return write(*self._fetch(asked.ask))  # not kept: it may be large, and may be done twice
                self._said = write(Said(self._does[type(asked.ask)](asked.ask, behind)))
                return self._said
            except ParticipantError as error:
                return write(Said(Refusal("malformed", str(error))))
            except Refused as no:
                self._said = write(Said(Refusal(no.code, no.detail)))
                return self._said
            except Exception as error:
                LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
                self._said = write(Said(Refusal("failed", "a defect of the worker, which is in its log")))
                return self._said

    # ── tensors come and go ──────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, ask: Send, behind: bytes) -> Made:
        if len(behind) > self._policy.largest + OVERHEAD:
            raise self._over(len(behind))
        tensor = as_tensor(read_tensor(behind))
        if ask.learns and not tensor.is_floating_point():
            raise Refused("impossible", f"a tensor of {DTYPE_NAMES[tensor.dtype]} has no gradient: send floats")
        return self._keep(tensor.requires_grad_(ask.learns), sent=True)

    def _use(self, ask: Offered, behind: bytes) -> Made:
        if ask.name not in self._offered:
            known = ", ".join(sorted(self._offered)) or "none"
            raise Refused("unknown_name", f"its owner offers no tensor {ask.name!r}; there is: {known}")
        return self._keep(self._offered[ask.name].detach(), private=ask.name not in self._policy.public)

    def _fetch(self, ask: Fetch) -> tuple[Said, Array]:
        kept = self._of(ask.id)
        if kept.private and not (self._policy.fetch == "all" or (self._policy.fetch == "parameters" and kept.sent)):
            if self._policy.fetch == "parameters":
                only = "of what does, only a model that you sent and trained may be fetched"
            else:
                only = "and may not be fetched; its owner may have a policy that lets it"
            raise Refused("private", f"this tensor depends on its owner's data, {only}")
        self._within(kept.tensor)
        return Said(Fetched(kept.tensor.requires_grad)), kept.tensor.detach().resolve_neg().numpy()

    def _forget(self, number: int) -> None:
        if (kept := self._kept.pop(number, None)) is None:
            return
        self._bytes -= kept.reserved
        memory = self._memories.get(_memory(kept.tensor))
        if memory is not None:
            memory.tensors -= 1
            if not memory.tensors:
                del self._memories[_memory(kept.tensor)]
                self._bytes -= memory.bytes

    def _keep(self, tensor: Tensor, sent: bool = False, private: bool = False) -> Made:
        self._room(1)
        self._within(tensor)
        address = _memory(tensor)
        new = _Memory(tensor) if address not in self._memories and address not in self._owned | {0} else None
        self._afford(0 if new is None else new.bytes)
        kept = _Kept(tensor, sent, private)
        self._reserve(kept)
        if new is not None:
            self._memories[address] = new
            self._bytes += new.bytes
        if address in self._memories:
            self._memories[address].tensors += 1
        number, self._next = self._next, self._next + 1
        self._kept[number] = kept
        return _made(number, tensor)

    def _reserve(self, kept: _Kept) -> None:
        """Count the gradient that a leaf may get."""
        wanted = _bytes_of(kept.tensor) if kept.tensor.requires_grad and kept.tensor.is_leaf else 0
        self._afford(wanted - kept.reserved)
        self._bytes += wanted - kept.reserved
        kept.reserved = wanted

    def _afford(self, more: int) -> None:
        if more > 0 and self._held + more > self._policy.held:
            raise Refused("too_many", f"you would hold more than {self._policy.held} bytes here: let go of pointers")

    @property
    def _held(self) -> int:
        return self._bytes + self._graph.bytes

    def _of(self, number: int) -> _Kept:
        kept = self._kept.get(number)
        if kept is None:
            raise Refused("unknown_tensor", f"there is no tensor {number} of yours here: was its pointer let go of?")
        return kept

    def _room(self, more: int) -> None:
        if len(self._kept) + more > self._policy.tensors:
            raise Refused("too_many", f"you hold {self._policy.tensors} tensors here, the most: let go of pointers")

    def _within(self, tensor: Tensor) -> None:
        if _bytes_of(tensor) > self._policy.largest:
            raise self._over(_bytes_of(tensor))
        if tensor.dtype not in DTYPE_NAMES:
            raise Refused("impossible", f"the result would be of {tensor.dtype}, which does not travel")

    def _over(self, size: int) -> Refused:
        return Refused(
            "too_large", f"a tensor of {size} bytes, and at most {self._policy.largest} are allowed here: work in parts"
        )

    # ── operations ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _call(self, ask: Call, behind: bytes) -> Made | MadeSeveral:
        operation = OPERATIONS.get(ask.operation)
        if operation is None or operation.name not in self._policy.operations:
            raise Refused("not_allowed", f"the operation {ask.operation!r} is not on the list of what may be done here")
        if len(ask.arguments) > len(operation.takes) or not ask.named.keys() <= {*operation.takes, *operation.named}:
            takes = ", ".join((*operation.takes, *sorted(operation.named)))
            raise Refused("not_allowed", f"{operation.name} takes {takes} here, and nothing else")
        used: dict[int, _Kept] = {}
        arguments = [
            self._argument(operation, *each, used) for each in zip(operation.takes, ask.arguments, strict=False)
        ]
        named = {name: self._argument(operation, name, value, used) for name, value in ask.named.items()}
        bound = [*arguments, *(named.get(name) for name in operation.takes[len(arguments) :])]
        changed = [bound[at] for at in operation.changes]
        for tensor in changed:
            if isinstance(tensor, Tensor) and _memory(tensor) in self._owned:
                raise Refused("not_yours", f"{operation.name} would change a tensor of the owner's: clone() it first")
        private = any(kept.private for kept in used.values())
        with torch.set_grad_enabled(ask.graph):
            if not self._surely_fits(operation, [*bound, *named.values()]):
                for result in self._tried(operation, arguments, named):
                    self._within(result)
            try:
                results = self._computed(operation, arguments, named, private)
            finally:
                if private:
                    self._become_private(tensor for tensor in changed if isinstance(tensor, Tensor))
        same = {id(kept.tensor): number for number, kept in used.items()}
        self._room(sum(id(result) not in same for result in results))
        self._count(results, used.values())
        made: list[Made] = []
        try:
            for result in results:
                number = same.get(id(result))
                made.append(self._keep(result, private=private) if number is None else _made(number, result))
        except Refused:
            for each in made:
                if each.id not in used:
                    self._forget(each.id)
            raise
        return made[0] if len(made) == 1 else MadeSeveral(tuple(made))

    def _argument(self, operation: Operation, name: str, value: Any, used: dict[int, _Kept]) -> Any:
        own: dict[int, _Kept] = {}
        found = self._value(value, own)
        used.update(own)
        if own and name not in TENSORS:
            raise Refused("not_allowed", f"`{name}` of {operation.name} is a number here, and not a tensor")
        if TELLS.get(operation.name) == name and any(
            kept.private and not kept.tensor.is_floating_point() for kept in own.values()
        ):
            raise Refused(
                "private",
                f"`{name}` of {operation.name} depends on its owner's data, and whether it fails would tell the numbers: use "
                "one that you sent",
            )
        return found

    def _value(self, value: Any, used: dict[int, _Kept]) -> Any:
        """What an argument stands for. used: takes up the tensors."""
        match value:
            case Ref(number):
                used[number] = self._of(number)
                return used[number].tensor
            case Dtype(name):
                return DTYPES[name]
            case Slice(start, stop, step):
                return slice(start, stop, step)
            case Dots():
                return ...
            case NotFinite(text):
                return float(text)
            case Items(items, as_list):
                inner = [self._value(item, used) for item in items]
                return inner if as_list else tuple(inner)
            case _:
                return value

    def _surely_fits(self, operation: Operation, arguments: list[Any]) -> bool:
        """Whether shapes alone tell that no result is too large, before it is there."""
        try:
            return operation.size is not None and operation.size(arguments) * 8 <= self._policy.largest
        except (AttributeError, IndexError, ValueError, TypeError):
            return False  # not the arguments it takes: torch says which

    def _tried(self, operation: Operation, arguments: list[Any], named: dict[str, Any]) -> list[Tensor]:
        """The results without their numbers, on nothing but shapes."""
        try:
            shapes = [_hollow(argument) for argument in arguments]
            return _several(operation.function(*shapes, **{name: _hollow(value) for name, value in named.items()}))
        except Exception as error:
            if isinstance(error, NotImplementedError) or " meta " in str(error):
                raise Refused(
                    "impossible",
                    f"{operation.name}: the shape of the result would depend on numbers in a tensor, and that is not done here",
                ) from error
            raise _impossible(operation, error) from error

    def _computed(
        self, operation: Operation, arguments: list[Any], named: dict[str, Any], private: bool
    ) -> list[Tensor]:
        try:
            return _several((operation.closed if private else operation.function)(*arguments, **named))
        except Exception as error:
            raise _impossible(operation, error) from error

    def _count(self, results: list[Tensor], used: Iterable[_Kept]) -> None:
        """Count what autograd keeps for a step, as all of its tensors, for as long as it has the step."""
        nodes = {result.grad_fn for result in results} - {None}
        if nodes:
            tensors = {_memory(tensor): tensor for tensor in (*results, *(kept.tensor for kept in used))}
            sizes = (_Memory(tensor).bytes for at, tensor in tensors.items() if at not in self._owned)
            size = NODE + sum(sizes)
            self._afford(size)
            share = _Share(self._graph, size)
            for node in nodes:
                cast(Any, node).metadata.setdefault("sumus", []).append(share)

    # ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _backward(self, ask: Backward, behind: bytes) -> Nothing:
        kept = self._of(ask.id)
        gradient = None if ask.gradient is None else self._of(ask.gradient)
        leaves = _leaves(kept.tensor) if kept.private or (gradient is not None and gradient.private) else []
        try:
            # A copy: torch may make what it is given a leaf's gradient, to be added to in place later on.
            kept.tensor.backward(None if gradient is None else gradient.tensor.clone(), retain_graph=ask.keep)
        except Exception as error:
            raise Refused("impossible", f"backward: {_first_line(error)}") from error
        finally:
            self._become_private((), leaves)
        return Nothing()

    def _gradient(self, ask: Gradient, behind: bytes) -> Made | Nothing:
        kept = self._of(ask.id)
        if not kept.tensor.is_leaf or kept.tensor.grad is None:
            return Nothing()
        return self._keep(kept.tensor.grad, private=kept.gradient_private)

    def _set_gradient(self, ask: SetGradient, behind: bytes) -> Nothing:
        kept = self._of(ask.id)
        to = None if ask.to is None else self._of(ask.to)
        if to is not None and _memory(to.tensor) in self._owned:
            raise Refused("not_yours", "backward() would add to a tensor of the owner's: clone() it first")
        try:
            kept.tensor.grad = None if to is None else to.tensor
        except RuntimeError as error:
            raise Refused("impossible", f"grad: {_first_line(error)}") from error
        for other in self._kept.values():
            if other.tensor is kept.tensor:
                other.gradient_private = to is not None and to.private
        return Nothing()

    def _learn(self, ask: Learn, behind: bytes) -> Made:
        kept = self._of(ask.id)
        try:
            kept.tensor.requires_grad_(ask.learns)
        except RuntimeError as error:
            raise Refused("impossible", f"requires_grad: {_first_line(error)}") from error
        self._reserve(kept)
        return _made(ask.id, kept.tensor)

    def _become_private(self, changed: Iterable[Tensor], leaves: Iterable[Tensor] = ()) -> None:
        """Mark whatever shares memory with tensors that have changed, or with the gradients of leaves."""
        memories = {_memory(tensor) for tensor in changed}
        memories |= {_memory(leaf.grad) for leaf in leaves if leaf.grad is not None}
        memories.discard(0)
        if not memories:
            return
        for kept in self._kept.values():
            kept.private = kept.private or _memory(kept.tensor) in memories
            if kept.tensor.is_leaf and kept.tensor.grad is not None:
                kept.gradient_private = kept.gradient_private or _memory(kept.tensor.grad) in memories


class _Tally:
    """Bytes that autograd keeps, counted from above."""

    def __init__(self) -> None:
        self.bytes = 0


class _Share:
    """What one step of the graph counts as; it is kept with the step, and goes with it."""

    def __init__(self, tally: _Tally, size: int) -> None:
        self._tally, self._size = tally, size
        tally.bytes += size

    def __del__(self) -> None:
        self._tally.bytes -= self._size


def as_tensor(array: Array) -> Tensor:
    """A tensor in memory that torch has allotted: where its kernels begin, and so in which order they add, depends on that."""
    return torch.from_numpy(array).clone()


def _made(number: int, tensor: Tensor) -> Made:
    return Made(number, tuple(tensor.shape), cast(Any, DTYPE_NAMES[tensor.dtype]), tensor.requires_grad, tensor.is_leaf)


def _memory(tensor: Tensor) -> int:
    """Where a tensor's numbers lie, as the address of all that it shares them with; 0 where there are none."""
    return tensor.untyped_storage().data_ptr()


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _hollow(value: Any) -> Any:
    """The same on the device that has no numbers."""
    if isinstance(value, Tensor):
        hollow = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        hollow.requires_grad_(value.requires_grad)
        return hollow if value.is_leaf else hollow.clone()
    if isinstance(value, list | tuple):
        return type(value)(_hollow(each) for each in cast(Any, value))
    return value


def _several(results: Any) -> list[Tensor]:
    found = list(tensors_in([results]))
    if not found:
        raise TypeError("it has no tensor as a result")
    return found


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor was computed from."""
    found: list[Tensor] = []
    seen, waiting = set[Any](), [tensor.grad_fn]
    if tensor.grad_fn is None:
        return [tensor]
    while waiting:
        node: Any = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [node.variable] if hasattr(node, "variable") else []
            waiting += [following for following, _ in node.next_functions]
    return found


def _impossible(operation: Operation, error: Exception) -> Refused:
    return Refused("impossible", f"{operation.name}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
