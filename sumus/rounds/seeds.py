"""The seed that all reports of a sum share: transforms such as `rotate` draw random numbers from it, and the server needs it to
undo the transforms.
"""

import secrets
from collections.abc import Callable
from typing import TypeAlias

from sumus.rounds.coordinator import Coordinator
from sumus.storage.store import OF_THE_RUN, Rows

Seeds: TypeAlias = Callable[[int], bytes]
"""A function that returns 32 bytes for the sum of a round, given the round's number. The bytes come from the system's random
generator, or from a fixed key in simulation and tests.
"""


def any_seed(number: int) -> bytes:
    """Return a seed that nobody can guess."""
    return secrets.token_bytes(32)


class SumSeeds:
    """The seeds of a run's sums.

    A seed is stored before it is used, so that a sum has the same seed after a crash.
    """

    def __init__(self, coordinator: Coordinator, draw: Seeds, buffered: bool) -> None:
        """Draw seeds for a run.

        Args:
            coordinator: The rounds of the run.
            draw: Makes the seed of a round.
            buffered: Whether the run's rounds are buffers. A buffer takes reports of several models, so all buffers share one
                seed.
        """
        self._coordinator, self._draw, self._buffered = coordinator, draw, buffered
        self._last: tuple[int, bytes] | None = None

    def of(self, number: int) -> bytes:
        """Return the seed of a round's sum. If the rounds are buffers, all sums of the run have the same seed."""
        where = OF_THE_RUN if self._buffered else number
        if self._last is None or self._last[0] != where:
            with self._coordinator.transaction() as rows:
                seed = noted(rows, where, "seed", lambda: self._draw(0 if self._buffered else number))
            self._last = where, seed
        return self._last[1]

    def forget(self) -> None:
        """Forget the seed in memory: the next call reads it from the rows."""
        self._last = None


def noted(rows: Rows, number: int, name: str, make: Callable[[], bytes]) -> bytes:
    """Read a round's note of this name, or make and store it if it does not exist yet."""
    if (body := rows.note(number, name)) is None:
        rows.put_note(number, name, body := make())
    return body
