"""The contract of an executor: it trains clients, each from the same broadcast, and gives what they send.

Nothing here imports torch, so that code without torch can use the contract, too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sumus.types import Broadcast, Tree

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClientAssignment:
    """A client that is to train.

    Attributes:
        client: The client's id.
        inputs: The inputs of its examples, where the executor computes, one row an example.
        targets: Their targets, one row an example.
        state: What the client kept from earlier rounds.
        key: 32 bytes from which all of its randomness in this round comes.
        most_steps: The most steps that it has time for; None for all of its work.
    """

    client: Any
    inputs: "Tensor"
    targets: "Tensor"
    state: Mapping[str, Tree]
    key: bytes
    most_steps: int | None = None


@dataclass(frozen=True)
class Trained:
    """What a client's training gave.

    Attributes:
        client: The client's id.
        parts: What the client sends: by part a tree of numpy arrays.
        examples: How many examples it trained on.
        metrics: (sum, count) by metric.
        state: What the client keeps if its report is counted.
    """

    client: Any
    parts: Mapping[str, Tree]
    examples: int
    metrics: Mapping[str, tuple[float, int]]
    state: Mapping[str, Tree]


class Executor(Protocol):
    """Executors differ in speed, not in what they compute: who else trains, and in which order, changes nothing.

    Attributes:
        needs_sizes: Whether `groups` looks at the numbers of examples.
    """

    needs_sizes: bool

    def groups(self, examples: Sequence[int]) -> list[list[int]]:
        """Divide a cohort into groups that train together. A group goes to one call of `run`, in any process.

        Args:
            examples: How many examples each client of the cohort has.

        Returns:
            The positions of each group, in the order in which the groups are to be dealt.
        """
        ...

    def run(
        self, broadcast: Broadcast, round_number: int, assignments: Iterable[ClientAssignment]
    ) -> Iterator[Trained]:
        """Train each client from the broadcast, and yield the results as they are ready.

        Args:
            broadcast: What the server sends.
            round_number: The number of the round, from 0, for the schedule.
            assignments: The clients.
        """
        ...
