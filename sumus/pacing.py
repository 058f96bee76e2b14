"""Who takes part in a round, and when."""

from dataclasses import dataclass

import numpy as np

from sumus.errors import PlanError, expect
from sumus.spec import record


@record("pacing")
@dataclass(frozen=True)
class Pacing:
    """cohort: how many clients a round sums over."""

    cohort: int

    def __post_init__(self) -> None:
        expect(self.cohort, (int, np.integer), "Pacing(cohort=)")
        if self.cohort < 1:
            raise PlanError("positive", f"Pacing(cohort={self.cohort}): a round needs at least one client")
