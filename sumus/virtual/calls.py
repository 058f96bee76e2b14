"""The operations that a caller requests from a worker.

    calls = OperationCalls(held)
    calls.do(Call("add", (Ref(1), Ref(2))))            keeps the results, and returns their shapes and dtypes

**Responses about private tensors** are decided before the tensors' numbers are used. Shapes and most errors come from an
outline (`outline.py`), which has no numbers. Other errors come from a trial call with zeros in place of private numbers. If
the operation itself then fails, private numbers are the cause. The caller must not learn this, so the result is NaN.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sumus.logs import logger
from sumus.virtual.graph import GraphStep, record, saving
from sumus.virtual.held import HeldTensor, HeldTensors
from sumus.virtual.messages import Call, Dtype, EllipsisIndex, Items, NotFinite, Ref, Slice, TensorMade, TensorsMade
from sumus.virtual.operations import DTYPES, OPERATIONS, TELLS, Operation
from sumus.virtual.outline import BoundCall, Form, Outline, OutlineResult, bytes_of, outline_of, with_blanks
from sumus.virtual.refusal import RequestRefused, first_line, impossible

LOG = logger("sumus.worker")
MOST_OUTLINES = 2000
"""The largest number of outlines that are kept."""
DEEPEST = 32
"""The deepest nesting of lists in an argument."""


class OperationCalls:
    """Performs the operations of one caller.

    Args:
        held: The caller's tensors.
    """

    def __init__(self, held: HeldTensors) -> None:
        self._held = held
        self._outlines: dict[Form, Outline] = {}

    def do(self, ask: Call) -> TensorMade | TensorsMade:
        """Perform an operation, and keep its results.

        Raises:
            RequestRefused: The operation is not allowed, is not possible, or exceeds a limit.
        """
        used: dict[int, HeldTensor] = {}
        call = self._bound(ask, used)
        private = {id(kept.tensor) for kept in used.values() if self._held.is_private(kept.tensor)}
        outline = self._outline(call, private)
        self._held.check_room(sum(result.same is None for result in outline.results))
        try:
            results = self._computed(call, outline) if private else self._plainly(call)
        finally:
            if private:
                self._held.memories.make_private(call.changed())
        if private:
            self._held.memories.make_private(results)
        record(results, lambda: GraphStep(self._held.graphs, outline))
        return self._held.keep_results(results, {id(kept.tensor): number for number, kept in used.items()})

    def _bound(self, ask: Call, used: dict[int, HeldTensor]) -> BoundCall:
        """Return the call that a request describes. Its tensors are added to `used`, by number."""
        operation = OPERATIONS.get(ask.operation)
        if operation is None or operation.name not in self._held.policy.operations:
            raise RequestRefused(
                "not_allowed", f"the operation {ask.operation!r} is not one of those that this worker allows"
            )
        if len(ask.arguments) > len(operation.takes) or not ask.named.keys() <= {*operation.takes, *operation.named}:
            takes = ", ".join((*operation.takes, *sorted(operation.named)))
            raise RequestRefused("not_allowed", f"at a worker, {operation.name} takes only {takes}")
        arguments = [
            self._argument(operation, *each, used) for each in zip(operation.takes, ask.arguments, strict=False)
        ]
        named = {name: self._argument(operation, name, value, used) for name, value in ask.named.items()}
        call = BoundCall(operation, tuple(arguments), named, ask.graph)
        if any(self._held.memories.is_owned(tensor) for tensor in call.changed()):
            raise RequestRefused(
                "not_yours", f"{operation.name} would change one of the owner's tensors: clone() it first"
            )
        return call

    def _argument(self, operation: Operation, name: str, value: Any, used: dict[int, HeldTensor]) -> Any:
        own: dict[int, HeldTensor] = {}
        found = self._value(value, own)
        used.update(own)
        if own and name not in operation.tensors:
            raise RequestRefused("not_allowed", f"`{name}` of {operation.name} must be a number here, not a tensor")
        if TELLS.get(operation.name) == name and any(
            self._held.is_private(kept.tensor) and not kept.tensor.is_floating_point() for kept in own.values()
        ):
            raise RequestRefused(
                "private",
                f"`{name}` of {operation.name} depends on the owner's data, and an error would reveal the data: use a tensor "
                "that you sent",
            )
        return found

    def _value(self, value: Any, used: dict[int, HeldTensor], depth: int = 0) -> Any:
        """Return the value that an argument stands for. Its tensors are added to `used`, by number."""
        match value:
            case Ref(number):
                used[number] = self._held.of(number)
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
                    raise RequestRefused("malformed", f"lists are nested more than {DEEPEST} deep")
                inner = [self._value(item, used, depth + 1) for item in items]
                return inner if as_list else tuple(inner)
            case _:
                return value

    def _outline(self, call: BoundCall, private: Collection[int]) -> Outline:
        """Return the outline of a call. Refuse the call if the outline or a trial shows that it is not possible.

        Args:
            call: The call.
            private: The `id()` of each private tensor of the call.
        """
        form = call.form(private)
        outline = None if form is None else self._outlines.get(form)
        if outline is None:
            outline = self._drawn(call, bool(private))
        for result in outline.results:
            self._held.check_form(result.shape, result.dtype)
        blanks = sum(bytes_of(tensor.shape, tensor.dtype) for tensor in call.tensors()) if private else 0
        self._held.check_memory(outline.bytes + blanks)
        self._held.check_time(outline.steps * (2 if private else 1))  # a call on private tensors also runs as a trial
        self._without_cycle(call, outline)
        if private and not outline.tried:
            outline.results = self._tried(call, outline.results)
            # Integers may be indices, and then their public numbers matter too: such a call is tried each time.
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
                    f"{name}: the shape of the result would depend on numbers in a tensor, which a worker does not allow",
                ) from error
            raise impossible(name, error) from error

    def _without_cycle(self, call: BoundCall, outline: Outline) -> None:
        """Refuse a call that would give a history (autograd's `grad_fn`) to a leaf.

        A leaf is part of the graphs that computed its gradients. If it got a history as well, it could be part of its
        own history, and that memory would never be freed.
        """
        tensors = call.tensors()
        for result in outline.results:
            before = None if result.same is None else tensors[result.same]
            if (
                before is not None
                and result.learns
                and not before.requires_grad
                and self._held.memories.note(before).learned
            ):
                raise RequestRefused(
                    "impossible",
                    f"{call.operation.name} would overwrite a tensor that has required a gradient: clone() it first, or use "
                    "no_grad()",
                )

    def _tried(self, call: BoundCall, results: list[OutlineResult]) -> list[OutlineResult]:
        """Perform a call with zeros in place of private and changed tensors, so that an error reveals no private number.

        Returns:
            The results, with the dtypes that the CPU's kernels give. They may differ from those of the device `meta`.
        """
        try:
            made = with_blanks(call, self._held.is_private).results(closed=True)
        except Exception as error:
            raise impossible(call.operation.name, error) from error
        return [
            replace(each, shape=tuple(blank.shape), dtype=blank.dtype)
            for each, blank in zip(results, made, strict=True)
        ]

    def _plainly(self, call: BoundCall) -> list[Tensor]:
        """Perform a call on public tensors."""
        try:
            with saving(self._held.memories.note):
                return call.results(closed=False)
        except Exception as error:
            raise impossible(call.operation.name, error) from error

    def _computed(self, call: BoundCall, outline: Outline) -> list[Tensor]:
        """Perform a call on private tensors. The caller gets NaN and no error if it fails, since only private numbers can make
        it fail now."""
        try:
            with saving(self._held.memories.note):
                results = call.results(closed=True)
            if [_told(result) for result in results] == [
                (each.shape, each.dtype, each.learns) for each in outline.results
            ]:
                return results
            LOG.error("%s returned tensors that differ from its outline, so the caller gets NaN", call.operation.name)
        except Exception as error:
            name, why = call.operation.name, first_line(error)
            LOG.error("%s failed on private numbers, so the caller gets NaN: %s", name, why)
        with torch.no_grad():
            for tensor in call.changed():
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        tensors = call.tensors()
        return [_unknown(each, tensors) if each.same is None else tensors[each.same] for each in outline.results]


def _told(result: Tensor) -> tuple[Any, ...]:
    return tuple(result.shape), result.dtype, result.requires_grad


def _unknown(result: OutlineResult, tensors: list[Tensor]) -> Tensor:
    """Return NaN, or 0 for integers, in place of a result. NaN also flows back as the gradient of the tensors that the
    call used."""
    unknown = torch.full(result.shape, float("nan") if result.dtype.is_floating_point else 0, dtype=result.dtype)
    if result.learns:
        for tensor in tensors:
            if tensor.requires_grad:
                unknown = unknown + (tensor.sum() * float("nan")).to(result.dtype)
    return unknown
