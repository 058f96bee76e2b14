"""Pace steering: when a device that gets no work should ask again. [Bonawitz et al. 2019, arXiv:1902.01046, section 2.3]"""

from sumus.pacing import Pacing


def window(pacing: Pacing, population: int, arriving: float, until_next: float) -> tuple[float, float]:
    """Choose the window of seconds within which a device comes back; the device draws the moment uniformly.

    A small population is aligned: its devices come a little before there may be work again, and then more often. If they
    were told to come later than that, rounds would last longer, and devices would be told to come later still. A large
    population is spread, so that its devices make about `pacing.checkins` check-ins a second; if more check-ins arrive than
    that, it is spread wider.

    Args:
        pacing: How the rounds are paced.
        population: Devices that are enrolled; 0 if that is not known.
        arriving: Check-ins a second of late.
        until_next: Seconds until there may be work again.
    """
    spread = population / pacing.checkins * max(1.0, arriving / pacing.checkins)
    first = max(0.75 * until_next, spread / 2)
    return first, first + max(1.0, spread, until_next / 10)
