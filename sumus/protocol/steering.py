"""Pace steering: the choice of when a device without work should ask again. [Bonawitz et al. 2019, arXiv:1902.01046, section
2.3]
"""

from sumus.pacing import Pacing


def window(pacing: Pacing, population: int, arriving: float, until_next: float) -> tuple[float, float]:
    """Choose the window of seconds within which a device comes back. The device draws the moment uniformly.

    A small population is aligned: its devices come a little before there may be work again, and then ask more often. If
    they came later, rounds would last longer, and devices would then be told to come later still. A large population is
    spread, so that its devices make about `pacing.checkins` check-ins a second. If more check-ins arrive than that, the
    population is spread wider.

    Args:
        pacing: How the rounds are paced.
        population: The number of enrolled devices; 0 if it is not known.
        arriving: Check-ins per second that have arrived recently.
        until_next: Seconds until there may be work again.

    Returns:
        The first and the last second of the window, counted from now.
    """
    spread = population / pacing.checkins * max(1.0, arriving / pacing.checkins)
    first = max(0.75 * until_next, spread / 2)
    return first, first + max(1.0, spread, until_next / 10)
