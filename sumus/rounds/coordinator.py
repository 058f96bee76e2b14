"""Rounds on a store: every change of a row is decided by `protocol.round`, in the transaction that writes it.

Each method is one transaction: it reads facts, decides, writes, and gives the actions, which its caller carries out once it has
returned: not before. The server drives it; the simulator's virtual clock and the fault schedules do so on rows in memory. What is
staged is in memory alone.
"""

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

from sumus.pacing import Pacing
from sumus.protocol.round import (
    LEFT,
    AcceptReport,
    Action,
    Cancelled,
    CheckIn,
    Commit,
    Decision,
    DeviceRow,
    Dropped,
    Event,
    Facts,
    Overdue,
    Published,
    Recovered,
    RefuseReport,
    Report,
    Round,
    Session,
    StageReport,
    State,
    Tick,
    begins_at,
    decide,
    forgiven,
    learnt,
    patience,
    rested,
    room,
)
from sumus.protocol.rows import changed
from sumus.storage.memory import MemoryStore
from sumus.storage.store import Fenced, Rows, RunRow, Store, TakenOver

Rules: TypeAlias = Callable[[Facts, Event], Decision]
Adding: TypeAlias = Callable[[Rows, Sequence[Session]], None]
Also: TypeAlias = Callable[[Rows], None]
FOLLOWS = -1
"""In place of a fence, where another process leads: then this one takes what devices ask and report, and nothing else."""
_DEPARTED = "departed"
"""The note of a round that says who has left it after they were counted."""
_SMOOTH = 0.3
"""How much the latest round weighs in how long rounds last."""


class Arrived(NamedTuple):
    """A report: of one session; or of those that an edge, the parent, has added."""

    sessions: tuple[str, ...]
    parent: str = ""


class Coordinator:
    """The rounds of a run. staged: reports that wait in memory: the sessions of each, by the first of them.

    fence: that this process leads with; FOLLOWS where another does; None where nobody has said, and then it is not compared.
    TakenOver is raised once another leads.
    population: devices known.  arriving: check-ins a second of late.  rules: `decide`, or what is to be tried in its place.
    """

    def __init__(
        self,
        pacing: Pacing,
        population: int,
        masked: bool = False,
        rules: Rules = decide,
        store: Store | None = None,
    ) -> None:
        self.pacing = pacing
        self.population = population
        self.masked = masked
        self.store = MemoryStore() if store is None else store
        self.paused = False
        self.arriving = 0.0
        self.fence: int | None = None
        self.staged: dict[str, tuple[str, ...]] = {}
        self._rules = rules
        self._waits_with: dict[str, tuple[str, ...]] = {}

    @property
    def current(self) -> Round:
        """The newest row."""
        with self.store.transaction() as rows:
            return newest_of(rows)

    @property
    def version(self) -> int:
        """Models published."""
        with self.store.transaction() as rows:
            return rows.run().version

    def round(self, number: int) -> Round | None:
        """A round's row; None for what is forgotten, or not yet there."""
        with self.store.transaction() as rows:
            return rows.round(number)

    def session(self, id: str) -> Session | None:
        """A session's row; None for what is forgotten, or was never given."""
        with self.store.transaction() as rows:
            return rows.session(id)

    def room(self, now: float | None = None) -> int:
        """Sessions that may be given now. now: by the store's clock; None to leave the pace out of account."""
        row = self.current
        giving = row.state is (State.SELECTING if self.masked else State.OPEN) and not self.paused
        giving = giving and (now is None or now >= begins_at(self.pacing, row))
        return room(self.pacing, self.population, row) if giving else 0

    def facts(self, now: float) -> Facts:
        """What a transaction about the newest round would read now."""
        with self.store.transaction() as rows:
            return self._facts(rows, now)

    def check_in(self, device: str, event: CheckIn, now: float) -> tuple[Action, ...]:
        """Answer a device that asks for work."""
        with self.store.transaction() as rows:
            return self._check_in(rows, device, event, now)

    def check_in_all(self, asked: Sequence[tuple[str, CheckIn]], now: float) -> list[tuple[Action, ...]]:
        """Answer many devices in one transaction, each after the one before it."""
        with self.store.transaction() as rows:
            rows.read_ahead([device for device, _ in asked], [event.session for _, event in asked])
            return [self._check_in(rows, device, event, now) for device, event in asked]

    def report(self, session: str, now: float) -> tuple[Action, ...]:
        """Take in an update that has arrived whole. Of a session that nobody knows: nothing."""
        return self.report_all([Arrived((session,))], now)[0]

    def report_all(self, reports: Sequence[Arrived], now: float) -> list[tuple[Action, ...]]:
        """Take in many in one transaction."""
        with self.store.transaction() as rows:
            rows.read_ahead(sessions=[session for report in reports for session in report.sessions])
            return [self._report(rows, report, now) for report in reports]

    def commit(self, now: float, add: Adding = lambda rows, counted: None) -> tuple[Action, ...]:
        """Add what is staged to the sum. add: is given the sessions that are counted now, within the transaction."""
        waiting = dict(self.staged)
        with self.store.transaction() as rows:
            rows.read_ahead(sessions=[session for sessions in waiting.values() for session in sessions])
            whole = {first: sessions for first, sessions in waiting.items() if all(map(rows.session, sessions))}
            facts = self._facts(rows, now, [session for sessions in whole.values() for session in sessions])
            actions = tuple[Action, ...]()
            if facts.sessions:
                decision = self._rules(facts, Commit(tuple(map(len, whole.values()))))
                _write(rows, decision, facts)
                add(rows, [session for session in decision.sessions if session.state == "counted"])
                actions = decision.actions
        again = {action.session for action in actions if isinstance(action, StageReport)}
        self.staged = {first: sessions for first, sessions in waiting.items() if first in again}
        self._waits_with = {session: sessions for sessions in self.staged.values() for session in sessions}
        gone = [
            sessions for first, sessions in waiting.items() if first not in whole
        ]  # with a device that has left since
        return (*actions, *(RefuseReport(session, "closed") for sessions in gone for session in sessions))

    def drop(self, sessions: Iterable[str], reason: str, now: float) -> tuple[Action, ...]:
        """Sessions that will not report."""
        with self.store.transaction() as rows:
            facts = self._facts(rows, now, sessions)
            return self._apply(rows, Dropped(reason), facts) if facts.sessions else ()

    def let_go(self, session: str, now: float) -> tuple[Action, ...]:
        """What a session reported can never be counted: its place is another's."""
        with self.store.transaction() as rows:
            facts = self._facts(rows, now, [session])
            return self._apply(rows, Overdue(spoilt=True), facts) if facts.sessions else ()

    def expire(self, now: float, sessions: Iterable[str] | None = None) -> tuple[Action, ...]:
        """Free the places of sessions that take too long, and end those whose time is over. sessions: which to look at; None
        for all. A report that waits here for the next commit has come in time."""
        with self.leading() as rows:
            found = self._overdue(rows, now) if sessions is None else sessions
            facts = self._facts(rows, now, [session for session in found if session not in self._waits_with])
            return self._apply(rows, Overdue(), facts) if facts.sessions else ()

    def tick(self, now: float) -> tuple[Action, ...]:
        """Let time have gone by."""
        with self.leading() as rows:
            return self._apply(rows, Tick(), self._facts(rows, now))

    def publish(self, number: int, now: float, also: Also = lambda rows: None) -> tuple[Action, ...]:
        """A round's model is there. also: what else is written, within the transaction, if this publishes it."""
        with self.leading() as rows:
            row = rows.round(number)
            assert row is not None, "a round whose model is being made is not forgotten"
            waits = any(other.number < number and other.state is State.CLOSING for other in rows.rounds())
            decision = self._rules(facts := changed(self._facts(rows, now), round=row, waits=waits), Published())
            _write(rows, decision, facts)
            if decision.rounds:
                also(rows)
            return decision.actions

    def cancel(self, number: int, now: float) -> tuple[Action, ...]:
        """End a round without a model."""
        with self.leading() as rows:
            row = rows.round(number)
            return () if row is None else self._apply(rows, Cancelled(), changed(self._facts(rows, now), round=row))

    def recover(self, now: float, fence: int | None = None) -> tuple[Action, ...]:
        """Lead, and begin anew with what was written: what was staged is gone, and unfinished rounds are taken up.

        fence: of the lease; None where there is no lease: one more than was there.
        """
        self.staged.clear()
        self._waits_with.clear()
        actions: list[Action] = []
        with self.store.transaction() as rows:
            run = self._led(rows) if fence is None else rows.run()
            mine = run.fence + 1 if fence is None else fence
            if run.fence > mine:
                raise TakenOver
            rows.put_run(changed(run, fence=mine, led=now))
            self.fence = None
            for row in rows.rounds():
                actions += self._apply(rows, Recovered(mine), changed(self._facts(rows, now), round=row))
        self.fence = mine
        return tuple(actions)

    def follow(self) -> None:
        """Let another process lead; what was staged is gone."""
        self.staged.clear()
        self._waits_with.clear()
        self.fence = FOLLOWS

    @contextmanager
    def transaction(self) -> Generator[Rows, None, None]:
        """One of this process, whether it leads or not. TakenOver where it did lead, and another does since."""
        with self.store.transaction() as rows:
            self._led(rows)
            yield rows

    @contextmanager
    def leading(self) -> Generator[Rows, None, None]:
        """One of whoever leads. TakenOver where another does."""
        if self.fence == FOLLOWS:
            raise TakenOver
        with self.transaction() as rows:
            yield rows

    def last_sessions(self, devices: Sequence[str]) -> list[Session]:
        """The last session of each of these devices that was ever given one."""
        with self.store.transaction() as rows:
            rows.read_ahead(devices)
            known = [rows.device(device) for device in devices]
        return [device.session for device in known if device is not None and device.session is not None]

    def sessions_out_of(self, who: str) -> list[str]:
        """List the sessions that may still report, and that `who` itself asked for: a device; or an edge, for its devices."""
        with self.store.transaction() as rows:
            return _out_of(rows, who)

    def forget(self, device: str, link: str, rounds: Sequence[int], reason: str, now: float) -> tuple[Action, ...]:
        """End what a device or an edge's devices work at, and forget the device, but not that it was counted.

        Work that the device has by way of an edge goes on: its report may be in the edge's sum by now, which cannot be taken
        apart and would be refused whole. The edge knows whether the device is still one of its own.

        If it is in the sum that is open, or may come into it, or if it is an edge whose devices are, and its link lets in more
        than one key, then a device that enrols with that link from now on waits until that sum is closed (see `departed`).

        Args:
            device: The device's id, or the edge's.
            link: Hash of the token that it enrolled with, if that token was made for several uses; else empty.
            rounds: The rounds of the sum that is open, the last one last.
            reason: Why its sessions end.
            now: Seconds of the server's clock.
        """
        with self.transaction() as rows:
            actions, out = tuple[Action, ...](), _out_of(rows, device)
            if out:
                actions = self._apply(rows, Dropped(reason), self._facts(rows, now, out))
            held = [session for session in _awaited(rows) if session.device == device and session.parent]
            if link and (held or any(_is_counted_in(rows, number, device) for number in rounds)):
                left = {**_departed(rows, rounds[-1]), link: now}
                rows.put_note(rounds[-1], _DEPARTED, json.dumps(left).encode())
            rows.forget_device(device)
            for session in held:  # one, of which nobody gives it other work before that has ended
                rows.put_session(session)
                rows.put_device(DeviceRow(device, session, rests_until=LEFT))
            return actions

    def departed(self) -> Mapping[str, float]:
        """When somebody left last who is in the sum that is open, by the hash of the token that they had enrolled with."""
        with self.store.transaction() as rows:
            return _departed(rows, newest_of(rows).number)

    def forget_rounds_before(self, number: int) -> None:
        """Keep no rows of older rounds."""
        with self.leading() as rows:
            rows.forget_rounds_before(number)

    def write(self, decision: Decision, facts: Facts) -> None:
        """Write what was decided by facts that were read before. Fenced where the round is no longer as it was read."""
        with self.store.transaction() as rows:
            row = rows.round(facts.round.number)
            if row is None or (row.state, row.fence) != (facts.round.state, facts.round.fence):
                raise Fenced
            _write(rows, decision, facts)

    def _overdue(self, rows: Rows, now: float) -> list[str]:
        """Sessions of which some may have lapsed, and those whose time is over."""
        run = rows.run()
        shortest = min(patience(self.pacing, run.takes), patience(self.pacing, run.takes_by_edge))
        slow = rows.out_since(now - shortest) if now - run.led >= shortest else ()
        return list(dict.fromkeys([*slow, *rows.overdue(now)]))

    def _report(self, rows: Rows, report: Arrived, now: float) -> tuple[Action, ...]:
        """Nothing of what nobody knows, nor of what is in part in another report that waits."""
        sessions = report.sessions
        facts = self._facts(rows, now, sessions)
        if len(facts.sessions) < len(sessions) and _is_counted(rows, report):  # and some devices have left since
            return tuple(map(AcceptReport, sessions))
        if len(facts.sessions) != len(sessions) or any(
            self._waits_with.get(session, sessions) != sessions for session in sessions
        ):
            return ()
        actions = self._apply(rows, Report(report.parent), facts)
        if any(isinstance(action, StageReport) for action in actions):
            self.staged[sessions[0]] = sessions
            self._waits_with |= dict.fromkeys(sessions, sessions)
        return actions

    def _check_in(self, rows: Rows, device: str, event: CheckIn, now: float) -> tuple[Action, ...]:
        known = rows.device(device) or DeviceRow(device)
        used = rows.session(event.session)
        if (used is not None and used.serial != event.serial) or (
            used is None and rows.sum_of(event.session) is not None
        ):
            return ()  # a word that the device has used before: whoever asks so is not one of ours
        return self._apply(rows, event, self._facts(rows, now, device=known))

    def _facts(self, rows: Rows, now: float, sessions: Iterable[str] = (), device: DeviceRow | None = None) -> Facts:
        run = self._led(rows)
        known = (rows.session(session) for session in sessions)
        return Facts(
            self.pacing,
            now,
            newest_of(rows),
            run.version,
            tuple(row for row in known if row is not None),
            device,
            self.masked,
            self.paused,
            self.population,
            self.arriving,
            run.lasts,
            led=run.led,
            takes=run.takes,
            takes_by_edge=run.takes_by_edge,
            models=run.models,
        )

    def _led(self, rows: Rows) -> RunRow:
        """Where the run stands. TakenOver where this process led it, and another does since."""
        run = rows.run()
        if self.fence not in (None, FOLLOWS, run.fence):
            raise TakenOver
        return run

    def _apply(self, rows: Rows, event: Event, facts: Facts) -> tuple[Action, ...]:
        decision = self._rules(facts, event)
        _write(rows, decision, facts)
        return decision.actions


def _out_of(rows: Rows, who: str) -> list[str]:
    """See `Coordinator.sessions_out_of`."""
    return [session.id for session in _awaited(rows) if who == (session.parent or session.device)]


def _awaited(rows: Rows) -> list[Session]:
    """The sessions that may still report."""
    return [session for id in rows.sessions_out() if (session := rows.session(id)) is not None]


def _is_counted(rows: Rows, report: Arrived) -> bool:
    """Whether an edge's sum is counted, some of whose sessions are forgotten."""
    known = [session for session in map(rows.session, report.sessions) if session is not None]
    return (
        bool(report.parent)
        and all(session.parent == report.parent for session in known)
        and all(rows.sum_of(session) is not None for session in report.sessions)
    )


def _is_counted_in(rows: Rows, number: int, device: str) -> bool:
    """Whether a device, or one that asks through it, is in a round's sum."""
    known = rows.device(device)
    if known is not None and known.last_sum == number:
        return True
    counted = map(rows.session, rows.counted_in(number))
    return any(session is not None and session.parent == device for session in counted)


def _departed(rows: Rows, number: int) -> Mapping[str, float]:
    """See `Coordinator.departed`; of this round."""
    note = rows.note(number, _DEPARTED)
    return {} if note is None else json.loads(note)


def keep_departed(rows: Rows, before: int, number: int) -> None:
    """Let what a round knows of who has left hold for another round too."""
    rows.put_note(number, _DEPARTED, rows.note(before, _DEPARTED))


def newest_of(rows: Rows) -> Round:
    """The round that is open, or about to be, or about to be over."""
    row = rows.round(rows.run().newest)
    assert row is not None, "the newest round is never forgotten"
    return row


def _write(rows: Rows, decision: Decision, facts: Facts) -> None:
    """Rows of rounds and sessions, and what follows from them for the run and for devices."""
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


def _models_before(rows: Rows, run: RunRow, decision: Decision, facts: Facts) -> int:
    """How many sums have become a model when the sum that is open will: those that are still being made, too."""
    if not facts.pacing.buffered or not any(session.state == "counted" for session in decision.sessions):
        return run.models
    return run.models + sum(row.state is State.CLOSING and row.number < facts.round.number for row in rows.rounds())


def _without_model(rows: Rows, row: Round) -> None:
    """Of devices that were counted in a sum which was abandoned: it makes no model."""
    for id in rows.counted_in(row.number):
        session = rows.session(id)
        device = None if session is None else rows.device(session.device)
        if device is not None and device.last_sum == row.number:
            rows.put_device(changed(device, models=device.models - 1))


def _with_durations(run: RunRow, decision: Decision, facts: Facts) -> RunRow:
    """What the reports that are answered now say of how long such work takes, whether they are counted or not. Nothing is learnt
    from work during which another led."""
    answered = {action.session for action in decision.actions if isinstance(action, AcceptReport | RefuseReport)}
    heard = set[str]()
    for session in sorted(decision.sessions, key=lambda session: session.began):
        if session.id in answered and session.began >= run.led and session.parent not in heard:
            seconds = facts.now - session.began
            if session.parent:
                heard.add(session.parent)  # an edge's sum of many says once how long its work takes
                run = changed(run, takes_by_edge=learnt(run.takes_by_edge, seconds))
            else:
                run = changed(run, takes=learnt(run.takes, seconds))
    return run


def _write_session(rows: Rows, session: Session, models: int) -> None:
    """Write a session's row and its device's.

    Of a device's sessions, its last one is kept, and the last one that was counted. If a device has left, the session that an
    edge has asked for is kept until it ends.

    Args:
        rows: The transaction.
        session: The session's new row.
        models: How many sums have become a model when the one that is open has.
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
