"""The contract of an executor: it trains clients, each from the same broadcast, and returns what they send.

Nothing here imports torch, so that code without torch can use the contract too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sumus.types import Broadcast, Tree

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClientAssignment:
    """A client to train.

    Attributes:
        client: The client's id.
        inputs: The inputs of its examples, one row per example, on the executor's device.
        targets: Their targets, one row per example.
        state: The state that the client kept from earlier rounds.
        key: 32 bytes, the source of all its randomness in this round.
        most_steps: The number of steps that the client has time for; None if it has time for all steps.
    """

    client: Any
    inputs: "Tensor"
    targets: "Tensor"
    state: Mapping[str, Tree]
    key: bytes
    most_steps: int | None = None


@dataclass(frozen=True)
class Trained:
    """The result of a client's training.

    Attributes:
        client: The client's id.
        parts: The parts that the client sends: a tree of numpy arrays for each.
        examples: The number of examples that it trained on.
        metrics: (sum, count) by metric.
        state: The state that the client keeps if its report is counted.
    """

    client: Any
    parts: Mapping[str, Tree]
    examples: int
    metrics: Mapping[str, tuple[float, int]]
    state: Mapping[str, Tree]


class Executor(Protocol):
    """Trains clients. A client's result does not depend on the other clients, or on their order. Executors differ in speed.

    Attributes:
        needs_sizes: Whether `groups` needs the numbers of examples.
    """

    needs_sizes: bool

    def groups(self, examples: Sequence[int]) -> list[list[int]]:
        """Divide a cohort into groups that train together. Each group is one call of `run`, in any process.

        Args:
            examples: The number of examples of each client of the cohort.

        Returns:
            The positions of each group's clients; groups are handed out in this order.
        """
        ...

    def run(
        self, broadcast: Broadcast, round_number: int, assignments: Iterable[ClientAssignment]
    ) -> Iterator[Trained]:
        """Train each client from the broadcast, and yield each result as soon as it is ready.

        Args:
            broadcast: The broadcast of the server.
            round_number: The number of the round, from 0, for the schedule.
            assignments: The clients to train.
        """
        ...
