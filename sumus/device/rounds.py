"""A device's part in its server's rounds: it carries out the decisions of the table in `sumus.protocol.session`.

The table decides, and this module carries the decisions out. An event leads to a new record and a list of actions
(`record_step`). The record is written first; then the actions are carried out, and their result is the next event. So if the
process ends at any moment, the next process continues from the record, with the same report.

Nothing here sleeps. `wake` does everything that is due now, and returns the seconds until the next action is due.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import cast

import sumus.protocol.session as session
from sumus.device.access import ServerAccess
from sumus.device.keys import share_of
from sumus.device.memory import DeviceMemory
from sumus.device.models import ReleasedModels
from sumus.device.news import DeviceNews, NewsFeed, news_of
from sumus.device.options import ANY_CONDITIONS, Consent, DeviceProfile
from sumus.device.record_step import step_record, with_task
from sumus.device.store import Record, WorkStarts, counted
from sumus.device.waits import SOON, UNMET, WakeTimer, longer, ordered
from sumus.device.words import COPIED, FINAL, REFUSALS, WAITS, beyond_floor
from sumus.device.work import LocalWork, WorkDone, WorkFailed
from sumus.errors import ExperimentError
from sumus.pacing import Conditions
from sumus.plan import Plan
from sumus.protocol.session import Phase, WorkOffer
from sumus.transport.transport import Unreachable
from sumus.wire.messages import (
    AbortReason,
    Assignment,
    CheckInAnswer,
    CheckInRequest,
    DeviceConditions,
    PreviousSession,
    Refused,
    Window,
)

LONGEST_WAIT = 60.0
"""The longest time for which a check-in may be held open, in seconds."""
FIRST_WAIT = 0.5
"""The same limit for a process's first check-ins, so that the owner soon learns what the device waits for."""
SPREAD = 100
"""The largest step by which a device whose folder was copied raises its check-in serial. The step is random, so that the
other device with the same key learns of the copy too."""
HIGHEST = 2**52
"""The highest check-in serial that a server accepts."""


class DeviceRounds:
    """One device's part in rounds, from a check-in to the end of its report.

    Args:
        memory: The device's record and objects.
        access: Access to the server.
        work: The device's computations.
        models: Fetches released models.
        news: Informs the owner.
        consent: The owner's consent.
        profile: A description of this device.
        conditions: Reads the device's conditions.
        wait_s: Seconds for which the server may hold a check-in open.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        access: ServerAccess,
        work: LocalWork,
        models: ReleasedModels,
        news: NewsFeed,
        consent: Consent,
        profile: DeviceProfile,
        conditions: Callable[[], Conditions],
        wait_s: float,
    ) -> None:
        self._memory, self._access, self._news = memory, access, news
        self._work, self._models = work, models
        self._consent, self._conditions = consent, conditions
        self._name, self._keys, self._today = profile.name, profile.system.keys, profile.system.today
        self._wait_s = min(wait_s, LONGEST_WAIT)
        self._timer = WakeTimer(profile.system.clock, self._keys, self._name)
        self._went_on = memory.record.row == session.DeviceState()
        self._owner_knows_why_it_waits = False
        self._unanswered = 0

    @property
    def unanswered(self) -> int:
        """The number of requests in a row that the server did not answer."""
        return self._unanswered

    # ── methods for the device's owner ───────────────────────────────────────────────────────────────────────────────

    def enrol(self) -> str:
        """Enrol the device at its server unless it is enrolled already; return its id."""
        if (member := self._access.enrol()) is not None:
            self._unanswered = 0
            self._news.tell(DeviceNews("enrolled", f"enrolled in {member.population} as {member.device[:12]}…"))
        return self._access.requests.device

    def wake(self) -> float:
        """Do everything that is due now, and return the seconds until the next action is due.

        Raises:
            ExperimentError: A person must act; the message says how.
        """
        self._go_on()
        if (left := self._timer.left()) > 0:
            return left
        requires = self._consent.requires
        unmet = None if requires == ANY_CONDITIONS else requires.unmet(self._conditions())
        if unmet is not None:
            self._sleep_within(UNMET)
            self._news.tell(
                DeviceNews("waiting", WAITS[unmet].replace("as the plan requires", "as you require"), again_s=UNMET[1])
            )
        elif self._is_enrolled():
            self._sleep_within(self._memory.record.row.window)  # unless an action says otherwise
            word = self._keys("session", self._name, self._memory.record.row.serial + 1).hex()[:32]
            self._carry_out(session.WakeUp(word))
        return max(0.0, self._timer.left())

    def give_up(self) -> None:
        """Tell the server that no report will come for the work in progress."""
        if self._memory.read_again().row.phase is Phase.TRAINING:
            self._carry_out(session.Failed("stopped"))

    def _go_on(self) -> None:
        """Continue where another process ended, or where an error interrupted this one."""
        if not self._went_on:
            self._went_on = True
            self._apply(session.Restarted())
        elif self._memory.record.row.phase is Phase.TRAINING:
            self._apply(session.Restarted())
            self._sleep_within(self._memory.record.row.window)

    def _is_enrolled(self) -> bool:
        """Return whether the device is enrolled, after an attempt to enrol it; if that fails, the device waits."""
        try:
            self.enrol()
        except Unreachable as error:
            self._unanswered += 1
            self._sleep_within(longer((0.0, 0.0), self._unanswered))
            self._news.tell_trouble(str(error), again_s=self._timer.left())
            return False
        return True

    # ── decisions of the table ───────────────────────────────────────────────────────────────────────────────────────

    def _apply(self, event: session.Event, record: Record | None = None) -> tuple[session.Action, ...]:
        """Let the table decide, and write the record.

        Args:
            event: The event.
            record: The record with the event's data, such as a report; None for the current record.

        Returns:
            The actions to carry out now.
        """
        before = record or self._memory.record
        stepped = step_record(before, event, self._consent.floor)
        if stepped.record != self._memory.record:
            self._memory.write(stepped.record)
        was_sent = bool(stepped.news) and before.row.phase is Phase.REPORTING and self._wait_s > 0
        for act in stepped.actions:
            if isinstance(act, session.SleepFor):
                self._sleep_within(SOON if was_sent or act.window == session.AT_ONCE else act.window)
        for news in stepped.news:
            self._news.tell(news)
        return stepped.actions

    def _carry_out(self, event: session.Event, record: Record | None = None) -> None:
        """Apply an event, and carry out the actions that the table decides."""
        work = (record or self._memory.record).work
        for act in self._apply(event, record):
            if isinstance(act, session.SendCheckIn):
                self._check_in(act)
            elif isinstance(act, session.SendReport):
                self._send()
            elif isinstance(act, session.SendAbort) and work is not None:
                self._abort(work, cast(AbortReason, act.reason), self._news.trouble)

    # ── a check-in ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_in(self, act: session.SendCheckIn) -> None:
        work = self._memory.record.work
        previous = None if act.previous is None or work is None else PreviousSession(work.task, work.kind, act.previous)
        wait_s = self._wait_s if self._owner_knows_why_it_waits else min(self._wait_s, FIRST_WAIT)
        request = CheckInRequest(
            serial=act.serial,
            session=act.session,
            fingerprints=(self._work.fingerprint,),
            kinds=self._consent.kinds,
            conditions=_in_message(self._conditions()),
            previous=previous,
            wait_s=0.0 if previous else wait_s,
        )
        try:
            answer = self._access.requests.check_in(request)
        except Unreachable as error:
            self._no_answer(str(error))
        except Refused as refused:
            self._turned_away(refused)
        else:
            self._answered()
            self._news.check_in_went_well()
            self._take_answer(act, answer)

    def _take_answer(self, act: session.SendCheckIn, answer: CheckInAnswer) -> None:
        """Process an answer in order: the end of the last session, then work or the next check-in's time, then models."""
        if answer.settled is not None:
            self._carry_out(session.Settled(answer.settled.session, answer.settled.outcome))
        if self._memory.record.row.phase is Phase.ASKED:
            if answer.assignment is not None:
                try:
                    self._consider(act, answer.assignment)
                finally:
                    self._work.let_go()
            else:
                window = ordered(answer.retry_after_s or self._memory.record.row.window)
                self._apply(session.ToldLater(window))
                if self._consent.kinds:  # else the device waits for models alone
                    said = WAITS.get(answer.reason, answer.reason)
                    self._news.tell(DeviceNews("waiting", said, again_s=window[1]))
                self._owner_knows_why_it_waits = True
        if self._consent.keeps_model:
            self._models.take(answer.released)

    def _turned_away(self, refused: Refused) -> None:
        """Handle the refusal of a check-in."""
        problem = refused.problem
        said = str(refused)
        if problem.code == "replayed" and problem.serial is not None:
            row = self._memory.record.row
            if problem.serial > row.serial:
                said = COPIED.format(problem.serial, row.serial)
                self._news.folder_was_copied(said)
            serial = next_serial(row.serial, problem.serial, share_of(self._keys("apart", self._name, row.serial)))
            self._memory.write(replace(self._memory.record, row=replace(row, serial=serial)))
        self._no_answer(said, problem.retry_after_s or (0.0, 0.0))
        if problem.code == "unknown_device" and self._access.enrol_again():
            return
        if problem.code in FINAL:
            raise ExperimentError(f"{FINAL[problem.code]} ({problem.detail or problem.code})")

    # ── a piece of work ──────────────────────────────────────────────────────────────────────────────────────────────

    def _consider(self, act: session.SendCheckIn, work: Assignment) -> None:
        """Examine an offer of work, and do the work if it is within the floor."""
        if work.session != act.session or self._memory.record.row.unsettled:
            self._apply(session.Assigned(WorkOffer(work.session), self._today()))
            return
        try:
            seen = self._work.look_at(work)
        except Unreachable as error:
            self._no_answer(str(error))
            return
        if seen.trouble:
            self._news.tell_trouble(seen.trouble)
        record = replace(self._memory.record, work=work)
        if seen.plan is not None:
            before = record.begun.get(work.task, WorkStarts())
            times = before.times + 1 if before.version == work.version else 1
            record = replace(record, begun=with_task(record.begun, work.task, WorkStarts(work.version, times)))
        for one in self._apply(session.Assigned(seen.offer, self._today()), record):
            if isinstance(one, session.SendAbort):
                why = beyond_floor(one.reason, seen.offer, self._consent.floor) or self._news.trouble
                self._abort(work, cast(AbortReason, one.reason), why)
                self._rest()
            elif isinstance(one, session.StartWork) and seen.plan is not None:
                self._do(work, seen.plan)

    def _do(self, work: Assignment, plan: Plan) -> None:
        """Train or evaluate, and send the report."""
        self._news.tell(news_of("training", work))
        done = self._work.do(work, plan)
        if isinstance(done, WorkFailed):
            self._news.tell_trouble(done.said)
            self._carry_out(session.Failed(done.reason))
            self._rest()
            return
        news, steps, record = _news_of_done(work, done), done.result.steps, self._memory.record
        self._news.tell(news)
        record = replace(
            record,
            report=done.report,
            pending=done.pending,
            failures=0,
            seconds=done.seconds / steps if steps else record.seconds,
            counts=counted(record.counts, news.what),
        )
        self._carry_out(session.TrainingDone(), record)

    def _send(self) -> None:
        """Send the report, with the same bytes at each attempt."""
        work, report = self._memory.record.work, self._memory.record.report
        if work is None or report is None:
            raise ExperimentError(
                "the device's record names a report that is not stored: delete the device's folder, and enrol it again"
            )
        try:
            self._access.requests.report(work, self._memory.store.get(report))
        except Unreachable as error:
            self._no_answer(str(error))
        except Refused as refused:
            self._news.tell_trouble(f"the report was refused: {refused}")
            if refused.problem.code in REFUSALS:
                self._carry_out(session.Settled(work.session, "discarded"))
            elif refused.problem.code == "unknown_session":
                self._carry_out(session.SessionUnknown())
            else:
                self._carry_out(session.NoAnswer(ordered(refused.problem.retry_after_s or (0.0, 0.0))))
        else:
            self._answered()
            self._carry_out(session.Settled(work.session, "counted"))

    def _abort(self, work: Assignment, reason: AbortReason, why: str) -> None:
        """Tell the server in one word that no report will come; only the owner learns the details."""
        self._news.tell(replace(news_of("aborted", work), said=f"{reason}: {why}" if why else reason))
        with suppress(Unreachable, Refused):  # the server finds out when the session's time is over
            self._access.requests.abort(work, reason)

    # ── whether the server answers ───────────────────────────────────────────────────────────────────────────────────

    def _answered(self) -> None:
        """Record that the server answered, and knows this device."""
        self._news.trouble_is_over()
        self._unanswered = 0
        self._access.server_answered()

    def _no_answer(self, said: str, window: Window = (0.0, 0.0)) -> None:
        """Record that no answer came, or no useful one."""
        self._unanswered += 1
        self._carry_out(session.NoAnswer(ordered(window)))
        self._news.tell_trouble(said, again_s=self._timer.left())

    def _rest(self) -> None:
        """Wait after another round in a row that failed here, longer each time."""
        failures = self._memory.record.failures + 1
        self._memory.write(replace(self._memory.record, failures=failures))
        self._sleep_within(longer(self._memory.record.row.window, failures))

    def _sleep_within(self, window: Window) -> None:
        self._timer.sleep_within(window, self._memory.record.row)


def next_serial(own: int, servers: int, share: float) -> int:
    """Return the serial from which to continue after the server reported that the last one is used.

    The device writes each serial before it uses it. So if the server knows a higher one, another device has used this
    device's key, or this device's folder is a backup.

    Args:
        own: This device's last serial.
        servers: The last serial that the server knows.
        share: A random number from 0 to 1.
    """
    ahead = 1 + int(SPREAD * share) if servers > own else 0
    return min(servers + ahead, HIGHEST)


def _news_of_done(work: Assignment, done: WorkDone) -> DeviceNews:
    result = done.result
    return replace(
        news_of("trained" if work.kind == "train" else "evaluated", work),
        examples=result.examples,
        seconds=done.seconds,
        measured={name: total / count for name, (total, count) in result.measured.items() if count},
    )


def _in_message(conditions: Conditions) -> DeviceConditions:
    return DeviceConditions(
        conditions.charging, conditions.unmetered, conditions.idle, conditions.battery, conditions.version
    )
