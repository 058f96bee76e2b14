"""One contract for rows, whatever keeps them: what was written in a transaction is there, all of it, or none."""

import math
import sqlite3
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event

from sumus.errors import ExperimentError
from sumus.pacing import Conditions, Pacing
from sumus.protocol.round import AssignWork, CheckIn, CloseRound, DeviceRow, Round, Session, State
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Arrived, Coordinator
from sumus.storage.memory import MemoryStore
from sumus.storage.sql import SqlStore
from sumus.storage.store import Fenced, Model, Rows, RunRow, Shard, Store

STORES = ("memory", "sqlite", "postgresql")
OUT = Session("a/1", "a", 1, 0, 0, math.inf)
RUN = RunRow(1, 2, 3, 4.5, 6, 7)
MODEL = Model(1, 5, 0, "ab" * 32, "cd" * 32, "ef" * 32, "01" * 32, 12, '{"loss":0.5}', 1.5)


@pytest.fixture
def databases(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], SqlStore]]:
    """Opens a new run in SQLite or PostgreSQL."""
    opened = list[SqlStore]()

    def open_one(kind: str) -> SqlStore:
        url = f"sqlite:///{tmp_path}/run.db" if kind == "sqlite" else request.getfixturevalue("postgres")
        opened.append(SqlStore.open(url, f"run {uuid.uuid4()}"))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def statements() -> Callable[[SqlStore], list[str]]:
    """A list of what is said to a store's database from now on."""

    def listen(store: SqlStore) -> list[str]:
        said = list[str]()
        engine = cast(Any, store)._engine
        event.listen(engine, "before_cursor_execute", lambda connection, cursor, statement, *_: said.append(statement))
        return said

    return listen


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, databases: Callable[[str], SqlStore]) -> Store:
    return MemoryStore() if request.param == "memory" else databases(request.param)


def everything(store: Store) -> dict[str, Any]:
    """All that a store tells of a few rounds, sessions and devices."""
    with store.transaction() as rows:
        return everything_in(rows)


def everything_in(rows: Rows) -> dict[str, Any]:
    return {
        "run": rows.run(),
        "rounds": list(rows.rounds()),
        "round": [rows.round(number) for number in range(4)],
        "sessions": [rows.session(f"{who}/{serial}") for who in "ab" for serial in range(1, 4)],
        "devices": [rows.device(who) for who in "ab"],
        "overdue": [list(rows.overdue(now)) for now in (0.0, 5.0, 1e9)],
        "counted": [list(rows.counted_in(number)) for number in range(4)],
        "shards": [list(rows.shards(number)) for number in range(4)],
        "notes": [rows.note(number, name) for number in range(4) for name in ("key", "seed")],
        "out": list(rows.sessions_out()),
        "model": [rows.model(version) for version in range(4)],
        "models": list(rows.models()),
    }


def test_a_new_store_holds_a_run_that_begins(store: Store) -> None:
    found = everything(store)
    assert (found["run"], found["rounds"]) == (RunRow(), [Round(0)])
    assert not any([*found["sessions"], *found["devices"], *found["overdue"], *found["counted"]])


def test_what_is_written_is_read_in_the_same_transaction_and_after_it(store: Store) -> None:
    row = Round(1, State.OPEN, 2.5, fence=3, given=4, dropped=1, counted=2, reason="because")
    session = replace(OUT, state="counted", sum=1, staleness=2)
    device = DeviceRow("a", session, last_sum=1, last_counted="a/1", times_counted=5)
    with store.transaction() as rows:
        rows.put_run(RUN)
        rows.put_round(row)
        rows.put_session(session)
        rows.put_device(device)
        within = (rows.run(), rows.round(1), rows.session("a/1"), rows.device("a"), list(rows.counted_in(1)))
    assert within == (RUN, row, session, device, ["a/1"])
    found = everything(store)
    assert (found["run"], found["rounds"], found["sessions"][0], found["devices"][0]) == (
        RUN,
        [Round(0), row],
        session,
        device,
    )


def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    before = everything(store)

    def fails(rows: Rows) -> None:
        rows.put_run(RunRow(5, 5, 5, 5.0))
        rows.put_round(Round(5))
        rows.put_session(replace(OUT, state="counted", sum=0))
        rows.put_device(DeviceRow("a", OUT))
        rows.put_shard(Shard(0, "ab", 1, 1, "x"))
        rows.put_note(0, "key", b"wrapped")
        rows.put_model(MODEL)
        assert everything_in(rows) != before
        rows.forget_rounds_before(1)
        rows.forget_device("a")
        raise KeyError("in the midst of it")

    with pytest.raises(KeyError), store.transaction() as rows:
        fails(rows)
    assert everything(store) == before


@pytest.mark.parametrize("forgotten", [False, True], ids=["", "its row is forgotten"])
def test_a_report_is_counted_in_one_sum_and_stays_there(store: Store, forgotten: bool) -> None:
    with store.transaction() as rows:
        rows.put_session(replace(OUT, state="counted", sum=2))
        if forgotten:
            rows.drop_session("a/1")
    for other in (replace(OUT, state="counted", sum=3), replace(OUT, state="dropped")):
        with pytest.raises(Fenced), store.transaction() as rows:
            rows.put_session(other)
    with store.transaction() as rows:
        rows.put_session(replace(OUT, state="counted", sum=2))
        assert list(rows.counted_in(2)) == ["a/1"]


def test_sessions_are_counted_in_an_order_and_forgotten_with_their_round(store: Store) -> None:
    names = ["z/1", "b/2", "m/3", "a/4"]
    for name in names:
        with store.transaction() as rows:
            rows.put_session(replace(OUT, id=name, state="counted", sum=1))
    with store.transaction() as rows:
        rows.put_round(Round(1, State.PUBLISHED))
        rows.put_round(Round(2))
        assert list(rows.counted_in(1)) == names
        rows.forget_rounds_before(2)
        assert (list(rows.counted_in(1)), [row.number for row in rows.rounds()]) == ([], [2])
    assert everything(store)["rounds"] == [Round(2)]


def test_a_processes_part_of_a_sum_lies_where_its_last_commit_put_it(store: Store) -> None:
    one, other = Shard(1, "ab", 1, 3, "x"), Shard(1, "aa", 1, 1, "y")
    with store.transaction() as rows:
        rows.put_shard(one)
        rows.put_shard(other)
        rows.put_note(1, "key", b"wrapped")
        assert list(rows.shards(1)) == [other, one]
    with store.transaction() as rows:
        rows.put_shard(replace(one, seq=2, count=5, file="z"))
    for seq in (2, 4):
        with pytest.raises(Fenced), store.transaction() as rows:
            rows.put_shard(replace(one, seq=seq))
    with store.transaction() as rows:
        assert list(rows.shards(1)) == [other, Shard(1, "ab", 2, 5, "z")]
        assert (rows.note(1, "key"), rows.note(2, "key")) == (b"wrapped", None)
        rows.put_note(1, "key", None)
        assert rows.note(1, "key") is None
        rows.put_note(1, "key", b"again")
        rows.forget_rounds_before(2)
        assert (list(rows.shards(1)), rows.note(1, "key")) == ([], None)
    with store.transaction() as rows:
        assert (list(rows.shards(1)), rows.note(1, "key")) == ([], None)


def test_a_devices_session_is_as_it_is_now(store: Store) -> None:
    with store.transaction() as rows:
        rows.put_session(OUT)
        rows.put_device(DeviceRow("a", OUT))
    with store.transaction() as rows:
        rows.put_session(replace(OUT, state="dropped", reason="lost"))
    found = everything(store)["devices"][0]
    assert found.session.reason == "lost"


def test_overdue_is_who_is_out_beyond_its_time(store: Store) -> None:
    with store.transaction() as rows:
        for who, (expires, state) in {
            "a": (5.0, "out"),
            "b": (3.0, "out"),
            "c": (1.0, "dropped"),
            "d": (9.0, "out"),
        }.items():
            rows.put_session(replace(OUT, id=f"{who}/1", device=who, expires=expires, state=state))
    assert everything(store)["overdue"] == [[], ["b/1", "a/1"], ["b/1", "a/1", "d/1"]]


def test_who_is_out_may_still_report(store: Store) -> None:
    with store.transaction() as rows:
        for who, expires in {"a": math.inf, "b": 3.0, "Ä": 3.0, "B": 3.0}.items():
            rows.put_session(replace(OUT, id=f"{who}/1", device=who, expires=expires))
        rows.put_session(replace(OUT, id="c/1", state="dropped"))
        assert rows.sessions_out() == ["B/1", "b/1", "Ä/1", "a/1"]
        rows.drop_session("b/1")
    with store.transaction() as rows:
        assert rows.sessions_out() == ["B/1", "Ä/1", "a/1"]


def test_a_device_is_forgotten_with_its_sessions_and_not_that_they_were_counted(store: Store) -> None:
    counted, other = replace(OUT, state="counted", sum=0), replace(OUT, id="b/1", device="b")
    with store.transaction() as rows:
        rows.put_session(counted)
        rows.put_session(replace(OUT, id="a/2", serial=2))
        rows.put_session(other)
        rows.put_device(DeviceRow("a", replace(OUT, id="a/2", serial=2), 0, "a/1", 1))
        rows.put_device(DeviceRow("b", other))
    with store.transaction() as rows:
        rows.put_session(replace(OUT, id="a/3", serial=3))
        rows.forget_device("a")
        assert [rows.session(f"a/{serial}") for serial in (1, 2, 3)] == [None] * 3
    found = everything(store)
    assert [row and row.id for row in found["sessions"]] == [None, None, None, "b/1", None, None]
    assert (found["devices"], found["counted"][0], found["out"]) == ([None, DeviceRow("b", other)], ["a/1"], ["b/1"])
    with pytest.raises(Fenced), store.transaction() as rows:
        rows.put_session(replace(counted, sum=1))


def test_where_a_sum_lies_is_forgotten_with_it(store: Store) -> None:
    with store.transaction() as rows:
        for number, name in ((1, "aa"), (1, "ab"), (2, "aa")):
            rows.put_shard(Shard(number, name, 1, 1, "x"))
    with store.transaction() as rows:
        rows.put_shard(Shard(1, "ac", 1, 1, "x"))
        rows.drop_shards(1)
        assert list(rows.shards(1)) == []
    assert everything(store)["shards"] == [[], [], [Shard(2, "aa", 1, 1, "x")], []]
    with pytest.raises(Fenced), store.transaction() as rows:
        rows.put_shard(Shard(1, "aa", 2, 1, "y"))
    with store.transaction() as rows:
        rows.put_shard(Shard(1, "aa", 1, 1, "y"))


def test_a_round_remembers_by_name(store: Store) -> None:
    with store.transaction() as rows:
        rows.put_note(1, "key", b"\0wrapped")
        rows.put_note(1, "seed", b"")
        rows.put_note(2, "key", b"other")
    with store.transaction() as rows:
        assert (rows.note(1, "key"), rows.note(1, "seed"), rows.note(1, "model")) == (b"\0wrapped", b"", None)
        rows.put_note(1, "key", None)
        assert rows.note(1, "key") is None
    assert everything(store)["notes"] == [None, None, None, b"", b"other", None, None, None]


def test_models_are_kept_by_version(store: Store) -> None:
    first = replace(MODEL, version=0, round=None, parent=None)
    with store.transaction() as rows:
        rows.put_model(replace(MODEL, version=11))
        rows.put_model(MODEL)
        rows.put_model(first)
        assert (rows.model(1), rows.model(0), rows.model(2)) == (MODEL, first, None)
    with store.transaction() as rows:
        assert [row.version for row in rows.models()] == [0, 1, 11]
        rows.put_model(replace(MODEL, contributors=13))
        rows.drop_model(11)
        rows.drop_model(12)
        rows.forget_rounds_before(9)
        assert list(rows.models()) == [first, replace(MODEL, contributors=13)]
    assert everything(store)["models"] == [first, replace(MODEL, contributors=13)]


def test_reading_ahead_changes_nothing(store: Store) -> None:
    counted, last = replace(OUT, state="counted", sum=0), replace(OUT, id="a/2", serial=2)
    with store.transaction() as rows:
        rows.put_session(counted)
        rows.put_session(last)
        rows.put_device(DeviceRow("a", last, 0, "a/1", 1))
    with store.transaction() as rows:
        rows.put_session(replace(last, reason="written before"))
        rows.read_ahead(["a", "b", "a"], ["a/1", "b/1"])
        assert rows.device("a") == DeviceRow("a", replace(last, reason="written before"), 0, "a/1", 1)
        assert (rows.device("b"), rows.session("a/1"), rows.session("b/1")) == (None, counted, None)
        rows.put_session(replace(OUT, id="b/1", device="b"))
        rows.put_device(DeviceRow("b", replace(OUT, id="b/1", device="b")))
    assert everything(store)["out"] == ["a/2", "b/1"]


def put_sessions(store: Store, *sessions: Session) -> None:
    with store.transaction() as rows:
        for session in sessions:
            rows.put_session(session)


@pytest.mark.parametrize("where", ["the same transaction", "another"])
def test_of_one_session_two_writes_that_do_not_go_together_are_fenced(store: Store, where: str) -> None:
    counted = replace(OUT, state="counted", sum=1)
    if where == "another":
        with store.transaction() as rows:
            rows.put_session(counted)
    for other in (replace(counted, sum=2), OUT):
        with pytest.raises(Fenced):
            put_sessions(store, counted, other)
    with store.transaction() as rows:
        rows.put_session(OUT if where == "the same transaction" else counted)
        rows.put_session(counted)
    assert everything(store)["counted"][1] == ["a/1"]


def test_more_rows_than_a_statement_takes(store: Store) -> None:
    names = [f"{place:04}" for place in range(1201)]
    with store.transaction() as rows:
        for name in names:
            session = Session(f"{name}/1", name, 1, 0, 0, 1.0, "counted", sum=0)
            rows.put_session(session)
            rows.put_device(DeviceRow(name, session, 0, session.id, 1))
    with store.transaction() as rows:
        rows.read_ahead(names)
        assert [rows.device(name) is None for name in names] == [False] * len(names)
        assert rows.counted_in(0) == [f"{name}/1" for name in names]


# ── any order of verbs ───────────────────────────────────────────────────────────────────────────────────────────────

NUMBERS = st.integers(0, 3)
SESSIONS = st.builds(
    lambda who, serial, state, number, expires: Session(
        f"{who}/{serial}", who, serial, number, 0, expires, state, sum=number if state == "counted" else None
    ),
    st.sampled_from("ab"),
    st.integers(1, 3),
    st.sampled_from(["out", "dropped", "counted"]),
    NUMBERS,
    st.sampled_from([0.0, 5.0, math.inf]),
)
VERBS: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just("put_run"), st.builds(RunRow, NUMBERS, NUMBERS)),
    st.tuples(st.just("put_round"), st.builds(Round, NUMBERS, st.sampled_from(State), given=NUMBERS)),
    st.tuples(st.just("put_session"), SESSIONS),
    st.tuples(st.just("put_session"), SESSIONS),
    st.tuples(
        st.just("put_device"), SESSIONS.map(lambda session: DeviceRow(session.device, session, None, session.id))
    ),
    st.tuples(st.just("drop_session"), st.sampled_from(["a/1", "b/2"])),
    st.tuples(st.just("forget_device"), st.sampled_from("ab")),
    st.tuples(
        st.just("put_shard"),
        st.builds(Shard, NUMBERS, st.sampled_from(["aa", "ab"]), st.integers(1, 2), NUMBERS, st.just("x")),
    ),
    st.tuples(st.just("drop_shards"), NUMBERS),
    st.tuples(st.just("put_note"), NUMBERS, st.sampled_from(["key", "seed"]), st.none() | st.binary(max_size=3)),
    st.tuples(st.just("put_model"), st.builds(replace, st.just(MODEL), version=NUMBERS, contributors=NUMBERS)),
    st.tuples(st.just("drop_model"), NUMBERS),
    st.tuples(st.just("forget_rounds_before"), st.integers(0, 2)),
    st.tuples(st.just("read_ahead"), st.just(["a", "b"]), st.just(["b/1"])),
    st.tuples(st.just("look")),
    st.tuples(st.just("fail")),
)


@pytest.mark.parametrize("kind", STORES[1:])
def test_any_verbs_do_the_same_on_every_store(kind: str, databases: Callable[[str], SqlStore]) -> None:
    first = databases(kind)

    @given(st.lists(st.lists(VERBS, max_size=6), max_size=5))
    def same(transactions: list[list[tuple[Any, ...]]]) -> None:
        memory, other = MemoryStore(), first.beside(f"run {uuid.uuid4()}")
        for verbs in transactions:
            assert done(memory, verbs) == done(other, verbs)
        assert everything(memory) == everything(other)

    same()


def done(store: Store, verbs: list[tuple[Any, ...]]) -> list[object]:
    """What a transaction reads, if it does not fail. When, within one, Fenced is raised is not said."""
    read = list[object]()
    try:
        with store.transaction() as rows:
            for name, *values in verbs:
                if name == "look":
                    read.append(everything_in(rows))
                elif name == "fail":
                    raise Fenced
                else:
                    getattr(rows, name)(*values)
    except Fenced:
        return ["nothing is left of it"]
    return read


def walk(store: Store, seed: int, steps: int = 600) -> list[object]:
    """All that a coordinator on this store answers to a walk of events, and what is in the store at the end."""
    rng = np.random.default_rng(seed)
    pacing = (
        Pacing(3, concurrency=5, most_stale=2, deadline=90) if seed % 2 else Pacing(3, over_select=1.5, deadline=60)
    )
    server, said, now = Coordinator(lambda: Circumstances(pacing, population=6), store), list[object](), 0.0
    serials, given = dict.fromkeys("abcdef", 0), list[str]()
    for _ in range(steps):
        now += float(rng.exponential(2.0))
        who = str(rng.choice(list("abcdef")))
        match rng.integers(8):
            case 0 | 1 | 2:
                serials[who] += int(rng.random() < 0.9)
                previous = str(rng.choice(given)) if given and rng.random() < 0.3 else None
                session = f"{who}/{serials[who]}"
                actions = server.check_in(who, CheckIn(session, serials[who], Conditions(), previous), now)
                given += [action.session.id for action in actions if isinstance(action, AssignWork)]
            case 3 | 4:
                actions = server.report(str(rng.choice(given[-6:])) if given else "nobody/1", now)
            case 5:
                actions = server.commit(now)
            case 6:
                actions = (*server.expire(now), *server.tick(now))
            case _:
                actions = server.recover(now) if rng.random() < 0.3 else server.drop(given[-1:], "gone", now)
        for action in actions:
            if isinstance(action, CloseRound):
                actions = (*actions, *server.publish(action.number, now))
        said.append(actions)
    with store.transaction() as rows:
        return [*said, rows.run(), *rows.rounds(), *(rows.device(who) for who in "abcdef"), *map(rows.session, given)]


@pytest.mark.parametrize("kind", STORES[1:])
@pytest.mark.parametrize("seed", range(4))
def test_a_coordinator_decides_the_same_on_every_store(
    seed: int, kind: str, databases: Callable[[str], SqlStore]
) -> None:
    said = walk(MemoryStore(), seed)
    assert walk(databases(kind), seed) == said
    assert sum(isinstance(each, Round) for each in said) > 5, "a walk in which nothing happens shows nothing"


@pytest.mark.parametrize("kind", STORES[1:])
def test_transactions_of_one_run_come_one_after_the_other(kind: str, databases: Callable[[str], SqlStore]) -> None:
    """Many threads add to what they read: with transactions side by side, some of it would be lost."""
    store = databases(kind)

    def add(number: int) -> None:
        for _ in range(10):
            with store.transaction() as rows:
                row = rows.round(0)
                assert row is not None
                rows.put_round(replace(row, given=row.given + number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, [1, 2, 3, 4]))
    with store.transaction() as rows:
        assert rows.round(0) == Round(0, given=100)


def test_a_process_that_is_stopped_in_a_transaction_does_not_stop_the_others(
    databases: Callable[[str], SqlStore],
) -> None:
    store = databases("postgresql")
    with store.transaction() as rows:
        told = [
            cast(Any, rows).connection.exec_driver_sql(f"SHOW {name}").scalar()
            for name in ("idle_in_transaction_session_timeout", "lock_timeout", "synchronous_commit")
        ]
    assert told == ["5s", "10s", "on"]


# ── what only a database has ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_database_is_there_after_a_kill(tmp_path: Path) -> None:
    program = f"""
        import os, signal
        from dataclasses import replace
        from tests.storage.test_store import OUT, SqlStore
        store = SqlStore.open("sqlite:///{tmp_path}/run.db")
        with store.transaction() as rows:
            rows.put_session(replace(OUT, state="counted", sum=0))
        with store.transaction() as rows:
            rows.put_session(replace(OUT, id="b/1", device="b"))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    root = Path(__file__).parents[2]
    died = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=root, check=False)
    assert died.returncode == -9
    found = everything(SqlStore.open(f"sqlite:///{tmp_path}/run.db"))
    assert [row.id for row in found["sessions"] if row] == ["a/1"]
    assert found["counted"][0] == ["a/1"]


def test_sqlite_waits_for_the_disk_and_leaves_nothing_of_what_is_deleted(tmp_path: Path) -> None:
    store = SqlStore.open(f"sqlite:///{tmp_path}/run.db")
    with store.transaction() as rows:
        connection = cast(Any, rows).connection
        told = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "secure_delete")
        ]
    assert told == ["wal", 2, 1]
    store.close()


@pytest.mark.parametrize("kind", STORES[1:])
def test_rows_that_are_as_they_were_are_not_written(
    kind: str, databases: Callable[[str], SqlStore], statements: Callable[[SqlStore], list[str]]
) -> None:
    store, counted = databases(kind), replace(OUT, state="counted", sum=0)

    def put_all() -> None:
        with store.transaction() as rows:
            rows.put_run(replace(rows.run(), version=5))
            for row in rows.rounds():
                rows.put_round(row)
            rows.read_ahead(["a"])
            rows.put_session(counted)
            rows.put_device(DeviceRow("a", counted, 0, "a/1", 1))

    said = statements(store)
    put_all()
    assert {line.split()[0] for line in said} - {"BEGIN"} == {"SELECT", "INSERT"}
    said.clear()
    put_all()
    assert {line.split()[0] for line in said} - {"BEGIN"} == {"SELECT"}


def test_many_check_ins_are_few_statements(
    databases: Callable[[str], SqlStore], statements: Callable[[SqlStore], list[str]]
) -> None:
    store = databases("sqlite")
    server = Coordinator(lambda: Circumstances(Pacing(100, concurrency=200)), store)
    server.tick(0.0)
    said = statements(store)
    for serial in (1, 2):
        said.clear()
        server.check_in_all(
            [(f"{who:03}", CheckIn(f"{who:03}/{serial}", serial, Conditions())) for who in range(100)], 1.0
        )
        assert len(said) <= 12, "\n".join(said)
    said.clear()
    server.report_all([Arrived((f"{who:03}/2",)) for who in range(100)], 2.0)
    server.commit(3.0)
    assert len(said) <= 20, "\n".join(said)
    assert server.current.number == 1


def test_runs_in_one_database_do_not_see_each_other(tmp_path: Path) -> None:
    one, other = (SqlStore.open(f"sqlite:///{tmp_path}/all.db", run) for run in ("keyboard", "health"))
    with one.transaction() as rows:
        rows.put_session(OUT)
        rows.put_run(RunRow(version=7))
    assert everything(other)["run"] == RunRow()
    assert not any(everything(other)["sessions"])
    again = SqlStore.open(f"sqlite:///{tmp_path}/all.db", "keyboard")
    assert everything(again)["run"] == RunRow(version=7)


def test_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is a letter, and no database " * 100)
    for url in (f"sqlite:///{tmp_path}/nowhere/run.db", f"sqlite:///{tmp_path}/text.db"):
        with pytest.raises(ExperimentError, match="the database cannot be opened"):
            SqlStore.open(url)
    assert sqlite3.sqlite_version_info >= (3, 24)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_an_address_of_postgres_goes_to_its_driver_however_it_is_written(scheme: str) -> None:
    with pytest.raises(ExperimentError, match="the database cannot be opened .*connection to server at"):
        SqlStore.open(f"{scheme}://nobody@127.0.0.1:9/none")


@pytest.mark.parametrize("url", ["lab.db", "mysql://db/x", "oracle:/x", "postgres//x", "postgresql+nodriver://x/y"])
def test_an_address_that_is_none_is_told_what_one_is(url: str) -> None:
    with pytest.raises(ExperimentError, match=r"address is not understood .*postgresql\+psycopg://"):
        SqlStore.open(url)
