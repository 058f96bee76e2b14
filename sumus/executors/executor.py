"""What an executor is: it lets clients train, each from the same broadcast, and gives what they send."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sumus.types import Broadcast, Tree


@dataclass(frozen=True)
class ClientAssignment:
    """A client that is to train.

    client: its id.  inputs, targets: its examples on the device, one row an example.  state: what it kept from earlier
    rounds.  key: 32 bytes from which all of its randomness in this round comes.  most_steps: what it has time for, if not
    for all of its work.
    """

    client: Any
    inputs: Tensor
    targets: Tensor
    state: Mapping[str, Tree]
    key: bytes
    most_steps: int | None = None


@dataclass(frozen=True)
class Trained:
    """What a client's training gave: parts to send (numpy), its examples, (sum, count) by metric, and its pending state."""

    client: Any
    parts: Mapping[str, Tree]
    examples: int
    metrics: Mapping[str, tuple[float, int]]
    state: Mapping[str, Tree]


class Executor(Protocol):
    """Executors differ in speed, not in what they compute: who else trains, and in which order, changes nothing.

    needs_sizes: whether `groups` looks at the numbers of examples.
    """

    needs_sizes: bool

    def groups(self, examples: Sequence[int]) -> list[list[int]]:
        """From the examples of each client of a cohort: the positions that train together, in the order to deal them.

        A group goes to one call of `run`, in any process; groups are formed over the whole cohort.
        """
        ...

    def run(
        self, broadcast: Broadcast, round_number: int, assignments: Iterable[ClientAssignment]
    ) -> Iterator[Trained]:
        """Train each client from the broadcast; results come as they are ready. round_number: from 0, for the schedule."""
        ...
