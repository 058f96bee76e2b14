"""Messages from a device to its owner: news as it happens, and the problem that is not resolved yet."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from sumus.text import printable
from sumus.wire.messages import Assignment

NewsKind: TypeAlias = Literal[
    "enrolled", "training", "trained", "evaluated", "counted", "discarded", "aborted", "model", "waiting", "trouble"
]

CLEAN = 20
"""The number of successful check-ins after which the device stops warning of a copied folder."""


@dataclass(frozen=True)
class DeviceNews:
    """An event on a device.

    Attributes:
        what: The kind of event.
        said: A description of the event.
        task: The event's task.
        kind: The kind of work, "train" or "evaluate".
        version: The version of the model.
        examples: The number of examples used.
        seconds: The duration of the work.
        measured: The mean of each metric.
        again_s: Seconds within which the device asks again, if it waits or got no answer.
    """

    what: NewsKind
    said: str = ""
    task: str = ""
    kind: str = ""
    version: int = -1
    examples: int = 0
    seconds: float = 0.0
    measured: Mapping[str, float] = field(default_factory=dict[str, float])
    again_s: float = 0.0


def news_of(what: NewsKind, work: Assignment | None) -> DeviceNews:
    """Make news about a piece of work, with the details that the device knows."""
    return DeviceNews(what) if work is None else DeviceNews(what, "", work.task, work.kind, work.version)


class NewsFeed:
    """Passes news to the owner's function, and remembers the current problem.

    Args:
        watch: Called with each piece of news.
    """

    def __init__(self, watch: Callable[[DeviceNews], None]) -> None:
        self._watch = watch
        self._trouble, self._copied, self._good_check_ins = "", "", 0

    @property
    def trouble(self) -> str:
        """The last problem, if it is not resolved yet."""
        return self._trouble

    @property
    def all_trouble(self) -> str:
        """The last problem, and a note if the folder was copied."""
        return "; ".join(dict.fromkeys(filter(None, (self._trouble, self._copied))))

    def tell(self, news: DeviceNews) -> None:
        """Pass on a piece of news, with its text escaped for a terminal."""
        self._watch(replace(news, said=printable(news.said)))

    def tell_trouble(self, said: str, again_s: float = 0.0) -> None:
        """Report a problem, and remember it."""
        self._trouble = printable(said)
        self.tell(DeviceNews("trouble", said, again_s=again_s))

    def trouble_is_over(self) -> None:
        """Forget the problem, because the server answered."""
        self._trouble = ""

    def folder_was_copied(self, said: str) -> None:
        """Remember that another device uses the same key."""
        self._copied, self._good_check_ins = said, 0

    def check_in_went_well(self) -> None:
        """Count a check-in that was answered; after `CLEAN` of them, forget that the folder was copied."""
        self._good_check_ins += 1
        if self._good_check_ins >= CLEAN:
            self._copied = ""
