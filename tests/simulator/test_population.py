"""Clients are read only when they are picked, and are who they say."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import sumus
from sumus.rng import generator
from sumus.simulator.population import sample


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
    with pytest.raises(sumus.ExperimentError, match="client id .* is given twice"):
        sumus.Population(ids, lambda client: None)
    with pytest.raises(sumus.ExperimentError, match="is given twice"):
        sumus.Population.from_pairs([(client, None) for client in ids])


def test_arrays_split_by_a_key_and_keep_their_order() -> None:
    inputs, targets = np.arange(6.0)[:, None], np.arange(6)
    people = sumus.Population.from_arrays(inputs, targets, by=["b", "a", "b", "a", "a", "b"])
    assert list(people) == ["a", "b"]
    assert people["a"][1].tolist() == [1, 3, 4]
    assert people["b"][0][:, 0].tolist() == [0, 2, 5]


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(sumus.ExperimentError, match="have 2, 2 and 3 rows"):
        sumus.Population.from_arrays(np.zeros((2, 1)), np.zeros(2), by=[1, 2, 3])


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
