"""A step of a device's record, which is pure: what a client keeps changes in the same record that says how its report ended."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sumus.protocol.session as session
from sumus.device.record_step import MOST_TASKS, step_record, with_task
from sumus.device.store import KeptState, Record
from sumus.protocol.session import DeviceState, Floor, Phase, WorkOffer
from sumus.wire.messages import Assignment, Body

FLOOR = Floor(contributors=0, rounds=10**6)
OLD, NEW = KeptState("a" * 64, "print"), KeptState("b" * 64, "print")


def work(session: str = "s", kind: Any = "train") -> Assignment:
    body = Body("0" * 64, 1)
    return Assignment("a", kind, session, 3, body, body, "00" * 32, 10, 600.0)


def reporting(kind: Any = "train", **changes: Any) -> Record:
    """A device whose report is on its way."""
    row = DeviceState(Phase.REPORTING, 1, "s", "s", True, 1)
    kept = {"states": {"a": OLD}, "work": work(kind=kind), "report": "r" * 64, "pending": NEW}
    return Record(row=row, **{**kept, **changes})


@pytest.mark.parametrize(
    ("outcome", "kind", "state", "counts"),
    [
        ("counted", "train", NEW, {"counted": 1, "in sums": 1}),
        ("counted", "evaluate", NEW, {"counted": 1}),
        ("discarded", "train", OLD, {"discarded": 1}),
    ],
)
def test_what_a_client_keeps_follows_the_end_of_its_report(
    outcome: str, kind: str, state: KeptState, counts: dict[str, int]
) -> None:
    stepped = step_record(reporting(kind), session.Settled("s", outcome), FLOOR)
    record = stepped.record
    assert (record.states["a"], record.counts) == (state, counts)
    assert (record.work, record.report, record.pending) == (None, None, None)
    assert [(news.what, news.task, news.version) for news in stepped.news] == [(outcome, "a", 3)]


def test_without_anything_new_to_keep_the_old_stays() -> None:
    stepped = step_record(reporting(pending=None), session.Settled("s", "counted"), FLOOR)
    assert stepped.record.states == {"a": OLD}


@pytest.mark.parametrize("event", [session.NoAnswer(), session.SessionUnknown(), session.Settled("other", "counted")])
def test_while_the_end_is_not_known_everything_is_kept(event: session.Event) -> None:
    before = reporting()
    stepped = step_record(before, event, FLOOR)
    assert replace(stepped.record, row=before.row) == before
    assert stepped.news == ()


def test_a_failure_is_counted_and_its_work_forgotten() -> None:
    before = Record(row=DeviceState(Phase.TRAINING, 1, "s", "s"), work=work())
    stepped = step_record(before, session.Failed("data"), FLOOR)
    assert (stepped.record.counts, stepped.record.work) == ({"aborted": 1}, None)


@given(st.lists(st.integers(0, 3 * MOST_TASKS)))
def test_the_tasks_that_came_last_are_kept(numbers: list[int]) -> None:
    kept: dict[str, int] = {}
    for number in numbers:
        kept = with_task(kept, str(number), number)
    last = dict.fromkeys(reversed(numbers))
    assert list(kept) == [str(number) for number in reversed(list(last)[:MOST_TASKS])]


SESSIONS = st.sampled_from(["s1", "s2", "s3"])
EVENTS = st.one_of(
    st.builds(session.WakeUp, SESSIONS),
    st.builds(session.Assigned, st.builds(WorkOffer, SESSIONS, unfit=st.sampled_from(["", "", "plan"])), st.integers(0, 1)),
    st.just(session.ToldLater((1.0, 2.0))),
    st.builds(session.Settled, SESSIONS, st.sampled_from(["counted", "discarded", "unknown"])),
    st.just(session.TrainingDone()),
    st.just(session.Failed("data")),
    st.just(session.NoAnswer()),
    st.just(session.SessionUnknown()),
    st.just(session.Restarted()),
)  # fmt: skip


@given(st.lists(EVENTS, max_size=60))
def test_whatever_happens_a_state_is_of_a_counted_report_and_nothing_is_held_that_nobody_can_ask_for(
    events: list[session.Event],
) -> None:
    record, proposed, number = Record(), dict[str, KeptState](), 0
    for event in events:
        given = record
        if isinstance(event, session.Assigned):
            given = replace(record, work=work(event.offer.session)) if record.row.phase is Phase.ASKED else record
            if record.row.unsettled:  # the shell takes no work meanwhile
                given = record
        if isinstance(event, session.TrainingDone) and record.row.phase is Phase.TRAINING:
            number += 1
            proposed[record.row.session] = state = KeptState(f"{number:064}", "print")
            given = replace(record, report="r" * 64, pending=state)
        stepped = step_record(given, event, FLOOR)
        assert stepped == step_record(given, event, FLOOR), "it is pure"
        record = stepped.record
        if record.states != given.states:
            assert isinstance(event, session.Settled)
            assert event.outcome == "counted"
            assert record.states == {"a": proposed[event.session]}
        assert (record.report is None) == (record.pending is None) == (not record.row.unsettled)
        assert record.work is None or record.row.session == record.work.session
        done = sum(record.counts.get(word, 0) for word in ("counted", "discarded"))
        assert done - sum(given.counts.get(word, 0) for word in ("counted", "discarded")) == len(stepped.news)
