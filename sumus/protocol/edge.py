"""An edge's round, as a table: from the first work that arrives to the answer of the server above about the sum.

    decision = decide(facts, event)

The function is pure. `sumus/edge/edge_rounds.py` reads the facts, calls the function and keeps `decision.round` in memory;
`sumus/edge/edge_run.py` carries out `decision.actions`. The table of a site (`protocol/site.py`) uses the rules of this table
for the site's first round. A *session* is the work of one device for one round.

Theory of operation
===================

Two tables run a round of an edge. To its devices, an edge is a server: the *table of rounds* in `protocol/round.py` gives
places, counts reports and closes the round, on rows in the edge's own store. To the server above, an edge speaks for its
devices: this table decides which check-ins are passed on, how arriving work is used, how long the round waits for more
devices, and what the server above is told about each session. The two meet in three places only: this table chooses the pacing
by which the table of rounds closes a round (`pacing_of`); the table of rounds says when the round was closed or abandoned
(`RoundClosed`, `RoundAbandoned`); and this table may cancel or publish the round.

**States.** A round is *waiting* until the first work arrives for it. Then it is *gathering*: its devices train and report, and
more devices are awaited. When no work has come for `linger` seconds, or the server above has said that it has no more work, the
round is *finishing*: devices that still get work may join, but further devices are not awaited. The round closes when the
sessions of all devices with work have ended, or after four fifths of the time limit that the server above has set. Then its sum
is *going up*: the same bytes are sent until the server above answers. After the answer, or if the round was abandoned, the
round is *settled*, and the next round is waiting.

**Who acts.** Devices ask (`DeviceAsks`), fetch work (`WorkFetched`), give up, leave, or exceed their time (`SessionsDropped`).
The server above gives work (`WorkArrived`), has none (`NoWorkAbove`), and answers about the sum (`SumCounted`, `SumRefused`).
Time passes (`Tick`). The administrator of the edge may cancel a round, which arrives here as `RoundAbandoned`. A new plan or a
lost key ends all work (`AllWorkEnds`).

**Nothing is lost.** Every session that the server above gives ends in exactly one of three ways: its report is in a sum that
this server counts; or the server above is told that no report will come (`SayEnded`); or the same device asks again with a
newer check-in, which the server above takes as the end of the earlier session. A session whose report is in a sum must never
end in the third way: the server above would refuse the whole sum. So while a device's report is in an unsent sum, its check-ins
are not passed on.

**What survives a crash.** The rows and notes survive: the round's state, its sessions, its work, and the time by which its sum
must be sent. If the row of a round is closing, the round is going up again, with the same bytes. Three things are lost with
the memory, and no promise depends on them: unfetched work (its device asks again, or the server above lets the session lapse);
the time at which the last work came (the round waits `linger` seconds again); and ends of sessions that had not been reported
yet (these sessions lapse, too). `round_at` returns the state of a round after a crash.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeAlias

from sumus.pacing import Pacing
from sumus.protocol.round import ComeLater, DeviceRow, Facts, Round, Session, State, Tick, lets_go_at
from sumus.protocol.rows import changed
from sumus.protocol.table import EventTable

MOST = 1_000_000
"""The number of devices that an edge's round waits for, unless the server above sets another number."""
ASKING = (0.3, 1.0)
"""The retry window, in seconds, of a device whose check-in is on its way to the server above."""
NOT_NOW = ComeLater(ASKING, "asking")
"""The answer to a device whose check-in is on its way to the server above."""
PICK_UP = 60.0
"""The seconds for which work waits until its device fetches it; after that, the work is given back to the server above."""
MOMENT = 1e-3
"""The shortest deadline of a round, in seconds: with it, the round ends at the next tick."""
NO_MORE = frozenset({"full", "closed"})
"""The reasons of the server above for giving no work if its present sum takes no more devices."""
BY_EDGE = "edge"
"""The reason for the end of a session that its device did not cause."""


class EdgeState(StrEnum):
    """The state of an edge's round."""

    WAITING = "waiting"
    GATHERING = "gathering"
    FINISHING = "finishing"
    GOING_UP = "going_up"
    SETTLED = "settled"


# ── facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class EdgeRound:
    """The part of an edge's round that is kept in memory.

    Attributes:
        state: The state of the round.
        latest: When the last work arrived for it, by the store's clock.
        full: Whether the server above has said that it has no more work for this round.
    """

    state: EdgeState = EdgeState.WAITING
    latest: float = 0.0
    full: bool = False


@dataclass(frozen=True, slots=True)
class WaitingWork:
    """Work that has arrived for a device and waits to be fetched.

    Attributes:
        session: The session's id.
        device: The device's id.
        serial: The serial of the check-in that asked for the work.
        since: When it arrived, by the store's clock.
    """

    session: str
    device: str
    serial: int
    since: float


@dataclass(frozen=True, slots=True)
class EdgeFacts:
    """The inputs of a decision.

    Attributes:
        now: The store's clock, in seconds.
        round: The round that the event concerns.
        row: The row of that round, as the table of rounds keeps it.
        waiting: The number of unfetched pieces of work of this run.
        unfetched: The unfetched work itself; read only for events that may give some of it back.
        lapsed: The number of sessions that have lost their places but are still awaited (`waited_for`).
        most: The most reports that the sum may hold; the server above would refuse more.
        devices: The number of devices that may join the round.
        ends: The time by which the round must be over; None if it has no limit.
        linger: The seconds for which more devices are awaited after the last work has arrived.
    """

    now: float
    round: EdgeRound
    row: Round
    waiting: int = 0
    unfetched: tuple[WaitingWork, ...] = ()
    lapsed: int = 0
    most: int = MOST
    devices: int = MOST
    ends: float | None = None
    linger: float = 0.0


def round_at(row: Round, has_work: bool, now: float) -> EdgeRound:
    """Return the round as a new process derives it from its row.

    Args:
        row: The round's row.
        has_work: Whether a stored note records the work of the round.
        now: The time of the store's clock: the round waits `linger` seconds for more work from this time on.
    """
    if row.over:
        return EdgeRound(EdgeState.SETTLED)
    if not has_work:
        return EdgeRound(EdgeState.WAITING)
    return EdgeRound(EdgeState.GOING_UP if row.state is State.CLOSING else EdgeState.GATHERING, now)


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class DeviceAsks:
    """A device checks in.

    Attributes:
        device: The device's id.
        serial: The serial of its check-in.
        session: The id of the session that it would be given.
        known: The device's row in this run; None if it has none.
        over: Whether the round of the device's last session is over, or its row is deleted.
        waiting: Work of any run that waits for the device.
        mine: Whether that work is of this run.
    """

    device: str
    serial: int
    session: str
    known: DeviceRow | None = None
    over: bool = False
    waiting: WaitingWork | None = None
    mine: bool = True


@dataclass(frozen=True, slots=True)
class WorkArrived:
    """Work has arrived for a device.

    Attributes:
        session: The session's id.
        same: Whether the work is for the same sum of the server above as this round's work.
        fetched: Whether the device has already fetched the work of this session, because it had asked twice.
        out: The sessions of the round that may still report; needed only if the work is for another sum.
        again: Whether this is the second decision about the work, after the previous round was told to end.
    """

    session: str
    same: bool = False
    fetched: bool = False
    out: tuple[str, ...] = ()
    again: bool = False


@dataclass(frozen=True, slots=True)
class WorkFetched:
    """A device has fetched the work that waited for it."""

    device: str


@dataclass(frozen=True, slots=True)
class NoWorkAbove:
    """The server above has given a device no work, for this reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class DeviceKeptOut:
    """A device must not be in the open sum of the server above: it was counted there, left, and came again with a new key."""

    device: str


@dataclass(frozen=True, slots=True)
class SessionsDropped:
    """Sessions end without a report: their devices gave up, left, or exceeded their time."""

    sessions: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class OtherWorkAsked:
    """A device that has work in this run asks for other work.

    Attributes:
        sessions: The device's sessions in this run that may still report.
    """

    sessions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """The table of rounds has closed the round.

    Attributes:
        out: The sessions that have not reported in time.
        count: The number of contributors in the round's sum.
    """

    out: tuple[str, ...] = ()
    count: int = 0


@dataclass(frozen=True, slots=True)
class RoundAbandoned:
    """The table of rounds has abandoned the round: its sum has no result.

    Attributes:
        out: Sessions of the round that might have reported.
        counted: Sessions whose reports were in the sum.
    """

    out: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SumCounted:
    """The server above has counted the sum."""


@dataclass(frozen=True, slots=True)
class SumRefused:
    """The server above has refused the sum for good.

    Attributes:
        counted: The sessions whose reports are in the sum.
    """

    counted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AllWorkEnds:
    """All rounds of the run are about to be cancelled: it has another plan, or its sums cannot be read any more."""


EdgeEvent: TypeAlias = (
    DeviceAsks
    | WorkArrived
    | WorkFetched
    | NoWorkAbove
    | DeviceKeptOut
    | SessionsDropped
    | OtherWorkAsked
    | Tick
    | RoundClosed
    | RoundAbandoned
    | SumCounted
    | SumRefused
    | AllWorkEnds
)

# ── actions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class AdmitCheckIn:
    """Let the table of rounds answer the check-in."""


@dataclass(frozen=True, slots=True)
class PassCheckInOn:
    """Pass the check-in on to the server above."""


@dataclass(frozen=True, slots=True)
class StartRound:
    """Record that the round is for the arrived work, and start the round's time."""


@dataclass(frozen=True, slots=True)
class KeepWork:
    """Keep the arrived work until its device fetches it."""


@dataclass(frozen=True, slots=True)
class RemoveWork:
    """Remove the work for these devices."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SayEnded:
    """Tell the server above that these sessions will not report.

    Attributes:
        sessions: The ids of the sessions.
        reason: Why they will not report; "edge" if their devices did not cause this.
    """

    sessions: tuple[str, ...]
    reason: str = BY_EDGE


@dataclass(frozen=True, slots=True)
class DropSessions:
    """Let the table of rounds end these sessions."""

    sessions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SendDeviceAway:
    """Relay no check-in of this device for a while."""

    device: str


@dataclass(frozen=True, slots=True)
class LetTimePass:
    """Give the table of rounds a tick, so that a round past its deadline ends now."""


@dataclass(frozen=True, slots=True)
class ConsiderAgain:
    """Decide once more about the arrived work, since its round may begin now."""


@dataclass(frozen=True, slots=True)
class SendSum:
    """Send the round's sum to the server above."""


@dataclass(frozen=True, slots=True)
class WithdrawSum:
    """Stop sending the round's sum."""


@dataclass(frozen=True, slots=True)
class PublishRound:
    """End the round: the server above has counted its sum."""


@dataclass(frozen=True, slots=True)
class CancelRound:
    """End the round without a result."""


EdgeAction: TypeAlias = (
    AdmitCheckIn
    | ComeLater
    | PassCheckInOn
    | StartRound
    | KeepWork
    | RemoveWork
    | SayEnded
    | DropSessions
    | SendDeviceAway
    | LetTimePass
    | ConsiderAgain
    | SendSum
    | WithdrawSum
    | PublishRound
    | CancelRound
)


@dataclass(frozen=True, slots=True)
class EdgeDecision:
    """The decision about an event.

    Attributes:
        round: The new value of the round in memory.
        actions: The actions, in the order in which they are carried out.
    """

    round: EdgeRound
    actions: tuple[Any, ...] = ()


# ── how long a round waits ───────────────────────────────────────────────────────────────────────────────────────────


def expected(facts: EdgeFacts) -> int:
    """Return the number of devices that have reported or are awaited."""
    return facts.row.given - facts.row.dropped + facts.waiting + facts.lapsed


def has_room(facts: EdgeFacts) -> bool:
    """Return whether the sum can take the report of one more device."""
    return facts.row.given - facts.row.dropped + facts.waiting < facts.most


def waited_for(lapsed: Sequence[Session], facts: Facts) -> int:
    """Count the lapsed sessions (they have lost their places) whose reports the round still awaits.

    Until one device has reported, the round waits for all of them, since the work itself may take this long. After that, it
    waits for those that would not have lapsed according to the durations of the reports.

    Args:
        lapsed: The sessions of the round that have lost their places and may still report.
        facts: The facts that the table of rounds uses.
    """
    if not facts.round.counted:
        return len(lapsed)
    return sum(facts.now < lets_go_at(session, facts) for session in lapsed)


def pacing_of(facts: EdgeFacts, pacing: Pacing) -> Pacing:
    """Return the pacing with which the table of rounds closes the round.

    Args:
        facts: The facts after the last decision.
        pacing: The pacing of a round that waits for work, which never ends by itself.
    """
    if facts.round.state not in (EdgeState.GATHERING, EdgeState.FINISHING):
        return pacing
    gathering, count = facts.round.state is EdgeState.GATHERING, expected(facts)
    cohort = min(facts.most, max(1, count, facts.devices if gathering else 0))  # the server above would refuse more
    began = facts.row.since if facts.row.state is State.OPEN else facts.now
    deadline = None if facts.ends is None else max(MOMENT, facts.ends - began)
    if facts.row.given and not count and not gathering:  # no session has reported, and no device is awaited
        deadline = MOMENT
    return replace(pacing, cohort=cohort, deadline=deadline)


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _asks(facts: EdgeFacts, event: DeviceAsks) -> EdgeDecision:
    """Let the device fetch the work that waits for it; otherwise pass its check-in on.

    The check-in is not passed on if the open sum can take no more reports, or if the device's report is in an unsent sum: if it
    were passed on, the server above would assume that the device has forgotten its work.
    """
    removed = removed_work(event)
    if (answer := answer_at_once(facts, event)) is not None:
        return EdgeDecision(facts.round, (*removed, answer))
    left = changed(facts, waiting=facts.waiting - 1) if removed and event.mine else facts
    last = event.known.session if event.known is not None and not event.over else None
    if last is not None and last.state == "counted":
        answer = ComeLater(ASKING, "closed")
    elif (last is None or last.state != "out") and not has_room(left):
        answer = ComeLater(ASKING, "full")
    else:
        answer = PassCheckInOn()
    return EdgeDecision(facts.round, (*removed, answer))


def _asks_too_late(facts: EdgeFacts, event: DeviceAsks) -> EdgeDecision:
    """Let the device wait until the server above has answered about the sum."""
    answer = answer_at_once(facts, event) or ComeLater(ASKING, "closed")
    return EdgeDecision(facts.round, (*removed_work(event), answer))


def removed_work(event: DeviceAsks) -> tuple[RemoveWork, ...]:
    """Return the actions that remove work for an outdated check-in: the device has checked in again since."""
    late = event.waiting is not None and event.waiting.serial < event.serial
    return (RemoveWork((event.device,)),) if late else ()


def answer_at_once(facts: EdgeFacts, event: DeviceAsks) -> AdmitCheckIn | ComeLater | None:
    """Return the answer to a check-in that does not depend on the round's state; None if there is no such answer."""
    work, known = event.waiting, event.known
    if work is not None and (work.serial, work.session) == (event.serial, event.session):
        return AdmitCheckIn() if event.mine else NOT_NOW
    if known is not None and known.session is not None and known.session.serial == event.serial:
        return AdmitCheckIn()  # the same check-in again
    if known is not None and facts.now < known.rests_until:
        rest = known.rests_until - facts.now
        return ComeLater((rest, rest + ASKING[1]), "resting")
    return None


def _begin(facts: EdgeFacts, event: WorkArrived) -> EdgeDecision:
    """Begin the round for this work. If the round cannot open, tell the server above that the session has ended."""
    if event.fetched:
        return EdgeDecision(facts.round)
    if facts.row.state is not State.OPEN:
        return EdgeDecision(facts.round, (SayEnded((event.session,)),))
    return EdgeDecision(_reached(facts), (StartRound(), KeepWork()))


def _more_work(facts: EdgeFacts, event: WorkArrived) -> EdgeDecision:
    """Keep work for the same sum of the server above if the sum can take more reports. Work for another sum means that the
    previous sum is over: end this round.

    After that, the new work is decided once more. If the round could not end at once, the session of the new work is ended, and
    its device asks again.
    """
    if event.fetched:
        return EdgeDecision(facts.round)
    if event.same and has_room(facts):
        return EdgeDecision(_reached(facts), (KeepWork(),))
    if event.same or event.again:
        return EdgeDecision(facts.round, (SayEnded((event.session,)),))
    ending = changed(facts.round, state=EdgeState.FINISHING, full=True)
    ended = (*given_back(facts.unfetched), *end_sessions(event.out))
    return EdgeDecision(ending, (*ended, LetTimePass(), ConsiderAgain()))


def work_too_late(facts: EdgeFacts, event: WorkArrived) -> EdgeDecision:
    """Tell the server above that the session has ended: its work is not for the sum that is going up."""
    return EdgeDecision(facts.round, () if event.fetched else (SayEnded((event.session,)),))


def _fetched(facts: EdgeFacts, event: WorkFetched) -> EdgeDecision:
    """Remove the work: its device has it."""
    return EdgeDecision(facts.round, (RemoveWork((event.device,)),))


def _no_more(facts: EdgeFacts, event: NoWorkAbove) -> EdgeDecision:
    """Stop awaiting more devices if the server above has no more work for this round."""
    if event.reason not in NO_MORE:
        return EdgeDecision(facts.round)
    return EdgeDecision(changed(facts.round, state=EdgeState.FINISHING, full=True))


def _keep_out(facts: EdgeFacts, event: DeviceKeptOut) -> EdgeDecision:
    """Give back the work of this device. If no other device has work, end the round.

    The device's check-in is passed on again a little later: by then the server above may have begun another sum, in which the
    device may take part.
    """
    mine = tuple(work for work in facts.unfetched if work.device == event.device)
    empty = facts.row.state is State.OPEN and facts.row.given == facts.row.dropped and not facts.lapsed
    ends = (CancelRound(),) if empty and len(mine) == facts.waiting else ()
    return EdgeDecision(facts.round, (*given_back(mine), SendDeviceAway(event.device), *ends))


def _dropped(facts: EdgeFacts, event: SessionsDropped) -> EdgeDecision:
    """Tell the server above that these devices will not report."""
    return EdgeDecision(facts.round, say_ended(event.sessions, event.reason))


def forget_work(facts: EdgeFacts, event: OtherWorkAsked) -> EdgeDecision:
    """Count no further report of these sessions, even before the device's check-in is passed on.

    The server above ends the sessions when it receives the check-in. It would refuse any sum that holds one of their reports.
    """
    return EdgeDecision(facts.round, drop_sessions(event.sessions))


def _look(facts: EdgeFacts, event: Tick) -> EdgeDecision:
    """Give back work that no device has fetched in time, and decide whether more devices are awaited.

    More devices are awaited for `linger` seconds after the last work has arrived. If no device has work or has reported, the
    round waits longer, since a sum without reports is useless.
    """
    old = tuple(work for work in facts.unfetched if facts.now - work.since > PICK_UP)
    state = facts.round.state
    if state in (EdgeState.GATHERING, EdgeState.FINISHING):
        left = changed(facts, waiting=facts.waiting - len(old))
        lingers = not expected(left) or facts.now - facts.round.latest < facts.linger
        state = EdgeState.GATHERING if lingers and not facts.round.full else EdgeState.FINISHING
    return EdgeDecision(changed(facts.round, state=state), given_back(old, "other"))


def _cancel(facts: EdgeFacts, event: RoundClosed) -> EdgeDecision:
    """Cancel a round that has no work: its work belonged to another plan."""
    return EdgeDecision(facts.round, (CancelRound(),))


def _close(facts: EdgeFacts, event: RoundClosed) -> EdgeDecision:
    """Send the sum up, and tell the server above which sessions have ended without a report. After a crash, do this again."""
    going_up = changed(facts.round, state=EdgeState.GOING_UP)
    return EdgeDecision(going_up, (*given_back(facts.unfetched), *end_sessions(event.out), SendSum()))


def _abandon(facts: EdgeFacts, event: RoundAbandoned) -> EdgeDecision:
    """Tell the server above that no session of the round will report, so that it can free their places."""
    actions = [*given_back(facts.unfetched), *end_sessions(event.out, "other"), *say_ended(event.counted)]
    if facts.round.state is EdgeState.GOING_UP:
        actions.insert(0, WithdrawSum())
    return EdgeDecision(changed(facts.round, state=EdgeState.SETTLED), tuple(actions))


def _abandon_again(facts: EdgeFacts, event: RoundAbandoned) -> EdgeDecision:
    """Tell the server above once more that the open sessions will not report, since a crash may have prevented this before."""
    return EdgeDecision(facts.round, end_sessions(event.out, "other"))


def _counted(facts: EdgeFacts, event: SumCounted) -> EdgeDecision:
    """End the round, and wait for the work of the next one."""
    return EdgeDecision(changed(facts.round, state=EdgeState.SETTLED), (PublishRound(),))


def _refused(facts: EdgeFacts, event: SumRefused) -> EdgeDecision:
    """End the round without a result, and tell the server above that the sessions in its sum will not report."""
    return EdgeDecision(changed(facts.round, state=EdgeState.SETTLED), (*say_ended(event.counted), CancelRound()))


def end_all(facts: EdgeFacts, event: AllWorkEnds) -> EdgeDecision:
    """Give back all unfetched work. After this, every round is cancelled and so abandoned."""
    return EdgeDecision(facts.round, given_back(facts.unfetched))


def _ignore(facts: EdgeFacts, event: Any) -> EdgeDecision:
    """Do nothing: the event concerns another round."""
    return EdgeDecision(facts.round)


def _reached(facts: EdgeFacts) -> EdgeRound:
    """Return the round after work has arrived for it."""
    return EdgeRound(EdgeState.GATHERING, facts.now)


def given_back(waiting: Sequence[WaitingWork], reason: str = BY_EDGE) -> tuple[EdgeAction, ...]:
    """Return the actions that give unfetched work back."""
    if not waiting:
        return ()
    devices = tuple(work.device for work in waiting)
    return RemoveWork(devices), SayEnded(tuple(work.session for work in waiting), reason)


def say_ended(sessions: tuple[str, ...], reason: str = BY_EDGE) -> tuple[EdgeAction, ...]:
    """Return the actions that tell the server above that these sessions have ended."""
    return (SayEnded(sessions, reason),) if sessions else ()


def drop_sessions(sessions: tuple[str, ...]) -> tuple[EdgeAction, ...]:
    """Return the actions that let the table of rounds end these sessions."""
    return (DropSessions(sessions),) if sessions else ()


def end_sessions(sessions: tuple[str, ...], reason: str = BY_EDGE) -> tuple[EdgeAction, ...]:
    """Return the actions that end these sessions here and at the server above."""
    return (*say_ended(sessions, reason), *drop_sessions(sessions))


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


_s = EdgeState
_AT_WORK = (_s.GATHERING, _s.FINISHING)
_RUNNING = (_s.WAITING, *_AT_WORK, _s.GOING_UP)
TABLE = (
    EventTable[EdgeState, EdgeFacts, EdgeDecision]({})
    .on((_s.WAITING, *_AT_WORK), DeviceAsks, _asks)
    .on((_s.GOING_UP,), DeviceAsks, _asks_too_late)
    .on((_s.WAITING,), WorkArrived, _begin, _s.GATHERING)
    .on(_AT_WORK, WorkArrived, _more_work, _s.GATHERING, _s.FINISHING)
    .on((_s.GOING_UP,), WorkArrived, work_too_late)
    .on(_AT_WORK, WorkFetched, _fetched)
    .on(_AT_WORK, NoWorkAbove, _no_more, _s.FINISHING)
    .on((_s.WAITING, _s.GOING_UP), NoWorkAbove, _ignore)
    .on(_RUNNING, DeviceKeptOut, _keep_out)
    .on(_RUNNING, SessionsDropped, _dropped)
    .on(_RUNNING, OtherWorkAsked, forget_work)
    .on(_RUNNING, Tick, _look)
    .on(_AT_WORK, Tick, _look, *_AT_WORK)
    .on((_s.WAITING,), RoundClosed, _cancel)
    .on((*_AT_WORK, _s.GOING_UP), RoundClosed, _close, _s.GOING_UP)
    .on(_RUNNING, RoundAbandoned, _abandon, _s.SETTLED)
    .on((_s.SETTLED,), RoundAbandoned, _abandon_again)
    .on((_s.GOING_UP,), SumCounted, _counted, _s.SETTLED)
    .on((_s.GOING_UP,), SumRefused, _refused, _s.SETTLED)
    .on(_RUNNING, AllWorkEnds, end_all)
)
"""(state, event) → entry. An event that the table does not allow changes nothing, and the caller counts it."""


def decide(facts: EdgeFacts, event: EdgeEvent) -> EdgeDecision:
    """Return the decision about an event: the new round, and the actions."""
    rule = TABLE.rule(facts.round.state, event)
    return EdgeDecision(facts.round) if rule is None else rule(facts, event)
