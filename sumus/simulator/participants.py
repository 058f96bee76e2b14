"""Where the clients of a simulation train: the contract between the loop over rounds and those who train in them."""

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
    """What clients have reported while a round is played.

    Attributes:
        sums: The sums of rounds, by number.
        tallies: What belongs to these sums, by the round's number.
        settled: For each client that trained, whether its new state is to be kept.
        failed: The clients whose part of the round failed, each with the reason.
    """

    sums: Sums
    tallies: dict[int, RoundTally]
    settled: dict[str, bool]
    failed: dict[str, str] = field(default_factory=dict[str, str])


class Participants(Protocol):
    """Those who take part in the rounds of a run: clients in memory, or devices of a real server."""

    def begin(self, at: Checkpoint, left: int) -> str:
        """Start what trains clients.

        Args:
            at: Where the run stands.
            left: How often a client is still to train.

        Returns:
            The name of the executor, which the rounds to come must keep; empty if that does not matter.
        """
        ...

    @property
    def how(self) -> str:
        """How clients are trained, and why so, in words."""
        ...

    def play(
        self, counted: Sequence[CountedReport], number: int, state: ServerState, received: RoundReports
    ) -> ServerState:
        """Let clients train from a state, add their reports to sums, and apply the server's step to one sum.

        Args:
            counted: Who trains, in the order in which the reports are accepted.
            number: The round, from 0.
            state: The server's state before the step.
            received: Where the reports are added.

        Returns:
            The server's state after the step.
        """
        ...

    def look_again(self) -> None:
        """See whether the first clients still give what they gave (`sumus.executors.witness`)."""
        ...

    def last_notes(self) -> Iterable[str]:
        """What the user should know once the run is over, besides the notes of the run itself."""
        ...

    def close(self) -> None:
        """End what trains clients: no more rounds come."""
        ...

    def end(self) -> None:
        """Leave the user's code as it was before the run."""
        ...
