"""Data is read as what it is, or refused by client, column and row."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import sumus
from sumus.preparation import drop_missing, standardize, standardize_running, windows
from sumus.simulator.virtual_time import traces
from tests.simulator.test_population import hugging_face

X = np.random.default_rng(0).normal(size=(4, 3)).astype("f4")
Y = np.array([0, 1, 0, 1])
BIG = 2**53 + 1


def run(examples: Any, **task: Any) -> sumus.History:
    made = sumus.Task(lambda: nn.Linear(3, 2), sumus.losses.cross_entropy, **task)
    return sumus.simulate(made, sumus.fedavg(sumus.sgd(lr=0.1)), {"bob": examples}, 1, out=sumus.Output(progress=False))


class Items(Dataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@pytest.mark.parametrize(
    "examples",
    [
        (X, Y),
        [X, Y],
        [(x, y) for x, y in zip(X, Y, strict=True)],
        Items(*zip(X, Y, strict=True)),
        Items(*([x, y] for x, y in zip(X, Y.tolist(), strict=True))),
        Items(*((torch.from_numpy(x), np.int32(y)) for x, y in zip(X, Y, strict=True))),
        (X.tolist(), Y.tolist()),
        (pd.DataFrame(X), pd.Series(Y)),
        (np.ma.masked_array(X, mask=False), Y),
        (X.astype(">f8"), Y.astype(np.uint64)),
    ],
)
def test_examples_in_any_form_are_the_same(examples: Any) -> None:
    assert run(examples).model_sha256 == run((X, Y)).model_sha256


HIDDEN = np.zeros((4, 3), bool)
HIDDEN[2, 1] = True


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        (X, "one ndarray, without targets"),
        (torch.from_numpy(X), "one Tensor, without targets"),
        (pd.DataFrame(X), "one DataFrame, without targets"),
        ((X, None), "it has no targets"),
        ([X[0], X[1]], "could be two examples"),
        ([[0.1, 0.2], [0.3, 0.4]], "could be two examples"),
        (Items(*X), "item 0 is a ndarray; give"),
        (Items(*torch.from_numpy(X)), "item 0 is a Tensor"),
        (Items(*((x, y, 0) for x, y in zip(X, Y, strict=True))), "item 0 is a tuple of 3"),
        (Items((X[0], 0), (X[1], None)), "item 1 is a tuple of 2"),
        (Items([0.1, 0.2], [0.3, 0.4]), "list of two numbers"),
        (Items((X[0], 0), (X[1], True)), "item 1 is bool, but item 0 is int64"),
        (Items((X[0], 0), (X[1], "1")), "holds text"),
        (Items((X[0], BIG), (X[1], 0.5)), "item 0 is int64, .* rounded in float64"),
        (Items((np.ma.masked_array(X[0], mask=HIDDEN[2]), 0)), "row 1 is masked"),
        ((np.ma.masked_array(X, mask=HIDDEN), Y), "its inputs cannot be read: row 2, column 1 is masked"),
        ((X, np.ma.masked_array(Y, mask=[0, 0, 0, 1])), "its targets cannot be read: row 3 is masked"),
        ((X.astype(str), Y), "row 0, column 0 holds text"),
        ((X, ["0", "1", "0", "1"]), "its targets cannot be read: row 0 holds text"),
        ((X, [0, 1, None, 1]), "row 2 holds nothing"),
        ((X, [0, 1, "0", 1]), "row 0 is a whole number"),
        ((pd.DataFrame({"a": [1, BIG], "b": [0.5, 1], "c": [1.0, 2]}), Y[:2]), "column 'a', row 1"),
        (
            (np.where(HIDDEN, 2.0**24 + 1, X.astype("f8")), Y),
            r"16777217 at row 2, column 1, which .* float32 rounds to 16777216",
        ),
        ((np.where(HIDDEN, 1e39, X.astype("f8")), Y), "at example 2 are outside the range of the model's float32"),
        ((X, np.array([0, 1, 2**63, 1], np.uint64)), "hold 2.63 or more at example 2"),
        ((torch.from_numpy(X).to_sparse(), Y), "its inputs are sparse_coo: give a dense tensor"),
        ((np.where(HIDDEN, np.nan, X), Y), "NaN or an infinity at example 2, column 1"),
    ],
)
def test_what_is_not_understood_is_refused_by_client_and_row(examples: Any, said: str) -> None:
    with pytest.raises(sumus.DataError, match=f"client 'bob': .*{said}") as error:
        run(examples)
    assert error.value.client == "bob"


@pytest.mark.parametrize("prepared", [X[:2], torch.zeros(2, 3), {"x": X}, (X, Y, Y), None])
def test_a_preparation_gives_a_pair(prepared: Any) -> None:
    with pytest.raises(sumus.DataError, match="client 'bob': prepare returned a .*; it must return a pair"):
        run((X, Y), prepare=lambda inputs, targets: prepared)


@pytest.mark.parametrize(
    "step",
    [drop_missing, standardize(0, 1), standardize_running(), windows(1, 1)],
    ids=["drop_missing", "standardize", "standardize_running", "windows"],
)
def test_preparations_read_no_text_and_nothing_masked(step: Any) -> None:
    recordings = X[:, None, :] if step.__qualname__.startswith("windows") else X
    step(recordings, Y)
    with pytest.raises(ValueError, match="holds text"):
        step(recordings.astype(str), Y)
    with pytest.raises(ValueError, match="masked"):
        step(np.ma.masked_array(recordings, mask=np.ones(recordings.shape, bool)), Y)


def test_windows_round_no_large_number() -> None:
    with pytest.raises(ValueError, match="is 16777217, which float32 rounds"):
        windows(1, 1)([np.array([[2**24 + 1]])], [0])


# ── populations and splits ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "by", [[1, "1", 1, 2], [1, True, 2, 2], [1.0, 2.0**53, 1.0, 1.0], np.ma.masked_array(Y, mask=[0, 0, 0, 1])]
)
def test_no_key_merges_two_people(by: Any) -> None:
    for split in (
        lambda: sumus.Population.from_arrays(X, Y, by),
        lambda: sumus.Population.from_dataset(Items(*zip(X, Y, strict=True)), by),
        lambda: sumus.Population.from_hugging_face(hugging_face({"x": X.tolist(), "y": Y.tolist()}), "x", "y", by),
    ):
        with pytest.raises(sumus.ExperimentError):
            split()


def test_large_ids_stay_apart() -> None:
    people = sumus.Population.from_arrays(X, Y, [BIG, BIG - 1, BIG, 2**70])
    assert list(people) == [BIG - 1, BIG, 2**70]
    assert people[BIG][1].tolist() == [0, 0]


@pytest.mark.parametrize("column", [[1, "1", 2, 2], [[1], [1, 2], [1], [1]], [BIG, 0.5, 1, 1]])
def test_lists_that_an_array_would_change_are_refused(column: Any) -> None:
    with pytest.raises(sumus.ExperimentError, match="inputs cannot be read: row"):
        sumus.Population.from_arrays(column, Y, Y)
    with pytest.raises(sumus.ExperimentError, match="targets cannot be read: row"):
        sumus.Population.from_arrays(X, column, Y)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(X[0], 0)])


def test_streams_and_nothing_are_refused() -> None:
    empty = hugging_face({"x": X.tolist(), "y": Y.tolist()})
    for split in (
        lambda: sumus.Population.from_hugging_face(empty.to_iterable_dataset(), "x", "y", by=Y),
        lambda: sumus.Population.from_hugging_face(empty.select([]), "x", "y", by=[]),
        lambda: sumus.Population.from_hugging_face(empty, [], "y", by=Y),
        lambda: sumus.Population.from_arrays(np.zeros((0, 3)), np.zeros(0), by=[]),
        lambda: sumus.Population.from_dataset(Items(), by=[]),
        lambda: sumus.Population.from_dataset(Stream(), by=[0]),
    ):
        with pytest.raises(sumus.ExperimentError):
            split()
    with pytest.raises(sumus.DataError, match="client 'bob'"):
        run(Stream())


def test_columns_of_a_data_set_are_named_with_the_row() -> None:
    found = hugging_face(
        {
            "x": [1.0, None, 2.0, 3.0],
            "ragged": [[1], [1, 2], [1], [1]],
            "text": ["1", "2", "3", "4"],
            "big": [BIG, 1, 2, 3],
            "real": [0.5, 1.0, 2.0, 3.0],
            "y": Y.tolist(),
        }
    )
    for columns, said in (
        ("x", "its column 'x' cannot be read: row 1 holds nothing"),
        ("ragged", r"its column 'ragged' cannot be read: row 1 has shape \(2,\)"),
        (["real", "text"], "column 'text' is text .*, but column 'real' is a number"),
        (["big", "real"], f"column 'big', entry 0 is {BIG}, which float64 cannot hold"),
    ):
        people = sumus.Population.from_hugging_face(found, columns, "y", by=["a"] * 4)
        with pytest.raises(sumus.DataError, match=f"client 'a': .*{said}"):
            people["a"]
    people = sumus.Population.from_hugging_face(found, ["real", "y"], "y", by=["a"] * 4)
    assert people["a"][0].tolist() == [[0.5, 0.0], [1.0, 1.0], [2.0, 0.0], [3.0, 1.0]]


@pytest.mark.parametrize(
    "labels", [[1, "1", 2], [1.0, np.inf, 2.0], [2.0**53, 1.0, 2.0], np.ma.masked_array([0, 1, 1], mask=[0, 1, 0])]
)
def test_labels_of_a_split_are_what_they_are(labels: Any) -> None:
    for split in (
        lambda: sumus.splits.dirichlet(labels, 2, 0.5),
        lambda: sumus.splits.shards(labels, 1, 1),
    ):
        with pytest.raises(sumus.ExperimentError, match="labels"):
            split()


# ── measured devices ─────────────────────────────────────────────────────────────────────────────────────────────────

HEAD = "seconds,down,up,clock,online\n"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("1_000,1,1,1,\n", "line 2: column 'seconds' holds '1_000', which is not a number"),
        ("5,٣,1,1,\n", "column 'down' holds '٣'"),
        ("5,1,inf,1,\n", "column 'up' holds 'inf'"),
        ("5,1,1,nan,\n", "column 'clock' holds 'nan'"),
        ("5,1,1,1,1_0-20\n", "column 'online' holds '1_0'"),
        ("5,1,1,1,\n5,1\n", "line 3: give 5 fields"),
        ("5,1,1,1,,7\n", "line 2: give 5 fields"),
        ('5,1,1,1,"\n', "cannot be read"),
    ],
)
def test_a_trace_is_read_as_it_is_written(lines: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(HEAD + lines, encoding="utf-8")
    with pytest.raises(sumus.ExperimentError, match=said):
        traces.read(file)
    file.write_text(HEAD + "5, 1e3,.5,,0-10\n+5.,,,1,\n", encoding="utf-8")
    assert traces.read(file).seconds.tolist() == [5.0, 5.0]


def test_a_trace_has_each_column_once(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("seconds,down,up,clock,online,up\n5,1,1,1,,9\n")
    with pytest.raises(sumus.ExperimentError, match="the columns seconds, down"):
        traces.read(file)
