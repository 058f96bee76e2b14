"""What a device tells its owner: news as they happen, and the trouble that is not over."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from sumus.text import printable
from sumus.wire.messages import Assignment

NewsKind: TypeAlias = Literal[
    "enrolled", "training", "trained", "evaluated", "counted", "discarded", "aborted", "model", "waiting", "trouble"
]

CLEAN = 20
"""Check-ins that go well, after which the device no longer speaks of a copied folder."""


@dataclass(frozen=True)
class DeviceNews:
    """Something that a device did or met.

    Attributes:
        what: The kind of event.
        said: The event in words.
        task: The task that the event is about.
        kind: The kind of work, "train" or "evaluate".
        version: The version of the model.
        examples: How many examples were trained or measured on.
        seconds: How long that took.
        measured: The mean of each metric.
        again_s: Seconds within which the device asks again, if it waits or had no answer.
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
    """News about a piece of work, as far as the device knows which."""
    return DeviceNews(what) if work is None else DeviceNews(what, "", work.task, work.kind, work.version)


class NewsFeed:
    """Hands news to a function of the owner's, and remembers what is wrong.

    Args:
        watch: Is called with each piece of news.
    """

    def __init__(self, watch: Callable[[DeviceNews], None]) -> None:
        self._watch = watch
        self._trouble, self._copied, self._good_check_ins = "", "", 0

    @property
    def trouble(self) -> str:
        """What went wrong last, if it is not mended since."""
        return self._trouble

    @property
    def all_trouble(self) -> str:
        """The last trouble, and a note if the folder was copied."""
        return "; ".join(dict.fromkeys(filter(None, (self._trouble, self._copied))))

    def tell(self, news: DeviceNews) -> None:
        """Hand over a piece of news, with its text escaped for a terminal."""
        self._watch(replace(news, said=printable(news.said)))

    def tell_trouble(self, said: str, again_s: float = 0.0) -> None:
        """Hand over that something is wrong, and remember it."""
        self._trouble = printable(said)
        self.tell(DeviceNews("trouble", said, again_s=again_s))

    def trouble_is_over(self) -> None:
        """The server answered, so that what was wrong is mended."""
        self._trouble = ""

    def folder_was_copied(self, said: str) -> None:
        """Remember that another device uses the same key."""
        self._copied, self._good_check_ins = said, 0

    def check_in_went_well(self) -> None:
        """Count a check-in that was answered; after `CLEAN` of them a copied folder is forgotten."""
        self._good_check_ins += 1
        if self._good_check_ins >= CLEAN:
            self._copied = ""
