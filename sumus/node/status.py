"""A node's status as data, for `Node.status`, /status and /metrics; and the current problems in its parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sumus.text import printable


@dataclass(frozen=True)
class ReadingStatus:
    """The status of a node's readings.

    Attributes:
        kept: The number of stored readings.
        labelled: The number of readings with a target.
        new: The number of readings that are new for training, see `ReadingCounts`.
        bytes: The bytes of all readings.
        oldest_s: The age of the oldest reading, in seconds; None if there is none.
    """

    kept: int = 0
    labelled: int = 0
    new: int = 0
    bytes: int = 0
    oldest_s: float | None = None


@dataclass(frozen=True)
class NodeStatus:
    """A node's status.

    Attributes:
        readings: The status of the node's readings.
        models: The versions of the node's models, by task.
        rounds: The number of rounds that counted the node's report.
        waits: The condition that the node waits for before it takes part in rounds; empty if it takes part.
        server: The address of the device's server.
        phase: The device's phase.
        trouble: The current problems, by part: training, folder, mqtt, certificate.
        certificate_s: The seconds until the node's certificate expires; None if it has none.
        folder: The files in the watched folder that wait, are left alone, or were refused.
        mqtt: The numbers of messages that arrived and that were refused, and of connections that ended.
    """

    readings: ReadingStatus = field(default_factory=ReadingStatus)
    models: Mapping[str, int] = field(default_factory=dict[str, int])
    rounds: int = 0
    waits: str = ""
    server: str = ""
    phase: str = ""
    trouble: Mapping[str, str] = field(default_factory=dict[str, str])
    certificate_s: float | None = None
    folder: Mapping[str, Any] = field(default_factory=dict[str, Any])
    mqtt: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def as_json(self) -> dict[str, Any]:
        """Return the status in the form of /status."""
        readings = self.readings
        return {
            "readings": {
                "kept": readings.kept,
                "labelled": readings.labelled,
                "new": readings.new,
                "bytes": readings.bytes,
                "oldest_s": readings.oldest_s,
            },
            "models": dict(self.models),
            "rounds": self.rounds,
            "waits": self.waits,
            "server": self.server,
            "phase": self.phase,
            "trouble": dict(self.trouble),
            **({} if self.certificate_s is None else {"certificate_s": self.certificate_s}),
            **({"folder": dict(self.folder)} if self.folder else {}),
            **({"mqtt": dict(self.mqtt)} if self.mqtt else {}),
        }


class NodeTroubles:
    """The current problems in the parts of a node.

    Args:
        say: Called with a line for each new problem.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._now: dict[str, str] = {}

    def tell(self, part: str, what: str) -> None:
        """Record a part's problem, and report it if it is new."""
        what = printable(what)
        if self._now.get(part) != what:
            self._say(f"{part}: {what}")
        self._now[part] = what

    def note(self, part: str, what: str) -> None:
        """Record a part's problem, for the status only."""
        self._now[part] = printable(what)

    def clear(self, part: str) -> None:
        """Record that a part has no problem."""
        self._now.pop(part, None)

    def by_part(self) -> dict[str, str]:
        """Return the problems, by part."""
        return dict(self._now)
