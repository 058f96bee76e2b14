"""Writes a decision, and its consequences for the run and for devices, into the rows of a store."""

from sumus.protocol.round import (
    LEFT,
    AcceptReport,
    Decision,
    DeviceRow,
    Facts,
    RefuseReport,
    Round,
    Session,
    State,
    forgiven,
    learnt,
    rested,
)
from sumus.protocol.rows import changed
from sumus.storage.store import Fenced, Rows, RunRow, Store

_SMOOTH = 0.3
"""The weight of the latest round in the average duration of rounds."""


def newest_of(rows: Rows) -> Round:
    """Return the newest round: it is open, about to open, or about to end."""
    row = rows.round(rows.run().newest)
    assert row is not None, "the newest round is never forgotten"
    return row


def record(rows: Rows, decision: Decision, facts: Facts) -> None:
    """Write the rows of rounds and sessions, and the consequences for the run and for devices."""
    before, run = facts.round, rows.run()
    for row in decision.rounds:
        rows.put_round(row)
        if row.number > run.newest:
            run = changed(run, newest=row.number)
        if row.state is State.CLOSING and before.state is not State.CLOSING:
            lasted = facts.now - before.since
            run = changed(run, lasts=run.lasts + (lasted - run.lasts) * (_SMOOTH if run.lasts else 1.0))
        if row.state is State.PUBLISHED and before.state is not State.PUBLISHED:
            run = changed(run, version=run.version + 1, models=run.models + 1)
    rows.put_run(_with_durations(run, decision, facts))
    models = _models_before(rows, run, decision, facts)
    for session in decision.sessions:
        _write_session(rows, session, models + 1)
        if session.id in decision.lapses and (device := rows.device(session.device)) is not None:
            rows.put_device(rested(device, session, facts))
    for row in decision.rounds:
        if row.state is State.ABANDONED and before.state is not State.ABANDONED:
            _without_model(rows, row)


def record_fenced(store: Store, decision: Decision, facts: Facts) -> None:
    """Write a decision about facts that were read in an earlier transaction.

    Raises:
        Fenced: The round's state or fence has changed since it was read.
    """
    with store.transaction() as rows:
        row = rows.round(facts.round.number)
        if row is None or (row.state, row.fence) != (facts.round.state, facts.round.fence):
            raise Fenced
        record(rows, decision, facts)


def _models_before(rows: Rows, run: RunRow, decision: Decision, facts: Facts) -> int:
    """Count the sums that become a model before the open sum does, including sums whose models are being made now."""
    if not facts.pacing.buffered or not any(session.state == "counted" for session in decision.sessions):
        return run.models
    return run.models + sum(row.state is State.CLOSING and row.number < facts.round.number for row in rows.rounds())


def _without_model(rows: Rows, row: Round) -> None:
    """Record for each device in an abandoned sum that no model is made of this sum."""
    for id in rows.counted_in(row.number):
        session = rows.session(id)
        device = None if session is None else rows.device(session.device)
        if device is not None and device.last_sum == row.number:
            rows.put_device(changed(device, models=device.models - 1))


def _with_durations(run: RunRow, decision: Decision, facts: Facts) -> RunRow:
    """Update the average duration of work from the reports that are answered now, accepted or refused.

    A session that began while another process led is left out.
    """
    answered = {action.session for action in decision.actions if isinstance(action, AcceptReport | RefuseReport)}
    if not answered:
        return run
    heard = set[str]()
    for session in sorted(decision.sessions, key=lambda session: session.began):
        if session.id in answered and session.began >= run.led and session.parent not in heard:
            seconds = facts.now - session.began
            if session.parent:
                heard.add(session.parent)  # an edge's sum of many reports is one measurement of the edge's duration
                run = changed(run, takes_by_edge=learnt(run.takes_by_edge, seconds))
            else:
                run = changed(run, takes=learnt(run.takes, seconds))
    return run


def _write_session(rows: Rows, session: Session, models: int) -> None:
    """Write the row of a session and the row of its device.

    Of a device's sessions, only the last one and the last counted one are kept. If a device has left, a session that it got
    through an edge is kept until the session ends.

    Args:
        rows: The transaction.
        session: The session's new row.
        models: The number of sums that will have become a model when the open sum has become one.
    """
    known = rows.device(session.device) or DeviceRow(session.device)
    rows.put_session(session)
    if known.rests_until == LEFT:
        if not session.awaited:
            rows.forget_device(session.device)
        return
    if session.state == "late":
        known = forgiven(known, session)
    last = known.session
    if last is not None and last.id != session.id:
        if last.serial > session.serial:
            return
        if last.id != known.last_counted:
            rows.drop_session(last.id)
    if session.state == "counted" and session.sum is not None:
        if known.last_counted not in (None, session.id):
            rows.drop_session(known.last_counted)
        times = known.times_counted + 1
        known = changed(
            known,
            last_sum=session.sum,
            last_counted=session.id,
            times_counted=times,
            lapses=0,
            rests_until=0.0,
            models=models,
        )
    rows.put_device(changed(known, session=session))
