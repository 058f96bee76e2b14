"""The table of an edge's round: each rule by example; every move is in the table; the page is drawn from it."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sumus.pacing import Pacing
from sumus.protocol.edge import (
    ASKING,
    MOMENT,
    NOT_NOW,
    PICK_UP,
    TABLE,
    AdmitCheckIn,
    AllWorkEnds,
    CancelRound,
    ConsiderAgain,
    DeviceAsks,
    DeviceKeptOut,
    DropSessions,
    EdgeDecision,
    EdgeEvent,
    EdgeFacts,
    EdgeRound,
    EdgeState,
    KeepWork,
    LetTimePass,
    NoWorkAbove,
    OtherWorkAsked,
    PassCheckInOn,
    PublishRound,
    RemoveWork,
    RoundAbandoned,
    RoundClosed,
    SayEnded,
    SendDeviceAway,
    SendSum,
    SessionsDropped,
    StartRound,
    SumCounted,
    SumRefused,
    WaitingWork,
    WithdrawSum,
    WorkArrived,
    WorkFetched,
    decide,
    pacing_of,
    round_at,
    waited_for,
)
from sumus.protocol.round import ComeLater, DeviceRow, Facts, Round, Session, State, Tick

WAITING, GATHERING, FINISHING, GOING_UP, SETTLED = EdgeState
NOW = 1000.0
OPEN = Round(4, State.OPEN, since=900.0)
ROWS = {
    WAITING: OPEN,
    GATHERING: replace(OPEN, given=2),
    FINISHING: replace(OPEN, given=2),
    GOING_UP: Round(4, State.CLOSING, since=950.0, given=2, counted=2),
    SETTLED: Round(4, State.PUBLISHED, since=960.0, given=2, counted=2),
}
WORK = WaitingWork("d/s", "d", 7, NOW - 1.0)


def facts(state: EdgeState = GATHERING, **more: object) -> EdgeFacts:
    """What is known of a round in this state. Work came for it a second ago."""
    known = EdgeFacts(NOW, EdgeRound(state, NOW - 1.0), ROWS[state], most=10, devices=5, linger=20.0)
    return replace(known, **more)  # pyright: ignore[reportArgumentType]


def unfetched(*work: WaitingWork, state: EdgeState = GATHERING, **more: Any) -> EdgeFacts:
    return facts(state, waiting=len(work), unfetched=work, **more)


def known(serial: int = 6, state: str = "counted", **more: object) -> DeviceRow:
    """A device whose last session has this serial and state."""
    session = Session("d/r", "d", serial, 4, 0, 2000.0, state=state)
    return replace(DeviceRow("d", session), **more)  # pyright: ignore[reportArgumentType]


def asks(**more: object) -> DeviceAsks:
    return replace(DeviceAsks("d", 7, "d/s"), **more)  # pyright: ignore[reportArgumentType]


# ── check-ins ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", [WAITING, GATHERING, FINISHING])
def test_a_check_in_is_passed_on(state: EdgeState) -> None:
    assert decide(facts(state), asks()) == EdgeDecision(facts(state).round, (PassCheckInOn(),))


@pytest.mark.parametrize("state", [WAITING, GATHERING, FINISHING, GOING_UP])
def test_a_device_whose_work_has_come_down_fetches_it(state: EdgeState) -> None:
    found = decide(unfetched(WORK, state=state), asks(waiting=WORK))
    assert found.actions == (AdmitCheckIn(),)
    other = decide(unfetched(WORK, state=state), asks(waiting=WORK, mine=False))
    assert other.actions == (NOT_NOW,), "another run has it"


def test_work_that_came_too_late_is_removed_and_the_device_asks_anew() -> None:
    late = replace(WORK, session="d/r", serial=6)
    found = decide(unfetched(late, row=replace(OPEN, given=9)), asks(waiting=late))
    assert found.actions == (RemoveWork(("d",)), PassCheckInOn()), "and the place that it took in the sum is free"


@pytest.mark.parametrize(
    ("event", "more", "answer"),
    [
        (asks(known=known(serial=7)), {}, AdmitCheckIn()),
        (asks(known=known(rests_until=NOW + 9.0)), {}, ComeLater((9.0, 9.0 + ASKING[1]), "resting")),
        (asks(known=known()), {}, ComeLater(ASKING, "closed")),
        (asks(known=known(), over=True), {}, PassCheckInOn()),
        (asks(), {"row": replace(OPEN, given=10)}, ComeLater(ASKING, "full")),
        (asks(), {"row": replace(OPEN, given=10, dropped=1)}, PassCheckInOn()),
        (asks(known=known(state="out")), {"row": replace(OPEN, given=10)}, PassCheckInOn()),
        (asks(), {"waiting": 8}, ComeLater(ASKING, "full")),
    ],
    ids=["again", "resting", "counted", "counted before", "full", "one gave up", "has a place", "places wait"],
)
def test_a_check_in_is_answered_here_if_it_must_not_go_up(
    event: DeviceAsks, more: dict[str, Any], answer: object
) -> None:
    assert decide(facts(**more), event).actions == (answer,)


def test_while_the_sum_goes_up_nobody_is_passed_on() -> None:
    assert decide(facts(GOING_UP), asks()).actions == (ComeLater(ASKING, "closed"),)


# ── work ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_work_begins_the_round() -> None:
    found = decide(facts(WAITING), WorkArrived("d/s"))
    assert found == EdgeDecision(EdgeRound(GATHERING, NOW), (StartRound(), KeepWork()))
    planned = decide(facts(WAITING, row=Round(4)), WorkArrived("d/s"))
    assert planned == EdgeDecision(facts(WAITING).round, (SayEnded(("d/s",)),)), "a round that is held takes none"


@pytest.mark.parametrize("state", [GATHERING, FINISHING])
def test_more_work_for_the_same_sum_is_kept_as_far_as_the_sum_has_room(state: EdgeState) -> None:
    full = replace(EdgeRound(state, 1.0), full=True)
    found = decide(facts(state, round=full), WorkArrived("d/s", same=True))
    assert found == EdgeDecision(EdgeRound(GATHERING, NOW), (KeepWork(),)), "and more devices are awaited again"
    found = decide(facts(state, row=replace(OPEN, given=10)), WorkArrived("d/s", same=True))
    assert found.actions == (SayEnded(("d/s",)),)


def test_work_for_another_sum_ends_the_round_before_it_is_looked_at_again() -> None:
    event = WorkArrived("e/s", out=("a/1", "b/1"))
    found = decide(unfetched(WORK), event)
    assert (found.round.state, found.round.full) == (FINISHING, True)
    assert found.actions == (
        RemoveWork(("d",)), SayEnded(("d/s",)), SayEnded(("a/1", "b/1")), DropSessions(("a/1", "b/1")),
        LetTimePass(), ConsiderAgain(),
    )  # fmt: skip
    again = decide(facts(FINISHING), replace(event, again=True))
    assert again.actions == (SayEnded(("e/s",)),), "the round could not end at once"


@pytest.mark.parametrize("state", [WAITING, GATHERING, FINISHING, GOING_UP])
def test_work_that_was_fetched_already_changes_nothing(state: EdgeState) -> None:
    assert decide(facts(state), WorkArrived("d/s", fetched=True)) == EdgeDecision(facts(state).round)


def test_work_for_the_sum_that_goes_up_ends() -> None:
    assert decide(facts(GOING_UP), WorkArrived("d/s", same=True)).actions == (SayEnded(("d/s",)),)


def test_fetched_work_waits_no_longer_and_work_that_nobody_fetches_is_given_back() -> None:
    assert decide(unfetched(WORK), WorkFetched("d")).actions == (RemoveWork(("d",)),)
    old = replace(WORK, session="e/s", device="e", since=NOW - PICK_UP - 1.0)
    found = decide(unfetched(WORK, old), Tick())
    assert found.actions == (RemoveWork(("e",)), SayEnded(("e/s",), "other"))


def test_a_device_that_is_kept_out_gives_its_work_back_and_an_empty_round_ends() -> None:
    other = replace(WORK, session="e/s", device="e")
    empty: dict[str, Any] = {"row": replace(OPEN, given=2, dropped=2)}
    gone = (RemoveWork(("d",)), SayEnded(("d/s",)), SendDeviceAway("d"))
    assert decide(unfetched(WORK, **empty), DeviceKeptOut("d")).actions == (*gone, CancelRound())
    assert decide(unfetched(WORK, other, **empty), DeviceKeptOut("d")).actions == gone, "another device has work"
    assert decide(unfetched(WORK, lapsed=1, **empty), DeviceKeptOut("d")).actions == gone, "one may still report"
    assert decide(unfetched(WORK), DeviceKeptOut("d")).actions == gone, "two are at work"


def test_what_devices_give_up_is_said_and_forgotten_work_is_not_counted() -> None:
    assert decide(facts(), SessionsDropped(("d/s",), "data")).actions == (SayEnded(("d/s",), "data"),)
    assert decide(facts(), OtherWorkAsked(("d/s",))).actions == (DropSessions(("d/s",)),)


# ── how long a round waits ───────────────────────────────────────────────────────────────────────────────────────────


def after(seconds: float, state: EdgeState = GATHERING, **more: object) -> EdgeFacts:
    """So many seconds after work has come."""
    return facts(state, round=EdgeRound(state, NOW - seconds), **more)


def test_a_round_lingers_after_the_last_work_and_then_finishes() -> None:
    assert decide(after(19.0), Tick()).round.state is GATHERING
    assert decide(after(20.0), Tick()).round.state is FINISHING
    assert decide(after(99.0, row=replace(OPEN, given=2, dropped=2)), Tick()).round.state is GATHERING, "nobody is left"


@pytest.mark.parametrize("reason", ["full", "closed"])
def test_a_round_waits_for_nobody_once_the_server_above_has_no_more_work(reason: str) -> None:
    found = decide(facts(), NoWorkAbove(reason)).round
    assert (found.state, found.full) == (FINISHING, True)
    assert decide(facts(round=found), Tick()).round == found, "however short the time"
    assert decide(facts(), NoWorkAbove("separation")).round == facts().round


@pytest.mark.parametrize(
    ("known", "cohort"),
    [
        (facts(), 5),
        (facts(devices=50), 10),
        (facts(FINISHING), 2),
        (facts(FINISHING, waiting=1, lapsed=1), 4),
        (facts(FINISHING, row=replace(OPEN, given=2, dropped=2)), 1),
    ],
    ids=["gathering", "no more than the sum holds", "finishing", "one waits and one lapsed", "at least one"],
)
def test_a_round_closes_with_those_that_are_waited_for(known: EdgeFacts, cohort: int) -> None:
    assert pacing_of(known, Pacing(99)).cohort == cohort


def test_a_round_ends_in_time_and_at_once_if_nothing_can_come() -> None:
    assert pacing_of(facts(), Pacing(99)).deadline is None
    assert pacing_of(facts(ends=930.0), Pacing(99)).deadline == 30.0
    assert pacing_of(facts(ends=800.0), Pacing(99)).deadline == MOMENT
    assert pacing_of(facts(row=Round(4), ends=1030.0), Pacing(99)).deadline == 30.0, "it is about to open"
    nobody = replace(OPEN, given=2, dropped=2)
    assert pacing_of(facts(FINISHING, row=nobody, ends=2000.0), Pacing(99)).deadline == MOMENT
    for state in (WAITING, GOING_UP):
        assert pacing_of(facts(state, ends=930.0), Pacing(99)) == Pacing(99), "no work came, or the round has closed"


def test_who_lapsed_is_waited_for_as_long_as_the_work_may_take() -> None:
    lapsed = [Session(f"{n}/s", str(n), 1, 4, 0, 2000.0, state="lapsed", began=NOW - 100.0 * n) for n in (1, 2, 9)]
    below = Facts(Pacing(9, deadline=3600.0), NOW, OPEN, takes=60.0)
    assert waited_for(lapsed, below) == 3, "nobody has reported yet"
    assert waited_for(lapsed, replace(below, round=replace(OPEN, counted=1))) == 2, "four times 60 seconds"


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", [GATHERING, FINISHING, GOING_UP])
def test_a_closed_round_goes_up_without_those_that_have_not_reported(state: EdgeState) -> None:
    found = decide(unfetched(WORK, state=state), RoundClosed(out=("a/1",)))
    assert found.round.state is GOING_UP
    assert found.actions == (
        RemoveWork(("d",)), SayEnded(("d/s",)), SayEnded(("a/1",)), DropSessions(("a/1",)), SendSum(),
    )  # fmt: skip
    assert decide(facts(state), RoundClosed()).actions == (SendSum(),)


def test_a_closed_round_without_work_is_cancelled() -> None:
    assert decide(facts(WAITING), RoundClosed()).actions == (CancelRound(),)


def test_an_abandoned_round_ends_everything_that_came_down_for_it() -> None:
    found = decide(unfetched(WORK), RoundAbandoned(("a/1",), ("b/1",)))
    assert found.round.state is SETTLED
    assert found.actions == (
        RemoveWork(("d",)), SayEnded(("d/s",)), SayEnded(("a/1",), "other"), DropSessions(("a/1",)), SayEnded(("b/1",)),
    )  # fmt: skip
    assert decide(facts(GOING_UP), RoundAbandoned((), ("b/1",))).actions == (WithdrawSum(), SayEnded(("b/1",)))
    after_a_crash = decide(facts(SETTLED), RoundAbandoned(("a/1",), ("b/1",)))
    assert after_a_crash.actions == (SayEnded(("a/1",), "other"), DropSessions(("a/1",)))


def test_the_answer_about_the_sum_settles_the_round() -> None:
    assert decide(facts(GOING_UP), SumCounted()) == EdgeDecision(EdgeRound(SETTLED, NOW - 1.0), (PublishRound(),))
    refused = decide(facts(GOING_UP), SumRefused(("a/1", "b/1")))
    assert (refused.round.state, refused.actions) == (SETTLED, (SayEnded(("a/1", "b/1")), CancelRound()))


@pytest.mark.parametrize("state", [WAITING, GATHERING, FINISHING, GOING_UP])
def test_before_all_work_ends_what_waits_is_given_back(state: EdgeState) -> None:
    found = decide(unfetched(WORK, state=state), AllWorkEnds())
    assert found == EdgeDecision(facts(state).round, (RemoveWork(("d",)), SayEnded(("d/s",))))


@pytest.mark.parametrize(
    ("row", "has_work", "state"),
    [
        (OPEN, False, WAITING),
        (Round(4), False, WAITING),
        (OPEN, True, GATHERING),
        (Round(4, State.CLOSING), True, GOING_UP),
        (Round(4, State.CLOSING), False, WAITING),
        (Round(4, State.PUBLISHED), True, SETTLED),
        (Round(4, State.ABANDONED), False, SETTLED),
    ],
)
def test_after_a_crash_a_round_is_found_where_its_row_says(row: Round, has_work: bool, state: EdgeState) -> None:
    assert round_at(row, has_work, NOW).state is state
    assert round_at(OPEN, True, NOW).latest == NOW, "it lingers once more"


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────

EVENTS: tuple[EdgeEvent, ...] = (
    DeviceAsks("d", 7, "d/s"),
    WorkArrived("d/s"),
    WorkArrived("d/s", same=True),
    WorkFetched("d"),
    NoWorkAbove("full"),
    DeviceKeptOut("d"),
    SessionsDropped(("a/1",), "data"),
    OtherWorkAsked(("a/1",)),
    Tick(),
    RoundClosed(("a/1",)),
    RoundAbandoned(("a/1",)),
    SumCounted(),
    SumRefused(("a/1",)),
    AllWorkEnds(),
)


def test_every_move_is_in_the_table_and_every_move_of_the_table_is_made() -> None:
    rng = np.random.default_rng(0)
    made = {(state, event, to): False for (state, event), entry in TABLE.items() for to in entry.to}
    for state, event in itertools.product(EdgeState, EVENTS):
        for _ in range(40):
            given = int(rng.integers(0, 4))
            row = replace(ROWS[state], given=given, dropped=int(rng.integers(0, given + 1)), counted=0)
            round = EdgeRound(state, NOW - float(rng.choice([1.0, 100.0])), bool(rng.integers(2)))
            before = facts(state, row=row, round=round)
            to = decide(before, event).round.state
            if (state, type(event)) not in TABLE:
                assert decide(before, event) == EdgeDecision(round), "nothing happens"
            elif to is not state:
                assert (state, type(event), to) in made
                made[state, type(event), to] = True
    assert [move for move, yes in made.items() if not yes] == []


def test_whatever_a_device_or_the_server_above_says_is_decided_in_every_state_but_the_last() -> None:
    said = (DeviceAsks, WorkArrived, NoWorkAbove, SessionsDropped, OtherWorkAsked, DeviceKeptOut, RoundAbandoned, Tick)
    for state, event in itertools.product((WAITING, GATHERING, FINISHING, GOING_UP), said):
        assert (state, event) in TABLE
    assert {type(event) for event in EVENTS} == {event for _, event in TABLE}, "and each event is in the table"


def test_a_settled_round_stays_settled() -> None:
    for event in EVENTS:
        assert decide(facts(SETTLED), event).round.state is SETTLED


def test_each_piece_of_waiting_work_that_is_removed_unfetched_is_said_to_have_ended() -> None:
    """Or its own device asks for it, or asks anew: then the server above ends the earlier session itself."""
    for state, event in itertools.product(EdgeState, EVENTS):
        found = decide(unfetched(WORK, state=state, round=EdgeRound(state, NOW - 99.0)), event)
        removed = [action for action in found.actions if isinstance(action, RemoveWork)]
        ended = [action.sessions for action in found.actions if isinstance(action, SayEnded)]
        if removed and not isinstance(event, WorkFetched | DeviceAsks):
            assert removed == [RemoveWork(("d",))]
            assert ended.count(("d/s",)) == 1
