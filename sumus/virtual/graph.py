"""Autograd's graph at a worker: the memory that it keeps, and the memory and time that a backward pass will take.

Every tensor that autograd saves goes through `saving`, which saves an alias. The alias shares the tensor's memory and
version counter, but has no history. So no tensor keeps itself alive through its own history, and a graph is freed as
soon as nothing refers to it.
"""

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from sumus.virtual.outline import Outline, bytes_of

STEP_BYTES = 2048
"""Bytes that are counted for one operation in a graph, in addition to the tensors that it saves."""
BACKWARD = 3
"""The largest ratio between the time of an operation's backward pass and the time of the operation: for a matrix product,
the backward pass takes two products and one addition."""


class GraphBytes:
    """The bytes of all operations in a caller's graphs."""

    def __init__(self) -> None:
        self.bytes = 0


class GraphStep:
    """One operation in a graph. Autograd keeps it with the operation's node, and frees it with the node."""

    def __init__(self, tally: GraphBytes, outline: Outline) -> None:
        self.bytes, self.steps = outline.bytes, outline.steps
        self._tally = tally
        tally.bytes += STEP_BYTES

    def __del__(self) -> None:
        self._tally.bytes -= STEP_BYTES


def record(results: list[Tensor], step: Callable[[], GraphStep]) -> None:
    """Attach a step to the nodes of the graph that made these results, if such nodes exist."""
    nodes = {result.grad_fn for result in results} - {None}
    if nodes:
        made = step()
        for node in nodes:
            cast(Any, node).metadata.setdefault(__name__, []).append(made)


@contextmanager
def saving(note: Callable[[Tensor], Any]) -> Iterator[None]:
    """In the block, pass each tensor that autograd saves to `note`, and save it as an alias without history."""

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        note(tensor)
        return tensor.detach(), tensor._version

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    alias, version = saved
    if alias._version != version:  # torch compares the versions itself only if no hook saves tensors
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: clone() it first"
        )
    return alias


@dataclass
class Survey:
    """The cost of a backward pass, before it is done.

    Attributes:
        leaves: The leaves that get a gradient.
        bytes: An upper bound of the bytes that gradients take at one time.
        steps: As in `Outline`.
    """

    leaves: list[Tensor] = field(default_factory=list[Tensor])
    bytes: int = 0
    steps: int = 0


def survey(root: Tensor) -> Survey:
    """Return what a backward pass from a tensor will cost.

    The graph is visited in the order of torch's engine: newest nodes first.
    """
    found = Survey()
    if root.grad_fn is None:
        if root.requires_grad:
            found.leaves, found.bytes = [root], 2 * bytes_of(root.shape, root.dtype)
        return found
    waiting: list[tuple[int, int, Any]] = [(-root.grad_fn._sequence_nr(), 0, root.grad_fn)]
    arrived: dict[Any, dict[int, int]] = {root.grad_fn: {root.output_nr: bytes_of(root.shape, root.dtype)}}
    held, kernel, count = sum(arrived[root.grad_fn].values()), 0, 0
    while waiting:
        node = heapq.heappop(waiting)[2]
        steps: list[GraphStep] = node.metadata.get(__name__, [])
        found.steps += BACKWARD * sum(step.steps for step in steps)
        kernel = max([kernel, *(BACKWARD * step.bytes for step in steps)])
        if hasattr(node, "variable"):
            found.leaves.append(node.variable)
            continue  # a gradient that arrives at a leaf stays: it becomes the leaf's gradient
        made = 0
        for following, at in node.next_functions:
            if following is None:
                continue
            if following not in arrived:
                count += 1
                arrived[following] = {}
                heapq.heappush(waiting, (-following._sequence_nr(), count, following))
            size = _gradient_bytes(following, at)
            made += size
            held += size if at not in arrived[following] else 0
            arrived[following][at] = size
        found.steps += made
        found.bytes = max(found.bytes, held + made)
        held -= sum(arrived[node].values())
    found.bytes += kernel
    return found


def _gradient_bytes(node: Any, at: int) -> int:
    metadata = node._input_metadata[at]
    return bytes_of(metadata.shape, metadata.dtype)
