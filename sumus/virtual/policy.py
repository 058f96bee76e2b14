"""The policy of a worker: the rules that its owner sets for callers."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from sumus.errors import PlanError, UsageError, expect_number
from sumus.virtual.operations import EVERYTHING


@dataclass(frozen=True)
class Policy:
    """The limits on what callers may compute, how much they may use, and which results they may fetch.

    With fetch="none", no response contains a number that depends on private data. fetch="parameters" protects against
    mistakes of honest programs. It does not stop a caller who wants the data, since a caller can make its parameters learn
    the data.

    Attributes:
        operations: The names of the allowed operations, from `sumus.virtual.EVERYTHING`; `ARITHMETIC` is a smaller set.
        largest: The largest size of one tensor, in bytes.
        tensors: The largest number of tensors that one caller may have at once.
        held: The largest number of bytes that one caller may have at once. This includes gradients, the memory that autograd
            keeps, and the memory that an operation needs while it is computed.
        seconds: The largest number of seconds for one request. The time is estimated from shapes before anything is computed,
            for one slow core.
        callers: The largest number of callers at once.
        idle_s: Seconds without a request after which a caller is forgotten, with its tensors.
        fetch: Which private tensors may be fetched. A tensor is private if it depends on the owner's tensors. "none": no private
            tensor. "parameters": tensors that the caller sent and that private ones have changed in place, such as a trained
            model. "all": every tensor, even the owner's own.
        public: The names of the owner's tensors that are not private.
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
                raise UsageError(f"Policy({field}=) takes a list of names: write [{getattr(self, field)!r}]")
            object.__setattr__(self, field, frozenset(getattr(self, field)))
        if unknown := sorted(set(self.operations) - EVERYTHING):
            raise UsageError(f"Policy(operations=): there is no operation {unknown[0]!r}; see sumus.virtual.EVERYTHING")
        if self.fetch not in ("none", "parameters", "all"):
            raise PlanError("wrong-type", f'Policy(fetch={self.fetch!r}): give "none", "parameters" or "all"')
        for field in ("largest", "tensors", "held", "callers"):
            expect_number(getattr(self, field), 1, 2**53, f"Policy({field}=)")
        for field in ("seconds", "idle_s"):
            expect_number(getattr(self, field), 0, 1e9, f"Policy({field}=)", open_low=True)
