"""A round, as a table: what may happen in each state, and what is to be done about it.

    decision = decide(facts, event)

It is pure. Whoever runs rounds (a server, an edge, the simulator's virtual clock, the fault tests) reads `Facts` from its store,
decides, writes `decision.rounds` and `decision.sessions` in that same transaction, where the rows are still as they were read
(state and fence), and does what `decision.actions` say when that is durable: not before.

A device's way through it:

    CheckIn ─► Assign            it trains, and sends
    Report  ─► Stage             its update waits in memory; nothing is promised
    Commit  ─► Accept            the update is in the round's sum, in the transaction that decided so
    Published                    the sum has become a model

A report that is not accepted is refused with the reason, and a device that was not told asks at its next check-in
(`previous`). A synchronous round and a buffer are one machine under another `Pacing`: in a synchronous round the devices are
chosen, and whoever was not is not counted; a buffer takes the next reports, whichever model they began from.

A session holds a *place*: one of the devices that a round is given to, or that a buffer lets train at once. A session that ends
without a report gives its place back, and the next device that asks gets it. So does a session that says nothing for longer than
such work takes (`lets_go_at`): it has *lapsed*. Its report is not refused for that: it is counted as long as the round has room.
A device that let a place go rests, longer each time, until a report of it is counted (`rested`). All of this needs a clock: if
the pacing has no deadline, no session lapses, and the devices of a synchronous round are not replaced.

Three numbers count, each something else. `Round.number`: sums, published or abandoned.  `Session.version`: models that were
published before it was given.  `Session.sum`: the number of the round that its report is in, which in a buffer may be a later
one than `Session.round`, in which it was given.

`TABLE` is the whole of it. The diagram in docs/protocol.md is drawn from it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Any, TypeAlias

from sumus.pacing import Conditions, Pacing
from sumus.protocol.rows import changed
from sumus.protocol.steering import window


class State(StrEnum):
    """The state of a round."""

    PLANNED = "planned"
    OPEN = "open"
    CLOSING = "closing"
    PUBLISHED = "published"
    ABANDONED = "abandoned"


ORDER = tuple(State)
"""States never go backwards in it."""

# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Round:
    """A row. since: when it came into this state, in seconds of the store's clock.  fence: of the leader that wrote it.

    given: devices that were given a place; a device that asks again in the same round is given once.  dropped: of them, that have
    no place now, and no report in the sum.  counted: reports in the sum.  A buffer's row begins with the sessions that held a
    place when the one before it closed as given; a session that lapsed and is counted all the same is given once more.
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
        """Whether nothing more comes of it."""
        return self.state in (State.PUBLISHED, State.ABANDONED)

    @property
    def out(self) -> int:
        """Sessions that hold a place, and are to report."""
        return self.given - self.dropped - self.counted


@dataclass(frozen=True, slots=True)
class Session:
    """A row: one device's work for one round. Its id makes everything that is sent for it idempotent.

    parent: the edge that asked for it, and alone may report it; empty where the device itself did.  serial: of the check-in that
    it answered.  round: that it was given in.  version: models published then, so the model that it began from.  expires: when no
    report of it is counted any more.  began: when it was given its place; both by the store's clock.  state: "out" while it
    holds its place; "lapsed" when it has no place any more, and may still report; "counted" or "dropped"; "late" when its report
    came after all, and too late: so it is learnt once how long its work took.  sum, staleness: where it was counted, and how
    many versions late; fixed then.
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
        """Whether a report of it may still come, as far as its row says."""
        return self.state in ("out", "lapsed")


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """What the store knows of a device.

    session: that it was given last.  last_sum: the round that it was last counted in, and last_counted: the id of the session,
    of which it may not have been told.  times_counted: how often it was.  lapses: how often it let a place go since then, and
    rests_until: when it may have another, by the store's clock.  models: how many sums of the run have become a model when
    `last_sum` has; one fewer if that sum was abandoned.
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
    """What was read in the transaction that decides.

    now: the store's clock, in seconds.  round: the row that the event is about; of a check-in, report, commit or drop, the
    newest.
    version: models published.  sessions: the rows that the event names.  device: of a check-in.
    paused: whether an admin holds the run.
    population: devices known, 0 where that is not.  arriving: check-ins a second of late, 0 where that is not known.  lasts:
    seconds that rounds have lasted of late.  waits: whether a round before this one is still to be published.
    models: sums that have become a model.
    led: when the present leader took over.  takes: seconds that such work takes a device, and takes_by_edge: from the moment at
    which an edge gets it for a device to that edge's sum; 0 before the first report.
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
"""A session holds its place for so many times what such work takes."""
SHARE = 0.25
"""The share of the deadline for which it does before anything is known of that."""
SHORTEST = 60.0
"""Seconds for which it does at least, unless that share is shorter: a message that got no answer is sent again in that time."""
LONGEST_REST = _DAY
"""Seconds that a device rests at most."""
UP, DOWN = 1.35, 0.9
"""Factors of what work takes, after a report that took longer, and one that did not. They balance where three of four do not."""
MOMENT = 1e-3
"""Seconds that any work takes at least."""
OVER = frozenset({"closed", "expired"})
"""Reasons for which a session is dropped whose device may still be at work."""
NO_FAULT = frozenset({"closed", "withdrawn", "revoked", "edge"})
"""Reasons why a session ends that are not its device's doing."""

# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class CheckIn:
    """A device asks for work. session: an id for the one it may be given.  serial: grows with every check-in of a device.
    previous: the session that it does not know the end of.  works: whether it asks for work too, or for that end alone.
    parent: the edge that asks for it."""

    session: str
    serial: int
    conditions: Conditions = NOTHING_SAID
    previous: str | None = None
    works: bool = True
    parent: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What the sessions of the facts have done arrived, whole and of the plan's form: a device's update; or the sum of an edge,
    the `parent`."""

    parent: str = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """Staged reports are about to be in the sum: decided in the transaction that adds them. together: how many sessions each
    report is of, in the order of the facts; empty where each is of one."""

    together: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """Sessions will not report: their devices said so, or left, or what they work for is over."""

    reason: str = "other"


@dataclass(frozen=True, slots=True)
class Overdue:
    """Time went by for these sessions; or, if spoilt, what they reported can never be counted, and nobody waits for more."""

    spoilt: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by."""


@dataclass(frozen=True, slots=True)
class Published:
    """The round's sum has become a model, in this transaction."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """A leader took over, with this fence: what was in the memory of the one before it is gone."""

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
    """Answer a check-in: come back within this window of seconds, at a moment drawn uniformly. reason: for the counts."""

    window: tuple[float, float]
    reason: str


@dataclass(frozen=True, slots=True)
class SettleSession:
    """Answer a check-in that asked for a session's end: "counted", "discarded", or "unknown": send it again."""

    session: str
    outcome: str


@dataclass(frozen=True, slots=True)
class StageReport:
    """Hold a session's update in memory for the next commit."""

    session: str


@dataclass(frozen=True, slots=True)
class AcceptReport:
    """Answer a report: it is counted."""

    session: str


@dataclass(frozen=True, slots=True)
class RefuseReport:
    """Answer a report: it is not counted, and will not be."""

    session: str
    reason: str


@dataclass(frozen=True, slots=True)
class CloseRound:
    """Make a model of the round's sum; doing it again gives the same one."""

    number: int


@dataclass(frozen=True, slots=True)
class AbandonRound:
    """Nothing comes of the round's sum: destroy it."""

    number: int
    reason: str


Action: TypeAlias = (
    AssignWork | ComeLater | SettleSession | StageReport | AcceptReport | RefuseReport | CloseRound | AbandonRound
)


@dataclass(frozen=True, slots=True)
class Decision:
    """rounds, sessions: rows as they are to be written; new ones too.  actions: to be done once they are.
    lapses: ids of those of the sessions whose devices let a place go; each is `rested`."""

    rounds: tuple[Round, ...] = ()
    sessions: tuple[Session, ...] = ()
    actions: tuple[Action, ...] = ()
    lapses: tuple[str, ...] = ()


NOTHING = Decision()

# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def outcome(session: Session, facts: Facts) -> str:
    """What became of a session: "counted", "discarded", or "unknown", where it may still be counted. A row says "out" or "lapsed"
    also where its round is over."""
    if not session.awaited:
        return "counted" if session.state == "counted" else "discarded"
    over = facts.now >= session.expires or (not facts.pacing.buffered and _is_over(session.round, facts.round))
    return "discarded" if over else "unknown"


def _is_over(number: int, current: Round) -> bool:
    """Whether a synchronous round takes no more reports."""
    return number != current.number or ORDER.index(current.state) > ORDER.index(State.OPEN)


def _check_in(facts: Facts, event: CheckIn) -> Decision:
    """Settle what is not settled; then give work, where there is some and this device may have it."""
    before = facts.device.session if facts.device else None
    if before is not None and event.serial < before.serial:
        return NOTHING  # it was long on its way, and nobody waits for the answer
    settled: list[Action] = []
    if event.previous is not None:
        ended = _end_of(event.previous, facts)
        settled = [SettleSession(event.previous, ended)]
        if ended == "unknown":
            return Decision(actions=tuple(settled))
    if not event.works:
        return Decision(actions=tuple(settled))
    if before is not None and event.serial == before.serial:  # the same request again
        return Decision(actions=(*settled, AssignWork(before))) if outcome(before, facts) == "unknown" else NOTHING
    if before is not None and before.parent != event.parent and outcome(before, facts) == "unknown":
        wait = ComeLater(window(facts.pacing, facts.population, facts.arriving, _time_left(before, facts)), "parent")
        return Decision(actions=(*settled, wait))  # it may be in the sum of that edge, and must not be in two
    row, left, holds = facts.round, list[Session](), before is not None and _holds_place(before, facts.round, facts)
    if before is not None:  # if a report of it is awaited, it is over, or the device has forgotten it
        left, row = _gone(before, "forgotten", row, facts)
    if holds and not _gives_again(facts):  # then its place is as if it had not been given
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
    """New work for the device of the facts. holds: whether it takes over the place of its last session, for as long as that may
    hold it: else who forgets its work again and again would hold a place for ever."""
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
    """The round when its device has a place. before: the device's last session, which is gone."""
    of_this = before is not None and before.state != "counted" and before.round == row.number
    if (holds or of_this) and _gives_again(facts):  # it is among those that were given one
        return changed(row, dropped=row.dropped - 1)
    return changed(row, given=row.given + 1)


def _end_of(session: str, facts: Facts) -> str:
    """What became of a session that a device asks for: of its last, or of the last that was counted; no other is."""
    device = facts.device
    if device is not None and device.session is not None and device.session.id == session:
        return outcome(device.session, facts)
    return "counted" if device is not None and device.last_counted == session else "discarded"


def _not_now(facts: Facts, event: CheckIn, row: Round) -> str | None:
    """Why a device gets no work; None where it does."""
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
        return "few"  # whatever they do, no sum of theirs would be used
    if device.last_sum is not None and _models_left(device, row, facts) > 0:
        return "separation"
    if pacing.most_rounds is not None and device.times_counted >= pacing.most_rounds:
        return "cap"
    return None if room(facts.pacing, facts.population, row) > 0 else "full"


def _models_left(device: DeviceRow, row: Round, facts: Facts) -> int:
    """Models that must be made before a device may be in another sum; 0 or less where it may. A sum that is abandoned makes none,
    and so takes nobody's separation away."""
    if device.last_sum is None:
        return 0
    others = facts.models - device.models
    return facts.pacing.separation - 1 - others if facts.pacing.separation > 1 else int(row.number <= device.last_sum)


def room(pacing: Pacing, population: int, row: Round) -> int:
    """Places that may be given. Where there is no deadline, a synchronous round's devices are not replaced. population: 0 if not
    known."""
    if pacing.concurrency is not None:
        left = pacing.concurrency - row.out
        return left if pacing.every is None else min(left, pacing.cohort - row.counted - row.out)
    taken = row.given if pacing.deadline is None else row.given - row.dropped
    return min(pacing.chosen, population or pacing.chosen) - taken


def begins_at(pacing: Pacing, row: Round) -> float:
    """When the pace lets a planned round open, or lets an open buffer's devices have work, by the store's clock."""
    waits = row.state is State.OPEN if pacing.buffered else row.state is State.PLANNED
    return row.since + pacing.every if pacing.every is not None and waits and row.number else 0.0


def _is_timed(facts: Facts) -> bool:
    """Whether sessions may lapse, and devices rest."""
    return facts.pacing.deadline is not None


def _gives_again(facts: Facts) -> bool:
    """Whether a place of a synchronous round that is let go is given to another device."""
    return _is_timed(facts) and not facts.pacing.buffered


def patience(pacing: Pacing, takes: float) -> float:
    """Seconds for which a session may hold its place: a multiple of what such work takes, and never longer than the deadline.
    takes: 0 if nothing is known."""
    if pacing.deadline is None:
        return float("inf")
    share = SHARE * pacing.deadline
    return share if takes <= 0 else min(pacing.deadline, max(MULTIPLE * takes, min(SHORTEST, share)))


def lets_go_at(session: Session, facts: Facts) -> float:
    """When a session that says nothing lapses. The time in which no leader was there to hear it does not count."""
    if not _is_timed(facts):
        return float("inf")
    return max(session.began, facts.led) + patience(facts.pacing, _takes(session, facts))


def _takes(session: Session, facts: Facts) -> float:
    return facts.takes_by_edge if session.parent else facts.takes


def learnt(takes: float, seconds: float) -> float:
    """What such work takes, after one more report, which took so many seconds. It comes to what three of four reports do not
    exceed, and one report moves it by a fixed factor: a few that are slow or fast on purpose do not move it far."""
    if takes <= 0:
        return max(seconds, MOMENT)
    return max(MOMENT, takes * (UP if seconds > takes else DOWN))


def rested(device: DeviceRow, session: Session, facts: Facts) -> DeviceRow:
    """A device that let this session's place go: it rests as long as it held the place, and twice as long each further time,
    until a report of it is counted."""
    held = min(facts.now - session.began, patience(facts.pacing, _takes(session, facts)))
    rest = min(LONGEST_REST, held * 2.0 ** min(device.lapses, 30))
    return changed(device, lapses=device.lapses + 1, rests_until=max(device.rests_until, facts.now + rest))


def forgiven(device: DeviceRow, late: Session) -> DeviceRow:
    """A device whose report came, and too late: it was slow and not silent, so this session's lapse is taken back."""
    if not device.lapses or device.rests_until <= late.began:
        return device
    return changed(device, lapses=device.lapses - 1, rests_until=0.0)


LEFT = float("inf")
"""`DeviceRow.rests_until` of a device that has left, and whose work an edge may still report."""


def _lifetime(facts: Facts, row: Round) -> float:
    """Seconds that a session given now may take."""
    if facts.pacing.deadline is None:
        return float("inf")
    return facts.pacing.deadline if facts.pacing.buffered else row.since + facts.pacing.deadline - facts.now


def _time_left(session: Session, facts: Facts) -> float:
    """Seconds until a session is over, whatever comes of it, as far as that can be told."""
    return session.expires - facts.now if session.expires < float("inf") else facts.lasts


def _until_next(facts: Facts, row: Round, reason: str) -> float:
    """Seconds until there may be work for this device again, as far as that can be told."""
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
    return min(left, patience(facts.pacing, facts.takes)) if reason == "full" else left  # a place may be let go by then


def _report(facts: Facts, event: Report) -> Decision:
    """Stage what can be counted; say at once what cannot, and what is counted already."""
    if not facts.sessions or any(session.parent != event.parent for session in facts.sessions):
        return NOTHING  # nobody knows it, or somebody else was to report it
    if all(outcome(session, facts) == "counted" for session in facts.sessions):
        return Decision(actions=tuple(AcceptReport(session.id) for session in facts.sessions))
    if (reason := _why_not(facts.sessions, facts)) is not None:
        row, written, refused = _refused(facts.sessions, reason, facts.round, facts)
        return _closed_if_over(facts, row, written, refused)
    return Decision(actions=tuple(StageReport(session.id) for session in facts.sessions))


def _refused(
    sessions: Sequence[Session], reason: str, row: Round, facts: Facts
) -> tuple[Round, list[Session], list[Action]]:
    """What a report that is not counted leaves: the round, its sessions, and what is said."""
    written = list[Session]()
    for session in sessions:
        gone, row = _gone(session, reason, row, facts)
        heard = gone or [session] * (session.state == "dropped" and session.reason in OVER)
        written += [changed(one, state="late") if one.reason in OVER else one for one in heard]
    return row, written, [RefuseReport(session.id, reason) for session in sessions]


def _why_not(sessions: Sequence[Session], facts: Facts) -> str | None:
    """Why a report of these will never be counted; None where it may be: a sum cannot be taken apart, so it is counted whole or
    not at all."""
    if len(sessions) > 1 and any(outcome(session, facts) == "counted" for session in sessions):
        return "closed"  # some of it is in another sum already
    return next((reason for session in sessions if (reason := _uncountable(session, facts)) is not None), None)


def _uncountable(session: Session, facts: Facts) -> str | None:
    """Why a report will never be counted; None where it may be."""
    if outcome(session, facts) == "discarded":
        return session.reason or ("expired" if facts.now >= session.expires else "closed")
    if not (facts.round.state is State.OPEN or facts.pacing.buffered):
        return "phase"
    stale = facts.pacing.most_stale
    return "stale" if stale is not None and facts.version - session.version > stale else None


def _holds_place(session: Session, row: Round, facts: Facts) -> bool:
    """Whether a session has one of the places of this round."""
    return session.state == "out" and (facts.pacing.buffered or session.round == row.number)


def _gone(session: Session, reason: str, row: Round, facts: Facts) -> tuple[list[Session], Round]:
    """What to write of a session that ends without a report that counts: nothing, where it has ended already."""
    if not session.awaited:
        return [], row
    left = changed(row, dropped=row.dropped + 1) if _holds_place(session, row, facts) else row
    return [changed(session, state="dropped", reason=reason)], left


def _commit(facts: Facts, event: Commit) -> Decision:
    """Count in what is staged, up to the cohort, where the round is open; the last of it closes the round. An edge's sum may go
    beyond that, as far as devices were chosen.

    What is left of it waits for the next buffer.
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
    """The round with a report of this session in its sum. If the session has lapsed, it takes a place again."""
    if session.state == "lapsed":
        row = changed(row, given=row.given + 1) if facts.pacing.buffered else changed(row, dropped=row.dropped - 1)
    return changed(row, counted=row.counted + 1)


def _reports(facts: Facts, event: Commit) -> Iterator[tuple[Session, ...]]:
    """The sessions of each report."""
    left = iter(facts.sessions)
    for count in event.together or (1,) * len(facts.sessions):
        yield tuple(islice(left, count))


def _dropped(facts: Facts, event: Dropped) -> Decision:
    """Note who will not report, and give its place to the next device that asks."""
    row, written, lapses = facts.round, list[Session](), list[str]()
    for session in facts.sessions:
        held = _holds_place(session, row, facts) and row.state is State.OPEN
        if held and _is_timed(facts) and event.reason not in NO_FAULT:
            lapses.append(session.id)
        gone, row = _gone(session, event.reason, row, facts)
        written += gone
    return _closed_if_over(facts, row, written, [], lapses)


def _let_go(facts: Facts, event: Overdue) -> Decision:
    """Free the places of sessions that take too long, or sent what cannot be counted; end those whose time is over."""
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
    """Begin, unless the run is held, or the pace leaves time since the round before."""
    if facts.paused or facts.now < begins_at(facts.pacing, facts.round):
        return NOTHING
    return _moved(facts, State.OPEN)


def _tick(facts: Facts, event: Tick) -> Decision:
    """Close or abandon the round if its deadline is past."""
    return _closed_if_over(facts, facts.round, [], [])


def _awaits_model(facts: Facts, event: Tick) -> Decision:
    """Do nothing: the round waits for its model, however long that takes."""
    return NOTHING


def _published(facts: Facts, event: Published) -> Decision:
    """The model is there, and in synchronous rounds so is the next round. Where a round before it is still to be published,
    nothing: who publishes asks again after that."""
    return NOTHING if facts.waits else _moved(facts, State.PUBLISHED)


def _recovered(facts: Facts, event: Recovered) -> Decision:
    """Fence out the leader before, and do again what it may have left undone."""
    row = facts.round
    if event.fence < row.fence:
        return NOTHING  # it was fenced out itself
    again: dict[State, Action] = {
        State.CLOSING: CloseRound(row.number),
        State.ABANDONED: AbandonRound(row.number, row.reason),
    }
    return Decision((changed(row, fence=event.fence),), (), (again[row.state],) if row.state in again else ())


def _recovered_published(facts: Facts, event: Recovered) -> Decision:
    """Do nothing: the model is there, and the leader before has left nothing undone."""
    return NOTHING


def _cancelled(facts: Facts, event: Cancelled) -> Decision:
    """End it: an admin wants so, or no model can be made of its sum."""
    if facts.round.state is State.CLOSING and facts.pacing.buffered:  # the next buffer is open already
        row = changed(facts.round, state=State.ABANDONED, since=facts.now, reason="cancelled")
        return Decision((row,), (), (AbandonRound(row.number, row.reason),))
    return _moved(facts, State.ABANDONED, "cancelled")


def _closed_if_over(
    facts: Facts, row: Round, sessions: list[Session], actions: list[Action], lapses: Sequence[str] = ()
) -> Decision:
    """An open round after what happened in it: closed, if it is full, or over and large enough; abandoned if it is not."""
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
    """When an open synchronous round is over, if nobody comes or reports until then; infinity for never.

    That is its deadline; or, before it, when nobody is waited for: all who were chosen have ended. If places are given again, it
    is when everybody of the population has had one, there are enough reports, and whoever lapsed has had as long as work takes:
    else somebody may come who gives more.
    """
    end = float("inf") if facts.pacing.deadline is None else row.since + facts.pacing.deadline
    if not row.given or row.out:
        return end
    if not _gives_again(facts):
        return row.since if room(facts.pacing, facts.population, row) <= 0 else end
    if 0 < facts.population <= row.given and row.counted >= facts.pacing.fewest:
        if row.counted >= facts.population:
            return row.since  # everybody is in the sum
        known = [patience(facts.pacing, takes) for takes in (facts.takes, facts.takes_by_edge) if takes > 0]
        return min(end, row.since + max(known, default=float("inf")))
    return end


def _past_deadline(facts: Facts) -> bool:
    return facts.pacing.deadline is not None and facts.now >= facts.round.since + facts.pacing.deadline


def _moved(facts: Facts, to: State, reason: str = "") -> Decision:
    """The row in another state, what that means for others, and what is to be done there."""
    row = changed(facts.round, state=to, since=facts.now, reason=reason)
    buffered = facts.pacing.buffered
    follows = Round(row.number + 1, since=facts.now, fence=row.fence, given=row.out if buffered else 0)
    match to:
        case State.CLOSING if buffered:  # the next buffer is open in the same transaction
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


@dataclass(frozen=True)
class Entry:
    """What an event does in a state. to: the states that it may lead to, besides staying."""

    rule: Callable[[Facts, Any], Decision]
    to: tuple[State, ...] = ()


def _entries() -> dict[tuple[State, type], Entry]:
    s = State
    table: dict[tuple[State, type], Entry] = {}

    def on(states: tuple[State, ...], event: type, rule: Callable[[Facts, Any], Decision], *to: State) -> None:
        table.update({(state, event): Entry(rule, to) for state in states})

    running = (s.PLANNED, s.OPEN, s.CLOSING)
    on(ORDER, CheckIn, _check_in)
    on(ORDER, Report, _report)
    on(ORDER, Commit, _commit)
    on(ORDER, Dropped, _dropped)
    on(ORDER, Overdue, _let_go)
    # while it is open, these may also end it
    on((s.OPEN,), CheckIn, _check_in, s.CLOSING, s.ABANDONED)
    on((s.OPEN,), Report, _report, s.CLOSING, s.ABANDONED)
    on((s.OPEN,), Commit, _commit, s.CLOSING, s.ABANDONED)
    on((s.OPEN,), Dropped, _dropped, s.CLOSING, s.ABANDONED)
    on((s.OPEN,), Overdue, _let_go, s.CLOSING, s.ABANDONED)
    on((s.PLANNED,), Tick, _open, s.OPEN)
    on((s.OPEN,), Tick, _tick, s.CLOSING, s.ABANDONED)
    on((s.CLOSING,), Tick, _awaits_model)
    on((s.CLOSING,), Published, _published, s.PUBLISHED)
    on((*running, s.ABANDONED), Recovered, _recovered)
    on((s.PUBLISHED,), Recovered, _recovered_published)
    on(running, Cancelled, _cancelled, s.ABANDONED)
    return table


TABLE: Mapping[tuple[State, type], Entry] = _entries()
"""(state, event) → what is done. An event that the table does not allow in a state changes nothing: its sender has not heard yet
that the round is over. Such events are counted (see `is_allowed`)."""


def is_allowed(state: State, event: Event) -> bool:
    """Whether the table has an entry for an event in a state."""
    return (state, type(event)) in TABLE


def decide(facts: Facts, event: Event) -> Decision:
    """What is to be written, and then done. Raises nothing that depends on what a device says."""
    entry = TABLE.get((facts.round.state, type(event)))
    return NOTHING if entry is None else entry.rule(facts, event)
