"""The tasks that a server serves, each with its runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from sumus.errors import UsageError
from sumus.rounds.run import Run
from sumus.server.evaluation import EvaluationRun
from sumus.server.training import TrainingRun
from sumus.spec import canonical_json, to_json
from sumus.wire.messages import Kind, Released, Served

KINDS: tuple[Kind, ...] = ("train", "evaluate")


@dataclass
class ServedTask:
    """A task of a server, with its runs.

    Attributes:
        name: The task's name on the wire.
        runs: The runs, at most one of each kind.
        fingerprint: The fingerprint of the code that devices need for the task.
        keeps_state: Whether the task needs devices that keep state between rounds.
        priority: The priority: devices get work for tasks of higher priority first.
    """

    name: str
    runs: tuple[Run, ...]
    fingerprint: str
    keeps_state: bool = False
    priority: int = 0

    def run(self, kind: Kind) -> Run | None:
        """Return the run of this kind; None if the task has none."""
        return next((run for run in self.runs if run.kind == kind), None)

    @property
    def training(self) -> TrainingRun:
        """The run in which models are made; an edge has none."""
        found = next((run for run in self.runs if isinstance(run, TrainingRun)), None)
        if found is None:
            raise UsageError("an edge makes no models: send the request to its upstream server")
        return found

    @property
    def evaluation(self) -> EvaluationRun | None:
        """The run in which models are measured; None if the task has no evaluation."""
        return next((run for run in self.runs if isinstance(run, EvaluationRun)), None)

    @property
    def released(self) -> Released | None:
        """The released model, which devices use for predictions; None if there is none."""
        return next((released for run in self.runs if (released := run.released()) is not None), None)


class ServedTasks(Sequence[ServedTask]):
    """The tasks of a server, in the order of their priority, highest first."""

    def __init__(self, tasks: Sequence[ServedTask]) -> None:
        self._tasks = sorted(tasks, key=lambda task: (-task.priority, task.name))

    @overload
    def __getitem__(self, index: int) -> ServedTask: ...
    @overload
    def __getitem__(self, index: slice) -> list[ServedTask]: ...
    def __getitem__(self, index: int | slice) -> ServedTask | list[ServedTask]:
        return self._tasks[index]

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[ServedTask]:
        return iter(self._tasks)

    def put(self, task: ServedTask) -> None:
        """Serve one more task, or another version of a task."""
        self._tasks = [each for each in self._tasks if each.name != task.name] + [task]

    def runs(self) -> list[Run]:
        """Return all training runs, in the order of their tasks, and then all evaluation runs."""
        return [run for kind in KINDS for task in self._tasks if (run := task.run(kind)) is not None]

    def run(self, name: str, kind: Kind) -> Run | None:
        """Return a task's run of this kind; None if it has none."""
        found = next((each for each in self._tasks if each.name == name), None)
        return None if found is None else found.run(kind)

    def of(self, run: Run) -> ServedTask:
        """Return the task to which a run belongs."""
        return next(task for task in self._tasks if run in task.runs)

    def have(self, sha256: str) -> bool:
        """Return whether an object belongs to one of the tasks."""
        return any(sha256 in run.objects for task in self._tasks for run in task.runs)

    def for_edges(self, may: int) -> list[Served]:
        """Describe each run that edges may take part in.

        Args:
            may: The largest number of devices of the edge, and so also the largest number of reports in its sum.
        """
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
            for task in self._tasks
            for run in task.runs
            if run.most_together
        ]
