"""What a population's devices are like: what keeps a report from being counted, or from being whole."""

from dataclasses import dataclass

import numpy as np

from sumus.errors import ExperimentError
from sumus.spec import record


@dataclass(frozen=True)
class Fate:
    """What becomes of one client in one round.

    most_steps: the local steps it has time for, None for all of them.  late: it is not done when the round closes.
    lost: its report is sent, and never arrives.
    """

    most_steps: int | None = None
    late: bool = False
    lost: bool = False


@record("fleet")
@dataclass(frozen=True)
class Fleet:
    """Imperfect devices, drawn anew for every client and round by the experiment's seed.

    lost: the share of reports that never arrive; the client is told so, and its state stays what it was.
    stragglers: the share of clients that have time for only a part of their steps, uniform from one to all.
    partial_work: whether a straggler's partial report is counted (FedProx), or comes too late and is not (what FedAvg's
        paper does). [Li et al. 2020, arXiv:1812.06127, section 5.2]
    """

    lost: float = 0.0
    stragglers: float = 0.0
    partial_work: bool = True

    def __post_init__(self) -> None:
        for name in ("lost", "stragglers"):
            share = getattr(self, name)
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ExperimentError(f"Fleet({name}={share!r}): it is a share, a number from 0 to 1")

    def fate(self, steps: int, rng: np.random.Generator) -> Fate:
        """What becomes of a client whose whole work is so many steps."""
        arrives, slow, share = rng.random(3).tolist()
        most = 1 + int(share * steps) if slow < self.stragglers else None
        late = most is not None and most < steps and not self.partial_work
        return Fate(most, late, lost=arrives < self.lost)


PERFECT = Fleet()
"""Every client does all its work, and every report arrives."""
