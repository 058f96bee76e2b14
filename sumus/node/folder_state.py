"""What is known of a watched folder between two looks: what waits and why, what was taken, since when each file is unchanged."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sumus.node.intake import IntakeResult
from sumus.node.ledger import FileState
from sumus.text import printable

DONE, REFUSED = "done", "refused"
"""The folders that files are moved to."""
SETTLED_S = 2.0
"""Seconds without a change after which a file that ends as it should is taken for whole."""
PATIENCE_S = 60.0
"""Seconds without a change after which any other file is taken as it is."""
MOST_NAMES = 20
"""The most files that a status names."""
NOTHING_TAKEN = IntakeResult(0, 0, 0, {})


@dataclass(frozen=True)
class SeenFile:
    """A file from which something was taken, or which was refused.

    Attributes:
        name: The file's name.
        taken: What became of its readings.
        why: The reason if the file was refused as a whole, else empty.
    """

    name: str
    taken: IntakeResult
    why: str = ""

    @property
    def said(self) -> str:
        """The same in one line of printable text."""
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
    """The files that were not taken, and why.

    Attributes:
        waiting: What each waiting file waits for, by the file's name.
        left_alone: Why each file that is not read is left alone, by the file's name.
        refused: The number of files and lines that were refused since the start.
    """

    waiting: dict[str, str] = field(default_factory=dict[str, str])
    left_alone: dict[str, str] = field(default_factory=dict[str, str])
    refused: int = 0

    def as_json(self) -> dict[str, Any]:
        """Give the same for a status: the numbers of files, and the first ones by name."""
        named: dict[str, Any] = {
            what: {"files": len(names), "first": {printable(name): names[name] for name in sorted(names)[:MOST_NAMES]}}
            for what, names in (("waiting", self.waiting), ("left_alone", self.left_alone))
        }
        return {**named, "refused": self.refused}


class UnchangedSince:
    """Since when each file is as it is.

    A file in the folder has its name as its key. A file in another place has a key with a `/` in it, which only `forget` removes.
    """

    def __init__(self) -> None:
        self._since: dict[str, tuple[FileState, float]] = {}

    def look(self, states: Mapping[str, FileState], now: float) -> None:
        """Note the states of all files that are in the folder now."""
        since = {
            name: before if (before := self._since.get(name)) and before[0] == state else (state, now)
            for name, state in states.items()
        }
        self._since = since | {key: noted for key, noted in self._since.items() if "/" in key}

    def note(self, key: str, state: FileState, now: float) -> None:
        """Note that a file has changed."""
        self._since[key] = (state, now)

    def seconds(self, key: str, now: float, state: FileState | None = None) -> float | None:
        """Tell for how many seconds a file is unchanged.

        Args:
            key: The file's key.
            now: The time.
            state: The state that the file must have had; None for whichever it had.

        Returns:
            The seconds; None if nothing was noted of the file, or another state.
        """
        noted = self._since.get(key)
        if noted is None or (state is not None and noted[0] != state):
            return None
        return now - noted[1]

    def forget(self, key: str) -> None:
        """Remove what was noted of a file."""
        self._since.pop(key, None)

    def inodes(self) -> set[str]:
        """List the inodes of all files of which something is noted."""
        return {state.inode for state, _ in self._since.values()}
