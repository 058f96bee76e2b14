"""Files that are put into a folder are taken when they are whole, once, and what is refused lies there with the reason."""

import io
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sumus.errors import ExperimentError
from sumus.node.folder import WatchedFolder
from sumus.node.folder_state import PATIENCE_S, SETTLED_S
from sumus.node.intake import Intake
from sumus.node.readings import DAY, Readings, Retention


class Clock:
    """Seconds, which stand still."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Folder:
    """A watched folder with readings of its own, and time."""

    def __init__(self, path: Path, **retention: Any) -> None:
        self.path, self.clock, self.today = path / "incoming", Clock(), Clock()
        self.today.now = 2e9
        self.readings = Readings(path / "node")
        self.retention = Retention(**retention)
        self.begin()

    def begin(self) -> None:
        self.watched = WatchedFolder(self.path, Intake(self.readings), self.retention, self.clock, self.today)

    def put(self, name: str, body: bytes) -> Path:
        file = self.path / name
        file.write_bytes(body)
        return file

    def look(self, after: float = 0.0) -> list[str]:
        self.clock.now += after
        return [seen.said for seen in self.watched.look()]

    def taken(self) -> list[str]:
        """What there is to say once all has settled."""
        return self.look() + self.look(SETTLED_S)

    def files(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.path / name).iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    folder = Folder(tmp_path)
    yield folder
    folder.readings.close()


LINES = b'{"inputs": [1, 2], "target": 0}\n{"inputs": [3, 4]}\n'


def test_a_file_is_taken_and_moved(folder: Folder) -> None:
    folder.put("a.jsonl", LINES)
    assert folder.look() == []
    assert folder.look(SETTLED_S) == ["a.jsonl: 2 kept"]
    assert (folder.files("done"), folder.files("refused")) == (["a.jsonl"], [])
    assert (folder.path / "done" / "a.jsonl").read_bytes() == LINES
    assert (folder.readings.kept.count, folder.readings.kept.labelled) == (2, 1)
    assert folder.look(SETTLED_S) == []


def test_all_kinds_at_once(folder: Folder) -> None:
    out = io.BytesIO()
    np.savez(out, inputs=np.ones((3, 2), np.float32), target=np.arange(3))
    folder.put("a.npz", out.getvalue())
    folder.put("b.JSON", LINES)
    folder.put("c.txt", b"not of these")
    folder.put(".d.csv", b"not yet\n")
    folder.put("e.csv.part", b"not yet\n")
    assert folder.taken() == ["a.npz: 3 kept", "b.JSON: 2 kept"]
    assert folder.files(".") == [".d.csv", "c.txt", "done", "e.csv.part", "refused"]


def test_a_file_that_still_grows_is_left_until_it_is_whole(folder: Folder) -> None:
    file = folder.put("a.jsonl", LINES[:40])
    assert folder.look() == folder.look(SETTLED_S) == [], "it ends in the middle of a line"
    with file.open("ab") as more:
        more.write(LINES[40:])
    assert folder.look(SETTLED_S) == [], "it changed since"
    with file.open("ab") as more:
        more.write(LINES)
    assert folder.look(SETTLED_S - 0.1) == folder.look(SETTLED_S - 0.1) == []
    assert folder.look(0.2) == ["a.jsonl: 4 kept"]


def test_one_that_never_ends_is_taken_as_it_is(folder: Folder) -> None:
    folder.put("a.jsonl", LINES[:-1])
    folder.put("b.npz", b"PK\x03\x04")
    assert folder.look() == folder.look(PATIENCE_S - 0.1) == []
    assert folder.look(0.2) == ["a.jsonl: 2 kept", "b.npz: refused, it is not a .npz file: File is not a zip file"]


def test_what_is_refused_lies_there_with_the_reason_and_can_be_put_back(folder: Folder) -> None:
    folder.put("a.jsonl", LINES + b'{"inputs": [5, null]}\n{"inputs": [6, 6]}\n{"x": 1}\n')
    assert folder.taken() == ["a.jsonl: 3 kept, 2 refused, see refused/"]
    refused = folder.path / "refused"
    assert (refused / "a.jsonl").read_bytes() == b'{"inputs": [5, null]}\n{"x": 1}\n'
    assert (refused / "a.jsonl.reason").read_text() == (
        "line 3: its input is not an array of numbers: it has the dtype object\n"
        "line 5: it has no 'inputs', but 'x': send inputs, or define `prepare(reading)`\n"
    )
    assert folder.files("done") == ["a.jsonl"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in refused.iterdir()} == {0o600}
    mended = (refused / "a.jsonl").read_bytes().replace(b"null", b"5")
    folder.put("a.jsonl", mended)
    assert folder.taken() == ["a.jsonl: 1 kept, 1 refused, see refused/"]
    assert folder.readings.kept.count == 4
    assert folder.files("refused") == ["a.jsonl", "a.jsonl.reason", "a~2.jsonl", "a~2.jsonl.reason"]
    assert folder.files("done") == ["a.jsonl", "a~2.jsonl"]


def test_a_file_that_is_none_is_refused_whole(folder: Folder) -> None:
    folder.put("a.csv", b"a,a\n1,2\n")
    assert folder.taken() == ["a.csv: refused, line 1 gives two columns the name 'a': give each column its own name"]
    assert (folder.path / "refused" / "a.csv").read_bytes() == b"a,a\n1,2\n"
    assert (folder.path / "refused" / "a.csv.reason").read_text().startswith("line 1 gives two columns the name 'a'")


def test_one_that_is_too_large_is_not_read(folder: Folder) -> None:
    with (folder.path / "a.csv").open("wb") as file:
        file.truncate(2**40)
    (said,) = folder.taken()
    assert "1.1 TB, and at most" in said


def test_after_a_crash_before_the_move_it_is_not_kept_twice(folder: Folder) -> None:
    file = folder.put("a.jsonl", LINES)
    folder.look()
    before = folder.path.parent / "as it was"
    os.link(file, before)
    assert folder.look(SETTLED_S) == ["a.jsonl: 2 kept"]
    (folder.path / "done" / "a.jsonl").unlink()
    os.link(before, file)  # the move is undone: the same file lies there again
    folder.begin()
    assert folder.taken() == ["a.jsonl: nothing new"]
    assert folder.readings.kept.count == 2


def test_another_file_with_the_same_name_and_content_is_another(folder: Folder) -> None:
    for _ in range(2):
        folder.put("a.jsonl", LINES)
        assert folder.taken() == ["a.jsonl: 2 kept"]
    assert folder.files("done") == ["a.jsonl", "a~2.jsonl"]


def test_no_link_is_followed_and_nothing_else_is_touched(folder: Folder, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_bytes(b"inputs\n1\n")
    (folder.path / "link.csv").symlink_to(secret)
    (folder.path / "folder.csv").mkdir()
    os.mkfifo(folder.path / "pipe.csv")
    assert folder.taken() == folder.look(PATIENCE_S) == []
    assert secret.exists()


def test_where_nothing_can_be_kept_the_file_stays(folder: Folder) -> None:
    folder.put("a.jsonl", LINES)
    folder.look()
    folder.readings.close()
    folder.readings = Readings(folder.path.parent / "node")
    database: Any = vars(folder.readings)["_file"].database
    database.execute("PRAGMA query_only = ON")
    folder.begin()
    folder.look()
    with pytest.raises(ExperimentError, match="nothing can be stored in"):
        folder.look(SETTLED_S)
    assert folder.files("done") == []
    database.execute("PRAGMA query_only = OFF")
    assert folder.look(1.0) == ["a.jsonl: 2 kept"]


def test_what_is_done_goes_by_when_the_node_put_it_there(tmp_path: Path) -> None:
    folder = Folder(tmp_path, days=2, bytes=2 * len(LINES))
    for number in range(4):
        os.utime(folder.put(f"{number}.jsonl", LINES), (1e9, 1e9))  # years ago
        assert len(folder.taken()) == 1
        folder.today.now += 0.9 * DAY
    assert folder.files("done") == ["2.jsonl", "3.jsonl"]
    folder.today.now += 1.0 * DAY
    folder.look(60.0)
    assert folder.files("done") == ["3.jsonl"], "also when nothing comes"
    folder.readings.close()


def test_retention_deletes_nothing_that_somebody_else_put_there(tmp_path: Path) -> None:
    folder = Folder(tmp_path, days=2, bytes=10)
    for place in ("done", "refused"):
        os.utime(folder.put(f"{place}/holiday.mp4", b"x" * 1000), (1e9, 1e9))
    folder.put("a.jsonl", LINES)
    folder.put("b.csv", b"a,a\n1,2\n")
    folder.put("c.jsonl", LINES)
    folder.look()
    folder.path.joinpath("done/c.jsonl").write_bytes(b"of somebody else")
    folder.look(SETTLED_S)
    edited = folder.path / "refused" / "b.csv"
    folder.today.now += 3 * DAY
    folder.begin()
    folder.look(60.0)
    assert folder.files("done") == ["c.jsonl", "holiday.mp4"]
    assert folder.files("refused") == ["holiday.mp4"]
    edited.write_bytes(b"the only copy")
    folder.today.now += 3 * DAY
    folder.look(60.0)
    assert edited.exists()
    folder.readings.close()


def test_what_is_mended_in_refused_is_somebodys(tmp_path: Path) -> None:
    folder = Folder(tmp_path, days=2)
    folder.put("b.csv", b"a,a\n1,2\n")
    folder.taken()
    (folder.path / "refused" / "b.csv").write_bytes(b"a,b\n1,2\n")
    folder.today.now += 3 * DAY
    folder.look(60.0)
    assert folder.files("refused") == ["b.csv"]
    folder.readings.close()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Readings(tmp_path / "node") as readings:
        with pytest.raises(ExperimentError, match="cannot be watched"):
            WatchedFolder(tmp_path / "file", Intake(readings))
        watched = WatchedFolder(tmp_path / "gone", Intake(readings))
        shutil.rmtree(tmp_path / "gone")
        with pytest.raises(ExperimentError, match="cannot be watched"):
            watched.look()
