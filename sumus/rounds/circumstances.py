"""What a decision about a round depends on, besides the rows of the store.

    crowd = Crowd(lambda: count_enrolled(identities, "phones"))    one for each server: its devices, and how often they ask
    coordinator = Coordinator(run.circumstances, store)   asks for the circumstances before each decision

The circumstances are given as a function and read at each decision, so nobody sets them on a coordinator from outside.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sumus.pacing import Pacing

_SMOOTH = 0.2
"""How much the latest measurement weighs in the check-ins a second."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a decision about a round depends on, besides rows.

    Attributes:
        pacing: How the round that is open is paced. An edge changes its pacing as work comes down.
        paused: Whether the run is held: then no round begins, and no device gets work.
        population: Devices that are enrolled; 0 if that is not known.
        arriving: Check-ins a second of late; 0 if that is not known.
    """

    pacing: Pacing
    paused: bool = False
    population: int = 0
    arriving: float = 0.0


class Crowd:
    """The devices of a server: how many there are, and how often they ask.

    A server and all of its runs share one crowd. Only the server's deciding thread counts and measures.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        """Begin with no devices, until they are counted.

        Args:
            count: Counts the devices that are enrolled; may read a database.
        """
        self._count = count
        self._changed = True
        self._population = 0
        self._arriving = 0.0

    @property
    def population(self) -> int:
        """Devices that were enrolled when they were counted last."""
        return self._population

    @property
    def arriving(self) -> float:
        """Check-ins a second of late."""
        return self._arriving

    @property
    def changed(self) -> bool:
        """Whether a device has enrolled or left since the devices were counted."""
        return self._changed

    def note_change(self) -> None:
        """A device has enrolled, or left. Any thread may call."""
        self._changed = True

    def count(self) -> int:
        """Count the devices that are enrolled now, and remember how many there are."""
        self._changed = False
        self._population = self._count()
        return self._population

    def note_checkins(self, checkins: int, seconds: float) -> None:
        """Measure how many check-ins have come in the last seconds."""
        rate = checkins / max(1e-3, seconds)
        self._arriving += _SMOOTH * (rate - self._arriving)
