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
    "this device's key is in use elsewhere, or its folder is an old copy: the server has answered check-in {}, and the last one "
    "of this folder is {}. If two machines use copies of one folder, let only one of them continue, and enrol the other with a "
    "link and a folder of its own. If the folder was restored from a backup, do nothing: the device continues by itself"
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
    "asking": "for an answer from the server above its edge",
    "battery": "until its battery is charged further, as the plan requires",
    "cap": "for nothing more: it has taken part in all the rounds that the plan allows it",
    "charging": "until it is charging, as the plan requires (give --always for a machine that always charges)",
    "closed": "for the next round",
    "few": "until enough devices are enrolled for a sum",
    "full": "for the next round: this one has enough devices",
    "idle": "until nobody uses the machine, as the plan requires (give --always if nobody ever uses it)",
    "left": "for the next round: a device with the same link has taken part in this one, and has left",
    "not_edge": "until its edge may report for more devices: ask the edge's operator",
    "nothing to do": "for work: the server has no work of a kind that this device accepts",
    "pace": "for the next round: the plan leaves time between rounds",
    "parent": "until the work that it was given through another edge has ended",
    "paused": "until the server's operator resumes the task",
    "resting": "for a while, since this device did not finish earlier work",
    "separation": "until other devices have had their turn",
    "unmetered": "until its network is unmetered, as the plan requires (give --always for a network that always is)",
    "version": "for a newer version of its program, as the plan requires: update the program",
}
"""The possible reasons for a device's waiting, by the server's code. The words follow "it waits"."""
FINAL: Mapping[str, str] = {
    "not_device": "this link is for an edge, but not for a device: ask for a device's link",
    "revoked": "the server has barred this device: ask the server's operator; predictions still work",
    "wrong_task": "the server has no task with this model and these data: update the file that defines them",
    "old_protocol": "the server uses another version of the protocol: update sumus here or on the server",
    "unknown_device": "the server does not know this device: it was removed there, or the server was restored from a "
    "backup that is older than the device; enrol it again, with a new link",
}
"""Codes of refused check-ins that require a person to act."""
_REFUSED_ENROLMENT: Mapping[str, str] = {
    "bad_token": "the server does not know this token: ask for a new link",
    "token_used": "this link was used already, or has expired: ask for a new link",
    "quota": "the server accepts no more devices: ask the server's operator",
    "revoked": "the server has barred this device: ask the server's operator",
}
_BEYOND: Mapping[str, str] = {
    "steps": "the round takes {} local steps",
    "seconds": "the round takes about {} seconds of training here",
    "bytes": "the round takes {} for the plan, the model and the report together",
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
            f"the server's sums have at least {offer.contributors} contributors, but you consent to no fewer than "
            f"{consented}: join with --floor contributors={offer.contributors}"
        )
    if name == "rounds":
        a_day = many(consented, "round")
        return (
            f"you consent to {a_day} a day, and today's limit is reached: wait, or join with a higher --floor rounds=N"
        )
    asked = math.ceil(getattr(offer, name))
    takes, most = (amount(each) if name in ("bytes", "memory") else f"{each:,.0f}" for each in (asked, consented))
    return f"{_BEYOND[name].format(takes)}, but you consent to {most}: join with --floor {name}={asked}"


def abort_reason(error: Exception) -> AbortReason:
    """Return the single word that the server is told about an error."""
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
