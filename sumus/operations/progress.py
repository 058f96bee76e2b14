"""The output of a running server: how to connect to it, and a line for each new model."""

import json
import queue
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sumus.errors import ExperimentError
from sumus.logs import logger
from sumus.server.access import CODE_S
from sumus.server.evaluation import EvaluationRun
from sumus.server.identity import TOKEN_S
from sumus.server.membership import DAY
from sumus.server.server import Server
from sumus.server.training import TrainingRun
from sumus.storage.store import Model
from sumus.text import many

LOG = logger("sumus.serve")
ENOUGH = "it has the requested number of models"


@dataclass(frozen=True)
class ServerOpened:
    """The addresses and links of a server that has opened.

    Attributes:
        url: The address for devices.
        mode: A description of the updates that the server can see.
        admin_url: The address for the operator.
        login: A link with which the operator can log in once.
        enrolment: Links for devices, one per line; None if none were requested, or if they were written to a file.
        pin: The SHA-256 of the certificate that devices pin; empty if they pin none.
        tasks: The ids of plans, by task.
        notes: Notes for the operator.
    """

    url: str
    mode: str
    admin_url: str
    login: str
    enrolment: str | None
    pin: str
    tasks: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def shown(self) -> list[str]:
        """Return the lines that the operator sees when the server starts."""
        lines = [f"sumus serves {many(len(self.tasks), 'task')} at {self.url}; {self.mode}"]
        lines += [f"  task     {name}: plan {id}" for name, id in self.tasks.items()]
        lines.append(
            f"  admin    {self.login}   (works once, for {CODE_S / 60:.0f} minutes; `sumus admin link` makes another)"
        )
        if self.enrolment is not None:
            first, *others = self.enrolment.split("\n")
            lines.append(f"  devices  {first}   (valid for {many(round(TOKEN_S / DAY), 'day')})")
            lines += [f"           {other}" for other in others]
        lines += [f"  note     {note}" for note in self.notes]
        return lines


class ServerProgress:
    """Prints a line for each new model, and ends the server once there are enough models. Its methods run on the deciding thread.

    Args:
        server: The server.
        say: Called with each line.
        rounds: The number of models after which a task only measures its models; None for no end.
        end: Ends the server.
    """

    def __init__(self, server: Server, say: Callable[[str], None], rounds: int | None, end: Callable[[], None]) -> None:
        self._server, self._say, self._rounds, self._end = server, say, rounds, end
        self._makers = [task for task in server.tasks if isinstance(task.runs[0], TrainingRun)]
        self._versions = {task.name: task.training.version for task in self._makers}
        self._measured = {task.name: task.evaluation.measured for task in self._makers if task.evaluation is not None}
        self._troubles: dict[tuple[str, str], str] = {}

    def look(self) -> None:
        """Report new models, and end the server if each task has enough models."""
        for task in self._makers:
            for version in range(self._versions[task.name] + 1, task.training.version + 1):
                self._say(_model_line(task.name, task.training.model(version), task.training))
            self._versions[task.name] = task.training.version
            if task.evaluation is not None and task.evaluation.measured > self._measured[task.name]:
                self._measured[task.name] = task.evaluation.measured
                self._say(_measured_line(task.name, task.training.model(task.evaluation.measured)))
        for task in self._server.tasks:
            for each in task.runs:
                if each.trouble != self._troubles.get((task.name, each.kind), ""):
                    self._troubles[task.name, each.kind] = each.trouble
                    if each.trouble not in ("", ENOUGH):
                        LOG.warning("%s is paused: %s", each.task, each.trouble)
        done = [self._done(task.training, task.evaluation) for task in self._makers]
        if done and all(done):
            self._end()

    def _done(self, training: TrainingRun, evaluation: EvaluationRun | None) -> bool:
        if self._rounds is None or training.version < self._rounds:
            return False
        training.pause(training.trouble or ENOUGH, lasting=False)
        return evaluation is None or not evaluation.wanted()


def _model_line(task: str, model: Model, training: TrainingRun) -> str:
    if model.round is None or model.parent is None:
        return f"{task}  version {model.version}, made from version {model.parent}"
    with suppress(ExperimentError):
        seconds = model.at - training.model(model.parent).at
        loss = json.loads(model.metrics)["train"].get("loss")
        told = "" if loss is None else f"  loss {loss:.4f}"
        return f"{task}  version {model.version}  {many(model.contributors, 'device')}{told}  {seconds:.1f} s"
    return f"{task}  version {model.version}"


def _measured_line(task: str, model: Model) -> str:
    measured = json.loads(model.metrics)["evaluate"]
    means = "  ".join(f"{name} {value:.4f}" for name, value in measured["means"].items())
    return f"{task}  version {model.version} measured on {many(measured['devices'], 'device')}  {means}"


@contextmanager
def spoken(say: Callable[[str], None] | None) -> Generator[Callable[[str], None], None, None]:
    """Print lines in a separate thread: a terminal that is paused must not block anything else."""
    if say is None:
        yield lambda line: None
        return
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def speak() -> None:
        while (line := lines.get()) is not None:
            with suppress(OSError, ValueError):
                say(line)

    thread = threading.Thread(target=speak, name="voice", daemon=True)
    thread.start()
    try:
        yield lines.put
    finally:
        lines.put(None)
        thread.join(1.0)
