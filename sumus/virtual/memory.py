"""The memory behind one caller's tensors: which of it is private, and how much of it is in use.

    memories = Memories(offered, private={"inputs"})
    memories.make_private([result])
    memories.is_private(result.view(-1))            True: a view has the memory of what it is a view of

Privacy belongs to memory (to torch's storages) and to nothing else. Two handles, a view, a gradient, or a tensor that only
autograd's graph holds: if they share a storage, they are private together, for as long as the storage lives.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sumus.virtual.outline import storage_of

SWEEP = 1000
"""So many new storages are noted before those that are gone are looked for."""


@dataclass
class _Memory:
    """A storage that was seen.

    alive: tells whether the storage still lives; while this is kept, no other storage gets its address.
    bytes: that it takes; 0 for the owner's.
    private: whether its numbers depend on the owner's data.
    learned: whether a leaf that lies in it has ever required a gradient.
    """

    alive: StorageWeakRef
    bytes: int
    private: bool = False
    learned: bool = False


class Memories:
    """All storages that a caller's tensors lie in, or gradients of these, or what autograd has saved for a backward pass.

    Args:
        offered: the owner's tensors, by name. They are the owner's memory: never changed, and not counted.
        public: names of the owner's tensors that are not private.
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
        """Give the record of a tensor's storage; it is made if it is new."""
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
        """Tell whether the numbers of a tensor depend on the owner's data."""
        found = self._known.get(storage_of(tensor))
        return found is not None and found.private

    def make_private(self, tensors: Iterable[Tensor]) -> None:
        """Mark the memory of tensors, and so whatever shares it."""
        for tensor in tensors:
            self.note(tensor).private = True

    def is_owned(self, tensor: Tensor) -> bool:
        """Tell whether a tensor lies in memory of the owner's."""
        return storage_of(tensor) in self._owned

    def fits(self, more: int, limit: int) -> bool:
        """Tell whether so many bytes more are within a limit. Storages are swept only if the answer would be no."""
        return self._bytes + more <= limit or self.in_use() + more <= limit

    def in_use(self) -> int:
        """Bytes of all storages that live, without the owner's."""
        self._sweep()
        return self._bytes

    def _sweep(self) -> None:
        for key in [key for key, memory in self._known.items() if memory.alive.expired()]:
            del self._known[key]
        self._bytes = sum(memory.bytes for memory in self._known.values())
        self._next_sweep = 2 * len(self._known) + SWEEP
