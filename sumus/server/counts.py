"""Counts of events since the server's start, for /metrics and for the server's status."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sumus.rounds.run import Run


@dataclass
class Counts:
    """Counts since the server's start, without names of devices.

    Attributes:
        events: The number of events, by (kind of event, outcome).
        bytes_in: The number of bytes of received bodies.
        bytes_out: The number of bytes of sent bodies.
        batches: The number of commits of reports.
        waited: The sum of the times from each report's arrival to its answer, in seconds.
    """

    events: Counter[tuple[str, str]] = field(default_factory=lambda: Counter[tuple[str, str]]())
    bytes_in: int = 0
    bytes_out: int = 0
    batches: int = 0
    waited: float = 0.0

    def note_dropped(self, run: Run, sessions: Sequence[str], reason: str, now: float) -> None:
        """Count sessions that end without a report, and notify their run."""
        self.events["dropped", reason] += len(sessions)
        run.dropped(sessions, reason, now)

    def drop(self, run: Run, sessions: Sequence[str], reason: str, now: float) -> None:
        """End sessions of a run without a report."""
        self.note_dropped(run, sessions, reason, now)
        run.carry_out(run.coordinator.drop(sessions, reason, now), now)
