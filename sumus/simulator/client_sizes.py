"""The numbers of examples that the clients of a run hold."""

from collections.abc import Sequence
from typing import Any

from sumus.simulator.processes.share import Crew, Trainer


class ClientSizes:
    """The number of examples of each client, if it is known already."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._known: dict[Any, int] = {}

    def of(self, client: Any) -> int:
        """Return the number of examples of a client; if it is not known, read the client's examples."""
        if client not in self._known:
            (self._known[client],) = self._trainer.sizes([client])
        return self._known[client]

    def known(self, client: Any, otherwise: float) -> float:
        """Return the number of examples of a client if it is known, else `otherwise`."""
        return self._known.get(client, otherwise)

    def note(self, client: Any, examples: int) -> None:
        """Record the number of examples of a client."""
        self._known[client] = examples

    def learn(self, clients: Sequence[Any], crew: Crew) -> list[int]:
        """Return the numbers of examples of these clients; the crew reads the clients whose number is not known."""
        unknown = [client for client in clients if client not in self._known]
        self._known |= zip(unknown, crew.sizes(unknown), strict=True)
        return [self._known[client] for client in clients]
