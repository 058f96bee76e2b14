"""The best model of a run, and the end of a run before its last round: target and patience.

Both depend only on the records of the rounds. So a run that is interrupted and continued makes the same decisions as an
uninterrupted run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sumus.errors import ExperimentError
from sumus.experiment import Evaluation
from sumus.simulator.kept import BestSoFar
from sumus.simulator.records import RoundRecord
from sumus.types import Tree


@dataclass(frozen=True)
class Stopping:
    """The settings of `Evaluation` for the best model and an early end.

    Attributes:
        wanted: The user's settings.
        lower: Function that tells whether a lower value of a metric is better.
    """

    wanted: Evaluation
    lower: Callable[[str], bool]

    def check_names(self, known: Sequence[str]) -> None:
        """Refuse names of metrics that are not measured."""
        best = [] if self.wanted.best is None else [self.wanted.best]
        for what, names in (("the target", self.wanted.target), ("best=", best)):
            for name in names:
                if name not in known:
                    raise ExperimentError(
                        f"{what} names {name!r}, which is not measured; give one of {', '.join(known)}"
                    )

    def is_due(self, record: RoundRecord) -> bool:
        """Return whether a record holds a scheduled measurement.

        An earlier, shorter run also measured its last round, which may not be scheduled in this run.
        """
        return record.round % self.wanted.every == 0 and bool(record.metrics)

    def improves(self, record: RoundRecord, kept: BestSoFar | None) -> bool:
        """Return whether a record is better than the best so far. Of equal values, the first is kept; NaN is the worst."""
        name = self.wanted.best
        if name is None or name not in record.metrics:
            return False
        return kept is None or self._rank(record.metrics[name]) > self._rank(kept.value)

    def kept(self, record: RoundRecord, model: Tree) -> BestSoFar:
        """Return a record's model as the best model so far."""
        assert self.wanted.best is not None
        return BestSoFar(self.wanted.best, record.round, record.metrics[self.wanted.best], model)

    def why(self, rounds: Sequence[RoundRecord], kept: BestSoFar | None) -> str | None:
        """Return the reason why a run with these rounds ends, "target" or "patience"; None if it continues."""
        if rounds and self.is_due(rounds[-1]) and self._reached(rounds[-1]):
            return "target"
        if self.wanted.patience is not None and kept is not None:
            since = sum(self.is_due(record) for record in rounds if record.round > kept.round)
            if since >= self.wanted.patience:
                return "patience"
        return None

    def _reached(self, record: RoundRecord) -> bool:
        target, measured = self.wanted.target, record.metrics
        return bool(target) and all(
            name in measured and (measured[name] <= goal if self.lower(name) else measured[name] >= goal)
            for name, goal in target.items()
        )

    def _rank(self, value: float) -> float:
        """Return a rank of a metric's value: higher is better, and NaN is the worst."""
        if math.isnan(value):
            return -math.inf
        assert self.wanted.best is not None
        return -value if self.lower(self.wanted.best) else value
