"""The campaign: atheris drives the targets, one after another, and the result of each is reported."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environments import KEPT

ROOT = Path(__file__).parents[2]
FOLDER = KEPT / "fuzz"
"""The folder of what campaigns find, with a folder for each target: the next campaign begins with it."""


@dataclass(frozen=True)
class Outcome:
    """The result of driving one target.

    Attributes:
        name: The target's name.
        executions: The number of inputs that were tried.
        seconds: The time that atheris took.
        found: The number of inputs in the campaign's folder, each of which reaches a branch that no other one does.
        finding: The input that failed; None if none did.
        said: The end of the traceback of a finding.
    """

    name: str
    executions: int
    seconds: float
    found: int
    finding: Path | None
    said: str


def run(name: str, seconds: int, seed: int = 0) -> Outcome:
    """Drive a target for this many seconds, or until its first finding."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "benchmarks.fuzz.driven",
        name,
        str(folder),
        str(seconds),
        str(seed),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    said = done.stdout + done.stderr
    executions = re.findall(r"number_of_executed_units: (\d+)", said)
    took = re.findall(r"Done \d+ (?:runs )?in (\d+) second", said)
    failed = sorted(path for path in set(folder.iterdir()) - before if re.match("(crash|timeout|oom|leak)-", path.name))
    if done.returncode and not failed:
        raise SystemExit(f"{name}: atheris ended with {done.returncode}:\n{said[-2000:]}")
    return Outcome(
        name,
        int(executions[-1]) if executions else _last_count(said),
        float(took[-1]) if took else 0.0,
        len(list((folder / "found").iterdir())),
        failed[0] if failed else None,
        done.stdout[-4000:],
    )


def _last_count(said: str) -> int:
    """Return how many inputs atheris had tried, from the last of its lines of progress."""
    counts = re.findall(r"^#(\d+)\t", said, re.M)
    return int(counts[-1]) if counts else 0
