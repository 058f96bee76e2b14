"""The benchmarks run, in short; what they claim of memory holds. Times are printed there, and asserted nowhere."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import algorithms, attacks, cifar10, compare, cost, data, learning, results, shakespeare, stragglers

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


def test_the_roles_of_the_plays_are_clients_and_their_last_fifth_is_held_out() -> None:
    try:
        data.folder("shakespeare")
    except data.DataAbsent as absent:
        pytest.skip(f"{absent}")
    training, held_out = shakespeare.roles()
    assert len(training) == len(held_out) == 141
    inputs, targets = training["JULIET"]
    assert inputs.shape == targets.shape == (len(inputs), shakespeare.ROW)
    flat, following = inputs.reshape(-1), targets.reshape(-1)
    count = int((following >= 0).sum())
    assert (following[: count - 1] == flat[1:count]).all()
    share = sum((y >= 0).sum() for _, y in held_out.values()) / sum((y >= 0).sum() for _, y in training.values())
    assert share == pytest.approx(0.25, abs=0.001)
    run = learning.one_run(("benchmarks.shakespeare", "fedadam", 0, 1))
    assert 0.02 < run.accuracy < 0.3


def test_the_photographs_are_dealt_with_skewed_labels() -> None:
    try:
        data.folder("cifar10_jpeg")
    except data.DataAbsent as absent:
        pytest.skip(f"{absent}")
    alike, skewed = (cifar10.RECIPES[name].experiment(0, 1) for name in ("iid", "dirichlet"))
    assert len(alike.population) == len(skewed.population) == cifar10.CLIENTS
    kinds = [np.mean([len(np.unique(p[c][1])) for c in range(9)]) for p in (alike.population, skewed.population)]
    assert kinds[0] == 10 > kinds[1] + 1
    assert learning.one_run(("benchmarks.cifar10", "iid", 0, 1)).accuracy > 0.1


def test_a_method_is_tuned_on_seeds_of_its_own_and_measured_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "TUNING", (7,))
    tried = {"most: FedAvg, drop": ("rate 0.01", "rate 0.3"), "most: FedNova": ("rate 0.1",)}
    few = {name: {label: stragglers.METHODS[name][label] for label in labels} for name, labels in tried.items()}
    figures = compare.tuned("benchmarks.stragglers", few, seeds=(0, 1), processes=1)
    assert [len(values) for _, values in figures.values()] == [2, 2]
    assert figures["most: FedAvg, drop"][0] == "rate 0.01"
    (_, _, _, none), (_, setting, figure, difference) = compare.rows(figures, "most: FedAvg, drop")
    assert (none, setting) == ("", "rate 0.1")
    assert "±" in figure
    assert difference[0] in "+-"


def test_an_interval_is_students() -> None:
    assert compare.interval([0.5, 0.6, 0.7, 0.8]) == "0.650 ± 0.205"  # 3.182 · 0.1291 / 2
    assert compare.interval([0.01, 0.01], signed=True) == "+0.010 ± 0.000"


def test_an_attack_that_fells_the_mean_leaves_the_median_standing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "ROUNDS", 10)
    mean, median = (attacks.one_run(("iid", rule, "sign flip × 4", 0)) for rule in ("mean", "median"))
    assert mean < 0.3 < median


def test_every_algorithm_and_its_parts_are_in_the_table() -> None:
    assert set(algorithms.METHODS) == set(algorithms.ALGORITHMS)
    plain, scaffold = (next(iter(algorithms.ALGORITHMS[name].values())) for name in ("FedAvg", "SCAFFOLD, option 2"))
    assert algorithms.bytes_up(scaffold) == 2 * algorithms.bytes_up(plain)
    assert [algorithms.weighing(part) for part in scaffold.aggregator.parts] == [
        "params: uniform / count",
        "control: uniform / population",
    ]


def test_the_demos_run_with_other_seeds() -> None:
    run = learning.one_run(("benchmarks.package_data", "digits", 3, 2))
    assert (run.seed, run.median) == (3, None)
    assert 0 < run.accuracy < 1


def test_a_table_replaces_the_one_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n\n<!-- x -->\nold\n<!-- /x -->\n\nafter\n")
    monkeypatch.setattr(results, "PAGE", page)
    results.write_table("x", "caption", ["a"], [["1"]], write=True)
    assert page.read_text() == "# Results\n\n<!-- x -->\ncaption\n\n| a |\n| --- |\n| 1 |\n<!-- /x -->\n\nafter\n"
    with pytest.raises(SystemExit, match="no place for 'y'"):
        results.write_table("y", "", [], [], write=True)
