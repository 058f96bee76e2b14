"""One contract for who leads, whatever keeps it: one at a time, and under each fence nobody but who took it."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from sumus.pacing import Conditions, Pacing
from sumus.protocol.round import CheckIn
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Coordinator
from sumus.storage.leases import MOST_JUMP, Leases, MemoryLeases, PresentReplica
from sumus.storage.memory import MemoryStore
from sumus.storage.sql import SqlStore
from sumus.storage.store import Store, TakenOver

STORES = ("memory", "sqlite", "postgresql")
ROOT = Path(__file__).parents[2]
FOR_EVER, NOT_AT_ALL = 1e6, 0.0
"""Seconds that a lease lasts: so nothing here waits."""


class At:
    """Leases, and the two runs that go with them."""

    def __init__(self, leases: Leases, stores: list[Store]) -> None:
        self.leases, self.stores = leases, stores

    def fences(self) -> list[int]:
        found = list[int]()
        for store in self.stores:
            with store.transaction() as rows:
                found.append(rows.run().fence)
        return found


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty PostgreSQL database."""
    url, name = request.getfixturevalue("postgres"), f"leases_{uuid.uuid4().hex}"
    server = create_engine(url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield url.replace("/postgres?", f"/{name}?")
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture(params=STORES)
def at(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[At]:
    if request.param == "memory":
        stores = {"one": MemoryStore(), "two": MemoryStore()}
        yield At(MemoryLeases(stores, shared=True), list(stores.values()))
        return
    url = f"sqlite:///{tmp_path}/run.db" if request.param == "sqlite" else request.getfixturevalue("database")
    store = SqlStore.open(url, "one")
    yield At(store.leases(shared=True), [store, store.beside("two")])
    store.close()


def test_it_is_kept_by_who_has_it_and_taken_by_another_once_it_has_run_out(at: At) -> None:
    hold = at.leases.hold
    first = hold("a/1", FOR_EVER)
    assert (first.holder, first.leader, first.fence) == ("a/1", "a", 1)
    assert at.fences() == [1, 1]
    assert hold("b/1", FOR_EVER) == first, "it is not free"
    again = hold("a/1", NOT_AT_ALL)
    assert (again.holder, again.fence) == ("a/1", 1)
    assert at.fences() == [1, 1], "keeping it is no take-over"
    assert hold("a/1", NOT_AT_ALL).fence == 1, "it has run out, and nobody has taken it"
    taken = hold("b/1", FOR_EVER)
    assert (taken.holder, taken.fence) == ("b/1", 2)
    assert at.fences() == [2, 2]
    assert hold("a/1", FOR_EVER) == taken, "who wakes up hears of it"
    assert at.fences() == [2, 2]


def test_who_leaves_gives_it_back(at: At) -> None:
    at.leases.hold("a/1", FOR_EVER)
    at.leases.leave("b/1")
    assert at.leases.hold("b/1", FOR_EVER).holder == "a/1"
    at.leases.leave("a/1")
    assert at.leases.hold("b/1", FOR_EVER).fence == 2
    at.leases.leave("a/1")
    assert at.leases.hold("a/2", FOR_EVER).holder == "b/1"


def test_a_replicas_next_life_need_not_wait_for_its_last_one(at: At) -> None:
    at.leases.hold("a/1", FOR_EVER)
    assert at.leases.hold("a/2", FOR_EVER).holder == "a/1"
    assert at.leases.hold("b/1", FOR_EVER, begins=True).holder == "a/1"
    assert at.leases.hold("a/2", FOR_EVER, begins=True).fence == 2
    assert at.leases.hold("a/1", FOR_EVER).holder == "a/2"


def test_of_many_that_ask_at_once_one_gets_it(at: At) -> None:
    with ThreadPoolExecutor(6) as pool:
        for fence in range(1, 5):
            found = set(pool.map(lambda who: at.leases.hold(f"{who}/{fence}", FOR_EVER), "abcdef"))  # noqa: B023
            assert len({(lease.holder, lease.fence) for lease in found}) == 1
            assert {lease.fence for lease in found} == {fence}
            at.leases.leave(found.pop().holder)


def test_under_an_old_fence_nothing_is_written(at: At) -> None:
    pacing = Pacing(2, deadline=60.0)
    leader, other = (Coordinator(lambda: Circumstances(pacing, population=2), at.stores[0]) for _ in range(2))
    leader.recover(0.0, at.leases.hold("a/1", NOT_AT_ALL).fence)
    leader.tick(0.0)
    before = leader.current
    fence = at.leases.hold("b/1", FOR_EVER).fence
    for act in (
        lambda: leader.tick(99.0),
        lambda: leader.expire(99.0),
        lambda: leader.cancel(0, 1.0),
        lambda: leader.check_in("d", CheckIn("d/1", 1, Conditions()), 1.0),
        lambda: leader.commit(1.0),
        lambda: leader.recover(1.0, 1),
    ):
        with pytest.raises(TakenOver):
            act()
    with pytest.raises(TakenOver), leader.transaction() as rows:
        rows.put_note(0, "seed", b"")
    with pytest.raises(TakenOver), leader.leading() as rows:
        rows.forget_rounds_before(5)
    assert leader.current == before
    other.recover(1.0, fence)
    assert other.current.fence == fence
    other.tick(61.0)


def test_who_follows_takes_devices_and_nothing_else(at: At) -> None:
    pacing = Pacing(2, deadline=60.0)
    leader, other = (Coordinator(lambda: Circumstances(pacing, population=2), at.stores[0]) for _ in range(2))
    leader.recover(0.0, at.leases.hold("a/1", FOR_EVER).fence)
    leader.tick(0.0)
    other.follow()
    for act in (
        lambda: other.tick(99.0),
        lambda: other.expire(99.0),
        lambda: other.publish(0, 1.0),
        lambda: other.cancel(0, 1.0),
    ):
        with pytest.raises(TakenOver):
            act()
    for device in "de":
        other.check_in(device, CheckIn(f"{device}/1", 1, Conditions()), 1.0)
        other.report(f"{device}/1", 2.0)
    other.commit(3.0)
    assert (leader.current.counted, leader.current.state.value) == (2, "closing")


def test_who_is_there_is_seen_for_a_while(at: At) -> None:
    at.leases.beat("b", "x")
    at.leases.beat("a", "y")
    at.leases.beat("b", "z")
    assert list(at.leases.present(FOR_EVER)) == [PresentReplica("a", "y"), PresentReplica("b", "z")]
    assert list(at.leases.present(-1.0)) == []
    at.leases.leave("a/1")
    assert [each.name for each in at.leases.present(FOR_EVER)] == ["b"]


def test_a_serial_is_known_to_all_and_never_falls(at: At) -> None:
    leases = at.leases
    assert leases.raise_serials({"a": 3, "b": 0}) == {"a": 3, "b": 0}
    assert leases.raise_serials({"a": 2, "b": 0, "c": 1}) == {"a": 3, "b": 0, "c": 1}
    assert leases.raise_serials({"a": 4}) == {"a": 4}
    leases.forget_serial("a")
    assert leases.raise_serials({"a": 1, "b": 0}) == {"a": 1, "b": 0}
    assert leases.raise_serials({}) == {}


def test_a_serial_that_jumps_too_far_changes_nothing(at: At) -> None:
    leases, far = at.leases, MOST_JUMP + 1
    assert leases.raise_serials({"new": far, "old": 5}) == {"new": -1, "old": 5}
    assert leases.raise_serials({"new": MOST_JUMP, "old": 5 + far}) == {"new": MOST_JUMP, "old": 5}
    assert leases.raise_serials({"new": 1, "old": 6}) == {"new": MOST_JUMP, "old": 6}
    assert leases.raise_serials({"given": 9 * far + 1}, {"given": 9 * far}) == {"given": 9 * far + 1}
    for device in ("new", "old", "given"):
        leases.forget_serial(device)


def test_where_processes_do_not_share_whoever_comes_takes_it(tmp_path: Path) -> None:
    store = SqlStore.open(f"sqlite:///{tmp_path}/run.db", "one")
    for leases, run in ((store.leases(), store), (MemoryLeases({"one": (memory := MemoryStore())}), memory)):
        assert not leases.shared
        assert leases.hold("a/1", FOR_EVER).fence == 1
        assert leases.hold("b/1", FOR_EVER).fence == 2
        with run.transaction() as rows:
            assert rows.run().fence == 2
    store.close()


# ── processes that stop in the middle ────────────────────────────────────────────────────────────────────────────────

STOPPED = """
    import os, signal
    import psycopg
    from sumus.protocol.round import Round
    from sumus.storage.sql import SqlStore
    from sumus.storage.store import RunRow

    wait, waits = psycopg.Connection.wait, []

    def stop_at_the_third(*arguments, **options):
        answer = wait(*arguments, **options)
        waits.append(answer)
        if len(waits) == 3:
            stop()
        return answer

    def stop():
        os.kill(os.getpid(), signal.SIGSTOP)

    store = SqlStore.open({url!r}, "one")
    print(store.leases().hold("a/1", {lasts}).fence, flush=True)
    try:
        with store.transaction() as rows:
            rows.put_run(RunRow(newest=77, fence=rows.run().fence))
            rows.put_round(Round(1))
            rows.put_round(Round(2))
            rows.put_note(1, "a", b"note")
            if {writing}:
                psycopg.Connection.wait = stop_at_the_third
            else:
                stop()
    except Exception:
        print("failed", flush=True)
    else:
        print("written", flush=True)
    print(store.leases().hold("a/1", {lasts}).holder, flush=True)
"""


def stopped(url: str, lasts: float, writing: bool) -> "subprocess.Popen[str]":
    """A leader that is stopped in a transaction, or between two messages of what it writes there."""
    program = textwrap.dedent(STOPPED.format(url=url, lasts=lasts, writing=writing))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    return process


@pytest.mark.parametrize("writing", [False, True], ids=["between", "writing"])
def test_a_leader_that_is_stopped_in_a_transaction_does_not_block_the_others_and_never_writes(
    database: str, writing: bool
) -> None:
    store = SqlStore.open(database, "one")
    process = stopped(database, 0.5, writing)
    try:
        began, leases = time.monotonic(), store.leases()
        while (lease := leases.hold("b/1", FOR_EVER)).holder != "b/1":
            assert time.monotonic() - began < 30.0, "nothing lets go of it"
        assert lease.fence == 2
        assert time.monotonic() - began < 9.0, "PostgreSQL lets go of it after 5 s"
        with store.transaction() as rows:
            assert (rows.run().newest, rows.run().fence) == (0, 2)
        os.kill(process.pid, signal.SIGCONT)
        out, _ = process.communicate(timeout=30)
        assert out.splitlines() == ["failed", "b/1"]
        with store.transaction() as rows:
            assert rows.run().newest == 0
    finally:
        process.kill()
        process.communicate()
        store.close()
