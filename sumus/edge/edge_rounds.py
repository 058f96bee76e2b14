"""The rounds of an edge's run as its tables see them: reads the facts, asks the table, and remembers the round.

rounds = EdgeRounds(coordinator, share, notes, crowd, most, linger, model)
actions = rounds.decide(Tick(), now)        what is to be done; `EdgeRun` does it
rounds.pacing(now, Pacing(MOST))            how the open round is paced after that
"""

from sumus.edge.edge_work import EdgeWork, EdgeWorkNotes
from sumus.edge.relay import Relay
from sumus.edge.site_model import SiteModel
from sumus.pacing import Pacing
from sumus.protocol import edge, site
from sumus.protocol.edge import (
    MOST,
    DeviceAsks,
    EdgeFacts,
    EdgeRound,
    EdgeState,
    NoWorkAbove,
    OtherWorkAsked,
    SessionsDropped,
    WaitingWork,
    WorkArrived,
    WorkFetched,
    pacing_of,
    round_at,
    waited_for,
)
from sumus.protocol.round import DeviceRow, Round, State
from sumus.protocol.rows import changed
from sumus.rounds.circumstances import Crowd
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.recording import newest_of
from sumus.rounds.run import DeviceCheckIn
from sumus.text import many
from sumus.wire.messages import Body, Kind

KEEP_PACE = (DeviceAsks, WorkFetched, SessionsDropped, OtherWorkAsked)
"""Events that come by the thousand, and after which the round is paced anew at the next tick, which is soon enough."""
_FEW_FACTS = (*KEEP_PACE, NoWorkAbove)
"""Events whose rules need neither the work that waits nor the sessions that have lapsed."""


class RunShare:
    """One run's share of the relay: the work of this run that waits to be fetched."""

    def __init__(self, relay: Relay, task: str, kind: Kind) -> None:
        """Look at a relay for the run of a task."""
        self._relay = relay
        self._which: tuple[str, Kind] = task, kind

    def count(self) -> int:
        """Return how much work of this run waits."""
        return self._relay.waiting[self._which]

    def unfetched(self) -> tuple[WaitingWork, ...]:
        """Return the work of this run that waits."""
        if not self.count():
            return ()
        return tuple(
            granted.waiting(device)
            for device, granted in self._relay.granted.items()
            if (granted.work.task, granted.work.kind) == self._which
        )

    def asks(self, asked: DeviceCheckIn, known: DeviceRow | None, over: bool) -> DeviceAsks:
        """Return a check-in as the edge's table knows it.

        Args:
            asked: The check-in.
            known: The device's row in this run; None if it has none.
            over: Whether the round of its last session is over, or forgotten.
        """
        device, request = asked.device, asked.request
        session = f"{device}/{request.session}"
        if (granted := self._relay.granted.get(device)) is None:
            return DeviceAsks(device, request.serial, session, known, over)
        mine = (granted.work.task, granted.work.kind) == self._which
        return DeviceAsks(device, request.serial, session, known, over, granted.waiting(device), mine)


class EdgeRounds:
    """The rounds of an edge's run, as its table sees them.

    Attributes:
        notes: What the rounds are for.
        model: The model of a site; None for an edge that only adds.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        share: RunShare,
        notes: EdgeWorkNotes,
        crowd: Crowd,
        most: int,
        linger: float,
        model: SiteModel | None = None,
    ) -> None:
        """Remember no round yet.

        Args:
            coordinator: The rounds of the run, as the round table sees them.
            share: The run's work that waits to be fetched.
            notes: What the rounds are for.
            crowd: The devices of the edge.
            most: Reports that one sum may hold.
            linger: Seconds for which more devices are awaited after work has come.
            model: The model of a site; None for an edge that only adds.
        """
        self.notes, self.model = notes, model
        self._coordinator, self._share, self._crowd = coordinator, share, crowd
        self._most, self._linger = most, linger
        self._kept: dict[int, EdgeRound] = {}

    def begin_anew(self, plan: Body) -> bool:
        """Remember no round, as a new process, and read where a site stands.

        Returns:
            Whether nothing can come of what is open: it is of another plan; or a round has given sessions and has no work, since
            a crash came while a site's rounds were being ended.
        """
        self._kept.clear()
        self.notes.restart()
        if self.model is not None and self.model.read(plan):
            return True
        row = self._coordinator.current
        return row.state is State.OPEN and row.given > 0 and self.work_of(row.number) is None

    def objects(self) -> list[str]:
        """Return the names of what devices fetch for the newest round: the plan, and the models that they begin from."""
        work = self.work_of(self._coordinator.current.number)
        standing = None if self.model is None else self.model.standing
        work = work if standing is None else standing.purpose
        names = [] if work is None else [work.work.plan.sha256, work.work.broadcast.sha256]
        return names if standing is None else [*names, standing.model.sha256]

    def work_of(self, number: int) -> EdgeWork | None:
        """Return what a round is for; None if it has no work."""
        if self.model is not None and self.model.began_before(number):
            return self.model.work_of(number)
        return self.notes.of(number)

    def rounds_of_sum(self) -> list[int]:
        """Return the numbers of the rounds whose sums went, or will go, into one sum of the server above."""
        newest = self._coordinator.current.number
        return self.notes.rounds_of_sum(newest, self.work_of(newest))

    def expired(self, now: float) -> tuple[str, ...]:
        """Return the sessions whose time is over, and of which no report waits to be counted."""
        staged = {session for sessions in self._coordinator.staged.values() for session in sessions}
        with self._coordinator.store.transaction() as rows:
            return tuple(session for session in rows.overdue(now) if session not in staged)

    def holds(self, device: str) -> bool:
        """Return whether what a device has done is in a sum that has not gone up yet."""
        with self._coordinator.store.transaction() as rows:
            known = rows.device(device)
            last = None if known is None else known.session
            row = None if last is None or last.sum is None else rows.round(last.sum)
        own = None if self.model is None else self.model.own
        return (row is not None and not row.over) or (own is not None and device in own.devices)

    def waits_for(self, row: Round) -> str:
        """Say in a sentence what the newest round waits for; empty if it waits for what every round waits for."""
        if self.model is not None and (own := self.model.own) is not None:
            if own.over:
                return "its sum is on its way to the server above"
            of = many(len(own.sessions), "device")
            return f"its own round {own.done + 1} of {self.model.rounds}, on a model of {of}"
        if row.state is State.CLOSING:
            return "its sum is on its way to the server above"
        if row.state is State.OPEN and self.work_of(row.number) is None:
            return "no work has come down yet"
        return ""

    def decide(
        self, event: site.SiteEvent, now: float, row: Round | None = None, sending: bool = False
    ) -> tuple[site.SiteAction, ...]:
        """Ask the table what an event leads to, and remember the round as the table says.

        Args:
            event: What has happened.
            now: The store's clock, in seconds.
            row: The row of the round that the event is about; None for the newest.
            sending: Whether a site's sum waits for the uplink.

        Returns:
            What is to be done.
        """
        row = self._coordinator.current if row is None else row
        few = isinstance(event, _FEW_FACTS) or (isinstance(event, WorkArrived) and event.same)
        facts = self._facts(row, now) if few else self._whole_facts(row, now)
        self._count_if_illegal(facts, event)
        if self.model is None:
            assert not isinstance(event, site.MoveUnusable), "an edge that only adds has no model"
            decision = edge.decide(facts, event)
        else:
            least = self.model.plan.min_contributors
            seen = site.SiteFacts(facts, self.model.own, self.model.rounds, least, sending)
            decision = site.decide(seen, event)
        self._keep(row.number, decision.round)
        return decision.actions

    def asks(self, asked: DeviceCheckIn, now: float) -> tuple[site.SiteAction, ...]:
        """Ask the table what a check-in leads to."""
        with self._coordinator.store.transaction() as rows:
            known, newest = rows.device(asked.device), newest_of(rows)
            last = None if known is None else known.session
            row = None if last is None else rows.round(last.round)
        return self.decide(self._share.asks(asked, known, row is None or row.over), now, newest)

    def pacing(self, now: float, waiting: Pacing) -> Pacing:
        """Return how the newest round is paced now. waiting: the pacing of a round that waits for work."""
        row = self._coordinator.current
        return pacing_of(changed(self._facts(row, now), lapsed=self._lapsed(row, now)), waiting)

    def _facts(self, row: Round, now: float) -> EdgeFacts:
        """Read what every rule needs."""
        work = self.work_of(row.number)
        return EdgeFacts(
            now,
            self._round(row, work is not None, now),
            row,
            waiting=self._share.count(),
            most=self._most,
            devices=self._devices(),
            ends=None if work is None else work.ends,
            linger=self._linger,
        )

    def _whole_facts(self, row: Round, now: float) -> EdgeFacts:
        """Read what any rule may need."""
        return changed(self._facts(row, now), unfetched=self._share.unfetched(), lapsed=self._lapsed(row, now))

    def _round(self, row: Round, has_work: bool, now: float) -> EdgeRound:
        """Return the round as it is remembered, or as its row says."""
        kept = self._kept.get(row.number)
        gathers = kept is not None and kept.state is not EdgeState.GOING_UP
        if kept is None or row.state is State.PUBLISHED or (gathers and not has_work):
            kept = round_at(row, has_work, now)
            self._keep(row.number, kept)
        return kept

    def _keep(self, number: int, round: EdgeRound) -> None:
        """Remember a round for as long as its row does not say the same."""
        if round.state in (EdgeState.WAITING, EdgeState.SETTLED):
            self._kept.pop(number, None)
        else:
            self._kept = {other: kept for other, kept in self._kept.items() if other >= number - 1} | {number: round}

    def _devices(self) -> int:
        """Return how many devices may come into the newest round."""
        own = None if self.model is None else self.model.own
        return min(self._most, self._crowd.population or MOST) if own is None else len(own.sessions)

    def _lapsed(self, row: Round, now: float) -> int:
        """Count the sessions of a round that have lost their places and are waited for all the same."""
        if not row.dropped:
            return 0
        with self._coordinator.store.transaction() as rows:
            out = [session for session in map(rows.session, rows.sessions_out()) if session is not None]
        lapsed = [session for session in out if session.state == "lapsed" and session.round == row.number]
        return waited_for(lapsed, self._coordinator.facts(now))

    def _count_if_illegal(self, facts: EdgeFacts, event: site.SiteEvent) -> None:
        """Count an event that the tables do not allow, beside those that the round table does not allow."""
        if self.model is not None and (state := site.state_of(self.model.own)) is not site.SiteState.FIRST_ROUND:
            if (state, type(event)) not in site.TABLE:
                self._coordinator.illegal[f"site:{state}", type(event).__name__] += 1
        elif (facts.round.state, type(event)) not in edge.TABLE:
            self._coordinator.illegal[f"edge:{facts.round.state}", type(event).__name__] += 1
