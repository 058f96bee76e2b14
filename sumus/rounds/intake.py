"""Takes reports into a sum: every report goes through the same stages, and each stage is a type (see `rounds/stages.py`).

report = intake.read_report(body, device, session)      bytes → Checked, on any thread
actions = intake.stage_all([report], now)               Checked → StagedReport: it waits in memory, without an acknowledgement
actions = intake.commit(now)                            StagedReport → CommittedReport: the report is in the sum
"""

from collections.abc import Sequence

from sumus.evaluation import check_measured, check_sum_measured
from sumus.first_hop import FirstHop
from sumus.protocol.round import Action, Session, StageReport
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.sealed_sums import SealedSums, WrittenSum
from sumus.rounds.stages import Checked, ClearReport, EdgeSum, SpooledReport, StagedReport
from sumus.storage.store import Rows
from sumus.wire.reports import decode_report, decode_sum


class ReportIntake:
    """The reports of a run on their way into its sums."""

    def __init__(self, coordinator: Coordinator, sums: SealedSums, hop: FirstHop, trains: bool, spools: bool) -> None:
        """Make the intake of a run.

        Args:
            coordinator: The rounds of the run.
            sums: The sums of the rounds.
            hop: Checks reports.
            trains: Whether the reports come from training; otherwise they come from an evaluation.
            spools: Whether each report is sealed and kept separately until its round is over.
        """
        self._coordinator, self._sums, self._hop, self._trains = coordinator, sums, hop, trains
        self._form = SpooledReport if spools else ClearReport
        self._staged: dict[str, StagedReport] = {}

    # ── bytes → Checked, on any thread ───────────────────────────────────────────────────────────────────────────────

    def read_report(self, body: bytes | memoryview, device: str, session: str) -> ClearReport:
        """Read and check the report of a device.

        Args:
            body: The report's bytes; they must not change until the report is counted.
            device: The device, for error messages.
            session: The session of the report.

        Raises:
            ParticipantError: The bytes are not a report for this plan.
        """
        update = decode_report(body, device, self._hop)
        checked = self._hop.check(update)
        check_measured(update, self._trains)
        return self._form(session, checked)

    def read_sum(self, body: bytes | memoryview, edge: str, most: int, least: int | None) -> EdgeSum:
        """Read and check the sum that an edge sent.

        Args:
            body: The sum's bytes.
            edge: The edge.
            most: The most reports that the sum may hold.
            least: The least weight that a site's sum must have if it has more sessions than reports; None for an edge that only
                adds.

        Raises:
            ParticipantError: The bytes are not a sum for this plan.
        """
        sessions, checked = decode_sum(body, edge, self._hop, most, least)
        fewest = len(sessions) if least is None else min(len(sessions), least)
        check_sum_measured(checked.total, self._hop, edge, fewest if self._trains else 0)
        return EdgeSum(sessions, edge, checked)

    # ── Checked → StagedReport → CommittedReport, on the thread that decides ─────────────────────────────────────────

    def stage_all(self, reports: Sequence[Checked], now: float) -> list[tuple[Action, ...]]:
        """Stage reports for the next commit.

        Returns:
            The answers to the sender of each report; no answers for a report with unknown sessions.
        """
        answers = self._coordinator.report_all([report.arrived for report in reports], now)
        for report, actions in zip(reports, answers, strict=True):
            if any(isinstance(action, StageReport) for action in actions):
                # If two reports have the same session, the first one counts.
                self._staged.setdefault(report.arrived.sessions[0], StagedReport(report))
        return answers

    def commit(self, now: float) -> tuple[Action, ...]:
        """Add the staged reports to their sums, and write the reports and the sums, in one transaction.

        If this raises, nothing was acknowledged, and all reports are still staged.
        """
        written: list[WrittenSum] = []
        waiting = list(self._coordinator.staged)

        def add(rows: Rows, counted: Sequence[Session]) -> None:
            staged = ((self._staged.get(session.id), session) for session in counted)
            written.extend(
                self._sums.add(rows, [report.counted_as(session) for report, session in staged if report is not None])
            )

        try:
            actions = self._coordinator.commit(now, add)
        except BaseException:
            self._sums.begin_anew()  # the commit may have succeeded all the same, so the blobs that rows point to stay
            raise
        self._sums.keep(written)
        for session in waiting:
            if session not in self._coordinator.staged:
                self._staged.pop(session, None)
        return actions

    def restart(self) -> None:
        """Forget the staged reports, as in a new process."""
        self._staged.clear()
