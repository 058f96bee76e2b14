"""The devices of a timeline that have work, or a report with an unknown outcome: they run the protocol's own state table."""

import math
from dataclasses import dataclass

import numpy as np

from sumus.fleet import Fate
from sumus.pacing import Pacing
from sumus.protocol import session as device
from sumus.protocol.round import AssignWork, CheckIn, ComeLater, Session, SettleSession
from sumus.protocol.session import DeviceState, Floor, Phase, WorkOffer
from sumus.simulator.virtual_time.account import Account, CountedReport
from sumus.simulator.virtual_time.clock import VirtualClock
from sumus.simulator.virtual_time.fleet_model import FleetModel
from sumus.simulator.virtual_time.roster import Roster
from sumus.simulator.virtual_time.server import ALL_CONDITIONS, VirtualServer
from sumus.simulator.virtual_time.sleepers import Sleepers

_FREE = Floor(rounds=2**62, seconds=math.inf, steps=2**62, bytes=2**62, contributors=0)
_TRIES = 4
"""The number of times that a device sends a report before it asks the server for the outcome."""


@dataclass(slots=True)
class DeviceAtWork:
    """A device that has work.

    Attributes:
        session: The session for which it works.
        fate: The outcome of the work.
        again: The number of times that the device had work of this round before.
        began: The time at which the work began, in simulated seconds.
        seconds: The duration of the work.
    """

    session: Session
    fate: Fate
    again: int
    began: float
    seconds: float


class VirtualDevices:
    """The devices, from the check-in of each until it knows the outcome of its report.

    Attributes:
        unsettled: For each device, whether it has a report with an unknown outcome; bool `(n,)`.

    Args:
        pacing: The plan's pacing.
        count: The number of devices.
        clock: The virtual clock.
        model: Draws the events of the devices.
        server: Answers the devices.
        books: The account of the timeline, and the roster of the devices.
        sleepers: Wakes devices that come by themselves; None if devices wait for work.
    """

    def __init__(
        self,
        pacing: Pacing,
        count: int,
        clock: VirtualClock,
        model: FleetModel,
        server: VirtualServer,
        books: tuple[Account, Roster],
        sleepers: Sleepers | None,
    ) -> None:
        self._pacing, self._clock, self._model, self._server, self._sleepers = pacing, clock, model, server, sleepers
        self._account, self._roster = books
        self._at_work: dict[int, DeviceAtWork] = {}
        self._states: dict[int, DeviceState] = {}
        self.unsettled = np.zeros(count, bool)
        self._alarms = np.zeros(count, np.int64)

    # ── check-ins ────────────────────────────────────────────────────────────────────────────────────────────────────

    def check_in(self, who: int) -> None:
        """Let a device ask for work, and process the server's response."""
        state = self._states.get(who) or DeviceState(window=self._window(who))
        state, (ask,) = device.step(state, device.WakeUp(f"{who}/{state.serial + 1}"), _FREE)
        assert isinstance(ask, device.SendCheckIn)
        self._states[who] = state
        if self._sleepers is not None:
            self._sleepers.stay_awake(who)
        if self._is_lost():
            self._clock.at(self._clock.now + device.PATIENCE, self._no_answer, who, self._alarm(who))
            return
        for action in self._server.check_in(who, CheckIn(ask.session, ask.serial, ALL_CONDITIONS, ask.previous)):
            match action:
                case SettleSession(session, outcome):
                    self._told(who, device.Settled(session, outcome))
                case ComeLater(times, reason):
                    self._account.totals.work.reasons[reason] += 1
                    self._told(who, device.ToldLater(times))
                case AssignWork(session):
                    self._begin(who, session)
                case _:
                    self._server.act(action)

    def _window(self, who: int) -> tuple[float, float]:
        return (0.0, 0.0) if self._sleepers is None else self._sleepers.window(who)

    def _alarm(self, who: int) -> int:
        """Set a new alarm for a device, which cancels its earlier ones."""
        self._alarms[who] += 1
        return int(self._alarms[who])

    def _no_answer(self, who: int, alarm: int) -> None:
        if alarm == self._alarms[who]:
            self._told(who, device.NoAnswer())

    def _is_lost(self) -> bool:
        """Draw whether a message is lost."""
        return self._server.is_down() or self._model.loses_message()

    # ── at work ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, who: int, session: Session) -> None:
        """Begin work: draw its duration and its outcome."""
        now, model = self._clock.now, self._model
        number = session.version if self._pacing.buffered else session.round
        again = self._account.times_given(who, number)
        fate = model.fate(who, number, again)
        seconds = model.seconds(who)
        self._roster.set_idle(who, False)
        self._account.begin_work(session.version, model.work.down)
        self._at_work[who] = DeviceAtWork(session, fate, again, now, seconds + model.upload_seconds(who))
        self._told(who, device.Assigned(WorkOffer(session.id)))
        self._server.watch.hold_place(session)
        online = model.online_until(who, now)
        if now + seconds > online:
            self._clock.at(online, self._fail, who, "offline")
        elif fate.lost or fate.late:
            self._clock.at(now + seconds, self._vanish, who, session, "lost" if fate.lost else "late")
        else:
            self._clock.at(now + seconds, self._told, who, device.TrainingDone())

    def _fail(self, who: int, reason: str) -> None:
        """End work that a device cannot finish, and let it report that to the server."""
        self._at_work[who].seconds = self._clock.now - self._at_work[who].began
        self._told(who, device.Failed(reason))

    def _vanish(self, who: int, session: Session, reason: str) -> None:
        """Let a device disappear. The server notices when the session lapses; if the plan has no deadline, at once."""
        if reason == "lost":  # the report was sent but never arrived
            self._account.totals.traffic.up += self._model.work.up
        self._end_work(who, session, reason)
        self._states[who] = device.step(self._states[who], device.Restarted(), _FREE)[0]
        if self._pacing.deadline is None:
            self._clock.at(self._clock.now, self._server.drop, who, session.id, reason)
        self._rest(who, self._states[who].window)

    def _end_work(self, who: int, session: Session, reason: str | None) -> None:
        """Note that a device's work has ended. reason: why its report is not in a sum; None if it is in one."""
        worked = self._at_work.pop(who, None)
        if worked is not None:
            self._roster.set_idle(who, True)
            self._account.end_work(session.version, worked.seconds, reason, self._server.current.number)

    # ── events of a device ──────────────────────────────────────────────────────────────────────────────────────────

    def _told(self, who: int, event: device.Event) -> None:
        """Pass an event to a device's state table, and carry out the actions that the table returns."""
        state, actions = device.step(self._states[who], event, _FREE)
        self._states[who] = state
        self.unsettled[who] = state.unsettled
        for action in actions:
            match action:
                case device.SendReport(session):
                    self._send(who, session)
                case device.SendAbort(session, reason):
                    self._end_session(who, None, reason)
                    self._server.drop(who, session, reason)
                case device.KeepState(session):
                    self._end_session(who, session, None)
                case device.UndoState(session):
                    self._end_session(who, session, self._why(session))
                case device.SleepFor(window):
                    self._rest(who, window)
                case _:
                    pass

    def _end_session(self, who: int, session: str | None, reason: str | None) -> None:
        """End a device's work. session: end the work only if it belongs to this session; None for any session."""
        worked = self._at_work.get(who)
        if worked is not None and session in (None, worked.session.id):
            self._end_work(who, worked.session, reason)

    def _why(self, session: str) -> str:
        """Return the server's reason why a report is not in a sum; "closed" if the report's round has ended."""
        row = self._server.session(session)
        return (row.reason if row is not None else "") or "closed"

    def _rest(self, who: int, window: tuple[float, float]) -> None:
        """Plan a device's next check-in.

        An event of the clock wakes a device with an unsettled report. The other devices wait in `Sleepers`, if there are any.
        """
        if self._sleepers is None and not self._states[who].unsettled:
            return
        moment = self._clock.now + self._model.wait(who, window)
        alarm = self._alarm(who)
        if self._sleepers is None or self._states[who].phase is Phase.REPORTING:
            self._clock.at(moment, self._wake, who, alarm)
        else:
            self._sleepers.set_window(who, window)
            self._sleepers.sleep_one(who, moment)

    def _wake(self, who: int, alarm: int) -> None:
        """Wake a device with an unsettled report: it sends the report again, or asks for the outcome."""
        state = self._states[who]
        if alarm != self._alarms[who] or not state.unsettled:
            return
        if state.phase is Phase.REPORTING and state.tries < _TRIES:
            self._told(who, device.WakeUp(""))
        else:
            self.check_in(who)

    # ── reports ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, who: int, session: str) -> None:
        """Send a device's report, which may get lost or arrive twice."""
        now, clock = self._clock.now, self._clock
        self._account.totals.traffic.up += self._model.work.up
        takes = self._model.latency + self._model.upload_seconds(who)
        alarm = self._alarm(who)
        if self._is_lost():
            clock.at(now + takes + device.PATIENCE, self._no_answer, who, alarm)
            return
        clock.at(now + takes, self._arrive, who, session)
        if (again := self._model.copy_arrives(now, takes)) is not None:
            clock.at(again, self._arrive, who, session)

    def _arrive(self, who: int, session: str) -> None:
        if self._server.is_down():
            self._clock.at(self._clock.now + device.PATIENCE, self._no_answer, who, int(self._alarms[who]))
        else:
            self._server.report(session)

    def answer(self, session: str, outcome: str) -> None:
        """Tell a device the outcome of its report, unless the server's response is lost."""
        who = int(session.partition("/")[0])
        if outcome == "counted":
            self._count(who, session)
        state = self._states[who]
        if state.session != session or not state.unsettled:
            return
        now = self._clock.now
        if self._is_lost():
            self._clock.at(now + device.PATIENCE, self._no_answer, who, int(self._alarms[who]))
        else:
            self._clock.at(now + self._model.latency, self._told, who, device.Settled(session, outcome))

    def _count(self, who: int, session: str) -> None:
        """Note a report that is in a sum, but only once, since the server may repeat its response."""
        row, worked = self._server.session(session), self._at_work.get(who)
        if worked is None or worked.session.id != session or row is None or row.sum is None:
            return
        if self._roster.is_counted_in(who, row.sum):
            return
        report = CountedReport(who, worked.again, row.sum, row.staleness, worked.fate.most_steps, worked.seconds)
        self._account.count(report, row.version, self._clock.now)
        self._server.watch.note_models(who)
        self._roster.count(who, row.sum)
