"""Where a node stands, as data: for `Node.status`, /status and /metrics; and what goes wrong in its parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sumus.text import printable


@dataclass(frozen=True)
class ReadingStatus:
    """The readings of a node.

    Attributes:
        kept: Readings that are kept.
        labelled: Readings with a target.
        new: Readings that a round would learn something from, see `ReadingCounts`.
        bytes: Bytes of all readings.
        oldest_s: The age of the oldest reading, in seconds; None if there is none.
    """

    kept: int = 0
    labelled: int = 0
    new: int = 0
    bytes: int = 0
    oldest_s: float | None = None


@dataclass(frozen=True)
class NodeStatus:
    """Where a node stands.

    Attributes:
        readings: Its readings.
        models: The versions of its models, by task.
        rounds: The number of rounds in whose sum the node's report is.
        waits: What the node waits for before it takes part in a round; empty if it takes part.
        server: The server of its device.
        phase: The phase of its device.
        trouble: What goes wrong now, by part: training, folder, mqtt, certificate.
        certificate_s: The seconds until the certificate ends that the node shows; None if it shows none.
        folder: The files that wait in the watched folder, are left alone there, and were refused.
        mqtt: The messages that came and that were refused, and the connections that ended.
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
        """Give the same as /status says it."""
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
    """What goes wrong in the parts of a node now.

    Args:
        say: Is told a line when something new goes wrong.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._now: dict[str, str] = {}

    def tell(self, part: str, what: str) -> None:
        """Note what goes wrong in a part, and say so if that is new."""
        what = printable(what)
        if self._now.get(part) != what:
            self._say(f"{part}: {what}")
        self._now[part] = what

    def note(self, part: str, what: str) -> None:
        """Note what goes wrong in a part, for the status alone."""
        self._now[part] = printable(what)

    def clear(self, part: str) -> None:
        """Note that nothing goes wrong in a part."""
        self._now.pop(part, None)

    def by_part(self) -> dict[str, str]:
        """List what goes wrong, by part."""
        return dict(self._now)
