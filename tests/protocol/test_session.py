"""The device's table: nothing is forgotten before it is settled, and its own floor holds."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.protocol import session as device
from sumus.protocol.session import (
    Assigned,
    DeviceState,
    Failed,
    Floor,
    KeepState,
    NoAnswer,
    Phase,
    Restarted,
    SendAbort,
    SendCheckIn,
    SendReport,
    SessionUnknown,
    Settled,
    SleepFor,
    StartWork,
    ToldLater,
    TrainingDone,
    UndoState,
    WakeUp,
    WorkOffer,
    step,
)

ANY = Floor(contributors=0)
NEW = DeviceState()


def after(*events: device.Event, state: DeviceState = NEW) -> tuple[DeviceState, list[object]]:
    """A device that these happen to, and all that it did."""
    done: list[object] = []
    for event in events:
        state, actions = step(state, event, ANY)
        done += actions
    return state, done


BEGUN = (WakeUp("s1"), Assigned(WorkOffer("s1")), TrainingDone())


def test_a_round_as_it_should_be() -> None:
    state, done = after(*BEGUN, Settled("s1", "counted"))
    assert done[:4] == [SendCheckIn("s1", 1, None), StartWork("s1"), SendReport("s1"), KeepState("s1")]
    assert isinstance(done[4], SleepFor)
    assert state == DeviceState(serial=1, asked="s1", today=1)


def test_work_that_an_earlier_check_in_asked_for_is_not_begun() -> None:
    state, _ = after(WakeUp("s1"), NoAnswer(), WakeUp("s2"))
    assert after(Assigned(WorkOffer("s1")), state=state) == (state, [])
    assert after(Assigned(WorkOffer("s2")), state=state)[1] == [StartWork("s2")]


def test_a_check_in_that_nobody_answers_is_repeated_less_and_less_often() -> None:
    _, done = after(*[event for number in range(6) for event in (WakeUp(f"s{number}"), NoAnswer())])
    waits = [act.window for act in done if isinstance(act, SleepFor)]
    assert all(sooner[0] < later[0] and sooner[1] <= later[1] for sooner, later in pairwise(waits[1:]))
    wide, _ = after(WakeUp("s"), ToldLater((10.0, 600.0)), WakeUp("t"))
    assert after(NoAnswer(), state=wide)[1] == [SleepFor((15.0, 600.0))]


def test_a_report_that_is_not_counted_undoes_what_the_client_would_keep() -> None:
    assert UndoState("s1") in after(*BEGUN, Settled("s1", "discarded"))[1]


def test_a_report_is_sent_again_and_then_asked_for() -> None:
    state, done = after(*BEGUN, *[NoAnswer(), WakeUp("s2")] * 3)
    assert [act for act in done if isinstance(act, SendReport)] == [SendReport("s1")] * 4
    waits = [act.window[0] for act in done if isinstance(act, SleepFor)]
    assert waits == sorted(waits)
    state, done = after(NoAnswer(), WakeUp("s2"), state=state)
    assert done[-1] == SendCheckIn("s2", 2, "s1")
    assert state.unsettled
    state, done = after(Settled("s1", "unknown"), state=state)
    assert done == [SendReport("s1")]
    assert state.phase is Phase.REPORTING


def test_no_new_work_is_begun_before_the_end_of_the_last_is_known() -> None:
    state, _ = after(*BEGUN, *[NoAnswer(), WakeUp("s2")] * 4)
    begun, done = after(Assigned(WorkOffer("s2")), state=state)
    assert begun == state
    assert not any(isinstance(act, StartWork) for act in done)
    _, done = after(Settled("s1", "counted"), Assigned(WorkOffer("s2")), state=state)
    assert done == [KeepState("s1"), StartWork("s2")]


def test_what_restarts_goes_on_with_its_report_and_drops_unfinished_work() -> None:
    state, done = after(*BEGUN, Restarted())
    assert state.unsettled
    assert isinstance(done[-1], SleepFor)
    assert after(WakeUp("s2"), state=state)[1] == [SendReport("s1")]
    state, _ = after(*BEGUN[:2], Restarted())
    assert (state.phase, state.session, state.unsettled) == (Phase.IDLE, "", False)
    assert after(WakeUp("s2"), state=state)[1] == [SendCheckIn("s2", 2, None)]


def test_a_report_for_a_session_that_nobody_knows_is_not_sent_again_but_asked_for() -> None:
    state, done = after(*BEGUN, SessionUnknown(), WakeUp("s2"))
    assert [act for act in done if isinstance(act, SendReport)] == [SendReport("s1")]
    assert done[-1] == SendCheckIn("s2", 2, "s1")
    assert state.unsettled


def test_a_server_that_is_busy_says_when_to_come_back() -> None:
    busy = NoAnswer((100.0, 200.0))
    assert after(WakeUp("s1"), busy)[1][-1] == SleepFor((100.0, 200.0))
    assert after(*BEGUN, busy)[1][-1] == SleepFor((100.0, 200.0))
    assert after(*BEGUN, NoAnswer((1.0, 2.0)))[1][-1] == SleepFor((15.0, 30.0))


def test_work_that_fails_is_told() -> None:
    state, done = after(*BEGUN[:2], Failed("offline"))
    assert done[-2] == SendAbort("s1", "offline")
    assert state.phase is Phase.IDLE


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (WorkOffer("s", steps=11), "floor-steps"),
        (WorkOffer("s", seconds=11.0), "floor-seconds"),
        (WorkOffer("s", bytes=11), "floor-bytes"),
        (WorkOffer("s", contributors=9), "floor-contributors"),
        (WorkOffer("s", memory=11), "floor-memory"),
        (WorkOffer("s", unfit="plan"), "plan"),
    ],
)
def test_the_floor_is_the_devices_own(offer: WorkOffer, reason: str) -> None:
    floor = Floor(steps=10, seconds=10.0, bytes=10, contributors=10, memory=10)
    state, done = step(step(DeviceState(), WakeUp("s"), floor)[0], Assigned(offer), floor)
    assert done[0] == SendAbort("s", reason)
    assert state.phase is Phase.IDLE


def test_rounds_a_day_are_charged_before_training_and_begin_anew_each_day() -> None:
    floor, state = Floor(rounds=2, contributors=0), DeviceState()
    for number, day in enumerate([3, 3, 3, 4]):
        state, _ = step(state, WakeUp(f"s{number}"), floor)
        state, done = step(state, Assigned(WorkOffer(f"s{number}"), day), floor)
        assert isinstance(done[0], SendAbort if number == 2 else StartWork)
        if number != 2:
            state, _ = step(state, Failed("error"), floor)
    assert (state.day, state.today) == (4, 1)


EVENTS = st.sampled_from(
    [
        WakeUp("new"), Assigned(WorkOffer("s1")), Assigned(WorkOffer("s2")), ToldLater((1.0, 2.0)),
        Settled("s1", "counted"), TrainingDone(), Settled("s1", "discarded"), Settled("s1", "unknown"),
        Settled("s2", "counted"), Failed("error"), NoAnswer(), Restarted(), SessionUnknown(),
    ]
)  # fmt: skip


@given(st.lists(EVENTS, max_size=40))
def test_whatever_happens_a_report_is_settled_once_and_before_the_next(events: list[device.Event]) -> None:
    state, unsettled = DeviceState(), ""
    for event in events:
        before = state
        state, actions = step(state, event, ANY)
        assert state.serial >= before.serial
        for act in actions:
            if isinstance(act, KeepState | UndoState):
                assert act.session == unsettled
                unsettled = ""
            elif isinstance(act, SendReport):
                assert unsettled in ("", act.session)
                unsettled = act.session
            elif isinstance(act, StartWork):
                assert not unsettled
        assert state.unsettled == bool(unsettled)
        assert not state.unsettled or state.session == unsettled


def test_what_comes_too_late_changes_nothing() -> None:
    idle = DeviceState(serial=3)
    for event in (TrainingDone(), Assigned(WorkOffer("s")), Settled("s", "counted"), NoAnswer(), Failed("x")):
        assert step(idle, event, ANY) == (idle, ())
    assert replace(idle) == idle
