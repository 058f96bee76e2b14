"""The rounds of a timeline as time passes: they open, end at their deadlines, and give lapsed places to other devices.

A *place* is room for one device in a round; a device that is silent for too long loses its place (its session *lapses*).
"""

import heapq
import math
from collections.abc import Callable, Sequence

from sumus.pacing import Pacing
from sumus.protocol.round import Action, Session, State, begins_at, lets_go_at, over_at
from sumus.rounds.coordinator import Coordinator
from sumus.simulator.virtual_time.account import Account
from sumus.simulator.virtual_time.clock import VirtualClock
from sumus.simulator.virtual_time.roster import Roster
from sumus.storage.memory import MemoryStore


class RoundWatch:
    """Watches the rounds of a coordinator.

    Attributes:
        oldest: The first round that has not ended.

    Args:
        pacing: The plan's pacing.
        clock: The virtual clock.
        coordinator: Makes the decisions about the rounds.
        store: The store with the coordinator's rows.
        books: The account of the timeline, and the roster of the devices.
        carry_out: Function that carries out the coordinator's decisions.
    """

    def __init__(
        self,
        pacing: Pacing,
        clock: VirtualClock,
        coordinator: Coordinator,
        store: MemoryStore,
        books: tuple[Account, Roster],
        carry_out: Callable[[Sequence[Action]], None],
    ) -> None:
        self._pacing, self._clock, self._coordinator, self._store = pacing, clock, coordinator, store
        self._carry_out = carry_out
        self._account, self._roster = books
        self.oldest = 0
        self._deadline_of, self._paced = -1, -1
        self._places: list[tuple[float, int, str]] = []
        self._held = 0
        self._looked_at: tuple[str, float] = ("", 0.0)
        self._next_lapse = self._next_tick = math.inf
        clock.at(0.0, self.look_at_rounds)

    def look_at_rounds(self) -> None:
        """Note rounds that have ended, open the planned round, and schedule the deadline of an open one."""
        now, pacing = self._clock.now, self._pacing
        while (row := self._store.rounds.get(self.oldest)) is not None and row.over:
            played = self._account.close(row)
            for report in () if played.published else played.counted:
                self.note_models(report.position)
            self.oldest += 1
            with self._coordinator.leading() as rows:
                rows.forget_rounds_before(self.oldest - 1)
        row = self._store.rounds[self._store.run.newest]
        if row.state is State.PLANNED:
            self._coordinator.tick(now)
            row = self._store.rounds[self._store.run.newest]
        if row.state is State.PLANNED:
            if row.number > self._paced and (begins := begins_at(pacing, row)) > now:
                self._paced = row.number
                self._clock.at(begins, self.look_at_rounds)
        elif row.number > self._deadline_of and pacing.deadline is not None and not pacing.buffered:
            self._deadline_of = row.number
            self._clock.at(now + pacing.deadline, self._tick, late=True)

    def note_rest(self, who: int) -> None:
        """Tell the roster the time until which the server gives a device no work."""
        self._roster.note_rest(who, self._store.devices.get(str(who)))

    def note_models(self, who: int) -> None:
        """Tell the roster how many models were published when the device's last counted sum became a model."""
        self._roster.note_models(who, self._store.devices.get(str(who)))

    def _tick(self) -> None:
        self._next_tick = math.inf
        self._carry_out(self._coordinator.tick(self._clock.now))

    # ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def hold_place(self, session: Session) -> None:
        """Note that a device has begun work. If the work takes too long, another device gets its place."""
        if self._pacing.deadline is not None:
            self._held += 1
            heapq.heappush(self._places, (session.began, self._held, session.id))

    def look_at_places(self) -> None:
        """Schedule the lapse of the session that has held its place longest, and the end of a round without workers."""
        while self._places and not self._holds_place(self._places[0][2]):
            heapq.heappop(self._places)
        now = self._clock.now
        place = (self._places[0][2] if self._places else "", self._store.run.takes)
        if place[0] and place != self._looked_at:
            moment = lets_go_at(self._store.sessions[place[0]], self._coordinator.facts(now))
            if moment < self._next_lapse:
                self._next_lapse = moment
                self._clock.at(max(moment, now), self._let_go, late=True)
        self._looked_at = place
        row = self._store.rounds[self._store.run.newest]
        if row.state is State.OPEN and row.dropped and not row.out and not self._pacing.buffered:
            moment = over_at(self._coordinator.facts(now), row)
            if now < moment < self._next_tick:
                self._next_tick = moment
                self._clock.at(moment, self._tick, late=True)

    def _holds_place(self, session: str) -> bool:
        row = self._store.sessions.get(session)
        return row is not None and row.state == "out"

    def _let_go(self) -> None:
        """Free the place of the session that has held its place longest, if it takes too long."""
        self._next_lapse, self._looked_at = math.inf, ("", 0.0)
        if self._places and self._holds_place(session := self._places[0][2]):
            self._carry_out(self._coordinator.expire(self._clock.now, [session]))
            self.note_rest(int(session.partition("/")[0]))
