"""What the thread that decides is asked to decide."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from sumus.rounds.run import DeviceCheckIn, Run
from sumus.rounds.stages import Checked


@dataclass(frozen=True)
class Reported:
    """A report that has arrived whole and was checked.

    Attributes:
        run: The run that the report is for.
        report: The report of a device; or the sum of an edge.
    """

    run: Run
    report: Checked


@dataclass(frozen=True)
class Aborted:
    """No report of a session will come.

    Attributes:
        run: The run that gave the session.
        session: The session.
        reason: Why, of the closed list.
        parent: The edge that says so of one of its devices; empty if the device itself does.
    """

    run: Run
    session: str
    reason: str
    parent: str = ""


@dataclass(frozen=True)
class Spoilt:
    """A device sent a report that can never be counted.

    Attributes:
        run: The run that gave the session.
        session: The session.
        code: Why, of the closed list.
    """

    run: Run
    session: str
    code: str


@dataclass(frozen=True)
class Command:
    """Something that an admin or the process itself wants, done between other decisions.

    Attributes:
        do: Does it, given the time; returns the answer.
    """

    do: Callable[[float], Any]


Item: TypeAlias = DeviceCheckIn | Reported | Aborted | Spoilt | Command
