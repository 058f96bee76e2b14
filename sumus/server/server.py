"""A server: the tasks of a population, and one thread that decides what becomes of every request.

    server = Server("watches", tasks, roll)
    server.start()
    answer = await server.check_in(device, request)
    counted = await server.report(device, server.run("health", "train"), session, update)

What the thread does in a turn, in this order: what an admin wants; check-ins, task by task, the most urgent first; reports, all
that wait as one commit; what devices gave up; what time has brought. A request is answered when what it says is durable. Where
storage fails, everybody who waits is told to come again, and the runs are recovered before anything else is decided.

Several servers may share a database. Each does all of this, but for time and models: those are the leader's, and the others
look at what it has done.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from sumus.aggregate import Aggregate, Update
from sumus.errors import ExperimentError, SumusError, UsageError
from sumus.logs import logger
from sumus.protocol.round import (
    AcceptReport,
    Action,
    AssignWork,
    CheckIn,
    CloseRound,
    ComeLater,
    RefuseReport,
    Session,
    SettleSession,
    outcome,
)
from sumus.rounds.circumstances import Crowd
from sumus.rounds.coordinator import Arrived
from sumus.rounds.departures import departed, forget_device, sessions_out_of
from sumus.rounds.run import DeviceCheckIn, Run, give_up_open_rounds
from sumus.server.committer import Committer, PendingRequest
from sumus.server.evaluation import EvaluationRun
from sumus.server.identity import MEMBER_S, DeviceRegister
from sumus.server.refusals import Refusals
from sumus.server.replica import Replica
from sumus.server.training import TrainingRun
from sumus.spec import canonical_json, to_json
from sumus.storage.identities import Identity
from sumus.storage.keyring import SealError
from sumus.storage.leases import MOST_JUMP
from sumus.storage.store import Store, TakenOver
from sumus.wire.messages import (
    Assignment,
    CheckInAnswer,
    CheckInRequest,
    Counted,
    Kind,
    Nothing,
    Refused,
    Relayed,
    Released,
    Served,
    Settlement,
)

LOG = logger("sumus.server")
TICK = 0.5
"""Seconds between looks at what time has brought."""
GROUP = 0.05
"""Seconds from the end of a commit to the next one, so that under load a commit is of many reports."""
GATHER = 0.002
"""Seconds from the end of a turn to the next one: what a turn costs is shared by all that came meanwhile."""
FINISH = 10.0
"""Seconds between attempts to close what could not be closed."""
TAKEN_OVER = "another server has taken over this database: stop one of the two"
KINDS: tuple[Kind, ...] = ("train", "evaluate")
AGAIN = (1.0, 3.0)
"""The window to come back in where storage fails."""
ELSEWHERE = (20.0, 60.0)
"""The window to come back in, of a device whose other work is in the hands of an edge, or that has left its edge with some."""
SOON = (0.1, 0.3)
"""And for what another server may have made just now."""
MOST_HELD = 4096
"""Check-ins held open at once; beyond that they are answered with their windows."""
_SKEW = 1.0
"""Seconds by which clocks of servers that share a database may differ."""
COUNTING = 0.05
"""The share of time for which devices are counted, where other servers may let some in."""


@dataclass
class ServedTask:
    """What a server runs for a task. name: on the wire.  runs: one of each kind, at most.  fingerprint: of devices that can do
    it.  keeps_state: whether it asks of them that they remember.  priority: the higher, the earlier its devices are asked."""

    name: str
    runs: tuple[Run, ...]
    fingerprint: str
    keeps_state: bool = False
    priority: int = 0

    def run(self, kind: Kind) -> Run | None:
        """Its run of a kind."""
        return next((run for run in self.runs if run.kind == kind), None)

    @property
    def training(self) -> TrainingRun:
        """The run in which models are made: not at an edge."""
        found = next((run for run in self.runs if isinstance(run, TrainingRun)), None)
        if found is None:
            raise UsageError("an edge makes no models: ask the server above it")
        return found

    @property
    def evaluation(self) -> EvaluationRun | None:
        """The run in which they are measured; None where nobody does."""
        return next((run for run in self.runs if isinstance(run, EvaluationRun)), None)

    @property
    def released(self) -> Released | None:
        """The model that devices answer with."""
        return next((released for run in self.runs if (released := run.released()) is not None), None)


@dataclass(frozen=True)
class Reported:
    """A report that has arrived whole and was checked: of a session of the rows; or an edge's, of many."""

    run: Run
    report: Arrived
    content: Update | Aggregate


@dataclass(frozen=True)
class Aborted:
    """A device gave up, or an edge says so of one of its own, as the `parent`."""

    run: Run
    session: str
    reason: str
    parent: str = ""


@dataclass(frozen=True)
class Spoilt:
    """A device sent a report that can never be counted. code: why, of the closed list."""

    run: Run
    session: str
    code: str


@dataclass(frozen=True)
class Command:
    """Something an admin wants, done between other decisions. do(now) → the answer."""

    do: Callable[[float], Any]


Item: TypeAlias = DeviceCheckIn | Reported | Aborted | Spoilt | Command


@dataclass(eq=False)
class _Asking:
    """A check-in while it is decided. identity: of the device, or of the edge that passed it on, once that was looked up."""

    waiting: PendingRequest[Item]
    asked: DeviceCheckIn
    until: float
    identity: Identity | None = None
    settled: Settlement | None = None
    later: ComeLater | None = None
    known: bool = False

    @property
    def device(self) -> str:
        """The device's id."""
        return self.asked.device

    @property
    def request(self) -> CheckInRequest:
        """What it asks."""
        return self.asked.request

    @property
    def parent(self) -> str:
        """The edge that passed it on; empty if the device asked here itself."""
        return self.asked.parent


@dataclass
class Counts:
    """What happened since the start, for /metrics and status; no device is named. events: by (what, which).  bytes_in, bytes_out:
    of bodies.  batches: commits.  waited: seconds from a report's arrival to its answer, added up."""

    events: Counter[tuple[str, str]] = field(default_factory=lambda: Counter[tuple[str, str]]())
    bytes_in: int = 0
    bytes_out: int = 0
    batches: int = 0
    waited: float = 0.0


class Server:
    """population: its name.  replica: this process, among those that share the rounds.  clock: seconds that never go back, also
    over restarts (`storage_clock`).

    trouble: why nothing can be decided now; empty where all is well.  people_changed: whether somebody has enrolled or left.
    refusals: why devices took no part of late.  crowd: the devices that are enrolled, as the runs of the tasks share it.
    """

    def __init__(
        self,
        population: str,
        tasks: Sequence[ServedTask],
        roll: DeviceRegister,
        replica: Replica,
        crowd: Crowd,
        clock: Callable[[], float] = time.time,
        group: float = GROUP,
    ) -> None:
        self.population, self.roll, self.replica, self.crowd, self.clock = population, roll, replica, crowd, clock
        self.tasks = sorted(tasks, key=lambda task: (-task.priority, task.name))
        self.counts = Counts()
        self.refusals = Refusals()
        self.trouble = "starting"
        self.began = time.monotonic()
        self.listeners: list[Callable[[], None]] = []
        self.people_changed = True
        self._taken_over = False
        self._group = group
        self._committer = Committer[Item](self._turn, min(group, GATHER))
        self._held: list[_Asking] = []
        self._fence: int | None = None
        self._out: dict[str, tuple[Run, str, int]] = {}
        self._reports: dict[tuple[int, str], list[PendingRequest[Item]]] = {}
        self._waiting_reports: list[PendingRequest[Item]] = []
        self._next_commit = self._next_tick = self._next_finish = self._next_count = self._checkins_since = 0.0
        self._saw = 0.0
        self._checkins = 0
        self._seen: object = None
        self._stopping = False

    def start(self) -> None:
        """Recover, and decide from now on; `trouble` is empty when this returns, unless storage fails."""
        self._committer.start()
        self.replica.start(self._look_soon)
        self.ask_to_do(lambda now: None).result()

    def _look_soon(self) -> None:
        self._committer.put(Command(lambda now: None))

    def decide_held_again(self) -> None:
        """Decide anew on check-ins that are held, at the end of this turn, since a run may answer them differently now."""
        self._seen = None

    def drain(self) -> None:
        """Hold no check-in from now on: whoever waits is answered. Reports are taken as ever."""
        self._stopping = True
        self._committer.put(Command(lambda now: None))

    @property
    def held(self) -> int:
        """Check-ins that are held open now."""
        return len(self._held)

    @property
    def stuck_s(self) -> float:
        """Seconds that the present turn has lasted, infinite where the thread has ended unasked."""
        return self._committer.stuck_s

    def stop(self) -> None:
        """Answer what waits, and end. What is staged is committed first."""
        self._stopping = True
        self._committer.stop()
        self.roll.write_seen()

    @property
    def leads(self) -> bool:
        """Whether this process makes models, and lets time go by. On the deciding thread."""
        return self._fence is not None

    def run(self, task: str, kind: Kind) -> Run | None:
        """A task's run of this kind."""
        found = next((each for each in self.tasks if each.name == task), None)
        return None if found is None else found.run(kind)

    async def check_in(self, device: str, request: CheckInRequest, signed: Relayed | None = None) -> CheckInAnswer:
        """Answer a device; up to `request.wait_s` later, if there is no work now. signed: see `DeviceCheckIn`."""
        return await self._committer.ask(DeviceCheckIn(device, request, signed=signed))

    async def report(self, device: str, run: Run, session: str, update: Update) -> Counted:
        """Count a report that the run's first hop has checked. Refused where it is not, and will not be; or cannot be now."""
        return await self._committer.ask(Reported(run, Arrived((f"{device}/{session}",)), update))

    async def relay(self, edge: str, request: CheckInRequest, signed: Relayed) -> CheckInAnswer:
        """Answer a device by way of its edge. signed: the check-in as the device signed it, which was verified."""
        return await self._committer.ask(DeviceCheckIn(signed.device, request, edge, signed))

    async def report_sum(self, edge: str, run: Run, sessions: tuple[str, ...], total: Aggregate) -> Counted:
        """Count what an edge has added of these sessions' reports, all of it or nothing."""
        return await self._committer.ask(Reported(run, Arrived(sessions, edge), total))

    async def end(self, edge: str, run: Run, session: str, reason: str) -> Nothing:
        """Note that no report of an edge's device will come."""
        return await self._committer.ask(Aborted(run, session, reason, edge))

    async def abort(self, device: str, run: Run, session: str, reason: str) -> Nothing:
        """Note that no report will come."""
        return await self._committer.ask(Aborted(run, f"{device}/{session}", reason))

    async def let_go(self, device: str, run: Run, session: str, code: str) -> Nothing:
        """Give the place of a session away whose report can never be counted."""
        return await self._committer.ask(Spoilt(run, f"{device}/{session}", code))

    async def has(self, sha256: str) -> bool:
        """Whether devices may fetch an object. What another server has made since is looked for in the rows."""
        asked = time.monotonic()
        if self._knows(sha256) or not self.replica.shared:
            return self._knows(sha256)
        if not await self.command(lambda now: self._see(asked)):
            raise Refused("busy", "it may be new: ask again", SOON)
        return self._knows(sha256)

    def _knows(self, sha256: str) -> bool:
        return any(sha256 in run.objects for task in self.tasks for run in task.runs)

    def _see(self, since: float) -> bool:
        """Look at the models, unless that was done since; False where that was so short a time ago that it is not done again."""
        if self._saw < since:
            if time.monotonic() < self._saw + SOON[0]:
                return False
            self._saw = time.monotonic()
            for task in self.tasks:
                task.training.see()
        return True

    def forget(self, device: str, link: str, now: float, reason: str = "withdrawn") -> None:
        """Forget what is known of a device, and not that it was counted. If it is an edge, the work that was given through it
        ends, and its places are free. On the deciding thread. link: that it enrolled with, see `DeviceRegister.link_of`."""
        for one in [each for each in self._held if each.device == device]:
            self._held.remove(one)
            one.waiting.say(Refused("unknown_device", "it has left, or was shut out"))
        for run in self._runs():
            out = sessions_out_of(run.store, device)
            if out:
                self._note_dropped(run, out, reason, now)
            run.carry_out(forget_device(run.coordinator, device, link, run.rounds_of_sum(), reason, now), now)
        self.replica.leases.forget_serial(device)
        self.count_people()

    def take_up(self, task: ServedTask, now: float) -> None:
        """Serve one more task, or another version of one. On the deciding thread."""
        self.tasks = [each for each in self.tasks if each.name != task.name] + [task]
        for run in task.runs:
            self._recover_run(run, now)
        self.count_people()

    def served(self, may: int) -> list[Served]:
        """What an edge must know of each run that it may take part in. On the deciding thread. may: how many devices it may speak
        for, and so how many reports its sum may hold."""
        return [
            Served(
                task.name,
                run.kind,
                task.fingerprint,
                task.keeps_state,
                run.plan_body,
                canonical_json(to_json(run.hop)),
                run.least,
                min(run.most_together, may),
                task.released,
                run.edges.rounds,
                run.edges.noise_at,
            )
            for task in self.tasks
            for run in task.runs
            if run.most_together
        ]

    async def command(self, do: Callable[[float], Any]) -> Any:
        """Let the deciding thread do something, given the time, and answer with what it returns."""
        return await self._committer.ask(Command(do))

    def ask_to_do(self, do: Callable[[float], Any]) -> "Future[Any]":
        """The same, from a thread."""
        return self._committer.put(Command(do))

    # ── a turn ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _turn(self, taken: Sequence[PendingRequest[Item]]) -> float:
        """Decide on everything that waits; seconds until the next turn is due."""
        now = self.clock()
        waiting = [one for one in taken if not one.gone]
        try:
            if self._taken_over or self.replica.trouble:
                raise TakenOver(self.replica.trouble or TAKEN_OVER)
            if self.trouble or self.replica.fence != self._fence:
                self._recover(now)
            if self.people_changed:
                self.count_people()
            for one in waiting:
                if isinstance(one.item, Command):
                    self._command(one, one.item, now)
            asked = [self._asking(one, one.item) for one in waiting if isinstance(one.item, DeviceCheckIn)]
            self._check_in(asked, now)
            self._waiting_reports += [one for one in waiting if isinstance(one.item, Reported)]
            if time.monotonic() >= self._next_commit or self._stopping:
                self._take_reports(now)
            for one in waiting:
                if isinstance(one.item, Aborted):
                    self._abort(one, one.item, now)
                elif isinstance(one.item, Spoilt):
                    self._let_go(one, one.item, now)
            if time.monotonic() >= self._next_tick:
                self._tick(now)
            self._look_again(now)
        except Exception as error:
            self._fail(error, waiting)
            return 0.0 if isinstance(error, TakenOver) and not self._taken_over else AGAIN[0]
        return self._pause()

    def _pause(self) -> float:
        """Seconds until something is due though nothing comes."""
        due = [self._next_tick, *(each.until for each in self._held)]
        if self._waiting_reports:
            due.append(self._next_commit)
        return max(0.0, min(due) - time.monotonic())

    def _recover(self, now: float) -> None:
        """Take up what was left undone, or hear that another server leads."""
        self._send_back([])  # what is staged will not be
        self._fence = self.replica.look()
        self.count_people()
        for run in self._runs():
            self._recover_run(run, now)
        self.trouble = ""
        if self._fence is None:
            LOG.info("replica %s leads", self.replica.leader)
        else:
            LOG.info("recovered; fence %d", self._fence)

    def _recover_run(self, run: Run, now: float) -> None:
        run.recover(now, self._fence)
        run.tick(now)

    def _fail(self, error: Exception, waiting: Iterable[PendingRequest[Item]]) -> None:
        """Storage failed, or we did, or another leads: whoever waits is told to come again, and everything is read anew."""
        known = isinstance(error, SumusError | OSError) or hasattr(error, "orig")
        if isinstance(error, TakenOver):
            known, self._taken_over = True, not self.replica.shared or bool(self.replica.trouble)
            self.trouble = str(error) or (TAKEN_OVER if self._taken_over else "another replica leads since")
        else:
            self.trouble = in_words(error)
        LOG.error("nothing can be decided now: %s", self.trouble, exc_info=not known)
        self.counts.events["failures", type(error).__name__] += 1
        held, self._held = self._held, []
        self._send_back([*waiting, *self._waiting_reports, *(each.waiting for each in held)])
        self._waiting_reports = []

    def _send_back(self, waiting: Iterable[PendingRequest[Item]]) -> None:
        """Tell these to come again, and who has reported what is not counted yet."""
        staged, self._reports = self._reports, {}
        for one in [*waiting, *(one for those in staged.values() for one in those)]:
            one.say(Refused("not_ready", "the server begins anew; your report is not counted yet", AGAIN))

    def _command(self, one: PendingRequest[Item], command: Command, now: float) -> None:
        try:
            one.say(command.do(now))
        except SumusError as error:
            one.say(error)

    def _runs(self) -> list[Run]:
        """All training runs, the most urgent first, then all evaluations."""
        return [run for kind in KINDS for task in self.tasks if (run := task.run(kind)) is not None]

    # ── check-ins ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _asking(self, waiting: PendingRequest[Item], asked: DeviceCheckIn) -> _Asking:
        self._checkins += 1
        return _Asking(waiting, asked, waiting.since + asked.request.wait_s)

    def _check_in(self, asked: Sequence[_Asking], now: float) -> None:
        """Answer check-ins, or hold them."""
        left = self._news(asked, now)
        self._read_out([one.device for one in left])
        for one in left:
            one.later = None
        left = self._settle_previous(left, now)
        for run in self._runs():
            left = self._ask_run(run, left, now)
        for one in left:
            if not self.tasks:
                one.waiting.say(Refused("not_ready", "this edge has not heard yet what there is to do", AGAIN))
            elif not one.known:
                self.refusals.note("", "", "wrong_task", one.device, now)
                one.waiting.say(
                    Refused(
                        "wrong_task",
                        "no task of this server has the fingerprint of your client's file: is it of this release?",
                    )
                )
            elif (
                one.until > time.monotonic()
                and self._may_change(one)
                and len(self._held) < MOST_HELD
                and one.settled is None
            ):
                self._held.append(one)
            else:
                self._say_later(one)

    def _news(self, asked: Sequence[_Asking], now: float) -> list[_Asking]:
        """Check-ins that are the latest of their devices, which are still let in; others are answered."""
        left = list[_Asking]()
        for one in asked:
            try:
                one.identity = self.roll.find(one.parent or one.device, self.clock())
                if one.identity.speaks_for and not one.parent:
                    raise Refused("not_device", "it enrolled with an edge's link: give a device a link of its own")
                left.append(one)
            except Refused as refused:
                one.waiting.say(refused)
        return self._latest(self._spoken_for(left, now))

    def _spoken_for(self, asked: Sequence[_Asking], now: float) -> list[_Asking]:
        """Check-ins that devices sent here themselves, or through an edge that may speak for them; others are answered."""
        refused = dict[tuple[str, str], str]()
        edges = {one.parent: one.identity for one in asked if one.parent and one.identity is not None}
        for id, edge in edges.items():
            serials = _highest(one for one in asked if one.parent == id)
            codes = self.roll.speak_for(edge, serials, self.clock(), partial(self._works, id, now), self._lapses())
            refused |= {(id, device): code for device, code in codes.items()}
        for one in asked:
            if (code := refused.get((one.parent, one.device))) is not None:
                one.waiting.say(Refused(code, "its edge may not speak for it, or not for one more"))
        return [one for one in asked if (one.parent, one.device) not in refused]

    def _works(self, edge: str, now: float, device: str) -> bool:
        """Whether a device has work that did not come through this edge."""
        return any(
            session.parent != edge and outcome(session, run.coordinator.facts(now)) == "unknown"
            for run in self._runs()
            for session in run.coordinator.last_sessions([device])
        )

    def _lapses(self) -> float:
        """Seconds after which a device's place at its edge is free: longer than any sum is open."""
        return max([MEMBER_S, *(2 * (run.pacing.deadline or 0.0) for run in self._runs())])

    def _latest(self, asked: Sequence[_Asking]) -> list[_Asking]:
        """Check-ins with their devices' highest serials; others are answered."""
        if not asked:
            return []
        leases, serials = self.replica.leases, _highest(asked)
        last = leases.raise_serials(serials)
        if far := {device: serial for device, serial in serials.items() if serial > last[device]}:
            last = {**last, **leases.raise_serials(far, self._last_given(far))}  # it may know more than this process
        for one in asked:
            if one.request.serial != last[one.device]:
                one.waiting.say(_replayed(one.request.serial, max(0, last[one.device])))
        return [one for one in asked if one.request.serial == last[one.device]]

    def _last_given(self, devices: Iterable[str]) -> dict[str, int]:
        """The serials of the check-ins that these devices' last work answered."""
        found = dict[str, int]()
        for run in self._runs():
            for session in run.coordinator.last_sessions(list(devices)):
                found[session.device] = max(session.serial, found.get(session.device, 0))
        return found

    def _refuse_replayed(self, one: _Asking) -> None:
        """A run has given work for a later check-in of this device, or for this one before."""
        given = self._last_given([one.device]).get(one.device, 0)
        one.waiting.say(_replayed(one.request.serial, max(given, one.request.serial)))

    def _read_out(self, devices: Sequence[str]) -> None:
        """Read what work devices have, of which run, where there are several; it may be of another server."""
        self._out = {}
        runs = self._runs()
        for run in runs if devices and len(runs) > 1 else ():
            for session in run.coordinator.last_sessions(devices):
                before = self._out.get(session.device)
                if session.awaited and (before is None or before[2] < session.serial):
                    self._out[session.device] = run, session.id, session.serial

    def _settle_previous(self, asked: Sequence[_Asking], now: float) -> list[_Asking]:
        """Say what became of earlier sessions; who is still to report them is answered with that. The others."""
        left = list[_Asking]()
        for one in asked:
            previous = one.request.previous
            if previous is None:
                left.append(one)
                continue
            run, outcome = self.run(previous.task, previous.kind), "discarded"
            if run is not None:
                id = f"{one.device}/{previous.session}"
                event = CheckIn(f"{one.device}/{one.request.session}", one.request.serial, previous=id, works=False)
                found = [
                    action.outcome
                    for action in run.coordinator.check_in(one.device, event, now)
                    if isinstance(action, SettleSession)
                ]
                if not found:
                    self._refuse_replayed(one)
                    continue
                outcome = found[0]
            one.settled = Settlement(previous.session, outcome)  # pyright: ignore[reportArgumentType]
            self.counts.events["settled", outcome] += 1
            if outcome == "unknown":
                one.waiting.say(CheckInAnswer(one.settled))
            else:
                left.append(one)
        return left

    def _ask_run(self, run: Run, asked: Sequence[_Asking], now: float) -> list[_Asking]:
        """Let a run give work to those who can do it; who got none."""
        task = next(task for task in self.tasks if run in task.runs)
        wanted = run.wanted()
        able = [one for one in asked if task.fingerprint in one.request.fingerprints]
        for one in able:
            one.known = True
        able = [one for one in able if wanted and self._may(run, task, one, now)]
        able = self._not_again(run, able, now)
        if not able:
            return list(asked)
        events = [
            (
                one.device,
                CheckIn(
                    f"{one.device}/{one.request.session}",
                    one.request.serial,
                    one.request.conditions.value(),
                    parent=one.parent,
                ),
            )
            for one in able
        ]
        given = set[int]()
        for one, actions in zip(able, run.coordinator.check_in_all(events, now), strict=True):
            if not actions:
                given.add(id(one))
                self._refuse_replayed(one)
            for action in actions:
                if isinstance(action, AssignWork):
                    given.add(id(one))
                    self._give(run, one, action.session, now)
                elif isinstance(action, ComeLater):
                    self._note_later(run, one, action, now)
            run.carry_out(actions, now)
        return [one for one in asked if id(one) not in given]

    def _may(self, run: Run, task: ServedTask, one: _Asking, now: float) -> bool:
        """Whether a run may give this device work: not where the same request was given other work before."""
        if run.kind not in one.request.kinds:
            only = "only measures" if run.kind == "train" else "only trains"
            self.refusals.note(run.task, run.kind, only, one.device, now)
            return False
        out = self._out.get(one.device)
        if out is not None and out[0] is not run:
            if out[2] >= one.request.serial:
                return False
            if self._is_of_another(out[0], out[1], one.parent, now):  # new work would spoil the sum that this is in
                self._note_later(run, one, ComeLater(ELSEWHERE, "parent"), now)
                return False
        if task.keeps_state and not one.request.keeps_state:
            self.refusals.note(run.task, run.kind, "keeps_state", one.device, now)
            return False
        later = run.admits(one.asked, now)
        if later is not None:
            self._note_later(run, one, later, now)
        return later is None

    def _is_of_another(self, run: Run, session: str, parent: str, now: float) -> bool:
        """Whether a report of this session may still come, and through somebody else than this parent."""
        held = run.coordinator.session(session)
        return held is not None and held.parent != parent and outcome(held, run.coordinator.facts(now)) == "unknown"

    def _not_again(self, run: Run, asked: Sequence[_Asking], now: float) -> list[_Asking]:
        """Check-ins of devices that did not take the place of one that was counted, and left.

        Whoever has a link for several uses could else be counted, leave, and come again in the same sum under a new key.
        """
        with_link = [one for one in asked if one.identity is not None and one.identity.link]
        if not with_link:
            return list(asked)
        left, after = departed(run.store), set[int]()
        for one in with_link:
            if one.identity is not None and one.identity.enrolled >= left.get(one.identity.link, math.inf) - _SKEW:
                after.add(id(one))
                self._note_later(run, one, ComeLater(AGAIN, "left"), now)
                run.turned_away(one.asked, now)
        return [one for one in asked if id(one) not in after]

    def _note_later(self, run: Run, one: _Asking, later: ComeLater, now: float) -> None:
        """Of what runs say to a device, the earliest counts."""
        if later.reason != "separation" or run.pacing.separation > 1:  # else it is in the sum that is open
            self.refusals.note(run.task, run.kind, later.reason, one.device, now)
        if one.later is None or later.window < one.later.window:
            one.later = later

    def _give(self, run: Run, one: _Asking, session: Session, now: float) -> None:
        """Answer with work. Whoever had other work has forgotten it."""
        out = self._out.get(one.device)
        if out is not None and out[0] is not run:
            self._drop(out[0], [out[1]], "forgotten", now)
        self._out[one.device] = run, session.id, session.serial
        try:
            offered: Assignment = run.offer(session, now)
        except (
            ExperimentError
        ) as error:  # its model is forgotten, or a file is gone: that is this device's bad luck alone
            LOG.error("%s has no work to give: %s", run.task, error)
            self._drop(run, [session.id], "closed", now)
            self._say_later(one)
            return
        self.counts.events["check-ins", "assigned"] += 1
        one.waiting.say(CheckInAnswer(one.settled, offered, released=self._released(one)))

    def _may_change(self, one: _Asking) -> bool:
        """Whether what becomes of rounds may bring this device work: not where it is itself not ready, or has had its share."""
        return one.later is None or one.later.reason in (
            "asking",
            "closed",
            "few",
            "full",
            "left",
            "parent",
            "paused",
            "separation",
        )

    def _say_later(self, one: _Asking) -> None:
        """Answer without work. Who may be held comes back at once: it is cheaper to hold it than to guess when there is work."""
        window, reason = (AGAIN, "nothing to do") if one.later is None else (one.later.window, one.later.reason)
        if one.request.wait_s and self._may_change(one) and len(self._held) < MOST_HELD:
            window = min(window, AGAIN)
        self.counts.events["check-ins", reason] += 1
        one.waiting.say(CheckInAnswer(one.settled, None, window, reason, self._released(one)))

    def _released(self, one: _Asking) -> dict[str, Any]:
        """The models that this device's tasks answer with, as far as they are there."""
        found = dict[str, Any]()
        for task in self.tasks:
            if task.fingerprint in one.request.fingerprints:
                with suppress(ExperimentError):
                    if (released := task.released) is not None:
                        found[task.name] = released
        return found

    def _look_again(self, now: float) -> None:
        """Decide anew on check-ins that are held: where there is room now, and where their time is over."""
        self._held = [one for one in self._held if not one.waiting.gone]
        if not self._held:
            return
        moment = time.monotonic()
        over = [one for one in self._held if one.until <= moment or self._stopping]
        seen = [
            (
                run.coordinator.current.number,
                run.coordinator.room() > 0,
                run.wanted(),
                self.crowd.population,
            )
            for run in self._runs()
        ]
        if seen != self._seen:
            self._seen = seen
            held, self._held = self._held, []
            self._check_in(held, now)
        elif over:
            self._held = [one for one in self._held if one not in over]
            for one in over:
                self._say_later(one)

    # ── reports ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_reports(self, now: float) -> None:
        """Stage what has come, and commit it, run by run."""
        taken, self._waiting_reports = self._waiting_reports, []
        for run in self._runs():
            mine = [one for one in taken if isinstance(one.item, Reported) and one.item.run is run and not one.gone]
            if mine:
                self._stage(run, mine, now)
            if run.coordinator.staged:
                self._commit(run, now)
                self._next_commit = time.monotonic() + self._group

    def _stage(self, run: Run, reports: Sequence[PendingRequest[Item]], now: float) -> None:
        items = [one.item for one in reports if isinstance(one.item, Reported)]
        for one, item in zip(reports, items, strict=True):
            self._reports.setdefault((id(run), item.report.sessions[0]), []).append(one)
        answers = run.sums.report_all([(item.report, item.content) for item in items], now)
        for item, actions in zip(items, answers, strict=True):
            if not actions:
                self._answer(
                    run,
                    item.report.sessions[0],
                    Refused("unknown_session", "it was never given to this device, or is long over"),
                )
            self._say(run, actions, duplicate=True)
            run.carry_out(actions, now)

    def _commit(self, run: Run, now: float) -> None:
        """Commit until nothing more can be counted: what a full buffer left goes into the next one."""
        staged = -1
        while run.coordinator.staged and len(run.coordinator.staged) != staged:
            staged = len(run.coordinator.staged)
            try:
                actions = run.sums.commit(now)
            except SealError as error:  # the ring has no key for this round's any more
                if not self.leads:
                    raise  # it is this replica's ring
                self._give_up(run, error, now)
                return
            self.counts.batches += 1
            self._say(run, actions)
            run.carry_out(actions, now)
            if any(isinstance(action, CloseRound) for action in actions):
                self._next_tick = 0.0  # whoever watches is told of the model in this turn
        run.tick(now)

    def _give_up(self, run: Run, error: Exception, now: float) -> None:
        """End what a run has begun, since nothing can be added to it; the reports that wait are not counted."""
        give_up_open_rounds(run, error, now)
        for session in [session for which, session in self._reports if which == id(run)]:
            self._answer(run, session, Refused("closed", "its round was given up"))

    def _say(self, run: Run, actions: Iterable[Action], duplicate: bool = False) -> None:
        """Answer reports."""
        for action in actions:
            if isinstance(action, AcceptReport):
                self.counts.events["reports", "duplicate" if duplicate else "counted"] += 1
                self.refusals.took_part(run.task, run.kind, action.session.rpartition("/")[0])
                self._answer(run, action.session, Counted(duplicate=duplicate))
            elif isinstance(action, RefuseReport):
                self.counts.events["reports", action.reason] += 1
                code = action.reason if action.reason in ("stale", "phase") else "closed"
                self._answer(run, action.session, Refused(code, action.reason))

    def _answer(self, run: Run, session: str, answer: Any) -> None:
        for one in self._reports.pop((id(run), session), ()):
            self.counts.waited += time.monotonic() - one.since
            one.say(answer)

    def _abort(self, one: PendingRequest[Item], item: Aborted, now: float) -> None:
        row = item.run.coordinator.session(item.session)
        if row is not None and row.parent == item.parent:
            self.refusals.note(item.run.task, item.run.kind, item.reason, row.device, now)
            self._drop(item.run, [item.session], item.reason, now)
        one.say(Nothing())

    def _let_go(self, one: PendingRequest[Item], item: Spoilt, now: float) -> None:
        row = item.run.coordinator.session(item.session)
        if row is not None and row.state == "out" and not row.parent:
            self.counts.events["dropped", item.code] += 1
            self.refusals.note(item.run.task, item.run.kind, item.code, row.device, now)
            item.run.carry_out(item.run.coordinator.let_go(item.session, now), now)
        one.say(Nothing())

    def _note_dropped(self, run: Run, sessions: Sequence[str], reason: str, now: float) -> None:
        self.counts.events["dropped", reason] += len(sessions)
        run.dropped(sessions, reason, now)

    def _drop(self, run: Run, sessions: Sequence[str], reason: str, now: float) -> None:
        self._note_dropped(run, sessions, reason, now)
        run.carry_out(run.coordinator.drop(sessions, reason, now), now)

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tick(self, now: float) -> None:
        moment = time.monotonic()
        self.crowd.note_checkins(self._checkins, moment - self._checkins_since)
        for run in self._runs():
            run.tick(now)
            if self.replica.shared and self.leads:
                run.closed.take_up(now)
            if run.closed.unfinished and moment >= self._next_finish:
                run.finish(now)
            if run.coordinator.staged:
                self._commit(run, now)
        if moment >= self._next_finish:
            self._next_finish = moment + FINISH
        if self.replica.shared and moment >= self._next_count:
            self.count_people()
            took = time.monotonic() - moment
            self._next_count = moment + took / COUNTING
        self._checkins, self._checkins_since, self._next_tick = 0, moment, moment + TICK
        for listener in self.listeners:
            listener()

    def count_people(self) -> None:
        """Look how many devices are enrolled. On the deciding thread."""
        self.people_changed = False
        self.crowd.count()


def in_words(error: Exception) -> str:
    """Why nothing can be decided: what storage says, without the wrapping of its library; of a defect, that it is one."""
    if isinstance(error, SumusError):
        return str(error)
    inner = getattr(error, "orig", None) or error
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror + (f": {inner.filename}" if inner.filename else "")
    if inner is not error or isinstance(inner, OSError):
        return (str(inner).strip().splitlines() or ["its storage does not answer"])[0]
    return f"a defect of the server, which is in its log ({type(error).__name__})"


def _highest(asked: Iterable[_Asking]) -> dict[str, int]:
    """The highest serials of check-ins, by device."""
    serials = dict[str, int]()
    for one in asked:
        serials[one.device] = max(one.request.serial, serials.get(one.device, 0))
    return serials


def _replayed(serial: int, last: int) -> Refused:
    """Refuse a check-in for its serial, and say where to count on. last: the highest serial that is known of its device."""
    said = "was answered since" if serial <= last else f"was the last, and a serial may lie {MOST_JUMP} above that"
    return Refused("replayed", f"a check-in with serial {last} {said}", serial=min(last, 2**52))


def storage_clock(stores: Iterable[Store], of_all: Callable[[], float] = time.time) -> Callable[[], float]:
    """Seconds that no row is later than, and that no change of a machine's clock moves: they go on from the time now, by the
    clock of all who share the rows, or from the latest row, if that is later."""
    latest = 0.0
    for store in stores:
        with store.transaction() as rows:
            latest = max([latest, *(row.since for row in rows.rounds())])
    begun, start = time.monotonic(), max(of_all(), latest)
    return lambda: start + time.monotonic() - begun
