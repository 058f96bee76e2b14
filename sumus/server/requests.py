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
        reason: The reason, from the protocol's closed list of reasons.
        parent: The edge that sent the message for one of its devices; empty if the device itself sent it.
    """

    run: Run
    session: str
    reason: str
    parent: str = ""


@dataclass(frozen=True)
class Spoilt:
    """A request to give the place of a session in its round to another device, since its report can never be counted.

    Attributes:
        run: The run that gave the session.
        session: The session.
        code: The error code, from the protocol's closed list of error codes.
    """

    run: Run
    session: str
    code: str


@dataclass(frozen=True)
class Command:
    """A command of an admin or of the process itself, which is carried out between other decisions.

    Attributes:
        do: A function that carries out the command. Its argument is the time; its result is the answer.
    """

    do: Callable[[float], Any]


Item: TypeAlias = DeviceCheckIn | Reported | Aborted | Spoilt | Command
