"""The requests that the deciding thread handles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from sumus.rounds.run import DeviceCheckIn, Run
from sumus.rounds.stages import Checked


@dataclass(frozen=True)
class Reported:
    """A report that has arrived and has been checked.

    Attributes:
        run: The run that the report is for.
        report: A device's report, or an edge's sum.
    """

    run: Run
    report: Checked


@dataclass(frozen=True)
class Aborted:
    """A request to end a session, since its device will send no report.

    Attributes:
        run: The run that gave the session.
        session: The session.
        reason: The reason, from the closed list.
        parent: The edge that sent the message for one of its devices; empty if the device itself sent it.
    """

    run: Run
    session: str
    reason: str
    parent: str = ""


@dataclass(frozen=True)
class Spoilt:
    """A request to free the place of a session, since its report can never be counted.

    Attributes:
        run: The run that gave the session.
        session: The session.
        code: The error code, from the closed list.
    """

    run: Run
    session: str
    code: str


@dataclass(frozen=True)
class Command:
    """A command of an admin or of the process itself, carried out between other decisions.

    Attributes:
        do: Carries the command out, given the time, and returns the answer.
    """

    do: Callable[[float], Any]


Item: TypeAlias = DeviceCheckIn | Reported | Aborted | Spoilt | Command
