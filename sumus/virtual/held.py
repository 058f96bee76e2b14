"""The tensors that one caller has at a worker, within the limits of the worker's policy.

    held = HeldTensors({"inputs": inputs}, policy)
    made = held.keep(tensor)                the response to the caller: number, shape and dtype
    held.of(made.id).tensor
    held.forget(made.id)

A request that would exceed a limit is refused before anything is computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sumus.virtual.graph import GraphBytes
from sumus.virtual.memory import Memories
from sumus.virtual.messages import TensorMade, TensorsMade
from sumus.virtual.operations import DTYPE_NAMES
from sumus.virtual.outline import STEPS_A_SECOND, bytes_of
from sumus.virtual.policy import Policy
from sumus.virtual.refusal import RequestRefused

MOST_DIMENSIONS = 64
"""The largest number of dimensions that torch's kernels support."""


@dataclass
class HeldTensor:
    """One tensor of the caller.

    Attributes:
        tensor: The tensor.
        sent: Whether the tensor came from the caller.
        gradient: The number under which its gradient was last kept.
    """

    tensor: Tensor
    sent: bool = False
    gradient: int | None = None


class HeldTensors:
    """The tensors of one caller, by number.

    Args:
        offered: The owner's tensors, by name. They are never changed.
        policy: The owner's policy.
    """

    def __init__(self, offered: Mapping[str, Tensor], policy: Policy) -> None:
        self.offered, self.policy = offered, policy
        self.memories, self.graphs = Memories(offered, policy.public), GraphBytes()
        self.tensors: dict[int, HeldTensor] = {}
        self._next = 0

    def of(self, number: int) -> HeldTensor:
        """Return a tensor by its number.

        Raises:
            RequestRefused: The caller has no such tensor.
        """
        kept = self.tensors.get(number)
        if kept is None:
            raise RequestRefused("unknown_tensor", f"you have no tensor {number} here: was its pointer deleted?")
        return kept

    def keep(self, tensor: Tensor, sent: bool = False) -> TensorMade:
        """Keep a tensor under a new number."""
        self.check_room(1)
        self.check_form(tensor.shape, tensor.dtype)
        memory = self.memories.note(tensor)
        self.check_memory(0)
        memory.learned = memory.learned or (tensor.requires_grad and tensor.is_leaf)
        number, self._next = self._next, self._next + 1
        self.tensors[number] = HeldTensor(tensor, sent)
        return made_of(number, tensor)

    def keep_results(self, results: list[Tensor], same: Mapping[int, int]) -> TensorMade | TensorsMade:
        """Keep the results of an operation: all of them or none.

        Args:
            results: The results.
            same: The numbers of tensors that are already kept, by `id()`.
        """
        made: list[TensorMade] = []
        try:
            for result in results:
                number = same.get(id(result))
                made.append(self.keep(result) if number is None else made_of(number, result))
        except RequestRefused:
            for each in made:
                if each.id not in same.values():
                    self.forget(each.id)
            raise
        return made[0] if len(made) == 1 else TensorsMade(tuple(made))

    def forget(self, number: int) -> None:
        """Forget a tensor."""
        self.tensors.pop(number, None)

    def is_private(self, tensor: Tensor) -> bool:
        """Return whether the numbers of a tensor depend on the owner's data."""
        return self.memories.is_private(tensor)

    def bytes_in_use(self) -> int:
        """Count the bytes of the caller's tensors and of the memory that autograd keeps for them."""
        return self.memories.in_use() + self.graphs.bytes

    # ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def check_room(self, more: int) -> None:
        """Refuse a request if the caller would have too many tensors with `more` further tensors."""
        if len(self.tensors) + more > self.policy.tensors:
            raise RequestRefused(
                "too_many",
                f"you hold {self.policy.tensors} tensors here, the maximum: delete pointers that you do not need",
            )

    def check_memory(self, more: int) -> None:
        """Refuse a request if the caller would have too many bytes with `more` further bytes."""
        if not self.memories.fits(more + self.graphs.bytes, self.policy.held):
            raise RequestRefused(
                "too_many",
                f"you would hold more than {self.policy.held} bytes here, including memory for this request: delete pointers",
            )

    def check_time(self, steps: int) -> None:
        """Refuse a request that may take too long."""
        seconds = steps / STEPS_A_SECOND
        if seconds > self.policy.seconds:
            raise RequestRefused(
                "too_large",
                f"this may take {seconds:.0f} s, but a request may take at most {self.policy.seconds:g} s: split the work",
            )

    def check_size(self, nbytes: int) -> None:
        """Refuse a tensor of this many bytes if it is too large."""
        if nbytes > self.policy.largest:
            raise RequestRefused(
                "too_large",
                f"the tensor has {nbytes} bytes, but at most {self.policy.largest} are allowed here: split the work",
            )

    def check_form(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Refuse a tensor that is too large, or whose dtype cannot be sent."""
        self.check_size(bytes_of(shape, dtype))
        if dtype not in DTYPE_NAMES:
            raise RequestRefused("impossible", f"the result would have the dtype {dtype}, which cannot be sent")
        if len(shape) > MOST_DIMENSIONS:
            raise RequestRefused(
                "impossible",
                f"the tensor has {len(shape)} dimensions, but at most {MOST_DIMENSIONS} are supported here",
            )


def made_of(number: int, tensor: Tensor) -> TensorMade:
    """Describe a tensor for the caller: its number, its shape and dtype, and its state in autograd."""
    return TensorMade(
        number, tuple(tensor.shape), cast(Any, DTYPE_NAMES[tensor.dtype]), tensor.requires_grad, tensor.is_leaf
    )
