"""A path is no URL: whatever stands in it, the files of a database lie there, and are their owner's alone."""

import os
from pathlib import Path

import pytest

from sumus.errors import ExperimentError
from sumus.node.reading import Reading
from sumus.node.readings import Readings
from sumus.operations.backup import back_up, restore
from sumus.operations.service import open_service
from sumus.operations.stores import Storage
from sumus.protocol.rows import changed
from sumus.storage.files import network_disk
from sumus.storage.sql import SqlStore
from tests.server.devices import tiny

NAMES = [
    "lab?",
    "lab?mode=memory&cache=shared",
    "lab#1",
    "100%",
    "lab%20two",
    "lab%3F",
    "file:lab",
    "file:lab?mode=ro",
    ":memory:",
    "-data",
    "~",
    "two words",
    "Gerät ✓",
    "a:b@c",
    "'; DROP TABLE run; --",
    os.fsdecode(b"latin\xe9"),
]


@pytest.fixture(params=NAMES, ids=ascii)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a folder, below the working directory."""
    monkeypatch.chdir(tmp_path)
    return request.param


def files() -> dict[str, int]:
    """All files and folders below the working directory, with their modes."""
    return {str(path): path.stat().st_mode & 0o777 for path in Path().rglob("*")}


def test_a_database_lies_in_the_file_that_was_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_and_read(file: Path) -> None:
        copy = file.with_name(f"{file.name}.copy")
        store = SqlStore.open(file)
        with store.transaction() as rows:
            rows.put_run(changed(rows.run(), version=7))
        store.backup(copy)
        store.close()
        for path in (file, copy):
            again = SqlStore.open(path)
            with again.transaction() as rows:
                assert rows.run().version == 7
            again.close()

    write_and_read(Path(name))
    assert files() == {name: 0o600, f"{name}.copy": 0o600}
    Path("in", name).mkdir(parents=True)
    monkeypatch.chdir("in")
    write_and_read(Path(name) / "run.db")
    assert set(files()) == {name, f"{name}/run.db", f"{name}/run.db.copy"}


@pytest.mark.parametrize("name", ["lab?", "file:lab?mode=ro", "100%#1", os.fsdecode(b"latin\xe9")], ids=ascii)
def test_a_server_and_its_backup_stay_within_their_folders(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, copy, restored = Path(name) / "data", Path(name) / "copy", Path(name) / "restored"
    open_service({"tiny": tiny()}, Storage(data)).close()
    back_up(Storage(data), copy)
    restore(copy, Storage(restored))
    open_service({"tiny": tiny()}, Storage(restored)).close()
    assert os.listdir() == [name]
    assert set(os.listdir(name)) == {"data", "copy", "restored"}
    for folder in (data, copy, restored):
        assert (folder / "sumus.db").stat().st_mode & 0o777 == 0o600


def test_a_nodes_readings_stay_within_their_folder(name: str) -> None:
    with Readings(name) as readings:
        readings.keep([readings.fit(Reading([1.0], 1))])
    with Readings(name) as readings:
        assert readings.kept.count == 1
    assert files() == {name: 0o700, f"{name}/readings.db": 0o600}


@pytest.mark.parametrize(
    "name", [name for name in NAMES if "?" not in name and name not in (":memory:", "~")], ids=ascii
)
def test_what_follows_sqlite_in_an_address_is_a_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    SqlStore.open(f"sqlite:///{name}").close()
    assert files() == {name: 0o600}
    SqlStore.open(f"sqlite:///{tmp_path}/{name}.db").close()
    assert (tmp_path / f"{name}.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite://run.db", "names no file"),
        ("sqlite+pysqlite:///:memory:", "names no file"),
        ("sqlite:///lab?/run.db", "which begins options"),
        ("sqlite:///file:run.db?mode=memory&uri=true", "which begins options"),
        ("run.db", "is not understood"),
    ],
)
def test_an_address_that_keeps_nothing_or_asks_for_options_is_refused(
    url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExperimentError, match=said):
        SqlStore.open(url)
    assert not os.listdir()


@pytest.mark.parametrize(
    ("listed", "name"), [(r"/disks/a\040b", "a b"), (r"/disks/a\043b", "a#b"), (r"/disks/a\134b", r"a\b")]
)
def test_a_network_disk_is_found_whatever_stands_in_its_name(listed: str, name: str) -> None:
    mounts = f"/dev/root / ext4 rw 0 0\nserver:/x {listed} nfs4 rw 0 0\n"
    assert network_disk(Path("/disks") / name / "run.db", mounts) == "nfs4"
