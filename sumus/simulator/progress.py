"""The progress of a run, as the user sees it."""

import json
import math
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from sumus.errors import ExperimentError, SumusError
from sumus.experiment import Experiment
from sumus.simulator.history import strict
from sumus.simulator.records import RoundRecord
from sumus.storage.files import write_whole
from sumus.text import ago, printable

Show = Callable[[RoundRecord], None]


class Progress(Protocol):
    """Shows a run: `watching(experiment, done)` returns a context manager.

    The context manager yields a function that is called with the record of each round. `done` is the number of rounds so far.
    """

    def watching(self, experiment: Experiment, done: int) -> AbstractContextManager[Show]: ...


class NoProgress:
    """Shows nothing."""

    @contextmanager
    def watching(self, experiment: Experiment, done: int) -> Generator[Show, None, None]:
        yield lambda record: None


class LineProgress:
    """Lines on standard error, for output without a terminal.

    The first line is written after `first` seconds. During the first minute, a line follows every ten seconds; later, every
    minute. If any line was written, one more is written after the last round.
    """

    def __init__(self, first: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._first, self._clock = first, clock

    @contextmanager
    def watching(self, experiment: Experiment, done: int) -> Generator[Show, None, None]:
        from sumus.terminal import echo

        began, number, latest = self._clock(), done, ""
        due, said = began + self._first, False

        def show(record: RoundRecord) -> None:
            nonlocal number, latest, due, said
            number, now = number + 1, self._clock()
            if record.metrics:
                latest = "".join(f", {name} {value:.3f}" for name, value in record.metrics.items() if name != "loss")
            if now < due and not (said and number == experiment.rounds):
                return
            said, due = True, now + (10.0 if now - began < 60.0 else 60.0)
            left = (now - began) / (number - done) * (experiment.rounds - number)
            until = f"; about {ago(left)} left" if number < experiment.rounds else ""
            echo(f"round {number} of {experiment.rounds}: loss {record.loss:.4f}{latest}{until}", error=True)

        yield show


class TerminalProgress:
    """A bar on standard error: round, loss, the latest metrics, clients per second, time left."""

    @contextmanager
    def watching(self, experiment: Experiment, done: int) -> Generator[Show, None, None]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        from sumus.terminal import console

        columns = (
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        latest = ""
        with Bar(*columns, console=console(error=True), expand=True) as bar:
            task = bar.add_task("", total=experiment.rounds, completed=done, figures="starting")

            def show(record: RoundRecord) -> None:
                nonlocal latest
                if record.metrics:
                    latest = "".join(f"  {n} {value:.3f}" for n, value in record.metrics.items() if n != "loss")
                speed = record.clients / record.seconds if record.seconds else 0.0
                bar.update(task, advance=1, figures=printable(f"loss {record.loss:.4f}{latest}  {speed:.1f} clients/s"))

            yield show


class ProgressFile:
    """Writes the progress of a run into its folder, for other programs: at most once a second, and at the end.

    Args:
        folder: The run's folder; None if the run has no folder (nothing is then written).
        rounds: The number of rounds requested.
        clock: Returns the seconds of a monotonic clock.
    """

    FILE = "progress.json"

    def __init__(self, folder: Path | None, rounds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._wanted, self._clock = folder, rounds, clock
        self._next = -math.inf

    def note(self, records: Sequence[RoundRecord], stopped: str = "") -> None:
        """Write the rounds so far.

        Args:
            records: The rounds so far.
            stopped: The reason why the run ended; empty while it goes on.
        """
        if self._folder is None or not records or (not stopped and self._clock() < self._next):
            return
        self._next = self._clock() + 1.0
        measured = dict[str, float]()
        for record in records:
            measured = dict(record.metrics) or measured
        standing = {
            "round": len(records),
            "rounds": self._wanted,
            "seconds": sum(record.seconds for record in records),
            "loss": records[-1].loss,
            "metrics": measured,
            "stopped": stopped,
        }
        with suppress(SumusError, OSError):  # if the disk is full, writing the checkpoint reports that
            write_whole(self._folder / self.FILE, f"{json.dumps(strict(standing))}\n".encode())


def progress_of(wanted: "Progress | bool | None") -> Progress:
    """Return the requested progress; by default a bar if standard error is a terminal, else lines."""
    if wanted is None:
        return TerminalProgress() if sys.stderr.isatty() else LineProgress()
    if isinstance(wanted, bool):
        return TerminalProgress() if wanted else NoProgress()
    if not callable(getattr(wanted, "watching", None)):
        raise ExperimentError(
            f"progress={wanted!r:.80}: give True, False, or an object with a method watching(experiment, done) that returns a "
            "context manager; the context manager yields a function that is called with the record of each round"
        )
    return wanted
