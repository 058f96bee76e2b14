"""The table of a site's rounds: each rule by example; every move is in the table."""

import itertools
from dataclasses import replace

import pytest

from sumus.protocol import edge
from sumus.protocol.edge import (
    ASKING,
    AdmitCheckIn,
    AllWorkEnds,
    CancelRound,
    DeviceAsks,
    DeviceKeptOut,
    DropSessions,
    EdgeFacts,
    EdgeRound,
    EdgeState,
    NoWorkAbove,
    OtherWorkAsked,
    RemoveWork,
    RoundAbandoned,
    RoundClosed,
    SayEnded,
    SendSum,
    SessionsDropped,
    SumCounted,
    SumRefused,
    WaitingWork,
    WorkArrived,
    WorkFetched,
)
from sumus.protocol.round import ComeLater, DeviceRow, Round, Session, State, Tick
from sumus.protocol.site import (
    TABLE,
    EndOwnRounds,
    ForgetOwnRounds,
    MoveModel,
    MoveUnusable,
    OwnRounds,
    SendMove,
    SiteEvent,
    SiteFacts,
    SiteState,
    decide,
    state_of,
)

FIRST, OWN, GOING_UP = SiteState
NOW = 1000.0
ROUNDS, LEAST = 3, 2
HELD = ("a/1", "b/1", "c/1")
"""The sessions of the server above that the sum will stand for."""
STANDS: dict[SiteState, OwnRounds | None] = {
    FIRST: None,
    OWN: OwnRounds(HELD, done=1, last=3),
    GOING_UP: OwnRounds(HELD, done=3, last=3, over=True),
}
OPEN = Round(4, State.OPEN, since=900.0, given=2)


def facts(state: SiteState, of: EdgeState = EdgeState.GATHERING, **more: object) -> SiteFacts:
    """What is known of a site in this state, in round 4. Keywords are those of the edge's facts."""
    known = EdgeFacts(NOW, EdgeRound(of, NOW - 1.0), OPEN, most=10, devices=3, linger=20.0)
    return SiteFacts(replace(known, **more), STANDS[state], ROUNDS, LEAST)  # pyright: ignore[reportArgumentType]


def last(device: str = "a", serial: int = 6, state: str = "counted", round: int = 3) -> DeviceRow:
    return DeviceRow(device, Session(f"{device}/r", device, serial, round, 0, 2000.0, state=state))


# ── the first round ──────────────────────────────────────────────────────────────────────────────────────────────────

EDGE_EVENTS: tuple[SiteEvent, ...] = (
    DeviceAsks("d", 7, "d/s"),
    WorkArrived("d/s", same=True),
    WorkFetched("d"),
    NoWorkAbove("full"),
    DeviceKeptOut("d"),
    SessionsDropped(("d/s",), "data"),
    OtherWorkAsked(("d/s",)),
    Tick(),
    RoundAbandoned(("d/s",)),
    SumCounted(),
    SumRefused(("d/s",)),
    AllWorkEnds(),
)


@pytest.mark.parametrize(
    "event", [*EDGE_EVENTS, RoundClosed(("d/s",), LEAST - 1)], ids=lambda event: type(event).__name__
)
def test_the_first_round_is_an_edges(event: SiteEvent) -> None:
    for of in EdgeState:
        found, known = decide(facts(FIRST, of), event), facts(FIRST, of).edge
        assert not isinstance(event, MoveUnusable)
        assert (found.round, found.actions) == (edge.decide(known, event).round, edge.decide(known, event).actions)
        assert found.state is FIRST


def test_the_first_round_moves_the_model_and_the_others_sessions_end() -> None:
    work = WaitingWork("e/1", "e", 1, NOW)
    found = decide(facts(FIRST, unfetched=(work,)), RoundClosed(("d/1",), LEAST))
    given_back = (RemoveWork(("e",)), SayEnded(("e/1",)))
    assert found.actions == (*given_back, MoveModel((SayEnded(("d/1",)), DropSessions(("d/1",)))))
    assert found.state is OWN


def test_if_only_one_round_is_asked_for_the_move_goes_up_at_once() -> None:
    found = decide(replace(facts(FIRST), rounds=1), RoundClosed((), LEAST))
    assert (found.state, found.actions) == (GOING_UP, (MoveModel((SendMove(),)),))


# ── own rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_own_round_moves_the_model_and_nothing_is_said_above() -> None:
    found = decide(facts(OWN), RoundClosed(("d/1",), LEAST))
    assert (found.state, found.actions) == (OWN, (MoveModel((DropSessions(("d/1",)),)),))
    known = facts(OWN)
    assert known.own is not None
    second = replace(known, own=replace(known.own, done=2))
    found = decide(second, RoundClosed((), LEAST))
    assert (found.state, found.actions) == (GOING_UP, (MoveModel((SendMove(),)),))


def test_an_own_round_of_too_few_is_cancelled_and_then_the_sum_is_of_the_rounds_before() -> None:
    found = decide(facts(OWN), RoundClosed((), LEAST - 1))
    assert (found.state, found.actions) == (OWN, (CancelRound(),))
    found = decide(facts(OWN), RoundAbandoned(("d/1",), ("a/9",)))
    assert (found.state, found.actions) == (GOING_UP, (DropSessions(("d/1",)), EndOwnRounds(), SendMove()))


def test_a_round_that_was_abandoned_before_ends_nothing_when_it_is_named_again() -> None:
    before = facts(OWN, row=Round(2, State.ABANDONED))
    assert decide(before, RoundAbandoned()).state is OWN
    assert decide(before, RoundAbandoned()).actions == ()


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (DeviceAsks("a", 7, "a/2", last()), AdmitCheckIn()),
        (DeviceAsks("a", 7, "a/2", last(state="out", round=4)), AdmitCheckIn()),
        (DeviceAsks("a", 7, "a/2", last(round=4)), ComeLater(ASKING, "closed")),
        (DeviceAsks("a", 6, "a/r", last(round=4)), AdmitCheckIn()),
        (DeviceAsks("d", 7, "d/2"), ComeLater(ASKING, "closed")),
    ],
    ids=["of the first round", "has work", "has reported", "the same check-in again", "was not in the first round"],
)
def test_each_device_of_the_first_round_is_once_in_an_own_round(asked: DeviceAsks, answer: object) -> None:
    assert decide(facts(OWN), asked).actions == (answer,)


def test_a_device_that_fetches_work_makes_the_round_linger_for_others() -> None:
    found = decide(facts(OWN), WorkFetched("a"))
    assert (found.round.latest, found.actions) == (NOW, ())
    late = facts(OWN, round=EdgeRound(EdgeState.GATHERING, NOW - 30.0))
    assert decide(late, Tick()).round.state is EdgeState.FINISHING, "as an edge's round does"


@pytest.mark.parametrize("state", [OWN, GOING_UP])
def test_what_concerns_the_server_above_is_nothing_to_an_own_round(state: SiteState) -> None:
    for event in (NoWorkAbove("full"), DeviceKeptOut("d"), SessionsDropped(("d/s",), "data")):
        found = decide(facts(state), event)
        assert (found.state, found.round, found.actions) == (state, facts(state).edge.round, ())
    assert decide(facts(state), WorkArrived("d/s")).actions == (SayEnded(("d/s",)),)
    assert decide(facts(state), WorkArrived("d/s", fetched=True)).actions == ()
    assert decide(facts(state), OtherWorkAsked(("d/s",))).actions == (DropSessions(("d/s",)),)


# ── its sum ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_while_the_sum_goes_up_nobody_gets_work() -> None:
    assert decide(facts(GOING_UP), DeviceAsks("a", 7, "a/2", last())).actions == (ComeLater(ASKING, "closed"),)
    assert decide(facts(GOING_UP), RoundClosed()).actions == (CancelRound(),)
    assert decide(facts(GOING_UP), RoundAbandoned(("d/1",))).actions == (DropSessions(("d/1",)),)


def test_a_sum_that_could_not_go_up_is_tried_again() -> None:
    assert decide(facts(GOING_UP, EdgeState.WAITING), Tick()).actions == (SendMove(),)
    assert decide(replace(facts(GOING_UP, EdgeState.WAITING), sending=True), Tick()).actions == ()


def test_after_the_answer_the_site_begins_again() -> None:
    counted = decide(facts(GOING_UP), SumCounted())
    assert (counted.state, counted.actions) == (FIRST, (ForgetOwnRounds(),))


@pytest.mark.parametrize("event", [SumRefused(("a/9",)), MoveUnusable()])
def test_a_sum_that_is_not_counted_ends_the_sessions_that_it_stood_for(event: SiteEvent) -> None:
    found = decide(facts(GOING_UP), event)
    assert (found.state, found.actions) == (FIRST, (SayEnded(HELD), ForgetOwnRounds()))


@pytest.mark.parametrize("state", [OWN, GOING_UP])
def test_before_all_work_ends_the_sessions_of_the_sum_end(state: SiteState) -> None:
    found = decide(facts(state), AllWorkEnds())
    assert (found.state, found.actions) == (FIRST, (SayEnded(HELD), ForgetOwnRounds()))


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────

ALL = (*EDGE_EVENTS, RoundClosed((), LEAST), RoundClosed((), LEAST - 1), MoveUnusable())


def test_every_move_is_in_the_table_and_every_move_of_the_table_is_made() -> None:
    made = {(state, event, to): False for (state, event), entry in TABLE.items() for to in entry.to}
    for state, event, of, rounds in itertools.product(SiteState, ALL, EdgeState, (1, 2, 9)):
        before = replace(facts(state, of), rounds=rounds)
        to = decide(before, event).state
        if (state, type(event)) not in TABLE:
            assert (to, decide(before, event).actions) == (state, ()), "nothing happens"
        elif to is not state:
            assert (state, type(event), to) in made
            made[state, type(event), to] = True
    assert [move for move, yes in made.items() if not yes] == []


def test_the_state_after_a_decision_is_what_its_actions_lead_to() -> None:
    """The state is never kept: it is read off the note, which these actions write."""
    for state, event, of, rounds in itertools.product(SiteState, ALL, EdgeState, (1, 2, 9)):
        before = replace(facts(state, of), rounds=rounds)
        found, own = decide(before, event), before.own
        for action in found.actions:
            if isinstance(action, MoveModel):
                done = 1 if own is None else own.done + 1
                own = OwnRounds(HELD, done, last=4, over=done >= rounds)
            elif isinstance(action, EndOwnRounds):
                assert own is not None
                own = replace(own, over=True)
            elif isinstance(action, ForgetOwnRounds):
                own = None
        assert state_of(own) is found.state


def test_the_sessions_of_a_sum_end_once() -> None:
    """Whatever leads back to a first round says of them that they have ended, or that the sum was counted."""
    for state, event, of in itertools.product((OWN, GOING_UP), ALL, EdgeState):
        found = decide(facts(state, of), event)
        ended = [action for action in found.actions if isinstance(action, SayEnded) and action.sessions == HELD]
        assert len(ended) == (found.state is FIRST and not isinstance(event, SumCounted))
        assert not any(isinstance(action, SendSum) for action in found.actions), "the rounds' own sums never go up"
