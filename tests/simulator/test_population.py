"""Clients are read only when they are picked, and are who they say."""

import importlib
import importlib.util
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import sumus
from sumus.rng import generator
from sumus.simulator.populations.population import sample


class Items(Dataset[Any]):
    """Six items, that remember which of them were read."""

    def __init__(self) -> None:
        self.inputs = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
        self.read: list[int] = []

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.append(index)
        return torch.from_numpy(self.inputs[index]), index % 2


def hugging_face(columns: dict[str, Any]) -> Any:
    """A `datasets.Dataset` of these columns."""
    if importlib.util.find_spec("datasets") is None:
        if os.environ.get("SUMUS_REQUIRE_SERVICES"):
            pytest.fail("datasets is not installed, and here everything must be")
        pytest.skip("needs datasets: pip install datasets")
    return importlib.import_module("datasets").Dataset.from_dict(columns)


def learned(people: sumus.Population) -> str:
    """What a short run makes of a population: its model's hash."""
    task = sumus.Task(lambda: nn.Linear(3, 2), sumus.losses.cross_entropy)
    return sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=0.1, batch_size=2)), people, rounds=2).model_sha256


def test_a_population_reads_no_one_until_a_client_is_picked() -> None:
    read: list[int] = []

    def load(client: int) -> tuple[np.ndarray, np.ndarray]:
        read.append(client)
        return np.full((2, 3), client, np.float32), np.zeros((2, 1), np.float32)

    people = sumus.Population(range(1_000_000), load)
    task = sumus.Task(lambda: nn.Linear(3, 1), sumus.losses.mean_squared_error)
    plan = sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=1e-14)), sumus.Pacing(cohort=5))
    history = sumus.run(sumus.Experiment(plan, people, rounds=2))
    assert history.rounds[0].clients == 5
    assert len(set(read)) <= 11  # the first client is tried, then two cohorts of five


@pytest.mark.parametrize("ids", [["a", "b", "a"], [1, 2, "1"]])
def test_ids_given_twice_are_refused(ids: list[object]) -> None:
    with pytest.raises(sumus.ExperimentError, match="client id .* appears twice"):
        sumus.Population(ids, lambda client: None)
    with pytest.raises(sumus.ExperimentError, match="appears twice"):
        sumus.Population.from_pairs([(client, None) for client in ids])


def test_arrays_split_by_a_key_and_keep_their_order() -> None:
    inputs, targets = np.arange(6.0)[:, None], np.arange(6)
    people = sumus.Population.from_arrays(inputs, targets, by=["b", "a", "b", "a", "a", "b"])
    assert list(people) == ["a", "b"]
    assert people["a"][1].tolist() == [1, 3, 4]
    assert people["b"][0][:, 0].tolist() == [0, 2, 5]


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(sumus.ExperimentError, match="2 inputs and 3 targets: give one target per input"):
        sumus.Population.from_arrays(np.zeros((2, 1)), np.zeros(3), by=[1, 2])
    with pytest.raises(
        sumus.ExperimentError, match=r"by= has shape \(3,\) for 2 examples: give one client per example"
    ):
        sumus.Population.from_arrays(np.zeros((2, 1)), np.zeros(2), by=[1, 2, 3])
    with pytest.raises(sumus.ExperimentError, match=r"by= has shape \(6, 1\) for 6 examples"):
        sumus.Population.from_dataset(Items(), by=np.zeros((6, 1)))


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (["a", None, "b"], r"by= has no client for example 1 \(None\): give every example a client"),
        ([1, None, 2], "by= has no client for example 1"),
        ([1.0, float("nan"), 2.0], r"by= has no client for example 1 \(nan\)"),
        (np.array([0, 1, np.nan], np.float32), "by= has no client for example 2"),
    ],
    ids=["none of text", "none of numbers", "nan", "narrow nan"],
)
def test_an_example_of_nobody_is_refused(by: Any, message: str) -> None:
    columns = {"x": [1.0, 2.0, 3.0], "label": [0, 1, 0]}
    for split in (
        lambda: sumus.Population.from_arrays(np.zeros(3), np.zeros(3), by),
        lambda: sumus.Population.from_dataset(TensorDataset(torch.zeros(3), torch.zeros(3)), by),
        lambda: sumus.Population.from_hugging_face(hugging_face({**columns, "who": list(by)}), "x", "label", "who"),
    ):
        with pytest.raises(sumus.ExperimentError, match=message):
            split()


def test_ids_that_do_not_compare_are_refused() -> None:
    by = np.array([1, "a", 2], dtype=object)
    with pytest.raises(sumus.ExperimentError, match="by= holds values of different kinds .*: give ids of one kind"):
        sumus.Population.from_arrays(np.zeros(3), np.zeros(3), by)


def test_a_missing_name_among_names_is_no_client_called_nan() -> None:
    with pytest.raises(sumus.ExperimentError, match="no client for example 1"):
        sumus.Population.from_arrays(np.zeros(3), np.zeros(3), ["a", float("nan"), "b"])


def test_a_part_of_a_population_is_a_population() -> None:
    people = sumus.Population(["a", "b", "c"], str.upper)
    assert list(people.without(["b"])) == ["a", "c"]
    assert people.subset(["c"])["c"] == "C"
    with pytest.raises(sumus.ExperimentError, match="no client 'x' in this population of 3"):
        people.subset(["x"])


def test_a_loader_that_fails_names_the_client() -> None:
    with pytest.raises(sumus.DataError, match="client 3: loading its examples failed: ZeroDivisionError"):
        sumus.Population(range(5), lambda client: 1 / (client - 3))[3]


def test_a_sample_has_no_one_twice_and_everyone_now_and_then() -> None:
    people = sumus.Population(range(20), lambda client: None)
    draws = [sample(people, 5, generator(0, number)) for number in range(400)]
    assert all(len(set(draw)) == 5 for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=20)
    assert counts.min() > 60  # expected 100, standard deviation 8.7
    assert counts.max() < 140


def test_a_torch_dataset_is_a_client_too() -> None:
    inputs, targets = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    task = sumus.Task(lambda: nn.Linear(3, 2), sumus.losses.cross_entropy)
    algorithm = sumus.fedavg(sumus.sgd(lr=0.1))
    from_dataset = sumus.simulate(task, algorithm, {"a": TensorDataset(inputs, targets)}, rounds=2)
    from_pair = sumus.simulate(task, algorithm, {"a": (inputs, targets)}, rounds=2)
    assert from_dataset.model_sha256 == from_pair.model_sha256


def test_a_list_of_pairs_is_a_data_set_however_long_it_is() -> None:
    inputs, targets = torch.randn(2, 3), torch.tensor([0, 1])
    task = sumus.Task(lambda: nn.Linear(3, 2), sumus.losses.cross_entropy)
    algorithm = sumus.fedavg(sumus.sgd(lr=0.1))
    from_list = sumus.simulate(task, algorithm, {"a": [(inputs[0], 0), (inputs[1], 1)]}, rounds=1)
    from_pair = sumus.simulate(task, algorithm, {"a": [inputs, targets]}, rounds=1)
    assert from_list.model_sha256 == from_pair.model_sha256


def test_items_of_a_torch_dataset_are_read_when_their_client_is_picked() -> None:
    items = Items()
    people = sumus.Population.from_dataset(items, by=["b", "a", "b", "a", "c", "b"])
    assert list(people) == ["a", "b", "c"]
    bob = people["b"]
    assert items.read == []
    inputs, targets = zip(*(bob[index] for index in range(len(bob))), strict=True)
    assert items.read == [0, 2, 5]
    np.testing.assert_array_equal(np.stack(inputs), items.inputs[[0, 2, 5]])
    assert targets == (0, 0, 1)


def test_a_torch_dataset_trains_like_its_arrays() -> None:
    by = [2, 1, 2, 1, 2, 2]
    arrays = sumus.Population.from_arrays(Items().inputs, np.arange(6) % 2, by)
    assert learned(sumus.Population.from_dataset(Items(), by)) == learned(arrays)


def test_a_hugging_face_dataset_splits_by_a_column_or_by_an_array() -> None:
    inputs, by = Items().inputs, ["b", "a", "b", "a", "b", "b"]
    found = hugging_face({"x": inputs.tolist(), "label": [0, 1, 0, 1, 0, 1], "who": by, "unused": ["text"] * 6})
    people = sumus.Population.from_hugging_face(found, "x", "label", by="who")
    assert list(people) == ["a", "b"]
    held, labels = people["b"]
    np.testing.assert_array_equal(held, inputs[[0, 2, 4, 5]])
    assert labels.tolist() == [0, 0, 0, 1]
    arrays = sumus.Population.from_arrays(inputs, np.arange(6) % 2, by)
    by_array = sumus.Population.from_hugging_face(found, "x", "label", by=np.array(by))
    assert learned(people) == learned(by_array) == learned(arrays)


def test_rows_of_a_hugging_face_dataset_stay_what_its_order_says() -> None:
    found = hugging_face({"x": [10.0, 11.0, 12.0, 13.0], "label": [0, 1, 2, 3], "who": ["a", "a", "b", "b"]})
    turned = found.select([3, 0, 2])
    people = sumus.Population.from_hugging_face(turned, "x", "label", by="who")
    assert {client: labels.tolist() for client, (_, labels) in people.items()} == {"a": [0], "b": [3, 2]}
    assert people["b"][0].tolist() == [13.0, 12.0]


def test_several_columns_become_the_last_axis() -> None:
    found = hugging_face({"height": [1.0, 2.0, 3.0], "age": [4.0, 5.0, 6.0], "label": [0, 1, 0]})
    people = sumus.Population.from_hugging_face(found, ["age", "height"], "label", by=[7, 8, 7])
    assert people[7][0].tolist() == [[4.0, 1.0], [6.0, 3.0]]
    assert people[8][0].tolist() == [[5.0, 2.0]]


@pytest.mark.parametrize("format", [None, "numpy"])
def test_double_precision_stays_what_it_is(format: str | None) -> None:
    """Of inputs, of targets, and of a key: two clients that single precision would take for one."""
    near = 1.0 + 2.0**-40
    columns = {"x": [0.1, 0.2, 0.3], "y": [near, 1.0, 1 / 3], "wide": [[near] * 2, [0.1] * 2, [0.2] * 2]}
    found = hugging_face({**columns, "who": [near, 1.0, near]}).with_format(format)
    people = sumus.Population.from_hugging_face(found, ["x", "y"], "wide", by="who")
    assert list(people) == [1.0, near]
    inputs, targets = people[near]
    assert (inputs.dtype, targets.dtype) == (np.float64, np.float64)
    assert inputs.tolist() == [[0.1, near], [0.3, 1 / 3]]
    assert targets.tolist() == [[near] * 2, [0.2] * 2]


@pytest.mark.parametrize(
    ("inputs", "targets", "by"),
    [("y", "label", "who"), (["x", "y"], "label", "who"), ("x", "y", "who"), ("x", "x", "y")],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(inputs: Any, targets: str, by: str) -> None:
    found = hugging_face({"x": [1.0], "label": [0], "who": ["a"]})
    with pytest.raises(sumus.ExperimentError, match="the data set has no column 'y'; it has x, label, who"):
        sumus.Population.from_hugging_face(found, inputs, targets, by=by)
    with pytest.raises(sumus.ExperimentError, match=r"by= has shape \(2,\) for 1 examples"):
        sumus.Population.from_hugging_face(found, "x", "label", by=["a", "b"])


# ── a picture ────────────────────────────────────────────────────────────────────────────────────────────────────────


def pixels(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its head."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:])
    return width, height


def test_a_picture_shows_the_first_clients_and_reads_only_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'sumus[report]'")
    read: list[int] = []

    def load(client: int) -> tuple[np.ndarray, np.ndarray]:
        read.append(client)
        return np.zeros((client + 1, 2)), np.arange(client + 1) % 3

    people = sumus.Population(range(1_000_000), load)
    few, many = (pixels(people.plot(tmp_path / f"{count}.png", clients=count)) for count in (4, 40))
    assert sorted(set(read)) == list(range(40))
    assert 600 < few[0] == many[0] < 1600
    assert 100 < few[1] < many[1] < 2000


@pytest.mark.parametrize(
    "targets",
    [np.linspace(0, 1, 6), np.eye(6), np.arange(6) * 1000, np.array([True, False] * 3), torch.arange(6)],
    ids=["floats", "vectors", "sparse labels", "booleans", "tensors"],
)
def test_targets_of_any_kind_have_a_picture(tmp_path: Path, targets: Any) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'sumus[report]'")
    people = sumus.Population.from_arrays(np.zeros((6, 2)), targets, by=[0, 0, 0, 1, 1, 2])
    assert min(pixels(people.plot(tmp_path / "people.png"))) > 100


def test_the_items_of_a_torch_dataset_have_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'sumus[report]'")
    people = sumus.Population.from_dataset(Items(), by=[0, 0, 0, 1, 1, 2])
    assert min(pixels(people.plot(tmp_path / "people.png"))) > 100


def test_a_list_of_pairs_has_the_picture_of_its_arrays(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'sumus[report]'")
    labels = {"alice": [0, 1, 1], "bob": [2, 0]}  # two pairs are no (inputs, targets)
    pairs = sumus.Population(labels, lambda client: [(np.ones(2), label) for label in labels[client]])
    arrays = sumus.Population(labels, lambda client: (np.ones((len(labels[client]), 2)), np.array(labels[client])))
    one, other = (people.plot(tmp_path / name).read_bytes() for name, people in (("a.png", pairs), ("b.png", arrays)))
    assert one == other


@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("classes", [10, 20])
def test_a_picture_of_few_clients_is_high_enough_for_the_names_of_many_classes(
    tmp_path: Path, clients: int, classes: int
) -> None:
    """Beside the bars every class has its colour, and nothing was cut off above or below."""
    matplotlib = pytest.importorskip("matplotlib", reason="pip install 'sumus[report]'")
    labels = np.arange(20 * classes) % classes
    people = sumus.Population.from_arrays(np.zeros(len(labels)), labels, sumus.splits.iid(len(labels), clients))
    path = people.plot(tmp_path / "people.png")
    image = importlib.import_module("matplotlib.image").imread(path)[:, :, :3]
    beside = image[:, int(0.93 * image.shape[1]) :]
    for colour in matplotlib.colormaps[f"tab{classes}"].colors:
        assert (np.abs(beside - colour).max(axis=2) < 0.01).sum() > 50
    assert (beside[[0, -1]] == 1).all()


class Streamed:
    """A data set without a length, as Hugging Face streams it."""

    column_names = ("x", "label", "who")


EMPTY: dict[str, tuple[Any, str]] = {
    "arrays": (lambda: sumus.Population.from_arrays(np.zeros((0, 4)), np.zeros(0), by=[]), "no examples"),
    "lists": (lambda: sumus.Population.from_arrays([], [], by=[]), "no examples"),
    "one number": (lambda: sumus.Population.from_arrays(3.0, 1, by=[]), "one row per example"),
    "a generator": (
        lambda: sumus.Population.from_arrays((row for row in "ab"), [0, 1], by=[0, 1]),
        "one row per example",
    ),
    "a torch data set": (
        lambda: sumus.Population.from_dataset(TensorDataset(torch.zeros(0, 4), torch.zeros(0)), by=[]),
        "no examples",
    ),
    "a streamed data set": (
        lambda: sumus.Population.from_hugging_face(Streamed(), "x", "label", by="who"),
        "a streamed data set .Streamed. has no length.*streaming=True",
    ),
    "splits": (
        lambda: sumus.Population.from_hugging_face({"train": Streamed()}, "x", "label", by="who"),
        r"choose one, such as dataset\['train'\]",
    ),
}


@pytest.mark.parametrize("what", EMPTY)
def test_what_has_no_examples_or_no_rows_by_number_is_refused(what: str) -> None:
    make, words = EMPTY[what]
    with pytest.raises(sumus.ExperimentError, match=words):
        make()


def test_a_hugging_face_data_set_without_rows_is_refused() -> None:
    found = hugging_face({"x": [[0.0]], "label": [0], "who": ["a"]}).select([])
    with pytest.raises(sumus.ExperimentError, match="no examples"):
        sumus.Population.from_hugging_face(found, "x", "label", by="who")
