"""The code of our own examples, demos and benchmarks keeps nothing outside the leaves: no note, and no other executor."""

from pathlib import Path
from typing import Any

import pytest

import sumus
from benchmarks.workloads import WORKLOADS, named
from sumus.demos import digits, health, keyboard
from sumus.simulator.populations.population import as_population
from sumus.task import Task
from sumus.training.observed import expect_means, observe
from sumus.training.program import Program
from sumus.userfile import load_plan

EXAMPLES = [
    path
    for path in sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
    if path.name != "virtual_workers.py"  # no experiment
]


def expect_nothing_kept(task: Any, people: Any) -> None:
    assert isinstance(task, Task)
    population, program = as_population(people), Program(task)
    client = population.pick(0)
    examples = program.reader.read(population, client)
    program.learn_schema(client, *examples)
    seen = observe(program, *examples)
    expect_means(program, *examples)
    program.evaluate(*examples)
    program.begin_anew()
    assert seen.alone is None
    assert not program.moved


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples(file: Path) -> None:
    trial = load_plan(str(file))
    expect_nothing_kept(trial.plan.task, trial.population)


@pytest.mark.parametrize("demo", [digits, health, keyboard])
def test_demos(demo: Any) -> None:
    experiment = demo.experiment()
    expect_nothing_kept(experiment.plan.task, experiment.population)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads(name: str) -> None:
    workload = named(name).only(1)
    task = sumus.Task(workload.module, sumus.losses.cross_entropy)
    expect_nothing_kept(task, dict(enumerate(workload.examples())))
