"""The best model of a run so far, as a checkpoint holds it."""

from dataclasses import dataclass, field

from sumus.types import Array, Tree


@dataclass(frozen=True)
class BestSoFar:
    """The best model so far.

    Attributes:
        metric: The metric by which it was chosen.
        round: The round after which it was measured; 0 if that was before round 1.
        value: The metric's value.
        model: The published leaves.
    """

    metric: str
    round: int
    value: float
    model: Tree = field(default_factory=dict[str, Array])
