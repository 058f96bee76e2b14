"""What the user sees while a run goes on."""

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from sumus.errors import ExperimentError
from sumus.experiment import Experiment
from sumus.simulator.history import RoundRecord
from sumus.text import printable

Show = Callable[[RoundRecord], None]


class Progress(Protocol):
    """watching(experiment, rounds done already) gives a function that is called after every round."""

    def watching(self, experiment: Experiment, done: int) -> AbstractContextManager[Show]: ...


class NoProgress:
    """Shows nothing."""

    @contextmanager
    def watching(self, experiment: Experiment, done: int) -> Generator[Show, None, None]:
        yield lambda record: None


class TerminalProgress:
    """A bar on standard error: round, loss, the latest metrics, clients a second, time left."""

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


def progress_of(wanted: "Progress | bool | None") -> Progress:
    """The progress that was asked for; by default a bar where standard error is a terminal."""
    if isinstance(wanted, bool) or wanted is None:
        return TerminalProgress() if wanted or (wanted is None and sys.stderr.isatty()) else NoProgress()
    if not callable(getattr(wanted, "watching", None)):
        raise ExperimentError(
            f"progress={wanted!r:.80}: give True, False, or an object whose watching(experiment, done) gives a context manager "
            "of a function that is called with each round's record"
        )
    return wanted
