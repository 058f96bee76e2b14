"""Files that grow, rotate, are begun anew or come back: each complete row is kept once. `benchmarks.growing` runs longer."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.growing import run
from sumus.node.folder import WatchedFolder
from sumus.node.folder_state import PATIENCE_S, SETTLED_S
from sumus.node.intake import Intake
from sumus.node.readings import Readings
from sumus.node.whole_files import LateWrites


@pytest.mark.parametrize("follow", [False, True])
def test_beside_a_writer_each_row_is_kept_once(follow: bool, tmp_path: Path) -> None:
    found = run(tmp_path, 1, 30, follow)
    assert (found["lost"], found["twice"], found["wrong"]) == ([], [], [])
    assert found["rows"] > 50


def test_the_writer_finds_what_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: a node that never looks at what it moved loses rows, and the run says so."""
    monkeypatch.setattr(LateWrites, "take", lambda self, now: iter(()))
    assert any(run(tmp_path / str(seed), seed, 30, False)["lost"] for seed in range(3))


class Folder:
    """A watched folder, and time."""

    def __init__(self, path: Path, follow: bool) -> None:
        self.path, self.now, self.follow = path / "incoming", 1000.0, follow
        self.readings = Readings(path / "node")
        self.begin()

    def begin(self) -> None:
        def prepare(raw: Any) -> tuple[Any, Any]:
            return [raw["a"]], raw["b"]

        clock = lambda: self.now  # noqa: E731
        self.watched = WatchedFolder(self.path, Intake(self.readings, prepare), clock=clock, follow=self.follow)

    def look(self, after: float = SETTLED_S) -> list[str]:
        self.now += after
        return [seen.said for seen in self.watched.look()]

    def add(self, name: str, text: str) -> None:
        with (self.path / name).open("a") as file:
            file.write(text)

    @property
    def kept(self) -> list[int]:
        return sorted(int(each[0]) for each in self.readings.examples()[0]) if self.readings.kept.count else []

    def close(self) -> None:
        self.watched.close()
        self.readings.close()


@pytest.fixture
def moved(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path, follow=False)
    yield folder
    folder.close()


@pytest.fixture
def followed(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path, follow=True)
    yield folder
    folder.close()


def test_rows_for_an_open_file_are_taken_after_it_was_moved(moved: Folder) -> None:
    with (moved.path / "a.csv").open("w") as file:
        file.write("a,b\n1,0\n")
        file.flush()
        assert moved.look() + moved.look() == ["a.csv: 1 kept"]
        file.write("2,0\n3,")
        file.flush()
        assert moved.look() == ["a.csv: 1 kept"]
        moved.begin()
        file.write("0\n")
        file.flush()
        assert moved.look() == ["a.csv: 1 kept"]
    assert moved.look() == moved.look(PATIENCE_S) == []
    assert moved.kept == [1, 2, 3]


def test_rows_that_come_under_the_same_name_have_its_names(moved: Folder) -> None:
    moved.add("a.csv", "a;b\n0,5;0\n")
    assert moved.look() + moved.look() == ["a.csv: 1 kept"]
    moved.add("a.csv", "1,021;0\n")
    assert moved.look() + moved.look() == ["a.csv: 1 kept"]
    moved.add("b.csv", "1,021;0\n")
    assert "refused, " in (moved.look() + moved.look())[0], "nothing says what these are"
    assert moved.readings.examples()[0].ravel().tolist() == pytest.approx([0.5, 1.021])


def test_a_longer_version_of_a_file_brings_what_is_new(moved: Folder) -> None:
    for text, said in (("a,b\n1,0\n", "1 kept"), ("a,b\n1,0\n2,0\n", "1 kept"), ("a,b\n5,0\n", "1 kept")):
        (moved.path / "a.csv").write_text(text)
        assert moved.look() + moved.look() == [f"a.csv: {said}"]
    assert moved.kept == [1, 2, 5]


def test_a_line_that_was_taken_without_its_end_is_taken_again_with_it(moved: Folder) -> None:
    file = (moved.path / "a.csv").open("w")
    file.write("a,b\n1,0\n2,1")
    file.flush()
    assert moved.look() + moved.look(PATIENCE_S) == ["a.csv: 2 kept"]
    file.write("2\n")
    file.close()
    assert moved.look() == ["a.csv: 1 kept"]
    assert sorted(moved.readings.examples()[1].tolist()) == [0, 12]


def test_a_file_that_takes_the_place_of_one_that_was_read_is_read_too(
    moved: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved.add("a.csv", "a,b\n1,0\n")
    moved.look()
    rename = Path.rename

    def replaced_before(self: Path, to: Path) -> Path:
        if self.name == "a.csv":
            (moved.path / ".new").write_text("a,b\n2,0\n")
            os.replace(moved.path / ".new", self)
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", replaced_before)
    assert moved.look() == ["a.csv: 1 kept", "a.csv: 1 kept"]
    assert moved.kept == [1, 2]


def test_a_followed_file_stays_and_each_line_is_taken_with_its_end(followed: Folder) -> None:
    followed.add("a.csv", "a,b\n1,0\n2,")
    assert followed.look() == ["a.csv: 1 kept"]
    assert followed.watched.state.as_json()["waiting"]["files"] == 0
    followed.look()
    assert followed.watched.state.waiting == {"a.csv": "its last line has no line end"}
    followed.add("a.csv", "0\n3,0\n")
    followed.look()
    assert followed.kept == [1, 2, 3]
    (followed.path / "a.csv").rename(followed.path / "a.csv.1")
    followed.add("a.csv.1", "4,0\n")
    followed.add("a.csv", "a,b\n5,0\n")
    followed.look()
    assert followed.kept == [1, 2, 3, 4, 5]
    followed.begin()
    followed.look()
    assert followed.kept == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in followed.path.iterdir()) == ["a.csv", "a.csv.1", "done", "refused"]


def test_a_followed_file_may_be_copied_and_begun_anew(followed: Folder) -> None:
    followed.add("a.csv", "a,b\n1,0\n2,0\n")
    followed.look()
    followed.add("a.csv", "3,0\n")
    (followed.path / "a-1.csv").write_bytes((followed.path / "a.csv").read_bytes())
    (followed.path / "a.csv").write_text("a,b\n4,0\n")
    followed.look()
    followed.look()
    assert followed.kept == [1, 2, 3, 4]


def test_the_last_lines_of_a_file_that_goes_are_taken(followed: Folder) -> None:
    followed.add("a.csv", "a,b\n1,0\n")
    followed.look()
    followed.add("a.csv", "2,0\n")
    (followed.path / "a.csv").unlink()
    followed.look()
    followed.look(PATIENCE_S)
    assert followed.kept == [1, 2]


def test_a_quote_that_is_not_closed_yet_is_waited_for(followed: Folder) -> None:
    followed.add("a.csv", 'a,b,c\n1,0,x\n2,0,"win')
    followed.look()
    followed.add("a.csv", "dow\n")
    followed.look()
    assert followed.kept == [1]
    followed.add("a.csv", 'open"\n3,0,y\n')
    followed.look()
    assert followed.kept == [1, 2, 3]


def test_a_followed_file_that_cannot_be_read_is_said_once(followed: Folder) -> None:
    followed.add("a.csv", "a,a\n1,2\n")
    assert "gives two columns the name" in followed.look()[0]
    followed.add("a.csv", "1,2\n")
    assert followed.look() == []
    assert "gives two columns the name" in followed.watched.state.waiting["a.csv"]


def test_rows_of_a_followed_file_that_are_refused_are_there_with_the_reason(followed: Folder) -> None:
    followed.add("a.csv", "a,b\n1,0\nx,0\n")
    assert followed.look() == ["a.csv: 1 kept, 1 refused, see refused/"]
    assert (followed.path / "refused" / "a.csv").read_text() == "a,b\nx,0\n"
    assert (followed.path / "refused" / "a.csv.reason").read_text().startswith("line 3: ")


def test_a_file_of_which_nothing_is_kept_has_one_reason(moved: Folder) -> None:
    moved.add("a.csv", "a (m),b\n1,0\n2,0\n")
    (said,) = moved.look() + moved.look()
    assert said == ("a.csv: refused, none of its 2 readings can be kept: prepare: KeyError: 'a'; it has 'a (m)', 'b'")
    assert (moved.path / "refused" / "a.csv").read_text() == "a (m),b\n1,0\n2,0\n"
    reasons = (moved.path / "refused" / "a.csv.reason").read_text().splitlines()
    assert [line.partition(":")[0] for line in reasons[1:]] == ["line 2", "line 3"]


def test_what_waits_and_what_is_left_alone_is_in_the_state(moved: Folder) -> None:
    moved.add("a.csv", "a,b\n1,0")
    moved.add("b.xlsx", "PK")
    moved.look()
    moved.look()
    state = moved.watched.state.as_json()
    assert state["waiting"]["first"] == {
        "a.csv": f"it does not end like a complete file; after {PATIENCE_S:g} s without a change it is read as it is"
    }
    assert state["left_alone"] == {"files": 1, "first": {"b.xlsx": "files with this ending are not read"}}
    assert state["refused"] == 0
