"""Who takes part in a demo."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DemoPeople:
    """Who takes part. training, unseen: as they are known in the experiment.  least: people in a sum, at least."""

    training: Sequence[Any]
    unseen: Sequence[Any]
    least: int
