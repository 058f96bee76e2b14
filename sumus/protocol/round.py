"""A round as a table: the events that may happen in each state, and the resulting actions.

    decision = decide(facts, event)

The function is pure: it reads no clock, no rows and no random numbers. A *driver* calls it: a server, an edge, the simulator's
virtual clock, or the fault tests. In one transaction, the driver reads `Facts` from its store, decides, and writes
`decision.rounds` and `decision.sessions`. After the transaction is durable, the driver carries out `decision.actions`.

Theory of operation
===================

A round is a row. It moves through five states, and never backwards.

    planned      The round will begin. The leader's `Tick` opens it, unless the run is paused or the pace requires more time.
    open         Devices are given sessions (`CheckIn`), and report. Reports are staged, and counted by `Commit`.
    closing      Reports are no longer counted. The leader makes a model of the sum, however long that takes.
    published    The model exists. In synchronous rounds, the next round is planned in the same transaction.
    abandoned    The round makes no model: too few devices reported by its end, an admin cancelled it, or its sum was unusable.
                 The sum is destroyed, and the next round is planned in the same transaction, if none is open already.

The actions that answer a device in a round:

    CheckIn   ─► AssignWork      the device gets a session; it trains, and sends its update
    Report    ─► StageReport     the update waits in memory, and is not acknowledged yet
    Commit    ─► AcceptReport    the update is in the round's sum, by the same transaction
    Published                    the sum has become a model

A report that is not accepted is refused with the reason. A device that got no answer sends the session in its next check-in
(`CheckIn.previous`), and is told how the session ended.

Sources of events. Devices and edges cause `CheckIn`, `Report` and `Dropped`, through any of the processes that share a store.
Each process causes `Commit` for the reports that wait in its own memory, and `Overdue` for a session that sent a bad report.
One process leads: it alone causes `Tick`, `Overdue` when time passes, and `Published` when it has made a model. An admin causes
`Cancelled`. A process that takes the lead causes `Recovered` for every round.

What survives a crash. Rows survive: rounds, sessions, devices. Staged reports are lost, since they were in memory. They were
not accepted, so their devices send them again. A round that was closing is closed again by the new leader (`Recovered` yields
`CloseRound`), and gives the same model, since its sum is durable. A round that was abandoned is abandoned again, since its sum
may not be destroyed yet. A *fence* is a number that tells leaders apart: each leader writes a higher fence into the rows, and a
leader with a lower fence cannot write.

Every event may come at any time, too late, or several times. Events from devices and edges are decided in every state. Events
from the leader and from admins are allowed only in the states of the table; in other states they change nothing, and are
counted as illegal. If illegal events keep coming, a driver probably has a defect, or there are two leaders.

Synchronous rounds and buffers. Both use this table, with different `Pacing`. In a synchronous round, devices are chosen, and
only chosen devices are counted. A buffer (an asynchronous round) counts the next reports, whichever model they began from: the
next buffer opens in the transaction that closes the previous one, and sessions continue from one to the next.

Places. A round has a limited number of *places*, and each session holds one: the places are for the chosen devices of a
synchronous round, or for the devices that train at the same time for a buffer. A session that ends without a report frees its
place, and the next device that checks in gets the place. A session that is silent for longer than such work takes
(`lets_go_at`) also loses its place: it has *lapsed*. Its report is still counted if the round has a free place. A device whose
session has lapsed rests, longer each time, until one of its reports is counted (`rested`). These rules need a deadline: without
a deadline, sessions do not lapse, and the devices of a synchronous round are not replaced.

Three numbers are easily confused. `Round.number` counts sums, published or abandoned. `Session.version` counts the
models that were published before the session was given. `Session.sum` is the number of the round whose sum has the report;
in a buffer that may be a later round than `Session.round`, in which the session was given.

Warning. A driver may write the rows only if their state and fence have not changed since they were read, and may carry out
actions only when the rows are durable. If a driver answers a device earlier, a crash can make the answer wrong; the fault tests
find such drivers.

Related tables. An edge's sum is one report of many sessions, which is counted completely or not at all. The sum of a cohort of
secure aggregation will be a report of the same kind, and a cohort will have its own table.

`TABLE` holds all rules. The diagram in docs/protocol.md is drawn from it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TypeAlias

from sumus.pacing import Conditions, Pacing
from sumus.protocol.rows import changed
from sumus.protocol.steering import window
from sumus.protocol.table import EventTable


class State(StrEnum):
    """The state of a round."""

    PLANNED = "planned"
    OPEN = "open"
    CLOSING = "closing"
    PUBLISHED = "published"
    ABANDONED = "abandoned"


ORDER = tuple(State)
"""The order of the states; a round never moves backwards."""

# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Round:
    """The row of a round.

    Attributes:
        number: The round's number, counted from 0.
        state: The round's state.
        since: The time at which the round entered this state, in seconds of the store's clock.
        fence: The fence of the leader that wrote the row.
        given: The number of places that were given to devices. A device that asks again in the same round counts once. The
            number of a buffer starts with the sessions that held a place when the previous buffer closed. A lapsed session adds
            one if its report is counted later.
        dropped: The number of given places whose device now has neither a place nor a report in the sum.
        counted: The number of reports in the sum.
        reason: The reason why the round was abandoned; else empty.

    """

    number: int
    state: State = State.PLANNED
    since: float = 0.0
    fence: int = 0
    given: int = 0
    dropped: int = 0
    counted: int = 0
    reason: str = ""

    @property
    def over(self) -> bool:
        """Whether the round is published or abandoned."""
        return self.state in (State.PUBLISHED, State.ABANDONED)

    @property
    def out(self) -> int:
        """The number of sessions that hold a place and are expected to report."""
        return self.given - self.dropped - self.counted


@dataclass(frozen=True, slots=True)
class Session:
    """The row of a session: one device's work for one round. Every message about the session has its id, so a repeated message
    has no further effect.

    Attributes:
        id: The device's id, a slash, and a word that the device chose.
        device: The device's id.
        serial: The serial number of the check-in for which the session was given.
        round: The number of the round in which the session was given.
        version: The number of models published by then; it identifies the model from which the device began.
        expires: The time after which a report of the session is not counted, by the store's clock.
        state: "out" while the session holds its place; "lapsed" if it has lost its place and may still report; "counted";
            "dropped"; "late" if a report came after the session was dropped. From a late report, only the duration of the work
            is used.
        reason: The reason why the session was dropped.
        sum: The number of the round whose sum has the report; None if no sum has it.
        staleness: The number of models that were published between the session's version and its counting.
        parent: The edge that asked for the session (only this edge may report for it); empty if the device itself asked.
        began: The time at which the session was given its place, by the store's clock.
    """

    id: str
    device: str
    serial: int
    round: int
    version: int
    expires: float
    state: str = "out"
    reason: str = ""
    sum: int | None = None
    staleness: int = 0
    parent: str = ""
    began: float = 0.0

    @property
    def awaited(self) -> bool:
        """Whether a report may still come, according to this row."""
        return self.state in ("out", "lapsed")


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """The row of a device.

    Attributes:
        id: The device's id.
        session: The session that the device was given last.
        last_sum: The round whose sum has the last counted report of the device.
        last_counted: The id of the session of that report. The device may not know yet that it was counted.
        times_counted: The number of times that the device was counted.
        lapses: The number of the device's sessions that have lapsed since it was last counted.
        rests_until: The time from which the device may get another place, by the store's clock.
        models: The number of sums of the run that will have become models when `last_sum` has become a model; one fewer if
            `last_sum` was abandoned.
    """

    id: str
    session: Session | None = None
    last_sum: int | None = None
    last_counted: str | None = None
    times_counted: int = 0
    lapses: int = 0
    rests_until: float = 0.0
    models: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts for a decision: rows that are read in the deciding transaction, and the circumstances of the run.

    Attributes:
        pacing: The pacing of the round.
        now: Seconds of the store's clock.
        round: The round that the event concerns; for check-ins, reports, commits and drops, the newest round.
        version: The number of published models.
        sessions: The rows of the sessions that the event names.
        device: The row of the device that checks in.
        paused: Whether the run is paused.
        population: The number of enrolled devices; 0 if it is not known.
        arriving: The recent rate of check-ins, per second; 0 if it is not known.
        lasts: The recent average duration of rounds, in seconds.
        waits: Whether an earlier round is not yet published.
        led: The time at which the present leader took the lead.
        takes: The time that a device needs for the work of this run, in seconds; 0 before the first report.
        takes_by_edge: The time between the assignment of work to an edge and the arrival of the edge's sum, in seconds; 0
            before the first sum.
        models: The number of sums that have become a model.
    """

    pacing: Pacing
    now: float
    round: Round
    version: int = 0
    sessions: tuple[Session, ...] = ()
    device: DeviceRow | None = None
    paused: bool = False
    population: int = 0
    arriving: float = 0.0
    lasts: float = 0.0
    waits: bool = False
    led: float = 0.0
    takes: float = 0.0
    takes_by_edge: float = 0.0
    models: int = 0


NOTHING_SAID = Conditions()
_DAY = 86400.0
MULTIPLE = 4.0
"""The multiple of the estimated time for the work (`learnt`) after which a session loses its place."""
SHARE = 0.25
"""The fraction of the deadline for which a session holds its place while there is no estimate of the time for the work."""
SHORTEST = 60.0
"""The shortest time for which a session holds its place, in seconds, unless `SHARE` gives less. It is enough to repeat a lost
message.
"""
LONGEST_REST = _DAY
"""The longest time for which a device rests, in seconds."""
UP, DOWN = 1.35, 0.9
"""The factors by which the estimated time changes: after a report that took longer, and after a report that did not. They
balance if three of four reports do not take longer.
"""
MOMENT = 1e-3
"""The smallest estimate of the time for work, in seconds."""
OVER = frozenset({"closed", "expired"})
"""Reasons for dropping a session whose device may still be at work."""
NO_FAULT = frozenset({"closed", "withdrawn", "revoked", "edge"})
"""Reasons for ending a session that are not the fault of its device."""

# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class CheckIn:
    """A device asks for work.

    Attributes:
        session: The id of the session that the device may be given.
        serial: The check-in's serial number, which grows with every check-in of a device.
        conditions: The conditions that the device reports, for example whether it is charging.
        previous: An earlier session whose end the device does not know; None if there is none.
        works: Whether the device asks for work; if False, it only asks how `previous` ended.
        parent: The edge that sends the check-in for the device; empty if the device sends it itself.
    """

    session: str
    serial: int
    conditions: Conditions = NOTHING_SAID
    previous: str | None = None
    works: bool = True
    parent: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A report of the sessions in the facts has arrived and has been checked.

    Attributes:
        parent: The edge whose sum the report is; empty for the update of a device.
    """

    parent: str = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """Add the staged reports to the sum in this transaction.

    Attributes:
        together: The number of sessions in each report, in the order of the facts; empty if each report has one session.
    """

    together: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """The sessions in the facts will not report: their devices gave up or left, or their round is over."""

    reason: str = "other"


@dataclass(frozen=True, slots=True)
class Overdue:
    """The sessions in the facts may have taken too long.

    Attributes:
        spoilt: Whether the sessions are named for another reason: they sent a report that can never be counted.
    """

    spoilt: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Published:
    """The model of the round's sum is published in this transaction."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """A leader took over with this fence: the memory of the previous leader is lost."""

    fence: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """An admin ends the round."""


Event: TypeAlias = CheckIn | Report | Commit | Dropped | Overdue | Tick | Published | Recovered | Cancelled

# ── actions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class AssignWork:
    """Answer a check-in with work."""

    session: Session


@dataclass(frozen=True, slots=True)
class ComeLater:
    """Answer a check-in: there is no work, and the device must come back within a window.

    Attributes:
        window: The first and the last second, counted from now; the device draws the moment uniformly.
        reason: Why there is no work, for the statistics.
    """

    window: tuple[float, float]
    reason: str


@dataclass(frozen=True, slots=True)
class SettleSession:
    """Tell a device how its earlier session ended: "counted", "discarded", or "unknown" (the device must send the report
    again).
    """

    session: str
    outcome: str


@dataclass(frozen=True, slots=True)
class StageReport:
    """Hold a session's update in memory for the next commit."""

    session: str


@dataclass(frozen=True, slots=True)
class AcceptReport:
    """Answer a report: the report is counted."""

    session: str


@dataclass(frozen=True, slots=True)
class RefuseReport:
    """Answer a report: the report is not counted and never will be."""

    session: str
    reason: str


@dataclass(frozen=True, slots=True)
class CloseRound:
    """Make a model of the round's sum. If the action is repeated, it gives the same model."""

    number: int


@dataclass(frozen=True, slots=True)
class AbandonRound:
    """Destroy the round's sum: no model is made of it."""

    number: int
    reason: str


Action: TypeAlias = (
    AssignWork | ComeLater | SettleSession | StageReport | AcceptReport | RefuseReport | CloseRound | AbandonRound
)


@dataclass(frozen=True, slots=True)
class Decision:
    """The rows to write, and the actions to carry out afterwards.

    Attributes:
        rounds: The rows of rounds to write, including new ones.
        sessions: The rows of sessions to write, including new ones.
        actions: The actions to carry out when the rows are durable.
        lapses: The ids of the written sessions that have lapsed; the device of each must then rest (`rested`).
    """

    rounds: tuple[Round, ...] = ()
    sessions: tuple[Session, ...] = ()
    actions: tuple[Action, ...] = ()
    lapses: tuple[str, ...] = ()


NOTHING = Decision()

# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def outcome(session: Session, facts: Facts) -> str:
    """Return how a session ended: "counted", "discarded", or "unknown" if it may still be counted.

    The session's row is not enough: its state may be "out" or "lapsed" although its round is over.
    """
    if not session.awaited:
        return "counted" if session.state == "counted" else "discarded"
    over = facts.now >= session.expires or (not facts.pacing.buffered and _is_over(session.round, facts.round))
    return "discarded" if over else "unknown"


def _is_over(number: int, current: Round) -> bool:
    """Return whether a synchronous round accepts no more reports."""
    return number != current.number or ORDER.index(current.state) > ORDER.index(State.OPEN)


def _check_in(facts: Facts, event: CheckIn) -> Decision:
    """Tell the device how its earlier session ended; then give it work, if work is available and the device may have it."""
    before = facts.device.session if facts.device else None
    if before is not None and event.serial < before.serial:
        return NOTHING  # the message was delayed, and the device no longer waits for the answer
    settled: list[Action] = []
    if event.previous is not None:
        ended = _end_of(event.previous, facts)
        settled = [SettleSession(event.previous, ended)]
        if ended == "unknown":
            return Decision(actions=tuple(settled))
    if not event.works:
        return Decision(actions=tuple(settled))
    if before is not None and event.serial == before.serial:  # a repeated request
        return Decision(actions=(*settled, AssignWork(before))) if outcome(before, facts) == "unknown" else NOTHING
    if before is not None and before.parent != event.parent and outcome(before, facts) == "unknown":
        wait = ComeLater(window(facts.pacing, facts.population, facts.arriving, _time_left(before, facts)), "parent")
        return Decision(
            actions=(*settled, wait)
        )  # the device may be in the sum of that edge, and must not be in two sums
    row, left, holds = facts.round, list[Session](), before is not None and _holds_place(before, facts.round, facts)
    if before is not None:  # a new request: if a report of that session is awaited, the device has forgotten it
        left, row = _gone(before, "forgotten", row, facts)
    if holds and not _gives_again(facts):  # the place counts as not given
        row = changed(facts.round, given=row.given - 1)
    if (reason := _not_now(facts, event, row)) is not None:
        later = ComeLater(
            window(facts.pacing, facts.population, facts.arriving, _until_next(facts, row, reason)), reason
        )
        lapses = [one.id for one in left if holds and _is_timed(facts) and row.state is State.OPEN]
        return _closed_if_over(facts, row, left, [*settled, later], lapses)
    given = _given(event, holds, facts)
    return _closed_if_over(facts, _with_place(before, holds, row, facts), [*left, given], [*settled, AssignWork(given)])


def _given(event: CheckIn, holds: bool, facts: Facts) -> Session:
    """Make a session for the device in the facts.

    Args:
        event: The check-in that asks for the session.
        holds: Whether the session takes over the place of the device's last session. Then the time for which that session has
            held the place is counted too: otherwise a device that forgets its work again and again would hold a place for ever.
        facts: The facts of the decision.
    """
    assert facts.device is not None
    last, row = facts.device.session, facts.round
    began = last.began if holds and last is not None else facts.now
    expires = facts.now + _lifetime(facts, row)
    return Session(
        event.session,
        facts.device.id,
        event.serial,
        row.number,
        facts.version,
        expires,
        parent=event.parent,
        began=began,
    )


def _with_place(before: Session | None, holds: bool, row: Round, facts: Facts) -> Round:
    """Return the round's row after the device in the facts was given a place. `before` is the device's last session."""
    of_this = before is not None and before.state != "counted" and before.round == row.number
    if (holds or of_this) and _gives_again(facts):  # the device is among those that were given a place
        return changed(row, dropped=row.dropped - 1)
    return changed(row, given=row.given + 1)


def _end_of(session: str, facts: Facts) -> str:
    """Return the outcome of the session that a device asks about. Only its last session and its last counted session are known;
    any other session is "discarded".
    """
    device = facts.device
    if device is not None and device.session is not None and device.session.id == session:
        return outcome(device.session, facts)
    return "counted" if device is not None and device.last_counted == session else "discarded"


def _not_now(facts: Facts, event: CheckIn, row: Round) -> str | None:
    """Return the reason why a device gets no work; None if it gets work."""
    pacing, device = facts.pacing, facts.device
    if (unmet := pacing.requires.unmet(event.conditions)) is not None:
        return unmet
    if facts.paused:
        return "paused"
    if device is not None and facts.now < device.rests_until:
        return "resting"
    if facts.now < begins_at(pacing, row):
        return "pace"
    late = row.state is State.OPEN and not pacing.buffered and _past_deadline(facts)
    if device is None or late or row.state is not State.OPEN:
        return "closed"
    if 0 < facts.population < pacing.fewest:
        return "few"  # a sum of so few devices would not be used
    if device.last_sum is not None and _models_left(device, row, facts) > 0:
        return "separation"
    if pacing.most_rounds is not None and device.times_counted >= pacing.most_rounds:
        return "cap"
    return None if room(facts.pacing, facts.population, row) > 0 else "full"


def _models_left(device: DeviceRow, row: Round, facts: Facts) -> int:
    """Return the number of models that must be made before a device may be in another sum; 0 or less if it may be in one now.

    An abandoned sum makes no model, so it does not shorten a device's wait.
    """
    if device.last_sum is None:
        return 0
    others = facts.models - device.models
    return facts.pacing.separation - 1 - others if facts.pacing.separation > 1 else int(row.number <= device.last_sum)


def room(pacing: Pacing, population: int, row: Round) -> int:
    """Return the number of places that may be given now. Without a deadline, the devices of a synchronous round are not
    replaced.

    Args:
        pacing: The pacing of the round.
        population: The number of enrolled devices; 0 if it is not known.
        row: The round.
    """
    if pacing.concurrency is not None:
        left = pacing.concurrency - row.out
        return left if pacing.every is None else min(left, pacing.cohort - row.counted - row.out)
    taken = row.given if pacing.deadline is None else row.given - row.dropped
    return min(pacing.chosen, population or pacing.chosen) - taken


def begins_at(pacing: Pacing, row: Round) -> float:
    """Return the time (of the store's clock) from which a planned round may open, or an open buffer may give work."""
    waits = row.state is State.OPEN if pacing.buffered else row.state is State.PLANNED
    return row.since + pacing.every if pacing.every is not None and waits and row.number else 0.0


def _is_timed(facts: Facts) -> bool:
    """Return whether sessions may lapse, and devices rest."""
    return facts.pacing.deadline is not None


def _gives_again(facts: Facts) -> bool:
    """Return whether a freed place of a synchronous round is given to another device."""
    return _is_timed(facts) and not facts.pacing.buffered


def patience(pacing: Pacing, takes: float) -> float:
    """Return the time for which a session may hold its place, in seconds: a multiple of the time for the work, at most the
    deadline.

    Args:
        pacing: The pacing of the round.
        takes: The time for the work, in seconds; 0 if it is not known.
    """
    if pacing.deadline is None:
        return float("inf")
    share = SHARE * pacing.deadline
    return share if takes <= 0 else min(pacing.deadline, max(MULTIPLE * takes, min(SHORTEST, share)))


def lets_go_at(session: Session, facts: Facts) -> float:
    """Return the time at which a silent session lapses. Time without a leader is not counted."""
    if not _is_timed(facts):
        return float("inf")
    return max(session.began, facts.led) + patience(facts.pacing, _takes(session, facts))


def _takes(session: Session, facts: Facts) -> float:
    return facts.takes_by_edge if session.parent else facts.takes


def learnt(takes: float, seconds: float) -> float:
    """Return the new estimate of the time for work, after one more report.

    The estimate approaches the time that three of four reports do not exceed. Each report changes it by a fixed factor, so a
    few devices that are slow or fast on purpose cannot change it much.

    Args:
        takes: The estimate so far, in seconds; 0 before the first report.
        seconds: The time that the report took, in seconds.
    """
    if takes <= 0:
        return max(seconds, MOMENT)
    return max(MOMENT, takes * (UP if seconds > takes else DOWN))


def rested(device: DeviceRow, session: Session, facts: Facts) -> DeviceRow:
    """Return the row of a device that must rest, since its session has lapsed.

    The device rests as long as it held the place. The time doubles with each further lapse, until one of its reports is
    counted.
    """
    held = min(facts.now - session.began, patience(facts.pacing, _takes(session, facts)))
    rest = min(LONGEST_REST, held * 2.0 ** min(device.lapses, 30))
    return changed(device, lapses=device.lapses + 1, rests_until=max(device.rests_until, facts.now + rest))


def forgiven(device: DeviceRow, late: Session) -> DeviceRow:
    """Undo the lapse of a session whose report came too late: its device was slow, but not silent."""
    if not device.lapses or device.rests_until <= late.began:
        return device
    return changed(device, lapses=device.lapses - 1, rests_until=0.0)


LEFT = float("inf")
"""The value of `DeviceRow.rests_until` for a device that has left while an edge may still report its work."""


def _lifetime(facts: Facts, row: Round) -> float:
    """Return the time until a session that is given now expires, in seconds."""
    if facts.pacing.deadline is None:
        return float("inf")
    return facts.pacing.deadline if facts.pacing.buffered else row.since + facts.pacing.deadline - facts.now


def _time_left(session: Session, facts: Facts) -> float:
    """Estimate the seconds until a session is over, however it ends."""
    return session.expires - facts.now if session.expires < float("inf") else facts.lasts


def _until_next(facts: Facts, row: Round, reason: str) -> float:
    """Estimate the seconds until work may be available for this device again."""
    if reason == "cap":
        return _DAY
    if reason == "pace":
        return begins_at(facts.pacing, row) - facts.now
    if reason == "resting" and facts.device is not None:
        return min(_DAY, facts.device.rests_until - facts.now)
    lasts = facts.lasts or facts.pacing.deadline or 0.0
    if reason == "separation" and facts.device is not None and facts.device.last_sum is not None:
        return lasts * _models_left(facts.device, row, facts)
    left = max(0.0, row.since + lasts - facts.now) if row.state is State.OPEN else 0.0
    return (
        min(left, patience(facts.pacing, facts.takes)) if reason == "full" else left
    )  # a session may lose its place by then


def _report(facts: Facts, event: Report) -> Decision:
    """Stage a report that may be counted, refuse one that may not, and accept a repeated report that is already counted."""
    if not facts.sessions or any(session.parent != event.parent for session in facts.sessions):
        return NOTHING  # the session is unknown, or belongs to another parent
    if all(outcome(session, facts) == "counted" for session in facts.sessions):
        return Decision(actions=tuple(AcceptReport(session.id) for session in facts.sessions))
    if (reason := _why_not(facts.sessions, facts)) is not None:
        row, written, refused = _refused(facts.sessions, reason, facts.round, facts)
        return _closed_if_over(facts, row, written, refused)
    return Decision(actions=tuple(StageReport(session.id) for session in facts.sessions))


def _refused(
    sessions: Sequence[Session], reason: str, row: Round, facts: Facts
) -> tuple[Round, list[Session], list[Action]]:
    """Refuse the report of these sessions; return the round's row, the session rows to write, and the answers."""
    written = list[Session]()
    for session in sessions:
        gone, row = _gone(session, reason, row, facts)
        heard = gone or [session] * (session.state == "dropped" and session.reason in OVER)
        written += [changed(one, state="late") if one.reason in OVER else one for one in heard]
    return row, written, [RefuseReport(session.id, reason) for session in sessions]


def _why_not(sessions: Sequence[Session], facts: Facts) -> str | None:
    """Return why the report of these sessions will never be counted; None if it may be counted.

    A sum cannot be divided, so the report of several sessions is counted completely or not at all.
    """
    if len(sessions) > 1 and any(outcome(session, facts) == "counted" for session in sessions):
        return "closed"  # one of the sessions is already in another sum
    return next((reason for session in sessions if (reason := _uncountable(session, facts)) is not None), None)


def _uncountable(session: Session, facts: Facts) -> str | None:
    """Return why a session's report will never be counted; None if it may be counted."""
    if outcome(session, facts) == "discarded":
        return session.reason or ("expired" if facts.now >= session.expires else "closed")
    if not (facts.round.state is State.OPEN or facts.pacing.buffered):
        return "phase"
    stale = facts.pacing.most_stale
    return "stale" if stale is not None and facts.version - session.version > stale else None


def _holds_place(session: Session, row: Round, facts: Facts) -> bool:
    """Return whether a session holds one of the places of this round."""
    return session.state == "out" and (facts.pacing.buffered or session.round == row.number)


def _gone(session: Session, reason: str, row: Round, facts: Facts) -> tuple[list[Session], Round]:
    """End a session without a counted report. Return the session rows to write (none if the session has already ended), and the
    round's row.
    """
    if not session.awaited:
        return [], row
    left = changed(row, dropped=row.dropped + 1) if _holds_place(session, row, facts) else row
    return [changed(session, state="dropped", reason=reason)], left


def _commit(facts: Facts, event: Commit) -> Decision:
    """Count staged reports until the cohort is complete, if the round is open; the last report that is needed closes the round.

    An edge's sum may exceed the cohort, up to the number of devices that were chosen. Reports for which a buffer has no room
    wait for the next buffer.
    """
    row, written, actions = facts.round, list[Session](), list[Action]()
    for sessions in _reports(facts, event):
        count = len(sessions)
        fits = row.state is State.OPEN and (
            row.counted < facts.pacing.cohort and row.counted + count <= facts.pacing.chosen
        )
        if all(outcome(session, facts) == "counted" for session in sessions):
            actions += [AcceptReport(session.id) for session in sessions]
        elif (reason := _why_not(sessions, facts)) is None and fits:
            for session in sessions:
                row = _counted(session, row, facts)
                stale = facts.version - session.version
                written.append(changed(session, state="counted", sum=row.number, staleness=stale))
                actions.append(AcceptReport(session.id))
        elif reason is None and facts.pacing.buffered:
            actions += [StageReport(session.id) for session in sessions]
        else:
            row, gone, refused = _refused(sessions, reason or "closed", row, facts)
            written += gone
            actions += refused
    return _closed_if_over(facts, row, written, actions)


def _counted(session: Session, row: Round, facts: Facts) -> Round:
    """Return the round's row after counting a report of this session. If the session has lapsed, it takes a place again."""
    if session.state == "lapsed":
        row = changed(row, given=row.given + 1) if facts.pacing.buffered else changed(row, dropped=row.dropped - 1)
    return changed(row, counted=row.counted + 1)


def _reports(facts: Facts, event: Commit) -> Iterator[tuple[Session, ...]]:
    """Yield the sessions of each report."""
    left = iter(facts.sessions)
    for count in event.together or (1,) * len(facts.sessions):
        yield tuple(islice(left, count))


def _dropped(facts: Facts, event: Dropped) -> Decision:
    """End sessions that will not report; the next devices that check in get their places."""
    row, written, lapses = facts.round, list[Session](), list[str]()
    for session in facts.sessions:
        held = _holds_place(session, row, facts) and row.state is State.OPEN
        if held and _is_timed(facts) and event.reason not in NO_FAULT:
            lapses.append(session.id)
        gone, row = _gone(session, event.reason, row, facts)
        written += gone
    return _closed_if_over(facts, row, written, [], lapses)


def _let_go(facts: Facts, event: Overdue) -> Decision:
    """Free the places of sessions that take too long or sent a bad report; end the expired sessions."""
    row, written, lapses = facts.round, list[Session](), list[str]()
    for session in facts.sessions:
        spoilt = event.spoilt and _is_timed(facts) and row.state is State.OPEN and _holds_place(session, row, facts)
        if spoilt or (session.state == "out" and facts.now >= lets_go_at(session, facts)):
            _, row = _gone(session, "", row, facts)
            written.append(changed(session, state="lapsed"))
            lapses.append(session.id)
        elif facts.now >= session.expires:
            gone, row = _gone(session, "expired", row, facts)
            written += gone
    return _closed_if_over(facts, row, written, [], lapses)


def _open(facts: Facts, event: Tick) -> Decision:
    """Open the round, unless the run is paused or the pace requires more time since the previous round."""
    if facts.paused or facts.now < begins_at(facts.pacing, facts.round):
        return NOTHING
    return _moved(facts, State.OPEN)


def _tick(facts: Facts, event: Tick) -> Decision:
    """Close or abandon the round if its deadline has passed."""
    return _closed_if_over(facts, facts.round, [], [])


def _awaits_model(facts: Facts, event: Tick) -> Decision:
    """Do nothing: the round waits for its model, however long that takes."""
    return NOTHING


def _published(facts: Facts, event: Published) -> Decision:
    """Publish the round, and plan the next one; do nothing if an earlier round is not published yet.

    In that case the leader publishes this round later. If rounds are buffers, the next one is already open.
    """
    return NOTHING if facts.waits else _moved(facts, State.PUBLISHED)


def _recovered(facts: Facts, event: Recovered) -> Decision:
    """Write the new fence, which stops the previous leader, and repeat the work that it may not have finished."""
    row = facts.round
    if event.fence < row.fence:
        return NOTHING  # another leader has a higher fence
    again: dict[State, Action] = {
        State.CLOSING: CloseRound(row.number),
        State.ABANDONED: AbandonRound(row.number, row.reason),
    }
    return Decision((changed(row, fence=event.fence),), (), (again[row.state],) if row.state in again else ())


def _recovered_published(facts: Facts, event: Recovered) -> Decision:
    """Do nothing: the model exists, and the previous leader left no work unfinished."""
    return NOTHING


def _cancelled(facts: Facts, event: Cancelled) -> Decision:
    """Abandon the round: an admin cancelled it, or no model can be made of its sum."""
    if facts.round.state is State.CLOSING and facts.pacing.buffered:  # the next buffer is already open
        row = changed(facts.round, state=State.ABANDONED, since=facts.now, reason="cancelled")
        return Decision((row,), (), (AbandonRound(row.number, row.reason),))
    return _moved(facts, State.ABANDONED, "cancelled")


def _closed_if_over(
    facts: Facts, row: Round, sessions: list[Session], actions: list[Action], lapses: Sequence[str] = ()
) -> Decision:
    """Close an open round if it is full or has ended with enough reports; abandon it if it has ended with too few."""
    ended = NOTHING
    if row.state is State.OPEN:
        pacing = facts.pacing
        over = not pacing.buffered and facts.now >= over_at(facts, row)
        if row.counted >= pacing.cohort or (over and row.counted >= pacing.fewest):
            ended = _moved(changed(facts, round=row), State.CLOSING)
        elif over:
            ended = _moved(changed(facts, round=row), State.ABANDONED, "too few")
    rounds = ended.rounds or ((row,) if row is not facts.round else ())
    return Decision(rounds, tuple(sessions), (*actions, *ended.actions), tuple(lapses))


def over_at(facts: Facts, row: Round) -> float:
    """Return the time at which an open synchronous round ends if no device checks in or reports before; infinity for never.

    The round ends at its deadline, or earlier if no more reports can come, since the sessions of all chosen devices have ended.
    If freed places are given to other devices, three conditions must hold: every device of the population has had a place,
    enough reports have come, and lapsed sessions have had as much time as the work takes. Until then a device may still add a
    report.
    """
    end = float("inf") if facts.pacing.deadline is None else row.since + facts.pacing.deadline
    if not row.given or row.out:
        return end
    if not _gives_again(facts):
        return row.since if room(facts.pacing, facts.population, row) <= 0 else end
    if 0 < facts.population <= row.given and row.counted >= facts.pacing.fewest:
        if row.counted >= facts.population:
            return row.since  # every device is in the sum
        known = [patience(facts.pacing, takes) for takes in (facts.takes, facts.takes_by_edge) if takes > 0]
        return min(end, row.since + max(known, default=float("inf")))
    return end


def _past_deadline(facts: Facts) -> bool:
    return facts.pacing.deadline is not None and facts.now >= facts.round.since + facts.pacing.deadline


def _moved(facts: Facts, to: State, reason: str = "") -> Decision:
    """Move the round to another state, with the consequences for other rows and the resulting actions."""
    row = changed(facts.round, state=to, since=facts.now, reason=reason)
    buffered = facts.pacing.buffered
    follows = Round(row.number + 1, since=facts.now, fence=row.fence, given=row.out if buffered else 0)
    match to:
        case State.CLOSING if buffered:  # the next buffer opens in the same transaction
            return Decision((row, changed(follows, state=State.OPEN)), (), (CloseRound(row.number),))
        case State.CLOSING:
            return Decision((row,), (), (CloseRound(row.number),))
        case State.PUBLISHED if buffered:
            return Decision((row,))
        case State.PUBLISHED:
            return Decision((row, follows))
        case State.ABANDONED:
            return Decision((row, follows), (), (AbandonRound(row.number, reason),))
        case _:
            return Decision((row,))


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


_s = State
_RUNNING = (_s.PLANNED, _s.OPEN, _s.CLOSING)
TABLE = (
    EventTable[State, Facts, Decision]({})
    .on(ORDER, CheckIn, _check_in)
    .on(ORDER, Report, _report)
    .on(ORDER, Commit, _commit)
    .on(ORDER, Dropped, _dropped)
    .on(ORDER, Overdue, _let_go)
    # In an open round, these events may also end the round.
    .on((_s.OPEN,), CheckIn, _check_in, _s.CLOSING, _s.ABANDONED)
    .on((_s.OPEN,), Report, _report, _s.CLOSING, _s.ABANDONED)
    .on((_s.OPEN,), Commit, _commit, _s.CLOSING, _s.ABANDONED)
    .on((_s.OPEN,), Dropped, _dropped, _s.CLOSING, _s.ABANDONED)
    .on((_s.OPEN,), Overdue, _let_go, _s.CLOSING, _s.ABANDONED)
    .on((_s.PLANNED,), Tick, _open, _s.OPEN)
    .on((_s.OPEN,), Tick, _tick, _s.CLOSING, _s.ABANDONED)
    .on((_s.CLOSING,), Tick, _awaits_model)
    .on((_s.CLOSING,), Published, _published, _s.PUBLISHED)
    .on((*_RUNNING, _s.ABANDONED), Recovered, _recovered)
    .on((_s.PUBLISHED,), Recovered, _recovered_published)
    .on(_RUNNING, Cancelled, _cancelled, _s.ABANDONED)
)
"""The table: (state, event) → entry. An event that has no entry changes nothing: its sender does not know yet that the round is
over. The coordinator counts such events.
"""


def decide(facts: Facts, event: Event) -> Decision:
    """Return the rows to write and the actions to carry out afterwards. It raises no exception, whatever a device sends."""
    rule = TABLE.rule(facts.round.state, event)
    return NOTHING if rule is None else rule(facts, event)
