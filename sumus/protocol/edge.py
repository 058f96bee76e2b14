"""An edge's round, as a table: from the first work that comes down to the answer about the sum that went up.

    decision = decide(facts, event)

The function is pure. `sumus/edge/edge_rounds.py` reads the facts, calls it and keeps `decision.round` in memory;
`sumus/edge/edge_run.py` does what `decision.actions` say. A site's table (`protocol/site.py`) uses the rules of this one for its
first round.

Theory of operation
===================

Two tables run one round of an edge. Towards its devices, an edge is a server: `protocol/round.py` gives places, counts
reports and closes the round, on rows in the edge's own store. Towards the server above, an edge speaks for its devices: this
table decides which check-ins go up, what becomes of work that comes down, how long the round waits for more devices, and what
the server above is told about each session. The two meet in three places only: this table chooses the pacing by which the
round table closes (`pacing_of`); the round table says when the round was closed or abandoned (`RoundClosed`,
`RoundAbandoned`); and this table may cancel or publish the round.

**States.** A round is *waiting* until the first work comes down for it. Then it is *gathering*: its devices train and report,
and more devices are awaited. When no work has come for `linger` seconds, or the server above has said that it has no more
work, the round is *finishing*: a device that is still given work may join, but no other device is awaited. The round closes
when all devices that were given work have ended, or when four fifths of the time are over that the server above gives. Then
its sum is *going up*: the same bytes are sent until the server above answers. After the answer, or if the round came to
nothing, the round is *settled*, and the next round is waiting.

**Who acts.** Devices ask (`DeviceAsks`), fetch work (`WorkFetched`), give up, leave, or let their time go by
(`SessionsDropped`). The server above gives work (`WorkArrived`), has none (`NoWorkAbove`), and answers for the sum (`SumCounted`,
`SumRefused`). Time goes by (`Tick`). The administrator of the edge may cancel a round, which arrives here as `RoundAbandoned`. A
new plan or a lost key ends everything (`AllWorkEnds`).

**Nothing is lost.** Every session that comes down ends in exactly one of three ways: its report is in a sum that is counted
above; or the server above is told that no report will come (`SayEnded`); or the same device asks again with a newer check-in,
which the server above understands as the end of the earlier session. The third way must never happen to a session whose
report is in a sum: the server above would refuse the whole sum. So while a device's report is in a sum that has not gone up,
no check-in of that device is passed on.

**What survives a crash.** The rows and notes survive: the round's state, its sessions, what its work is, and when its sum must
go up. If the row of a round is closing, the round is going up again, with the same bytes. Three things are lost with the
memory, and no promise depends on them: work that no device had fetched (its device asks again, or the server above lets the
session lapse); the moment when work came last (the round lingers once more); and ends of sessions that were still to be said
(these sessions lapse, too). `round_at` says in which state a round is found.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeAlias

from sumus.pacing import Pacing
from sumus.protocol.round import ComeLater, DeviceRow, Facts, Round, Session, State, Tick, lets_go_at
from sumus.protocol.rows import changed

MOST = 1_000_000
"""Devices that an edge's round waits for if the server above has not said otherwise."""
ASKING = (0.3, 1.0)
"""The retry window, in seconds, of a device whose check-in is on its way up."""
NOT_NOW = ComeLater(ASKING, "asking")
"""The answer to a device whose check-in is on its way up."""
PICK_UP = 60.0
"""Seconds for which work waits for its device to fetch it; after that it is given back."""
MOMENT = 1e-3
"""The shortest deadline of a round, in seconds: the round ends at the next look at the clock."""
NO_MORE = frozenset({"full", "closed"})
"""Reasons of the server above which say that this round's sum above takes no more devices."""
BY_EDGE = "edge"
"""The reason for the end of a session that is not its device's doing."""


class EdgeState(StrEnum):
    """The state of an edge's round."""

    WAITING = "waiting"
    GATHERING = "gathering"
    FINISHING = "finishing"
    GOING_UP = "going_up"
    SETTLED = "settled"


# ── what is known ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class EdgeRound:
    """An edge's round, as it is kept in memory.

    Attributes:
        state: Where the round stands.
        latest: When work came down for it last, by the store's clock.
        full: Whether the server above has said that it has no more work for this round.
    """

    state: EdgeState = EdgeState.WAITING
    latest: float = 0.0
    full: bool = False


@dataclass(frozen=True, slots=True)
class WaitingWork:
    """Work that came down for a device and waits to be fetched.

    Attributes:
        session: The session's id.
        device: The device's id.
        serial: The serial of the check-in that asked for the work.
        since: When it came down, by the store's clock.
    """

    session: str
    device: str
    serial: int
    since: float


@dataclass(frozen=True, slots=True)
class EdgeFacts:
    """What a decision is made from.

    Attributes:
        now: The store's clock, in seconds.
        round: The round that the event is about.
        row: The same round's row, as the round table keeps it.
        waiting: How much work of this run no device has fetched yet.
        unfetched: That work, each piece of it; it is read only for events that may give some of it back.
        lapsed: How many sessions have lost their places and are waited for all the same (`waited_for`).
        most: Reports that the sum may hold; the server above would refuse more.
        devices: Devices that may come into the round.
        ends: When the round must be over; None for never.
        linger: Seconds for which more devices are awaited after work has come.
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
    """Return the round as a process finds it that has nothing of it in memory.

    Args:
        row: The round's row.
        has_work: Whether it is written down which work the round is for.
        now: The store's clock: the round lingers from now on.
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
        over: Whether the round of its last session is over, or forgotten.
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
    """Work came down for a device.

    Attributes:
        session: The session's id.
        same: Whether the work goes into the same sum above as the work that this round is for.
        fetched: Whether the device has fetched work of this session already, since it asked twice.
        out: The sessions of the round that may still report; needed only if the work is not the same.
        again: Whether the work is looked at for the second time, since the round before it was to end first.
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
    """A device must not be in the sum that is open above: it was counted there, left, and came again under a new key."""

    device: str


@dataclass(frozen=True, slots=True)
class SessionsDropped:
    """Devices will not report: they gave up, or left, or their time is over."""

    sessions: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class OtherWorkAsked:
    """A device asks for other work than it has of this run. sessions: its sessions here that may still report."""

    sessions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """The round table has closed the round.

    Attributes:
        out: Sessions that have not reported in time.
        count: Contributors in the round's sum.
    """

    out: tuple[str, ...] = ()
    count: int = 0


@dataclass(frozen=True, slots=True)
class RoundAbandoned:
    """The round table has abandoned the round: nothing comes of its sum.

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
    """The server above has not counted the sum and never will. counted: the sessions whose reports are in it."""

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
    """Let the round table answer the check-in."""


@dataclass(frozen=True, slots=True)
class PassCheckInOn:
    """Pass the check-in on to the server above."""


@dataclass(frozen=True, slots=True)
class StartRound:
    """Write down that the round is for the work that arrived, and let its time begin."""


@dataclass(frozen=True, slots=True)
class KeepWork:
    """Keep the work that arrived until its device fetches it."""


@dataclass(frozen=True, slots=True)
class RemoveWork:
    """Keep the work for these devices no longer."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SayEnded:
    """Tell the server above that no report will come of these sessions. reason: "edge" if that is not their devices' doing."""

    sessions: tuple[str, ...]
    reason: str = BY_EDGE


@dataclass(frozen=True, slots=True)
class DropSessions:
    """Let the round table end these sessions."""

    sessions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SendDeviceAway:
    """Pass no check-in of this device on for a while."""

    device: str


@dataclass(frozen=True, slots=True)
class LetTimePass:
    """Let the round table look at the clock, so that a round that is over ends now."""


@dataclass(frozen=True, slots=True)
class ConsiderAgain:
    """Decide once more about the work that arrived, since its round may begin now."""


@dataclass(frozen=True, slots=True)
class SendSum:
    """Send the round's sum up."""


@dataclass(frozen=True, slots=True)
class WithdrawSum:
    """Do not send the round's sum any more."""


@dataclass(frozen=True, slots=True)
class PublishRound:
    """End the round: its sum is counted above."""


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
    """What follows from an event.

    Attributes:
        round: The round as it is to be kept from now on.
        actions: What is to be done, in this order.
    """

    round: EdgeRound
    actions: tuple[Any, ...] = ()


# ── how long a round waits ───────────────────────────────────────────────────────────────────────────────────────────


def expected(facts: EdgeFacts) -> int:
    """Return how many devices have reported, or are waited for."""
    return facts.row.given - facts.row.dropped + facts.waiting + facts.lapsed


def has_room(facts: EdgeFacts) -> bool:
    """Return whether the sum can hold one report more than those that were given work."""
    return facts.row.given - facts.row.dropped + facts.waiting < facts.most


def waited_for(lapsed: Sequence[Session], facts: Facts) -> int:
    """Count the sessions without a place that the round waits for all the same.

    Until one device has reported, the round waits for all of them: the work itself may take so long. After that, it waits for
    those which would not have lapsed by what the reports have shown.

    Args:
        lapsed: The sessions of the round that have lost their places and may still report.
        facts: The facts of the round table.
    """
    if not facts.round.counted:
        return len(lapsed)
    return sum(facts.now < lets_go_at(session, facts) for session in lapsed)


def pacing_of(facts: EdgeFacts, pacing: Pacing) -> Pacing:
    """Return the pacing by which the round table is to close the round.

    Args:
        facts: What is known after the last decision.
        pacing: The pacing of a round that waits for work, which never ends by itself.
    """
    if facts.round.state not in (EdgeState.GATHERING, EdgeState.FINISHING):
        return pacing
    gathering, count = facts.round.state is EdgeState.GATHERING, expected(facts)
    cohort = min(facts.most, max(1, count, facts.devices if gathering else 0))  # more would be refused above
    began = facts.row.since if facts.row.state is State.OPEN else facts.now
    deadline = None if facts.ends is None else max(MOMENT, facts.ends - began)
    if facts.row.given and not count and not gathering:  # all have ended without a report, and nobody else is awaited
        deadline = MOMENT
    return replace(pacing, cohort=cohort, deadline=deadline)


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _asks(facts: EdgeFacts, event: DeviceAsks) -> EdgeDecision:
    """Let the device fetch the work that waits for it; else pass its check-in on.

    The check-in is not passed on if the sum has no room, or if the device's report is in a sum that has not gone up: the
    server above would take the device for one that has forgotten its work.
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
    """Let the device wait until the server above has answered for the sum."""
    answer = answer_at_once(facts, event) or ComeLater(ASKING, "closed")
    return EdgeDecision(facts.round, (*removed_work(event), answer))


def removed_work(event: DeviceAsks) -> tuple[RemoveWork, ...]:
    """Return what removes work that came too late for the check-in which asked for it: the device has asked anew since."""
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
    """Begin the round for this work. If the round cannot open, say that the session has ended."""
    if event.fetched:
        return EdgeDecision(facts.round)
    if facts.row.state is not State.OPEN:
        return EdgeDecision(facts.round, (SayEnded((event.session,)),))
    return EdgeDecision(_reached(facts), (StartRound(), KeepWork()))


def _more_work(facts: EdgeFacts, event: WorkArrived) -> EdgeDecision:
    """Keep work for the same sum above if there is room. Work for another sum means that the one before is over: end this round.

    Then the work is looked at once more. If the round could not end at once, the session of the new work ends instead, and its
    device asks again.
    """
    if event.fetched:
        return EdgeDecision(facts.round)
    if event.same and has_room(facts):
        return EdgeDecision(_reached(facts), (KeepWork(),))
    if event.same or event.again:
        return EdgeDecision(facts.round, (SayEnded((event.session,)),))
    ending = changed(facts.round, state=EdgeState.FINISHING, full=True)
    out = (*said(event.out, BY_EDGE), DropSessions(event.out)) if event.out else ()
    return EdgeDecision(ending, (*given_back(facts.unfetched), *out, LetTimePass(), ConsiderAgain()))


def work_too_late(facts: EdgeFacts, event: WorkArrived) -> EdgeDecision:
    """Say that the session has ended: its work is not for the sum that is going up."""
    return EdgeDecision(facts.round, () if event.fetched else (SayEnded((event.session,)),))


def _fetched(facts: EdgeFacts, event: WorkFetched) -> EdgeDecision:
    """Keep the work no longer: its device has it."""
    return EdgeDecision(facts.round, (RemoveWork((event.device,)),))


def _no_more(facts: EdgeFacts, event: NoWorkAbove) -> EdgeDecision:
    """Wait for no more devices if the server above has no more work for this round."""
    if event.reason not in NO_MORE:
        return EdgeDecision(facts.round)
    return EdgeDecision(changed(facts.round, state=EdgeState.FINISHING, full=True))


def _keep_out(facts: EdgeFacts, event: DeviceKeptOut) -> EdgeDecision:
    """Give back the work of this device. If no other device has any, end the round.

    Then the server above is asked again a little later: it may have begun another sum, in which the device may be.
    """
    mine = tuple(work for work in facts.unfetched if work.device == event.device)
    empty = facts.row.state is State.OPEN and facts.row.given == facts.row.dropped and not facts.lapsed
    ends = (CancelRound(),) if empty and len(mine) == facts.waiting else ()
    return EdgeDecision(facts.round, (*given_back(mine), SendDeviceAway(event.device), *ends))


def _dropped(facts: EdgeFacts, event: SessionsDropped) -> EdgeDecision:
    """Tell the server above that these devices will not report."""
    return EdgeDecision(facts.round, said(event.sessions, event.reason))


def forget_work(facts: EdgeFacts, event: OtherWorkAsked) -> EdgeDecision:
    """Count no report of these sessions any more, from before the device's question goes up.

    The server above ends them when it hears the question, and would refuse a whole sum that holds one of their reports.
    """
    return EdgeDecision(facts.round, (DropSessions(event.sessions),) if event.sessions else ())


def _look(facts: EdgeFacts, event: Tick) -> EdgeDecision:
    """Give back work that no device has fetched in time, and decide whether more devices are awaited.

    They are awaited for `linger` seconds after work has come. If no device has work or has reported, they are awaited longer,
    since a sum without a report is of no use.
    """
    old = tuple(work for work in facts.unfetched if facts.now - work.since > PICK_UP)
    state = facts.round.state
    if state in (EdgeState.GATHERING, EdgeState.FINISHING):
        left = changed(facts, waiting=facts.waiting - len(old))
        lingers = not expected(left) or facts.now - facts.round.latest < facts.linger
        state = EdgeState.GATHERING if lingers and not facts.round.full else EdgeState.FINISHING
    return EdgeDecision(changed(facts.round, state=state), given_back(old, "other"))


def _cancel(facts: EdgeFacts, event: RoundClosed) -> EdgeDecision:
    """End a round that has no work: its work was of another plan."""
    return EdgeDecision(facts.round, (CancelRound(),))


def _close(facts: EdgeFacts, event: RoundClosed) -> EdgeDecision:
    """Send the sum up. Say of every session that is not in it that no report will come. After a crash, do the same again."""
    late = (*said(event.out), DropSessions(event.out)) if event.out else ()
    going_up = changed(facts.round, state=EdgeState.GOING_UP)
    return EdgeDecision(going_up, (*given_back(facts.unfetched), *late, SendSum()))


def _abandon(facts: EdgeFacts, event: RoundAbandoned) -> EdgeDecision:
    """Say of all sessions of the round that no report will come, so that the server above may give their places away."""
    actions = [*given_back(facts.unfetched), *ended_out(event.out), *said(event.counted)]
    if facts.round.state is EdgeState.GOING_UP:
        actions.insert(0, WithdrawSum())
    return EdgeDecision(changed(facts.round, state=EdgeState.SETTLED), tuple(actions))


def _abandon_again(facts: EdgeFacts, event: RoundAbandoned) -> EdgeDecision:
    """Say of the sessions that may still report that no report will come, since a crash may have come before that was said."""
    return EdgeDecision(facts.round, ended_out(event.out))


def _counted(facts: EdgeFacts, event: SumCounted) -> EdgeDecision:
    """End the round, and begin to wait for the work of the next one."""
    return EdgeDecision(changed(facts.round, state=EdgeState.SETTLED), (PublishRound(),))


def _refused(facts: EdgeFacts, event: SumRefused) -> EdgeDecision:
    """End the round without a result, and say of the sessions in its sum that no report will come."""
    return EdgeDecision(changed(facts.round, state=EdgeState.SETTLED), (*said(event.counted), CancelRound()))


def end_all(facts: EdgeFacts, event: AllWorkEnds) -> EdgeDecision:
    """Give back all work that no device has fetched. The rounds are cancelled after this, and each is abandoned."""
    return EdgeDecision(facts.round, given_back(facts.unfetched))


def _ignore(facts: EdgeFacts, event: Any) -> EdgeDecision:
    """Do nothing: the event concerns another round."""
    return EdgeDecision(facts.round)


def _reached(facts: EdgeFacts) -> EdgeRound:
    """Return the round after work has come for it."""
    return EdgeRound(EdgeState.GATHERING, facts.now)


def given_back(waiting: Sequence[WaitingWork], reason: str = BY_EDGE) -> tuple[EdgeAction, ...]:
    """Return what gives work back that no device has fetched."""
    if not waiting:
        return ()
    devices = tuple(work.device for work in waiting)
    return RemoveWork(devices), SayEnded(tuple(work.session for work in waiting), reason)


def said(sessions: tuple[str, ...], reason: str = BY_EDGE) -> tuple[EdgeAction, ...]:
    """Return what says that these sessions have ended."""
    return (SayEnded(sessions, reason),) if sessions else ()


def ended_out(out: tuple[str, ...]) -> tuple[EdgeAction, ...]:
    """Return what ends the sessions of an abandoned round that might have reported."""
    return (*said(out, "other"), DropSessions(out)) if out else ()


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class EdgeEntry:
    """What an event does in a state.

    Attributes:
        rule: The function that decides.
        to: The states that it may lead to, besides staying.
    """

    rule: Callable[[EdgeFacts, Any], EdgeDecision]
    to: tuple[EdgeState, ...] = ()


def _entries() -> dict[tuple[EdgeState, type], EdgeEntry]:
    s = EdgeState
    table: dict[tuple[EdgeState, type], EdgeEntry] = {}

    def on(
        states: tuple[EdgeState, ...], event: type, rule: Callable[[EdgeFacts, Any], EdgeDecision], *to: EdgeState
    ) -> None:
        for state in states:
            table[state, event] = EdgeEntry(rule, tuple(other for other in to if other is not state))

    at_work = (s.GATHERING, s.FINISHING)
    running = (s.WAITING, *at_work, s.GOING_UP)
    on((s.WAITING, *at_work), DeviceAsks, _asks)
    on((s.GOING_UP,), DeviceAsks, _asks_too_late)
    on((s.WAITING,), WorkArrived, _begin, s.GATHERING)
    on(at_work, WorkArrived, _more_work, s.GATHERING, s.FINISHING)
    on((s.GOING_UP,), WorkArrived, work_too_late)
    on(at_work, WorkFetched, _fetched)
    on(at_work, NoWorkAbove, _no_more, s.FINISHING)
    on((s.WAITING, s.GOING_UP), NoWorkAbove, _ignore)
    on(running, DeviceKeptOut, _keep_out)
    on(running, SessionsDropped, _dropped)
    on(running, OtherWorkAsked, forget_work)
    on(running, Tick, _look)
    on(at_work, Tick, _look, *at_work)
    on((s.WAITING,), RoundClosed, _cancel)
    on((*at_work, s.GOING_UP), RoundClosed, _close, s.GOING_UP)
    on(running, RoundAbandoned, _abandon, s.SETTLED)
    on((s.SETTLED,), RoundAbandoned, _abandon_again)
    on((s.GOING_UP,), SumCounted, _counted, s.SETTLED)
    on((s.GOING_UP,), SumRefused, _refused, s.SETTLED)
    on(running, AllWorkEnds, end_all)
    return table


TABLE: Mapping[tuple[EdgeState, type], EdgeEntry] = _entries()
"""(state, event) → what is done. An event that the table does not allow changes nothing, and is counted by the shell."""


def decide(facts: EdgeFacts, event: EdgeEvent) -> EdgeDecision:
    """Decide what becomes of the round, and what is to be done."""
    entry = TABLE.get((facts.round.state, type(event)))
    return EdgeDecision(facts.round) if entry is None else entry.rule(facts, event)
