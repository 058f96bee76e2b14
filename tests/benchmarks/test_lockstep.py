"""Variants take turns; one that fails is reported; nothing is left behind."""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import executors, figures, lockstep
from benchmarks.lockstep import Measured, Round, Runner, measure
from benchmarks.peers.__main__ import HEADER, row
from benchmarks.workloads import named

ROOT = Path(__file__).parents[2]

RUNNER = """
import os, subprocess, sys
import numpy as np
from benchmarks.lockstep import Turns
name, wrong, diary = sys.argv[1:]
worker = subprocess.Popen(["sleep", "1000"], start_new_session=True)  # one that leaves the group
def note(line):
    with open(diary, "a") as file:
        file.write(line + "\\n")
note(f"pid {os.getpid()}")
note(f"pid {worker.pid}")
if wrong == "at the start":
    raise SystemExit("no such framework")
turns, done = Turns(), 0
while turns.next():
    done += 1
    note(f"round {done} {name}")
    sum(range(200_000))
    if wrong == "in a round" and done == 2:
        raise ValueError("two is too many")
    while wrong == "slow" and done == 2:
        pass
turns.finish({"rounds": np.array(done), "asked": np.array(turns.rounds)})
"""


def runner(name: str, diary: Path, wrong: str = "") -> Runner:
    return Runner(name, [sys.executable, "-c", RUNNER, name, wrong, str(diary)], {"PYTHONPATH": str(ROOT)})


def processes(diary: Path) -> list[int]:
    return [int(line.split()[1]) for line in diary.read_text().splitlines() if line.startswith("pid")]


def rounds(diary: Path) -> list[list[str]]:
    return [line.split()[1:] for line in diary.read_text().splitlines() if line.startswith("round")]


def alive(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if lockstep._stat(pid)]


def test_each_sweep_has_a_round_of_every_variant_in_an_order_of_its_own(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    names = ["a", "b", "c"]
    found = measure([runner(name, diary) for name in names], sweeps=5, warm_up=1)
    sweeps = [list(group) for _, group in itertools.groupby(rounds(diary), key=lambda line: line[0])]
    assert [sorted(name for _, name in sweep) for sweep in sweeps] == [names] * 6
    assert len({tuple(name for _, name in sweep) for sweep in sweeps}) > 1
    for one in found.values():
        assert one.error is None
        assert len(one.rounds) == 5
        assert one.weights is not None
        assert (one.weights["rounds"], one.weights["asked"]) == (6, 6)
        assert all(each.wall > 0 and each.cpu > 0 and each.rss > 2**20 for each in one.rounds)
    assert len(processes(diary)) == 6
    assert alive(processes(diary)) == []


def test_a_variant_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    failing = ["in a round", "slow", "at the start"]
    said: list[str] = []
    runners = [runner("good", diary), *(runner(wrong, diary, wrong) for wrong in failing)]
    missing = Runner("missing", [str(tmp_path / "python")])
    found = measure([*runners, missing], sweeps=3, warm_up=0, patience=1.0, watch=said.append)
    assert found["good"].error is None
    assert len(found["good"].rounds) == 3
    assert found["in a round"].error == "ValueError: two is too many"
    assert found["slow"].error == "no answer in 1 s"
    assert found["at the start"].error == "no such framework"
    assert "No such file" in str(found["missing"].error)
    assert all(found[wrong].rounds == () for wrong in failing)
    assert "in a round: round 2 of 3, ValueError: two is too many" in said
    assert len(processes(diary)) == 8
    assert alive(processes(diary)) == []


def test_an_interruption_ends_everything(tmp_path: Path) -> None:
    diary = tmp_path / "diary"

    def interrupt(line: str) -> None:
        if "round 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([runner(name, diary) for name in ("a", "b")], sweeps=3, watch=interrupt)
    assert len(processes(diary)) == 4
    assert alive(processes(diary)) == []


def test_seconds_and_memory_are_of_a_process_and_its_descendants() -> None:
    here = os.getpid()
    before = lockstep.cpu_seconds(here)
    sum(range(3_000_000))
    assert lockstep.cpu_seconds(here) > before
    rss, pss = lockstep.memory(here)
    assert rss > 10 * 2**20
    assert pss is None or 0 < pss <= rss
    assert lockstep.family(here)[0] == here


def of(name: str, *walls: float) -> Measured:
    return Measured(name, tuple(Round(wall, 2 * wall, 300 * 2**20, 200 * 2**20) for wall in walls))


def test_a_ratio_is_the_median_of_the_sweeps_ratios() -> None:
    fast, slow = of("fast", 1, 10, 1), of("slow", 2, 30, 2)  # the second sweep was disturbed
    assert lockstep.times_faster(fast, slow) == 2
    assert lockstep.times_faster(fast, Measured("lost", error="no")) is None


def test_a_row_of_the_table_of_peers() -> None:
    workload = named("w1")
    found = {"naive loop": of("naive loop", 4.0), "sumus": of("sumus", 2.0), "Flower": of("Flower", 8.0)}
    flower = row(workload, found["Flower"], found, 3e-14, peak=200.0)
    assert flower == ["w1", "Flower", "2.0", "8.00", "0.50", "4.00", "39.5", "20%", "300", "3e-14"]
    lost = row(workload, Measured("pfl", error="not installed: no pfl in /some/folder/here | x"), found, None, 200.0)
    assert lost == ["w1", "pfl", "", "not installed: no pfl in … / x", *[""] * 5, "not checked"]
    assert len(flower) == len(lost) == len(HEADER)


def test_auto_is_compared_with_the_best_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "EXECUTORS", ("sequential", "vectorized", "auto"))
    found = {
        "naive": of("naive", 4.0),
        "sequential": of("sequential", 2.0),
        "vectorized": Measured("vectorized", error="TaskError: no"),
        "auto": of("auto", 2.5),
    }
    assert executors.auto_over_best(found) == pytest.approx(0.8)
    cells = executors.row(named("w2"), found, {"sequential": 1e-9, "vectorized": "no", "auto": 2e-9})
    assert cells[2:7] == ["4.00", "2.00", "TaskError: no", "1.60", "**0.80**"]
    assert cells[-1] == "no figure"


def test_figures_have_three_digits() -> None:
    values = (0.00345678, 0.0345, 5.6, 182.4, 999.7, 12_345.0)
    assert list(map(figures.three_digits, values)) == ["0.00346", "0.0345", "5.60", "182", "1,000", "12,345"]
    assert [figures.times(value) for value in (None, 0.5, 9.999, 75.3)] == ["", "0.50", "10", "75"]


def test_bars_are_drawn(tmp_path: Path) -> None:
    panels = {"w1": {"naive loop": 1.0, "sumus": 0.5}, "w2": {"naive loop": 1.0, "sumus": 0.2, "Flower": 12.0}}
    assert figures.bars(tmp_path / "bars.png", panels, "seconds", ["sumus"]).stat().st_size > 1000


def test_weights_are_compared_leaf_by_leaf() -> None:
    from benchmarks.workloads import distance

    zeros, threes = ({"a": np.full(4, value), "b": np.full(5, value)} for value in (0.0, 3.0))
    assert distance(zeros, threes) == 9.0
