"""A node beside a program that writes files: every complete row must be kept exactly once.

    python -m benchmarks.growing --seconds 600 --seed 1            both ways of watching, in turn
    python -m benchmarks.growing --seconds 600 --way follow

A writer appends rows to files in a watched folder, in pieces that may end anywhere. It starts files again under the
same name (replaces), renames them (rotates), truncates them, keeps some open while they are moved, and appends by name
to files that were moved away. Each row has a unique number. At the end, each row that the node could see must be kept
once, and no incomplete row.

Rows that the writer destroys before the node can see them (in a file that is truncated or replaced) need not be kept.
If such a row is kept, it must be kept once.
"""

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sumus.node.folder import WatchedFolder
from sumus.node.folder_state import PATIENCE_S, SETTLED_S
from sumus.node.intake import Intake, IntakeResult
from sumus.node.readings import Readings

HEAD = b"number,twice\n"


class Clock:
    """A clock that the run sets, so that minutes of waiting take no time."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Written:
    """A file that the writer has open.

    Attributes:
        rows: The numbers of its complete rows.
        tail: The bytes of a row without an end, and the row's number.
        headed: Whether it has a line of names.
        known: Whether the node has looked at it.
    """

    def __init__(self, path: Path, headed: bool) -> None:
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.rows: list[int] = []
        self.tail: tuple[int, bytes] | None = None
        self.headed, self.known = headed, False
        if headed:
            self.file.write(HEAD)


class Writer:
    """A writer that does one random thing at each step.

    Args:
        folder: The folder to write to.
        rng: Decides what it does.
        follow: Whether files stay where they are, so that it may truncate and replace them.
    """

    def __init__(self, folder: Path, rng: random.Random, follow: bool) -> None:
        self._folder, self._rng, self._follow = folder, rng, follow
        self.files: list[Written] = []
        self.must, self.may = set[int](), set[int]()
        self._unseen = set[int]()
        self._next, self._names = 0, 0
        self.done = Counter[str]()

    def seen(self) -> None:
        """Note that a look of the node has ended: it could see all complete rows."""
        self.must |= self._unseen
        self._unseen.clear()

    def step(self) -> None:
        """Do one thing."""
        actions: list[tuple[float, Callable[[], None]]] = [
            (6.0, self.append), (1.0, self.begin), (0.5, self.rotate), (0.3, self.close), (0.4, self.reopen),
        ]  # fmt: skip
        if self._follow:
            actions += [(0.2, self.truncate), (0.2, self.replace), (0.1, self.delete), (0.2, self.copy_and_truncate)]
        action = self._rng.choices([each for _, each in actions], [share for share, _ in actions])[0]
        self.done[action.__name__] += 1
        action()

    def begin(self) -> None:
        """Begin a file under a new name."""
        if len(self.files) < 4:
            self._names += 1
            self.files.append(Written(self._folder / f"f{self._names}.csv", headed=True))

    def append(self) -> None:
        """Append some rows to an open file, perhaps without the end of the last one."""
        if not self.files:
            return self.begin()
        one = self._rng.choice(self.files)
        out = b""
        for _ in range(self._rng.randint(1, 4)):
            if one.tail is not None:
                out, done = out + one.tail[1], one.tail[0]
                one.tail = None
            else:
                out, done = out + self._row(self._next), self._next
                self._next += 1
            one.rows.append(done)
            self._unseen.add(done)
        if self._rng.random() < 0.3:
            row, number = self._row(self._next), self._next
            self._next += 1
            cut = self._rng.randint(1, len(row) - 1)
            out, one.tail = out + row[:cut], (number, row[cut:])
        one.file.write(out)

    def _row(self, number: int) -> bytes:
        return b"%d,%d\n" % (number, 2 * number)

    def rotate(self) -> None:
        """Rename a file while it is open."""
        if self.files:
            one = self._rng.choice(self.files)
            self._names += 1
            if not one.headed:  # under another name, no line says what its values are
                return
            new = self._folder / (
                f"r{self._names}.csv"
                if self._rng.random() < 0.5 or not (self._follow and one.known)
                else f"r.csv.{self._names}"
            )
            if one.path.exists() and os.path.samestat(one.path.stat(), os.fstat(one.file.fileno())):
                one.path.rename(new)
                one.path = new

    def close(self) -> None:
        """Stop writing to a file."""
        if self.files:
            one = self.files.pop(self._rng.randrange(len(self.files)))
            if one.tail is not None:
                one.file.write(one.tail[1])
                one.rows.append(one.tail[0])
                self._unseen.add(one.tail[0])
            one.file.close()

    def reopen(self) -> None:
        """Open a file by its name for each append, as simple loggers do. If the file is gone, the new one has no line
        of names."""
        if self.files:
            one = self._rng.choice(self.files)
            if one.tail is None and not one.path.name.startswith("r"):
                one.file.close()
                headless = not one.path.exists()
                one.file = one.path.open("ab", buffering=0)
                if headless:
                    one.rows, one.headed = [], False

    def truncate(self) -> None:
        """Truncate a file in place, before or after the node has looked at it; or cut off its last rows."""
        if self.files:
            one = self._rng.choice(self.files)
            lost, one.tail = one.rows, None
            self._destroyed(lost)
            one.file.truncate(0)
            one.file.write(HEAD)
            one.rows = []

    def replace(self) -> None:
        """Replace a file by another one."""
        if self.files:
            one = self._rng.choice(self.files)
            if not one.path.exists() or not one.path.name.endswith(".csv"):
                return
            self._destroyed(one.rows)
            one.tail = None
            one.file.close()
            other = Written(self._folder / ".new", headed=True)
            os.replace(self._folder / ".new", one.path)
            other.path = one.path
            self.files[self.files.index(one)] = other

    def delete(self) -> None:
        """Delete a file while it is open, and go on writing to it."""
        if self.files:
            one = self._rng.choice(self.files)
            self._destroyed(one.rows)
            if one.tail is not None:
                one.tail = None
            one.path.unlink(missing_ok=True)
            one.file.close()
            self.files.remove(one)

    def copy_and_truncate(self) -> None:
        """Rotate a file as `logrotate` does with copytruncate."""
        if self.files:
            one = self._rng.choice(self.files)
            if one.tail is not None or not one.path.exists() or not one.path.name.endswith(".csv"):
                return
            self._names += 1
            (self._folder / f"c{self._names}.csv").write_bytes(one.path.read_bytes())
            one.file.truncate(0)
            one.file.write(HEAD)
            one.rows = []

    def _destroyed(self, rows: list[int]) -> None:
        gone = self._unseen & set(rows)
        self._unseen -= gone
        self.may |= gone


def run(folder: Path, seed: int, steps: int, follow: bool) -> dict[str, Any]:
    """Run a writer beside a node's folder.

    Returns:
        The numbers of rows that are lost (the node could see them and has not kept them), kept twice, and wrong (never
            written like this).
    """
    rng, clock = random.Random(seed), Clock()
    with Readings(folder / "node") as readings:
        intake = InterruptedIntake(readings, _prepare)
        watched = _watched(folder, intake, clock, follow)
        writer = Writer(folder / "incoming", rng, follow)
        for _ in range(steps):
            for _ in range(rng.randint(0, 6)):
                writer.step()
            clock.now += rng.choice([0.0, 0.5, 1.0, SETTLED_S])
            _look(watched, intake, writer, rng)
            if rng.random() < 0.02:  # the process ends, and starts again
                watched.close()
                watched = _watched(folder, intake, clock, follow)
        while writer.files:
            writer.close()
        for _ in range(6):
            clock.now += PATIENCE_S / 2
            watched.look()
            writer.seen()
        watched.close()
        found = Counter(tuple(row) for row in _rows(readings))
    numbers = Counter(number for number, _ in found.elements())
    return {
        "rows": len(writer.must),
        "kept": len(numbers),
        "lost": sorted(writer.must - set(numbers)),
        "twice": sorted(number for number, times in numbers.items() if times > 1),
        "wrong": sorted(row for row in found if row[1] != 2 * row[0] or row[0] not in writer.must | writer.may),
        "did": dict(writer.done),
    }


class InterruptedIntake(Intake):
    """An intake with a callback.

    Attributes:
        then: Called after readings were kept.
    """

    then: Callable[[], None] | None = None

    def take(self, *given: Any, **more: Any) -> IntakeResult:
        """Keep readings, then call `then`."""
        taken = super().take(*given, **more)
        if self.then is not None:
            self.then()
        return taken


def _look(watched: WatchedFolder, intake: InterruptedIntake, writer: Writer, rng: random.Random) -> None:
    """Let the node look once. The writer goes on at some moment during the look: after a file was read, or was moved."""
    within = writer.step if rng.random() < 0.5 else lambda: None
    before, there = set(writer._unseen), list(writer.files)  # pyright: ignore[reportPrivateUsage]
    rename = Path.rename

    def write_and_rename(self: Path, to: Path) -> Path:
        if "/done/" in str(to):
            within()
        return rename(self, to)

    intake.then = within
    Path.rename = write_and_rename  # type: ignore[method-assign]
    try:
        watched.look()
    finally:
        intake.then, Path.rename = None, rename  # type: ignore[method-assign]
    for one in there:
        one.known = True
    later = writer._unseen - before  # pyright: ignore[reportPrivateUsage]
    writer._unseen -= later  # pyright: ignore[reportPrivateUsage]
    writer.seen()
    writer._unseen |= later  # pyright: ignore[reportPrivateUsage]


def _watched(folder: Path, intake: Intake, clock: Clock, follow: bool) -> WatchedFolder:
    return WatchedFolder(folder / "incoming", intake, clock=clock, follow=follow)


def _prepare(raw: Any) -> tuple[Any, Any]:
    return [raw["number"], raw["twice"]], 0


def _rows(readings: Readings) -> list[list[int]]:
    return readings.examples()[0].tolist() if readings.kept.count else []


def main() -> None:
    """Run until the time is over. The exit status is 1 if a row was lost, kept twice or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long it runs")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--steps", type=int, default=300, help="looks of one run")
    parser.add_argument("--way", choices=("move", "follow", "both"), default="both", help="how the folder is watched")
    given = parser.parse_args()
    until, seed, rows, bad, did = time.monotonic() + given.seconds, given.seed, 0, 0, Counter[str]()
    while time.monotonic() < until:
        for follow in (False, True):
            if given.way not in ("both", "follow" if follow else "move"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = run(Path(folder), seed, given.steps, follow)
            rows += found["rows"]
            did.update(found["did"])
            if found["lost"] or found["twice"] or found["wrong"]:
                bad += 1
                print(f"seed {seed}, {'follow' if follow else 'move'}: {found}", flush=True)
        seed += 1
    print(
        f"{seed - given.seed} runs, {rows:,} rows, {bad} runs with rows lost, kept twice or wrong; the writer did {dict(did)}"
    )
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
