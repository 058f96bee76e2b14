"""Devices that leave while their reports are in an open sum.

A person whose link allows several keys could be counted, leave, enrol again under a new key, and be counted in the same sum
twice. So the round stores a note of when a device left and which link it had used. A device that enrols with that link later
must wait until the sum is closed.
"""

import json
from collections.abc import Mapping, Sequence

from sumus.protocol.round import LEFT, Action, DeviceRow, Dropped, Session
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.recording import newest_of
from sumus.storage.store import Rows, Store

_DEPARTED = "departed"
"""The name of the note in which a round stores the devices that left after they were counted."""


def sessions_out_of(store: Store, who: str) -> list[str]:
    """List the sessions of the device `who` that may still report; if `who` is an edge, those of the devices behind the edge."""
    with store.transaction() as rows:
        return _out_of(rows, who)


def departed(store: Store) -> Mapping[str, float]:
    """Return the time of the last departure for each enrolment link.

    Only devices that left while their reports were in the open sum are considered.

    Returns:
        The times, in seconds of the server's clock, by the hash of the link's token.
    """
    with store.transaction() as rows:
        return _departed(rows, newest_of(rows).number)


def keep_departed(rows: Rows, before: int, number: int) -> None:
    """Copy the note about departed devices to the next round of the same sum.

    An edge's rounds `before` and `number` go into one sum of its upstream server, and no person may be in that sum twice.
    """
    rows.put_note(number, _DEPARTED, rows.note(before, _DEPARTED))


def forget_device(
    coordinator: Coordinator, device: str, link: str, rounds: Sequence[int], reason: str, now: float
) -> tuple[Action, ...]:
    """End the open work of a device, or of an edge's devices, and delete the device's row. The record of counted reports stays.

    Work that the device got through an edge is not ended: its report may already be in the edge's sum. Such a sum cannot be
    divided, so the whole sum would be refused. The edge itself checks whether the device still belongs to it.

    A device that enrols with the same link from now on may have to wait until the open sum is closed (see `departed`). It has
    to wait if the link allows more than one key, and the open sum holds, or may still get, a report of the device or of a
    device behind the edge.

    Args:
        coordinator: The rounds of a run.
        device: The device's id, or the edge's.
        link: The hash of the token with which it enrolled, if the token was made for several uses; else empty.
        rounds: The rounds of the open sum, in order.
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
        for session in held:  # at most one: the device gets no other work before that session has ended
            rows.put_session(session)
            rows.put_device(DeviceRow(device, session, rests_until=LEFT))
        return actions


def _out_of(rows: Rows, who: str) -> list[str]:
    """Do the work of `sessions_out_of` within a transaction."""
    return [session.id for session in _awaited(rows) if who == (session.parent or session.device)]


def _awaited(rows: Rows) -> list[Session]:
    """List the sessions that may still report."""
    return [session for id in rows.sessions_out() if (session := rows.session(id)) is not None]


def _is_counted_in(rows: Rows, number: int, device: str) -> bool:
    """Return whether a round's sum holds a report of a device or, if `device` is an edge, of a device behind that edge."""
    known = rows.device(device)
    if known is not None and known.last_sum == number:
        return True
    counted = map(rows.session, rows.counted_in(number))
    return any(session is not None and session.parent == device for session in counted)


def _departed(rows: Rows, number: int) -> Mapping[str, float]:
    """Do the work of `departed` for this round, within a transaction."""
    note = rows.note(number, _DEPARTED)
    return {} if note is None else json.loads(note)
