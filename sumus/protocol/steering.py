"""Pace steering: the choice of when a device without work should ask again. [Bonawitz et al. 2019, arXiv:1902.01046, section
2.3]
"""

from sumus.pacing import Pacing


def window(pacing: Pacing, population: int, arriving: float, until_next: float) -> tuple[float, float]:
    """Choose the window of seconds within which a device comes back. The device draws the moment uniformly.

    A small population is aligned: its devices come a little before there may be work again, and then ask more often. If they
    came later, rounds would last longer, and the next windows would be later still. A large population is spread, so that about
    `pacing.checkins` check-ins arrive per second. If more check-ins arrive, the window is longer.

    Args:
        pacing: The pacing of the rounds.
        population: The number of enrolled devices; 0 if it is not known.
        arriving: The recent rate of check-ins, per second; 0 if it is not known.
        until_next: The number of seconds until there may be work again.

    Returns:
        The first and the last second of the window, counted from now.
    """
    spread = population / pacing.checkins * max(1.0, arriving / pacing.checkins)
    first = max(0.75 * until_next, spread / 2)
    return first, first + max(1.0, spread, until_next / 10)
