"""How much an update counts that was trained on an older model: staleness as an integer weight.

    Part("params", weight=polynomial(0.5), denominator="count")

Staleness is how many versions the server has published since the client was sent its model; the server knows it, the
client does not say it. A rule gives a factor in (0, 1], 1 for a fresh update; it is counted in steps of 1/1024.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from sumus.errors import PlanError, expect_number, own_code
from sumus.spec import Value, registered

ONE = 1024
"""The integer weight of a fresh update."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Staleness(Value):
    """factor(versions since, 0 or more) → how much it counts, in (0, 1]."""

    factor: Callable[[int], float]

    def weight(self, staleness: int) -> int:
        """The factor as an integer, 1 to 1024."""
        with own_code("factor", self, "it must give a number in (0, 1] for every staleness"):
            factor = float(self.factor(staleness))
        expect_number(factor, 0, math.inf, f"the factor of {self!r} at staleness {staleness}")
        return min(ONE, max(1, round(ONE * factor)))


@registered("staleness/constant")
def constant() -> Staleness:
    """1: old updates count like fresh ones."""
    return Staleness(factor=lambda staleness: 1.0)


@registered("staleness/polynomial")
def polynomial(exponent: float = 0.5) -> Staleness:
    """(1 + s)^−a. [Xie et al. 2019, arXiv:1903.03934, section 5.2; a = 1/2 in FedBuff, arXiv:2106.06639]"""
    if not exponent > 0:
        raise PlanError("positive", f"polynomial({exponent}): the exponent must be positive; for none use constant()")
    return Staleness(factor=lambda staleness: (1.0 + staleness) ** -exponent)


@registered("staleness/hinge")
def hinge(after: int = 10, slope: float = 1.0) -> Staleness:
    """1 up to `after`, then 1 / (1 + slope · (s − after)). [Xie et al. 2019, arXiv:1903.03934, section 5.2]"""
    if after < 0 or not 0 < slope < math.inf:
        raise PlanError(
            "positive", f"hinge({after}, {slope}): after must not be negative, and slope must be positive and finite"
        )
    return Staleness(factor=lambda staleness: 1.0 / (1.0 + slope * max(0, staleness - after)))
