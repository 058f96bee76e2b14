"""Devices that leave while their reports are in a sum that is open.

A person whose link lets in several keys could be counted, leave, and enrol again under a new key in the same sum. So the round
notes when a device left with which link, and a device that enrolled with that link later waits until the sum is closed.
"""

import json
from collections.abc import Mapping, Sequence

from sumus.protocol.round import LEFT, Action, DeviceRow, Dropped, Session
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.recording import newest_of
from sumus.storage.store import Rows, Store

_DEPARTED = "departed"
"""The name of a round's note of the devices that left after they were counted."""


def sessions_out_of(store: Store, who: str) -> list[str]:
    """List the sessions that may still report, and that `who` itself asked for: a device; or an edge, for its devices."""
    with store.transaction() as rows:
        return _out_of(rows, who)


def departed(store: Store) -> Mapping[str, float]:
    """Tell when a device left last whose report is in the open sum, by the hash of the token that it had enrolled with."""
    with store.transaction() as rows:
        return _departed(rows, newest_of(rows).number)


def keep_departed(rows: Rows, before: int, number: int) -> None:
    """Copy a round's note of departed devices to another round, whose sum goes into the same sum of the server above."""
    rows.put_note(number, _DEPARTED, rows.note(before, _DEPARTED))


def forget_device(
    coordinator: Coordinator, device: str, link: str, rounds: Sequence[int], reason: str, now: float
) -> tuple[Action, ...]:
    """End what a device or an edge's devices work at, and forget the device, but not that it was counted.

    Work that the device has by way of an edge goes on: its report may be in the edge's sum by now, which cannot be taken
    apart and would be refused whole. The edge knows whether the device is still one of its own.

    If the device is in the open sum, or may come into that sum, or if it is an edge whose devices are, and its link lets in
    more than one key, then a device that enrols with that link from now on waits until that sum is closed (see `departed`).

    Args:
        coordinator: The rounds of a run.
        device: The device's id, or the edge's.
        link: Hash of the token that it enrolled with, if that token was made for several uses; else empty.
        rounds: The rounds of the open sum, the last one last.
        reason: Why its sessions end.
        now: Seconds of the server's clock.
    """
    with coordinator.transaction() as rows:
        actions = coordinator.decide_in(rows, Dropped(reason), _out_of(rows, device), now)
        held = [session for session in _awaited(rows) if session.device == device and session.parent]
        if link and (held or any(_is_counted_in(rows, number, device) for number in rounds)):
            left = {**_departed(rows, rounds[-1]), link: now}
            rows.put_note(rounds[-1], _DEPARTED, json.dumps(left).encode())
        rows.forget_device(device)
        for session in held:  # one at most: nobody gives the device other work before that session has ended
            rows.put_session(session)
            rows.put_device(DeviceRow(device, session, rests_until=LEFT))
        return actions


def _out_of(rows: Rows, who: str) -> list[str]:
    """See `sessions_out_of`."""
    return [session.id for session in _awaited(rows) if who == (session.parent or session.device)]


def _awaited(rows: Rows) -> list[Session]:
    """List the sessions that may still report."""
    return [session for id in rows.sessions_out() if (session := rows.session(id)) is not None]


def _is_counted_in(rows: Rows, number: int, device: str) -> bool:
    """Return whether a round's sum holds a report of a device; or, if the device is an edge, of a device behind it."""
    known = rows.device(device)
    if known is not None and known.last_sum == number:
        return True
    counted = map(rows.session, rows.counted_in(number))
    return any(session is not None and session.parent == device for session in counted)


def _departed(rows: Rows, number: int) -> Mapping[str, float]:
    """See `departed`; of this round."""
    note = rows.note(number, _DEPARTED)
    return {} if note is None else json.loads(note)
