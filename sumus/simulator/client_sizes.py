"""How many examples the clients of a run hold."""

from collections.abc import Sequence
from typing import Any

from sumus.simulator.processes.share import Crew, Trainer


class ClientSizes:
    """How many examples clients hold, as far as that is known."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._known: dict[Any, int] = {}

    def of(self, client: Any) -> int:
        """How many examples a client holds; it is read if that is not known."""
        if client not in self._known:
            (self._known[client],) = self._trainer.sizes([client])
        return self._known[client]

    def known(self, client: Any, otherwise: float) -> float:
        """How many examples a client holds, if that is known."""
        return self._known.get(client, otherwise)

    def note(self, client: Any, examples: int) -> None:
        """Note how many examples a client holds."""
        self._known[client] = examples

    def learn(self, clients: Sequence[Any], crew: Crew) -> list[int]:
        """How many examples these clients hold; the crew reads those of which that is not known."""
        unknown = [client for client in clients if client not in self._known]
        self._known |= zip(unknown, crew.sizes(unknown), strict=True)
        return [self._known[client] for client in clients]
