"""What can be wrong with a task or its data is said before it costs anything, with the client and the remedy."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import sumus

GOOD = (np.ones((4, 3), np.float32), np.array([0, 1, 0, 1]))


FEDAVG = sumus.fedavg(sumus.sgd(lr=0.1))


class RowsAsDicts:
    """A data set as Hugging Face gives it."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": [0.0, 1.0, 2.0], "label": index}


class Full(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        raise MemoryError


def to_floats(inputs: Any, targets: Any) -> tuple[Any, Any]:
    return np.asarray(inputs, np.float32), targets


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
        ((np.ones((2, 4)), np.array([0, 1])), r"client 'bob': its inputs are float32 of shape (4,) per example"),
        ((np.ones((2, 3)), np.array([0, 1, 1])), "do not have one row per example"),
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
            r"loss `CrossEntropyLoss` returned () for a batch of 2, but it must return one value per",
        ),
        ({"loss": lambda outputs, targets: outputs}, "returned (2, 2) for a batch of 2"),
        (
            {"model": lambda: nn.Linear(5, 2)},
            "the model or its loss failed on inputs (2, 3) float32 and targets (2,) int64: RuntimeError",
        ),
        (
            {"metrics": {"accuracy": lambda outputs, targets: outputs.mean()}},
            "metric 'accuracy' returned () for a batch of 2",
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
            evaluate=sumus.Evaluation(central=GOOD),
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
    with pytest.raises(sumus.TaskError, match="torch finds no GPU"):
        sumus.simulate(
            task(), sumus.fedavg(sumus.sgd(lr=0.1)), {"alice": GOOD}, rounds=1, compute=sumus.Compute(device="cuda")
        )


def test_an_unknown_metric_in_the_target_is_refused() -> None:
    with pytest.raises(sumus.ExperimentError, match="target names 'acuracy'"):
        sumus.simulate(
            task(),
            sumus.fedavg(sumus.sgd(lr=0.1)),
            {"alice": GOOD},
            rounds=1,
            evaluate=sumus.Evaluation(central=GOOD, target={"acuracy": 0.5}),
        )


# ── words that blame what is wrong ───────────────────────────────────────────────────────────────────────────────────

ROWS = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
TABLE = pd.DataFrame(ROWS, columns=list("abc"))
WORDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "whole labels for a loss of real numbers": (
        GOOD,
        {"model": lambda: nn.Linear(3, 1), "loss": sumus.losses.binary_cross_entropy_with_logits},
        "client 'alice': .*inputs (2, 3) float32 and targets (2,) int64.*give them as float32",
    ),
    "one-hot labels": (
        (ROWS, np.eye(2, dtype="float32")[[0, 1, 0, 1]]),
        {},
        "its targets are float32 of shape (2,) per example.*targets.argmax(1)",
    ),
    "soft labels of another width": (
        (ROWS, np.full((4, 5), 0.2, "float32")),
        {},
        "its targets are float32 of shape (5,) per example.*whole numbers from 0 to 1",
    ),
    "real labels": ((ROWS, np.full(4, 2.5)), {}, "its targets are float32 of shape () per example (the first is 2.5)"),
    "a column of truth values": ((TABLE.assign(sick=True), GOOD[1]), {}, "a table whose column 'sick' is bool"),
    "a column of text": (
        (TABLE.assign(name="Ann"), GOOD[1]),
        {},
        "a table whose column 'name' is.*(row 0 holds text ('Ann')",
    ),
    "a column of times": ((TABLE.assign(at=pd.Timestamp("2026-01-01")), GOOD[1]), {}, "column 'at' is datetime64"),
    "labels as text": (
        (ROWS, np.array(["cat", "dog", "cat", "dog"])),
        {},
        "its targets cannot be read: row 0 holds text ('cat'), which is not a number",
    ),
    "several inputs": (({"ids": ROWS, "mask": ROWS}, GOOD[1]), {}, "its inputs are a dict of 'ids', 'mask'"),
    "rows as dicts": (
        RowsAsDicts(),
        {},
        "item 0 is a dict of 'x', 'label': name the columns, as in Population.from_hugging_face",
    ),
    "a model that runs out of memory": (
        GOOD,
        {"model": Full},
        "MemoryError.*lower batch_size=",
    ),
}


@pytest.mark.parametrize("what", WORDS)
def test_a_message_blames_what_is_wrong(what: str) -> None:
    examples, changes, message = WORDS[what]
    words = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises((sumus.TaskError, sumus.DataError), match=words):
        sumus.simulate(task(**changes), sumus.fedavg(sumus.sgd(lr=0.1)), {"alice": examples}, rounds=1)


def test_a_table_of_one_kind_trains() -> None:
    for table in (TABLE, TABLE.astype("int64"), TABLE > 0):
        assert len(sumus.simulate(task(prepare=to_floats), FEDAVG, {"alice": (table, GOOD[1])}, rounds=1).rounds) == 1
