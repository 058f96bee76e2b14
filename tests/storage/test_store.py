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

from sumus.errors import ExperimentError
from sumus.pacing import Conditions, Pacing
from sumus.protocol.round import Assign, CheckIn, Close, Device, Round, Session, State
from sumus.server.coordinator import Coordinator
from sumus.storage.memory import MemoryStore
from sumus.storage.sql import SqlStore
from sumus.storage.store import Fenced, Rows, Run, Shard, Store

STORES = ("memory", "sqlite", "postgresql")
OUT = Session("a/1", "a", 1, 0, 0, math.inf)


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


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, databases: Callable[[str], SqlStore]) -> Store:
    return MemoryStore() if request.param == "memory" else databases(request.param)


def everything(store: Store) -> dict[str, Any]:
    """All that a store tells of a few rounds, sessions and devices."""
    with store.transaction() as rows:
        return {
            "run": rows.run(),
            "rounds": list(rows.rounds()),
            "round": [rows.round(number) for number in range(4)],
            "sessions": [rows.session(f"{who}/{serial}") for who in "ab" for serial in range(1, 4)],
            "devices": [rows.device(who) for who in "ab"],
            "overdue": [list(rows.overdue(now)) for now in (0.0, 5.0, 1e9)],
            "counted": [list(rows.counted_in(number)) for number in range(4)],
            "shards": [list(rows.shards(number)) for number in range(4)],
            "keys": [rows.key(number) for number in range(4)],
        }


def test_a_new_store_holds_a_run_that_begins(store: Store) -> None:
    found = everything(store)
    assert (found["run"], found["rounds"]) == (Run(), [Round(0)])
    assert not any([*found["sessions"], *found["devices"], *found["overdue"], *found["counted"]])


def test_what_is_written_is_read_in_the_same_transaction_and_after_it(store: Store) -> None:
    row = Round(1, State.OPEN, 2.5, fence=3, given=4, dropped=1, counted=2, reason="because")
    session = replace(OUT, state="counted", sum=1, staleness=2)
    device = Device("a", session, last_sum=1, last_counted="a/1", times_counted=5)
    with store.transaction() as rows:
        rows.put_run(Run(1, 2, 3, 4.5))
        rows.put_round(row)
        rows.put_session(session)
        rows.put_device(device)
        within = (rows.run(), rows.round(1), rows.session("a/1"), rows.device("a"), list(rows.counted_in(1)))
    assert within == (Run(1, 2, 3, 4.5), row, session, device, ["a/1"])
    found = everything(store)
    assert (found["run"], found["rounds"], found["sessions"][0], found["devices"][0]) == (
        Run(1, 2, 3, 4.5),
        [Round(0), row],
        session,
        device,
    )


def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    before = everything(store)

    def fails(rows: Rows) -> None:
        rows.put_run(Run(5, 5, 5, 5.0))
        rows.put_round(Round(5))
        rows.put_session(replace(OUT, state="counted", sum=0))
        rows.put_device(Device("a", OUT))
        rows.put_shard(Shard(0, "ab", 1, 1, "x"))
        rows.put_key(0, b"wrapped")
        rows.forget_rounds_before(1)
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
        rows.put_key(1, b"wrapped")
        assert list(rows.shards(1)) == [other, one]
    with store.transaction() as rows:
        rows.put_shard(replace(one, seq=2, count=5, file="z"))
    for seq in (2, 4):
        with pytest.raises(Fenced), store.transaction() as rows:
            rows.put_shard(replace(one, seq=seq))
    with store.transaction() as rows:
        assert list(rows.shards(1)) == [other, Shard(1, "ab", 2, 5, "z")]
        assert (rows.key(1), rows.key(2)) == (b"wrapped", None)
        rows.put_key(1, None)
        assert rows.key(1) is None
        rows.put_key(1, b"again")
        rows.forget_rounds_before(2)
        assert (list(rows.shards(1)), rows.key(1)) == ([], None)
    with store.transaction() as rows:
        assert (list(rows.shards(1)), rows.key(1)) == ([], None)


def test_a_devices_session_is_as_it_is_now(store: Store) -> None:
    with store.transaction() as rows:
        rows.put_session(OUT)
        rows.put_device(Device("a", OUT))
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


def walk(store: Store, seed: int, steps: int = 400) -> list[object]:
    """All that a coordinator on this store answers to a walk of events, and what is in the store at the end."""
    rng = np.random.default_rng(seed)
    pacing = (
        Pacing(3, concurrency=5, most_stale=2, deadline=90) if seed % 2 else Pacing(3, over_select=1.5, deadline=60)
    )
    server, said, now = Coordinator(pacing, 6, store=store), list[object](), 0.0
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
                given += [action.session.id for action in actions if isinstance(action, Assign)]
            case 3 | 4:
                actions = server.report(str(rng.choice(given[-6:])) if given else "nobody/1", now)
            case 5:
                actions = server.commit(now)
            case 6:
                actions = (*server.expire(now), *server.tick(now))
            case _:
                actions = server.recover(now) if rng.random() < 0.3 else server.drop(given[-1:], "gone", now)
        for action in actions:
            if isinstance(action, Close):
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
            cast(Any, rows)._connection.exec_driver_sql(f"SHOW {name}").scalar()
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
        connection = cast(Any, rows)._connection
        told = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "secure_delete")
        ]
    assert told == ["wal", 2, 1]
    store.close()


def test_runs_in_one_database_do_not_see_each_other(tmp_path: Path) -> None:
    one, other = (SqlStore.open(f"sqlite:///{tmp_path}/all.db", run) for run in ("keyboard", "health"))
    with one.transaction() as rows:
        rows.put_session(OUT)
        rows.put_run(Run(version=7))
    assert everything(other)["run"] == Run()
    assert not any(everything(other)["sessions"])
    again = SqlStore.open(f"sqlite:///{tmp_path}/all.db", "keyboard")
    assert everything(again)["run"] == Run(version=7)


def test_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is a letter, and no database " * 100)
    for url in (f"sqlite:///{tmp_path}/nowhere/run.db", f"sqlite:///{tmp_path}/text.db", "postgresql+nodriver://x/y"):
        with pytest.raises(ExperimentError, match="the database cannot be opened"):
            SqlStore.open(url)
    assert sqlite3.sqlite_version_info >= (3, 24)
