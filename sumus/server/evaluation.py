"""A task's evaluation run on a server: devices measure a model of the training run. Its rounds are like those of training."""

import json
from dataclasses import dataclass

from sumus.errors import ExperimentError
from sumus.evaluation import evaluation_hop, evaluation_of, medians_of
from sumus.pacing import Pacing
from sumus.protocol.round import Session
from sumus.rounds.run import Run, pacing_on_server
from sumus.rounds.seeds import Seeds, any_seed, noted
from sumus.server.training import TrainingRun, assignment_of, check_enough
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing
from sumus.storage.store import OF_THE_RUN, Rows, Store
from sumus.wire.messages import Assignment, Kind


@dataclass(frozen=True)
class Evaluating:
    """The settings of an evaluation on devices.

    Attributes:
        cohort: The number of devices that measure a model.
        every: Which versions are measured: 1 for each version, 2 for every second version, and so on.
        deadline: The duration of a round, in seconds.
    """

    cohort: int
    every: int = 1
    deadline: float = 600.0


class EvaluationRun(Run):
    """A run in which devices measure a model of the training run; a round's sum becomes that version's metrics.

    Attributes:
        training: The training run.
        measured: The version that was measured last; −1 if no version was measured.
    """

    kind: Kind = "evaluate"

    def __init__(
        self, training: TrainingRun, how: Evaluating, store: Store, ring: KeyRing, sums: Blobs, seeds: Seeds = any_seed
    ) -> None:
        least = training.least
        if how.cohort < least:
            raise ExperimentError(
                f"{how.cohort} devices would measure a model of {training.task}, but its plan publishes only metrics of at least "
                f"{least} devices (min_contributors): use a larger cohort"
            )
        pacing = pacing_on_server(Pacing(how.cohort, deadline=how.deadline), least)
        plan = training.plan
        hop = evaluation_hop(plan.description, how.cohort, plan.metric_cap)
        super().__init__(training.task, pacing, hop, store, ring, sums, seeds, least, training.crowd)
        self.training, self._how = training, how
        self.plan_body, self.most_together = training.plan_body, pacing.chosen
        self.measured = -1
        self._asked: tuple[int, int] | None = None

    def recover(self, now: float, fence: int | None) -> None:
        self._read_measured()
        self._asked = None
        super().recover(now, fence)

    def look(self) -> None:
        super().look()
        self._read_measured()

    def _ended_what_was_open(self, now: float) -> bool:
        plan = self.training.plan.id.encode()
        with self.store.transaction() as rows:
            before = rows.note(OF_THE_RUN, "plan")
        if before == plan:
            return False
        self.end_all(now)  # the open round may have other metrics
        with self.coordinator.leading() as rows:
            rows.put_note(OF_THE_RUN, "plan", plan)
        return True

    def _read_measured(self) -> None:
        with self.store.transaction() as rows:
            self.measured = _measured(rows)

    def wanted(self) -> bool:
        """Return whether the newest model that should be measured has not been measured yet.

        A model that was measured under another version number counts as measured.

        Two sums over the same model would reveal the measurements of the devices that are in only one of them.
        """
        newest = self._newest()
        return newest > self.measured and "evaluate" not in json.loads(self.training.model(newest).metrics)

    def offer(self, session: Session, now: float) -> Assignment:
        version = self._version(session.round)
        broadcast = self.training.body(self.training.model(version).broadcast)
        return assignment_of(self, session, version, self.training.plan_body, broadcast, now)

    def conclude(self, number: int, now: float) -> None:
        version, total = self._version(number), self.sums.total(number)
        check_enough(total, self.least)
        means, histograms = evaluation_of(total, self.hop)
        enough = [name for name, bins in histograms.items() if sum(bins) >= self.least]  # a device may omit a metric
        means = {name: means[name] for name in enough if name in means}
        histograms = {name: histograms[name] for name in enough}
        measured = {
            "means": means,
            "medians": medians_of(histograms, self.hop),
            "histograms": histograms,
            "devices": int(total.count),
        }
        self.training.note_evaluation(version, measured)
        note = str(version).encode()
        self._publish(number, now, lambda rows: rows.put_note(OF_THE_RUN, "measured", note))
        self.measured = version

    def _version(self, number: int) -> int:
        """Return the version that a round measures: the one that was the newest when the round's first device got work."""
        if self._asked is None or self._asked[0] != number:
            with self.coordinator.transaction() as rows:
                newest = self._newest()
                if rows.note(number, "model") is None and newest <= _measured(rows):
                    raise ExperimentError(
                        f"version {newest} of {self.task} has already been measured by devices of another server"
                    )
                version = int(noted(rows, number, "model", lambda: str(newest).encode()))
            self._asked = number, version
        return self._asked[1]

    def _newest(self) -> int:
        newest = self.training.version
        return newest - newest % self._how.every


def _measured(rows: Rows) -> int:
    return int(rows.note(OF_THE_RUN, "measured") or -1)
