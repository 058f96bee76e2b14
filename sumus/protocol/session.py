"""A device's side of a round, as a table: check in, train, report, and keep the report until the server has told the device how
the session ended. A session is the work of one device for one round.

    state, actions = step(state, event)

`step` is a pure function. Its state is a row that the device writes to its disk before it carries out the actions. These rules
hold even if messages are lost or the device restarts at any moment:

- A report is sent again until the server answers. If there is no answer after several attempts, the device asks with its next
  check-in how the session ended.
- The client state from a round (a control variate, personal leaves) is pending until the device knows how the session ended: it
  is kept if the report is counted (`KeepState`), and undone if not (`UndoState`). Until then no new work begins.
- The device's floor (the limits of its consent, `Floor`) is checked before any work begins. A round is counted towards the
  limit of its day before its report is sent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from sumus.protocol.rows import changed

PATIENCE = 15.0
"""The time until a message without an answer is sent again for the first time, in seconds. It doubles with each further
attempt.
"""
LONGEST = 3600.0
"""The longest time until a message is sent again, in seconds."""
SENDS = 4
"""The number of attempts to send a report before the device asks how the session ended."""


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
        steps: The largest number of local steps in one round.
        seconds: The longest time for the work of one round, in seconds.
        bytes: The largest number of bytes that one round may send and receive.
        rounds: The largest number of rounds in one day.
        contributors: The smallest number of contributors of a sum that may contain the device's update.
        memory: The largest amount of memory for one round, in bytes.
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
        steps: The number of local steps.
        seconds: The time that the work takes, in seconds.
        bytes: The number of bytes to send and receive.
        contributors: The smallest number of contributors of the sum.
        memory: The memory that the work needs, in bytes.
        unfit: The reason for an abort if this device cannot do the work at all; empty if it can.
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
        phase: The phase that the device is in.
        serial: The serial number of its last check-in.
        asked: The session that it asked for in that check-in.
        session: The session for which the device works, or whose end it does not know; empty if it has none.
        unsettled: Whether a report may have been sent for the session. Then the device must know how the session ended before
            it begins new work.
        tries: The number of messages that it has sent since the last answer.
        window: The last window from the server for coming back: the first and the last second.
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
    """The device wakes at its chosen time, and its conditions are met.

    Attributes:
        session: A new id for the session, if the device asks for work now.
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
    """The server tells the device how a session ended.

    Attributes:
        session: The session.
        outcome: "counted" (the server's `Accept`) or "discarded" (its `Refuse`). In the answer to a check-in (its
            `Settle`) it may also be "unknown".
    """

    session: str
    outcome: str


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """Training is done: the update and the new client state are ready."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Training ended without an update: the device's conditions are no longer met, or an error happened.

    Attributes:
        reason: The reason, as in the message `Abort`.
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
    """The server does not know the session of a report."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """The process has started again, with the last written row."""


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
        previous: The session whose end the device asks for; None if there is none.
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
    """Tell the server that no report of the session will come."""

    session: str
    reason: str


@dataclass(frozen=True, slots=True)
class KeepState:
    """Store the pending state as the client's state. The update may be deleted."""

    session: str


@dataclass(frozen=True, slots=True)
class UndoState:
    """Restore the client's state from before the round. The update may be deleted."""

    session: str


@dataclass(frozen=True, slots=True)
class SleepFor:
    """Wake at a random moment, drawn uniformly from this window of seconds. It replaces an earlier `SleepFor`."""

    window: tuple[float, float]


Action: TypeAlias = SendCheckIn | StartWork | SendReport | SendAbort | KeepState | UndoState | SleepFor
Step: TypeAlias = tuple[DeviceState, tuple[Action, ...]]

# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ask(state: DeviceState, event: WakeUp, floor: Floor) -> Step:
    """Send a check-in: ask for work, and for the end of an unsettled session. If an answer was lost, this is a new request."""
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
    """End the session: keep or undo its client state, and then sleep or continue with the rest of the answer to a check-in. If
    the outcome is unknown, send the report again.
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
    """Send the report. The session is unsettled until the server tells the device how it ended."""
    return changed(state, phase=Phase.REPORTING, unsettled=True, tries=1), (SendReport(state.session),)


def _give_up(state: DeviceState, event: Failed, floor: Floor) -> Step:
    """Tell the server that no report will come."""
    return changed(state, phase=Phase.IDLE, session="", tries=0), (
        SendAbort(state.session, event.reason),
        SleepFor(state.window),
    )


def _wait(state: DeviceState, event: NoAnswer, floor: Floor) -> Step:
    """Wait for at least the server's last window, so that not all devices come back at the same moment when an outage ends."""
    return state, (SleepFor(_widest(state.window, event.window, _backoff(state.tries))),)


def _wait_to_send(state: DeviceState, event: NoAnswer, floor: Floor) -> Step:
    """Wait before the next attempt; the time doubles with each attempt."""
    return state, (SleepFor(_widest(event.window, _backoff(state.tries))),)


def _send_again(state: DeviceState, event: WakeUp, floor: Floor) -> Step:
    """Send the report again; after several attempts, ask how the session ended."""
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
    """Return a window from the latest start to the latest end of these windows."""
    return max(first for first, _ in windows), max(last for _, last in windows)


def _restart(state: DeviceState, event: Restarted, floor: Floor) -> Step:
    """Check in, or send the report, at once: the person who started the device is waiting for a result. Unfinished training was
    in memory and is lost; updates are not lost, since they are written to the disk before they are sent.
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
"""The table: (phase, event) → rule. A pair that is not in the table changes nothing: the answer came late, or a second time."""


def step(state: DeviceState, event: Event, floor: Floor = Floor()) -> Step:
    """Return the row to write, and the actions to carry out once it is written."""
    rule = TABLE.get((state.phase, type(event)))
    return (state, ()) if rule is None else rule(state, event, floor)
