"""The link between an edge's rounds and its tables: it reads the facts, applies events to the table, and remembers the round.

rounds = EdgeRounds(coordinator, share, notes, crowd, most, linger, model)
actions = rounds.decide(Tick(), now)        the actions, which `EdgeRun` carries out
rounds.pacing(now, Pacing(MOST))            the pacing of the open round afterwards
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
"""Very frequent events. They do not change the pacing at once: the next tick soon computes it again."""
_FEW_FACTS = (*KEEP_PACE, NoWorkAbove)
"""Events whose rules need neither the waiting work nor the lapsed sessions."""


class RunShare:
    """The relay as one run sees it: the work of this run that waits to be fetched."""

    def __init__(self, relay: Relay, task: str, kind: Kind) -> None:
        """Show the part of a relay that belongs to a task's run."""
        self._relay = relay
        self._which: tuple[str, Kind] = task, kind

    def count(self) -> int:
        """Return the number of waiting pieces of work of this run."""
        return self._relay.waiting[self._which]

    def unfetched(self) -> tuple[WaitingWork, ...]:
        """Return the waiting work of this run."""
        if not self.count():
            return ()
        return tuple(
            granted.waiting(device)
            for device, granted in self._relay.granted.items()
            if (granted.work.task, granted.work.kind) == self._which
        )

    def asks(self, asked: DeviceCheckIn, known: DeviceRow | None, over: bool) -> DeviceAsks:
        """Return a check-in as an event of the edge's table.

        Args:
            asked: The check-in.
            known: The device's row in this run; None if it has none.
            over: Whether the round of the device's last session is over, or its row is deleted.
        """
        device, request = asked.device, asked.request
        session = f"{device}/{request.session}"
        if (granted := self._relay.granted.get(device)) is None:
            return DeviceAsks(device, request.serial, session, known, over)
        mine = (granted.work.task, granted.work.kind) == self._which
        return DeviceAsks(device, request.serial, session, known, over, granted.waiting(device), mine)


class EdgeRounds:
    """The rounds of an edge's run, in the form that its table needs.

    Attributes:
        notes: The notes that record the work of each round.
        model: The model of a site; None for an edge that only adds up reports.
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
        """Begin without a remembered round.

        Args:
            coordinator: The coordinator of the run's rounds.
            share: The run's work that waits to be fetched.
            notes: The notes that record the work of each round.
            crowd: The devices of the edge.
            most: The maximum number of reports that one sum may hold.
            linger: The seconds for which more devices are awaited after the last work has arrived.
            model: The model of a site; None for an edge that only adds up reports.
        """
        self.notes, self.model = notes, model
        self._coordinator, self._share, self._crowd = coordinator, share, crowd
        self._most, self._linger = most, linger
        self._kept: dict[int, EdgeRound] = {}

    def begin_anew(self, plan: Body) -> bool:
        """Forget the remembered round, as if the process had started again, and read a site's standing.

        Returns:
            Whether the open round can have no result: it belongs to another plan, or it has sessions but no work, because
            a crash interrupted the end of a site's rounds.
        """
        self._kept.clear()
        self.notes.restart()
        if self.model is not None and self.model.read(plan):
            return True
        row = self._coordinator.current
        return row.state is State.OPEN and row.given > 0 and self.work_of(row.number) is None

    def objects(self) -> list[str]:
        """Return the names of the objects that devices fetch for the newest round: the plan and the models."""
        work = self.work_of(self._coordinator.current.number)
        standing = None if self.model is None else self.model.standing
        work = work if standing is None else standing.purpose
        names = [] if work is None else [work.work.plan.sha256, work.work.broadcast.sha256]
        return names if standing is None else [*names, standing.model.sha256]

    def work_of(self, number: int) -> EdgeWork | None:
        """Return the work of a round; None if it has no work."""
        if self.model is not None and self.model.began_before(number):
            return self.model.work_of(number)
        return self.notes.of(number)

    def rounds_of_sum(self) -> list[int]:
        """Return the numbers of the rounds whose sums were added, or will be added, to one sum of the server above."""
        newest = self._coordinator.current.number
        return self.notes.rounds_of_sum(newest, self.work_of(newest))

    def expired(self, now: float) -> tuple[str, ...]:
        """Return the expired sessions, except those whose report waits to be counted."""
        staged = {session for sessions in self._coordinator.staged.values() for session in sessions}
        with self._coordinator.store.transaction() as rows:
            return tuple(session for session in rows.overdue(now) if session not in staged)

    def holds(self, device: str) -> bool:
        """Return whether a device's report is in a sum that the server above has not counted yet."""
        with self._coordinator.store.transaction() as rows:
            known = rows.device(device)
            last = None if known is None else known.session
            row = None if last is None or last.sum is None else rows.round(last.sum)
        own = None if self.model is None else self.model.own
        return (row is not None and not row.over) or (own is not None and device in own.devices)

    def waits_for(self, row: Round) -> str:
        """Describe in a sentence what the newest round waits for; empty if it is the same as for every kind of run."""
        if self.model is not None and (own := self.model.own) is not None:
            if own.over:
                return "its sum is on its way to the server above"
            of = many(len(own.sessions), "device")
            return f"its own round {own.done + 1} of {self.model.rounds}, on a model of {of}"
        if row.state is State.CLOSING:
            return "its sum is on its way to the server above"
        if row.state is State.OPEN and self.work_of(row.number) is None:
            return "no work has arrived from the server above yet"
        return ""

    def decide(
        self, event: site.SiteEvent, now: float, row: Round | None = None, sending: bool = False
    ) -> tuple[site.SiteAction, ...]:
        """Apply an event to the table, and remember the round that the table returns.

        Args:
            event: What has happened.
            now: The store's clock, in seconds.
            row: The row of the round that the event concerns; None for the newest round.
            sending: Whether the sum of a site waits for the uplink.

        Returns:
            The actions to carry out.
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
        """Apply a device's check-in to the table.

        Args:
            asked: The check-in.
            now: The store's clock, in seconds.

        Returns:
            The actions to carry out."""
        with self._coordinator.store.transaction() as rows:
            known, newest = rows.device(asked.device), newest_of(rows)
            last = None if known is None else known.session
            row = None if last is None else rows.round(last.round)
        return self.decide(self._share.asks(asked, known, row is None or row.over), now, newest)

    def pacing(self, now: float, waiting: Pacing) -> Pacing:
        """Return the current pacing of the newest round.

        Args:
            now: The store's clock, in seconds.
            waiting: The pacing of a round that waits for work."""
        row = self._coordinator.current
        return pacing_of(changed(self._facts(row, now), lapsed=self._lapsed(row, now)), waiting)

    def _facts(self, row: Round, now: float) -> EdgeFacts:
        """Read the facts that every rule needs."""
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
        """Read all facts that a rule may need."""
        return changed(self._facts(row, now), unfetched=self._share.unfetched(), lapsed=self._lapsed(row, now))

    def _round(self, row: Round, has_work: bool, now: float) -> EdgeRound:
        """Return the remembered round, or else the round as derived from its row."""
        kept = self._kept.get(row.number)
        gathers = kept is not None and kept.state is not EdgeState.GOING_UP
        if kept is None or row.state is State.PUBLISHED or (gathers and not has_work):
            kept = round_at(row, has_work, now)
            self._keep(row.number, kept)
        return kept

    def _keep(self, number: int, round: EdgeRound) -> None:
        """Remember a round until its state can be derived from its row alone."""
        if round.state in (EdgeState.WAITING, EdgeState.SETTLED):
            self._kept.pop(number, None)
        else:
            self._kept = {other: kept for other, kept in self._kept.items() if other >= number - 1} | {number: round}

    def _devices(self) -> int:
        """Return the number of devices that may join the newest round."""
        own = None if self.model is None else self.model.own
        return min(self._most, self._crowd.population or MOST) if own is None else len(own.sessions)

    def _lapsed(self, row: Round, now: float) -> int:
        """Count the sessions of a round that have lost their places but are still awaited."""
        if not row.dropped:
            return 0
        with self._coordinator.store.transaction() as rows:
            out = [session for session in map(rows.session, rows.sessions_out()) if session is not None]
        lapsed = [session for session in out if session.state == "lapsed" and session.round == row.number]
        return waited_for(lapsed, self._coordinator.facts(now))

    def _count_if_illegal(self, facts: EdgeFacts, event: site.SiteEvent) -> None:
        """Count an event that the edge's tables do not allow, with those that a server's table of rounds does not allow."""
        if self.model is not None and (state := site.state_of(self.model.own)) is not site.SiteState.FIRST_ROUND:
            if (name := site.TABLE.illegal(state, event)) is not None:
                self._coordinator.illegal[f"site:{state}", name] += 1
        elif (name := edge.TABLE.illegal(facts.round.state, event)) is not None:
            self._coordinator.illegal[f"edge:{facts.round.state}", name] += 1
