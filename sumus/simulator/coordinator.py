"""A server in memory: rows, staged reports, and every change of them decided by `protocol.round`.

Each method is one transaction: it reads facts, decides, writes the rows if nobody else has, and gives the actions, which its
caller carries out. The virtual clock and the fault tests drive it; a real server does the same with a database.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeAlias

from sumus.pacing import Pacing
from sumus.protocol.round import (
    Action,
    CheckIn,
    Commit,
    Decision,
    Device,
    Dropped,
    Event,
    Facts,
    Published,
    Recovered,
    Report,
    Round,
    Session,
    Stage,
    State,
    Tick,
    decide,
    room,
)

Rules: TypeAlias = Callable[[Facts, Event], Decision]
_SMOOTH = 0.3
"""How much the latest round weighs in how long rounds last."""


class Fenced(Exception):
    """A row was written by somebody else since it was read."""


class Coordinator:
    """Rows by number and id. staged: sessions whose update waits in memory. sums: who is in each round's sum.

    rules: `decide`, or what is to be tried in its place.
    """

    def __init__(self, pacing: Pacing, population: int, masked: bool = False, rules: Rules = decide) -> None:
        self.pacing = pacing
        self._rules = rules
        self.population = population
        self.masked = masked
        self.paused = False
        self.arriving = 0.0
        self.version = 0
        self.fence = 0
        self.rounds: dict[int, Round] = {0: Round(0)}
        self.newest = 0
        self.sessions: dict[str, Session] = {}
        self.devices: dict[str, Device] = {}
        self.staged: dict[str, None] = {}
        self.sums: dict[int, list[str]] = {}
        self._lasts = 0.0

    @property
    def current(self) -> Round:
        """The newest row."""
        return self.rounds[self.newest]

    def room(self) -> int:
        """Sessions that may be given now."""
        row = self.current
        giving = row.state is (State.SELECTING if self.masked else State.OPEN) and not self.paused
        return room(self.facts(0.0), row) if giving else 0

    def check_in(self, device: str, event: CheckIn, now: float) -> tuple[Action, ...]:
        """Answer a device that asks for work."""
        known = self.devices.get(device) or Device(device)
        return self._write(event, self.facts(now, device=known))

    def report(self, session: str, now: float) -> tuple[Action, ...]:
        """Take in an update that has arrived whole. Of a session that nobody knows: nothing."""
        if session not in self.sessions:
            return ()
        actions = self._write(Report(), self.facts(now, sessions=[session]))
        self.staged |= {action.session: None for action in actions if isinstance(action, Stage)}
        return actions

    def commit(self, now: float) -> tuple[Action, ...]:
        """Add what is staged to the sum."""
        waiting = [session for session in self.staged if session in self.sessions]
        self.staged.clear()
        actions = self._write(Commit(), self.facts(now, sessions=waiting)) if waiting else ()
        self.staged |= {action.session: None for action in actions if isinstance(action, Stage)}
        return actions

    def drop(self, sessions: Iterable[str], reason: str, now: float) -> tuple[Action, ...]:
        """Sessions that will not report."""
        known = [session for session in sessions if session in self.sessions]
        return self._write(Dropped(reason), self.facts(now, sessions=known)) if known else ()

    def tick(self, now: float) -> tuple[Action, ...]:
        """Let time have gone by."""
        return self._write(Tick(), self.facts(now))

    def publish(self, number: int, now: float) -> tuple[Action, ...]:
        """A round's model is there."""
        row = self.rounds[number]
        waits = any(each < number and other.state is State.CLOSING for each, other in self.rounds.items())
        actions = self._write(Published(), replace(self.facts(now), round=row, waits=waits))
        if self.rounds[number].state is State.PUBLISHED and row.state is not State.PUBLISHED:
            self.version += 1
        return actions

    def recover(self, now: float) -> tuple[Action, ...]:
        """Begin anew with what was written: what was staged is gone, and unfinished rounds are taken up."""
        self.staged.clear()
        self.fence += 1
        actions: list[Action] = []
        for number in sorted(self.rounds):
            actions += self._write(Recovered(self.fence), replace(self.facts(now), round=self.rounds[number]))
        return tuple(actions)

    def expired(self, now: float) -> list[str]:
        """Sessions that are out beyond their time."""
        return [session.id for session in self.sessions.values() if session.state == "out" and now >= session.expires]

    def forget_rounds_before(self, number: int) -> None:
        """Keep no rows of older rounds."""
        for old in [each for each in self.rounds if each < number]:
            del self.rounds[old]
            self.sums.pop(old, None)

    def facts(self, now: float, sessions: Iterable[str] = (), device: Device | None = None) -> Facts:
        """What a transaction about the newest round would read now."""
        return Facts(
            self.pacing,
            now,
            self.current,
            self.version,
            tuple(self.sessions[session] for session in sessions),
            device,
            self.masked,
            self.paused,
            self.population,
            self.arriving,
            self._lasts,
        )

    def _write(self, event: Event, facts: Facts) -> tuple[Action, ...]:
        decision = self._rules(facts, event)
        self.write(decision, facts)
        return decision.actions

    def write(self, decision: Decision, facts: Facts) -> None:
        """One transaction: all rows or none, and none where the round is no longer as it was read."""
        before = self.rounds.get(facts.round.number)
        if before is None or (before.state, before.fence) != (facts.round.state, facts.round.fence):
            raise Fenced
        for row in decision.rounds:
            if row.state is State.CLOSING and before.state is not State.CLOSING:
                self._lasts += (facts.now - before.since - self._lasts) * (_SMOOTH if self._lasts else 1.0)
            self.rounds[row.number] = row
            self.newest = max(self.newest, row.number)
        for session in decision.sessions:
            self._write_session(session)

    def _write_session(self, session: Session) -> None:
        known = self.devices.get(session.device) or Device(session.device)
        if known.session is not None and known.session.id != session.id:
            if known.session.serial > session.serial:
                self.sessions[session.id] = session
                return
            if known.session.id != known.last_counted:
                self.sessions.pop(known.session.id, None)
        if session.state == "counted" and session.sum is not None:
            if known.last_counted is not None:
                self.sessions.pop(known.last_counted, None)
            times = known.times_counted + 1
            known = replace(known, last_sum=session.sum, last_counted=session.id, times_counted=times)
            self.sums.setdefault(session.sum, []).append(session.id)
        self.sessions[session.id] = session
        self.devices[session.device] = replace(known, session=session)
