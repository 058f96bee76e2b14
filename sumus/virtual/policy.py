"""What the owner of a worker lets callers do."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from sumus.errors import PlanError, UsageError, expect_number
from sumus.virtual.operations import EVERYTHING


@dataclass(frozen=True)
class Policy:
    """An access policy: what may be computed, how much, and what may be fetched of what depends on the owner's tensors.

    operations: names of `sumus.virtual.EVERYTHING`; `ARITHMETIC` is a smaller set.
    largest: bytes of one tensor.
    tensors: how many tensors one caller may have there at once.
    held: bytes that one caller may have there at once, with gradients, with what autograd keeps, and with what an operation needs
        while it is computed.
    seconds: that one request may take. This is reckoned from shapes before anything is computed, for one slow core.
    callers, idle_s: how many at once, and the seconds after which one who asks nothing is forgotten, tensors and all.
    fetch: of what depends on the owner's tensors, and is therefore private:
        "none"         nothing
        "parameters"   tensors that the caller sent, which private ones have changed in place: a trained model
        "all"          everything, the tensors themselves too
    public: names of the owner's tensors that are not private.

    Under "none" no number that depends on private data leaves by an answer. "parameters" keeps honest programs from fetching by
    mistake; it stops nobody who wants the data, since a caller may choose what its parameters learn.
    """

    operations: Collection[str] = EVERYTHING
    largest: int = 2**26
    tensors: int = 10_000
    held: int = 2**30
    seconds: float = 60.0
    callers: int = 8
    idle_s: float = 900.0
    fetch: Literal["none", "parameters", "all"] = "none"
    public: Collection[str] = ()

    def __post_init__(self) -> None:
        for field in ("operations", "public"):
            if isinstance(getattr(self, field), str):
                raise UsageError(f"Policy({field}=) takes several names: write [{getattr(self, field)!r}]")
            object.__setattr__(self, field, frozenset(getattr(self, field)))
        if unknown := sorted(set(self.operations) - EVERYTHING):
            raise UsageError(f"Policy(operations=): there is no operation {unknown[0]!r}; see sumus.virtual.EVERYTHING")
        if self.fetch not in ("none", "parameters", "all"):
            raise PlanError("wrong-type", f'Policy(fetch={self.fetch!r}): give "none", "parameters" or "all"')
        for field in ("largest", "tensors", "held", "callers"):
            expect_number(getattr(self, field), 1, 2**53, f"Policy({field}=)")
        for field in ("seconds", "idle_s"):
            expect_number(getattr(self, field), 0, 1e9, f"Policy({field}=)", open_low=True)
