"""A site's rounds, as a table: the rounds between two of its sums for the server above.

    decision = decide(facts, event)

A *site* is an edge that does several rounds on a model of its own before it sends a sum (κ₂ > 1). The function is pure;
`sumus/edge/edge_run.py` drives it in place of the edge's table.

Theory of operation
===================

**States.** The *first round* follows the rules of an edge's round (`protocol/edge.py`), and the server above gives the work.
The sum of that round is not sent. It changes ("moves") the site's model, and the site begins an *own round* on the new model,
with the devices of the first round only, without asking the server above. Within an own round the edge's table decides how long
the round waits for its devices. After the last own round, the sum of all rounds is *going up*. When the server above has
answered, the site begins again with a first round.

**Too few contributors.** A round with fewer contributors than the plan's `min_contributors` makes no model. If this happens in
the first round, the sum goes up like an edge's sum, and the site stays in the first round until the sum is answered. If it
happens in a later round, the round is cancelled, and the sum of the earlier rounds goes up.

**Which sessions end.** The server above has given the sessions of the first round. If the report of a session moved the model,
the session stays open until the server above has answered about the sum. The server above is told that the other sessions have
ended. The sessions of own rounds belong to the site alone: the server above is told nothing about them.

**What survives a crash.** One note of the run (`SiteStanding` in `sumus/edge/site_model.py`) holds the site's standing (its
progress between two sums). It is written in the transaction that publishes a round, so a round has either moved the model, or
can be repeated from its sealed sum. After a crash, a site that is going up computes the same bytes again. The state is never
stored separately: `state_of` derives it from the note.
"""

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
    drop_sessions,
    end_sessions,
    forget_work,
    given_back,
    work_too_late,
)
from sumus.protocol.edge import TABLE as EDGE_TABLE
from sumus.protocol.edge import decide as decide_for_edge
from sumus.protocol.round import ComeLater, Session, Tick
from sumus.protocol.rows import changed
from sumus.protocol.table import Entry, EventTable


class SiteState(StrEnum):
    """The state of a site between two of its sums."""

    FIRST_ROUND = "first_round"
    OWN_ROUND = "own_round"
    GOING_UP = "going_up"


@dataclass(frozen=True, slots=True)
class OwnRounds:
    """The rounds of a site since its last sum. The value exists only after the first round has moved the model.

    Attributes:
        sessions: The sessions of the first round whose reports moved the model. The sum counts as the report of all of them.
        done: The number of rounds that have moved the model.
        last: The number of the last such round.
        over: Whether the rounds have ended, and the sum goes up.
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
    """The inputs of a decision.

    Attributes:
        edge: The facts of the edge's table, about the round that the event concerns, or the newest round.
        own: The site's rounds since its last sum; None in the first round.
        rounds: The number of rounds between two sums, as set by the plan.
        least: The least number of contributors for a round to make a model.
        sending: Whether the site's sum waits to be sent to the server above.
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


# ── events and actions of sites alone ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class MoveUnusable:
    """The site could not compute a sum from the change of its model."""


SiteEvent: TypeAlias = EdgeEvent | MoveUnusable


@dataclass(frozen=True, slots=True)
class MoveModel:
    """Move the site's model by the round's sum, and store the new standing (the site's progress).

    Attributes:
        actions: The actions to carry out once the standing is stored.
    """

    actions: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class EndOwnRounds:
    """Record that the site's rounds have ended."""


@dataclass(frozen=True, slots=True)
class SendMove:
    """Send the change of the model to the server above."""


@dataclass(frozen=True, slots=True)
class ForgetOwnRounds:
    """Delete the site's standing (its progress): the next round is a first round."""


SiteAction: TypeAlias = EdgeAction | MoveModel | EndOwnRounds | SendMove | ForgetOwnRounds


@dataclass(frozen=True, slots=True)
class SiteDecision:
    """The decision about an event.

    Attributes:
        state: The site's state after the actions.
        round: The new value of the round in memory.
        actions: The actions, in the order in which they are carried out.
    """

    state: SiteState
    round: EdgeRound
    actions: tuple[Any, ...] = ()


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _as_edge(facts: SiteFacts, event: Any) -> SiteDecision:
    """Decide by the table of an edge that only adds reports."""
    found = decide_for_edge(facts.edge, event)
    return SiteDecision(state_of(facts.own), found.round, found.actions)


def _stays(facts: SiteFacts, *actions: SiteAction) -> SiteDecision:
    """Return the decision to carry out these actions and keep the state."""
    return SiteDecision(state_of(facts.own), facts.edge.round, actions)


def _close_first(facts: SiteFacts, event: RoundClosed) -> SiteDecision:
    """Move the model, and go on with the devices that reported. A sum of too few devices goes up like an edge's sum."""
    if facts.edge.round.state is EdgeState.WAITING or event.count < facts.least:
        return _as_edge(facts, event)
    return _moved(facts, 1, end_sessions(event.out))


def _close_own(facts: SiteFacts, event: RoundClosed) -> SiteDecision:
    """Move the model by the sum of this own round, or cancel the round if too few devices reported."""
    assert facts.own is not None, "an own round comes after a first one"
    if event.count < facts.least:
        return _stays(facts, CancelRound())
    return _moved(facts, facts.own.done + 1, drop_sessions(event.out))


def _moved(facts: SiteFacts, done: int, late: tuple[EdgeAction, ...]) -> SiteDecision:
    """Return the decision to move the model.

    Args:
        facts: The facts of the decision.
        done: The number of rounds that will then have moved the model.
        late: The actions that end the sessions without a report.
    """
    over = done >= facts.rounds
    move = MoveModel((*late, SendMove()) if over else late)
    going_up = changed(facts.edge.round, state=EdgeState.GOING_UP)
    state = SiteState.GOING_UP if over else SiteState.OWN_ROUND
    return SiteDecision(state, going_up, (*given_back(facts.edge.unfetched), move))


def _abandon_own(facts: SiteFacts, event: RoundAbandoned) -> SiteDecision:
    """Begin no further round, since this round was abandoned, and send the sum of the earlier rounds.

    After a crash, the event comes again for earlier rounds that were abandoned. Then only their sessions are ended again.
    """
    assert facts.own is not None, "an own round comes after a first one"
    if facts.edge.row.number <= facts.own.last:
        return _stays(facts, *drop_sessions(event.out))
    settled = changed(facts.edge.round, state=EdgeState.SETTLED)
    return SiteDecision(SiteState.GOING_UP, settled, (*drop_sessions(event.out), EndOwnRounds(), SendMove()))


def _abandon_unused(facts: SiteFacts, event: RoundAbandoned) -> SiteDecision:
    """End the sessions of a round that was open while the sum went up."""
    settled = changed(facts.edge.round, state=EdgeState.SETTLED)
    return SiteDecision(SiteState.GOING_UP, settled, drop_sessions(event.out))


def _cancel_unused(facts: SiteFacts, event: RoundClosed) -> SiteDecision:
    """Cancel a round that was open while the sum went up. No device has work in it."""
    return _stays(facts, CancelRound())


def _asks(facts: SiteFacts, event: DeviceAsks) -> SiteDecision:
    """Let each device of the first round take part once in each own round of the site; all others wait for the next first
    round.
    """
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
    """Tell the server above that the session has ended: work for the next sum can begin only after this sum is answered."""
    return _stays(facts, *work_too_late(facts.edge, event).actions)


def _fetched(facts: SiteFacts, event: WorkFetched) -> SiteDecision:
    """Wait longer for the other devices of the first round, since one of them has come."""
    return SiteDecision(SiteState.OWN_ROUND, changed(facts.edge.round, latest=facts.edge.now))


def _forget_work(facts: SiteFacts, event: OtherWorkAsked) -> SiteDecision:
    """Count no further report of these sessions."""
    return _stays(facts, *forget_work(facts.edge, event).actions)


def _ignore(facts: SiteFacts, event: Any) -> SiteDecision:
    """Do nothing: the sessions and the sum belong to the site alone and do not concern the server above."""
    return _stays(facts)


def _try_again(facts: SiteFacts, event: Tick) -> SiteDecision:
    """Send the sum up if a missing file has prevented this before."""
    found = _as_edge(facts, event)
    again = () if facts.sending else (SendMove(),)
    return SiteDecision(SiteState.GOING_UP, found.round, (*again, *found.actions))


def _counted(facts: SiteFacts, event: SumCounted) -> SiteDecision:
    """Begin again with a first round."""
    return SiteDecision(SiteState.FIRST_ROUND, facts.edge.round, (ForgetOwnRounds(),))


def _not_counted(facts: SiteFacts, event: SumRefused | MoveUnusable) -> SiteDecision:
    """Tell the server above that the sum's sessions will not report, and begin again with a first round."""
    assert facts.own is not None, "a sum of own rounds has gone up"
    return SiteDecision(SiteState.FIRST_ROUND, facts.edge.round, (SayEnded(facts.own.sessions), ForgetOwnRounds()))


def _end_all(facts: SiteFacts, event: AllWorkEnds) -> SiteDecision:
    """Tell the server above that the sessions of the unsent sum will not report, and forget the site's rounds."""
    assert facts.own is not None, "an own round comes after a first one"
    ended = (*given_back(facts.edge.unfetched), SayEnded(facts.own.sessions), ForgetOwnRounds())
    return SiteDecision(SiteState.FIRST_ROUND, facts.edge.round, ended)


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


_s = SiteState
_LATER = (_s.OWN_ROUND, _s.GOING_UP)
TABLE = (
    EventTable[SiteState, SiteFacts, SiteDecision](
        {(_s.FIRST_ROUND, event): Entry(_as_edge) for _, event in EDGE_TABLE}
    )
    .on((_s.FIRST_ROUND,), RoundClosed, _close_first, _s.OWN_ROUND, _s.GOING_UP)
    .on(_LATER, DeviceAsks, _asks)
    .on(_LATER, WorkArrived, _give_back)
    .on((_s.OWN_ROUND,), WorkFetched, _fetched)
    .on(_LATER, NoWorkAbove, _ignore)
    .on(_LATER, DeviceKeptOut, _ignore)
    .on(_LATER, SessionsDropped, _ignore)
    .on(_LATER, OtherWorkAsked, _forget_work)
    .on((_s.OWN_ROUND,), Tick, _as_edge)
    .on((_s.GOING_UP,), Tick, _try_again)
    .on((_s.OWN_ROUND,), RoundClosed, _close_own, _s.GOING_UP)
    .on((_s.GOING_UP,), RoundClosed, _cancel_unused)
    .on((_s.OWN_ROUND,), RoundAbandoned, _abandon_own, _s.GOING_UP)
    .on((_s.GOING_UP,), RoundAbandoned, _abandon_unused)
    .on((_s.GOING_UP,), SumCounted, _counted, _s.FIRST_ROUND)
    .on((_s.GOING_UP,), SumRefused, _not_counted, _s.FIRST_ROUND)
    .on((_s.GOING_UP,), MoveUnusable, _not_counted, _s.FIRST_ROUND)
    .on(_LATER, AllWorkEnds, _end_all, _s.FIRST_ROUND)
)
"""(state, event) → entry. In the first round, the edge's table must allow the event too."""


def decide(facts: SiteFacts, event: SiteEvent) -> SiteDecision:
    """Return the decision about an event: the site's new state, and the actions."""
    rule = TABLE.rule(state_of(facts.own), event)
    return _stays(facts) if rule is None else rule(facts, event)
