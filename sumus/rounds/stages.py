"""The stages of a report on its way into a sum: bytes → Checked → StagedReport → CommittedReport.

A checked report is a value of one of three kinds: a device's update (`ClearReport`), an update that is kept separately until
its round is over (`SpooledReport`), and the sum of an edge (`EdgeSum`). Only the first hop (`sumus/first_hop.py`) makes the
contents of these values, after it has checked them. So the deciding thread does not validate them again.

A masked cohort of secure aggregation will be a fourth kind: a value with the sessions of the cohort and their sum. The sum is
counted completely or not at all, like the sum of an edge. The function that reads it will be next to `ReportIntake.read_sum`.
"""

from dataclasses import dataclass
from typing import TypeAlias

from sumus.first_hop import CheckedSum, CheckedUpdate
from sumus.protocol.round import Session
from sumus.rounds.coordinator import Arrived


@dataclass(frozen=True, slots=True)
class ClearReport:
    """A device's update, which is added to a sum.

    Attributes:
        session: The session of the update.
        content: The update.
    """

    session: str
    content: CheckedUpdate

    @property
    def arrived(self) -> Arrived:
        """The report in the form that the coordinator needs."""
        return Arrived((self.session,))


@dataclass(frozen=True, slots=True)
class SpooledReport(ClearReport):
    """A device's update that is sealed separately until its round is over, for aggregators that need each update."""


@dataclass(frozen=True, slots=True)
class EdgeSum:
    """The sum of an edge's reports, which is counted completely or not at all.

    Attributes:
        sessions: The sessions of the reports.
        edge: The edge.
        content: The sum.
    """

    sessions: tuple[str, ...]
    edge: str
    content: CheckedSum

    @property
    def arrived(self) -> Arrived:
        """The sum in the form that the coordinator needs."""
        return Arrived(self.sessions, self.edge)


Checked: TypeAlias = ClearReport | SpooledReport | EdgeSum


@dataclass(frozen=True, slots=True)
class StagedReport:
    """A checked report that the coordinator has staged: it waits in memory for the next commit."""

    report: Checked

    def counted_as(self, session: Session) -> "CommittedReport":
        """Return the report as a commit counts it. `session` is the new row of the report's first session."""
        assert session.sum is not None, "a counted session has the number of its sum"
        apart = session.id if isinstance(self.report, SpooledReport) else ""
        return CommittedReport(self.report.content, session.sum, session.staleness, apart)


@dataclass(frozen=True, slots=True)
class CommittedReport:
    """A report that is counted, within the transaction that counts it.

    Attributes:
        content: The content that is added to the sum.
        sum: The number of the round whose sum takes the report.
        staleness: The number of versions by which the report's model was out of date.
        apart: The name under which the report is kept separately; empty if it is added to the sum of its round.
    """

    content: CheckedUpdate | CheckedSum
    sum: int
    staleness: int
    apart: str
