"""The state of a watched folder between two scans: waiting files, with reasons; files that were taken; times of changes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sumus.node.intake import IntakeResult
from sumus.node.ledger import FileState
from sumus.text import printable

DONE, REFUSED = "done", "refused"
"""The folders to which files are moved."""
SETTLED_S = 2.0
"""The seconds without a change after which a file that ends as it should is treated as complete."""
PATIENCE_S = 60.0
"""The seconds without a change after which a file is read even if it does not end as it should."""
MOST_NAMES = 20
"""The maximum number of files that a status lists by name."""
NOTHING_TAKEN = IntakeResult(0, 0, 0, {})


@dataclass(frozen=True)
class SeenFile:
    """A file from which readings were taken, or which was refused.

    Attributes:
        name: The file's name.
        taken: The results for its readings.
        why: The reason if the file was refused as a whole; else empty.
    """

    name: str
    taken: IntakeResult
    why: str = ""

    @property
    def said(self) -> str:
        """A description of the file and its results, in one line of printable text."""
        return printable(f"{self.name}: {self._became()}")

    def _became(self) -> str:
        if self.why:
            return f"refused, {self.why}"
        parts = (("kept", self.taken.kept), ("labelled", self.taken.labelled), ("here already", self.taken.again))
        refused = f"{len(self.taken.refused)} refused, see {REFUSED}/" if self.taken.refused else ""
        said = ", ".join([*(f"{count} {word}" for word, count in parts if count), *filter(None, [refused])])
        return said or "nothing new"


@dataclass
class FolderState:
    """The files that were not taken, with reasons.

    Attributes:
        waiting: The condition that each waiting file waits for, by the file's name.
        left_alone: The reason why each ignored file is left alone, by the file's name.
        refused: The number of files and lines that were refused since the start.
    """

    waiting: dict[str, str] = field(default_factory=dict[str, str])
    left_alone: dict[str, str] = field(default_factory=dict[str, str])
    refused: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the state for a status: the numbers of files, and the first few names."""
        named: dict[str, Any] = {
            what: {"files": len(names), "first": {printable(name): names[name] for name in sorted(names)[:MOST_NAMES]}}
            for what, names in (("waiting", self.waiting), ("left_alone", self.left_alone))
        }
        return {**named, "refused": self.refused}


class UnchangedSince:
    """The time since which each file is unchanged.

    The key of a file in the folder is its name. The key of a file elsewhere contains a `/`, and only `forget` removes it.
    """

    def __init__(self) -> None:
        self._since: dict[str, tuple[FileState, float]] = {}

    def look(self, states: Mapping[str, FileState], now: float) -> None:
        """Record the states of all files that are in the folder now."""
        since = {
            name: before if (before := self._since.get(name)) and before[0] == state else (state, now)
            for name, state in states.items()
        }
        self._since = since | {key: noted for key, noted in self._since.items() if "/" in key}

    def note(self, key: str, state: FileState, now: float) -> None:
        """Record that a file has changed."""
        self._since[key] = (state, now)

    def seconds(self, key: str, now: float, state: FileState | None = None) -> float | None:
        """Return the number of seconds since a file last changed.

        Args:
            key: The file's key.
            now: The time.
            state: The state that must have been recorded; None for any state.

        Returns:
            The seconds; None if the file was not recorded, or was recorded in another state.
        """
        noted = self._since.get(key)
        if noted is None or (state is not None and noted[0] != state):
            return None
        return now - noted[1]

    def forget(self, key: str) -> None:
        """Remove the record of a file."""
        self._since.pop(key, None)

    def inodes(self) -> set[str]:
        """Return the inodes of all recorded files."""
        return {state.inode for state, _ in self._since.values()}
