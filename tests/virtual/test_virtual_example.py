"""The four points learn the same in one process and at two workers of other processes, in every bit."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.virtual.owned import TOKEN, owners

FILE = Path(__file__).parents[2] / "examples" / "virtual_workers.py"


def test_it_learns_the_same_here_and_at_two_other_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUMUS_WORKER_TOKEN", TOKEN)
    main = runpy.run_path(str(FILE))["main"]
    with owners(f"{FILE}:alice", f"{FILE}:bob") as ((alice, _), (bob, _)):
        main([alice, bob])
    elsewhere = capsys.readouterr().out
    main([])
    assert capsys.readouterr().out == elsewhere
    assert re.match(r"at alice and bob; model [0-9a-f]{64}\n", elsewhere)
    answers = [float(number) for number in re.findall(r"-?\d\.\d+", elsewhere.splitlines()[1])]
    assert [round(answer) for answer in answers] == [0, 0, 1, 1]


def test_it_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, str(FILE)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "which should be [0, 0, 1, 1]" in done.stdout
