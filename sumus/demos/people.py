"""The people who take part in a demo."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DemoPeople:
    """The people who take part in a demo, by their ids in the experiment.

    Attributes:
        training: The people who train.
        unseen: The people who only measure the models, and never train.
        least: The fewest people in a sum.
    """

    training: Sequence[Any]
    unseen: Sequence[Any]
    least: int
