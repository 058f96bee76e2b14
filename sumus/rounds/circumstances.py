"""The inputs of a decision about a round that are not rows of the store.

    crowd = Crowd(lambda: count_enrolled(identities, "phones"))    one per server: its devices, and how often they check in
    coordinator = Coordinator(run.circumstances, store)   reads the circumstances before each decision

The circumstances are given as a function and read at each decision, so a coordinator's circumstances are never set from
outside.
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
        pacing: The pacing of the open round. An edge changes its pacing as work arrives from the server above.
        paused: Whether the run is paused: then no round begins, and no device gets work.
        population: The number of enrolled devices; 0 if it is not known.
        arriving: The recent number of check-ins per second; 0 if it is not known.
    """

    pacing: Pacing
    paused: bool = False
    population: int = 0
    arriving: float = 0.0


class Crowd:
    """The devices of a server: their number, and how often they check in.

    A server and all of its runs share one crowd. Only the server's deciding thread counts and measures.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        """Begin with a number of 0, until the devices are counted.

        Args:
            count: Counts the enrolled devices; may read a database.
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
        """The recent number of check-ins per second."""
        return self._arriving

    @property
    def changed(self) -> bool:
        """Whether a device has enrolled or left since the last count."""
        return self._changed

    def note_change(self) -> None:
        """Note that a device has enrolled or left. Any thread may call this."""
        self._changed = True

    def count(self) -> int:
        """Count the devices that are enrolled now, and remember the number."""
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
