"""A device's side of a round, as a table: check in, train, report, and keep everything until the server has said how
the session ended.

    state, actions = step(state, event)

`step` is a pure function. Its state is a row that the device writes before it carries out the actions. Whichever
messages are lost, and whenever the device restarts, these rules hold:

- A report is sent again until the server answers it. If there is no answer after several times, the next check-in asks
  how the session ended.
- What a client keeps from a round (a control variate, personal leaves) is pending until the session's end is known:
  `KeepState` if the report is counted, `UndoState` if it is not. Until then no new work is begun.
- The device's own floor is checked before any work is begun. A round is charged to its day before its report is sent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from sumus.protocol.rows import changed

PATIENCE = 15.0
"""Seconds until a message without an answer is sent again for the first time. The time doubles at each further attempt."""
LONGEST = 3600.0
"""The longest time until a message is sent again, in seconds."""
SENDS = 4
"""The number of times that a report is sent before the device asks how the session ended."""


AT_ONCE = (0.0, 0.0)


class Phase(StrEnum):
    """The phase that a device is in."""

    IDLE = "idle"
    ASKED = "asked"
    TRAINING = "training"
    REPORTING = "reporting"


@dataclass(frozen=True)
class Floor:
    """The limits of what a device consents to, whatever a server asks for.

    Attributes:
        steps: The most local steps in one round.
        seconds: The most seconds for one round.
        bytes: The most bytes that one round may send and receive.
        rounds: The most rounds in one day.
        contributors: The least contributors of a sum that the device's update goes into.
        memory: The most memory for one round, in bytes.
    """

    steps: int = 10_000
    seconds: float = 3600.0
    bytes: int = 2**28
    rounds: int = 24
    contributors: int = 10
    memory: int = 2**32


@dataclass(frozen=True, slots=True)
class WorkOffer:
    """The demands of an assignment on a device.

    Attributes:
        session: The session's id.
        steps: Local steps.
        seconds: Seconds that the work takes.
        bytes: Bytes to send and receive.
        contributors: The least contributors of the sum.
        memory: Bytes of memory.
        unfit: Why this device cannot do the work at all, as a reason of an abort; empty if it can.
    """

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

    Attributes:
        phase: The phase that it is in.
        serial: The serial of its last check-in.
        asked: The session that it asked for in that check-in.
        session: The session for which it works, or of which it does not know the end; empty if it has none.
        unsettled: Whether a report may have been sent for the session, so that the session's end must be known first.
        tries: How many messages it has sent since the last answer.
        window: The window that the server gave last: the first and last second in which to come back.
        day: The day on which it last began a round, by the device's own calendar.
        today: The number of rounds that it began on that day.
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
    """The time to wake has come, and the device's conditions are met.

    Attributes:
        session: A new id, used if a session is asked for.
    """

    session: str


@dataclass(frozen=True, slots=True)
class Assigned:
    """The server gives work.

    Attributes:
        offer: The demands of the work.
        day: The day, by the device's own calendar.
    """

    offer: WorkOffer
    day: int = 0


@dataclass(frozen=True, slots=True)
class ToldLater:
    """The server has no work now (its action `Later`).

    Attributes:
        window: The first and last second in which to come back.
    """

    window: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Settled:
    """The server says how a session ended.

    Attributes:
        session: The session.
        outcome: "counted" (the server's `Accept`) or "discarded" (its `Refuse`). In the answer to a check-in (its
            `Settle`) it may also be "unknown".
    """

    session: str
    outcome: str


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """Training is done: the update is ready, and so is the state that the client would keep."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Training ended without an update, since conditions were lost or an error happened.

    Attributes:
        reason: The reason, as in an abort.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """The server did not answer in time, could not be reached, or is busy.

    Attributes:
        window: The first and last second in which to come back, if the server gave them.
    """

    window: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class SessionUnknown:
    """The server does not know the session that a report is for."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """The process has started again, with the row that was written last."""


Event: TypeAlias = (
    WakeUp | Assigned | ToldLater | Settled | TrainingDone | Failed | NoAnswer | SessionUnknown | Restarted
)

# ── actions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SendCheckIn:
    """Send a check-in.

    Attributes:
        session: The id for the work that may be given.
        serial: The check-in's serial.
        previous: The session whose end is asked for; None if the device asks for no outcome.
    """

    session: str
    serial: int
    previous: str | None


@dataclass(frozen=True, slots=True)
class StartWork:
    """Begin to work."""

    session: str


@dataclass(frozen=True, slots=True)
class SendReport:
    """Send the report, with the same bytes each time."""

    session: str


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Tell the server that no report will come."""

    session: str
    reason: str


@dataclass(frozen=True, slots=True)
class KeepState:
    """Make the pending state the client's state. The update may be deleted."""

    session: str


@dataclass(frozen=True, slots=True)
class UndoState:
    """Go back to the client's state from before the round. The update may be deleted."""

    session: str


@dataclass(frozen=True, slots=True)
class SleepFor:
    """Wake at a moment drawn uniformly from this window of seconds. An earlier `SleepFor` no longer counts."""

    window: tuple[float, float]


Action: TypeAlias = SendCheckIn | StartWork | SendReport | SendAbort | KeepState | UndoState | SleepFor
Step: TypeAlias = tuple[DeviceState, tuple[Action, ...]]

# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ask(state: DeviceState, event: WakeUp, floor: Floor) -> Step:
    """Ask for work, and for the end of an unsettled session. After a lost answer this is a new request."""
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
    """Start the work, if the floor allows it; otherwise abort the session."""
    offer, today = event.offer, state.today if event.day == state.day else 0
    if offer.session != state.asked:  # this late answer belongs to an earlier check-in
        return state, ()
    if state.unsettled:  # the answer does not say how the previous session ended: do not begin yet
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
    """End the session: keep or undo its state, and then sleep, or go on with the rest of a check-in's answer. If the end is
    unknown, send the report again.
    """
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
    """Send the report. The session is unsettled until the server says how it ended."""
    return changed(state, phase=Phase.REPORTING, unsettled=True, tries=1), (SendReport(state.session),)


def _give_up(state: DeviceState, event: Failed, floor: Floor) -> Step:
    """Tell the server that no report will come."""
    return changed(state, phase=Phase.IDLE, session="", tries=0), (
        SendAbort(state.session, event.reason),
        SleepFor(state.window),
    )


def _wait(state: DeviceState, event: NoAnswer, floor: Floor) -> Step:
    """Back off over at least the server's last window, so that an outage does not end with all devices coming back at
    once."""
    return state, (SleepFor(_widest(state.window, event.window, _backoff(state.tries))),)


def _wait_to_send(state: DeviceState, event: NoAnswer, floor: Floor) -> Step:
    """Wait before sending again, each time twice as long."""
    return state, (SleepFor(_widest(event.window, _backoff(state.tries))),)


def _send_again(state: DeviceState, event: WakeUp, floor: Floor) -> Step:
    """Send the report again or, after several times, ask how the session ended."""
    if state.tries >= SENDS:
        return _ask(state, event, floor)
    return changed(state, tries=state.tries + 1), (SendReport(state.session),)


def _ask_later(state: DeviceState, event: SessionUnknown, floor: Floor) -> Step:
    """Do not send again: the next check-in asks how the session ended."""
    return changed(state, tries=max(SENDS, state.tries)), (SleepFor(state.window),)


def _backoff(tries: int) -> tuple[float, float]:
    first = min(LONGEST / 2, PATIENCE * 2.0 ** max(0, tries - 1))
    return first, 2 * first


def _widest(*windows: tuple[float, float]) -> tuple[float, float]:
    """Return a window from the latest begin to the latest end of these windows."""
    return max(first for first, _ in windows), max(last for _, last in windows)


def _restart(state: DeviceState, event: Restarted, floor: Floor) -> Step:
    """Ask or send at once, since the person who started the device waits for a message. Training in memory is lost, but updates
    are not: they are written before they are sent.
    """
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
"""(phase, event) → rule. A pair that is not in the table changes nothing: the answer came late, or twice."""


def step(state: DeviceState, event: Event, floor: Floor = Floor()) -> Step:
    """Return the row to write, and the actions to carry out once it is written."""
    rule = TABLE.get((state.phase, type(event)))
    return (state, ()) if rule is None else rule(state, event, floor)
