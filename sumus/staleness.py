"""Staleness rules: how much an update counts if it was trained on an older model.

    Part("params", weight=polynomial(0.5), denominator="count")

Staleness is the number of versions that the server has published since it sent the client its model. The server knows
this number; the client does not report it. A rule gives a factor in (0, 1], with 1 for a fresh update. The factor is
used as an integer weight, in steps of 1/1024.
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
    """A staleness rule.

    Attributes:
        factor: (staleness, 0 or more) → how much the update counts, in (0, 1].
    """

    factor: Callable[[int], float]

    def weight(self, staleness: int) -> int:
        """Return the factor as an integer weight from 1 to 1024."""
        with own_code("factor", self, "it must return a number in (0, 1] for every staleness"):
            factor = float(self.factor(staleness))
        expect_number(factor, 0, math.inf, f"the factor of {self!r} at staleness {staleness}")
        return min(ONE, max(1, round(ONE * factor)))


@registered("staleness/constant")
def constant() -> Staleness:
    """Count old updates in full, like fresh ones: the factor is always 1."""
    return Staleness(factor=lambda staleness: 1.0)


@registered("staleness/polynomial")
def polynomial(exponent: float = 0.5) -> Staleness:
    """Use the factor (1 + s)^−a at staleness s. [Xie et al. 2019, arXiv:1903.03934, section 5.2; a = 1/2 in FedBuff,
    arXiv:2106.06639]
    """
    if not exponent > 0:
        raise PlanError(
            "positive", f"polynomial({exponent}): the exponent must be positive; to ignore staleness, use constant()"
        )
    return Staleness(factor=lambda staleness: (1.0 + staleness) ** -exponent)


@registered("staleness/hinge")
def hinge(after: int = 10, slope: float = 1.0) -> Staleness:
    """Use the factor 1 up to a staleness s of `after`, and 1 / (1 + slope · (s − after)) for a larger s.

    [Xie et al. 2019, arXiv:1903.03934, section 5.2]
    """
    if after < 0 or not 0 < slope < math.inf:
        raise PlanError(
            "positive", f"hinge({after}, {slope}): after must not be negative, and slope must be positive and finite"
        )
    return Staleness(factor=lambda staleness: 1.0 / (1.0 + slope * max(0, staleness - after)))
