"""Messages from a device to its owner: the server's codes in words, and what to do about them."""

import math
from collections.abc import Mapping

from sumus.errors import (
    BeyondBoundError,
    DataError,
    DivergedError,
    ParticipantError,
    PlanError,
    SumusError,
    TaskError,
    UsageError,
)
from sumus.errors import said as said_of
from sumus.protocol.session import Floor, WorkOffer
from sumus.text import amount, many
from sumus.wire.messages import AbortReason, Refused

COPIED = (
    "somebody else asks with this device's key: the server has answered check-in {}, and the last one of this folder is {}. The "
    "folder was copied to another machine, or put back from a backup. Of two machines with one folder let one go on alone, and "
    "enrol the other with a link and a folder of its own; a folder that was put back goes on by itself"
)
REFUSALS = frozenset(
    {
        "malformed",
        "digest_required",
        "bad_report",
        "not_finite",
        "out_of_bounds",
        "empty",
        "closed",
        "stale",
        "phase",
        "too_large",
        "encoding",
    }
)
"""Codes that mean that the server has not counted a report, and never will."""
WAITS: Mapping[str, str] = {
    "asking": "for the server above its edge to answer",
    "battery": "until its battery is charged further, as the plan asks",
    "cap": "for nothing more: it has had all the rounds that the plan gives it",
    "charging": "until it is charging, as the plan asks (--always, for a machine that always is)",
    "closed": "for the next round",
    "few": "until enough devices are enrolled for a sum",
    "full": "for the next round: this one has all its devices",
    "idle": "until nobody uses it, as the plan asks (--always, for a machine that nobody does)",
    "left": "for the next round: somebody who came with the same link is in this one, and has left",
    "not_edge": "until its edge may speak for more devices: ask who runs the edge",
    "nothing to do": "for work: the server has none of the kinds that it takes",
    "pace": "for the next round: the plan leaves time between rounds",
    "parent": "until the work that it has by way of another edge has ended",
    "paused": "until the server's operator lets it go on",
    "resting": "for a while, since earlier work of this device did not come to an end",
    "separation": "until others have had their turn",
    "unmetered": "until its network is unmetered, as the plan asks (--always, for one that always is)",
    "version": "for a newer version of the program that it is part of, as the plan asks: update it",
}
"""The possible reasons for a device's waiting, by the server's code. The words follow "it waits"."""
FINAL: Mapping[str, str] = {
    "not_device": "this link is for an edge, and not for a device: ask for another one",
    "revoked": "the server has barred this device: ask who runs it; predictions go on working",
    "wrong_task": "the server has no task with this model and these data: update the file that defines them",
    "old_protocol": "the server speaks another version of the protocol: update sumus, here or there",
    "unknown_device": "the server does not know this device: it was let go there, or the server was put back from a backup "
    "that is older than this device; enrol it again, with a new link",
}
"""Codes of refused check-ins that require a person to act."""
_REFUSED_ENROLMENT: Mapping[str, str] = {
    "bad_token": "the server does not know this token: ask for a new link",
    "token_used": "this link was used already, or its time is over: ask for a new one",
    "quota": "the server takes no more devices: ask who runs it",
    "revoked": "the server has barred this device: ask who runs it",
}
_BEYOND: Mapping[str, str] = {
    "steps": "the round takes {} local steps",
    "seconds": "the round takes some {} seconds of training here",
    "bytes": "the round takes {}, plan, model and report together",
    "memory": "a local step takes at least {} of memory",
}
_REASONS: tuple[tuple[type[Exception], AbortReason], ...] = (
    (DivergedError, "diverged"),
    (BeyondBoundError, "diverged"),
    (DataError, "data"),
    (TaskError, "task"),
    (PlanError, "plan"),
    (ParticipantError, "plan"),
    (UsageError, "plan"),
    (MemoryError, "memory"),
)


def beyond_floor(reason: str, offer: WorkOffer, floor: Floor) -> str:
    """Explain how an offer exceeds the floor, and which option would consent to it.

    Args:
        reason: Why the offer was refused.
        offer: The work that the server offers.
        floor: The owner's limits.

    Returns:
        A sentence for the owner; empty if the floor is not the reason.
    """
    name = reason.removeprefix("floor-")
    if name == reason or not hasattr(floor, name):
        return ""
    consented = getattr(floor, name)
    if name == "contributors":
        return (
            f"the server's sums have at least {offer.contributors} contributors, and you consent to {consented} and more: join "
            f"with --floor contributors={offer.contributors}"
        )
    if name == "rounds":
        a_day = many(consented, "round")
        return f"you consent to {a_day} a day, and so many were begun: wait, or join with a greater --floor rounds=N"
    asked = math.ceil(getattr(offer, name))
    takes, most = (amount(each) if name in ("bytes", "memory") else f"{each:,.0f}" for each in (asked, consented))
    return f"{_BEYOND[name].format(takes)}, and you consent to {most}: join with --floor {name}={asked}"


def abort_reason(error: Exception) -> AbortReason:
    """Return the one word for an error that the server is told."""
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return "memory" if ran_out_of_memory(error) else "other"


def ran_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that the memory of the machine or of a GPU was not enough."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def failure_in_words(error: Exception) -> str:
    """Explain to the owner why a piece of work failed."""
    return str(error) if isinstance(error, SumusError) else f"this round's work failed with {said_of(error)}"


def refused_enrolment(refused: Refused) -> str:
    """Explain why the server does not enrol the device, and what to do."""
    code = refused.problem.code
    said = _REFUSED_ENROLMENT.get(code, "the server does not enrol this device")
    return f"{said} ({refused.problem.detail or code})"
