"""The best model of a run so far, as a checkpoint holds it."""

from dataclasses import dataclass, field

from sumus.types import Array, Tree


@dataclass(frozen=True)
class BestSoFar:
    """The best model so far: by which metric, in which round (0 is before the first), its value there, and its published
    leaves."""

    metric: str
    round: int
    value: float
    model: Tree = field(default_factory=dict[str, Array])
