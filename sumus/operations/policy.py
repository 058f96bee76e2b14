"""The rules by which a server runs its tasks, and the form of the names of tasks and populations."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sumus.errors import ExperimentError
from sumus.http.limits import Limits
from sumus.server.evaluation import Evaluating
from sumus.server.server import GROUP

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class ServerPolicy:
    """The rules by which a server runs its tasks.

    Attributes:
        population: The name of the devices' population.
        quota: The number of devices that may enrol.
        evaluate: The rules for measuring models on devices; None if devices measure none.
        releases: Whether devices predict with a new model at once, without waiting for an operator to promote it.
        warm_start: Whether a task whose leaves or data have changed starts with the values of the old model that still fit.
        spool: Whether to serve plans that need each update separately. It is then encrypted on the disk until its round ends.
        priority: Priorities by task; devices get work for tasks of higher priority first.
        memory: The largest number of bytes of memory for bodies in transit.
        group: The seconds for which the server collects reports before it decides on them together; see `server.GROUP`.
        limits: The limits on requests per second; None for the default ones.
    """

    population: str = "default"
    quota: int = 1_000_000
    evaluate: Evaluating | None = None
    releases: bool = True
    warm_start: bool = False
    spool: bool = False
    priority: Mapping[str, int] = field(default_factory=dict[str, int])
    memory: int = 256 * 2**20
    group: float = GROUP
    limits: Limits | None = None


def check_name(kind: str, name: str) -> None:
    """Check the name of a task or a population.

    Args:
        kind: "task" or "population".
        name: The name.

    Raises:
        ExperimentError: The name has a character that is not allowed, or more than 64 characters.
    """
    if not _NAME.fullmatch(name):
        raise ExperimentError(
            f"{name!r} cannot be the name of a {kind}: use 1 to 64 letters, digits, `.`, `_` and `-`, and begin with a letter "
            "or a digit"
        )
