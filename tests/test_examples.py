"""Every example runs as a program, and as an experiment, and does what it says."""

import json
import re
from pathlib import Path

import pytest

from tests import forked

FOLDER = Path(__file__).parents[1] / "examples"
ELSEWHERE = "virtual_workers.py"
"""No experiment; tests/virtual/test_virtual_example.py runs it."""
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py") if path.name != ELSEWHERE)

EXPECTED = {
    "four_points.py": ("accuracy", 1.0),
    "health_monitor.py": ("accuracy", 0.95),
    "heterogeneous.py": ("accuracy", 0.9),
    "keyboard_suggestion.py": ("top3", 0.9),
    "preparation.py": ("accuracy", 0.85),
}


def run(program: str | Path, *words: str, cwd: Path) -> str:
    done = forked.run(program, words, cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_list_of_examples_is_whole() -> None:
    assert set(EXAMPLES) == {*EXPECTED, "linear_regression.py"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_as_an_experiment_and_learns(name: str, tmp_path: Path) -> None:
    result = json.loads(run("sumus", "simulate", str(FOLDER / name), "--json", cwd=tmp_path).splitlines()[-1])
    if name == "linear_regression.py":
        assert result["metrics"]["absolute_error"] < 0.05
    else:
        metric, least = EXPECTED[name]
        assert result["metrics"][metric] >= least


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_as_a_program_and_predicts_on_the_device(name: str, tmp_path: Path) -> None:
    assert re.search(r"\d", run(FOLDER / name, "pictures", cwd=tmp_path))
    assert (tmp_path / "pictures" / "people.png").exists() == (name == "heterogeneous.py")


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_passes_its_own_check(name: str, tmp_path: Path) -> None:
    assert "simulator" in run("sumus", "check", str(FOLDER / name), cwd=tmp_path)
