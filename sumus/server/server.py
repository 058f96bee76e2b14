"""A server: the tasks of a population, and one thread that decides about every request.

    server = Server("watches", tasks, register, replica, crowd)
    server.start()
    answer = await server.check_in(DeviceCheckIn(device, request))
    counted = await server.report(run, run.intake.read_report(body, device, session))

In a turn the thread handles, in this order: commands of an admin; check-ins, task by task, the most urgent first; waiting
reports, in one commit; sessions that devices gave up; and timed events, such as deadlines. A request is answered when its
decision is durable. If storage fails, all waiting senders get an error and a retry window, and the runs are recovered before
the next decision.

Several servers may share a database. Each of them does all of this, with one exception: only the leader handles timed events
and makes models, and the other servers read the results.
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
"""The time between two checks for deadlines and other timed events, in seconds."""
GROUP = 0.05
"""The shortest time from the end of a commit to the next one, in seconds, so that under load a commit has many reports."""
GATHER = 0.002
"""The shortest time from the end of a turn to the next one, in seconds, so that all requests of this time share the cost of a
turn.
"""
FINISH = 10.0
"""The time between two attempts to close rounds that could not be closed, in seconds."""
TAKEN_OVER = "another server has taken over this database: stop one of the two"
COUNTING = 0.05
"""The largest share of the time that is spent on counting devices, if other servers may enrol devices."""


class Server:
    """Decides about the requests of a population's devices.

    Attributes:
        population: The name of the population.
        tasks: The tasks, in the order of their priority, highest first.
        roll: The register of enrolled devices.
        replica: This process as one of the processes that share the rounds.
        crowd: The number of devices and their rate of check-ins, which all runs share.
        clock: Seconds that never go back, not even after a restart (`storage_clock`).
        counts: The counts since the start.
        refusals: The reasons why devices took no part recently.
        objects: The objects that devices may fetch.
        trouble: The reason why the server cannot decide now; empty if it can.
        began: The time at which the server was made, on the monotonic clock.
        listeners: Functions that are called, on the deciding thread, after each check for timed events.
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
        """Make a server, which serves its tasks after `start`.

        Args:
            population: The name of the population.
            tasks: The tasks.
            roll: The register of enrolled devices.
            replica: This process as one of the processes that share the rounds.
            crowd: The number of devices and their rate of check-ins, which all runs share.
            clock: Returns seconds that never go back.
            group: The shortest time from the end of a commit to the next one, in seconds.
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

    # ── from other threads ─────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Recover the runs, and start the deciding thread. When this returns, `trouble` is empty unless storage fails."""
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
        """The duration of the present turn so far, in seconds; infinity if the thread has died."""
        return self._committer.stuck_s

    @property
    def leads(self) -> bool:
        """Whether this process makes models and handles timed events. Read this property on the deciding thread."""
        return self._fence is not None

    def run(self, task: str, kind: Kind) -> Run | None:
        """Return a task's run of this kind; None if it has none."""
        return self.tasks.run(task, kind)

    async def check_in(self, asked: DeviceCheckIn) -> CheckInAnswer:
        """Answer a device's check-in. If there is no work now, the answer may come up to `wait_s` seconds (of the request)
        later.
        """
        return await self._committer.ask(asked)

    async def report(self, run: Run, report: Checked) -> Counted:
        """Count a report.

        Raises:
            Refused: The report will never be counted, or cannot be counted now.
        """
        return await self._committer.ask(Reported(run, report))

    async def abort(self, run: Run, session: str, reason: str, edge: str = "") -> Nothing:
        """Record that no report of a session will come. `edge` is the edge that sent this for its device; empty if the device
        sent it.
        """
        return await self._committer.ask(Aborted(run, session, reason, edge))

    async def let_go(self, run: Run, session: str, code: str) -> Nothing:
        """Give the place of a session in its round to another device, since its report can never be counted."""
        return await self._committer.ask(Spoilt(run, session, code))

    async def command(self, do: Callable[[float], Any]) -> Any:
        """Call a function, whose argument is the time, on the deciding thread, and return its result."""
        return await self._committer.ask(Command(do))

    def ask_to_do(self, do: Callable[[float], Any]) -> "Future[Any]":
        """Call a function on the deciding thread, as `command` does, from any thread; return the future of its result."""
        return self._committer.put(Command(do))

    # ── on the deciding thread ─────────────────────────────────────────────────────────────────────────

    def forget(self, device: str, link: str, now: float, reason: str = "withdrawn") -> None:
        """Delete a device's rows in all runs, except the record of counted reports. Its work through an edge is ended only if
        the edge is forgotten.

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
        """Decide all waiting requests; return the number of seconds until the next turn."""
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
        """Return the number of seconds until the next timed event."""
        due = [self._next_tick, *self._check_ins.due]
        if self._reports.waiting:
            due.append(self._reports.next_commit)
        return max(0.0, min(due) - time.monotonic())

    def _take_reports(self, now: float) -> None:
        """Count the waiting reports."""
        if self._reports.take_all(now):
            self._next_tick = 0.0  # call the listeners in this turn, since a model may be new

    def _recover(self, now: float) -> None:
        """Recover all runs, as the leader or under another leader."""
        self._send_back([])  # staged reports are lost
        self._fence = self.replica.look()
        self.crowd.count()
        for run in self.tasks.runs():
            _recover_run(run, now, self._fence)
        self.trouble = ""
        if self._fence is None:
            LOG.info("replica %s leads", self.replica.leader)
        else:
            LOG.info("recovered; this server leads (lease number %d)", self._fence)

    def _fail(self, error: Exception, waiting: Iterable[PendingRequest[Item]]) -> None:
        """Answer all waiting senders with a retry window, after storage or this server has failed, or another server leads."""
        known = isinstance(error, SumusError | OSError) or hasattr(error, "orig")
        if isinstance(error, TakenOver):
            known, self._taken_over = True, not self.replica.shared or bool(self.replica.trouble)
            self.trouble = str(error) or (TAKEN_OVER if self._taken_over else "another replica leads now")
        else:
            self.trouble = in_words(error)
        LOG.error("the server cannot decide now: %s", self.trouble, exc_info=not known)
        self.counts.events["failures", type(error).__name__] += 1
        self._send_back([*waiting, *self._reports.take_waiting(), *self._check_ins.take_held()])

    def _send_back(self, waiting: Iterable[PendingRequest[Item]]) -> None:
        """Answer these requests, and those of staged reports, with a retry window."""
        for request in [*waiting, *self._reports.take_staged()]:
            request.say(
                Refused(
                    "not_ready",
                    "the server is recovering: try again later (a report in this request is not counted yet)",
                    AGAIN,
                )
            )

    def _tick(self, now: float) -> None:
        """Handle timed events in all runs: deadlines, closing rounds, and the count of devices."""
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
    """Recover a run. `fence` is the fence of the lease; None if another server leads."""
    run.recover(now, fence)
    run.tick(now)


def _command(request: PendingRequest[Item], command: Command, now: float) -> None:
    """Carry out a command, and answer with the result. The server's turn handles errors that are not a SumusError."""
    try:
        request.say(command.do(now))
    except SumusError as error:
        request.say(error)


def in_words(error: Exception) -> str:
    """Return the reason for an error as text: the message of the storage, or a text that says that the server has a defect."""
    if isinstance(error, SumusError):
        return str(error)
    inner = getattr(error, "orig", None) or error
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror + (f": {inner.filename}" if inner.filename else "")
    if inner is not error or isinstance(inner, OSError):
        return (str(inner).strip().splitlines() or ["its storage does not answer"])[0]
    return f"a defect of the server; its log has the details ({type(error).__name__})"


def storage_clock(stores: Iterable[Store], of_all: Callable[[], float] = time.time) -> Callable[[], float]:
    """Make a clock that is never earlier than a time in the rows, and that ignores later changes of the machine's clock.

    Args:
        stores: The stores whose rows have times.
        of_all: The clock of all processes that share the rows. The new clock starts at the time of this clock, or at the latest
            time in a row if that is later.
    """
    latest = 0.0
    for store in stores:
        with store.transaction() as rows:
            latest = max([latest, *(row.since for row in rows.rounds())])
    begun, start = time.monotonic(), max(of_all(), latest)
    return lambda: start + time.monotonic() - begun
