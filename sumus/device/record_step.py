"""One step of a device's record: the decision of the protocol's table, and its consequences for the device's memory.

    stepped = step_record(record, event, floor)     pure: writes, sends and reports nothing

The caller writes `stepped.record` first, and then carries out `stepped.actions`.
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
"""The maximum number of tasks for which a device keeps data. The newest ones are kept, however many a server names."""


@dataclass(frozen=True)
class RecordStep:
    """The result of applying an event to a record.

    Attributes:
        record: The record to be written.
        actions: The device's next actions, in order.
        news: "counted" or "discarded", for each session whose outcome has become known.
    """

    record: Record
    actions: tuple[session.Action, ...]
    news: tuple[DeviceNews, ...]


def step_record(record: Record, event: session.Event, floor: Floor) -> RecordStep:
    """Apply an event to a record.

    If a session's report was counted, its pending state becomes the client's state, in the same record as the protocol's
    new row. The report and the pending state are removed as soon as they cannot be needed again.
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
    if not row.session:  # its outcome is known, or there is no session
        record = replace(record, work=None)
    if not row.unsettled:
        record = replace(record, report=None, pending=None)
    return RecordStep(record, actions, tuple(news))


def with_task(kept: Mapping[str, V], task: str, value: V) -> dict[str, V]:
    """Replace one task's value in a mapping by task, and make it the newest of at most `MOST_TASKS`."""
    others = [(name, other) for name, other in kept.items() if name != task]
    return dict([*others[1 - MOST_TASKS :], (task, value)])
