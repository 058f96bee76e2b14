"""The small parts of a node: since when a file is unchanged, where files go, what goes wrong, and forms of readings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.node.archive import Archive
from sumus.node.file_lines import added
from sumus.node.folder_state import DONE, UnchangedSince
from sumus.node.intake import IntakeResult
from sumus.node.ledger import FileState, Ledger
from sumus.node.reading import BadReading, Form, Reading, ReadingForms
from sumus.node.readings import DAY, Readings, Retention
from sumus.node.status import NodeStatus, NodeTroubles, ReadingStatus

STATES = st.builds(FileState, st.sampled_from("ab"), st.integers(0, 2), st.integers(0, 1))
LOOKS = st.lists(st.dictionaries(st.sampled_from(["x.csv", "y.csv"]), STATES), max_size=12)


@given(LOOKS)
def test_a_file_is_unchanged_since_the_first_look_that_found_it_so(looks: list[dict[str, FileState]]) -> None:
    since, model = UnchangedSince(), dict[str, tuple[FileState, int]]()
    for now, states in enumerate(looks):
        since.look(states, now)
        model = {
            name: model[name] if name in model and model[name][0] == state else (state, now)
            for name, state in states.items()
        }
        for name in ("x.csv", "y.csv"):
            assert since.seconds(name, now) == (now - model[name][1] if name in model else None)
        assert since.inodes() == {state.inode for state, _ in model.values()}


def test_a_file_in_another_place_is_known_until_it_is_forgotten() -> None:
    since, state = UnchangedSince(), FileState("1/2", 3, 4)
    since.note("done/x.csv", state, 10.0)
    since.look({}, 20.0)
    assert since.seconds("done/x.csv", 25.0, state) == 15.0
    assert since.seconds("done/x.csv", 25.0, FileState("1/2", 4, 4)) is None, "it has changed"
    since.forget("done/x.csv")
    assert since.seconds("done/x.csv", 25.0) is None


def test_a_file_that_is_moved_never_takes_anothers_place_and_old_ones_go(tmp_path: Path) -> None:
    now = [1000 * DAY]
    with Readings(tmp_path / "node") as readings:
        archive = Archive(tmp_path / "in", Ledger(readings), Retention(days=2, bytes=None), lambda: now[0])
        for number in range(3):
            path = tmp_path / "in" / "a.tar.gz"
            path.write_text(str(number))
            assert archive.move(path, archive.place(DONE, path.name), FileState.of(path.lstat()))
            now[0] += DAY
        done = tmp_path / "in" / DONE
        assert {path.name: path.read_text() for path in done.iterdir()} == {
            "a.tar.gz": "0",
            "a~2.tar.gz": "1",
            "a~3.tar.gz": "2",
        }
        (done / "mine.csv").write_text("of somebody else")
        archive.prune()
        assert sorted(path.name for path in done.iterdir()) == ["a~2.tar.gz", "a~3.tar.gz", "mine.csv"]
        gone = tmp_path / "in" / "gone.csv"
        assert not archive.move(gone, archive.place(DONE, "gone.csv"), FileState("1/1", 0, 0)), (
            "it was renamed meanwhile"
        )


def test_a_trouble_is_said_once_and_noted_until_it_is_over() -> None:
    said = list[str]()
    troubles = NodeTroubles(said.append)
    for what in ("full disk", "full disk", "no\ndisk"):
        troubles.tell("folder", what)
    troubles.note("training", "it waits")
    assert said == ["folder: full disk", "folder: no\\ndisk"]
    assert troubles.by_part() == {"folder": "no\\ndisk", "training": "it waits"}
    troubles.clear("folder")
    troubles.clear("mqtt")
    assert troubles.by_part() == {"training": "it waits"}


def test_a_status_is_the_json_that_the_plane_gives() -> None:
    status = NodeStatus(ReadingStatus(3, 2, 1, 300, 4.5), {"signs": 2}, 1, trouble={"mqtt": "away"})
    assert status.as_json() == {
        "readings": {"kept": 3, "labelled": 2, "new": 1, "bytes": 300, "oldest_s": 4.5},
        "models": {"signs": 2},
        "rounds": 1,
        "waits": "",
        "server": "",
        "phase": "",
        "trouble": {"mqtt": "away"},
    }


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([1, 2], "int64"), ([1, 2.5], "float32"), ([2.5, 1], "float32"), ([True, 2], "int64"), ([1, 1.0], "float32")],
)
def test_inputs_have_the_form_of_all_that_came(values: list[Any], dtype: str) -> None:
    forms = ReadingForms({})
    for value in values:
        arrays, known = forms.fitted(Reading([value]))
        forms.learn(known)
        assert arrays["input"].dtype == known["input"].dtype
    assert forms.known["input"] == Form((1,), dtype)


def test_a_declared_form_is_not_widened() -> None:
    forms = ReadingForms({"input": Form((1,), "int64")})
    forms.declare()
    with pytest.raises(BadReading, match="its input does not fit int64"):
        forms.fitted(Reading([1.5]))
    arrays, _ = forms.fitted(Reading([np.int32(7)]))
    assert forms.encoded("input", arrays["input"]) == np.int64(7).tobytes()


def test_what_several_parts_of_a_file_refuse_is_added_up() -> None:
    """Two parts that each refuse their second reading refuse two readings, by the numbers of the whole file."""
    first, second = IntakeResult(2, 0, 1, {1: "no number"}), IntakeResult(1, 1, 0, {1: "no text"})
    together = added([first, second])
    assert (together.kept, together.labelled, together.again) == (3, 1, 1)
    assert together.refused == {1: "no number", 5: "no text"}
