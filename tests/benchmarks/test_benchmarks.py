"""The benchmarks run, in short; what they claim of memory holds. Times are printed there, and asserted nowhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cost, data, results

ROOT = Path(__file__).parents[2]


def test_the_memory_of_a_round_does_not_grow_with_its_cohort() -> None:
    few, many = (cost.in_a_process(20_000, cohort)["peak_mb"] for cohort in (8, 160))
    model = 4 * 1_001_000 / 2**20
    assert many - few < 8 * model, "152 more clients took the room of more than eight models"


def test_a_million_clients_cost_nothing_before_they_are_picked() -> None:
    few, many = (cost.in_a_process(population, 5)["peak_mb"] for population in (1000, 1_000_000))
    assert many - few < 20


def test_the_activity_benchmark_trains_on_21_people_and_asks_9_others() -> None:
    try:
        data.folder("hapt")
    except data.DataAbsent as absent:
        pytest.skip(f"{absent}")
    command = [sys.executable, "-m", "benchmarks.hapt", "--recipe", "running", "--seeds", "0", "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "running" in done.stdout
    windows, labels, person, unseen = data.hapt()
    assert windows.shape == (10_411, 128, 6)
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3, 4, 5]
    assert (len(set(person.tolist())), len(unseen)) == (30, 9)


def test_a_table_replaces_the_one_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n\n<!-- x -->\nold\n<!-- /x -->\n\nafter\n")
    monkeypatch.setattr(results, "PAGE", page)
    results.write_table("x", "caption", ["a"], [["1"]], write=True)
    assert page.read_text() == "# Results\n\n<!-- x -->\ncaption\n\n| a |\n| --- |\n| 1 |\n<!-- /x -->\n\nafter\n"
    with pytest.raises(SystemExit, match="no place for 'y'"):
        results.write_table("y", "", [], [], write=True)
