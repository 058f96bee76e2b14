"""A device's side of a round, as a table: ask, train, report, and forget nothing before it is told what became of it.

    state, actions = step(state, event)

It is pure, and its state is a row that the device writes before it does what the actions say. Whatever is lost on the way, and
whenever the device restarts, these hold:

- A report is sent again until the server answers it; past its time, the next check-in asks what became of it.
- What a client keeps from a round (a control variate, personal leaves) is pending until then: `KeepState` where the report is
  counted, `UndoState` where it is not. While that is not known, no new work is begun.
- Its own floor is looked at before any work is begun, and a round is charged to the day before its report is sent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from sumus.protocol.rows import changed

PATIENCE = 15.0
"""Seconds after which a message that got no answer is sent again, the first time; twice as long at each further time."""
LONGEST = 3600.0
"""The longest such wait."""
SENDS = 4
"""Times that a report is sent before its end is asked for."""


AT_ONCE = (0.0, 0.0)


class Phase(StrEnum):
    """Where a device stands."""

    IDLE = "idle"
    ASKED = "asked"
    TRAINING = "training"
    REPORTING = "reporting"


@dataclass(frozen=True)
class Floor:
    """What a device consents to, whatever a server asks for.

    steps, seconds, bytes, memory: of one round at most; memory in bytes.  rounds: a day at most.  contributors: of a sum that it
    goes into, at least.
    """

    steps: int = 10_000
    seconds: float = 3600.0
    bytes: int = 2**28
    rounds: int = 24
    contributors: int = 10
    memory: int = 2**32


@dataclass(frozen=True, slots=True)
class WorkOffer:
    """What an assignment asks for. unfit: why this device cannot do it at all, of a closed list; empty where it can."""

    session: str
    steps: int = 0
    seconds: float = 0.0
    bytes: int = 0
    contributors: int = 2**62
    memory: int = 0
    unfit: str = ""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device's row.

    serial: of its last check-in, and asked: the session that it asked for then.  session: that it works for, or does not know
    the end of.  unsettled: whether a report may have been sent for it, so that its end must be known first.  tries: messages
    since the last answer.  window: that the server gave last.  day, today: the day of the last round begun, and how many were
    begun on it.
    """

    phase: Phase = Phase.IDLE
    serial: int = 0
    asked: str = ""
    session: str = ""
    unsettled: bool = False
    tries: int = 0
    window: tuple[float, float] = (PATIENCE, 4 * PATIENCE)
    day: int = 0
    today: int = 0


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class WakeUp:
    """Its time has come, and its conditions are met. session: a new id, used if one is asked for."""

    session: str


@dataclass(frozen=True, slots=True)
class Assigned:
    """The server gives work. day: of the device's own calendar."""

    offer: WorkOffer
    day: int = 0


@dataclass(frozen=True, slots=True)
class ToldLater:
    """The server's `Later`: it has no work now. window: seconds to come back within."""

    window: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a session: "counted" (the server's `Accept`), "discarded" (its `Refuse`), or what its `Settle` says, in the
    same answer as work or a window: one of these, or "unknown"."""

    session: str
    outcome: str


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """The update is ready, and what the client would keep."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Training ended without an update: conditions lost, an error. reason: of a closed list."""

    reason: str


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """The server did not answer in time, could not be reached, or is busy. window: seconds to come back within, if it said so."""

    window: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class SessionUnknown:
    """The server does not know the session that a report is for."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """The process began anew with the row that was written last."""


Event: TypeAlias = (
    WakeUp | Assigned | ToldLater | Settled | TrainingDone | Failed | NoAnswer | SessionUnknown | Restarted
)

# ── actions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SendCheckIn:
    """Check in."""

    session: str
    serial: int
    previous: str | None


@dataclass(frozen=True, slots=True)
class StartWork:
    """Begin to work."""

    session: str


@dataclass(frozen=True, slots=True)
class SendReport:
    """Send the update, the same bytes at each time."""

    session: str


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Tell the server that no report will come."""

    session: str
    reason: str


@dataclass(frozen=True, slots=True)
class KeepState:
    """What the client kept from the round is from now on its state; its update may be forgotten."""

    session: str


@dataclass(frozen=True, slots=True)
class UndoState:
    """The client's state is what it was before the round; its update may be forgotten."""

    session: str


@dataclass(frozen=True, slots=True)
class SleepFor:
    """Wake again within so many seconds, at a moment drawn uniformly, and not when an earlier one said."""

    window: tuple[float, float]


Action: TypeAlias = SendCheckIn | StartWork | SendReport | SendAbort | KeepState | UndoState | SleepFor
Step: TypeAlias = tuple[DeviceState, tuple[Action, ...]]

# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ask(state: DeviceState, event: WakeUp, floor: Floor) -> Step:
    """Ask for work, and for the end of what is not settled. Where an answer was lost, this is a new request."""
    previous = state.session if state.unsettled else None
    tries = 1 + (state.tries if state.phase is Phase.ASKED else 0)
    asked = changed(
        state,
        phase=Phase.ASKED,
        serial=state.serial + 1,
        asked=event.session,
        session=previous or "",
        tries=tries,
    )
    return asked, (SendCheckIn(event.session, asked.serial, previous),)


def _consider(state: DeviceState, event: Assigned, floor: Floor) -> Step:
    """Work, where the floor allows it."""
    offer, today = event.offer, state.today if event.day == state.day else 0
    if offer.session != state.asked:  # it was long on its way, and was asked for by a check-in before
        return state, ()
    if state.unsettled:  # and the answer does not say what it asked for: not yet
        return state, (SleepFor(state.window),)
    if (reason := _too_much(offer, floor, today)) is not None:
        return changed(state, phase=Phase.IDLE, session="", tries=0), (
            SendAbort(offer.session, reason),
            SleepFor(state.window),
        )
    begun = changed(state, phase=Phase.TRAINING, session=offer.session, tries=0, day=event.day, today=today + 1)
    return begun, (StartWork(offer.session),)


def _too_much(offer: WorkOffer, floor: Floor, today: int) -> str | None:
    if offer.unfit:
        return offer.unfit
    for name in ("steps", "seconds", "bytes", "memory"):
        if getattr(offer, name) > getattr(floor, name):
            return f"floor-{name}"
    if offer.contributors < floor.contributors:
        return "floor-contributors"
    return "floor-rounds" if today >= floor.rounds else None


def _told(state: DeviceState, event: ToldLater, floor: Floor) -> Step:
    """Sleep within the server's window."""
    session = state.session if state.unsettled else ""
    return changed(state, phase=Phase.IDLE, session=session, tries=0, window=event.window), (SleepFor(event.window),)


def _settled(state: DeviceState, event: Settled, floor: Floor) -> Step:
    """The end of a session: keep or undo, and rest, or go on with what else the answer to a check-in brings. Of an unknown end,
    the report is sent again."""
    if not state.unsettled or event.session != state.session:
        return state, ()
    if event.outcome == "unknown":
        return changed(state, phase=Phase.REPORTING, tries=state.tries + 1), (SendReport(state.session),)
    ended = changed(state, session="", unsettled=False, tries=0)
    after = (KeepState(event.session) if event.outcome == "counted" else UndoState(event.session),)
    if state.phase is Phase.REPORTING:
        return changed(ended, phase=Phase.IDLE), (*after, SleepFor(state.window))
    return ended, after


def _send(state: DeviceState, event: TrainingDone, floor: Floor) -> Step:
    """Send the update; from now on its end must be known."""
    return changed(state, phase=Phase.REPORTING, unsettled=True, tries=1), (SendReport(state.session),)


def _give_up(state: DeviceState, event: Failed, floor: Floor) -> Step:
    """Tell the server that nothing will come."""
    return changed(state, phase=Phase.IDLE, session="", tries=0), (
        SendAbort(state.session, event.reason),
        SleepFor(state.window),
    )


def _wait(state: DeviceState, event: NoAnswer, floor: Floor) -> Step:
    """Nobody may come back at once: after an outage, as spread as the server last wanted it."""
    return state, (SleepFor(_widest(state.window, event.window, _backoff(state.tries))),)


def _wait_to_send(state: DeviceState, event: NoAnswer, floor: Floor) -> Step:
    """Wait a little, each time twice as long."""
    return state, (SleepFor(_widest(event.window, _backoff(state.tries))),)


def _send_again(state: DeviceState, event: WakeUp, floor: Floor) -> Step:
    """Again, and after many times ask what became of it."""
    if state.tries >= SENDS:
        return _ask(state, event, floor)
    return changed(state, tries=state.tries + 1), (SendReport(state.session),)


def _ask_later(state: DeviceState, event: SessionUnknown, floor: Floor) -> Step:
    """Do not send again: the next check-in asks what became of it."""
    return changed(state, tries=max(SENDS, state.tries)), (SleepFor(state.window),)


def _backoff(tries: int) -> tuple[float, float]:
    first = min(LONGEST / 2, PATIENCE * 2.0 ** max(0, tries - 1))
    return first, 2 * first


def _widest(*windows: tuple[float, float]) -> tuple[float, float]:
    """Not sooner than any of them begins, and as spread as the last of them ends."""
    return max(first for first, _ in windows), max(last for _, last in windows)


def _restart(state: DeviceState, event: Restarted, floor: Floor) -> Step:
    """What was in memory is gone; an update is not: it was written before it was sent. Whoever started it waits for a word: it
    asks, or sends, at once."""
    if state.phase is Phase.REPORTING:
        return state, (SleepFor(AT_ONCE),)
    session = state.session if state.unsettled else ""
    return changed(state, phase=Phase.IDLE, session=session, tries=0), (SleepFor(AT_ONCE),)


Rule: TypeAlias = Callable[[DeviceState, "Event", Floor], Step]

TABLE: Mapping[tuple[Phase, type], Rule] = {
    (Phase.IDLE, WakeUp): _ask,
    (Phase.ASKED, WakeUp): _ask,
    (Phase.ASKED, Assigned): _consider,
    (Phase.ASKED, ToldLater): _told,
    (Phase.ASKED, Settled): _settled,
    (Phase.ASKED, NoAnswer): _wait,
    (Phase.TRAINING, TrainingDone): _send,
    (Phase.TRAINING, Failed): _give_up,
    (Phase.REPORTING, WakeUp): _send_again,
    (Phase.REPORTING, Settled): _settled,
    (Phase.REPORTING, NoAnswer): _wait_to_send,
    (Phase.REPORTING, SessionUnknown): _ask_later,
    **{(phase, Restarted): _restart for phase in Phase},
}  # pyright: ignore[reportAssignmentType]
"""(phase, event) → what is done. What is not in it changes nothing: an answer that came late, or twice."""


def step(state: DeviceState, event: Event, floor: Floor = Floor()) -> Step:
    """The row as it is to be written, and what to do once it is."""
    rule = TABLE.get((state.phase, type(event)))
    return (state, ()) if rule is None else rule(state, event, floor)
