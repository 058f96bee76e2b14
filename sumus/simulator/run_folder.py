"""A run's folder: the progress of the run, its last checkpoint, and finally its history and its models."""

from collections.abc import Sequence
from pathlib import Path

from sumus.errors import ExperimentError
from sumus.simulator.checkpoint import Checkpoint
from sumus.simulator.history import History
from sumus.simulator.progress import ProgressFile
from sumus.simulator.records import RoundRecord


class RunFolder:
    """The folder of a run, if it has one.

    Args:
        path: The folder, which is created; None to keep nothing.
        restart: Whether to start over, even if the folder holds an earlier run.
        rounds: The number of rounds requested.
    """

    def __init__(self, path: Path | None, restart: bool, rounds: int) -> None:
        self.path, self.restart, self._rounds = path, restart, rounds
        if path is not None:
            _expect_writable(path)

    def earlier(self) -> Checkpoint | None:
        """Return an earlier part of the run if it has complete rounds; None if there is none, or if the run starts over."""
        found = None if self.path is None or self.restart else Checkpoint.read(self.path)
        return None if found is None or not found.rounds else found

    def write(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint.

        Returns:
            The end of a sentence that tells where the checkpoint is and how to continue from it; empty if it is not kept.
        """
        if self.path is None or not checkpoint.rounds:
            return ""
        checkpoint.write(self.path)
        again = "run the same experiment again, without restart," if self.restart else "run the same experiment again"
        return f", kept in {self.path}: {again} to continue"

    def finish(self, history: History) -> None:
        """Write the outcome of a run that has ended."""
        if self.path is not None:
            history.write(self.path)

    def progress(self) -> ProgressFile:
        """Return the file with the progress of the run."""
        return ProgressFile(self.path, self._rounds)

    def note(self, rounds: Sequence[RoundRecord], stopped: str) -> None:
        """Write the progress of the run, and the reason why it ended, into the folder."""
        self.progress().note(rounds, stopped)


def _expect_writable(path: Path) -> None:
    """Create a folder; if it is not writable, raise ExperimentError now rather than after the first rounds."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise ExperimentError(f"nothing can be written to {path}: {error.strerror}; give another folder") from error
