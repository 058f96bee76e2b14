"""The inputs of a decision about a round that are not rows of the store.

    crowd = Crowd(lambda: count_enrolled(identities, "phones"))    one per server: counts devices and check-ins
    coordinator = Coordinator(run.circumstances, store)   reads the circumstances before each decision

A coordinator gets a function that returns the circumstances, and calls it at each decision. So nothing has to update the
coordinator when the circumstances change.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sumus.pacing import Pacing

_SMOOTH = 0.2
"""The weight of the latest measurement in the average of check-ins per second."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """The inputs of a decision about a round that are not rows.

    Attributes:
        pacing: The pacing of the open round. An edge changes its pacing when work arrives from its upstream server.
        paused: Whether the run is paused. While it is, no round begins and no device gets work.
        population: The number of enrolled devices; 0 if it is not known.
        arriving: The recent rate of check-ins, per second; 0 if it is not known.
    """

    pacing: Pacing
    paused: bool = False
    population: int = 0
    arriving: float = 0.0


class Crowd:
    """The devices of a server: their number, and their rate of check-ins.

    A server and all of its runs share one crowd. Only the server's deciding thread counts and measures.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        """Start with 0 devices, until `count` is called.

        Args:
            count: Returns the number of enrolled devices; it may read a database.
        """
        self._count = count
        self._changed = True
        self._population = 0
        self._arriving = 0.0

    @property
    def population(self) -> int:
        """The number of enrolled devices at the last count."""
        return self._population

    @property
    def arriving(self) -> float:
        """The recent rate of check-ins, per second."""
        return self._arriving

    @property
    def changed(self) -> bool:
        """Whether a device has enrolled or left since the last count."""
        return self._changed

    def note_change(self) -> None:
        """Record that a device has enrolled or left. Any thread may call this."""
        self._changed = True

    def count(self) -> int:
        """Count the devices that are enrolled now; store and return their number."""
        self._changed = False
        self._population = self._count()
        return self._population

    def note_checkins(self, checkins: int, seconds: float) -> None:
        """Update the rate of check-ins.

        Args:
            checkins: The number of check-ins since the last call.
            seconds: The time since the last call.
        """
        rate = checkins / max(1e-3, seconds)
        self._arriving += _SMOOTH * (rate - self._arriving)
