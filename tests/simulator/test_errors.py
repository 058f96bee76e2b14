"""What can be wrong with a task or its data is said before it costs anything, with the client and the remedy."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sumus

GOOD = (np.ones((4, 3), np.float32), np.array([0, 1, 0, 1]))


def task(**changes: Any) -> sumus.Task:
    return sumus.Task(**{"model": lambda: nn.Linear(3, 2), "loss": sumus.losses.cross_entropy, **changes})


def simulate(population: Any, **changes: Any) -> sumus.History:
    return sumus.simulate(task(**changes), sumus.fedavg(sumus.sgd(lr=0.1)), population, rounds=1)


def test_good_examples_run() -> None:
    assert len(simulate({"alice": GOOD}).rounds) == 1


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (
            (np.ones((0, 3), np.float32), np.zeros(0, np.int64)),
            "client 'bob': it has no examples; leave empty clients out",
        ),
        (
            (np.array([[1, 2, np.nan]]), np.array([0])),
            "client 'bob': its inputs hold a NaN or an infinity at example 0",
        ),
        (
            (np.ones((2, 3)), np.array([0, 7])),
            "client 'bob': the label 7 of example 1 is out of range: the model has 2 classes",
        ),
        ((np.ones((2, 3)), np.array([0, -1])), "client 'bob': the label -1 of example 1 is out of range"),
        ((np.ones((2, 4)), np.array([0, 1])), r"client 'bob': its inputs are float32 of shape (4,) an example"),
        ((np.ones((2, 3)), np.array([0, 1, 1])), "do not have one row an example"),
        ((np.ones((2, 3)), np.array([0.5, 1])), "client 'bob': its targets are float32"),
        ((np.array(["a", "b"]), np.array([0, 1])), "client 'bob': its inputs cannot be read: row 0 holds text"),
        (42, "client 'bob': its examples are a int; give (inputs, targets), or a torch Dataset"),
    ],
    ids=["empty", "nan", "label-high", "label-negative", "shape", "rows", "dtype", "text", "no-pair"],
)
def test_wrong_examples_name_the_client(examples: Any, message: str) -> None:
    with pytest.raises(sumus.DataError, match=re.escape(message)) as error:
        simulate({"alice": GOOD, "bob": examples})
    assert error.value.client == "bob"


def test_a_label_out_of_range_at_the_very_first_client_is_found_too() -> None:
    with pytest.raises(sumus.DataError, match="label 9 of example 3 is out of range"):
        simulate({"bob": (GOOD[0], np.array([0, 1, 0, 9]))})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": nn.CrossEntropyLoss()},
            r"loss `CrossEntropyLoss` gave () for a batch of 2 and must give one value an",
        ),
        ({"loss": lambda outputs, targets: outputs}, "gave (2, 2) for a batch of 2"),
        ({"model": lambda: nn.Linear(5, 2)}, "the model or its loss failed on inputs (2, 3) float32: RuntimeError"),
        (
            {"metrics": {"accuracy": lambda outputs, targets: outputs.mean()}},
            "metric 'accuracy' gave () for a batch of 2",
        ),
        ({"prepare": lambda x, y: (x / [[]], y)}, "client 'alice': prepare failed: ValueError"),
    ],
    ids=["reduced-loss", "wide-loss", "model", "metric", "prepare"],
)
def test_a_task_that_cannot_work_says_what_to_change(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((sumus.TaskError, sumus.DataError), match=re.escape(message)):
        sumus.simulate(
            task(**changes),
            sumus.fedavg(sumus.sgd(lr=0.1)),
            {"alice": GOOD},
            rounds=1,
            evaluate=sumus.Evaluate(central=GOOD),
        )


def test_a_cohort_larger_than_the_population_is_refused() -> None:
    plan = sumus.Plan(task(), sumus.fedavg(sumus.sgd(lr=0.1)), sumus.Pacing(cohort=3))
    with pytest.raises(sumus.ExperimentError, match="a cohort of 3 is larger than the population of 2: lower Pacing"):
        sumus.Experiment(plan, {"alice": GOOD, "bob": GOOD}, rounds=1)


def test_an_empty_population_and_no_rounds_are_refused() -> None:
    plan = sumus.Plan(task(), sumus.fedavg(sumus.sgd(lr=0.1)), sumus.Pacing(cohort=1))
    with pytest.raises(sumus.ExperimentError, match="the population is empty"):
        sumus.Experiment(plan, {}, rounds=1)
    with pytest.raises(sumus.ExperimentError, match="at least one round"):
        sumus.Experiment(plan, {"alice": GOOD}, rounds=0)


def test_a_missing_gpu_is_said_plainly() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(sumus.TaskError, match="torch sees no GPU"):
        sumus.simulate(task(), sumus.fedavg(sumus.sgd(lr=0.1)), {"alice": GOOD}, rounds=1, device="cuda")


def test_an_unknown_metric_in_the_target_is_refused() -> None:
    with pytest.raises(sumus.ExperimentError, match="target names 'acuracy'"):
        sumus.simulate(
            task(),
            sumus.fedavg(sumus.sgd(lr=0.1)),
            {"alice": GOOD},
            rounds=1,
            evaluate=sumus.Evaluate(central=GOOD, target={"acuracy": 0.5}),
        )
