"""A node's stored readings, each with an input and a target; the target may arrive later.

    readings = Readings(folder, retention=Retention(days=30))
    readings.keep([Reading(input, target, key="kitchen/17")])      on the disk when it returns
    readings.label("kitchen/18", 1)                                a label that arrived later
    inputs, targets = readings.examples()                          those with a target, oldest first

They are stored in one SQLite file (readings_file.py). A reading without a target is kept, but is not used for training until it
is labelled. All inputs have one shape and dtype, and so have all targets: as the task declares, or as in the first reading.
"""

import math
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from sumus.errors import DataError, UsageError
from sumus.node.reading import BadReading, Form, Reading, ReadingForms, forms_of
from sumus.node.readings_file import ReadingsFile
from sumus.task import Data
from sumus.text import over
from sumus.types import Array

LONGEST_KEY = 200
OVERHEAD = 80
"""The approximate bytes on disk for a reading, in addition to its input, target and key."""
DAY = 86400.0
_SIZE = f"(length(input) + coalesce(length(target), 0) + coalesce(length(CAST(key AS BLOB)), 0) + {OVERHEAD})"
Became: TypeAlias = Literal["kept", "labelled", "again", "other input", "other target"]
"""The result for a reading. kept: it is new. labelled: it was known without a target, and has one now. again: it was known.
other input, other target: it is not kept, because its key is known with another input, or with another target."""


@dataclass(frozen=True)
class Retention:
    """The limits on stored readings. The oldest readings are deleted first; None means no limit.

    Attributes:
        days: The maximum number of days that a reading is kept, from its own time if it has one, else from its arrival.
        count: The maximum number of readings.
        bytes: The maximum number of bytes of all readings on the disk.
    """

    days: float | None = None
    count: int | None = None
    bytes: int | None = 2**28

    def __post_init__(self) -> None:
        for name in ("days", "count", "bytes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"Retention({name}={value!r}): give a finite number greater than 0")


USUAL = Retention()


@dataclass(frozen=True)
class ReadingCounts:
    """The numbers of readings.

    Attributes:
        count: The number of readings.
        labelled: The number of readings with a target.
        bytes: The bytes of all readings on the disk.
        oldest: The time of the oldest reading, in seconds since 1970.
        new: The number of readings that have a new or changed target since the last training whose report was counted.
    """

    count: int = 0
    labelled: int = 0
    bytes: int = 0
    oldest: float | None = None
    new: int = 0


class Readings:
    """A node's readings. Any thread may call the methods.

    Args:
        folder: The node's folder.
        data: The form of readings that the task declares; None if the first reading gives the form.
        retention: The limits on stored readings.
        clock: Returns the seconds since 1970.

    Raises:
        ExperimentError: Another process uses the file, its readings have a different form, or nothing can be stored.
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
        self._file = ReadingsFile(folder)
        self._forms = ReadingForms(forms_of(data))
        try:
            with self._file.reading() as database:
                self._targets = dict(database.execute("SELECT what, number FROM targets"))
                self._kept = self._shown = _count_all(database)
                self._forms.load(database)
            self._targets.setdefault("given", self._kept.labelled)
            self._read = 0
            if (form := self._forms.to_convert(self._file.path)) is not None:
                self._convert("input", form)
            self._forms.declare()
            self.let_go()
        except BaseException:
            self._file.close()
            raise

    # ── incoming readings ────────────────────────────────────────────────────────────────────────────────────────────

    def fit(self, reading: Reading) -> Reading:
        """Return a reading in the common form of this node: arrays of one dtype. The first reading decides the form.

        Raises:
            BadReading: The reading does not fit, is too large, or is too old to be kept.
        """
        if reading.key is not None and not (0 < len(reading.key) <= LONGEST_KEY and reading.key.isprintable()):
            raise BadReading(f"its key must be a text of 1 to {LONGEST_KEY} printable characters")
        with self._lock:
            arrays, forms = self._forms.fitted(reading)
            size, most = sum(array.nbytes for array in arrays.values()) + OVERHEAD, self.retention.bytes
            if most is not None and size > most:
                raise BadReading(f"it has {over(size, most)} are kept for all readings together")
            now, days = self._clock(), self.retention.days
            if reading.at is not None and days is not None and reading.at < now - days * DAY:
                raise BadReading(
                    f"its time is {(now - reading.at) / DAY:.1f} days ago, but readings are kept for only {days:g} "
                    f"{'day' if days == 1 else 'days'}"
                )
            if forms["input"] != self._forms.known.get("input", forms["input"]):
                self._convert("input", forms["input"])
            self._forms.learn(forms)
        return Reading(arrays["input"], arrays.get("target"), reading.key, reading.at)

    def _convert(self, what: Literal["input"], form: Form) -> None:
        """Rewrite the stored readings in another dtype, which holds the same values."""
        with self._transaction() as database:
            self._forms.convert(database, what, form)
            self._kept = _count_all(database)

    def shaped(self, input: Any) -> Array:
        """Return an input in the dtype and shape of the stored readings, if these are known.

        Raises:
            BadReading: The input does not fit.
        """
        return self._forms.form("input", input).fit(input, "input")

    def keep(
        self, readings: Sequence[Reading], beside: Callable[[sqlite3.Connection], None] | None = None
    ) -> list[Became]:
        """Keep readings: all of them or, if this raises, none. They are on the disk when this returns.

        The first target that arrives for a key is kept; only `label` changes it. Then readings beyond the limits are deleted.

        Args:
            readings: Readings that `fit` returned.
            beside: Writes related rows in the same transaction.

        Returns:
            The result for each reading.
        """
        became: list[Became] = []
        with self._lock, self._transaction() as database:
            now = self._clock()
            for reading in readings:
                input = self._forms.encoded("input", reading.input)
                target = self._forms.encoded("target", reading.target)
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
            self._forms.save(database)
            self._let_go(database, now)
            if beside is not None:
                beside(database)
        return became

    def _again(self, database: sqlite3.Connection, key: str, input: bytes | None, target: bytes | None) -> Became:
        """Return the result for a reading whose key is known already."""
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
        """Delete the readings with these keys, which were read from lines that were not complete yet."""
        with self._lock, self._transaction() as database:
            database.executemany("DELETE FROM readings WHERE key = ?", [(key,) for key in keys])
            self._kept = _count_all(database)

    def has(self, key: str) -> bool:
        """Return whether a reading has this key."""
        with self._lock, self._file.reading() as database:
            return database.execute("SELECT 1 FROM readings WHERE key = ?", (key,)).fetchone() is not None

    def rows(self, table: str) -> list[Any]:
        """Read all rows of one of the node's tables in this file, ordered by time."""
        with self._lock, self._file.reading() as database:
            return database.execute(f"SELECT * FROM {table} ORDER BY at").fetchall()

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection, None, None]:
        """Open a transaction on the node's file, for other parts of the node. All writes of the block are kept, or none."""
        with self._lock, self._transaction() as database:
            yield database

    def label(self, key: str, target: Any) -> bool:
        """Give a reading its target, or change it. The target is on the disk when this returns.

        Returns:
            Whether a reading has this key.

        Raises:
            BadReading: The target does not fit.
        """
        with self._lock:
            form = self._forms.known.get("target") or Form.of(target, "target")
            encoded = form.fit(target, "target").tobytes()
            with self._transaction() as database:
                found = database.execute("SELECT length(target), target FROM readings WHERE key = ?", (key,)).fetchone()
                if found is None:
                    return False
                if found[0] is not None and found[1] != encoded:
                    self._targets["given"] += 1
                database.execute("UPDATE readings SET target = ? WHERE key = ?", (encoded, key))
                self._forms.learn({**self._forms.known, "target": form})
                self._forms.save(database)
                self._count(0, found[0] is None, len(encoded) - (found[0] or 0))
        return True

    def let_go(self) -> None:
        """Delete readings beyond the limits."""
        with self._lock, self._transaction() as database:
            self._let_go(database, self._clock())

    # ── stored readings ──────────────────────────────────────────────────────────────────────────────────────────────

    def examples(self) -> tuple[Array, Array]:
        """Return the inputs and targets of the readings with a target, oldest first. `sumus.Device` calls this for each round."""
        self.let_go()
        with self._lock, self._file.reading() as database:
            self._read = self._targets["given"]
            known = self._forms.known
            if not {"input", "target"} <= set(known):
                raise DataError("this node", "it has no reading with a target yet")
            inputs, targets = (
                np.empty((self._kept.labelled, *known[what].shape), known[what].dtype) for what in ("input", "target")
            )
            rows = database.execute("SELECT input, target FROM readings WHERE target IS NOT NULL ORDER BY at, number")
            for number, (input, target) in enumerate(rows):
                inputs[number] = np.frombuffer(input, inputs.dtype).reshape(inputs.shape[1:])
                targets[number] = np.frombuffer(target, targets.dtype).reshape(targets.shape[1:])
        return inputs, targets

    def note_trained(self) -> None:
        """Record that a round was trained on the examples that `examples` returned last."""
        self._note_targets(trained=self._read)

    def note_counted(self) -> None:
        """Record that the report of that round was counted, so that its examples are no longer new."""
        self._note_targets(counted=max(self._targets.get("trained", 0), self._targets.get("counted", 0)))

    def _note_targets(self, **numbers: int) -> None:
        with self._lock, self._transaction():
            self._targets = {**self._targets, **numbers}

    @property
    def kept(self) -> ReadingCounts:
        """The numbers of readings. This never waits, even while readings are being kept or read."""
        return self._shown

    @property
    def forms(self) -> dict[str, Form]:
        """The known forms of inputs and targets."""
        return dict(self._forms.known)

    def close(self) -> None:
        """Close the file, so that another process can use the readings."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> "Readings":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection, None, None]:
        """Open a transaction for a `with` block. If the block raises, nothing is written, and counts and forms get their old
        values back."""
        kept, forms, targets = self._kept, self._forms.known, dict(self._targets)
        oldest: float | None = None
        try:
            with self._file.transaction() as database:
                yield database
                oldest = database.execute("SELECT min(at) FROM readings").fetchone()[0]
                if self._targets != targets:
                    database.executemany("INSERT OR REPLACE INTO targets VALUES (?, ?)", list(self._targets.items()))
        except BaseException:
            self._kept, self._targets = kept, targets
            self._forms.learn(forms)
            raise
        new = self._targets["given"] - self._targets.get("counted", 0)
        self._shown = replace(self._kept, oldest=oldest, new=min(new, self._kept.labelled))

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


def _count_all(database: sqlite3.Connection) -> ReadingCounts:
    row = database.execute(f"SELECT count(*), count(target), coalesce(sum{_SIZE}, 0) FROM readings").fetchone()
    return ReadingCounts(*row)
