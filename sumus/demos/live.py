"""Run a demo as a real deployment on this machine: a server, an edge, and a process for each person, over HTTP on the loopback.

    result = play("health", folder, rounds=50, watch=…)

The demo runs the ordinary commands: `sumus pack`, `sumus serve`, `sumus edge`, and for each person `sumus join` with a
file of four lines that gives only that person's examples. Every second person who trains joins through the edge, which
sends the server one sum per round. Server and edge have neither the task's code nor PyTorch. The server ends by itself
after the last round, and the other processes end with it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sumus.demos.people import DemoPeople
from sumus.errors import ExperimentError
from sumus.operations.remote import Remote
from sumus.plotting import figure, save
from sumus.server.access import Logins
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.files import write_whole
from sumus.storage.sql import SqlStore
from sumus.storage.store import Model

LOOK = 0.3
"""Seconds between two requests for the server's status."""
FILE = '''"""The file of one device: the task, which everybody has, and this person's own examples."""

from sumus.demos.{module} import experiment as everybody

experiment = everybody()
examples = {where}[{who!r}]
'''


@dataclass(frozen=True)
class DemoView:
    """The progress of a demo.

    Attributes:
        version: The version of the newest model.
        counted: The number of reports counted in this round.
        goal: The number of reports that this round needs.
        waiting: The condition that the round is waiting for, in words.
        loss: The mean loss of local training; None if it is not known yet.
        measured: The means on people never seen in training, for the model that was measured last.
    """

    version: int
    counted: int
    goal: int
    waiting: str
    loss: float | None
    measured: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """The results of a demo.

    Attributes:
        seconds: The duration of the demo, in seconds.
        models: One row for each model, including the first.
        means: The means on people never seen in training, by metric.
        histograms: By metric, the number of people never seen in training in each bin.
        bytes_up: The number of bytes that the server received.
        bytes_down: The number of bytes that the server sent.
        model: The file with the leaves of the last model.
        history: A file with one line for each model.
        plot: A picture of loss and metrics over the rounds.
        counted: The number of reports counted in all rounds.
    """

    seconds: float
    models: Sequence[Model]
    means: Mapping[str, float]
    histograms: Mapping[str, Sequence[int]]
    bytes_up: int
    bytes_down: int
    model: Path
    history: Path
    plot: Path
    counted: int


def play(
    module: str, people: DemoPeople, folder: Path, rounds: int, every: int, watch: Callable[[DemoView], None]
) -> Outcome:
    """Serve a demo's experiment to its people until it has enough models.

    Args:
        module: The name of the demo's module.
        people: The people who take part.
        folder: The folder for the model, the history and each process's log.
        rounds: The number of models to train.
        every: The number of versions between measurements.
        watch: Called with the progress again and again while the demo runs.
    """
    began = time.monotonic()
    shutil.rmtree(folder / "logs", ignore_errors=True)
    (folder / "logs").mkdir(parents=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sumus-demo-")))
        source = Path(__file__).with_name(f"{module}.py")
        _command(folder, "pack", str(source), "-o", str(scratch / "plan.sumus"))
        server, opened = stack.enter_context(_server(scratch, folder, people, rounds, every))
        behind = behind_edge(people)
        near = stack.enter_context(_edge(scratch, folder, opened["url"], len(behind)))
        links, near_links = _lines(scratch / "link"), _lines(scratch / "edge-link")
        devices = [
            stack.enter_context(
                _device(scratch, folder, module, near, next(near_links), people, who)
                if who in behind
                else _device(scratch, folder, module, opened["url"], next(links), people, who)
            )
            for who in (*people.training, *people.unseen)
        ]
        last = _watched(opened, scratch, server, devices, folder, watch)
        return _outcome(scratch, folder, module, last, time.monotonic() - began)


def behind_edge(people: DemoPeople) -> Sequence[Any]:
    """Return the people who join through the edge."""
    return people.training[1::2]


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _command(folder: Path, *arguments: str) -> None:
    """Run a command of sumus, and wait until it ends."""
    done = subprocess.run([sys.executable, "-m", "sumus", *arguments], capture_output=True, text=True, check=False)
    (folder / "logs" / f"{arguments[0]}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise ExperimentError(f"`sumus {arguments[0]}` failed: {done.stderr.strip().splitlines()[-1]}")


@contextmanager
def _process(log: Path, *arguments: str, output: int | None = None) -> Generator[subprocess.Popen[str], None, None]:
    """Run a command of sumus. The process is ended when the block ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "sumus", *arguments],
            stdout=output or file,
            stderr=file,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only the demo, which then ends its processes
        )
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process: first ask it to stop, then kill it."""
    for how, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            return
        process.send_signal(how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


@contextmanager
def _server(
    scratch: Path, folder: Path, people: DemoPeople, rounds: int, every: int
) -> Generator[tuple[subprocess.Popen[str], Mapping[str, Any]], None, None]:
    """Run the server. Yields the process, and the JSON line that the server prints when it is ready."""
    many = len(people.training) + len(people.unseen)
    arguments = [
        "serve",
        str(scratch / "plan.sumus"),
        "--data",
        str(scratch / "server"),
        "--port",
        "0",
        "--admin-port",
        "0",
    ]
    arguments += ["--tokens", str(many), "--token-file", str(scratch / "link"), "--rounds", str(rounds)]
    arguments += ["--evaluate", str(len(people.unseen)), "--every", str(every), "--json"]
    log = folder / "logs" / "server.log"
    arguments += ["--edges", "1", "--edge-file", str(scratch / "for-edges")]
    with _process(log, *arguments, output=subprocess.PIPE) as process:
        yield process, _said(process, log, "server")


@contextmanager
def _edge(scratch: Path, folder: Path, url: str, many: int) -> Generator[str, None, None]:
    """Run an edge below the server. Yields the edge's address."""
    arguments = ["edge", "--upstream", url, "--link-file", str(scratch / "for-edges"), "--data", str(scratch / "edge")]
    arguments += ["--port", "0", "--admin-port", "0", "--json"]
    arguments += ["--tokens", str(many), "--token-file", str(scratch / "edge-link")]
    log = folder / "logs" / "edge.log"
    with _process(log, *arguments, output=subprocess.PIPE) as process:
        yield _said(process, log, "edge")["url"]


def _lines(file: Path) -> Iterator[str]:
    """Return an iterator over the lines of a file, so that each is used once."""
    return iter(file.read_text().splitlines())


def _said(process: subprocess.Popen[str], log: Path, what: str) -> Mapping[str, Any]:
    """Return the JSON line that a process prints when it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ExperimentError(f"the {what} did not start: {_last_line(log)}")
    return json.loads(line)


@contextmanager
def _device(
    scratch: Path, folder: Path, module: str, url: str, link: str, people: DemoPeople, who: Any
) -> Generator[subprocess.Popen[str], None, None]:
    """Run a person's device.

    Args:
        link: The enrolment link of the server or the edge, for this device alone.
    """
    unseen = who in people.unseen
    where = "experiment.evaluate.unseen" if unseen else "experiment.population"
    file, of_link = scratch / f"person_{who}.py", scratch / f"link-{who}"
    file.write_text(FILE.format(module=module, where=where, who=who))
    write_whole(of_link, link.encode(), private=True)
    arguments = [
        "join",
        url,
        "--client",
        str(file),
        "--folder",
        str(scratch / f"device-{who}"),
        "--name",
        f"person {who}",
    ]
    arguments += [
        "--token-file",
        str(of_link),
        "--always",
        "--json",
        "--floor",
        f"contributors={people.least}",
    ]
    arguments += ["--floor", "rounds=1000000", *(["--evaluate-only"] if unseen else ["--train-only"])]
    with _process(folder / "logs" / f"person-{who}.log", *arguments) as process:
        yield process


def _watched(
    opened: Mapping[str, Any],
    scratch: Path,
    server: subprocess.Popen[str],
    devices: Sequence[subprocess.Popen[str]],
    folder: Path,
    watch: Callable[[DemoView], None],
) -> Mapping[str, Any]:
    """Request the server's status again and again until the server ends. Return the last status."""
    remote = Remote(opened["admin_url"], Logins(scratch / "admin"))
    remote.log_in(opened["login"])
    status: Mapping[str, Any] = {}
    while server.poll() is None:
        with suppress(ExperimentError):  # the server may have ended just now
            status = remote.ask("GET", "/v1/admin/status")
            watch(_look(status["tasks"][0]))
        for device in devices:
            if device.poll() not in (None, 0):
                log = min(folder.glob("logs/person-*.log"), key=lambda path: -path.stat().st_mtime)
                raise ExperimentError(f"a device ended: {_last_line(log)}; see {folder / 'logs'}")
        with suppress(subprocess.TimeoutExpired):
            server.wait(LOOK)
    if server.returncode:
        raise ExperimentError(f"the server ended: {_last_line(folder / 'logs' / 'server.log')}")
    return status


def _look(task: Mapping[str, Any]) -> DemoView:
    run, measured = task["runs"][0], task["evaluated"] or {}
    return DemoView(
        task["version"],
        run["counted"],
        run["goal"],
        run["waiting"],
        task["model"]["train"].get("loss"),
        measured.get("evaluate", {}).get("means", {}),
    )


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _outcome(scratch: Path, folder: Path, module: str, status: Mapping[str, Any], seconds: float) -> Outcome:
    """Read the folder of the server, which has ended, and save the results."""
    task = status["tasks"][0]["name"]
    store = SqlStore.open(scratch / "server" / "sumus.db", f"{task}.train")
    with store.transaction() as rows:
        models = list(rows.models())
    store.close()
    last = models[-1]
    weights, history = folder / "model.safetensors", folder / "history.jsonl"
    weights.write_bytes(DirectoryBlobs(scratch / "server" / "blobs").get(last.model))
    lines = [
        {"version": m.version, "contributors": m.contributors, "at": m.at, **json.loads(m.metrics)} for m in models
    ]
    history.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    measured = next((line["evaluate"] for line in reversed(lines) if "evaluate" in line), {})
    return Outcome(
        seconds,
        models,
        measured.get("means", {}),
        measured.get("histograms", {}),
        status["bytes_in"],
        status["bytes_out"],
        weights,
        history,
        _plotted(lines, folder / "plot.png"),
        sum(model.contributors for model in models),
    )


def _plotted(models: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the loss of local training, and the accuracy of people never seen in training."""
    picture = figure(7.0, 4.0)
    axis = picture.subplots()
    for kind, name, label in (
        ("train", "loss", "loss of local training"),
        ("evaluate", "accuracy", "accuracy, never seen"),
    ):
        found = [(model["version"], model[kind]) for model in models if model.get(kind)]
        points = [(version, each.get("means", each).get(name)) for version, each in found]
        axis.plot(
            [v for v, y in points if y is not None], [y for _, y in points if y is not None], marker=".", label=label
        )
    axis.set(xlabel="round", ylim=(0, None))
    axis.legend(frameon=False)
    return save(picture, path)
