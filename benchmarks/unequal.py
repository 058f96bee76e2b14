"""Devices of unequal speed over HTTP: synchronous rounds, which wait for the slowest, compared with buffers, which do
not.

python -m benchmarks.unequal [--write]

There is one server process, and one process with twenty devices in threads, each with a connection of its own. The
slowest device takes ten times as long as the fastest. Seconds are wall time, until a device that only watches reaches
the target accuracy with the models that it gets.
"""

import argparse
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import sumus
from benchmarks import digits
from benchmarks.results import write_table
from sumus.device.conditions import AllConditionsMet
from sumus.device.options import DeviceSystem
from sumus.device.training import Training
from sumus.operations.remote import Remote
from sumus.server.access import Logins
from sumus.training.program import Program

DEVICES, SPREAD, TARGET = 20, 10.0, 0.9
FLOOR = sumus.Floor(contributors=2, rounds=10**6)
CLIENT = sumus.sgd(lr=0.1, epochs=2, batch_size=10)
CLIP = sumus.clip_by_global_norm(5.0)
"""Longer than nearly all updates of this task."""
PLANS = {
    "synchronous, all 20": (sumus.fedavg(CLIENT, CLIP, weight="uniform"), sumus.Pacing(20, deadline=120.0)),
    "buffers of 5": (sumus.fedbuff(CLIENT, CLIP), sumus.Pacing(5, concurrency=20, deadline=120.0)),
}


@dataclass(frozen=True)
class Ran:
    """One way to the target.

    Attributes:
        seconds: The seconds; infinite if the target was not reached.
        accuracy: The accuracy at the end.
        models: The number of models.
        reports: The number of reports.
        staleness: The staleness of the last model, as the status shows it.
    """

    seconds: float
    accuracy: float
    models: int
    reports: int
    staleness: dict[str, int]


def ran(name: str, slowest: float, limit: float, target: float = TARGET, say: Callable[[str], None] = print) -> Ran:
    """Serve a plan until the target. slowest: seconds of the slowest device's round. limit: seconds after which it
    ends."""
    algorithm, pacing = PLANS[name]
    people, (images, labels) = digits.people("dirichlet", 0), digits.images()
    task = sumus.Task(digits.DigitNet, sumus.losses.cross_entropy, name="digits")
    training = Training(task, people[0], "autograd")
    program = Program(task)
    data = program.learn_schema(0, *program.reader.read(people, 0))
    plan = sumus.Plan(task, algorithm, pacing, 2, trusts_devices=False).with_data(data)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sumus-unequal-")))
        (folder / "plan.sumus").write_bytes(sumus.Bundle(plan, program.initial).to_bytes())
        opened = _serve(folder, stack)
        *links, last = (folder / "link").read_text().splitlines()
        speeds = slowest * SPREAD ** (np.arange(DEVICES) / (DEVICES - 1) - 1.0)
        stop = threading.Event()
        devices = [
            _device(link, training, people[number], number, seconds)
            for number, (link, seconds) in enumerate(zip(links, speeds.tolist(), strict=True))
        ]
        for device in devices:
            device.enrol()
        threads = [threading.Thread(target=_run, args=(device, stop)) for device in devices]
        clock = itertools.count(0, 10**6).__next__  # every wait of the device is over at once
        viewer = sumus.Device(
            last,
            training,
            people[0],
            consent=sumus.Consent(FLOOR, trains=False, evaluates=False),
            connection=sumus.ServerConnection(wait_s=0.0),
            profile=sumus.DeviceProfile("viewer", system=DeviceSystem(clock=clock)),
        )
        viewer.enrol()
        remote = Remote(opened["admin_url"], Logins(folder / "admin"))
        remote.log_in(opened["login"])
        began, accuracy = time.monotonic(), 0.0
        for thread in threads:
            thread.start()
        while accuracy < target and time.monotonic() - began < limit:
            time.sleep(0.2)
            accuracy = _accuracy(viewer, images[:360], labels[:360])
        seconds = time.monotonic() - began
        status = remote.ask("GET", "/v1/admin/status")
        stop.set()
        for device in devices:
            device.stop()
        for thread in threads:
            thread.join()
        for device in (*devices, viewer):
            device.close()
    of_task, events = status["tasks"][0], status["events"]
    found = Ran(
        seconds if accuracy >= target else float("inf"),
        accuracy,
        of_task["version"],
        events["reports"]["counted"],
        of_task["model"]["staleness"],
    )
    say(f"{name}: {found}")
    return found


def _serve(folder: Path, stack: ExitStack) -> dict[str, Any]:
    arguments = [
        "serve",
        str(folder / "plan.sumus"),
        "--data",
        str(folder / "data"),
        "--port",
        "0",
        "--admin-port",
        "0",
    ]
    arguments += ["--tokens", str(DEVICES + 1), "--token-file", str(folder / "link"), "--json"]
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-m", "sumus", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    )
    stack.callback(process.send_signal, signal.SIGTERM)
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def _device(link: str, training: Training, examples: Any, number: int, seconds: float) -> sumus.Device:
    """Return a device with its own speed: reading its examples, which it does in each round, takes time."""

    def slowly() -> Any:
        time.sleep(seconds)
        return examples

    return sumus.Device(
        link,
        training,
        slowly,
        consent=sumus.Consent(FLOOR, evaluates=False, keeps_model=False),
        profile=sumus.DeviceProfile(number, sensors=AllConditionsMet()),
    )


def _run(device: sumus.Device, stop: threading.Event) -> None:
    device.run(until=lambda status: stop.is_set())


def _accuracy(viewer: sumus.Device, images: np.ndarray, labels: np.ndarray) -> float:
    viewer.wake()
    return float((viewer.predict(images).argmax(1) == labels).mean())


def _rows(figures: dict[str, Sequence[Ran]]) -> list[list[str]]:
    first = float(np.median([run.seconds for run in next(iter(figures.values()))]))
    rows = list[list[str]]()
    for name, runs in figures.items():
        median = float(np.median([run.seconds for run in runs]))
        last = runs[-1]
        stale = ", ".join(f"{count} by {late}" for late, count in last.staleness.items())
        rows.append([name, f"{median / first:.2f}", f"{median:.0f}", str(last.models), str(last.reports), stale])
    return rows


def main() -> None:
    """Measure both ways by turns, three times each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the table in docs/results.md")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--slowest", type=float, default=4.0, help="seconds of the slowest device's round")
    args = parser.parse_args()
    figures: dict[str, list[Ran]] = {name: [] for name in PLANS}
    for _ in range(args.times):
        for name in PLANS:
            figures[name].append(ran(name, args.slowest, 600.0))
    caption = (
        f"`python -m benchmarks.unequal`: {DEVICES} devices over HTTP, the slowest {args.slowest:g} s a round and the fastest a "
        f"tenth of it; digits, Dirichlet 0.5; to {TARGET:.0%} accuracy on 360 images that nobody holds; median of {args.times}."
    )
    header = [
        "way",
        "time, of synchronous",
        "seconds",
        "models",
        "reports counted",
        "staleness of the last model, as status shows it",
    ]
    write_table("unequal", caption, header, _rows(figures), args.write)


if __name__ == "__main__":
    main()
