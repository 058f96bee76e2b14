"""Users' files: what a device takes from its own, and what an operator needs in one."""

from pathlib import Path

import numpy as np
import pytest

from sumus.errors import ExperimentError, PlanError
from sumus.simulator.commands import packed
from sumus.task import Data
from sumus.userfile import load_client, load_plan, made_up

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
    someone = load_plan(str(tmp_path / "mine.py")).population
    assert someone == {"examples": ([[0.0]], [[1.0]])}


def test_a_device_without_examples_is_told_what_to_add(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    with pytest.raises(ExperimentError, match=r"defines no `other`: add `other = \(inputs, targets\)`"):
        load_client(f"{tmp_path / 'mine.py'}:other")


# ── plans without examples ───────────────────────────────────────────────────────────────────────────────────────────

OPERATORS = """
import torch
from torch import nn
import sumus

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 50)
    def forward(self, words):
        return self.out(self.table(words))

class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(12, 3)
    def forward(self, points):
        return self.out(points.float().flatten(1) / 255)

task = sumus.Task({task})
plan = sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.1), sumus.clip_by_global_norm(1.0), weight="uniform"),
                  sumus.Pacing(cohort=10, every=3600))
"""
TASKS = {
    "classes": 'lambda: nn.Linear(3, 2), sumus.losses.cross_entropy, {"a": sumus.metrics.accuracy}, '
    'data=sumus.Data((3,), "float32", (), "int64", 2)',
    "regression": 'lambda: nn.Linear(3, 1), sumus.losses.mean_squared_error, data=sumus.Data((3,), "float32", (1,), "float32")',
    "chances": "lambda: nn.Sequential(nn.Linear(3, 1), nn.Sigmoid()), sumus.losses.binary_cross_entropy, "
    '{"a": sumus.metrics.binary_accuracy}, data=sumus.Data((3,), "float32", (1,), "float32")',
    "words": 'Words, sumus.losses.cross_entropy, data=sumus.Data((7,), "int64", (7,), "int64", 50)',
    "pictures": 'Picture, sumus.losses.cross_entropy, data=sumus.Data((2, 2, 3), "uint8", (), "int64", 3)',
    "half": "lambda: nn.Linear(3, 1).to(torch.bfloat16), sumus.losses.mean_squared_error, "
    'data=sumus.Data((3,), "bfloat16", (1,), "bfloat16")',
    "prepared": 'lambda: nn.Linear(3, 2), sumus.losses.cross_entropy, prepare=lambda inputs, targets: inputs["no such"], '
    'data=sumus.Data((3,), "float32", (), "int64", 2)',
    "batches": "lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)), sumus.losses.cross_entropy, "
    'data=sumus.Data((3,), "float32", (), "int64", 2)',
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_plan_whose_data_are_declared_is_packed_without_examples(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "operators.py"
    file.write_text(OPERATORS.replace("{task}", TASKS[kind]))
    bundle = packed(str(file), 0)
    assert bundle.plan.description.data is not None
    assert bundle.plan.trusts_devices is False
    assert load_plan(str(file)).made_up


def test_without_examples_and_without_their_form_it_says_both_remedies(tmp_path: Path) -> None:
    file = tmp_path / "operators.py"
    file.write_text(OPERATORS.replace("{task}", "lambda: nn.Linear(3, 1), sumus.losses.mean_squared_error"))
    with pytest.raises(ExperimentError, match=r"neither `examples` .* declare the form, .*data=sumus\.Data\(.*or add"):
        packed(str(file), 0)


def test_what_is_made_up_proposes_no_clip(tmp_path: Path) -> None:
    file = tmp_path / "operators.py"
    text = OPERATORS.replace("{task}", TASKS["classes"]).replace(", sumus.clip_by_global_norm(1.0)", "")
    file.write_text(text)
    with pytest.raises(
        PlanError, match="Add `examples` to this file, so that `sumus check` can propose values"
    ) as caught:
        packed(str(file), 0)
    assert "leaves them unchanged" not in str(caught.value)


def test_what_is_made_up_is_of_the_declared_form() -> None:
    inputs, targets = made_up(Data((2, 3), "float32", (), "int64", 5))
    assert (inputs.shape, inputs.dtype, targets.shape, targets.dtype) == ((20, 2, 3), np.float32, (20,), np.int64)
    assert set(targets.tolist()) <= set(range(5))
    words, _ = made_up(Data((4,), "int64", (4,), "int64", 9))
    assert not words.any(), "0 is in every table"
