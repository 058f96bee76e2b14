"""What happened since a server started, counted for /metrics and for its status."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sumus.rounds.run import Run


@dataclass
class Counts:
    """Counts since the start; they name no device.

    Attributes:
        events: How often something happened, by (kind of event, outcome).
        bytes_in: Bytes of bodies that arrived.
        bytes_out: Bytes of bodies that were sent.
        batches: Commits of reports.
        waited: Seconds from a report's arrival to its answer, added up.
    """

    events: Counter[tuple[str, str]] = field(default_factory=lambda: Counter[tuple[str, str]]())
    bytes_in: int = 0
    bytes_out: int = 0
    batches: int = 0
    waited: float = 0.0

    def note_dropped(self, run: Run, sessions: Sequence[str], reason: str, now: float) -> None:
        """Count sessions that end without a report, and tell their run."""
        self.events["dropped", reason] += len(sessions)
        run.dropped(sessions, reason, now)

    def drop(self, run: Run, sessions: Sequence[str], reason: str, now: float) -> None:
        """End sessions of a run without a report."""
        self.note_dropped(run, sessions, reason, now)
        run.carry_out(run.coordinator.drop(sessions, reason, now), now)
