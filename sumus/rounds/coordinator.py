"""Rounds on a store: every change of a row is decided by `protocol.round`, in the transaction that writes it.

Each method is one transaction: it reads facts, decides, writes, and returns the actions. The rows are durable when the method
has returned, so the caller carries the actions out after that. The server calls a coordinator on the rows of its database; the
simulator's virtual clock and the fault tests call one on rows in memory. Only the list of staged reports is kept in memory.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

from sumus.pacing import Pacing
from sumus.protocol.round import (
    TABLE,
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
    patience,
    room,
)
from sumus.protocol.rows import changed
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.recording import newest_of, record
from sumus.storage.memory import MemoryStore
from sumus.storage.store import Rows, RunRow, Store, TakenOver

Rules: TypeAlias = Callable[[Facts, Event], Decision]
Adding: TypeAlias = Callable[[Rows, Sequence[Session]], None]
Also: TypeAlias = Callable[[Rows], None]
FOLLOWS = -1
"""The value of `fence` if another process leads. (A fence is a number that grows with each change of leader.) Then this process
decides only about devices' check-ins and reports.
"""


class Arrived(NamedTuple):
    """A report that has arrived.

    Attributes:
        sessions: The session of the report; for an edge's sum, all sessions in the sum.
        parent: The edge that made the sum; empty for a device's report.
    """

    sessions: tuple[str, ...]
    parent: str = ""


class Coordinator:
    """The rounds of a run.

    Attributes:
        store: The store of the rows.
        fence: The fence with which this process leads; FOLLOWS if another process leads; None if it is not known which process
            leads, and then fences are not compared. Methods raise TakenOver if another process has taken the lead.
        staged: The reports that wait in memory for the next commit: the sessions of each report, keyed by the first session.
        illegal: The number of events that the table does not allow, by (state, event's name).
    """

    def __init__(
        self, circumstances: Callable[[], Circumstances], store: Store | None = None, rules: Rules = decide
    ) -> None:
        """Decide about the rounds in a store.

        Args:
            circumstances: Returns the inputs of decisions that are not rows; called before each decision.
            store: The store of the rows; None for a new store in memory.
            rules: `decide`, or a replacement in a test.
        """
        self.store = MemoryStore() if store is None else store
        self.fence: int | None = None
        self.staged: dict[str, tuple[str, ...]] = {}
        self.illegal: Counter[tuple[str, str]] = Counter()
        self._circumstances = circumstances
        self._rules = rules
        self._waits_with: dict[str, tuple[str, ...]] = {}

    # ── reading rows ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def current(self) -> Round:
        """The newest round's row."""
        with self.store.transaction() as rows:
            return newest_of(rows)

    def round(self, number: int) -> Round | None:
        """Return a round's row; None if the round is forgotten, or does not exist yet."""
        with self.store.transaction() as rows:
            return rows.round(number)

    def session(self, id: str) -> Session | None:
        """Return a session's row; None if the session is forgotten, or was never given."""
        with self.store.transaction() as rows:
            return rows.session(id)

    def last_sessions(self, devices: Sequence[str]) -> list[Session]:
        """Return the last session of each of these devices; devices that never had a session are left out."""
        with self.store.transaction() as rows:
            rows.read_ahead(devices)
            known = [rows.device(device) for device in devices]
        return [device.session for device in known if device is not None and device.session is not None]

    def room(self, now: float | None = None) -> int:
        """Return the number of sessions that may be given now. `now` is the time of the store's clock; None ignores the pace."""
        row, given = self.current, self._circumstances()
        giving = row.state is State.OPEN and not given.paused and (now is None or now >= begins_at(given.pacing, row))
        return room(given.pacing, given.population, row) if giving else 0

    def facts(self, now: float) -> Facts:
        """Return the facts about the newest round, as a transaction would read them now."""
        with self.store.transaction() as rows:
            return self._facts(rows, now)

    # ── check-ins and reports ────────────────────────────────────────────────────────────────────────────────────────

    def check_in(self, device: str, event: CheckIn, now: float) -> tuple[Action, ...]:
        """Decide the check-in of a device."""
        return self.check_in_all([(device, event)], now)[0]

    def check_in_all(self, asked: Sequence[tuple[str, CheckIn]], now: float) -> list[tuple[Action, ...]]:
        """Decide many check-ins in one transaction, in order.

        A check-in that reuses the id of an earlier session for a new session gets no actions: correct devices never do this.
        """
        with self.store.transaction() as rows:
            rows.read_ahead([device for device, _ in asked], [event.session for _, event in asked])
            return [
                ()
                if _is_used(rows, event)
                else self._apply(
                    rows, event, self._facts(rows, now, device=rows.device(device) or DeviceRow(device))
                ).actions
                for device, event in asked
            ]

    def report(self, session: str, now: float) -> tuple[Action, ...]:
        """Stage an update that has arrived completely. For an unknown session, return no actions."""
        return self.report_all([Arrived((session,))], now)[0]

    def report_all(self, reports: Sequence[Arrived], now: float) -> list[tuple[Action, ...]]:
        """Stage many reports in one transaction.

        A report gets no actions if its session is unknown, or if it overlaps a report that is already staged.
        """
        answers = list[tuple[Action, ...]]()
        with self.store.transaction() as rows:
            rows.read_ahead(sessions=[session for report in reports for session in report.sessions])
            for report in reports:
                sessions, facts = report.sessions, self._facts(rows, now, report.sessions)
                if len(facts.sessions) < len(sessions) and _is_counted(rows, report):  # some devices have left since
                    answers.append(tuple(map(AcceptReport, sessions)))
                    continue
                if len(facts.sessions) != len(sessions) or any(
                    self._waits_with.get(session, sessions) != sessions for session in sessions
                ):
                    answers.append(())
                    continue
                actions = self._apply(rows, Report(report.parent), facts).actions
                if any(isinstance(action, StageReport) for action in actions):
                    self.staged[sessions[0]] = sessions
                    self._waits_with |= dict.fromkeys(sessions, sessions)
                answers.append(actions)
        return answers

    def commit(self, now: float, add: Adding = lambda rows, counted: None) -> tuple[Action, ...]:
        """Count the staged reports.

        Args:
            now: Seconds of the store's clock.
            add: Adds reports to the sum; called within the transaction, with the sessions that are counted now.
        """
        waiting = dict(self.staged)
        with self.store.transaction() as rows:
            rows.read_ahead(sessions=[session for sessions in waiting.values() for session in sessions])
            whole = {first: sessions for first, sessions in waiting.items() if all(map(rows.session, sessions))}
            facts = self._facts(rows, now, [session for sessions in whole.values() for session in sessions])
            actions = tuple[Action, ...]()
            if facts.sessions:
                decision = self._apply(rows, Commit(tuple(map(len, whole.values()))), facts)
                add(rows, [session for session in decision.sessions if session.state == "counted"])
                actions = decision.actions
        again = {action.session for action in actions if isinstance(action, StageReport)}
        self.staged = {first: sessions for first, sessions in waiting.items() if first in again}
        self._waits_with = {session: sessions for sessions in self.staged.values() for session in sessions}
        gone = [sessions for first, sessions in waiting.items() if first not in whole]  # the device has left since
        return (*actions, *(RefuseReport(session, "closed") for sessions in gone for session in sessions))

    def drop(self, sessions: Iterable[str], reason: str, now: float) -> tuple[Action, ...]:
        """End sessions that will not report."""
        with self.store.transaction() as rows:
            return self.decide_in(rows, Dropped(reason), sessions, now)

    def let_go(self, session: str, now: float) -> tuple[Action, ...]:
        """Free the place of a session whose report can never be counted."""
        with self.store.transaction() as rows:
            return self.decide_in(rows, Overdue(spoilt=True), [session], now)

    # ── time, and the decisions of the leader ────────────────────────────────────────────────────────────────────────

    def expire(self, now: float, sessions: Iterable[str] | None = None) -> tuple[Action, ...]:
        """Free the places of sessions that take too long, and end the expired sessions.

        A session whose report waits for the next commit has reported in time.

        Args:
            now: Seconds of the store's clock.
            sessions: The sessions to check; None for all.
        """
        with self.leading() as rows:
            late = _overdue(rows, self._circumstances().pacing, now) if sessions is None else sessions
            return self.decide_in(rows, Overdue(), [each for each in late if each not in self._waits_with], now)

    def tick(self, now: float) -> tuple[Action, ...]:
        """Decide the events that are due at this time: rounds open, close, or are abandoned."""
        with self.leading() as rows:
            return self._apply(rows, Tick(), self._facts(rows, now)).actions

    def publish(self, number: int, now: float, also: Also = lambda rows: None) -> tuple[Action, ...]:
        """Record that a round's model exists.

        Args:
            number: The round.
            now: Seconds of the store's clock.
            also: Writes the other rows of the model. It is called within the transaction, and only if this call publishes the
                model.
        """
        with self.leading() as rows:
            row = rows.round(number)
            assert row is not None, "the row of a round is kept while its model is being made"
            waits = any(other.number < number and other.state is State.CLOSING for other in rows.rounds())
            decision = self._apply(rows, Published(), changed(self._facts(rows, now), round=row, waits=waits))
            if decision.rounds:
                also(rows)
            return decision.actions

    def cancel(self, number: int, now: float) -> tuple[Action, ...]:
        """End a round without a model."""
        with self.leading() as rows:
            row = rows.round(number)
            if row is None:
                return ()
            return self._apply(rows, Cancelled(), changed(self._facts(rows, now), round=row)).actions

    def recover(self, now: float, fence: int | None = None) -> tuple[Action, ...]:
        """Lead from now on: forget the staged reports, and go on with the unfinished rounds.

        Args:
            now: Seconds of the store's clock.
            fence: The fence of the lease. If it is None, no lease is used, and the fence is the run's last fence plus one.
        """
        self.staged.clear()
        self._waits_with.clear()
        actions: list[Action] = []
        with self.store.transaction() as rows:
            run = run_led_with(rows, self.fence) if fence is None else rows.run()
            mine = run.fence + 1 if fence is None else fence
            if run.fence > mine:
                raise TakenOver
            rows.put_run(changed(run, fence=mine, led=now))
            self.fence = None
            for row in rows.rounds():
                actions += self._apply(rows, Recovered(mine), changed(self._facts(rows, now), round=row)).actions
        self.fence = mine
        return tuple(actions)

    def follow(self) -> None:
        """Let another process lead, and forget the staged reports."""
        self.staged.clear()
        self._waits_with.clear()
        self.fence = FOLLOWS

    # ── transactions ─────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def transaction(self) -> Generator[Rows, None, None]:
        """Open a transaction of this process, whether the process leads or not.

        Raises:
            TakenOver: This process led, and another process leads now.
        """
        with self.store.transaction() as rows:
            run_led_with(rows, self.fence)
            yield rows

    @contextmanager
    def leading(self) -> Generator[Rows, None, None]:
        """Open a transaction that only the leader may open.

        Raises:
            TakenOver: Another process leads.
        """
        if self.fence == FOLLOWS:
            raise TakenOver
        with self.transaction() as rows:
            yield rows

    def decide_in(self, rows: Rows, event: Event, sessions: Iterable[str], now: float) -> tuple[Action, ...]:
        """Decide an event about sessions within a transaction. If all sessions are unknown, nothing is decided."""
        facts = self._facts(rows, now, sessions)
        return self._apply(rows, event, facts).actions if facts.sessions else ()

    def _facts(self, rows: Rows, now: float, sessions: Iterable[str] = (), device: DeviceRow | None = None) -> Facts:
        run, given = run_led_with(rows, self.fence), self._circumstances()
        known = (rows.session(session) for session in sessions)
        return Facts(
            given.pacing,
            now,
            newest_of(rows),
            run.version,
            tuple(row for row in known if row is not None),
            device,
            given.paused,
            given.population,
            given.arriving,
            run.lasts,
            led=run.led,
            takes=run.takes,
            takes_by_edge=run.takes_by_edge,
            models=run.models,
        )

    def _apply(self, rows: Rows, event: Event, facts: Facts) -> Decision:
        """Decide an event, and write the decision. An event that the table does not allow is counted in `illegal`."""
        if (name := TABLE.illegal(facts.round.state, event)) is not None:
            self.illegal[facts.round.state.value, name] += 1
        decision = self._rules(facts, event)
        record(rows, decision, facts)
        return decision


def run_led_with(rows: Rows, fence: int | None) -> RunRow:
    """Read the run's row.

    Raises:
        TakenOver: This process led with this fence, and another process leads now.
    """
    run = rows.run()
    if fence not in (None, FOLLOWS, run.fence):
        raise TakenOver
    return run


def _overdue(rows: Rows, pacing: Pacing, now: float) -> list[str]:
    """List the sessions that may have lapsed (lost their places), and the expired sessions."""
    run = rows.run()
    shortest = min(patience(pacing, run.takes), patience(pacing, run.takes_by_edge))
    slow = rows.out_since(now - shortest) if now - run.led >= shortest else ()
    return list(dict.fromkeys([*slow, *rows.overdue(now)]))


def _is_used(rows: Rows, event: CheckIn) -> bool:
    """Return whether a check-in names a session that was given for another check-in, or counted before."""
    used = rows.session(event.session)
    if used is not None:
        return used.serial != event.serial
    return rows.sum_of(event.session) is not None


def _is_counted(rows: Rows, report: Arrived) -> bool:
    """Return whether an edge's sum was counted, even if some of its sessions are already forgotten."""
    known = [session for session in map(rows.session, report.sessions) if session is not None]
    return (
        bool(report.parent)
        and all(session.parent == report.parent for session in known)
        and all(rows.sum_of(session) is not None for session in report.sessions)
    )
