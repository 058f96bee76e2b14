"""The records of rounds: their counts, measurements and costs."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sumus.metrics import Spread


@dataclass(frozen=True)
class RoundEvaluation:
    """The measurements after a round; empty if the round was not evaluated.

    Attributes:
        metrics: The headline metrics by name. They are from the first source that `Evaluation` requests (central, unseen, seen,
            in this order). If it requests none, the only metric is the loss of local training.
        by_source: The metrics of all sources, by source and name.
        spreads: The spread of each metric over clients, by source and name.
    """

    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    by_source: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    spreads: Mapping[str, Mapping[str, Spread]] = field(default_factory=dict[str, Mapping[str, Spread]])


@dataclass(frozen=True)
class RoundTraffic:
    """The bytes of a round.

    Attributes:
        up: Bytes of the reports of all clients together.
        down: Bytes sent to all clients together.
        above: Bytes of the sums (only of their leaves) that edges send to the server; 0 if there are no edges.
    """

    up: int = 0
    down: int = 0
    above: int = 0


@dataclass(frozen=True)
class ReportCounts:
    """The reports of a round that were late or not counted, with the reasons.

    Attributes:
        dropped: The number of clients that were given work and whose reports were not counted.
        staleness: The number of counted reports by staleness (the number of model versions by which a report was late).
        reasons: The number of sessions that ended during the round without being counted, by reason. Sessions that began in
            earlier rounds are included.
        failed: The clients that were left out because they failed (`failures="skip"`), each with the reason.
    """

    dropped: int = 0
    staleness: Mapping[int, int] = field(default_factory=dict[int, int])
    reasons: Mapping[str, int] = field(default_factory=dict[str, int])
    failed: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class RoundRecord:
    """The record of one round.

    Attributes:
        round: The round's number, counted from 1; 0 for the measurement before the first round.
        clients: The number of clients whose reports were counted.
        examples: The number of examples that these clients hold.
        loss: The loss of local training, averaged over these examples; NaN if no report was counted.
        evaluation: The measurements after the round.
        traffic: The bytes of the round.
        reports: The reports that were late or not counted.
        seconds: The round's wall time.
        at: The end of the round, in simulated seconds.
        epsilon: The privacy loss ε so far; None without differential privacy.
    """

    round: int
    clients: int
    examples: int
    loss: float
    evaluation: RoundEvaluation = RoundEvaluation()
    traffic: RoundTraffic = RoundTraffic()
    reports: ReportCounts = ReportCounts()
    seconds: float = 0.0
    at: float = 0.0
    epsilon: float | None = None

    @property
    def metrics(self) -> Mapping[str, float]:
        """The headline metrics by name (`RoundEvaluation.metrics`)."""
        return self.evaluation.metrics

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON with one level of names: a line of `history.jsonl`."""
        evaluation, traffic, reports = self.evaluation, self.traffic, self.reports
        return {
            "round": self.round,
            "clients": self.clients,
            "examples": self.examples,
            "loss": self.loss,
            "metrics": dict(evaluation.metrics),
            "bytes_up": traffic.up,
            "bytes_down": traffic.down,
            "seconds": self.seconds,
            "dropped": reports.dropped,
            "bytes_above": traffic.above,
            "epsilon": self.epsilon,
            "at": self.at,
            "staleness": dict(reports.staleness),
            "reasons": dict(reports.reasons),
            "evaluations": {source: dict(figures) for source, figures in evaluation.by_source.items()},
            "spreads": {
                source: {name: spread.to_json() for name, spread in spreads.items()}
                for source, spreads in evaluation.spreads.items()
            },
            "failed": dict(reports.failed),
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "RoundRecord":
        """Create a record from its JSON: the inverse of `to_json`, except that the keys of clients stay text.

        `Evaluator.with_keys` restores the keys.
        """
        spreads: dict[str, Any] = {
            source: {name: Spread(**spread) for name, spread in by_metric.items()}
            for source, by_metric in fields["spreads"].items()
        }
        staleness = {int(late): count for late, count in fields["staleness"].items()}
        return RoundRecord(
            round=fields["round"],
            clients=fields["clients"],
            examples=fields["examples"],
            loss=fields["loss"],
            evaluation=RoundEvaluation(fields["metrics"], fields["evaluations"], spreads),
            traffic=RoundTraffic(fields["bytes_up"], fields["bytes_down"], fields["bytes_above"]),
            reports=ReportCounts(fields["dropped"], staleness, fields["reasons"], fields["failed"]),
            seconds=fields["seconds"],
            at=fields["at"],
            epsilon=fields["epsilon"],
        )


def measured_columns(record: RoundRecord) -> dict[str, float]:
    """Return a round's measurements by column: `metric`, `source/metric`, `source/metric/median`,
    `source/metric/worst_decile`.
    """
    measured = record.evaluation
    columns = {name: value for name, value in measured.metrics.items() if name != "loss"}
    columns |= {f"{s}/{name}": value for s, found in measured.by_source.items() for name, value in found.items()}
    for source, spreads in measured.spreads.items():
        for name, spread in spreads.items():
            columns[f"{source}/{name}/median"] = spread.median
            columns[f"{source}/{name}/worst_decile"] = spread.worst_decile
    return columns


def figures_of(record: RoundRecord) -> dict[str, float]:
    """Return every number of a round that a tracker plots, by name; NaN and infinite numbers are left out.

    A spread is named `source/metric.median`, unlike its column `source/metric/median`: some trackers store names with
    slashes as files in folders, and `source/metric` is already a file.
    """
    fields = record.to_json()
    plotted = ("loss", "clients", "dropped", "examples", "seconds", "at", "bytes_up", "bytes_down")
    own = {name: float(fields[name]) for name in plotted}
    for column, value in measured_columns(record).items():
        source, _, rest = column.partition("/")
        own[f"{source}/{rest.replace('/', '.')}" if rest else source] = value
    return {name: value for name, value in own.items() if math.isfinite(value)}


@dataclass
class RoundTally:
    """The totals of a round that are not part of its sum.

    Attributes:
        clients: The number of reports in the sum.
        examples: The number of examples of their clients.
        loss: The sum of the loss of local training, over the examples seen.
        seen: The number of examples that this loss is summed over.
        staleness: The number of reports by staleness, in model versions.
    """

    clients: int = 0
    examples: int = 0
    loss: float = 0.0
    seen: int = 0
    staleness: dict[int, int] = field(default_factory=dict[int, int])

    def count(self, examples: int, loss: tuple[float, int], late: int) -> None:
        """Count a report that is in the sum."""
        self.clients += 1
        self.examples += examples
        self.loss += loss[0]
        self.seen += loss[1]
        self.staleness[late] = self.staleness.get(late, 0) + 1

    def add(self, other: "RoundTally") -> None:
        """Add the counts of another tally."""
        self.clients += other.clients
        self.examples += other.examples
        self.loss += other.loss
        self.seen += other.seen
        for late, count in other.staleness.items():
            self.staleness[late] = self.staleness.get(late, 0) + count

    def copy(self) -> "RoundTally":
        """Copy the tally."""
        return dataclasses.replace(self, staleness=dict(self.staleness))

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "RoundTally":
        """Create a tally from its JSON fields."""
        plain: dict[str, Any] = {
            **fields,
            "staleness": {int(late): count for late, count in fields["staleness"].items()},
        }
        return RoundTally(**plain)
