"""Pace steering: when a device that gets no work should ask again. [Bonawitz et al. 2019, arXiv:1902.01046, section 2.3]"""

from sumus.pacing import Pacing


def window(pacing: Pacing, population: int, arriving: float, until_next: float) -> tuple[float, float]:
    """The seconds within which to come back, drawn uniformly by the device.

    A small population is aligned: it comes a little before there may be work again, in `until_next` seconds, and then more often:
    told to come later than that, it would make rounds last longer, and be told later still. A large one is spread, so that
    `population` devices make about `pacing.checkins` check-ins a second; where more of them arrive than that, it is spread wider.
    """
    spread = population / pacing.checkins * max(1.0, arriving / pacing.checkins)
    first = max(0.75 * until_next, spread / 2)
    return first, first + max(1.0, spread, until_next / 10)
