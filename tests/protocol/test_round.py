"""The round's table: each rule by example, and the table, the code and the page say the same."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sumus.pacing import Conditions, Pacing
from sumus.protocol import round as protocol
from sumus.protocol.round import (
    ORDER,
    TABLE,
    AbandonRound,
    AcceptReport,
    AssignWork,
    CheckIn,
    CloseRound,
    ComeLater,
    Commit,
    DeviceRow,
    Dropped,
    Facts,
    Overdue,
    Published,
    Recovered,
    RefuseReport,
    Report,
    Round,
    Session,
    SettleSession,
    StageReport,
    State,
    Tick,
    decide,
    learnt,
    patience,
    rested,
)
from sumus.protocol.rows import changed

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
import draw_protocol

SYNCHRONOUS = Pacing(cohort=2, over_select=1.5, deadline=60)
BUFFERED = Pacing(cohort=2, concurrency=3, most_stale=2)
OPEN = Round(4, State.OPEN, since=100.0)
MANY = 10


def facts(pacing: Pacing = SYNCHRONOUS, row: Round = OPEN, **more: object) -> Facts:
    return replace(Facts(pacing, 110.0, row, version=4, device=DeviceRow("d"), population=MANY), **more)  # pyright: ignore[reportArgumentType]


def out(name: str, round: int = 4, version: int = 4, **more: object) -> Session:
    return replace(Session(name, f"device of {name}", 1, round, version, 160.0), **more)  # pyright: ignore[reportArgumentType]


# ── check-ins ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_device_gets_work_that_ends_with_the_round() -> None:
    found = decide(facts(), CheckIn("s", 1))
    assert found.rounds == (replace(OPEN, given=1),)
    assert found.sessions == (Session("s", "d", 1, 4, 4, expires=160.0, began=110.0),)
    assert found.actions == (AssignWork(found.sessions[0]),)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"row": replace(OPEN, given=3)}, "full"),
        ({"row": Round(4, State.PLANNED)}, "closed"),
        ({"row": Round(4, State.CLOSING)}, "closed"),
        ({"paused": True}, "paused"),
        ({"device": DeviceRow("d", lapses=1, rests_until=115.0)}, "resting"),
        ({"pacing": replace(SYNCHRONOUS, separation=3), "device": DeviceRow("d", last_sum=2)}, "separation"),
        (
            {"pacing": replace(SYNCHRONOUS, separation=3), "device": DeviceRow("d", last_sum=0, models=1), "models": 2},
            "separation",
        ),
        ({"pacing": replace(SYNCHRONOUS, most_rounds=2), "device": DeviceRow("d", last_sum=0, times_counted=2)}, "cap"),
        ({"pacing": replace(SYNCHRONOUS, requires=Conditions(charging=True))}, "charging"),
        ({"pacing": replace(SYNCHRONOUS, requires=Conditions(version=7))}, "version"),
    ],
)
def test_a_device_that_gets_no_work_is_told_when_to_come_back(changes: dict[str, object], reason: str) -> None:
    found = decide(facts(**changes), CheckIn("s", 1, Conditions(version=6)))  # pyright: ignore[reportArgumentType]
    assert (found.rounds, found.sessions) == ((), ())
    (later,) = found.actions
    assert isinstance(later, ComeLater)
    assert later.reason == reason
    assert 0 <= later.window[0] < later.window[1]


def test_the_same_check_in_again_gets_the_same_answer_and_an_older_one_none() -> None:
    known = facts(device=DeviceRow("d", session=out("s", device="d")), row=replace(OPEN, given=1))
    assert decide(known, CheckIn("s", 1)).actions == (AssignWork(out("s", device="d")),)
    assert decide(known, CheckIn("r", 0)) == protocol.NOTHING
    asked = replace(known, device=DeviceRow("d", session=out("s", device="d"), last_counted="q"))
    assert decide(asked, CheckIn("s", 1, previous="q")).actions == (
        SettleSession("q", "counted"),
        AssignWork(out("s", device="d")),
    )


def test_what_a_device_does_not_know_the_end_of_is_settled_first() -> None:
    before = out("s", round=3)
    ended = facts(device=DeviceRow("d", session=before))
    assert decide(ended, CheckIn("t", 2, previous="s")).actions[0] == SettleSession("s", "discarded")
    counted = replace(before, state="counted", sum=3)
    assert decide(facts(device=DeviceRow("d", last_sum=3, session=counted)), CheckIn("t", 2, previous="s")).actions[
        0
    ] == SettleSession("s", "counted")
    running = facts(device=DeviceRow("d", session=out("s")), row=replace(OPEN, given=1))
    assert decide(running, CheckIn("t", 2, previous="s")) == protocol.Decision(actions=(SettleSession("s", "unknown"),))
    assert decide(facts(), CheckIn("t", 2, previous="never given")).actions[0] == SettleSession(
        "never given", "discarded"
    )


@pytest.mark.parametrize("pacing", [SYNCHRONOUS, BUFFERED], ids=["synchronous", "buffered"])
def test_a_device_that_forgot_its_session_asks_for_another_in_its_place(pacing: Pacing) -> None:
    before = out("s", device="d")
    found = decide(facts(pacing, replace(OPEN, given=3), device=DeviceRow("d", session=before)), CheckIn("t", 2))
    assert found.rounds[0] == replace(OPEN, given=3)
    assert found.sessions[1].began == before.began, "it holds the place no longer for that"
    assert [(one.id, one.state) for one in found.sessions] == [("s", "dropped"), ("t", "out")]
    assert isinstance(found.actions[0], AssignWork)


def test_a_lost_answer_takes_nobody_elses_place() -> None:
    pacing = replace(SYNCHRONOUS, over_select=1.0)
    row = decide(facts(pacing, OPEN), CheckIn("a1", 1)).rounds[0]
    again = decide(facts(pacing, row, device=DeviceRow("d", session=out("a1", device="d"))), CheckIn("a2", 2)).rounds[0]
    assert isinstance(decide(facts(pacing, again, device=DeviceRow("e")), CheckIn("e1", 1)).actions[0], AssignWork)


def test_no_work_is_given_when_a_round_is_over() -> None:
    late = replace(facts(row=replace(OPEN, given=2, counted=2)), now=161.0)
    found = decide(replace(late, pacing=replace(SYNCHRONOUS, cohort=4, least=0.5)), CheckIn("s", 1))
    assert [each.state for each in found.rounds] == [State.CLOSING]
    assert [type(action) for action in found.actions] == [ComeLater, CloseRound]
    assert found.sessions == ()


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────────

TEN = Pacing(cohort=10, deadline=3600)
FULL = replace(OPEN, given=10, counted=9)


def silent(**more: object) -> Session:
    """The session of a device that says nothing; it has its place since the round opened."""
    return out("s", device="d", expires=3700.0, began=100.0, **more)  # pyright: ignore[reportArgumentType]


def after(seconds: float, row: Round = FULL, pacing: Pacing = TEN, takes: float = 20.0, **more: object) -> Facts:
    """So many seconds after the round opened."""
    values: dict[str, object] = {"population": 20, "takes": takes, **more}
    return replace(facts(pacing, row), now=100.0 + seconds, **values)  # pyright: ignore[reportArgumentType]


def test_a_session_that_says_nothing_lets_its_place_go_to_the_next_device_that_asks() -> None:
    assert decide(after(79.0, sessions=(silent(),)), Overdue()) == protocol.NOTHING
    found = decide(after(80.0, sessions=(silent(),)), Overdue())
    assert [(one.state, one.reason) for one in found.sessions] == [("lapsed", "")]
    assert (found.rounds, found.lapses) == ((replace(FULL, dropped=1),), ("s",))
    asks = decide(after(81.0, found.rounds[0], device=DeviceRow("e")), CheckIn("e1", 1))
    assert isinstance(asks.actions[0], AssignWork)
    assert asks.rounds == (replace(FULL, given=11, dropped=1),)
    full = decide(after(82.0, asks.rounds[0], device=DeviceRow("f")), CheckIn("f1", 1))
    assert isinstance(full.actions[0], ComeLater), "one place is given away once"


@pytest.mark.parametrize(
    ("deadline", "takes", "seconds"),
    [(3600, 0.0, 900.0), (3600, 20.0, 80.0), (3600, 1.0, 60.0), (3600, 2000.0, 3600), (60, 1.0, 15.0), (60, 0.0, 15.0)],
)
def test_a_place_is_held_for_a_multiple_of_what_work_takes(deadline: float, takes: float, seconds: float) -> None:
    assert patience(Pacing(10, deadline=deadline), takes) == seconds
    assert patience(Pacing(10), takes) == float("inf"), "without a deadline nothing is timed"


def test_what_an_edge_is_given_is_measured_by_what_edges_take() -> None:
    relayed = silent(parent="edge")
    slow = after(100.0, sessions=(relayed,), takes_by_edge=100.0)
    assert decide(slow, Overdue()) == protocol.NOTHING
    assert decide(replace(slow, takes_by_edge=10.0), Overdue()).lapses == ("s",)


def test_the_time_without_a_leader_is_nobodys_silence() -> None:
    late = after(1000.0, sessions=(silent(),), led=1050.0)
    assert decide(late, Overdue()) == protocol.NOTHING
    assert decide(replace(late, now=1130.0), Overdue()).lapses == ("s",)


def test_a_late_report_counts_while_there_is_room_and_once() -> None:
    row = replace(FULL, given=11, dropped=1)
    late = after(90.0, row, sessions=(silent(state="lapsed"),))
    assert decide(late, Report()).actions == (StageReport("s"),)
    found = decide(late, Commit())
    assert found.actions == (AcceptReport("s"), CloseRound(4))
    assert found.rounds[0] == Round(4, State.CLOSING, 190.0, given=11, dropped=0, counted=10)
    over = replace(late, round=found.rounds[0], sessions=found.sessions)
    assert decide(over, Report()).actions == (AcceptReport("s"),), "it is told again, and not counted again"


def test_a_late_report_to_a_round_that_is_full_is_refused() -> None:
    late = after(90.0, Round(4, State.CLOSING, 185.0, given=11, dropped=1, counted=10))
    assert decide(replace(late, sessions=(silent(state="lapsed"),)), Report()).actions == (RefuseReport("s", "closed"),)
    both = (out("e", expires=3700.0), silent(state="lapsed"))
    found = decide(after(90.0, replace(FULL, given=11, dropped=1), sessions=both), Commit())
    assert found.actions == (AcceptReport("e"), RefuseReport("s", "closed"), CloseRound(4))


@pytest.mark.parametrize("reason", ["withdrawn", "revoked", "data", "bad_report", "closed"])
def test_a_place_that_is_given_up_is_given_away_at_once(reason: str) -> None:
    found = decide(after(40.0, replace(FULL, counted=5), sessions=(silent(),)), Dropped(reason))
    assert (found.rounds[0].out, found.rounds[0].counted) == (4, 5), "no report is lost by it"
    assert isinstance(
        decide(after(40.0, found.rounds[0], device=DeviceRow("e")), CheckIn("e", 1)).actions[0], AssignWork
    )
    assert found.lapses == (("s",) if reason in ("data", "bad_report") else ())


def test_who_sends_what_cannot_be_counted_loses_its_place_and_may_mend_it() -> None:
    found = decide(after(1.0, replace(FULL, counted=5), sessions=(silent(),)), Overdue(spoilt=True))
    assert ([one.state for one in found.sessions], found.lapses, found.rounds[0].out) == (["lapsed"], ("s",), 4)
    again = after(2.0, found.rounds[0], sessions=found.sessions)
    assert decide(again, Overdue(spoilt=True)) == protocol.NOTHING, "once"
    assert decide(again, Commit()).actions == (AcceptReport("s"),), "while there is room"


def test_a_place_that_lapsed_is_not_given_up_once_more() -> None:
    row = replace(FULL, dropped=1)
    found = decide(after(90.0, row, sessions=(silent(state="lapsed"),)), Dropped("data"))
    assert (found.rounds, found.lapses) == ((), ())
    assert [one.state for one in found.sessions] == ["dropped"]


def test_a_buffer_gives_a_silent_devices_slot_to_another() -> None:
    pacing, row = replace(BUFFERED, deadline=3600), replace(OPEN, given=3)
    found = decide(after(80.0, row, pacing, sessions=(silent(),)), Overdue())
    assert found.rounds[0].out == 2
    assert isinstance(
        decide(after(80.0, found.rounds[0], pacing, device=DeviceRow("e")), CheckIn("e", 1)).actions[0], AssignWork
    )
    counted = decide(
        after(90.0, Round(5, State.OPEN, 185.0, given=3), pacing, sessions=(silent(state="lapsed"),)), Commit()
    )
    assert (counted.actions, counted.rounds[0].out) == ((AcceptReport("s"),), 3), "it takes nobody's slot"


def test_who_lets_places_go_rests_longer_each_time_up_to_a_day() -> None:
    device, rests = DeviceRow("d"), list[float]()
    for _ in range(13):
        device = rested(device, silent(), after(80.0))
        rests.append(device.rests_until - 180.0)
    assert rests == [min(80.0 * 2**n, 86400.0) for n in range(13)]
    assert rested(DeviceRow("d"), silent(), after(2.0)).rests_until == 104.0, "as long as it held the place"


def test_who_forgets_its_work_and_gets_no_other_lets_its_place_go() -> None:
    asked = after(
        50.0, pacing=replace(TEN, requires=Conditions(charging=True)), device=DeviceRow("d", session=silent())
    )
    found = decide(asked, CheckIn("t", 2))
    assert (found.rounds, found.lapses) == ((replace(FULL, dropped=1),), ("s",))


def test_what_work_takes_is_what_three_of_four_reports_do_not_exceed() -> None:
    rng, takes = np.random.default_rng(0), 0.0
    seconds = 10.0 ** rng.uniform(0, 2, 4000)  # speeds of 1:100
    found = [takes := learnt(takes, each) for each in seconds.tolist()]
    assert np.median(found[1000:]) == pytest.approx(np.quantile(seconds, 0.75), rel=0.2)
    assert min(4 * each for each in found[100:]) > 20.0
    takes = 1.0
    for _ in range(20):
        takes = learnt(takes, 100.0)
    assert takes > 75.0, "a limit that is too tight adapts"


def test_a_device_is_given_to_a_round_once_however_often_it_comes() -> None:
    """Else who takes a place and gives it up again and again would make it seem that everybody had been asked."""
    row, device = replace(OPEN, given=3, counted=2), DeviceRow("d")
    dropped = protocol.NOTHING
    for serial in range(1, 9):
        given = decide(after(10.0, row, device=device), CheckIn(f"s{serial}", serial))
        dropped = decide(after(10.0, given.rounds[0], sessions=given.sessions[-1:]), Dropped("data"))
        row, device = dropped.rounds[0], DeviceRow("d", session=dropped.sessions[0])
    assert row == replace(OPEN, given=4, dropped=1, counted=2)


def test_a_population_smaller_than_the_chosen_is_given_what_there_is() -> None:
    row = replace(OPEN, given=2, counted=1)
    found = decide(facts(row=row, population=2, sessions=(out("s"),), takes=1.0), Dropped("data"))
    assert [each.state for each in found.rounds] == [State.OPEN], "it may come again"
    later = replace(facts(row=found.rounds[0], population=2, takes=1.0), now=115.0)
    assert [each.state for each in decide(later, Tick()).rounds] == [State.CLOSING]
    assert decide(replace(later, pacing=replace(SYNCHRONOUS, least=1.0)), Tick()) == protocol.NOTHING


# ── reports ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_report_is_staged_and_nothing_is_promised() -> None:
    assert decide(facts(sessions=(out("s"),)), Report()) == protocol.Decision(actions=(StageReport("s"),))


@pytest.mark.parametrize(
    ("session", "action"),
    [
        (out("s", state="counted", sum=4), AcceptReport("s")),
        (out("s", state="dropped", reason="expired"), RefuseReport("s", "expired")),
        (out("s", round=3), RefuseReport("s", "closed")),
        (out("s", expires=105.0), RefuseReport("s", "expired")),
    ],
    ids=["counted already", "dropped", "of a round before", "late"],
)
def test_a_report_that_is_settled_is_answered_at_once(session: Session, action: object) -> None:
    assert decide(facts(sessions=(session,)), Report()).actions == (action,)


def test_a_report_that_is_too_stale_is_refused_and_makes_room() -> None:
    stale = out("s", round=1, version=1)
    found = decide(facts(BUFFERED, replace(OPEN, given=3), sessions=(stale,)), Report())
    assert found.actions == (RefuseReport("s", "stale"),)
    assert found.rounds[0].out == 2
    assert found.sessions[0].reason == "stale"


def test_a_commit_accepts_up_to_the_cohort_and_closes() -> None:
    staged = (out("a"), out("b"), out("c"))
    found = decide(facts(row=replace(OPEN, given=3), sessions=staged), Commit())
    assert found.actions == (AcceptReport("a"), AcceptReport("b"), RefuseReport("c", "closed"), CloseRound(4))
    assert [(one.id, one.state, one.sum) for one in found.sessions] == [
        ("a", "counted", 4), ("b", "counted", 4), ("c", "late", None),
    ]  # fmt: skip
    assert found.rounds == (Round(4, State.CLOSING, 110.0, given=3, dropped=1, counted=2),)


def test_a_buffer_keeps_what_is_left_for_the_next_one_which_is_open_at_once() -> None:
    staged = (out("a", version=2), out("b", version=4), out("c", version=4))
    found = decide(facts(BUFFERED, replace(OPEN, given=3), sessions=staged), Commit())
    assert found.actions == (AcceptReport("a"), AcceptReport("b"), StageReport("c"), CloseRound(4))
    assert [one.staleness for one in found.sessions] == [2, 0]
    assert found.rounds == (
        Round(4, State.CLOSING, 110.0, given=3, counted=2),
        Round(5, State.OPEN, 110.0, given=1),
    )


def test_nothing_is_counted_after_the_close() -> None:
    found = decide(facts(row=Round(4, State.CLOSING, 105.0, given=3, counted=2), sessions=(out("c"),)), Commit())
    assert found.actions == (RefuseReport("c", "closed"),)
    assert [(one.id, one.state) for one in found.sessions] == [("c", "late")]


def test_a_report_that_grew_stale_while_it_waited_is_not_counted() -> None:
    staged = (out("a", version=1), out("b", version=4))
    found = decide(facts(BUFFERED, replace(OPEN, given=3), sessions=staged, version=4), Commit())
    assert found.actions == (RefuseReport("a", "stale"), AcceptReport("b"))
    assert found.rounds[0].out == 1


def test_what_is_refused_stays_refused_whatever_the_clock_does() -> None:
    late = facts(BUFFERED, replace(OPEN, given=3), sessions=(out("s", expires=105.0),))
    found = decide(late, Report())
    assert found.actions == (RefuseReport("s", "expired"),)
    assert found.rounds[0].out == 2
    assert decide(replace(late, now=100.0, sessions=found.sessions), Report()).actions == (
        RefuseReport("s", "expired"),
    )


def test_a_report_of_a_session_that_nobody_knows_changes_nothing() -> None:
    assert decide(facts(), Report()) == protocol.NOTHING


def test_models_are_published_in_order() -> None:
    closing = Round(5, State.CLOSING, 105.0, counted=2)
    assert decide(facts(BUFFERED, closing, waits=True), Published()) == protocol.NOTHING
    assert decide(facts(BUFFERED, closing), Published()).rounds[0].state is State.PUBLISHED


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_at_the_deadline_a_round_is_closed_with_enough_and_abandoned_without() -> None:
    late = replace(facts(replace(SYNCHRONOUS, least=0.5), replace(OPEN, given=3, counted=1)), now=160.0)
    assert decide(late, Tick()).actions == (CloseRound(4),)
    strict = replace(late, pacing=replace(SYNCHRONOUS, least=1.0))
    found = decide(strict, Tick())
    assert found.actions == (AbandonRound(4, "too few"),)
    assert [each.state for each in found.rounds] == [State.ABANDONED, State.PLANNED]
    assert decide(replace(late, now=159.0), Tick()) == protocol.NOTHING


def test_without_a_deadline_a_round_is_over_when_everyone_who_was_chosen_has_ended() -> None:
    pacing, row = replace(SYNCHRONOUS, deadline=None), replace(OPEN, given=3, dropped=1, counted=1)
    found = decide(facts(pacing, row, sessions=(out("s"),)), Dropped("lost"))
    assert (found.actions, found.lapses) == ((CloseRound(4),), ())
    assert decide(facts(pacing, replace(row, dropped=0), sessions=(out("s"),)), Dropped("lost")).actions == ()
    full = decide(facts(pacing, replace(row, dropped=0), device=DeviceRow("e")), CheckIn("e", 1))
    assert isinstance(full.actions[0], ComeLater), "nobody is replaced"


def test_publishing_opens_the_next_round_once() -> None:
    closing = Round(4, State.CLOSING, 105.0, counted=2)
    found = decide(facts(row=closing), Published())
    assert [(each.number, each.state) for each in found.rounds] == [(4, State.PUBLISHED), (5, State.PLANNED)]
    assert decide(facts(row=found.rounds[0]), Published()) == protocol.NOTHING
    assert decide(facts(row=found.rounds[1]), Tick()).rounds[0].state is State.OPEN
    assert decide(facts(row=found.rounds[1], paused=True), Tick()) == protocol.NOTHING


def test_a_new_leader_fences_out_the_old_one_and_finishes_what_it_left() -> None:
    closing = Round(4, State.CLOSING, 105.0, fence=1, counted=2)
    found = decide(facts(row=closing), Recovered(fence=2))
    assert found.rounds == (replace(closing, fence=2),)
    assert found.actions == (CloseRound(4),)
    abandoned = Round(4, State.ABANDONED, reason="too few")
    assert decide(facts(row=abandoned), Recovered(2)).actions == (AbandonRound(4, "too few"),), (
        "it may not be destroyed yet"
    )
    assert decide(facts(row=replace(closing, fence=3)), Recovered(2)) == protocol.NOTHING, "it was fenced out itself"


def test_a_report_of_a_round_that_is_not_open_yet_is_refused() -> None:
    early = facts(row=Round(4, State.PLANNED), sessions=(out("s"),))
    assert decide(early, Report()).actions == (RefuseReport("s", "phase"),)


def test_a_round_that_waits_for_its_model_waits_however_long_that_takes() -> None:
    closing = Round(4, State.CLOSING, 105.0, counted=2)
    assert decide(replace(facts(row=closing), now=1e9), Tick()) == protocol.NOTHING


def test_without_a_deadline_a_round_ends_when_nobody_is_waited_for() -> None:
    pacing = replace(SYNCHRONOUS, deadline=None, least=0.5)
    few = facts(pacing, replace(OPEN, given=3, dropped=1, counted=1), sessions=(out("s"),))
    assert decide(few, Dropped()).actions == (CloseRound(4),), "nobody can join any more, so nobody is waited for"


# ── the table, the code and the page ─────────────────────────────────────────────────────────────────────────────────


def test_every_move_is_in_the_table_and_every_move_of_the_table_is_made() -> None:
    rng = np.random.default_rng(0)
    made = {(state, event, to): False for (state, event), entry in TABLE.items() for to in entry.to}
    events = [
        CheckIn("t", 9),
        Report(),
        Commit(),
        Dropped(),
        Overdue(),
        Tick(),
        Published(),
        Recovered(9),
        protocol.Cancelled(),
    ]
    for state, event, buffered, now in itertools.product(ORDER, events, (False, True), (101.0, 1e6)):
        for _ in range(12):
            given = int(rng.integers(0, 4))
            counted = int(rng.integers(0, min(given, 2) + 1))
            pacing = replace(
                BUFFERED if buffered else SYNCHRONOUS, least=0.0 if buffered else float(rng.choice([0.0, 1.0]))
            )
            row = Round(4, state, 100.0, given=given, counted=counted)
            session = out("s", expires=float(rng.choice([1.0, 1e9])))
            named = (
                (session,)
                if isinstance(event, Report) or (isinstance(event, Commit | Dropped | Overdue) and row.out > 0)
                else ()
            )
            device = DeviceRow("d", session=replace(session, device="d") if row.out > 0 else None)
            known = int(rng.choice([0, 2]))
            found = decide(Facts(pacing, now, row, 4, named, device, population=known, takes=0.1), event)
            for after in found.rounds:
                if after.number != row.number or after.state is state:
                    continue
                assert ORDER.index(after.state) > ORDER.index(state)
                assert (state, type(event), after.state) in made
                made[state, type(event), after.state] = True
    assert [move for move, yes in made.items() if not yes] == []


def test_whatever_a_device_says_is_decided_in_every_state() -> None:
    for state, event in itertools.product(ORDER, (CheckIn, Report, Commit, Dropped, Overdue)):
        assert (state, event) in TABLE


def test_an_event_that_the_table_does_not_allow_changes_nothing_and_is_told_apart() -> None:
    """Published and Cancelled come to rounds that are over, and Published to rounds whose sum is not closed."""
    allowed = {state for state in ORDER if (state, Published) in TABLE}
    assert allowed == {State.CLOSING}
    assert {state for state in ORDER if (state, protocol.Cancelled) in TABLE} == {
        State.PLANNED,
        State.OPEN,
        State.CLOSING,
    }
    for state in set(ORDER) - allowed:
        assert decide(facts(row=Round(4, state)), Published()) == protocol.NOTHING
    over = {(state, event) for state in (State.PUBLISHED, State.ABANDONED) for event in (Tick, Published)}
    assert not over & set(TABLE), "time does nothing to a round that is over"


def test_the_vocabulary_stays_small() -> None:
    assert len({event for _, event in TABLE}) <= 12


def test_the_page_is_drawn_from_the_tables() -> None:
    page = draw_protocol.PAGE.read_text(encoding="utf-8")
    assert draw_protocol.drawn(page) == page, "run python docs/draw_protocol.py"


def test_a_changed_row_is_what_replace_would_make_and_knows_its_fields() -> None:
    session = out("s", sum=3)
    assert changed(session, state="dropped", reason="late") == replace(session, state="dropped", reason="late")
    assert changed(OPEN) == OPEN
    with pytest.raises(TypeError, match="a Round has no width"):
        changed(OPEN, width=3)


def test_a_report_that_is_refused_since_its_round_is_over_teaches_once() -> None:
    """Whether its session had ended before or ends with it."""
    awaited = Session("s", "d", 1, 0, 0, 900.0, began=100.0)
    seen = Facts(SYNCHRONOUS, 200.0, replace(OPEN, since=190.0), sessions=(awaited,))
    (first,) = decide(seen, Report()).sessions
    assert (first.state, first.reason) == ("late", "closed")
    again = decide(replace(seen, sessions=(first,)), Report())
    assert (again.sessions, again.actions) == ((), (RefuseReport("s", "closed"),))
