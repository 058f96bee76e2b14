"""A backup holds all rows of one moment, and nothing that opens a sum."""

import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from sumus.errors import ExperimentError, UsageError
from sumus.protocol.round import DeviceRow, Round, State
from sumus.storage.sql import SqlStore
from sumus.storage.store import Shard
from tests.storage.test_identities import ALICE, TOKEN
from tests.storage.test_store import MODEL, OUT, RUN, everything


@pytest.fixture
def store(tmp_path: Path) -> SqlStore:
    return SqlStore.open(f"sqlite:///{tmp_path}/run.db", "keyboard")


def test_what_is_put_back_is_what_there_was_without_what_opens_sums(store: SqlStore, tmp_path: Path) -> None:
    key, seed = secrets.token_bytes(60), secrets.token_bytes(32)
    with store.transaction() as rows:
        rows.put_run(RUN)
        rows.put_round(Round(1, State.OPEN))
        rows.put_session(replace(OUT, state="counted", sum=1))
        rows.put_device(DeviceRow("a", OUT, 1, "a/1", 1))
        rows.put_model(MODEL)
        rows.put_note(1, "model", b"which was made")
        rows.put_note(1, "key", key)
        rows.put_note(1, "seed", seed)
        rows.put_shard(Shard(1, "shard-name", 1, 1, "1.shard-name.1.sum"))
    before = everything(store)
    store.backup(tmp_path / "backup.db")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("backup")) == ["backup.db"]
    body = (tmp_path / "backup.db").read_bytes()
    assert not [secret for secret in (key, seed, b"shard-name") if secret in body]
    assert b"which was made" in body, "a search that finds nothing shows nothing"
    again = SqlStore.open(f"sqlite:///{tmp_path}/backup.db", "keyboard")
    after = everything(again)
    assert after.pop("shards") == [[]] * 4
    assert after.pop("notes") == [None] * 8
    assert after == {name: value for name, value in before.items() if name not in ("shards", "notes")}
    with again.transaction() as rows:
        assert rows.note(1, "model") == b"which was made"


def test_all_runs_and_identities_are_in_it(store: SqlStore, tmp_path: Path) -> None:
    with store.beside("health").transaction() as rows:
        rows.put_run(RUN)
    with store.identities().transaction() as people:
        people.put_token(TOKEN)
        people.put_identity(ALICE)
    store.backup(tmp_path / "backup.db")
    again = SqlStore.open(f"sqlite:///{tmp_path}/backup.db", "health")
    assert everything(again)["run"] == RUN
    with again.identities().transaction() as people:
        assert (people.token(TOKEN.hash), people.identity(ALICE.id)) == (TOKEN, ALICE)


def test_it_is_of_one_moment_while_transactions_go_on(store: SqlStore, tmp_path: Path) -> None:
    """Rounds 0 and 1 are always written with the same figure; a copy of two moments would show two."""

    def write() -> None:
        for figure in range(60):
            with store.transaction() as rows:
                rows.put_round(Round(0, given=figure))
                rows.put_round(Round(1, given=figure))

    write()
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(write)
        backups = [tmp_path / f"{place}.db" for place in range(5)]
        for path in backups:
            store.backup(path)
        writing.result()
    for path in backups:
        found = everything(SqlStore.open(f"sqlite:///{path}", "keyboard"))["round"]
        assert found[0].given == found[1].given


def test_an_open_transaction_does_not_hold_it_up_and_is_not_in_it(store: SqlStore, tmp_path: Path) -> None:
    with store.transaction() as rows:
        rows.put_round(Round(7))
        list(rows.rounds())
        store.backup(tmp_path / "backup.db")
    assert everything(SqlStore.open(f"sqlite:///{tmp_path}/backup.db", "keyboard"))["rounds"] == [Round(0)]


def test_what_is_there_stays(store: SqlStore, tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(ExperimentError, match="already exists: give the backup another name"):
        store.backup(tmp_path / "letter")
    assert (tmp_path / "letter").read_text() == "dear"
    with pytest.raises(ExperimentError, match="the backup cannot be written .*: check the folder and its disk"):
        store.backup(tmp_path / "nowhere" / "backup.db")


def test_postgresql_has_a_program_for_it(postgres: str, tmp_path: Path) -> None:
    store = SqlStore.open(postgres)
    with pytest.raises(UsageError, match="use pg_dump --exclude-table-data=note --exclude-table-data=shard"):
        store.backup(tmp_path / "backup.db")
    store.close()
