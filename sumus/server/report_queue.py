"""The queue of reports. All waiting reports of a run are counted in one commit, and answered when the commit is durable."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sumus.protocol.round import AcceptReport, Action, CloseRound, RefuseReport
from sumus.rounds.run import Run, give_up_open_rounds
from sumus.server.committer import PendingRequest
from sumus.server.counts import Counts
from sumus.server.refusals import Refusals
from sumus.server.requests import Aborted, Item, Reported, Spoilt
from sumus.server.tasks import ServedTasks
from sumus.storage.keyring import SealError
from sumus.wire.messages import Counted, Nothing, Refused


class ReportQueue:
    """Counts reports, on the deciding thread.

    Attributes:
        waiting: Reports that have arrived and will be staged for the next commit.
        next_commit: The time, on the monotonic clock, before which no commit is made.
    """

    def __init__(
        self,
        tasks: ServedTasks,
        counts: Counts,
        refusals: Refusals,
        leads: Callable[[], bool],
        group: float,
    ) -> None:
        """Count reports for these tasks.

        Args:
            tasks: The tasks of the server.
            counts: Counts the answers.
            refusals: Records why devices took no part.
            leads: Returns whether this process makes models.
            group: The shortest time from the end of a commit to the next one, in seconds, so that under load a commit has many
                reports.
        """
        self._tasks, self._counts, self._refusals = tasks, counts, refusals
        self._leads, self._group = leads, group
        self._staged: dict[tuple[int, str], list[PendingRequest[Item]]] = {}
        self.waiting: list[PendingRequest[Item]] = []
        self.next_commit = 0.0

    def add(self, requests: Iterable[PendingRequest[Item]]) -> None:
        """Queue the reports among these requests for the next commit."""
        self.waiting += [request for request in requests if isinstance(request.item, Reported)]

    def take_all(self, now: float) -> bool:
        """Stage and commit the waiting reports, one run after the other.

        Returns:
            Whether a round has closed.
        """
        taken, closed = self.take_waiting(), False
        for run in self._tasks.runs():
            mine = [
                request
                for request in taken
                if isinstance(request.item, Reported) and request.item.run is run and not request.gone
            ]
            if mine:
                self.stage(run, mine, now)
            if run.coordinator.staged:
                closed |= self.commit(run, now)
                self.next_commit = time.monotonic() + self._group
        return closed

    def stage(self, run: Run, requests: Sequence[PendingRequest[Item]], now: float) -> None:
        """Stage the reports of a run, and answer those that can be answered at once."""
        reports = [request.item.report for request in requests if isinstance(request.item, Reported)]
        for request, report in zip(requests, reports, strict=True):
            self._staged.setdefault((id(run), report.arrived.sessions[0]), []).append(request)
        answers = run.intake.stage_all(reports, now)
        for report, actions in zip(reports, answers, strict=True):
            if not actions:
                unknown = Refused("unknown_session", "the session was never given to this device, or ended long ago")
                self._answer(run, report.arrived.sessions[0], unknown)
            self.say(run, actions, duplicate=True)
            run.carry_out(actions, now)

    def commit(self, run: Run, now: float) -> bool:
        """Commit until no more reports can be counted: reports that did not fit into a full buffer go into the next buffer.

        Returns:
            Whether a round has closed.
        """
        staged, closed = -1, False
        while run.coordinator.staged and len(run.coordinator.staged) != staged:
            staged = len(run.coordinator.staged)
            try:
                actions = run.intake.commit(now)
            except SealError as error:  # the key ring has lost the key of this round
                if not self._leads():
                    raise  # only the key ring of this replica has lost it
                self._give_up(run, error, now)
                return closed
            self._counts.batches += 1
            self.say(run, actions)
            run.carry_out(actions, now)
            closed |= any(isinstance(action, CloseRound) for action in actions)
        run.tick(now)
        return closed

    def end(self, requests: Iterable[PendingRequest[Item]], now: float) -> None:
        """End the sessions of devices that gave up (`Aborted`) or sent an invalid report (`Spoilt`)."""
        for request in requests:
            if isinstance(request.item, Aborted):
                self._abort(request.item, now)
                request.say(Nothing())
            elif isinstance(request.item, Spoilt):
                self._let_go(request.item, now)
                request.say(Nothing())

    def take_waiting(self) -> list[PendingRequest[Item]]:
        """Remove and return the requests whose reports wait to be staged."""
        waiting, self.waiting = self.waiting, []
        return waiting

    def take_staged(self) -> list[PendingRequest[Item]]:
        """Remove and return the requests whose reports are staged but not yet counted."""
        staged, self._staged = self._staged, {}
        return [request for those in staged.values() for request in those]

    def say(self, run: Run, actions: Iterable[Action], duplicate: bool = False) -> None:
        """Answer reports.

        Args:
            run: The run that the reports are for.
            actions: The decided actions.
            duplicate: Whether the accepted reports had already been counted before.
        """
        for action in actions:
            if isinstance(action, AcceptReport):
                self._counts.events["reports", "duplicate" if duplicate else "counted"] += 1
                self._refusals.took_part(run.task, run.kind, action.session.rpartition("/")[0])
                self._answer(run, action.session, Counted(duplicate=duplicate))
            elif isinstance(action, RefuseReport):
                self._counts.events["reports", action.reason] += 1
                code = action.reason if action.reason in ("stale", "phase") else "closed"
                self._answer(run, action.session, Refused(code, action.reason))

    def _answer(self, run: Run, session: str, answer: Any) -> None:
        for request in self._staged.pop((id(run), session), ()):
            self._counts.waited += time.monotonic() - request.since
            request.say(answer)

    def _give_up(self, run: Run, error: Exception, now: float) -> None:
        """End the open rounds of a run whose sums can take no more reports; the waiting reports are not counted."""
        give_up_open_rounds(run, error, now)
        for session in [session for which, session in self._staged if which == id(run)]:
            self._answer(run, session, Refused("closed", "the round of this report was ended without a model"))

    def _abort(self, item: Aborted, now: float) -> None:
        row = item.run.coordinator.session(item.session)
        if row is not None and row.parent == item.parent:
            self._refusals.note(item.run.task, item.run.kind, item.reason, row.device, now)
            self._counts.drop(item.run, [item.session], item.reason, now)

    def _let_go(self, item: Spoilt, now: float) -> None:
        row = item.run.coordinator.session(item.session)
        if row is not None and row.state == "out" and not row.parent:
            self._counts.events["dropped", item.code] += 1
            self._refusals.note(item.run.task, item.run.kind, item.code, row.device, now)
            item.run.carry_out(item.run.coordinator.let_go(item.session, now), now)
