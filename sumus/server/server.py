"""A server: the tasks of a population, and one thread that decides about every request.

    server = Server("watches", tasks, register, replica, crowd)
    server.start()
    answer = await server.check_in(DeviceCheckIn(device, request))
    counted = await server.report(run, run.intake.read_report(body, device, session))

In a turn the thread handles, in this order: commands of an admin; check-ins, task by task, the most urgent first; waiting
reports, in one commit; sessions that devices gave up; and events that the passing of time causes. A request is answered when
its decision is durable. If storage fails, all waiting senders are told to come again, and the runs are recovered before
anything else is decided.

Several servers may share a database. Each of them does all of this, except for the passing of time and the models: the leader
alone handles these, and the other servers read the results.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from sumus.errors import SumusError
from sumus.logs import logger
from sumus.rounds.circumstances import Crowd
from sumus.rounds.departures import forget_device, sessions_out_of
from sumus.rounds.run import DeviceCheckIn, Run
from sumus.rounds.stages import Checked
from sumus.server.admission import Admission
from sumus.server.check_ins import CheckIns
from sumus.server.committer import Committer, PendingRequest
from sumus.server.counts import Counts
from sumus.server.identity import DeviceRegister
from sumus.server.objects import FetchableObjects
from sumus.server.refusals import Refusals
from sumus.server.replica import Replica
from sumus.server.report_queue import ReportQueue
from sumus.server.requests import Aborted, Command, Item, Reported, Spoilt
from sumus.server.tasks import ServedTask, ServedTasks
from sumus.server.windows import AGAIN
from sumus.storage.store import Store, TakenOver
from sumus.wire.messages import CheckInAnswer, Counted, Kind, Nothing, Refused

LOG = logger("sumus.server")
TICK = 0.5
"""Seconds between two looks at deadlines and other timed events."""
GROUP = 0.05
"""Seconds from the end of a commit to the next one, so that under load a commit holds many reports."""
GATHER = 0.002
"""Seconds from the end of a turn to the next one, so that all requests that came meanwhile share the cost of a turn."""
FINISH = 10.0
"""Seconds between two attempts to close rounds that could not be closed."""
TAKEN_OVER = "another server has taken over this database: stop one of the two"
COUNTING = 0.05
"""The share of the time that is spent counting devices, if other servers may enrol devices."""


class Server:
    """Decides about the requests of a population's devices.

    Attributes:
        population: The name of the population.
        tasks: The tasks, the most urgent first.
        roll: The register of enrolled devices.
        replica: This process, among those that share the rounds.
        crowd: The number of devices and of their check-ins, which all runs share.
        clock: Seconds that never go back, not even after a restart (`storage_clock`).
        counts: The counts since the start.
        refusals: Why devices took no part recently.
        objects: The objects that devices may fetch.
        trouble: Why nothing can be decided now; empty if the server works.
        began: The time at which the server was made, on the monotonic clock.
        listeners: Functions that are called, on the deciding thread, after each look at timed events.
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
        """Serve tasks, as soon as the server is started.

        Args:
            population: The name of the population.
            tasks: The tasks.
            roll: The register of enrolled devices.
            replica: This process, among those that share the rounds.
            crowd: The number of devices and of their check-ins, which all runs share.
            clock: Returns seconds that never go back.
            group: Seconds from the end of a commit to the next one.
        """
        self.population, self.roll, self.replica, self.crowd, self.clock = population, roll, replica, crowd, clock
        self.tasks, self.counts, self.refusals = ServedTasks(tasks), Counts(), Refusals()
        self.objects = FetchableObjects(self.tasks, replica.shared, self.command)
        self.trouble = "starting"
        self.began = time.monotonic()
        self.listeners: list[Callable[[], None]] = []
        self._taken_over = False
        self._committer = Committer[Item](self._turn, min(group, GATHER))
        admission = Admission(self.tasks, roll, replica.leases, lambda: self.clock())
        self._check_ins = CheckIns(self.tasks, admission, crowd, self.counts, self.refusals)
        self._reports = ReportQueue(self.tasks, self.counts, self.refusals, lambda: self.leads, group)
        self._fence: int | None = None
        self._next_tick = self._next_finish = self._next_count = self._ticked = 0.0
        self._stopping = False

    # ── from outside ─────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Recover, and start the deciding thread. `trouble` is empty when this returns, unless storage fails."""
        self._committer.start()
        self.replica.start(self._wake)
        self.ask_to_do(lambda now: None).result()

    def drain(self) -> None:
        """Answer the held check-ins, and hold none from now on. Reports are still counted."""
        self._stopping = True
        self._wake()

    def stop(self) -> None:
        """Commit the staged reports, answer all waiting requests, and stop."""
        self._stopping = True
        self._committer.stop()
        self.roll.write_seen()

    @property
    def held(self) -> int:
        """The number of check-ins that are held open now."""
        return self._check_ins.held

    @property
    def stuck_s(self) -> float:
        """Seconds that the present turn has lasted; infinite if the thread has died."""
        return self._committer.stuck_s

    @property
    def leads(self) -> bool:
        """Whether this process makes models and handles timed events. Read it on the deciding thread."""
        return self._fence is not None

    def run(self, task: str, kind: Kind) -> Run | None:
        """Return a task's run of this kind; None if it has none."""
        return self.tasks.run(task, kind)

    async def check_in(self, asked: DeviceCheckIn) -> CheckInAnswer:
        """Answer a device's check-in; if no work is available now, up to the request's `wait_s` seconds later."""
        return await self._committer.ask(asked)

    async def report(self, run: Run, report: Checked) -> Counted:
        """Count a report.

        Raises:
            Refused: The report will never be counted, or cannot be counted now.
        """
        return await self._committer.ask(Reported(run, report))

    async def abort(self, run: Run, session: str, reason: str, edge: str = "") -> Nothing:
        """Note that no report of a session will come. edge: the edge that sent this for its device; empty if the device sent
        it.
        """
        return await self._committer.ask(Aborted(run, session, reason, edge))

    async def let_go(self, run: Run, session: str, code: str) -> Nothing:
        """Free the place of a session whose report can never be counted."""
        return await self._committer.ask(Spoilt(run, session, code))

    async def command(self, do: Callable[[float], Any]) -> Any:
        """Call a function, whose argument is the time, on the deciding thread, and return its result."""
        return await self._committer.ask(Command(do))

    def ask_to_do(self, do: Callable[[float], Any]) -> "Future[Any]":
        """Call a function on the deciding thread, as `command` does, from any thread; return the future of its result."""
        return self._committer.put(Command(do))

    # ── for commands, on the deciding thread ─────────────────────────────────────────────────────────────────────────

    def forget(self, device: str, link: str, now: float, reason: str = "withdrawn") -> None:
        """Forget a device, but not that it was counted. Work through an edge ends only when the edge is forgotten.

        Args:
            device: The device's id, or the edge's.
            link: The hash of the token with which it enrolled, see `DeviceRegister.link_of`.
            now: Seconds of the server's clock.
            reason: Why its sessions end.
        """
        self._check_ins.forget(device)
        for run in self.tasks.runs():
            if out := sessions_out_of(run.store, device):
                self.counts.note_dropped(run, out, reason, now)
            run.carry_out(forget_device(run.coordinator, device, link, run.rounds_of_sum(), reason, now), now)
        self.replica.leases.forget_serial(device)
        self.crowd.count()

    def decide_held_again(self) -> None:
        """Decide held check-ins again at the end of this turn, since a run may answer them differently now."""
        self._check_ins.decide_held_again()

    def take_up(self, task: ServedTask, now: float) -> None:
        """Serve one more task, or another version of a task."""
        self.tasks.put(task)
        for run in task.runs:
            _recover_run(run, now, self._fence)
        self.crowd.count()

    # ── a turn ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wake(self) -> None:
        """Make the deciding thread take a turn."""
        self._committer.put(Command(lambda now: None))

    def _turn(self, taken: Sequence[PendingRequest[Item]]) -> float:
        """Decide everything that waits; return the seconds until the next turn is due."""
        now = self.clock()
        waiting = [request for request in taken if not request.gone]
        try:
            if self._taken_over or self.replica.trouble:
                raise TakenOver(self.replica.trouble or TAKEN_OVER)
            if self.trouble or self.replica.fence != self._fence:
                self._recover(now)
            if self.crowd.changed:
                self.crowd.count()
            for request in waiting:
                if isinstance(request.item, Command):
                    _command(request, request.item, now)
            self._check_ins.decide(waiting, now)
            self._reports.add(waiting)
            if time.monotonic() >= self._reports.next_commit or self._stopping:
                self._take_reports(now)
            self._reports.end(waiting, now)
            if time.monotonic() >= self._next_tick:
                self._tick(now)
            self._check_ins.look_again(now, self._stopping)
        except Exception as error:
            self._fail(error, waiting)
            return 0.0 if isinstance(error, TakenOver) and not self._taken_over else AGAIN[0]
        return self._pause()

    def _pause(self) -> float:
        """Return the seconds until something is due even if no request comes."""
        due = [self._next_tick, *self._check_ins.due]
        if self._reports.waiting:
            due.append(self._reports.next_commit)
        return max(0.0, min(due) - time.monotonic())

    def _take_reports(self, now: float) -> None:
        """Count the waiting reports."""
        if self._reports.take_all(now):
            self._next_tick = 0.0  # listeners are told of the model in this turn

    def _recover(self, now: float) -> None:
        """Recover all runs: as the leader, or as a server that another one leads."""
        self._send_back([])  # staged reports are lost
        self._fence = self.replica.look()
        self.crowd.count()
        for run in self.tasks.runs():
            _recover_run(run, now, self._fence)
        self.trouble = ""
        if self._fence is None:
            LOG.info("replica %s leads", self.replica.leader)
        else:
            LOG.info("recovered; fence %d", self._fence)

    def _fail(self, error: Exception, waiting: Iterable[PendingRequest[Item]]) -> None:
        """Tell all waiting senders to come again, after storage or this server has failed, or another server leads."""
        known = isinstance(error, SumusError | OSError) or hasattr(error, "orig")
        if isinstance(error, TakenOver):
            known, self._taken_over = True, not self.replica.shared or bool(self.replica.trouble)
            self.trouble = str(error) or (TAKEN_OVER if self._taken_over else "another replica leads since")
        else:
            self.trouble = in_words(error)
        LOG.error("nothing can be decided now: %s", self.trouble, exc_info=not known)
        self.counts.events["failures", type(error).__name__] += 1
        self._send_back([*waiting, *self._reports.take_waiting(), *self._check_ins.take_held()])

    def _send_back(self, waiting: Iterable[PendingRequest[Item]]) -> None:
        """Tell the senders of these requests and of staged reports to come again."""
        for request in [*waiting, *self._reports.take_staged()]:
            request.say(Refused("not_ready", "the server begins anew; your report is not counted yet", AGAIN))

    def _tick(self, now: float) -> None:
        """Handle the passing of time in all runs: deadlines, closing rounds, and the number of devices."""
        moment = time.monotonic()
        self.crowd.note_checkins(self._check_ins.take_arrived(), moment - self._ticked)
        for run in self.tasks.runs():
            run.tick(now)
            if self.replica.shared and self.leads:
                run.closed.take_up(now)
            if run.closed.unfinished and moment >= self._next_finish:
                run.closed.finish(now)
            if run.coordinator.staged:
                self._reports.commit(run, now)
        if moment >= self._next_finish:
            self._next_finish = moment + FINISH
        if self.replica.shared and moment >= self._next_count:
            self.crowd.count()
            took = time.monotonic() - moment
            self._next_count = moment + took / COUNTING
        self._ticked, self._next_tick = moment, moment + TICK
        for listener in self.listeners:
            listener()


def _recover_run(run: Run, now: float, fence: int | None) -> None:
    """Recover a run. fence: the fence of the lease; None if another server leads."""
    run.recover(now, fence)
    run.tick(now)


def _command(request: PendingRequest[Item], command: Command, now: float) -> None:
    """Carry out a command, and answer with the result. Errors that are not of sumus are left to the server's turn."""
    try:
        request.say(command.do(now))
    except SumusError as error:
        request.say(error)


def in_words(error: Exception) -> str:
    """Say why nothing can be decided: the storage's own message, without its library's wrapping, or that it is a defect."""
    if isinstance(error, SumusError):
        return str(error)
    inner = getattr(error, "orig", None) or error
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror + (f": {inner.filename}" if inner.filename else "")
    if inner is not error or isinstance(inner, OSError):
        return (str(inner).strip().splitlines() or ["its storage does not answer"])[0]
    return f"a defect of the server, which is in its log ({type(error).__name__})"


def storage_clock(stores: Iterable[Store], of_all: Callable[[], float] = time.time) -> Callable[[], float]:
    """Make a clock that is never earlier than a row, and that does not follow changes of the machine's clock.

    Args:
        stores: The stores whose rows have times.
        of_all: The clock of all processes that share the rows. The new clock starts at its time, or at the time of the latest
            row, if that is later.
    """
    latest = 0.0
    for store in stores:
        with store.transaction() as rows:
            latest = max([latest, *(row.since for row in rows.rounds())])
    begun, start = time.monotonic(), max(of_all(), latest)
    return lambda: start + time.monotonic() - begun
