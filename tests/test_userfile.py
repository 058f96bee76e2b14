"""Users' files: what a device takes from its own."""

from pathlib import Path

import pytest

from sumus.errors import ExperimentError
from sumus.userfile import load_client, load_plan

FILE = """
from torch import nn
import sumus

asked = []

def examples():
    asked.append("examples")
    return [[0.0]], [[1.0]]

def held_out():
    asked.append("held out")
    return [[0.0]], [[1.0]]

task = sumus.Task(lambda: nn.Linear(1, 1), sumus.losses.mean_squared_error)
plan = sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.1)), sumus.Pacing(cohort=10))
"""


def test_a_function_that_gives_examples_is_asked_by_the_device_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    client = load_client(str(tmp_path / "mine.py"))
    asked = client.examples.__globals__["asked"]
    assert asked == []
    assert client.examples() == client.held_out() == ([[0.0]], [[1.0]])
    assert asked == ["examples", "held out"]


def test_a_plan_is_tried_on_what_that_function_gives(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    _, someone, _ = load_plan(str(tmp_path / "mine.py"))
    assert someone == {"examples": ([[0.0]], [[1.0]])}


def test_a_device_without_examples_is_told_what_to_add(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    with pytest.raises(ExperimentError, match=r"defines no `other`: add `other = \(inputs, targets\)`"):
        load_client(f"{tmp_path / 'mine.py'}:other")
