"""A site's rounds, as a table: what happens between two of its sums for the server above.

    decision = decide(facts, event)

A *site* is an edge that does several rounds on a model of its own before it sends a sum (κ₂ > 1). The function is pure;
`sumus/edge/edge_run.py` drives it in place of the edge's table.

Theory of operation
===================

**States.** The *first round* is an edge's: the rules of `protocol/edge.py` apply, and the server above gives the work. The sum
of that round is not sent. It moves the site's model, and the site begins an *own round* on the new model, with the devices of
the first round and no others; nobody above is asked. Within an own round the edge's table decides how long the round waits
for its devices. After the last own round, the sum of all rounds is *going up*. When the server above has answered, the site
begins again with a first round.

**Too few contributors.** A round with fewer contributors than the plan's `min_contributors` makes no model. If that is the
first round, its sum goes up as an edge's does, and the site stays in the first round until it is answered. If it is a later
one, the round is cancelled, and what goes up is the sum of the rounds before it.

**Whose sessions end.** The sessions of the first round were given by the server above. Those whose reports moved the model
stand for the sum until it is answered; the others are said to have ended. The sessions of own rounds are the site's alone:
nothing is said about them above.

**What survives a crash.** One note of the run (`SiteStanding` in `sumus/edge/site_model.py`) says where the site stands. It is
written in the transaction that publishes a round, so a round has either moved the model or can be done again from its sealed
sum. A site that is found going up computes the same bytes again. The state is never kept apart from the note: `state_of` reads
it off.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from sumus.protocol.edge import (
    ASKING,
    AdmitCheckIn,
    AllWorkEnds,
    CancelRound,
    DeviceAsks,
    DeviceKeptOut,
    DropSessions,
    EdgeAction,
    EdgeEvent,
    EdgeFacts,
    EdgeRound,
    EdgeState,
    NoWorkAbove,
    OtherWorkAsked,
    RoundAbandoned,
    RoundClosed,
    SayEnded,
    SessionsDropped,
    SumCounted,
    SumRefused,
    WorkArrived,
    WorkFetched,
    forget_work,
    given_back,
    said,
    work_too_late,
)
from sumus.protocol.edge import TABLE as EDGE_TABLE
from sumus.protocol.edge import decide as decide_for_edge
from sumus.protocol.round import ComeLater, Session, Tick
from sumus.protocol.rows import changed


class SiteState(StrEnum):
    """Where a site stands between two of its sums."""

    FIRST_ROUND = "first_round"
    OWN_ROUND = "own_round"
    GOING_UP = "going_up"


@dataclass(frozen=True, slots=True)
class OwnRounds:
    """What a site has done since its last sum; there is none of it before the first round has moved the model.

    Attributes:
        sessions: The sessions of the server above that the sum will stand for.
        done: Rounds that have moved the model.
        last: The number of the last of them.
        over: Whether no further round comes, and the sum goes up.
    """

    sessions: tuple[str, ...]
    done: int
    last: int
    over: bool = False

    @property
    def devices(self) -> frozenset[str]:
        """The devices that take part."""
        return frozenset(session.partition("/")[0] for session in self.sessions)


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """What a decision is made from.

    Attributes:
        edge: The facts of the edge's table, about the newest round or the one that the event is about.
        own: What the site has done since its last sum; None in the first round.
        rounds: Rounds that the plan asks for between two sums.
        least: Contributors that a round must have to make a model.
        sending: Whether the site's sum waits for the uplink.
    """

    edge: EdgeFacts
    own: OwnRounds | None
    rounds: int
    least: int
    sending: bool = False


def state_of(own: OwnRounds | None) -> SiteState:
    """Return the site's state."""
    if own is None:
        return SiteState.FIRST_ROUND
    return SiteState.GOING_UP if own.over else SiteState.OWN_ROUND


# ── events and actions beside the edge's ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class MoveUnusable:
    """No sum for the server above can be made of what the model has moved by."""


SiteEvent: TypeAlias = EdgeEvent | MoveUnusable


@dataclass(frozen=True, slots=True)
class MoveModel:
    """Let the round's sum move the site's model, and write that down.

    Attributes:
        actions: What is to be done once it is written.
    """

    actions: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class EndOwnRounds:
    """Write down that no further round comes."""


@dataclass(frozen=True, slots=True)
class SendMove:
    """Send up what the model has moved by."""


@dataclass(frozen=True, slots=True)
class ForgetOwnRounds:
    """Forget what lies between two sums: the next round is a first one."""


SiteAction: TypeAlias = EdgeAction | MoveModel | EndOwnRounds | SendMove | ForgetOwnRounds


@dataclass(frozen=True, slots=True)
class SiteDecision:
    """What follows from an event.

    Attributes:
        state: Where the site stands once the actions are done.
        round: The round as it is to be kept from now on.
        actions: What is to be done, in this order.
    """

    state: SiteState
    round: EdgeRound
    actions: tuple[Any, ...] = ()


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _as_edge(facts: SiteFacts, event: Any) -> SiteDecision:
    """Do as an edge does that only adds."""
    found = decide_for_edge(facts.edge, event)
    return SiteDecision(state_of(facts.own), found.round, found.actions)


def _stays(facts: SiteFacts, *actions: SiteAction) -> SiteDecision:
    """Return the decision to do something, and to stay as things are."""
    return SiteDecision(state_of(facts.own), facts.edge.round, actions)


def _close_first(facts: SiteFacts, event: RoundClosed) -> SiteDecision:
    """Move the model, and go on with the devices that reported. A sum of too few devices goes up as an edge's does."""
    if facts.edge.round.state is EdgeState.WAITING or event.count < facts.least:
        return _as_edge(facts, event)
    late = (*said(event.out), DropSessions(event.out)) if event.out else ()
    return _moved(facts, 1, late)


def _close_own(facts: SiteFacts, event: RoundClosed) -> SiteDecision:
    """Move the model once more. Cancel a round of too few devices, which makes no model."""
    assert facts.own is not None, "an own round comes after a first one"
    if event.count < facts.least:
        return _stays(facts, CancelRound())
    return _moved(facts, facts.own.done + 1, (DropSessions(event.out),) if event.out else ())


def _moved(facts: SiteFacts, done: int, late: tuple[EdgeAction, ...]) -> SiteDecision:
    """Return the decision to move the model. late: what ends the sessions that have not reported."""
    over = done >= facts.rounds
    move = MoveModel((*late, SendMove()) if over else late)
    going_up = changed(facts.edge.round, state=EdgeState.GOING_UP)
    state = SiteState.GOING_UP if over else SiteState.OWN_ROUND
    return SiteDecision(state, going_up, (*given_back(facts.edge.unfetched), move))


def _abandon_own(facts: SiteFacts, event: RoundAbandoned) -> SiteDecision:
    """Do no further round, since this one came to nothing: the sum is of the rounds before it.

    After a crash, rounds that were abandoned long ago are named once more; they change nothing.
    """
    assert facts.own is not None, "an own round comes after a first one"
    if facts.edge.row.number <= facts.own.last:
        return _stays(facts, *_dropped(event.out))
    settled = changed(facts.edge.round, state=EdgeState.SETTLED)
    return SiteDecision(SiteState.GOING_UP, settled, (*_dropped(event.out), EndOwnRounds(), SendMove()))


def _abandon_unused(facts: SiteFacts, event: RoundAbandoned) -> SiteDecision:
    """End the sessions of a round that was open while the sum went up."""
    settled = changed(facts.edge.round, state=EdgeState.SETTLED)
    return SiteDecision(SiteState.GOING_UP, settled, _dropped(event.out))


def _cancel_unused(facts: SiteFacts, event: RoundClosed) -> SiteDecision:
    """Cancel a round that was open while the sum went up: no device could have work in it."""
    return _stays(facts, CancelRound())


def _asks(facts: SiteFacts, event: DeviceAsks) -> SiteDecision:
    """Let each device of the first round take part once in an own round; all others wait for the next first round."""
    assert facts.own is not None, "an own round comes after a first one"
    last = None if event.known is None else event.known.session
    if last is not None and last.serial == event.serial:
        return _stays(facts, AdmitCheckIn())  # the same check-in again
    if facts.own.over or event.device not in facts.own.devices or _is_counted_in(last, facts.edge.row.number):
        return _stays(facts, ComeLater(ASKING, "closed"))
    return _stays(facts, AdmitCheckIn())


def _is_counted_in(last: Session | None, number: int) -> bool:
    return last is not None and last.state == "counted" and last.round == number


def _give_back(facts: SiteFacts, event: WorkArrived) -> SiteDecision:
    """Say that the session has ended: work for the next sum can begin only once this one is answered."""
    return _stays(facts, *work_too_late(facts.edge, event).actions)


def _fetched(facts: SiteFacts, event: WorkFetched) -> SiteDecision:
    """Await other devices of the first round for a while longer, since one has come."""
    return SiteDecision(SiteState.OWN_ROUND, changed(facts.edge.round, latest=facts.edge.now))


def _forget_work(facts: SiteFacts, event: OtherWorkAsked) -> SiteDecision:
    """Count no report of these sessions any more."""
    return _stays(facts, *forget_work(facts.edge, event).actions)


def _ignore(facts: SiteFacts, event: Any) -> SiteDecision:
    """Do nothing: the sessions and the sum are the site's own, and the server above neither gave them nor asks for them."""
    return _stays(facts)


def _try_again(facts: SiteFacts, event: Tick) -> SiteDecision:
    """Send the sum up if that could not be done before, since a file was missing."""
    found = _as_edge(facts, event)
    again = () if facts.sending else (SendMove(),)
    return SiteDecision(SiteState.GOING_UP, found.round, (*again, *found.actions))


def _counted(facts: SiteFacts, event: SumCounted) -> SiteDecision:
    """Begin again with a first round."""
    return SiteDecision(SiteState.FIRST_ROUND, facts.edge.round, (ForgetOwnRounds(),))


def _not_counted(facts: SiteFacts, event: SumRefused | MoveUnusable) -> SiteDecision:
    """Say that no report will come of the sessions that the sum stood for, and begin again with a first round."""
    assert facts.own is not None, "a sum of own rounds has gone up"
    return SiteDecision(SiteState.FIRST_ROUND, facts.edge.round, (SayEnded(facts.own.sessions), ForgetOwnRounds()))


def _end_all(facts: SiteFacts, event: AllWorkEnds) -> SiteDecision:
    """Say that no report will come of the sessions that the sum would have stood for, and forget the site's rounds."""
    assert facts.own is not None, "an own round comes after a first one"
    ended = (*given_back(facts.edge.unfetched), SayEnded(facts.own.sessions), ForgetOwnRounds())
    return SiteDecision(SiteState.FIRST_ROUND, facts.edge.round, ended)


def _dropped(out: tuple[str, ...]) -> tuple[EdgeAction, ...]:
    return (DropSessions(out),) if out else ()


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SiteEntry:
    """What an event does in a state.

    Attributes:
        rule: The function that decides.
        to: The states that it may lead to, besides staying.
    """

    rule: Callable[[SiteFacts, Any], SiteDecision]
    to: tuple[SiteState, ...] = ()


def _entries() -> dict[tuple[SiteState, type], SiteEntry]:
    s = SiteState
    table: dict[tuple[SiteState, type], SiteEntry] = {}

    def on(
        states: tuple[SiteState, ...], event: type, rule: Callable[[SiteFacts, Any], SiteDecision], *to: SiteState
    ) -> None:
        table.update({(state, event): SiteEntry(rule, to) for state in states})

    for event in {event for _, event in EDGE_TABLE}:
        on((s.FIRST_ROUND,), event, _as_edge)
    later = (s.OWN_ROUND, s.GOING_UP)
    on((s.FIRST_ROUND,), RoundClosed, _close_first, s.OWN_ROUND, s.GOING_UP)
    on(later, DeviceAsks, _asks)
    on(later, WorkArrived, _give_back)
    on((s.OWN_ROUND,), WorkFetched, _fetched)
    on(later, NoWorkAbove, _ignore)
    on(later, DeviceKeptOut, _ignore)
    on(later, SessionsDropped, _ignore)
    on(later, OtherWorkAsked, _forget_work)
    on((s.OWN_ROUND,), Tick, _as_edge)
    on((s.GOING_UP,), Tick, _try_again)
    on((s.OWN_ROUND,), RoundClosed, _close_own, s.GOING_UP)
    on((s.GOING_UP,), RoundClosed, _cancel_unused)
    on((s.OWN_ROUND,), RoundAbandoned, _abandon_own, s.GOING_UP)
    on((s.GOING_UP,), RoundAbandoned, _abandon_unused)
    on((s.GOING_UP,), SumCounted, _counted, s.FIRST_ROUND)
    on((s.GOING_UP,), SumRefused, _not_counted, s.FIRST_ROUND)
    on((s.GOING_UP,), MoveUnusable, _not_counted, s.FIRST_ROUND)
    on(later, AllWorkEnds, _end_all, s.FIRST_ROUND)
    return table


TABLE: Mapping[tuple[SiteState, type], SiteEntry] = _entries()
"""(state, event) → what is done. In the first round, the edge's table decides whether the round allows the event, too."""


def decide(facts: SiteFacts, event: SiteEvent) -> SiteDecision:
    """Decide where the site stands next, and what is to be done."""
    entry = TABLE.get((state_of(facts.own), type(event)))
    return _stays(facts) if entry is None else entry.rule(facts, event)
