"""Behind a real PgBouncer a transaction may have another session than the one before: nothing that sumus needs outlasts one."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from benchmarks.kills.__main__ import database
from sumus.errors import ExperimentError
from sumus.operations.stores import Storage
from sumus.protocol.rows import changed
from sumus.storage.sql import SqlStore
from tests.server.devices import tiny
from tests.server.standing import standing
from tests.server.test_replicas import replicas_at, update_of, work
from tests.services import pgbouncer


@pytest.fixture
def url(postgres: str) -> Iterator[str]:
    with database(postgres) as found:
        assert found is not None
        yield found


def test_a_server_needs_one_connection_of_the_pool(url: str, tmp_path: Path) -> None:
    with pgbouncer(url, size=1) as pooled, standing(Storage(tmp_path / "data", pooled)) as at:
        at.round()
        at.open_again()
        at.round()
        found = at.audit()
        assert (found.lost, found.twice, found.equal, found.models, found.wrong) == (0, 0, 3, 3, []), found


def test_replicas_share_one_connection_of_the_pool(url: str, tmp_path: Path) -> None:
    bundle = tiny(2)
    with pgbouncer(url, size=1) as pooled, replicas_at(tmp_path, pooled) as replicas:
        one, two = replicas.start(bundle), replicas.start(bundle)
        assert (one.server.leads, two.server.leads) == (True, False)
        devices = [replicas.device(number) for number in range(2)]
        for number in range(3):
            replicas.look()
            for which, device in enumerate(devices):
                given = work(replicas.at(which, device), bundle)
                replicas.at(1 - which, device).report(given, update_of(bundle.plan, device.id, value=float(number)))
        replicas.look()
        assert [each.server.tasks[0].training.version for each in (one, two)] == [3, 3]


def test_the_same_statements_hold_for_many_clients_of_few_sessions(url: str) -> None:
    with pgbouncer(url, size=2) as pooled:
        stores = [SqlStore.open(pooled, f"run{number}") for number in range(4)]

        def count(store: SqlStore) -> None:
            for _ in range(20):
                with store.transaction() as rows:
                    rows.put_run(changed(rows.run(), version=rows.run().version + 1))

        threads = [threading.Thread(target=count, args=(store,)) for store in stores for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for store in stores:
            with store.transaction() as rows:
                assert rows.run().version == 40
            store.close()


def test_patience_is_of_a_transaction_and_not_of_the_next_client(url: str) -> None:
    names = ("idle_in_transaction_session_timeout", "lock_timeout")
    with pgbouncer(url, size=1) as pooled:
        store = SqlStore.open(pooled)
        with store.transaction() as rows:
            within = [rows.connection.execute(text(f"SHOW {name}")).scalar() for name in names]  # pyright: ignore
        engine = create_engine(pooled)
        with engine.connect() as connection:
            after = [connection.execute(text(f"SHOW {name}")).scalar() for name in names]
        engine.dispose()
        store.close()
    assert (within, after) == (["5s", "10s"], ["0", "0"])


def test_a_pooler_of_statements_is_refused_by_name(url: str) -> None:
    with pgbouncer(url, "statement") as pooled, pytest.raises(ExperimentError, match="set pool_mode = transaction"):
        SqlStore.open(pooled)
