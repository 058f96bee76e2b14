"""The clients that take part in a simulation: the contract between the loop over rounds and their training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sumus.optimizers import ServerState
from sumus.simulator.checkpoint import Checkpoint
from sumus.simulator.processes.share import Sums
from sumus.simulator.records import RoundTally
from sumus.simulator.virtual_time.account import CountedReport


@dataclass(frozen=True)
class RoundReports:
    """The reports of clients while a round is played.

    Attributes:
        sums: The sums of rounds, by number.
        tallies: The tallies of these sums, by the round's number.
        settled: For each client that trained, whether to keep its new state.
        failed: The clients that failed in the round, each with the reason.
    """

    sums: Sums
    tallies: dict[int, RoundTally]
    settled: dict[str, bool]
    failed: dict[str, str] = field(default_factory=dict[str, str])


class Participants(Protocol):
    """The participants in the rounds of a run: clients in memory, or devices of a real server."""

    def begin(self, at: Checkpoint, left: int) -> str:
        """Start the training of clients.

        Args:
            at: The state of the run.
            left: The number of client trainings that are left.

        Returns:
            The name of the executor, which must also train the later rounds; empty if any executor may.
        """
        ...

    @property
    def how(self) -> str:
        """A sentence on how clients are trained, and why."""
        ...

    def play(
        self, counted: Sequence[CountedReport], number: int, state: ServerState, received: RoundReports
    ) -> ServerState:
        """Train clients from a state, add their reports to sums, and apply the server's step to one sum.

        Args:
            counted: The clients to train, in the order in which their reports are accepted.
            number: The round, from 0.
            state: The server's state before the step.
            received: The object to which the reports are added.

        Returns:
            The server's state after the step.
        """
        ...

    def look_again(self) -> None:
        """Check whether the first clients still give the same results (`sumus.executors.witness`)."""
        ...

    def last_notes(self) -> Iterable[str]:
        """Return further notes for the user, once the run has ended."""
        ...

    def close(self) -> None:
        """Stop the training of clients: no more rounds follow."""
        ...

    def end(self) -> None:
        """Restore the user's code to its state before the run."""
        ...
