"""Virtual time: a fleet's devices and a server, both by the protocol's own tables, on a clock that costs nothing to wait for.

    timeline = Timeline(pacing, fleet, devices, work, seed)
    played = timeline.ended(0)             # runs until round 0 is over: who is in its sum, when, what was wasted
    timeline.based_on(0)                   # everyone whose report on model 0 is ever counted, and in which sum

Who takes part, and when, does not depend on what is learnt: so the system is simulated by itself, and clients are trained
afterwards, all of a model's together. Everything random is keyed by the seed, and events of one moment have an order: two runs
are the same, event for event.

Devices that are idle are numbers in arrays, and come in batches; only those that work are sessions.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sumus.errors import ExperimentError
from sumus.fleet import DAY, MINUTE, DeviceArrays, Fate, Fleet
from sumus.pacing import Conditions, Pacing
from sumus.protocol import session as device
from sumus.protocol.round import (
    AcceptReport,
    Action,
    AssignWork,
    CheckIn,
    CloseRound,
    ComeLater,
    RefuseReport,
    Round,
    Session,
    SettleSession,
    StageReport,
    State,
    begins_at,
    lets_go_at,
    over_at,
)
from sumus.protocol.session import DeviceState, Floor, Phase, WorkOffer
from sumus.protocol.steering import window
from sumus.rng import generator
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Coordinator
from sumus.simulator.calendar import Calendar
from sumus.simulator.participation import FIRST_ROUND, Passes, present_at
from sumus.storage.memory import MemoryStore
from sumus.text import many
from sumus.types import Array, Floats

_FREE = Floor(rounds=2**62, seconds=math.inf, steps=2**62, bytes=2**62, contributors=0)
_ALL = Conditions(True, True, True, 1.0, 2**31)
_MANY = 10_000
"""Devices from which on not all are looked at to find one that may come."""
_VOID = 10_000
"""Rounds in a row that come to nothing in one moment."""
_SLICE = 10.0
"""Seconds of check-ins that one answer serves, where nothing else happened between them."""


@dataclass(frozen=True)
class RoundWork:
    """What a round asks of each device, by position. steps: of its training.  share: its examples over the mean client's.

    down, up: bytes of broadcasts and of reports.  times: how often it trains, in rounds of its edge's own; steps, down and up are
    of all of these.
    """

    steps: Callable[[int], int] = lambda position: 1
    share: Callable[[int], float] = lambda position: 1.0
    down: int = 0
    up: int = 0
    times: int = 1

    def seconds(self, devices: DeviceArrays) -> Floats:
        """What a round takes each device, transfers and all. Shape `(n,)`."""
        total = devices.seconds * self.times
        for nbytes, rate in ((self.down, devices.down), (self.up, devices.up)):
            if nbytes and np.isfinite(rate).any():
                total = total + nbytes / rate
        return total


@dataclass(frozen=True)
class ServerCost:
    """Seconds that a server takes: at least from one commit to the next, for each report in it, and to make a model."""

    commit: float = 0.0
    report: float = 0.0
    publish: float = 0.0


@dataclass(frozen=True)
class CountedReport:
    """A report in a sum. position: of its client.  again: how often that had work on this model before.  into: the round that
    it is counted in.  staleness: in versions.  most_steps: that it had time for.  seconds: that it worked.
    """

    position: int
    again: int
    into: int
    staleness: int
    most_steps: int | None
    seconds: float = 0.0


@dataclass
class Played:
    """A round that is over. ended: in simulated seconds.  counted: in its sum, also where nothing came of that.  given:
    sessions.  dropped: work that ended since the round before without being counted, by why.  bytes_up, bytes_down: since then.
    totals: of the run until then, without its check-ins.
    """

    number: int
    ended: float
    published: bool
    counted: list[CountedReport]
    given: int
    dropped: Counter[str]
    bytes_up: int
    bytes_down: int
    totals: "Totals"


@dataclass
class Totals:
    """Of the whole run. useful, wasted: device seconds of work that is in a published sum, and of all other.

    checkins: in each minute.  staged: the most reports that waited for a commit at once.  waited: the longest of them, seconds.
    """

    useful: float = 0.0
    wasted: float = 0.0
    checkins: list[int] = field(default_factory=list[int])
    staged: int = 0
    waited: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])

    def checked_in(self, moments: Floats) -> None:
        """Count check-ins at these moments, in their order."""
        first, last = int(moments[0] // MINUTE), int(moments[-1] // MINUTE)
        self.checkins += [0] * (last + 1 - len(self.checkins))
        if first == last:
            self.checkins[first] += len(moments)
            return
        for minute in (moments // MINUTE).astype(np.int64).tolist():
            self.checkins[minute] += 1


@dataclass(slots=True)
class _Worker:
    """A device at work. again: how often it had work on this model before.  began: when.  seconds: that it works."""

    session: Session
    fate: Fate
    again: int
    began: float
    seconds: float


class Timeline:
    """The run of a fleet, as far as it was asked for.

    name: the client at a position: what becomes of its work is keyed by it, whatever else happens. None where nobody trains.
    joined: the round, from 1, from which each device is there, int64 `(n,)`; None where all are there from the start.
    in_passes: whether each device is drawn once before any twice.
    """

    def __init__(
        self,
        pacing: Pacing,
        fleet: Fleet,
        devices: DeviceArrays,
        work: RoundWork,
        seed: int,
        name: Callable[[int], Any] | None = None,
        cost: ServerCost = ServerCost(),
        outages: Sequence[tuple[float, float]] = (),
        joined: Array | None = None,
        in_passes: bool = False,
    ) -> None:
        self.now = 0.0
        self.totals = Totals()
        self._rounds_of = np.zeros(len(devices), np.int64)
        self._pacing, self._fleet, self._devices, self._work, self._cost = pacing, fleet, devices, work, cost
        self._seed, self._name, self._outages = seed, name, outages
        self._rng = generator(seed, "fleet")
        self._store = MemoryStore()
        self._circumstances = Circumstances(pacing, population=len(devices))
        self._server = Coordinator(lambda: self._circumstances, self._store)
        self._queue: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._asleep: Calendar | None = None
        self._workers: dict[int, _Worker] = {}
        self._states: dict[int, DeviceState] = {}
        self._joined, self._passes = joined, Passes(seed) if in_passes else None
        self._idle = np.ones(len(devices), bool)
        self._last = np.full(len(devices), -(2**31))
        self._models = np.full(len(devices), -(2**31))
        self._windows: Array = np.zeros((len(devices), 2), np.float32)
        self._owing = np.zeros(len(devices), bool)
        self._given: tuple[int, Counter[int]] = (-1, Counter())
        self._open_versions: Counter[int] = Counter()
        self._counted: dict[int, list[CountedReport]] = {}
        self._by_version: dict[int, list[CountedReport]] = {}
        self._played: dict[int, Played] = {}
        self._dropped: dict[int, Counter[str]] = {}
        self._bytes, self._ended = (0, 0), 0.0
        self._staged: dict[str, float] = {}
        self._committing, self._committed = False, 0.0
        self._publishing = 0.0
        self._places: list[tuple[float, int, str]] = []
        self._next_lapse = self._next_tick = math.inf
        self._watched_place: tuple[str, float] = ("", 0.0)
        self._rests_until = np.zeros(len(devices))
        self._drawn, self._oldest, self._watched, self._paced, self._yielded = -1, 0, -1, -1, 0
        self._progressed, self._void = 0.0, 0
        self._patience = max(
            7 * DAY, 10 * (pacing.deadline or 0.0), 10 * (pacing.every or 0.0), 100 * float(work.seconds(devices).max())
        )
        self._alarms = np.zeros(len(devices), np.int64)
        self._due = np.full(len(devices), -1.0)
        self._waiting_to_fill = False
        if not fleet.waits:
            self._put_to_sleep_first()
        self._at(0.0, self._look_at_rounds)

    # ── what is asked of it ──────────────────────────────────────────────────────────────────────────────────────────

    def ended(self, number: int) -> Played:
        """Run until a round is over. ExperimentError where it can never be."""
        while number not in self._played:
            if not self._advance() or self._is_stuck():
                raise ExperimentError(self._stuck(number))
        return self._played[number]

    def based_on(self, version: int) -> list[CountedReport]:
        """Run until everyone who was given a published model has ended; those whose report is in a sum, in their order."""
        assert version < self._store.run.version, "this model's round is not over"
        while self._open_versions[version] and self._advance() and not self._is_stuck():
            pass
        return self._by_version.pop(version, [])

    def until(self, seconds: float) -> Iterator[Played]:
        """Run to a moment; every round that is over, as it is."""
        while self._next_moment() <= seconds and self._advance():
            if self._void > _VOID:
                raise ExperimentError(self._stuck(self._oldest))
            while self._yielded in self._played:
                yield self._played.pop(self._yielded)
                self._by_version.clear()
                self._yielded += 1
        self.now = seconds

    @property
    def _current(self) -> Round:
        """The newest round's row."""
        return self._store.rounds[self._store.run.newest]

    # ── the clock ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _at(self, moment: float, act: Callable[..., None], *args: Any, late: bool = False) -> None:
        """Do something then; of one moment, first what was asked for first, and what is `late` after all else."""
        self._order += 1
        heapq.heappush(self._queue, (moment, int(late), self._order, act, args))

    def _next_moment(self) -> float:
        asleep = self._asleep.next() if self._asleep is not None else math.inf
        return min(asleep, self._queue[0][0] if self._queue else math.inf)

    def _advance(self) -> bool:
        """Let the next thing happen; False where nothing will."""
        asleep = self._asleep.next() if self._asleep is not None else math.inf
        queued = self._queue[0][0] if self._queue else math.inf
        if asleep == math.inf and queued == math.inf:
            return False
        if self._asleep is not None and asleep < queued:
            self._wake_some(self._asleep, queued)
        else:
            self.now, _, _, act, args = heapq.heappop(self._queue)
            act(*args)
        if not self._queue or self._queue[0][0] > self.now:  # this moment is through: a model made in it is published
            self._fill()
            self._watch_places()
        return True

    def _is_stuck(self) -> bool:
        """Whether nothing was counted for very long, or rounds end without any time going by."""
        return self._void > _VOID or self.now - self._progressed > self._patience

    def _stuck(self, number: int) -> str:
        row, reasons = self._current, self.totals.reasons.most_common(3)
        why = ", ".join(f"{reason} {many(count, 'time')}" for reason, count in reasons)
        return (
            f"round {number + 1} never ends: {many(row.given, 'place')} were given, and {row.counted} reports are counted of "
            f"{self._pacing.cohort}, and nobody else may come"
            + (f" (work came to nothing: {why})" if why else "")
            + "; lower the cohort, separation= or what the fleet loses, raise most_rounds= or its hours, or give a deadline= to "
            "publish what there is by then"
        )

    # ── check-ins ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fill(self) -> None:
        """Where devices wait for work: give it to as many as there is room for, drawn uniformly from those who may come."""
        if self._asleep is not None or (wanted := self._server.room()) <= 0 or self._waiting_to_fill:
            return
        if (begins := begins_at(self._pacing, self._current)) > self.now:
            self._look_again_at(begins)
            return
        if self._down():  # nobody is asked: the requests that devices hold open are cut
            self._look_again_at(max(end for begin, end in self._outages if begin <= self.now < end))
            return
        some = self._drawn_freely(wanted) if self._passes is None else self._drawn_in_passes(wanted)
        for who in some:
            self._check_in(who)
        if not some and self._may_come(np.arange(len(self._devices)), online=False).any():
            self._look_again_at(self.now + MINUTE)  # who may come is offline, or rests

    def _drawn_in_passes(self, wanted: int) -> list[int]:
        """Up to so many of those who may come, each once before any twice."""
        assert self._passes is not None
        return self._passes.draw(
            wanted, present_at(self._joined, self._current.number, len(self._devices)), self._may_come
        )

    def _drawn_freely(self, wanted: int) -> list[int]:
        """Up to so many of those who may come, uniformly."""
        number, count = self._current.number, len(self._devices)
        rng = self._rng
        if self._drawn < number:
            self._drawn, rng = number, generator(self._seed, "round", number, "cohort")
        drawn = rng.choice(count, size=min(wanted, count), replace=False)
        some = drawn[self._may_come(drawn)]
        if len(some) < wanted and count > _MANY:  # before everyone is looked at, some more
            drawn = np.unique(np.concatenate([some, rng.choice(count, size=min(64 * wanted, count), replace=False)]))
            some = rng.permutation(drawn[self._may_come(drawn)])[:wanted]
        if len(some) < wanted:
            others = np.setdiff1d(np.flatnonzero(self._may_come(np.arange(count))), some)
            more = rng.choice(others, size=min(wanted - len(some), len(others)), replace=False)
            some = np.concatenate([some, more])
        return some.tolist()

    def _look_again_at(self, moment: float) -> None:
        self._waiting_to_fill = True
        self._at(moment, self._look_again)

    def _look_again(self) -> None:
        self._waiting_to_fill = False

    def _may_come(self, who: Array, online: bool = True) -> Array:
        """Which of these devices are idle, and allowed to take part: the server would say no to others. online: whether they must
        be online too, and not rest."""
        pacing, number = self._pacing, self._current.number
        may = self._idle[who] & (number > self._last[who])
        if self._joined is not None:
            may &= self._joined[who] <= number + FIRST_ROUND
        if pacing.separation > 1:
            may &= self._store.run.models - self._models[who] >= pacing.separation - 1
        if pacing.most_rounds is not None:
            may &= self._rounds_of[who] < pacing.most_rounds
        if not online:
            return may
        return may & (self._rests_until[who] <= self.now) & (self._devices.online_until(who, self.now) > self.now)

    def _put_to_sleep_first(self) -> None:
        """As if the server had long been there: everyone has a window, and stands somewhere in it."""
        count = len(self._devices)
        first, last = window(self._pacing, count, 0.0, 0.0)
        self._windows[:] = first, last
        self._asleep = Calendar()
        everyone = np.arange(count)
        self._sleep(everyone, self._rng.uniform(0.0, last, count))

    def _sleep(self, who: Array, moments: Floats) -> None:
        """Wake devices then, or, where they are offline then, some time after they are online again."""
        assert self._asleep is not None
        online = self._devices.online_from(who, moments)
        late = online > moments
        if late.any():  # not all at once
            left = self._devices.online_until(who[late], online[late]) - online[late]
            online[late] += self._rng.uniform(0.0, 0.9, int(late.sum())) * left
        self._due[who] = online
        self._asleep.put(who, online)

    def _sleep_one(self, who: int, moment: float) -> None:
        """`_sleep` of one device, without arrays."""
        assert self._asleep is not None
        online = self._devices.one_online_from(who, moment)
        if online > moment:
            online += self._rng.uniform(0.0, 0.9) * (self._devices.one_online_until(who, online) - online)
        self._due[who] = online
        self._asleep.put_one(who, online)

    def _wake_some(self, asleep: Calendar, until: float) -> None:
        """Devices whose time has come. While there is no work, one answer serves all; else each one asks."""
        who, moments = asleep.take(min(until, asleep.next() + _SLICE))
        due = self._due[who] == moments  # a device has one alarm: the last that was set
        who, moments = who[due], moments[due]
        self._measure_rate()
        position = 0
        while position < len(who):
            if self._queue and self._queue[0][0] < moments[position]:  # a check-in before has made something happen
                asleep.put(who[position:], moments[position:])
                return
            self.now = float(moments[position])
            if self._owing[who[position]] or (self._server.room(self.now) > 0 and not self._down()):
                self.totals.checked_in(moments[position : position + 1])
                self._check_in(int(who[position]))
                position += 1
                continue
            owing = np.flatnonzero(self._owing[who[position:]])
            stop = position + (int(owing[0]) if len(owing) else len(who) - position)
            self.totals.checked_in(moments[position:stop])
            self._turn_away(who[position:stop], moments[position:stop])
            position = stop

    def _turn_away(self, who: Array, moments: Floats) -> None:
        """No work now: all of them come back within one window; where nobody answers, within the one that each has."""
        if not self._down():
            (later,) = self._server.check_in("", CheckIn("", 1, _ALL), self.now)
            assert isinstance(later, ComeLater)
            self._windows[who] = later.window
            self.totals.reasons[later.reason] += len(who)
        windows = np.asarray(self._windows[who], np.float64)
        wait: Floats = self._rng.uniform(windows[:, 0], windows[:, 1]) / self._devices.clock[who]
        self._sleep(who, moments + wait)

    def _measure_rate(self) -> None:
        """Check-ins a second, over the last minutes."""
        recent = self.totals.checkins[-5:]
        self._circumstances = replace(self._circumstances, arriving=sum(recent) / (MINUTE * max(1, len(recent))))

    def _down(self) -> bool:
        return any(begin <= self.now < end for begin, end in self._outages)

    def _check_in(self, who: int) -> None:
        """One device asks, and is answered."""
        state = self._states.get(who, DeviceState(window=tuple(self._windows[who].tolist())))
        state, (ask,) = device.step(state, device.WakeUp(f"{who}/{state.serial + 1}"), _FREE)
        assert isinstance(ask, device.SendCheckIn)
        self._states[who] = state
        self._due[who] = -1.0
        if self._is_lost():
            self._at(self.now + device.PATIENCE, self._no_answer, who, self._alarm(who))
            return
        for action in self._server.check_in(str(who), CheckIn(ask.session, ask.serial, _ALL, ask.previous), self.now):
            match action:
                case SettleSession(session, outcome):
                    self._told(who, device.Settled(session, outcome))
                case ComeLater(times, reason):
                    self.totals.reasons[reason] += 1
                    self._told(who, device.ToldLater(times))
                case AssignWork(session):
                    self._begin(who, session)
                case _:
                    self._act(action)

    def _alarm(self, who: int) -> int:
        """A new alarm of a device; those before it ring no more."""
        self._alarms[who] += 1
        return int(self._alarms[who])

    def _no_answer(self, who: int, alarm: int) -> None:
        if alarm == self._alarms[who]:
            self._told(who, device.NoAnswer())

    def _is_lost(self) -> bool:
        """Whether a message does not arrive."""
        return self._down() or (self._fleet.flaky > 0 and self._rng.random() < self._fleet.flaky)

    # ── a device at work ─────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, who: int, session: Session) -> None:
        """It has its work: how long will it take, and what will become of it?"""
        fleet, devices, work = self._fleet, self._devices, self._work
        number = session.version if self._pacing.buffered else session.round
        if self._given[0] != number:
            self._given = (number, Counter())
        given = self._given[1]
        again, given[who] = given[who], given[who] + 1
        fate = Fate()
        if fleet.lost or fleet.stragglers:
            rng = self._rng
            if self._name is not None:
                words = ("round", number, "client", self._name(who), "fleet", *([again] if again else []))
                rng = generator(self._seed, *words)
            fate = fleet.fate(work.steps(who), rng)
        seconds = float(devices.seconds[who]) * work.times
        if seconds and fleet.by == "examples":
            seconds *= work.share(who)
        if seconds and fleet.jitter:
            seconds *= math.exp(fleet.jitter * self._rng.standard_normal())
        seconds += 2 * fleet.latency + work.down / float(devices.down[who])
        self._idle[who] = False
        self._open_versions[session.version] += 1
        upload = work.up / float(devices.up[who])
        self._workers[who] = _Worker(session, fate, again, self.now, seconds + upload)
        self.totals.bytes_down += work.down
        self._told(who, device.Assigned(WorkOffer(session.id)))
        if self._pacing.deadline is not None:
            self._order += 1
            heapq.heappush(self._places, (session.began, self._order, session.id))
        online = self._devices.one_online_until(who, self.now)
        if self.now + seconds > online:
            self._at(online, self._fail, who, "offline")
        elif fate.lost or fate.late:
            self._at(self.now + seconds, self._vanish, who, session, "lost" if fate.lost else "late")
        else:
            self._at(self.now + seconds, self._told, who, device.TrainingDone())

    def _fail(self, who: int, reason: str) -> None:
        """It can tell the server so."""
        self._workers[who].seconds = self.now - self._workers[who].began
        self._told(who, device.Failed(reason))

    def _vanish(self, who: int, session: Session, reason: str) -> None:
        """It is gone without a word: the server learns it when its session lapses, or, if it has set no time, from the line."""
        self.totals.bytes_up += self._work.up if reason == "lost" else 0  # sent, and never there
        self._end_work(who, session, reason)
        self._states[who] = device.step(self._states[who], device.Restarted(), _FREE)[0]
        if self._pacing.deadline is None:
            self._at(self.now, self._drop, who, session.id, reason)
        self._rest(who, self._states[who].window)

    def _drop(self, who: int, session: str, reason: str) -> None:
        self._carry_out(self._server.drop([session], reason, self.now))
        self._note_rest(who)

    def _watch_places(self) -> None:
        """Be there when the session that has held its place longest lapses, and when a round is over in which nobody works."""
        while self._places and not self._holds_place(self._places[0][2]):
            heapq.heappop(self._places)
        place = (self._places[0][2] if self._places else "", self._store.run.takes)
        if place[0] and place != self._watched_place:
            moment = lets_go_at(self._store.sessions[place[0]], self._server.facts(self.now))
            if moment < self._next_lapse:
                self._next_lapse = moment
                self._at(max(moment, self.now), self._let_go, late=True)
        self._watched_place = place
        row = self._current
        if row.state is State.OPEN and row.dropped and not row.out and not self._pacing.buffered:
            moment = over_at(self._server.facts(self.now), row)
            if self.now < moment < self._next_tick:
                self._next_tick = moment
                self._at(moment, self._tick, late=True)

    def _holds_place(self, session: str) -> bool:
        row = self._store.sessions.get(session)
        return row is not None and row.state == "out"

    def _let_go(self) -> None:
        """Free the place of the session that has held its own longest, if it takes too long."""
        self._next_lapse, self._watched_place = math.inf, ("", 0.0)
        if self._places and self._holds_place(session := self._places[0][2]):
            self._carry_out(self._server.expire(self.now, [session]))
            self._note_rest(int(session.partition("/")[0]))

    def _note_rest(self, who: int) -> None:
        """Note until when a device is given no work."""
        known = self._store.devices.get(str(who))
        self._rests_until[who] = 0.0 if known is None else known.rests_until

    def _note_models(self, who: int) -> None:
        """Note how many models there are when a device's last sum has become one."""
        known = self._store.devices.get(str(who))
        self._models[who] = -(2**31) if known is None else known.models

    def _told(self, who: int, event: device.Event) -> None:
        """Something happens to a device; do what its table says."""
        state, actions = device.step(self._states[who], event, _FREE)
        self._states[who] = state
        self._owing[who] = state.unsettled
        for action in actions:
            match action:
                case device.SendReport(session):
                    self._send(who, session)
                case device.SendAbort(session, reason):
                    worker = self._workers.get(who)
                    if worker is not None:
                        self._end_work(who, worker.session, reason)
                    self._drop(who, session, reason)
                case device.KeepState(session) | device.UndoState(session):
                    worker = self._workers.get(who)
                    if worker is not None and worker.session.id == session:
                        self._end_work(
                            who, worker.session, self._why(session) if isinstance(action, device.UndoState) else None
                        )
                case device.SleepFor(times):
                    self._rest(who, times)
                case _:
                    pass

    def _why(self, session: str) -> str:
        """Why a report is in no sum, in the server's words; one whose round was over has no other."""
        row = self._store.sessions.get(session)
        return (row.reason if row is not None else "") or "closed"

    def _rest(self, who: int, times: tuple[float, float]) -> None:
        """It sleeps; a device that waits for work does so awake, unless it owes or is owed an answer."""
        waiting = self._asleep is None
        if waiting and not self._states[who].unsettled:
            return
        wait = float(self._rng.uniform(*times)) / float(self._devices.clock[who])
        alarm = self._alarm(who)
        if self._asleep is None or self._states[who].phase is Phase.REPORTING:
            self._at(self.now + wait, self._wake, who, alarm)
        else:
            self._windows[who] = times
            self._sleep_one(who, self.now + wait)

    def _wake(self, who: int, alarm: int) -> None:
        """Its own alarm, while a report of it is not settled."""
        state = self._states[who]
        if alarm != self._alarms[who] or not state.unsettled:
            return
        if state.phase is Phase.REPORTING and state.tries < 4:
            self._told(who, device.WakeUp(""))
        else:
            self._check_in(who)

    def _send(self, who: int, session: str) -> None:
        """A report on its way; perhaps it never arrives, perhaps twice."""
        self.totals.bytes_up += self._work.up
        takes = self._fleet.latency + self._work.up / float(self._devices.up[who])
        alarm = self._alarm(who)
        if self._is_lost():
            self._at(self.now + takes + device.PATIENCE, self._no_answer, who, alarm)
            return
        self._at(self.now + takes, self._arrive, who, session)
        if self._fleet.doubled and self._rng.random() < self._fleet.doubled:
            self._at(self.now + takes * (1 + self._rng.random()) + self._rng.random(), self._arrive, who, session)

    # ── the server ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _arrive(self, who: int, session: str) -> None:
        if self._down():
            self._at(self.now + device.PATIENCE, self._no_answer, who, int(self._alarms[who]))
            return
        for action in self._server.report(session, self.now):
            if isinstance(action, StageReport):
                self._staged.setdefault(session, self.now)
                self.totals.staged = max(self.totals.staged, len(self._staged))
                self._commit_soon()
            else:
                self._carry_out((action,))

    def _commit_soon(self) -> None:
        if not self._committing:
            self._committing = True
            self._at(max(self.now, self._committed + self._cost.commit), self._begin_commit, late=True)

    def _begin_commit(self) -> None:
        self._at(self.now + self._cost.report * len(self._staged), self._commit, late=True)

    def _commit(self) -> None:
        self._committing, self._committed = False, self.now
        actions = self._server.commit(self.now)
        for session in [session for session in self._staged if session not in self._server.staged]:
            self.totals.waited = max(self.totals.waited, self.now - self._staged.pop(session))
        self._carry_out(actions)
        if self._staged:
            self._commit_soon()

    def _tick(self) -> None:
        self._next_tick = math.inf
        self._carry_out(self._server.tick(self.now))

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            self._act(action)
        self._look_at_rounds()

    def _act(self, action: Action) -> None:
        match action:
            case AcceptReport(session) | RefuseReport(session, _):
                self._answer(session, "counted" if isinstance(action, AcceptReport) else "discarded")
            case CloseRound(number):
                self._publishing = max(self.now, self._publishing) + self._cost.publish
                self._at(self._publishing, self._publish, number, late=True)
            case _:
                pass

    def _answer(self, session: str, outcome: str) -> None:
        """Tell the device what became of its report, if the answer arrives."""
        who = int(session.partition("/")[0])
        if outcome == "counted":
            self._count(who, session)
        state = self._states[who]
        if state.session != session or not state.unsettled:
            return
        if self._is_lost():
            self._at(self.now + device.PATIENCE, self._no_answer, who, int(self._alarms[who]))
        else:
            self._at(self.now + self._fleet.latency, self._told, who, device.Settled(session, outcome))

    def _count(self, who: int, session: str) -> None:
        """Note a report that is in a sum; of an answer that is given again, nothing."""
        row = self._store.sessions.get(session)
        worker = self._workers.get(who)
        if (
            worker is None
            or worker.session.id != session
            or row is None
            or row.sum is None
            or self._last[who] >= row.sum
        ):
            return
        counted = CountedReport(who, worker.again, row.sum, row.staleness, worker.fate.most_steps, worker.seconds)
        self._counted.setdefault(row.sum, []).append(counted)
        self._by_version.setdefault(row.version, []).append(counted)
        self._last[who] = row.sum
        self._note_models(who)
        self._rests_until[who] = 0.0
        self._rounds_of[who] += 1
        self._progressed = self.now

    def _publish(self, number: int) -> None:
        self._carry_out(self._server.publish(number, self.now))

    def _look_at_rounds(self) -> None:
        """Open what is planned, watch deadlines, note what is over."""
        while (row := self._store.rounds.get(self._oldest)) is not None and row.over:
            self._note(row)
            self._oldest += 1
            with self._server.leading() as rows:
                rows.forget_rounds_before(self._oldest - 1)
        row = self._current
        if row.state is State.PLANNED:
            self._server.tick(self.now)
            row = self._current
        if (
            row.state is State.PLANNED
            and row.number > self._paced
            and (begins := begins_at(self._pacing, row)) > self.now
        ):
            self._paced = row.number
            self._at(begins, self._look_at_rounds)
        if (
            row.state is not State.PLANNED
            and row.number > self._watched
            and self._pacing.deadline is not None
            and not self._pacing.buffered
        ):
            self._watched = row.number
            self._at(self.now + self._pacing.deadline, self._tick, late=True)

    def _note(self, row: Round) -> None:
        up, down = self.totals.bytes_up, self.totals.bytes_down
        published = row.state is State.PUBLISHED
        if not published:
            for version, counted in self._by_version.items():
                self._by_version[version] = [one for one in counted if one.into != row.number]
        counted = self._counted.pop(row.number, [])
        for one in counted if not published else ():
            self._note_models(one.position)
        worked = sum(one.seconds for one in counted)
        self.totals.useful += worked if published else 0.0
        self.totals.wasted += 0.0 if published else worked
        self._void = 0 if published or row.since > self._ended else self._void + 1
        self._played[row.number] = Played(
            row.number,
            row.since,
            published,
            counted,
            row.given,
            self._dropped.pop(row.number, Counter()),
            up - self._bytes[0],
            down - self._bytes[1],
            replace(self.totals, reasons=self.totals.reasons.copy(), checkins=[]),
        )
        self._bytes, self._ended = (up, down), row.since

    def _end_work(self, who: int, session: Session, reason: str | None) -> None:
        """A device is through; reason: why its work is in no sum."""
        worker = self._workers.pop(who, None)
        if worker is None:
            return
        self._idle[who] = True
        self._open_versions[session.version] -= 1
        if reason is not None:
            self.totals.wasted += worker.seconds
            self.totals.reasons[reason] += 1
            self._dropped.setdefault(self._current.number, Counter())[reason] += 1
