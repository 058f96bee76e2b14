"""What was kept is there: after a crash at any byte, once, in order, up to what the retention lets go of."""

import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sumus.errors import DataError, ExperimentError, UsageError
from sumus.node.reading import BadReading, Form, Reading
from sumus.node.readings import DAY, LONGEST_KEY, OVERHEAD, ReadingCounts, Readings, Retention
from sumus.node.readings_file import FILE
from sumus.task import Data

PAIR = Data(inputs=(2,), inputs_dtype="float32", targets=(), targets_dtype="int64", classes=3)


class Clock:
    """Seconds since 1970, which stand still."""

    now = 1e9

    def __call__(self) -> float:
        return self.now


def reading(number: int, target: int | None = 0, key: str | None = None) -> Reading:
    return Reading([number, -number], target, key)


def kept(readings: Readings, *given: Reading) -> list[str]:
    return list(readings.keep([readings.fit(one) for one in given]))


def first(readings: Readings) -> list[int]:
    """The first number of each input that has a target."""
    return [int(row[0]) for row in readings.examples()[0]]


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_kept_comes_back_oldest_first_also_from_the_next_process(tmp_path: Path) -> None:
    with Readings(tmp_path, PAIR) as readings:
        assert kept(readings, reading(1, 2), reading(2, 0)) == ["kept", "kept"]
        assert kept(readings, reading(3, 1)) == ["kept"]
    with Readings(tmp_path) as readings:
        inputs, targets = readings.examples()
        assert (inputs.dtype, targets.dtype) == (np.float32, np.int64)
        assert inputs.tolist() == [[1, -1], [2, -2], [3, -3]]
        assert targets.tolist() == [2, 0, 1]


def test_a_key_is_kept_once(tmp_path: Path) -> None:
    with Readings(tmp_path) as readings:
        assert kept(readings, reading(1, 0, "a"), reading(2, 0, "a"), reading(3, 0), reading(3, 0)) == [
            "kept", "other input", "kept", "kept",
        ]  # fmt: skip
        assert kept(readings, reading(1, 0, "a"), reading(1, None, "a")) == ["again", "again"]
        assert kept(readings, reading(9, 0, "a"), reading(1, 1, "a")) == ["other input", "other target"]
        assert first(readings) == [1, 3, 3]


def test_a_label_may_come_later_or_with_the_reading_again_or_be_corrected(tmp_path: Path) -> None:
    with Readings(tmp_path, PAIR) as readings:
        kept(readings, reading(1, None, "a"), reading(2, None, "b"), reading(3, None))
        assert readings.kept.labelled == 0
        assert first(readings) == []
        assert readings.label("b", 2)
        assert kept(readings, reading(8, 1, "a")) == ["other input"]
        assert kept(readings, reading(1, 1, "a")) == ["labelled"]
        assert kept(readings, reading(1, 0, "a")) == ["other target"], "the first target that comes for a key counts"
        assert readings.examples()[1].tolist() == [1, 2]
        assert readings.label("a", 0), "but a correction counts"
        assert kept(readings, reading(1, 1, "a")) == ["again"], "as it came before the correction"
        assert not readings.label("c", 0)
        assert readings.examples()[1].tolist() == [0, 2]
        assert (readings.kept.count, readings.kept.labelled) == (3, 2)
        with pytest.raises(BadReading, match="not a class from 0 to 2"):
            readings.label("a", 3)
        before = readings.kept
    with Readings(tmp_path) as readings:
        assert readings.kept == before


def test_a_first_whole_number_fixes_no_type(tmp_path: Path) -> None:
    """A sensor that says 21, and then 21.5."""
    with Readings(tmp_path) as readings:
        assert kept(readings, Reading([21, 40], 0, "a")) == ["kept"]
        assert kept(readings, Reading([21, 41], 1), Reading([21.5, 41], 1)) == ["kept", "kept"]
        assert readings.examples()[0].tolist() == [[21, 40], [21, 41], [21.5, 41]]
        assert readings.forms["input"].dtype == "float32"
        assert kept(readings, Reading([21, 40], 0, "a")) == ["again"]
        before = readings.kept
    with Readings(tmp_path) as readings:
        assert readings.kept == before
        assert readings.shaped([22, 0.5]).tolist() == [22, 0.5]
        with pytest.raises(BadReading, match="whole number that float32 cannot hold exactly"):
            readings.fit(Reading([2**24 + 1, 0], 0))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([[True], [2]], "int64"),
        ([[True], [0.5]], "float32"),
        ([np.ones(1, np.uint8), [300]], "int64"),
        ([np.ones(1, np.uint8), [3]], "uint8"),
        ([[1], [2]], "int64"),
    ],
)
def test_inputs_have_the_type_that_holds_all_of_them(values: Any, dtype: str, tmp_path: Path) -> None:
    with Readings(tmp_path) as readings:
        kept(readings, *(Reading(value, 0) for value in values))
        inputs = readings.examples()[0]
        assert inputs.dtype == dtype
        assert inputs.tolist() == [np.asarray(value).tolist() for value in values]


def test_a_task_that_declares_floats_takes_the_whole_numbers_that_were_kept_before(tmp_path: Path) -> None:
    with Readings(tmp_path) as readings:
        kept(readings, Reading([21, 40], 0))
    with Readings(tmp_path, PAIR) as readings:
        assert readings.examples()[0].dtype == np.float32
        assert readings.examples()[0].tolist() == [[21, 40]]


def test_a_reading_may_bring_its_own_time(tmp_path: Path) -> None:
    clock = Clock()
    with Readings(tmp_path, retention=Retention(days=2, count=3), clock=clock) as readings:
        kept(readings, *(Reading([n], n, at=clock.now - n * 1000.0) for n in (1, 3, 2)))
        assert readings.examples()[1].tolist() == [3, 2, 1], "the oldest first"
        assert readings.kept.oldest == clock.now - 3000
        kept(readings, Reading([4], 4, at=clock.now + 5000.0))
        assert readings.examples()[1].tolist() == [2, 1, 4], "the oldest goes first"
        with pytest.raises(BadReading, match="its time is 3.0 days ago, but readings are kept for only 2 days"):
            readings.fit(Reading([5], 5, at=clock.now - 3 * DAY))
        clock.now += 2 * DAY - 1500
        assert readings.examples()[1].tolist() == [1, 4], "the future is as old as now"


def test_a_file_of_the_release_before_is_read(tmp_path: Path) -> None:
    with Readings(tmp_path) as readings:
        kept(readings, reading(1, 2, "a"))
        database: sqlite3.Connection = vars(readings)["_file"].database
        database.execute("ALTER TABLE readings DROP COLUMN came")
    with Readings(tmp_path) as readings:
        assert kept(readings, reading(1, 2, "a"), reading(1, 1, "a")) == ["again", "other target"]


def test_without_a_target_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    with Readings(tmp_path) as readings:
        kept(readings, reading(1, None))
        with pytest.raises(DataError, match="no reading with a target yet"):
            readings.examples()


# ── the form ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([1.5], "float32"),
        (np.ones(1), "float32"),
        ([1], "int64"),
        (np.ones(1, np.int16), "int64"),
        (np.ones(1, np.uint8), "uint8"),
        ([True], "bool"),
    ],
)
def test_the_first_reading_gives_the_form(value: Any, dtype: str, tmp_path: Path) -> None:
    with Readings(tmp_path) as readings:
        kept(readings, Reading(value, 1.0))
        assert readings.forms == {"input": Form((1,), dtype), "target": Form((), "float32")}
    with Readings(tmp_path) as readings:
        assert readings.forms["input"].dtype == dtype


@pytest.mark.parametrize(
    ("input", "target", "why"),
    [
        ([1, 2, 3], 0, r"its input has the shape \[3\], but all others here have \[2\]"),
        ([[1, 2]], 0, r"the shape \[1, 2\]"),
        ([1, float("nan")], 0, r"its input contains a NaN or an infinity at \[1\]"),
        ([1, 1e39], 0, "its input contains a NaN or an infinity"),
        ([1, "2"], 0, "not an array of numbers"),
        ([1, None], 0, "not an array of numbers: it has the dtype object"),
        ([1, [2]], 0, "not an array of numbers"),
        ([1, 1j], 0, "not an array of numbers: it has the dtype complex128"),
        (None, 0, "it has no input"),
        ([1, 2], 0.5, "its target does not fit int64"),
        ([1, 2], float("nan"), "its target does not fit int64"),
        ([1, 2], 3, "not a class from 0 to 2"),
        ([1, 2], 2**70, "not an array of numbers"),
        ([1, 2], 2**63, "its target does not fit"),
        ([1, 2], [0], r"its target has the shape \[1\]"),
    ],
)
def test_what_does_not_fit_is_refused_and_says_why(input: Any, target: Any, why: str, tmp_path: Path) -> None:
    with Readings(tmp_path, PAIR) as readings:
        with pytest.raises(BadReading, match=why):
            readings.fit(Reading(input, target))
        assert kept(readings, reading(1), Reading([1, 2], 2.0), Reading([1, 2], -100)) == ["kept"] * 3


@pytest.mark.parametrize("key", ["", "a\nb", "k" * (LONGEST_KEY + 1), "a\0"])
def test_a_key_is_a_short_text(key: str, tmp_path: Path) -> None:
    with Readings(tmp_path) as readings, pytest.raises(BadReading, match="its key"):
        readings.fit(reading(1, 0, key))


def test_a_refused_reading_gives_no_form(tmp_path: Path) -> None:
    with Readings(tmp_path) as readings:
        with pytest.raises(BadReading):
            readings.fit(Reading([1, 2, 3], float("inf")))
        assert kept(readings, Reading([[1]], 0)) == ["kept"]


def test_another_task_is_told_so(tmp_path: Path) -> None:
    with Readings(tmp_path, PAIR) as readings:
        kept(readings, reading(1))
    with pytest.raises(ExperimentError, match=r"float32\[2\], but the task's are float32\[3\]: give a new folder"):
        Readings(tmp_path, Data((3,), "float32", (), "int64"))
    Readings(tmp_path, Data((2,), "bfloat16", (), "int64")).close()


# ── retention ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_oldest_go_first_by_number(tmp_path: Path) -> None:
    with Readings(tmp_path, retention=Retention(count=3)) as readings:
        kept(readings, *map(reading, range(5)))
        assert first(readings) == [2, 3, 4]
        kept(readings, reading(5))
        assert first(readings) == [3, 4, 5]
        assert readings.kept.count == 3
    with Readings(tmp_path, retention=Retention(count=1)) as readings:
        assert first(readings) == [5], "a smaller number counts from the start"


def test_by_age_also_while_nothing_comes(tmp_path: Path) -> None:
    clock = Clock()
    with Readings(tmp_path, retention=Retention(days=2), clock=clock) as readings:
        kept(readings, reading(1))
        clock.now += DAY
        kept(readings, reading(2, None, "a"))
        clock.now += 1.5 * DAY
        assert first(readings) == []
        assert readings.kept == ReadingCounts(1, 0, OVERHEAD + 2 * 8 + 1, clock.now - 1.5 * DAY)
        clock.now += DAY
        readings.let_go()
        assert readings.kept == ReadingCounts()
        assert not readings.label("a", 0)


def test_by_bytes_and_the_file_stays_small(tmp_path: Path) -> None:
    most = 200_000
    with Readings(tmp_path, retention=Retention(bytes=most)) as readings:
        for number in range(20):
            kept(readings, *(Reading(np.full(32, number, np.float32), 0, f"{number}/{row}") for row in range(200)))
            assert readings.kept.bytes <= most
        count = readings.kept.count
        assert count == len(first(readings)) > most // (128 + 8 + OVERHEAD + 10) - 2
        assert first(readings)[-1] == 19
    assert (tmp_path / FILE).stat().st_size < 1.5 * most + 100_000
    with Readings(tmp_path, retention=Retention(bytes=200)) as readings:
        with pytest.raises(
            BadReading, match="it has 216 bytes, and at most 200 bytes are kept for all readings together"
        ):
            readings.fit(Reading(np.zeros(32), 0))


@pytest.mark.parametrize("wrong", [{"days": 0.0}, {"count": -1}, {"bytes": 0}, {"days": float("nan")}])
def test_nothing_is_no_retention(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="give a finite number greater than 0"):
        Retention(**wrong)


def test_what_has_gone_is_overwritten(tmp_path: Path) -> None:
    secret = b"a secret of the kitchen"
    with Readings(tmp_path, retention=Retention(count=1)) as readings:
        kept(readings, Reading(np.frombuffer(secret, np.uint8), 0))
        kept(readings, Reading(np.zeros(len(secret), np.uint8), 0))
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "closing it folds in what lay beside it"
    assert secret not in (tmp_path / FILE).read_bytes()


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_its_owners_alone_and_one_process_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    with Readings(folder) as readings:
        kept(readings, reading(1))
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
        with pytest.raises(ExperimentError, match="another process uses the readings"):
            Readings(folder)
    Readings(folder).close()


def test_a_damaged_file_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(ExperimentError, match="is damaged"):
        Readings(tmp_path)


def test_a_full_disk_keeps_nothing_of_a_batch_and_harms_nothing(tmp_path: Path) -> None:
    with Readings(tmp_path) as readings:
        kept(readings, reading(1, 0, "a"))
        before = readings.kept
        database: sqlite3.Connection = vars(readings)["_file"].database
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(
            ExperimentError, match="database or disk is full; check the disk. The stored data are unchanged"
        ):
            kept(readings, *(reading(number, 0, f"b{number}") for number in range(5000)))
        assert readings.kept == before
        assert first(readings) == [1]
        database.execute("PRAGMA max_page_count = 1000000")
        assert kept(readings, reading(2, 0, "b2")) == ["kept"]
        assert first(readings) == [1, 2]


class Crashing(RuleBasedStateMachine):
    """A store beside a list. A crash leaves the files as they are at some byte of what was being written."""

    @initialize(count=st.none() | st.integers(1, 12), days=st.none() | st.integers(1, 3))
    def begin(self, count: int | None, days: int | None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sumus-readings-"))
        self.folders = [self.folder]
        self.clock, self.retention = Clock(), Retention(days=days, count=count)
        self.readings = self.opened()
        self.model: list[tuple[int, int | None, str | None, float]] = []

    def opened(self) -> Readings:
        return Readings(self.folder, retention=self.retention, clock=self.clock)

    batches = st.lists(
        st.tuples(st.integers(0, 3), st.none() | st.integers(0, 9), st.none() | st.sampled_from("abcd")), max_size=4
    )

    def kept_in(self, model: list[Any], batch: list[Any]) -> list[Any]:
        """What there is once a batch is kept."""
        model = list(model)
        for number, target, key in batch:
            at = next((n for n, row in enumerate(model) if key is not None and row[2] == key), None)
            if at is None:
                model.append((number, target, key, self.clock.now))
            elif model[at][1] is None and model[at][0] == number:
                model[at] = (model[at][0], target, *model[at][2:])
        return self.left_of(model)

    def left_of(self, model: list[Any]) -> list[Any]:
        if self.retention.days is not None:
            model = [row for row in model if row[3] >= self.clock.now - self.retention.days * DAY]
        return model[-self.retention.count :] if self.retention.count else model

    @rule(batch=batches)
    def keep(self, batch: list[Any]) -> None:
        kept(self.readings, *(reading(*one) for one in batch))
        self.model = self.kept_in(self.model, batch)

    @rule(key=st.sampled_from("abcd"), value=st.integers(0, 9))
    def label(self, key: str, value: int) -> None:
        found = self.readings.label(key, value)
        assert found == any(row[2] == key for row in self.model)
        self.model = [(row[0], value, *row[2:]) if row[2] == key else row for row in self.model]

    @rule(days=st.floats(0.1, 2))
    def wait(self, days: float) -> None:
        self.clock.now += days * DAY
        self.readings.let_go()
        self.model = self.left_of(self.model)

    @rule()
    def restart(self) -> None:
        self.readings.close()
        self.readings = self.opened()

    @rule()
    def crash(self) -> None:
        self.go_on_from(lambda folder: None)

    @rule(batch=batches, share=st.floats(0, 1))
    def crash_while_keeping(self, batch: list[Any], share: float) -> None:
        log = self.folder / f"{FILE}-wal"
        before = log.stat().st_size
        kept(self.readings, *(reading(*one) for one in batch))
        after = log.stat().st_size
        written = before + round(
            share * (after - before)
        )  # new bytes only come after old ones, until they are folded in

        def cut(folder: Path) -> None:
            with (folder / log.name).open("r+b") as file:
                file.truncate(written)

        self.go_on_from(cut)
        found, whole = self.rows(), self.kept_in(self.model, batch)
        assert found in (self.model, whole), "all of a batch, or nothing of it"
        assert found == whole or written < after
        self.model = found

    def go_on_from(self, harm: Callable[[Path], None]) -> None:
        """As the next process finds it."""
        folder = Path(tempfile.mkdtemp(prefix="sumus-readings-"))
        for path in self.folder.iterdir():
            shutil.copy(path, folder)
        harm(folder)
        self.readings.close()
        self.folder = folder
        self.folders.append(folder)
        self.readings = self.opened()

    def rows(self) -> list[Any]:
        database: sqlite3.Connection = vars(self.readings)["_file"].database
        rows = database.execute("SELECT input, target, key, at FROM readings ORDER BY number").fetchall()
        return [
            (int(np.frombuffer(i, np.int64)[0]), None if t is None else int(np.frombuffer(t, np.int64)[0]), k, at)
            for i, t, k, at in rows
        ]

    @invariant()
    def it_is_as_the_list(self) -> None:
        assert self.rows() == self.model
        now, labelled = self.readings.kept, [row for row in self.model if row[1] is not None]
        assert (now.count, now.labelled) == (len(self.model), len(labelled))
        keys = sum(len(row[2] or "") for row in self.model)
        assert now.bytes == len(self.model) * (16 + OVERHEAD) + 8 * len(labelled) + keys
        if labelled:
            assert first(self.readings) == [row[0] for row in labelled]

    def teardown(self) -> None:
        self.readings.close()
        for folder in self.folders:
            shutil.rmtree(folder)


Crashing.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestCrashing = Crashing.TestCase
