"""An edge's run: devices work for a round of the server above, and their reports become one sum for that server.

    run = EdgeRun(served, relay, store, ring, sums, crowd, look_again)
    run.give(device, request, work, now)   takes work that has arrived for a device
    run.sums_to_send                       the sums that wait for the uplink, by their round's number
    run.delivered(number, now)             the server above has counted a sum; or run.refused(number, why, now)

A run carries out the decisions of its table: `sumus/protocol/edge.py` for an edge that adds, `sumus/protocol/site.py` for a
site, which also has a `SiteModel`. This file itself decides nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from sumus.aggregate import Aggregate
from sumus.edge.edge_rounds import KEEP_PACE, EdgeRounds, RunShare
from sumus.edge.edge_work import EdgeWorkNotes, is_same_sum
from sumus.edge.relay import Relay
from sumus.edge.site_model import SiteModel
from sumus.errors import ExperimentError
from sumus.first_hop import FirstHop
from sumus.logs import logger
from sumus.pacing import Pacing
from sumus.protocol import edge, site
from sumus.protocol.edge import MOST
from sumus.protocol.round import ComeLater, Round, Session, State, Tick
from sumus.rounds.circumstances import Crowd
from sumus.rounds.closing import Unusable
from sumus.rounds.run import DeviceCheckIn, Run
from sumus.rounds.seeds import any_seed
from sumus.site import Edges
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing
from sumus.storage.store import Store
from sumus.wire.messages import Assignment, CheckInAnswer, CheckInRequest, Kind, Released, Served
from sumus.wire.reports import encode_sum

LOG = logger("sumus.edge")
LINGER = 20.0
"""The seconds for which more devices are awaited after the last work has arrived."""
MOST_OBJECTS = 12
"""The number of plans and models that are kept for devices to fetch."""
TURNED_AWAY = (5.0, 15.0)
"""The retry window, in seconds, of a device that must not be in the open sum of the server above."""


class ReadySum(NamedTuple):
    """A sum for the server above.

    Attributes:
        number: The number of the edge's round.
        task: The task's name.
        kind: Whether devices trained or measured.
        body: The sum, as bytes.
        sessions: The number of sessions for which it counts as the report.
    """

    number: int
    task: str
    kind: Kind
    body: bytes
    sessions: int


class ArrivedWork(NamedTuple):
    """Work that has arrived for a device.

    Attributes:
        device: The device's id.
        request: The device's check-in.
        work: The assignment of the server above.
    """

    device: str
    request: CheckInRequest
    work: Assignment


class EventSource(NamedTuple):
    """The data of an event, which the actions that follow from the event need.

    Attributes:
        number: The number of the round that the event concerns.
        asked: The check-in of a device.
        arrived: Work that has arrived.
        total: The sum of a round that has closed.
    """

    number: int = 0
    asked: DeviceCheckIn | None = None
    arrived: ArrivedWork | None = None
    total: Aggregate | None = None


_NOTHING = EventSource()


class RecentObjects:
    """The plans and models that devices fetched most recently."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def with_newer(self, *names: str) -> frozenset[str]:
        """Make these objects the newest ones, and return the names of all kept objects."""
        self._names = [*(name for name in self._names if name not in names), *names][-MOST_OBJECTS:]
        return frozenset(self._names)


class EdgeRun(Run):
    """A run of the server above, as this edge takes part in it.

    Attributes:
        served: The run, as the server above describes it.
        hop_above: Checks sums as the server above does.
        sums_to_send: The sums that wait for the uplink, by their round's number.
    """

    def __init__(
        self,
        served: Served,
        relay: Relay,
        store: Store,
        ring: KeyRing,
        sums: Blobs,
        crowd: Crowd,
        look_again: Callable[[], None],
        linger: float = LINGER,
        model: SiteModel | None = None,
    ) -> None:
        """Open the rounds in a store.

        Args:
            served: The run, as the server above describes it.
            relay: The relay, which all runs of the edge share.
            store: The rows of the run.
            ring: Wraps the keys of the sums.
            sums: The store of the sealed sums.
            crowd: The devices of the edge.
            look_again: Called if held check-ins may be answered differently now.
            linger: The seconds for which more devices are awaited after the last work has arrived.
            model: The model of a site; None for an edge that only adds up reports.
        """
        self.kind = served.kind
        hop = FirstHop.from_json(served.hop)
        below = replace(hop, rounds=1)  # a report from a device or an edge below is for one round, even at a site
        super().__init__(served.task, Pacing(MOST), below, store, ring, sums, any_seed, 1, crowd)
        self.hop_above = hop
        self.plan_body, self.most_together = served.plan, min(served.most, hop.sums.max_count)
        self.edges = Edges(1 if model is not None else served.rounds, served.noise_at)  # edges below a site only add
        self.sums_to_send: dict[int, ReadySum] = {}
        self._relay, self._model, self._look_again = relay, model, look_again
        share, notes = RunShare(relay, self.task, self.kind), EdgeWorkNotes(store, served.rounds)
        self._rounds = EdgeRounds(self.coordinator, share, notes, crowd, self.most_together, linger, model)
        self._recent = RecentObjects()
        self.serve(served)

    # ── overridden methods of `Run` ──────────────────────────────────────────────────────────────────────────────────

    def _ended_what_was_open(self, now: float) -> bool:
        """Restore the state from the rows. Return whether the open round was ended (another plan, or an ended site)."""
        self._relay.clear()
        self.sums_to_send.clear()
        ends = self._rounds.begin_anew(self.served.plan)
        if ends:
            self.end_all(now)
        if ends and self._model is not None:
            self._model.forget()
        self.objects = self._recent.with_newer(*self._rounds.objects())
        self._decide(Tick(), now)
        return ends

    def time_passes(self, now: float) -> None:
        """Update retry windows, end expired sessions, and decide how long the open round waits for more devices."""
        if self._relay.is_due(now):
            self._look_again()
        self._relay.note_members(self.crowd.population)
        if expired := self._rounds.expired(now):
            self._decide(edge.SessionsDropped(expired, "other"), now)
        self._decide(Tick(), now)

    def abandoned(self, number: int, now: float) -> None:
        """Tell the server above that no reports will come from an abandoned round's sessions."""
        with self.store.transaction() as rows:
            row, counted = rows.round(number), tuple(rows.counted_in(number))
            awaited = [session for session in map(rows.session, rows.sessions_out()) if session is not None]
        out = tuple(session.id for session in awaited if session.round == number)
        self._decide(edge.RoundAbandoned(out, counted), now, row)

    def all_ends(self, now: float) -> None:
        """Tell the server above that no reports will come from the sessions of a site's unsent sum."""
        self._decide(edge.AllWorkEnds(), now)

    def admits(self, asked: DeviceCheckIn, now: float) -> ComeLater | None:
        """Let the round answer a device whose work has arrived; relay other check-ins, if the table decides so."""
        answer = None
        for action in self._rounds.asks(asked, now):
            match action:
                case edge.RemoveWork(devices):
                    self._relay.remove(devices)
                case edge.PassCheckInOn():
                    answer = self._relay.ask(asked, now)
                case ComeLater():
                    answer = action
                case _:
                    answer = None
        return answer

    def turned_away(self, asked: DeviceCheckIn, now: float) -> None:
        """Give back the work of a device that must not be in the open sum of the server above."""
        self._decide(edge.DeviceKeptOut(asked.device), now, source=EventSource(asked=asked))

    def dropped(self, sessions: Iterable[str], reason: str, now: float) -> None:
        """Tell the server above that no reports will come from these sessions, unless they have already ended."""
        with self.store.transaction() as rows:
            known = [session for session in map(rows.session, sessions) if session is not None]
        if ending := tuple(session.id for session in known if session.awaited):
            self._decide(edge.SessionsDropped(ending, reason), now)

    def rounds_of_sum(self) -> Sequence[int]:
        """Return the numbers of this edge's rounds whose sums were added, or will be added, to one sum of the server above."""
        return self._rounds.rounds_of_sum()

    def released(self) -> Released | None:
        """Return the released model, with which devices predict."""
        return self.served.released

    def waits_for(self, row: Round) -> str:
        """Describe in a sentence what the newest round waits for, if the reason is specific to edges."""
        return self._rounds.waits_for(row)

    def offer(self, session: Session, now: float) -> Assignment:
        """Return the work of the round for a device with a session. In a site's own round, it begins from the site's model."""
        work = self._rounds.work_of(session.round)
        assert work is not None, "a session is given in a round that has work"
        self._decide(edge.WorkFetched(session.device), now)
        left = None if work.ends is None else max(0.0, work.ends - now)
        word = session.id.rpartition("/")[2]
        given = msgspec.structs.replace(work.work, session=word, expires_in_s=left)
        return given if self._model is None else self._model.assignment(given)

    def conclude(self, number: int, now: float) -> None:
        """Send the sum of a closed round to the server above, or update a site's model with it."""
        if self._model is not None and self._model.has_done(number):
            return  # the site's model already contains its sum
        total = self.sums.total(number)
        with self.store.transaction() as rows:
            row, out = rows.round(number), tuple(rows.sessions_out())
        self._decide(edge.RoundClosed(out, int(total.count)), now, row, EventSource(total=total))

    # ── calls from the uplink ────────────────────────────────────────────────────────────────────────────────────────

    def serve(self, served: Served) -> None:
        """Take over the server above's current description of the run."""
        self.served = served
        if served.released is not None:
            self.objects = self._recent.with_newer(served.plan.sha256, served.released.model.sha256)

    def holds(self, device: str) -> bool:
        """Return whether a device's report is in a sum that the server above has not counted yet."""
        return self._rounds.holds(device)

    def forget_work(self, device: str, now: float) -> None:
        """Count no further report of this device for its current work, since it asks for other work."""
        out = tuple(session.id for session in self.coordinator.last_sessions([device]) if session.awaited)
        if out:
            self._decide(edge.OtherWorkAsked(out), now)

    def give(self, device: str, request: CheckInRequest, work: Assignment, now: float, again: bool = False) -> None:
        """Take work that has arrived for a device, and keep it until the device fetches it.

        Args:
            device: The device's id.
            request: The device's check-in.
            work: The assignment of the server above.
            now: The server's clock, in seconds.
            again: Whether the work was held back once, until the previous round was asked to end.
        """
        self._look_again()
        if self.coordinator.current.state is State.PLANNED:
            self.tick(now)
        session, row = f"{device}/{work.session}", self.coordinator.current
        before = self._rounds.work_of(row.number)
        same = before is not None and is_same_sum(before.work, work)
        with self.store.transaction() as rows:
            fetched = rows.session(session) is not None
            out = () if before is None or same else tuple(rows.sessions_out())
        arrived = edge.WorkArrived(session, same, fetched, out, again)
        self._decide(arrived, now, row, EventSource(arrived=ArrivedWork(device, request, work)))

    def no_work(self, reason: str, now: float) -> None:
        """Record that the server above has given a device no work."""
        self._look_again()
        self._decide(edge.NoWorkAbove(reason), now)

    def delivered(self, number: int, now: float) -> None:
        """Record that the server above has counted a sum."""
        if self.sums_to_send.pop(number, None) is not None:
            self.trouble = ""
            self._decide(edge.SumCounted(), now, self.coordinator.round(number))
            self.tick(now)

    def refused(self, number: int, why: str, now: float) -> None:
        """Record that the server above has refused a sum for good."""
        if self.sums_to_send.pop(number, None) is not None:
            own = self._model is not None and self._model.has_done(number)
            self.trouble = (
                f"the sum of {'rounds up to' if own else 'round'} {number} was not counted by the server above: {why}"
            )
            with self.store.transaction() as rows:
                row, counted = rows.round(number), tuple(rows.counted_in(number))
            self._decide(edge.SumRefused(counted), now, row)
            self.tick(now)

    # ── decisions of the table ───────────────────────────────────────────────────────────────────────────────────────

    def _decide(
        self, event: site.SiteEvent, now: float, row: Round | None = None, source: EventSource = _NOTHING
    ) -> None:
        """Carry out the table's decision about an event; then update the pacing of the open round."""
        own = None if self._model is None else self._model.own
        sending = own is not None and own.last in self.sums_to_send
        row = self.coordinator.current if row is None else row
        for action in self._rounds.decide(event, now, row, sending):
            self._do(action, now, source._replace(number=row.number))
        if not isinstance(event, KEEP_PACE):
            self._pacing = self._rounds.pacing(now, Pacing(MOST))

    def _do(self, action: Any, now: float, source: EventSource) -> None:
        """Carry out an action."""
        match action:
            case edge.RemoveWork(devices):
                self._relay.remove(devices)
            case edge.SayEnded(sessions, reason):
                self._relay.note_ended(self.task, self.kind, sessions, reason)
            case edge.SendDeviceAway(device):
                assert source.asked is not None, "a check-in brought the device here"
                answer = CheckInAnswer(retry_after_s=TURNED_AWAY, reason="left")
                self._relay.send_away(device, source.asked.request, answer, now)
            case edge.StartRound():
                assert source.arrived is not None, "work has arrived"
                self._rounds.notes.begin(source.number, source.arrived.work, now)
                self.objects = self._recent.with_newer(*self._rounds.objects())
            case edge.KeepWork():
                assert source.arrived is not None, "work has arrived"
                device, request, work = source.arrived
                self._relay.keep(device, work, request.serial, now)
            case edge.ConsiderAgain():
                assert source.arrived is not None, "work has arrived"
                self.give(*source.arrived, now, again=True)
            case edge.DropSessions(sessions):
                self.carry_out(self.coordinator.drop(sessions, "closed", now), now)
            case edge.LetTimePass():
                self.tick(now)
            case edge.PublishRound():
                self._publish(source.number, now)
            case edge.CancelRound():
                self.carry_out(self.coordinator.cancel(source.number, now), now)
            case edge.WithdrawSum():
                self.sums_to_send.pop(source.number, None)
            case edge.SendSum():
                with self.store.transaction() as rows:
                    sessions = rows.counted_in(source.number)
                assert source.total is not None, "a round has closed"
                self._send(source.number, sessions, source.total)
            case _:
                self._do_at_site(action, now, source)

    def _do_at_site(self, action: Any, now: float, source: EventSource) -> None:
        """Carry out an action that only a site's table can decide."""
        assert self._model is not None, "an edge that only adds has no model"
        match action:
            case site.MoveModel(actions):
                work = self._rounds.work_of(source.number)
                assert work is not None, "a round that closes has work"
                assert source.total is not None, "a round has closed"
                self._model.move(work, source.total, source.number, now, self._publish)
                self.objects = self._recent.with_newer(*self._rounds.objects())
                for following in actions:
                    self._do(following, now, source)
            case site.EndOwnRounds():
                self._model.end_rounds(self.coordinator)
            case site.SendMove():
                self._send_move(self._model, now)
            case site.ForgetOwnRounds():
                self._model.forget()
            case _:
                raise AssertionError(f"no table decides {action}")

    def _send_move(self, model: SiteModel, now: float) -> None:
        """Send the change of the model to the server above. If a file is missing, try again later; it may be restored."""
        standing = model.standing
        assert standing is not None, "a site has a sum after its first round"
        try:
            total = model.total()
        except ExperimentError as error:
            self.trouble = f"the sum of rounds up to {standing.last} cannot be sent yet: {error}"
        except Unusable as error:
            LOG.warning("%s: %s", self.task, error)
            self.trouble = f"the sum of rounds up to {standing.last} cannot be counted by the server above: {error}"
            self._decide(site.MoveUnusable(), now)
        else:
            self._send(standing.last, standing.sessions, total)

    def _send(self, number: int, sessions: Sequence[str], total: Aggregate) -> None:
        """Keep a sum for the uplink."""
        body = encode_sum(sessions, total, self.hop_above)
        self.sums_to_send[number] = ReadySum(number, self.task, self.kind, body, len(sessions))
        self._relay.wake()
