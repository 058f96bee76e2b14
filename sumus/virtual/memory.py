"""The memory of one caller's tensors: which part of it is private, and how much is in use.

    memories = Memories(offered, public=())
    memories.make_private([result])
    memories.is_private(result.view(-1))            True: a view uses the memory of its base

Privacy is a property of memory only, that is, of torch's storages. All tensors that share a storage are private together, as
long as the storage exists: tensors of the caller, their views and gradients, and tensors that only autograd's graph holds.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sumus.virtual.outline import storage_of

SWEEP = 1000
"""The number of new storages after which freed storages are removed from the records."""


@dataclass
class _Memory:
    """The record of a storage.

    Attributes:
        alive: A weak reference that shows whether the storage still exists. While this record is kept, no other storage
            gets the same address.
        bytes: Its size in bytes; 0 for the owner's memory.
        private: Whether its numbers depend on the owner's data.
        learned: Whether a leaf in it has ever required a gradient.
    """

    alive: StorageWeakRef
    bytes: int
    private: bool = False
    learned: bool = False


class Memories:
    """All storages of a caller's tensors, of their gradients, and of tensors that autograd has saved for a backward pass.

    Args:
        offered: The owner's tensors, by name. Their memory is never changed, and does not count towards the caller's limit.
        public: The names of the owner's tensors that are not private.
    """

    def __init__(self, offered: Mapping[str, Tensor], public: Collection[str]) -> None:
        self._known: dict[int, _Memory] = {}
        self._owned: set[int] = set()
        self._bytes = 0
        self._next_sweep = SWEEP
        for name, tensor in offered.items():
            memory = self.note(tensor)
            memory.bytes, memory.private = 0, memory.private or name not in public
            self._owned.add(storage_of(tensor))
        self._sweep()

    def note(self, tensor: Tensor) -> _Memory:
        """Return the record of a tensor's storage, and make it if the storage is new."""
        found = self._known.get(storage_of(tensor))
        if found is None:
            if len(self._known) >= self._next_sweep:
                self._sweep()
            storage = tensor.untyped_storage()
            found = _Memory(StorageWeakRef(storage), storage.nbytes())
            self._known[storage_of(tensor)] = found
            self._bytes += found.bytes
        return found

    def is_private(self, tensor: Tensor) -> bool:
        """Return whether the numbers of a tensor depend on the owner's data."""
        found = self._known.get(storage_of(tensor))
        return found is not None and found.private

    def make_private(self, tensors: Iterable[Tensor]) -> None:
        """Mark the memory of tensors as private. This applies to all tensors that share the memory."""
        for tensor in tensors:
            self.note(tensor).private = True

    def is_owned(self, tensor: Tensor) -> bool:
        """Return whether a tensor uses the owner's memory."""
        return storage_of(tensor) in self._owned

    def fits(self, more: int, limit: int) -> bool:
        """Return whether `more` further bytes fit within the limit.

        Freed storages are removed from the records only if the bytes would not fit otherwise.
        """
        return self._bytes + more <= limit or self.in_use() + more <= limit

    def in_use(self) -> int:
        """Return the total bytes of all existing storages except the owner's."""
        self._sweep()
        return self._bytes

    def _sweep(self) -> None:
        for key in [key for key, memory in self._known.items() if memory.alive.expired()]:
            del self._known[key]
        self._bytes = sum(memory.bytes for memory in self._known.values())
        self._next_sweep = 2 * len(self._known) + SWEEP
