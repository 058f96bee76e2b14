"""One step of a device's record: what the protocol's table decides, and what follows for everything that the device remembers.

    stepped = step_record(record, event, floor)     pure: nothing is written, sent or told

The shell writes `stepped.record` first, and then does what `stepped.actions` say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import sumus.protocol.session as session
from sumus.device.news import DeviceNews, news_of
from sumus.device.store import Record, counted
from sumus.protocol.session import Floor

V = TypeVar("V")

MOST_TASKS = 16
"""The most tasks of which a device keeps something. Those that came last are kept, however many a server names."""


@dataclass(frozen=True)
class RecordStep:
    """What an event makes of a record.

    Attributes:
        record: The record to be written.
        actions: What the device does next, in this order.
        news: "counted" or "discarded", for each session whose end is known now.
    """

    record: Record
    actions: tuple[session.Action, ...]
    news: tuple[DeviceNews, ...]


def step_record(record: Record, event: session.Event, floor: Floor) -> RecordStep:
    """Decide what an event makes of a record.

    A session whose report was counted makes its pending state the client's state, in the same record in which the protocol's
    row says so. The report and the pending state are forgotten as soon as nothing can ask for them again.
    """
    work = record.work
    row, actions = session.step(record.row, event, floor)
    record, news = replace(record, row=row), list[DeviceNews]()
    for act in actions:
        if isinstance(act, session.KeepState):
            if work is not None and record.pending is not None:
                record = replace(record, states=with_task(record.states, work.task, record.pending))
            in_sums = ("in sums",) if work is not None and work.kind == "train" else ()
            record = replace(record, counts=counted(record.counts, "counted", *in_sums))
            news.append(news_of("counted", work))
        elif isinstance(act, session.UndoState):
            record = replace(record, counts=counted(record.counts, "discarded"))
            news.append(news_of("discarded", work))
        elif isinstance(act, session.SendAbort):
            record = replace(record, counts=counted(record.counts, "aborted"))
    if not row.session:  # how it ended is known, or there is no session
        record = replace(record, work=None)
    if not row.unsettled:
        record = replace(record, report=None, pending=None)
    return RecordStep(record, actions, tuple(news))


def with_task(kept: Mapping[str, V], task: str, value: V) -> dict[str, V]:
    """A mapping by task in which one task's value is replaced, and is the newest of at most `MOST_TASKS`."""
    others = [(name, other) for name, other in kept.items() if name != task]
    return dict([*others[1 - MOST_TASKS :], (task, value)])
