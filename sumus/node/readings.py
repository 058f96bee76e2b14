"""What a node keeps: readings, each an input and, from the first or later, its target.

    readings = Readings(folder, retention=Retention(days=30))
    readings.keep([Reading(input, target, key="kitchen/17")])      on the disk when it returns
    readings.label("kitchen/18", 1)                                a label that came later
    inputs, targets = readings.examples()                          those with a target, oldest first

One SQLite file of its owner's alone, which one process has. A reading without a target is kept, and trains nothing until it is
labelled. All inputs have one shape and dtype, and so have all targets: as the task declares them, or as the first one's.
"""

import math
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from sumus.errors import DataError, ExperimentError, UsageError
from sumus.metrics import IGNORED
from sumus.storage.files import sync
from sumus.task import Data
from sumus.text import over
from sumus.types import Array

FILE = "readings.db"
LONGEST_KEY = 200
OVERHEAD = 80
"""Bytes that a reading takes on the disk besides its input, target and key, about."""
DAY = 86400.0
_SIZE = f"(length(input) + coalesce(length(target), 0) + coalesce(length(CAST(key AS BLOB)), 0) + {OVERHEAD})"
_TABLES = """
CREATE TABLE IF NOT EXISTS readings (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, key TEXT UNIQUE, input BLOB NOT NULL, target BLOB, came BLOB
);
CREATE INDEX IF NOT EXISTS by_time ON readings (at);
CREATE TABLE IF NOT EXISTS forms (what TEXT PRIMARY KEY, form TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS targets (what TEXT PRIMARY KEY, number INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, inode TEXT NOT NULL, offset INTEGER NOT NULL, mark BLOB NOT NULL,
    size INTEGER NOT NULL, changed INTEGER NOT NULL, head BLOB NOT NULL, decimal TEXT NOT NULL, separator TEXT NOT NULL,
    half TEXT NOT NULL, at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS topics (topic TEXT PRIMARY KEY, mark BLOB NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS moved (
    place TEXT PRIMARY KEY, inode TEXT NOT NULL, size INTEGER NOT NULL, changed INTEGER NOT NULL, at REAL NOT NULL
);
"""
_COLUMNS_SINCE = {"came": "BLOB"}
"""Columns of readings that files of earlier releases have not. came: the target that came with the reading itself."""

Became: TypeAlias = Literal["kept", "labelled", "again", "other input", "other target"]
"""What became of a reading: kept; here already without its target, which it now has; here already; not kept, since its key is
here with another input, or with another target."""


class BadReading(UsageError):
    """A reading that cannot be kept, or predicted for: the message says why."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One example.

    Attributes:
        input: an array, or numbers.
        target: an array, or numbers; None if it is not known yet.
        key: under which the reading is kept once, however often it comes; None for one that is new each time.
        at: when the reading was made, in seconds since 1970; None for when it comes.
    """

    input: Any
    target: Any = None
    key: str | None = None
    at: float | None = None


@dataclass(frozen=True)
class Retention:
    """How much is kept: by age in days, by number, and by bytes. The oldest go first; None for without end. A reading's age
    counts from its own time, if it brings one, else from when it came."""

    days: float | None = None
    count: int | None = None
    bytes: int | None = 2**28

    def __post_init__(self) -> None:
        for name in ("days", "count", "bytes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"keep {name}={value!r}: it must be more than nothing")


USUAL = Retention()


@dataclass(frozen=True)
class ReadingCounts:
    """What there is. labelled: of these, with a target.  oldest: its time, in seconds since 1970.  new: of those with a target,
    how many had it, or got another one, since a round was trained on them that was counted."""

    count: int = 0
    labelled: int = 0
    bytes: int = 0
    oldest: float | None = None
    new: int = 0


@dataclass(frozen=True)
class Form:
    """Shape and dtype of one input, or of one target. classes: of a target, it lies in [0, classes)."""

    shape: tuple[int, ...]
    dtype: str
    classes: int | None = None

    def fit(self, value: Any, what: str) -> Array:
        """A value as an array of this form. BadReading where it is none, or not finite."""
        array = _array(value, what)
        if array.shape != self.shape:
            raise BadReading(f"its {what} is of shape {list(array.shape)}, and here they are of {list(self.shape)}")
        with np.errstate(over="ignore", invalid="ignore"):
            fitted = array.astype(self.dtype)
        if fitted.dtype.kind == "f":
            if array.dtype.kind in "iu" and not (fitted.astype(np.longdouble) == array).all():
                raise BadReading(
                    f"its {what} holds a whole number that {self.dtype} rounds: make it smaller, in `prepare`"
                )
            if not np.isfinite(fitted).all():
                at = [int(axis[0]) for axis in np.nonzero(~np.isfinite(fitted))] if fitted.ndim else []
                raise BadReading(f"its {what} holds a NaN or an infinity{f' at {at}' if at else ''}")
        elif not (fitted == array).all():
            raise BadReading(
                f"its {what} is no {self.dtype}: {array.dtype} with other values; data= of the task says which type it has"
            )
        if self.classes is not None and bool(((fitted != IGNORED) & ((fitted < 0) | (fitted >= self.classes))).any()):
            raise BadReading(f"its {what} is no class from 0 to {self.classes - 1}")
        return fitted

    def widened(self, value: Any) -> "Form":
        """The form that also holds a value of another dtype, where this one came from the values so far: a first whole number
        does not make all of them whole."""
        array = _array(value, "input")
        if array.shape != self.shape or self.dtype == "float32":
            return self
        if array.dtype.kind == "f":
            return Form(self.shape, "float32")
        return self if bool((array.astype(self.dtype) == array).all()) else Form(self.shape, "int64")

    @staticmethod
    def of(value: Any, what: str) -> "Form":
        """The form of a first value: floats as float32, whole numbers as int64; bytes and booleans of inputs as they are."""
        array = _array(value, what)
        if array.dtype.kind == "f":
            return Form(array.shape, "float32")
        return Form(
            array.shape, array.dtype.name if what == "input" and array.dtype.name in ("uint8", "bool") else "int64"
        )


def _array(value: Any, what: str) -> Array:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise BadReading(f"its {what} is no array of numbers: {error!s:.100}") from error
    if array.dtype.kind not in "biuf":
        raise BadReading(f"its {what} is no array of numbers: it has the dtype {array.dtype}")
    return array


def forms_of(data: Data | None) -> dict[str, Form]:
    """The forms that a task's data declare, for inputs and targets."""
    if data is None:
        return {}
    widened = {"float16": "float32", "bfloat16": "float32"}
    return {
        "input": Form(tuple(data.inputs), widened.get(data.inputs_dtype, data.inputs_dtype)),
        "target": Form(tuple(data.targets), widened.get(data.targets_dtype, data.targets_dtype), data.classes),
    }


class Readings:
    """A node's readings. Any thread may call.

    folder: where they lie.  data: their form, where it is known before the first one comes.  clock: seconds since 1970.
    ExperimentError where another process has them, where they are of another form, or where nothing can be kept.
    """

    def __init__(
        self,
        folder: str | Path,
        data: Data | None = None,
        retention: Retention = USUAL,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.retention = retention
        self._clock, self._lock = clock, threading.Lock()
        self._path = Path(folder).absolute() / FILE  # of a relative path that begins with `file:`, SQLite makes a URI
        self._database = self._opened()
        try:
            self._targets = dict(self._database.execute("SELECT what, number FROM targets"))
            self._kept = self._shown = self._counted()
            self._targets.setdefault("given", self._kept.labelled)
            self._read = 0
            self._declared = frozenset(forms_of(data))
            self._forms = self._same_forms(forms_of(data))
            self.let_go()
        except BaseException:
            self._database.close()
            raise

    # ── what comes ───────────────────────────────────────────────────────────────────────────────────────────────────

    def fit(self, reading: Reading) -> Reading:
        """A reading in the form of what is kept here: arrays of one dtype. The first one gives the form. BadReading for what does
        not fit."""
        if reading.key is not None and not (0 < len(reading.key) <= LONGEST_KEY and reading.key.isprintable()):
            raise BadReading(f"its key is no text of 1 to {LONGEST_KEY} letters")
        with self._lock:
            forms, fitted = dict(self._forms), dict[str, Array]()
            for what, value in (("input", reading.input), ("target", reading.target)):
                if value is not None:
                    forms[what] = self._form(what, value)
                    fitted[what] = forms[what].fit(value, what)
            if "input" not in fitted:
                raise BadReading("it has no input")
            size, most = sum(array.nbytes for array in fitted.values()) + OVERHEAD, self.retention.bytes
            if most is not None and size > most:
                raise BadReading(f"it has {over(size, most)} are kept here altogether")
            now, days = self._clock(), self.retention.days
            if reading.at is not None and days is not None and reading.at < now - days * DAY:
                raise BadReading(
                    f"its time is {(now - reading.at) / DAY:.1f} days ago, and readings of {days:g} "
                    f"{'day' if days == 1 else 'days'} are kept"
                )
            if forms["input"] != self._forms.get("input", forms["input"]):
                self._convert("input", forms["input"])
            self._forms = forms
        return Reading(fitted["input"], fitted.get("target"), reading.key, reading.at)

    def _form(self, what: str, value: Any) -> Form:
        form = self._forms.get(what) or Form.of(value, what)
        return form.widened(value) if what == "input" and what not in self._declared else form

    def _convert(self, what: Literal["input"], form: Form) -> None:
        """Write what is kept in another dtype, which holds the same values."""
        before = self._forms[what]
        with self._transaction() as database:
            for number, body in database.execute("SELECT number, input FROM readings").fetchall():
                values = form.fit(np.frombuffer(body, before.dtype).reshape(before.shape), what)
                database.execute("UPDATE readings SET input = ? WHERE number = ?", (values.tobytes(), number))
            database.execute(
                "INSERT OR REPLACE INTO forms (what, form) VALUES (?, ?)", (what, msgspec.json.encode(form).decode())
            )
            self._kept = self._counted()
        self._forms = {**self._forms, what: form}

    def shaped(self, input: Any) -> Array:
        """An input in the form of what is kept here, as far as that is known. BadReading for what does not fit."""
        return self._form("input", input).fit(input, "input")

    def keep(
        self, readings: Sequence[Reading], beside: Callable[[sqlite3.Connection], None] | None = None
    ) -> list[Became]:
        """Keep readings that `fit`: all or, where it raises, none; on the disk when it returns. What became of each.

        The first target that comes for a key counts; `label` sets another. What is too much then goes with the same step.

        Args:
            readings: that `fit` gave.
            beside: writes what is to be remembered with them, in the same step.
        """
        became: list[Became] = []
        with self._lock, self._transaction() as database:
            now = self._clock()
            for reading in readings:
                input, target = self._bytes("input", reading.input), self._bytes("target", reading.target)
                at = now if reading.at is None else min(reading.at, now)
                row = database.execute(
                    "INSERT OR IGNORE INTO readings (at, key, input, target, came) VALUES (?, ?, ?, ?, ?)",
                    (at, reading.key, input, target, target),
                )
                if row.rowcount:
                    became.append("kept")
                    key = len((reading.key or "").encode())
                    self._count(1, target is not None, len(input or b"") + len(target or b"") + key + OVERHEAD)
                else:
                    became.append(self._again(database, reading.key or "", input, target))
            self._keep_forms(database)
            self._let_go(database, now)
            if beside is not None:
                beside(database)
        return became

    def _bytes(self, what: str, array: Array | None) -> bytes | None:
        """As it is kept: in the dtype of now, since a reading after it may have widened that."""
        return None if array is None else array.astype(self._forms[what].dtype).tobytes()

    def _again(self, database: sqlite3.Connection, key: str, input: bytes | None, target: bytes | None) -> Became:
        """What becomes of a reading whose key is here."""
        same, before, came = database.execute(
            "SELECT input = ?, target, came FROM readings WHERE key = ?", (input, key)
        ).fetchone()
        if not same:
            return "other input"
        if target is None or (before is not None and target in (before, came)):
            return "again"
        if before is not None:
            return "other target"
        database.execute("UPDATE readings SET target = ?, came = ? WHERE key = ?", (target, target, key))
        self._count(0, 1, len(target))
        return "labelled"

    def withdraw(self, keys: Sequence[str]) -> None:
        """Delete readings by their keys: of a line that was read before it was whole."""
        with self._lock, self._transaction() as database:
            database.executemany("DELETE FROM readings WHERE key = ?", [(key,) for key in keys])
            self._kept = self._counted()

    def has(self, key: str) -> bool:
        """Whether there is a reading under a key."""
        with self._lock, self._reading():
            return self._database.execute("SELECT 1 FROM readings WHERE key = ?", (key,)).fetchone() is not None

    def rows(self, table: str) -> list[Any]:
        """All rows of a table that a node keeps in this file, by their time."""
        with self._lock, self._reading():
            return self._database.execute(f"SELECT * FROM {table} ORDER BY at").fetchall()

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection, None, None]:
        """The database, for what else a node keeps in this file: all of it or nothing."""
        with self._lock, self._transaction() as database:
            yield database

    def label(self, key: str, target: Any) -> bool:
        """Give a reading its target, or another one; whether there is such a reading. On the disk when it returns."""
        with self._lock:
            form = self._forms.get("target") or Form.of(target, "target")
            encoded = form.fit(target, "target").tobytes()
            with self._transaction() as database:
                found = database.execute("SELECT length(target), target FROM readings WHERE key = ?", (key,)).fetchone()
                if found is None:
                    return False
                if found[0] is not None and found[1] != encoded:
                    self._targets["given"] += 1
                database.execute("UPDATE readings SET target = ? WHERE key = ?", (encoded, key))
                self._forms = {**self._forms, "target": form}
                self._keep_forms(database)
                self._count(0, found[0] is None, len(encoded) - (found[0] or 0))
        return True

    def let_go(self) -> None:
        """Delete what is too old, or too much."""
        with self._lock, self._transaction() as database:
            self._let_go(database, self._clock())

    # ── what there is ────────────────────────────────────────────────────────────────────────────────────────────────

    def examples(self) -> tuple[Array, Array]:
        """Inputs and targets of the readings that have a target, oldest first: for `sumus.Device`, which asks each round."""
        self.let_go()
        with self._lock, self._reading():
            self._read = self._targets["given"]
            if not {"input", "target"} <= set(self._forms):
                raise DataError("this node", "it has no reading with a target yet")
            inputs, targets = (
                np.empty((self._kept.labelled, *self._forms[what].shape), self._forms[what].dtype)
                for what in ("input", "target")
            )
            rows = self._database.execute(
                "SELECT input, target FROM readings WHERE target IS NOT NULL ORDER BY at, number"
            )
            for number, (input, target) in enumerate(rows):
                inputs[number] = np.frombuffer(input, inputs.dtype).reshape(inputs.shape[1:])
                targets[number] = np.frombuffer(target, targets.dtype).reshape(targets.shape[1:])
        return inputs, targets

    def note_trained(self) -> None:
        """A round was trained on the examples that were read last."""
        self._note_targets(trained=self._read)

    def note_counted(self) -> None:
        """The report of the last such round is counted: what it was trained on is new no more."""
        self._note_targets(counted=max(self._targets.get("trained", 0), self._targets.get("counted", 0)))

    def _note_targets(self, **numbers: int) -> None:
        with self._lock, self._transaction():
            self._targets = {**self._targets, **numbers}

    @property
    def kept(self) -> ReadingCounts:
        """How much there is. It waits for nothing, whatever is being kept or read."""
        return self._shown

    @property
    def forms(self) -> dict[str, Form]:
        """Of inputs and targets, as far as they are known."""
        return dict(self._forms)

    def close(self) -> None:
        """Let another process have them."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> "Readings":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _opened(self) -> sqlite3.Connection:
        folder = self._path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.touch(0o600)
            sync(folder)
            self._path.chmod(0o600)  # what SQLite writes beside it gets the same
            database = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ExperimentError(f"nothing can be kept in {folder}: {error}; give a folder that is yours") from error
        try:
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA secure_delete = ON")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.executescript(_TABLES)
            there = {row[1] for row in database.execute("PRAGMA table_info(readings)")}
            for column, kind in _COLUMNS_SINCE.items():
                if column not in there:
                    database.execute(f"ALTER TABLE readings ADD COLUMN {column} {kind}")
            free, pages = (
                database.execute(f"PRAGMA {what}").fetchone()[0] for what in ("freelist_count", "page_count")
            )
            if free > pages / 2 > 1000:
                database.execute("VACUUM")
        except sqlite3.Error as error:
            database.close()
            if "locked" in str(error):
                raise ExperimentError(
                    f"another process keeps readings in {folder}: end it, or give each node a folder of its own"
                ) from error
            raise ExperimentError(f"{self._path} is damaged ({error}): move it away, and begin anew") from error
        return database

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection, None, None]:
        """All of it or nothing, also of what is counted and of the forms."""
        kept, forms, targets = self._kept, self._forms, dict(self._targets)
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield self._database
            oldest = self._database.execute("SELECT min(at) FROM readings").fetchone()[0]
            if self._targets != targets:
                self._database.executemany("INSERT OR REPLACE INTO targets VALUES (?, ?)", list(self._targets.items()))
            self._database.execute("COMMIT")
            new = self._targets["given"] - self._targets.get("counted", 0)
            self._shown = replace(self._kept, oldest=oldest, new=min(new, self._kept.labelled))
        except BaseException as error:
            self._kept, self._forms, self._targets = kept, forms, targets
            with suppress(sqlite3.Error):  # where it was rolled back already
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise ExperimentError(
                    f"nothing can be kept in {self._path}: {error}; see to the disk. What was there is as it was"
                ) from error
            raise

    @contextmanager
    def _reading(self) -> Generator[None, None, None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ExperimentError(f"{self._path} cannot be read: {error}; see to the disk") from error

    def _same_forms(self, declared: dict[str, Form]) -> dict[str, Form]:
        rows = self._database.execute("SELECT what, form FROM forms").fetchall()
        found = {what: msgspec.json.decode(form, type=Form) for what, form in rows}
        self._forms = found
        for what, form in declared.items():
            before = found.get(what, form)
            if (
                what == "input"
                and before.shape == form.shape
                and before.widened(np.zeros(form.shape, form.dtype)) == form
            ):
                if before != form:
                    self._convert(what, form)
                continue
            if (before.shape, before.dtype) != (form.shape, form.dtype):
                raise ExperimentError(
                    f"the {what}s in {self._path} are {before.dtype}{list(before.shape)}, and the task's are "
                    f"{form.dtype}{list(form.shape)}: give a new folder, or the task that they were kept for"
                )
        return {**found, **declared}

    def _keep_forms(self, database: sqlite3.Connection) -> None:
        rows = [(what, msgspec.json.encode(form).decode()) for what, form in self._forms.items()]
        database.executemany("INSERT OR IGNORE INTO forms (what, form) VALUES (?, ?)", rows)

    def _counted(self) -> ReadingCounts:
        row = self._database.execute(
            f"SELECT count(*), count(target), coalesce(sum{_SIZE}, 0) FROM readings"
        ).fetchone()
        return ReadingCounts(*row)

    def _count(self, readings: int, labelled: int, bytes: int) -> None:
        now = self._kept
        if labelled > 0:
            self._targets["given"] += labelled
        self._kept = ReadingCounts(now.count + readings, now.labelled + labelled, now.bytes + bytes)

    def _let_go(self, database: sqlite3.Connection, now: float) -> None:
        limits, gone = self.retention, list[tuple[int]]()
        most, bytes = limits.count or math.inf, limits.bytes or math.inf
        columns = f"SELECT number, target IS NOT NULL, {_SIZE} FROM readings"
        if limits.days is not None:
            old = database.execute(f"{columns} WHERE at < ?", (now - limits.days * DAY,)).fetchall()
            for number, labelled, size in old:
                self._count(-1, -labelled, -size)
                gone.append((number,))
            database.executemany("DELETE FROM readings WHERE number = ?", gone)
            gone = []
        if self._kept.count > most or self._kept.bytes > bytes:
            for number, labelled, size in database.execute(f"{columns} ORDER BY at, number"):
                if self._kept.count <= most and self._kept.bytes <= bytes:
                    break
                self._count(-1, -labelled, -size)
                gone.append((number,))
            database.executemany("DELETE FROM readings WHERE number = ?", gone)
