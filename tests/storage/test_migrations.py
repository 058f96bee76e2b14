"""Whoever opens a database brings it up to date, or says why not."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command, op
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.exc import OperationalError

import sumus.storage.migrations
from sumus.errors import ExperimentError
from sumus.protocol.round import DeviceRow
from sumus.storage.files import network_disk
from sumus.storage.migrations import FORM, VERSION_TABLE
from sumus.storage.sql import SqlStore
from sumus.storage.store import RunRow
from sumus.storage.tables import TABLES

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/run.db"
        return
    url = request.getfixturevalue("postgres")
    server = create_engine(url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text("CREATE DATABASE migrations"))
    yield url.replace("/postgres?", "/migrations?")
    with server.connect() as connection:
        connection.execute(text("DROP DATABASE migrations WITH (FORCE)"))
    server.dispose()


@pytest.fixture
def engine(empty: str) -> Iterator[Engine]:
    engine = create_engine(empty)
    yield engine
    engine.dispose()


def say(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def test_steps_lead_in_one_line_to_the_last() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(sumus.storage.migrations.__file__).parent))
    steps = ScriptDirectory.from_config(config)
    assert steps.get_heads() == [FORM]
    assert len(steps.get_bases()) == 1


def test_an_empty_database_is_made_as_the_tables_say(empty: str, engine: Engine) -> None:
    SqlStore.open(empty).close()
    with engine.connect() as connection:
        assert connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalars().all() == [FORM]
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, TABLES) == []


def test_opening_again_changes_nothing(empty: str, engine: Engine) -> None:
    store = SqlStore.open(empty, "keyboard")
    with store.transaction() as rows:
        rows.put_run(RunRow(version=7))
    store.close()
    store = SqlStore.open(empty, "keyboard")
    with store.transaction() as rows:
        assert rows.run() == RunRow(version=7)
    store.close()


def test_a_newer_database_is_refused_as_it_is(empty: str, engine: Engine) -> None:
    SqlStore.open(empty).close()
    say(engine, f"UPDATE {VERSION_TABLE} SET version_num = '9999'", "ALTER TABLE run ADD COLUMN later INTEGER")
    with pytest.raises(
        ExperimentError,
        match=r"written by a newer sumus \(the version of its tables is 9999, but this sumus knows only",
    ):
        SqlStore.open(empty)
    assert "later" in [column["name"] for column in inspect(engine).get_columns("run")]


def test_tables_of_another_program_are_left_alone(empty: str, engine: Engine) -> None:
    say(engine, "CREATE TABLE session (cookie VARCHAR(9))", "CREATE TABLE alembic_version (version_num VARCHAR(32))")
    with pytest.raises(
        ExperimentError, match=r"holds tables of another program \(session\): give sumus a database of its own"
    ):
        SqlStore.open(empty)
    assert sorted(inspect(engine).get_table_names()) == ["alembic_version", "session"]
    say(engine, "DROP TABLE session")
    SqlStore.open(empty).close()  # other names are no hindrance
    assert "alembic_version" in inspect(engine).get_table_names()


def test_a_step_that_fails_leaves_the_database_as_it_was(
    empty: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OperationalError("CREATE", {}, Exception("disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(op, "create_index", fails)
        with pytest.raises(ExperimentError, match="the database cannot be opened .*disk is full"):
            SqlStore.open(empty)
    assert inspect(engine).get_table_names() == []
    SqlStore.open(empty).close()


def test_what_was_counted_before_models_were_is_a_separation_from_now_on(empty: str, engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(sumus.storage.migrations.__file__).parent))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0005")
    say(
        engine,
        "INSERT INTO run VALUES ('keyboard', 12, 9, 0, 0, 0, 0, 0, 0, 0)",
        "INSERT INTO device VALUES ('keyboard', 'ann', NULL, 7, NULL, 3, 0, 0)",
        "INSERT INTO device VALUES ('another', 'bob', NULL, NULL, NULL, 0, 0, 0)",
    )
    store = SqlStore.open(empty, "keyboard")
    with store.transaction() as rows:
        assert (rows.run().models, rows.run().version) == (9, 9)
        assert rows.device("ann") == DeviceRow("ann", last_sum=7, times_counted=3, models=9)
    store.close()


def test_threads_open_a_new_database_at_once(empty: str, engine: Engine) -> None:
    with ThreadPoolExecutor(4) as pool:
        for store in pool.map(lambda place: SqlStore.open(empty, f"run {place % 2}"), range(8)):
            store.close()
    assert set(TABLES.tables) < set(inspect(engine).get_table_names())


def test_processes_open_a_new_database_at_once(empty: str, engine: Engine) -> None:
    program = f"""
        import sys
        from sumus.storage.sql import SqlStore
        print("ready", flush=True)
        sys.stdin.readline()
        for place in range(3):
            store = SqlStore.open({empty!r}, f"run {{place}}")
            with store.transaction() as rows:
                run = rows.run()
                rows.put_run(type(run)(run.newest, run.version + 1))
            store.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, "".join(ended)
    store = SqlStore.open(empty, "run 2")
    with store.transaction() as rows:
        assert rows.run().version == 4
    store.close()


MOUNTS = """\
/dev/sda1 / ext4 rw,relatime 0 0
server:/people /people nfs4 rw 0 0
/dev/sdb1 /people/fast ext4 rw 0 0
//box/films /our\\040films cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/run.db", None),
        ("/people/ann/run.db", "nfs4"),
        ("/people/fast/run.db", None),
        ("/peoples/run.db", None),
        ("/our films/run.db", "cifs"),
    ],
)
def test_a_disk_of_another_machine_is_seen(path: str, kind: str | None) -> None:
    assert network_disk(Path(path), MOUNTS) == kind
    assert network_disk(Path(path), "") is None


def test_sqlite_on_a_disk_of_another_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nfs(path: Path) -> str:
        return "nfs4"

    monkeypatch.setattr("sumus.storage.sql.network_disk", nfs)
    with pytest.raises(ExperimentError, match=r"another machine's disk \(nfs4\), where SQLite's locks do not work"):
        SqlStore.open(f"sqlite:///{tmp_path}/run.db")
    assert list(tmp_path.iterdir()) == []
