"""Decides check-ins: each is answered with work or with a time to ask again, or is held open until there may be work.

check_ins.decide(waiting, now)             decides all new check-ins together
check_ins.look_again(now, stopping)        decides held check-ins again
"""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from sumus.errors import ExperimentError
from sumus.logs import logger
from sumus.protocol.round import AssignWork, CheckIn, ComeLater, Session, SettleSession, outcome
from sumus.rounds.circumstances import Crowd
from sumus.rounds.departures import departed
from sumus.rounds.run import DeviceCheckIn, Run
from sumus.server.admission import Admission, OpenCheckIn
from sumus.server.committer import PendingRequest
from sumus.server.counts import Counts
from sumus.server.refusals import Refusals
from sumus.server.requests import Item
from sumus.server.tasks import ServedTask, ServedTasks
from sumus.server.windows import AGAIN, ELSEWHERE
from sumus.wire.messages import Assignment, CheckInAnswer, Refused, Settlement

LOG = logger("sumus.server")
MOST_HELD = 4096
"""The largest number of check-ins that are held open; further ones are answered at once with a retry window."""
MAY_CHANGE = frozenset({"asking", "closed", "few", "full", "left", "parent", "paused", "separation"})
"""The reasons for giving no work that may no longer hold after a while, since they depend on the rounds and not on the device.
So a check-in with such a reason may be held open.
"""
_SKEW = 1.0
"""The largest difference, in seconds, between the clocks of servers that share a database."""


class CheckIns:
    """Decides check-ins, on the deciding thread."""

    def __init__(
        self, tasks: ServedTasks, admission: Admission, crowd: Crowd, counts: Counts, refusals: Refusals
    ) -> None:
        """Decide check-ins for these tasks.

        Args:
            tasks: The tasks of the server.
            admission: Admits check-ins.
            crowd: The number of devices and their rate of check-ins.
            counts: Counts the answers.
            refusals: Records why devices get no work.
        """
        self._tasks, self._admission, self._crowd = tasks, admission, crowd
        self._counts, self._refusals = counts, refusals
        self._held: list[OpenCheckIn] = []
        self._arrived = 0
        self._seen: object = None
        self._work: dict[str, tuple[Run, str, int]] = {}

    @property
    def held(self) -> int:
        """The number of check-ins that are held open now."""
        return len(self._held)

    @property
    def due(self) -> list[float]:
        """The times, on the monotonic clock, until which check-ins are held."""
        return [check_in.until for check_in in self._held]

    def take_arrived(self) -> int:
        """Return the number of check-ins that have arrived since the last call."""
        arrived, self._arrived = self._arrived, 0
        return arrived

    def take_held(self) -> list[PendingRequest[Item]]:
        """Stop holding check-ins; return the held requests, which still wait for answers."""
        held, self._held = self._held, []
        return [check_in.waiting for check_in in held]

    def forget(self, device: str) -> None:
        """Answer the held check-ins of a device that has left."""
        for check_in in [each for each in self._held if each.device == device]:
            self._held.remove(check_in)
            check_in.say(Refused("unknown_device", "this device has left, or was revoked"))

    def decide(self, waiting: Sequence[PendingRequest[Item]], now: float) -> None:
        """Answer the check-ins among these requests, or hold them."""
        arrived = [
            OpenCheckIn(each, each.item, each.since + each.item.request.wait_s)
            for each in waiting
            if isinstance(each.item, DeviceCheckIn)
        ]
        self._arrived += len(arrived)
        self._decide(arrived, now)

    def decide_held_again(self) -> None:
        """Decide held check-ins again at the end of this turn, since a run may answer them differently now."""
        self._seen = None

    def look_again(self, now: float, stopping: bool) -> None:
        """Decide held check-ins again if a change may have brought them work; answer those whose holding time has ended.

        Args:
            now: Seconds of the server's clock.
            stopping: Whether the server is stopping, so that no check-in is held any more.
        """
        self._held = [check_in for check_in in self._held if not check_in.waiting.gone]
        if not self._held:
            return
        moment = time.monotonic()
        over = [check_in for check_in in self._held if check_in.until <= moment or stopping]
        seen = [
            (
                run.coordinator.current.number,
                run.coordinator.room() > 0,
                run.wanted(),
                self._crowd.population,
            )
            for run in self._tasks.runs()
        ]
        if seen != self._seen:
            self._seen = seen
            held, self._held = self._held, []
            self._decide(held, now)
        elif over:
            self._held = [check_in for check_in in self._held if check_in not in over]
            for check_in in over:
                self._say_later(check_in)

    def _decide(self, check_ins: Sequence[OpenCheckIn], now: float) -> None:
        """Admit and settle check-ins, and let the runs assign work, in the order of their priority; hold or answer the rest."""
        left = self._admission.admit(check_ins, now)
        self._read_work([check_in.device for check_in in left])
        for check_in in left:
            check_in.later = None
        left = self._settle_previous(left, now)
        for run in self._tasks.runs():
            left = self._ask_run(run, left, now)
        for check_in in left:
            if not self._tasks:
                check_in.say(
                    Refused("not_ready", "this edge does not know yet which tasks there are: try again later", AGAIN)
                )
            elif not check_in.known:
                self._refusals.note("", "", "wrong_task", check_in.device, now)
                check_in.say(
                    Refused(
                        "wrong_task",
                        "no task of this server has the fingerprint of the client's file: give it the file of this release",
                    )
                )
            elif check_in.until > time.monotonic() and self._may_hold(check_in) and check_in.settled is None:
                self._held.append(check_in)
            else:
                self._say_later(check_in)

    def _may_hold(self, check_in: OpenCheckIn) -> bool:
        """Return whether a check-in can be held: its device may still get work meanwhile, and there is room for one more."""
        may_change = check_in.later is None or check_in.later.reason in MAY_CHANGE
        return may_change and len(self._held) < MOST_HELD

    def _read_work(self, devices: Sequence[str]) -> None:
        """Read each device's open session and its run from the rows, since another server may have assigned it. If there is
        only one run, do nothing.
        """
        self._work = {}
        runs = self._tasks.runs()
        for run in runs if devices and len(runs) > 1 else ():
            for session in run.coordinator.last_sessions(devices):
                before = self._work.get(session.device)
                if session.awaited and (before is None or before[2] < session.serial):
                    self._work[session.device] = run, session.id, session.serial

    def _settle_previous(self, check_ins: Sequence[OpenCheckIn], now: float) -> list[OpenCheckIn]:
        """For each device that asks about an earlier session, find out how that session ended.

        A device that must still report its earlier session is answered at once; the other check-ins are returned.
        """
        ends, left = self._ends_of_previous(check_ins, now), list[OpenCheckIn]()
        for check_in in check_ins:
            if (previous := check_in.request.previous) is None:
                left.append(check_in)
            elif (end := ends.get(id(check_in))) is None:
                self._admission.refuse_replayed(check_in)
            else:
                check_in.settled = Settlement(previous.session, end)  # pyright: ignore[reportArgumentType]
                self._counts.events["settled", end] += 1
                if end == "unknown":
                    check_in.say(CheckInAnswer(check_in.settled))
                else:
                    left.append(check_in)
        return left

    def _ends_of_previous(self, check_ins: Sequence[OpenCheckIn], now: float) -> dict[int, str]:
        """Look up how the earlier sessions of these check-ins ended, in one transaction for each run.

        Returns:
            The ends, keyed by `id()` of the check-in; check-ins that are already answered are left out.
        """
        asked, ends = dict[Run, list[OpenCheckIn]](), dict[int, str]()
        for check_in in check_ins:
            if (previous := check_in.request.previous) is not None:
                run = self._tasks.run(previous.task, previous.kind)
                if run is None:
                    ends[id(check_in)] = "discarded"
                else:
                    asked.setdefault(run, []).append(check_in)
        for run, those in asked.items():
            answers = run.coordinator.check_in_all([_asks_for_the_end(check_in) for check_in in those], now)
            for check_in, actions in zip(those, answers, strict=True):
                settled = [action.outcome for action in actions if isinstance(action, SettleSession)]
                if settled:
                    ends[id(check_in)] = settled[0]
        return ends

    def _ask_run(self, run: Run, check_ins: Sequence[OpenCheckIn], now: float) -> list[OpenCheckIn]:
        """Let a run assign work to the devices that can do its task; return the check-ins without work."""
        task = self._tasks.of(run)
        wanted = run.wanted()
        able = [check_in for check_in in check_ins if task.fingerprint in check_in.request.fingerprints]
        for check_in in able:
            check_in.known = True
        able = [check_in for check_in in able if wanted and self._is_eligible(run, task, check_in, now)]
        able = self._without_successors(run, able, now)
        if not able:
            return list(check_ins)
        given = set[int]()
        answers = run.coordinator.check_in_all([_asks_for_work(check_in) for check_in in able], now)
        for check_in, actions in zip(able, answers, strict=True):
            if not actions:
                given.add(id(check_in))
                self._admission.refuse_replayed(check_in)
            for action in actions:
                if isinstance(action, AssignWork):
                    given.add(id(check_in))
                    self._give(run, check_in, action.session, now)
                elif isinstance(action, ComeLater):
                    self._note_later(run, check_in, action, now)
            run.carry_out(actions, now)
        return [check_in for check_in in check_ins if id(check_in) not in given]

    def _is_eligible(self, run: Run, task: ServedTask, check_in: OpenCheckIn, now: float) -> bool:
        """Return whether a run may assign work to this device. It may not if the same request was already answered with work of
        another run.
        """
        if run.kind not in check_in.request.kinds:
            only = "only measures" if run.kind == "train" else "only trains"
            self._refusals.note(run.task, run.kind, only, check_in.device, now)
            return False
        work = self._work.get(check_in.device)
        if work is not None and work[0] is not run:
            if work[2] >= check_in.request.serial:
                return False
            if _reports_elsewhere(
                work[0], work[1], check_in.parent, now
            ):  # with new work, the sum that contains this session would be unusable
                self._note_later(run, check_in, ComeLater(ELSEWHERE, "parent"), now)
                return False
        if task.keeps_state and not check_in.request.keeps_state:
            self._refusals.note(run.task, run.kind, "keeps_state", check_in.device, now)
            return False
        later = run.admits(check_in.asked, now)
        if later is not None:
            self._note_later(run, check_in, later, now)
        return later is None

    def _without_successors(self, run: Run, check_ins: Sequence[OpenCheckIn], now: float) -> list[OpenCheckIn]:
        """Leave out devices that enrolled with the same link as a device that was counted and then left: see
        `rounds/departures.py`.
        """
        with_link = [check_in for check_in in check_ins if check_in.identity is not None and check_in.identity.link]
        if not with_link:
            return list(check_ins)
        left, after = departed(run.store), set[int]()
        for check_in in with_link:
            if (
                check_in.identity is not None
                and check_in.identity.enrolled >= left.get(check_in.identity.link, math.inf) - _SKEW
            ):
                after.add(id(check_in))
                self._note_later(run, check_in, ComeLater(AGAIN, "left"), now)
                run.turned_away(check_in.asked, now)
        return [check_in for check_in in check_ins if id(check_in) not in after]

    def _note_later(self, run: Run, check_in: OpenCheckIn, later: ComeLater, now: float) -> None:
        """Record the window in which the device may get work from a run; the earliest window of all runs is used."""
        if (
            later.reason != "separation" or run.pacing.separation > 1
        ):  # otherwise the reason is only that the device is in the open sum
            self._refusals.note(run.task, run.kind, later.reason, check_in.device, now)
        if check_in.later is None or later.window < check_in.later.window:
            check_in.later = later

    def _give(self, run: Run, check_in: OpenCheckIn, session: Session, now: float) -> None:
        """Answer a check-in with work. If the device had work from another run, that session is ended."""
        work = self._work.get(check_in.device)
        if work is not None and work[0] is not run:
            self._counts.drop(work[0], [work[1]], "forgotten", now)
        self._work[check_in.device] = run, session.id, session.serial
        try:
            offered: Assignment = run.offer(session, now)
        except ExperimentError as error:  # its model or a file is missing: other check-ins go on
            LOG.error("%s has no work to give: %s", run.task, error)
            self._counts.drop(run, [session.id], "closed", now)
            self._say_later(check_in)
            return
        self._counts.events["check-ins", "assigned"] += 1
        check_in.say(CheckInAnswer(check_in.settled, offered, released=self._released(check_in)))

    def _say_later(self, check_in: OpenCheckIn) -> None:
        """Answer without work.

        If the server may hold this device's next check-in open, the device comes back at once: this is better than an estimate
        of when there will be work.
        """
        window, reason = (
            (AGAIN, "nothing to do") if check_in.later is None else (check_in.later.window, check_in.later.reason)
        )
        if check_in.request.wait_s and self._may_hold(check_in):
            window = min(window, AGAIN)
        self._counts.events["check-ins", reason] += 1
        check_in.say(CheckInAnswer(check_in.settled, None, window, reason, self._released(check_in)))

    def _released(self, check_in: OpenCheckIn) -> dict[str, Any]:
        """Return the released model of each of this device's tasks; a model whose file is missing is left out."""
        found = dict[str, Any]()
        for task in self._tasks:
            if task.fingerprint in check_in.request.fingerprints:
                with suppress(ExperimentError):
                    if (released := task.released) is not None:
                        found[task.name] = released
        return found


def _asks_for_the_end(check_in: OpenCheckIn) -> tuple[str, CheckIn]:
    """Return the event that only asks how the earlier session ended."""
    assert check_in.request.previous is not None, "the device asks about an earlier session"
    previous = f"{check_in.device}/{check_in.request.previous.session}"
    return check_in.device, CheckIn(
        f"{check_in.device}/{check_in.request.session}", check_in.request.serial, previous=previous, works=False
    )


def _asks_for_work(check_in: OpenCheckIn) -> tuple[str, CheckIn]:
    """Return the event that asks for work."""
    session, conditions = f"{check_in.device}/{check_in.request.session}", check_in.request.conditions.value()
    return check_in.device, CheckIn(session, check_in.request.serial, conditions, parent=check_in.parent)


def _reports_elsewhere(run: Run, session: str, parent: str, now: float) -> bool:
    """Return whether a report of this session may still come through a parent other than `parent`."""
    held = run.coordinator.session(session)
    return held is not None and held.parent != parent and outcome(held, run.coordinator.facts(now)) == "unknown"
