"""The server of a timeline: it decides by the protocol's own state table, its work takes time, and it may be unreachable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sumus.pacing import Conditions, Pacing
from sumus.protocol.round import (
    AcceptReport,
    Action,
    CheckIn,
    CloseRound,
    ComeLater,
    RefuseReport,
    Round,
    Session,
    StageReport,
    begins_at,
)
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Coordinator
from sumus.simulator.virtual_time.account import Account
from sumus.simulator.virtual_time.clock import VirtualClock
from sumus.simulator.virtual_time.roster import Roster
from sumus.simulator.virtual_time.watch import RoundWatch
from sumus.storage.memory import MemoryStore

ALL_CONDITIONS = Conditions(True, True, True, 1.0, 2**31)
"""The conditions that the devices of a simulation report."""


@dataclass(frozen=True)
class ServerCost:
    """The seconds that a server takes for its work.

    Attributes:
        commit: The shortest time from one commit to the next.
        report: The time for each report in a commit.
        publish: The time to turn a sum into a model.
    """

    commit: float = 0.0
    report: float = 0.0
    publish: float = 0.0


NO_COST = ServerCost()
"""A server that takes no time."""


class VirtualServer:
    """A run's coordinator on the virtual clock.

    Attributes:
        watch: Opens and ends the server's rounds as time passes.

    Args:
        pacing: The plan's pacing.
        population: The number of devices.
        clock: The virtual clock.
        books: The account, and the roster of the devices.
        cost: The time that the server takes for its work.
        outages: Periods (from, to), in seconds, in which the server cannot be reached.
        answer: Function that is called with a session and "counted" or "discarded", once the server knows the outcome.
    """

    def __init__(
        self,
        pacing: Pacing,
        population: int,
        clock: VirtualClock,
        books: tuple[Account, Roster],
        cost: ServerCost,
        outages: Sequence[tuple[float, float]],
        answer: Callable[[str, str], None],
    ) -> None:
        self._pacing, self._clock, self._cost, self._outages, self._answer = pacing, clock, cost, outages, answer
        self._account = books[0]
        self._store = MemoryStore()
        self._circumstances = Circumstances(pacing, population=population)
        self._coordinator = Coordinator(lambda: self._circumstances, self._store)
        self._staged: dict[str, float] = {}
        self._committing, self._committed = False, 0.0
        self._publishing = 0.0
        self.watch = RoundWatch(pacing, clock, self._coordinator, self._store, books, self._carry_out)

    # ── state of the server ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def current(self) -> Round:
        """The newest round's row."""
        return self._store.rounds[self._store.run.newest]

    @property
    def version(self) -> int:
        """The number of models published for training."""
        return self._store.run.version

    @property
    def models(self) -> int:
        """The number of sums that became a model. `Pacing.separation` is counted in these."""
        return self._store.run.models

    @property
    def begins(self) -> float:
        """The time from which the newest round gives work to devices."""
        return begins_at(self._pacing, self.current)

    def session(self, id: str) -> Session | None:
        """Return a session's row; None if the server does not know it."""
        return self._store.sessions.get(id)

    def is_down(self) -> bool:
        """Whether the server cannot be reached now."""
        return any(begin <= self._clock.now < end for begin, end in self._outages)

    def back_at(self) -> float:
        """Return the time at which a server that is down can be reached again."""
        return max(end for begin, end in self._outages if begin <= self._clock.now < end)

    def room(self, now: float | None = None) -> int:
        """Return the number of devices that may be given work now.

        Args:
            now: The current time, to respect the pace of the rounds; None to ignore the pace.
        """
        return self._coordinator.room(now)

    # ── requests of devices ───────────────────────────────────────────────────────────────────────────────────────

    def note_rate(self, rate: float) -> None:
        """Note the number of check-ins per second."""
        self._circumstances = replace(self._circumstances, arriving=rate)

    def check_in(self, who: int, event: CheckIn) -> tuple[Action, ...]:
        """Answer a device that asks for work."""
        return self._coordinator.check_in(str(who), event, self._clock.now)

    def turn_away(self) -> ComeLater:
        """Return the response to every device that asks while there is no work."""
        (later,) = self._coordinator.check_in("", CheckIn("", 1, ALL_CONDITIONS), self._clock.now)
        assert isinstance(later, ComeLater)
        return later

    def report(self, session: str) -> None:
        """Process a report that has arrived."""
        for action in self._coordinator.report(session, self._clock.now):
            if isinstance(action, StageReport):
                self._staged.setdefault(session, self._clock.now)
                load = self._account.totals.load
                load.staged = max(load.staged, len(self._staged))
                self._commit_soon()
            else:
                self._carry_out((action,))

    def drop(self, who: int, session: str, reason: str) -> None:
        """Note that a device will not report."""
        self._carry_out(self._coordinator.drop([session], reason, self._clock.now))
        self.watch.note_rest(who)

    def act(self, action: Action) -> None:
        """Carry out an action of the table of rounds, if the server is responsible for this kind of action."""
        match action:
            case AcceptReport(session) | RefuseReport(session, _):
                self._answer(session, "counted" if isinstance(action, AcceptReport) else "discarded")
            case CloseRound(number):
                self._publishing = max(self._clock.now, self._publishing) + self._cost.publish
                self._clock.at(self._publishing, self._publish, number, late=True)
            case _:
                pass

    # ── its own events ───────────────────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            self.act(action)
        self.watch.look_at_rounds()

    def _commit_soon(self) -> None:
        if not self._committing:
            self._committing = True
            begins = max(self._clock.now, self._committed + self._cost.commit)
            self._clock.at(begins, self._begin_commit, late=True)

    def _begin_commit(self) -> None:
        self._clock.at(self._clock.now + self._cost.report * len(self._staged), self._commit, late=True)

    def _commit(self) -> None:
        self._committing, self._committed = False, self._clock.now
        actions = self._coordinator.commit(self._clock.now)
        load = self._account.totals.load
        for session in [session for session in self._staged if session not in self._coordinator.staged]:
            load.waited = max(load.waited, self._clock.now - self._staged.pop(session))
        self._carry_out(actions)
        if self._staged:
            self._commit_soon()

    def _publish(self, number: int) -> None:
        self._carry_out(self._coordinator.publish(number, self._clock.now))
