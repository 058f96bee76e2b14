"""A caller's tensors at a worker: what may be done with them, how many there may be, and what may leave. Bytes in, bytes out.

    bench = Workbench({"inputs": inputs}, policy)
    answer = bench.answer(body)                    both of sumus/virtual/messages.py

The in-process worker and the one that listens on a socket are this, and nothing beside it. Autograd runs here: a pointer knows of
it only whether it requires a gradient.

**What is private.** The owner's tensors are, and what is computed from them: results, gradients, and whatever either is written
into. Privacy belongs to memory (`Memories`). **What is answered** about private tensors is known before their numbers are looked
at: shapes and most errors from an outline without numbers, other errors from a try with zeros in the place of private numbers. If
the operation itself fails then, the failure is because of private numbers, and is not told: the result is NaN.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from sumus.errors import ParticipantError
from sumus.logs import logger
from sumus.text import printable
from sumus.types import Array
from sumus.virtual.graph import GraphBytes, GraphStep, record, saving, survey
from sumus.virtual.memory import Memories
from sumus.virtual.messages import (
    OVERHEAD,
    Backward,
    Call,
    Code,
    CountHeld,
    Dtype,
    EllipsisIndex,
    EmptyAnswer,
    FetchAnswer,
    FetchTensor,
    Gradient,
    HeldAnswer,
    Items,
    NotFinite,
    Ref,
    RefusalAnswer,
    SendTensor,
    SetGradient,
    SetRequiresGrad,
    Slice,
    TensorMade,
    TensorsMade,
    UseOffered,
    WorkerAnswer,
    WorkerRequest,
    read,
    read_tensor,
    write,
)
from sumus.virtual.operations import DTYPE_NAMES, DTYPES, OPERATIONS, TELLS, Operation
from sumus.virtual.outline import (
    STEPS_A_SECOND,
    BoundCall,
    Form,
    Outline,
    OutlineResult,
    bytes_of,
    outline_of,
    with_blanks,
)
from sumus.virtual.policy import Policy

LOG = logger("sumus.worker")
MOST_OUTLINES = 2000
"""Outlines of calls that are kept."""
MOST_DIMENSIONS = 64
"""As many as torch's kernels take."""
DEEPEST = 32
"""Lists within lists of an argument."""


class RequestRefused(Exception):
    """A request is answered with a refusal."""

    def __init__(self, code: Code, detail: str) -> None:
        super().__init__(printable(f"{code}: {detail}"))
        self.code: Code = code
        self.detail = detail


@dataclass
class _Kept:
    """A tensor.

    sent: by the caller.
    gradient: the number of the tensor that its gradient was last known by.
    """

    tensor: Tensor
    sent: bool = False
    gradient: int | None = None


class Workbench:
    """One caller's. tensors: the owner's, by name; they are never changed."""

    def __init__(self, tensors: Mapping[str, Tensor], policy: Policy) -> None:
        self._offered, self._policy = tensors, policy
        self._memories = Memories(tensors, policy.public)
        self._graphs = GraphBytes()
        self._outlines: dict[Form, Outline] = {}
        self._kept: dict[int, _Kept] = {}
        self._next = 0
        self._last, self._said = -1, b""
        self._lock = threading.Lock()

    def answer(self, body: bytes) -> bytes:
        """The answer to a request. Any thread may call; the same request again has the same answer, and is done once."""
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
                    self._forget(number)
                if isinstance(asked.ask, FetchTensor):
                    return write(*self._fetch(asked.ask))  # not kept: it may be large, and may be done twice
                self._said = write(WorkerAnswer(_DOES[type(asked.ask)](self, asked.ask, behind)))
                return self._said
            except ParticipantError as error:
                return write(WorkerAnswer(RefusalAnswer("malformed", str(error))))
            except RequestRefused as no:
                self._said = write(WorkerAnswer(RefusalAnswer(no.code, no.detail)))
                return self._said
            except Exception as error:
                LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
                self._said = write(WorkerAnswer(RefusalAnswer("failed", "a defect of the worker, which is in its log")))
                return self._said

    # ── tensors come and go ──────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, ask: SendTensor, behind: bytes) -> TensorMade:
        if len(behind) > self._policy.largest + OVERHEAD:
            raise self._over(len(behind))
        self._afford(2 * len(behind))  # read, and copied to where torch wants it
        tensor = as_tensor(read_tensor(behind))
        if ask.learns and not tensor.is_floating_point():
            raise RequestRefused("impossible", f"a tensor of {DTYPE_NAMES[tensor.dtype]} has no gradient: send floats")
        return self._keep(tensor.requires_grad_(ask.learns), sent=True)

    def _use(self, ask: UseOffered, behind: bytes) -> TensorMade:
        if ask.name not in self._offered:
            known = ", ".join(sorted(self._offered)) or "none"
            raise RequestRefused("unknown_name", f"its owner offers no tensor {ask.name!r}; there is: {known}")
        return self._keep(self._offered[ask.name].detach())

    def _fetch(self, ask: FetchTensor) -> tuple[WorkerAnswer, Array]:
        kept = self._of(ask.id)
        if self._memories.is_private(kept.tensor) and not (
            self._policy.fetch == "all" or (self._policy.fetch == "parameters" and kept.sent)
        ):
            if self._policy.fetch == "parameters":
                only = "of what does, only a model that you sent and trained may be fetched"
            else:
                only = "and may not be fetched; its owner may have a policy that lets it"
            raise RequestRefused("private", f"this tensor depends on its owner's data, {only}")
        self._afford(2 * bytes_of(kept.tensor.shape, kept.tensor.dtype))
        return WorkerAnswer(FetchAnswer(kept.tensor.requires_grad)), kept.tensor.detach().resolve_neg().numpy()

    def _forget(self, number: int) -> None:
        self._kept.pop(number, None)

    def _count(self, ask: CountHeld, behind: bytes) -> HeldAnswer:
        return HeldAnswer(len(self._kept), self._memories.in_use() + self._graphs.bytes)

    def _keep(self, tensor: Tensor, sent: bool = False) -> TensorMade:
        self._room(1)
        self._within(tensor.shape, tensor.dtype)
        memory = self._memories.note(tensor)
        self._afford(0)
        memory.learned = memory.learned or (tensor.requires_grad and tensor.is_leaf)
        number, self._next = self._next, self._next + 1
        self._kept[number] = _Kept(tensor, sent)
        return _made(number, tensor)

    def _afford(self, more: int) -> None:
        if not self._memories.fits(more + self._graphs.bytes, self._policy.held):
            raise RequestRefused(
                "too_many",
                f"you would hold more than {self._policy.held} bytes here, with what is needed on the way: let go of pointers",
            )

    def _in_time(self, steps: int) -> None:
        seconds = steps / STEPS_A_SECOND
        if seconds > self._policy.seconds:
            raise RequestRefused(
                "too_large",
                f"this may take {seconds:.0f} s, and at most {self._policy.seconds:g} are allowed for a request: work in parts",
            )

    def _of(self, number: int) -> _Kept:
        kept = self._kept.get(number)
        if kept is None:
            raise RequestRefused(
                "unknown_tensor", f"there is no tensor {number} of yours here: was its pointer let go of?"
            )
        return kept

    def _room(self, more: int) -> None:
        if len(self._kept) + more > self._policy.tensors:
            raise RequestRefused(
                "too_many", f"you hold {self._policy.tensors} tensors here, the most: let go of pointers"
            )

    def _within(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        if (size := bytes_of(shape, dtype)) > self._policy.largest:
            raise self._over(size)
        if dtype not in DTYPE_NAMES:
            raise RequestRefused("impossible", f"the result would be of {dtype}, which does not travel")
        if len(shape) > MOST_DIMENSIONS:
            raise RequestRefused(
                "impossible", f"this has {len(shape)} dimensions, and at most {MOST_DIMENSIONS} are taken here"
            )

    def _over(self, size: int) -> RequestRefused:
        return RequestRefused(
            "too_large", f"a tensor of {size} bytes, and at most {self._policy.largest} are allowed here: work in parts"
        )

    # ── operations ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _call(self, ask: Call, behind: bytes) -> TensorMade | TensorsMade:
        used: dict[int, _Kept] = {}
        call = self._bound(ask, used)
        private = {id(kept.tensor) for kept in used.values() if self._memories.is_private(kept.tensor)}
        outline = self._outline(call, private)
        self._room(sum(result.same is None for result in outline.results))
        try:
            results = self._computed(call, outline) if private else self._plainly(call)
        finally:
            if private:
                self._memories.make_private(call.changed())
        if private:
            self._memories.make_private(results)
        record(results, lambda: GraphStep(self._graphs, outline))
        return self._made(results, {id(kept.tensor): number for number, kept in used.items()})

    def _bound(self, ask: Call, used: dict[int, _Kept]) -> BoundCall:
        """The call that is asked for. used: takes up its tensors."""
        operation = OPERATIONS.get(ask.operation)
        if operation is None or operation.name not in self._policy.operations:
            raise RequestRefused(
                "not_allowed", f"the operation {ask.operation!r} is not on the list of what may be done here"
            )
        if len(ask.arguments) > len(operation.takes) or not ask.named.keys() <= {*operation.takes, *operation.named}:
            takes = ", ".join((*operation.takes, *sorted(operation.named)))
            raise RequestRefused("not_allowed", f"{operation.name} takes {takes} here, and nothing else")
        arguments = [
            self._argument(operation, *each, used) for each in zip(operation.takes, ask.arguments, strict=False)
        ]
        named = {name: self._argument(operation, name, value, used) for name, value in ask.named.items()}
        call = BoundCall(operation, tuple(arguments), named, ask.graph)
        if any(self._memories.is_owned(tensor) for tensor in call.changed()):
            raise RequestRefused(
                "not_yours", f"{operation.name} would change a tensor of the owner's: clone() it first"
            )
        return call

    def _made(self, results: list[Tensor], same: Mapping[int, int]) -> TensorMade | TensorsMade:
        """Keep results. same: numbers of tensors that are kept already, by their id."""
        made: list[TensorMade] = []
        try:
            for result in results:
                number = same.get(id(result))
                made.append(self._keep(result) if number is None else _made(number, result))
        except RequestRefused:
            for each in made:
                if each.id not in same.values():
                    self._forget(each.id)
            raise
        return made[0] if len(made) == 1 else TensorsMade(tuple(made))

    def _argument(self, operation: Operation, name: str, value: Any, used: dict[int, _Kept]) -> Any:
        own: dict[int, _Kept] = {}
        found = self._value(value, own)
        used.update(own)
        if own and name not in operation.tensors:
            raise RequestRefused("not_allowed", f"`{name}` of {operation.name} is a number here, and not a tensor")
        if TELLS.get(operation.name) == name and any(
            self._memories.is_private(kept.tensor) and not kept.tensor.is_floating_point() for kept in own.values()
        ):
            raise RequestRefused(
                "private",
                f"`{name}` of {operation.name} depends on its owner's data, and whether it fails would tell the numbers: use "
                "one that you sent",
            )
        return found

    def _value(self, value: Any, used: dict[int, _Kept], depth: int = 0) -> Any:
        """What an argument stands for. used: takes up the tensors."""
        match value:
            case Ref(number):
                used[number] = self._of(number)
                return used[number].tensor
            case Dtype(name):
                return DTYPES[name]
            case Slice(start, stop, step):
                return slice(start, stop, step)
            case EllipsisIndex():
                return ...
            case NotFinite(text):
                return float(text)
            case Items(items, as_list):
                if depth == DEEPEST:
                    raise RequestRefused("malformed", f"lists lie in each other more than {DEEPEST} deep")
                inner = [self._value(item, used, depth + 1) for item in items]
                return inner if as_list else tuple(inner)
            case _:
                return value

    def _outline(self, call: BoundCall, private: Collection[int]) -> Outline:
        """The outline of a call that is within the limits, and may be done as far as can be known without private numbers.

        private: ids of the private tensors.
        """
        form = call.form(private)
        outline = None if form is None else self._outlines.get(form)
        if outline is None:
            outline = self._drawn(call, bool(private))
        for result in outline.results:
            self._within(result.shape, result.dtype)
        blanks = sum(bytes_of(tensor.shape, tensor.dtype) for tensor in call.tensors()) if private else 0
        self._afford(outline.bytes + blanks)
        self._in_time(outline.steps * (2 if private else 1))  # with the try
        self._without_cycle(call, outline)
        if private and not outline.tried:
            outline.results = self._tried(call, outline.results)
            # Whole numbers may be indices, whose public numbers decide too: such a call is tried each time.
            outline.tried = all(id(each) in private or each.is_floating_point() for each in call.tensors())
        if form is not None:
            if len(self._outlines) >= MOST_OUTLINES:
                self._outlines.clear()
            self._outlines[form] = outline
        return outline

    def _drawn(self, call: BoundCall, closed: bool) -> Outline:
        name = call.operation.name
        try:
            return outline_of(call, closed)
        except Exception as error:
            if isinstance(error, NotImplementedError) or " meta " in str(error):
                raise RequestRefused(
                    "impossible",
                    f"{name}: the shape of the result would depend on numbers in a tensor, and that is not done here",
                ) from error
            raise _impossible(name, error) from error

    def _without_cycle(self, call: BoundCall, outline: Outline) -> None:
        """A leaf is part of the graphs that it learnt by. If it got a history as well, it could be part of its own history, and
        that memory would never come back."""
        tensors = call.tensors()
        for result in outline.results:
            before = None if result.same is None else tensors[result.same]
            if (
                before is not None
                and result.learns
                and not before.requires_grad
                and self._memories.note(before).learned
            ):
                raise RequestRefused(
                    "impossible",
                    f"{call.operation.name} would make a result of a tensor that has learnt: clone() it first, or use no_grad()",
                )

    def _tried(self, call: BoundCall, results: list[OutlineResult]) -> list[OutlineResult]:
        """Do a call with blanks in the place of private tensors and of changed ones, so that an error tells no private number.

        Returns:
            The results, with the dtypes of the processor's kernels, which may be others than those of the device `meta`.
        """
        try:
            made = with_blanks(call, self._memories.is_private).results(closed=True)
        except Exception as error:
            raise _impossible(call.operation.name, error) from error
        return [
            replace(each, shape=tuple(blank.shape), dtype=blank.dtype)
            for each, blank in zip(results, made, strict=True)
        ]

    def _plainly(self, call: BoundCall) -> list[Tensor]:
        """The results of a call on public tensors."""
        try:
            with saving(self._memories.note):
                return call.results(closed=False)
        except Exception as error:
            raise _impossible(call.operation.name, error) from error

    def _computed(self, call: BoundCall, outline: Outline) -> list[Tensor]:
        """The results of a call on private tensors. Nothing is refused any more: a failure is because of private numbers."""
        try:
            with saving(self._memories.note):
                results = call.results(closed=True)
            if [_told(result) for result in results] == [
                (each.shape, each.dtype, each.learns) for each in outline.results
            ]:
                return results
            LOG.error("%s gave other tensors than its outline says: the caller gets NaN", call.operation.name)
        except Exception as error:
            name, why = call.operation.name, _first_line(error)
            LOG.error("%s failed on private numbers, so the caller gets NaN: %s", name, why)
        with torch.no_grad():
            for tensor in call.changed():
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        tensors = call.tensors()
        return [_unknown(each, tensors) if each.same is None else tensors[each.same] for each in outline.results]

    # ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _backward(self, ask: Backward, behind: bytes) -> EmptyAnswer:
        root = self._of(ask.id).tensor
        gradient = None if ask.gradient is None else self._of(ask.gradient).tensor
        found = survey(root)
        self._afford(found.bytes)
        self._in_time(found.steps)
        private = self._memories.is_private(root) or (gradient is not None and self._memories.is_private(gradient))
        before = [leaf.grad is not None and self._memories.is_private(leaf.grad) for leaf in found.leaves]
        try:
            # A copy: torch may make what it is given a leaf's gradient, to be added to in place later on.
            root.backward(None if gradient is None else gradient.clone(), retain_graph=ask.keep)
        except Exception as error:
            raise RequestRefused("impossible", f"backward: {_first_line(error)}") from error
        finally:
            for leaf, was_private in zip(found.leaves, before, strict=True):
                if leaf.grad is not None:
                    memory = self._memories.note(leaf.grad)
                    memory.private = memory.private or private or was_private
        return EmptyAnswer()

    def _gradient(self, ask: Gradient, behind: bytes) -> TensorMade | EmptyAnswer:
        kept = self._of(ask.id)
        if not kept.tensor.is_leaf or kept.tensor.grad is None:
            return EmptyAnswer()
        known = None if kept.gradient is None else self._kept.get(kept.gradient)
        if known is not None and known.tensor.is_set_to(kept.tensor.grad):
            return _made(cast(int, kept.gradient), known.tensor)
        # An alias: what the caller does with it gives the gradient itself no history, and no gradient of its own.
        made = self._keep(kept.tensor.grad.detach())
        kept.gradient = made.id
        return made

    def _set_gradient(self, ask: SetGradient, behind: bytes) -> EmptyAnswer:
        kept = self._of(ask.id)
        to = None if ask.to is None else self._of(ask.to).tensor
        if to is not None and self._memories.is_owned(to):
            raise RequestRefused("not_yours", "backward() would add to a tensor of the owner's: clone() it first")
        try:
            kept.tensor.grad = None if to is None else to.detach()
        except RuntimeError as error:
            raise RequestRefused("impossible", f"grad: {_first_line(error)}") from error
        kept.gradient = ask.to
        return EmptyAnswer()

    def _learn(self, ask: SetRequiresGrad, behind: bytes) -> TensorMade:
        kept = self._of(ask.id)
        try:
            kept.tensor.requires_grad_(ask.learns)
        except RuntimeError as error:
            raise RequestRefused("impossible", f"requires_grad: {_first_line(error)}") from error
        memory = self._memories.note(kept.tensor)
        memory.learned = memory.learned or ask.learns
        return _made(ask.id, kept.tensor)


_DOES: dict[type, Callable[[Workbench, Any, bytes], Any]] = {
    SendTensor: Workbench._send,  # pyright: ignore[reportPrivateUsage]
    UseOffered: Workbench._use,  # pyright: ignore[reportPrivateUsage]
    Call: Workbench._call,  # pyright: ignore[reportPrivateUsage]
    Backward: Workbench._backward,  # pyright: ignore[reportPrivateUsage]
    Gradient: Workbench._gradient,  # pyright: ignore[reportPrivateUsage]
    SetGradient: Workbench._set_gradient,  # pyright: ignore[reportPrivateUsage]
    SetRequiresGrad: Workbench._learn,  # pyright: ignore[reportPrivateUsage]
    CountHeld: Workbench._count,  # pyright: ignore[reportPrivateUsage]
}
"""What is done for each request. It is no attribute of a workbench: one that held its own methods would never go by itself."""


def as_tensor(array: Array) -> Tensor:
    """A tensor in memory that torch has allotted: where its kernels begin, and so in which order they add, depends on that."""
    return torch.from_numpy(array).clone()


def _made(number: int, tensor: Tensor) -> TensorMade:
    return TensorMade(
        number, tuple(tensor.shape), cast(Any, DTYPE_NAMES[tensor.dtype]), tensor.requires_grad, tensor.is_leaf
    )


def _told(result: Tensor) -> tuple[Any, ...]:
    return tuple(result.shape), result.dtype, result.requires_grad


def _unknown(result: OutlineResult, tensors: list[Tensor]) -> Tensor:
    """NaN, or 0 in whole numbers, in the place of a result. NaN flows back from it to the tensors that the result would be of."""
    unknown = torch.full(result.shape, float("nan") if result.dtype.is_floating_point else 0, dtype=result.dtype)
    if result.learns:
        for tensor in tensors:
            if tensor.requires_grad:
                unknown = unknown + (tensor.sum() * float("nan")).to(result.dtype)
    return unknown


def _impossible(name: str, error: Exception) -> RequestRefused:
    return RequestRefused("impossible", f"{name}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
