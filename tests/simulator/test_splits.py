"""Splits deal every example once, leave nobody empty, and are as skewed as they were asked to be."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sumus
from sumus import splits
from sumus.types import Array

LABELS = np.random.default_rng(0).integers(0, 10, 5000)
SPLITS: dict[str, Callable[[int], Array]] = {
    "iid": lambda seed: splits.iid(5000, 100, seed),
    "quantity": lambda seed: splits.quantity(5000, 100, 0.5, seed),
    "dirichlet": lambda seed: splits.dirichlet(LABELS, 100, 0.3, seed),
    "shards": lambda seed: splits.shards(LABELS, 100, 2, seed),
}


def sizes(by: Array, clients: int) -> Array:
    """How many examples each client holds; every example has one client, and every client is known."""
    assert by.dtype == np.int64
    assert by.min() >= 0
    counts = np.bincount(by, minlength=clients)
    assert counts.shape == (clients,)
    return counts


def alphas() -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from([1e-300, 1e-9, 1e9, 1e300]), st.floats(1e-3, 1e3))


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_is_its_seeds_and_no_other(name: str) -> None:
    make = SPLITS[name]
    np.testing.assert_array_equal(make(3), make(3))
    assert (make(3) != make(4)).mean() > 0.5
    assert (sizes(make(3), 100) > 0).all()


@given(st.integers(1, 60), st.integers(0, 200), st.integers(0, 9))
def test_equal_shares_differ_by_one_example_at_most(clients: int, more: int, seed: int) -> None:
    by = splits.iid(clients + more, clients, seed)
    assert len(by) == clients + more
    assert np.ptp(sizes(by, clients)) <= 1


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 100), alphas(), st.integers(0, 9))
def test_unequal_shares_leave_everyone_what_they_must_hold(
    clients: int, at_least: int, more: int, alpha: float, seed: int
) -> None:
    by = splits.quantity(clients * at_least + more, clients, alpha, seed, at_least)
    assert len(by) == clients * at_least + more
    assert sizes(by, clients).min() >= at_least


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 100), st.integers(1, 12), alphas(), st.integers(0, 9))
def test_skewed_labels_leave_everyone_what_they_must_hold(
    clients: int, at_least: int, more: int, classes: int, alpha: float, seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, clients * at_least + more)
    by = splits.dirichlet(labels, clients, alpha, seed, at_least)
    assert by.shape == labels.shape
    assert sizes(by, clients).min() >= at_least


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 100), st.integers(1, 12), st.integers(0, 9))
def test_shards_are_equal_and_of_neighbouring_classes(
    clients: int, per_client: int, more: int, classes: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, clients * per_client + more)
    by = splits.shards(labels, clients, per_client, seed)
    assert by.shape == labels.shape
    assert np.ptp(sizes(by, clients)) <= per_client  # whose every shard may hold one example more
    borders = len(np.unique(labels)) - 1  # each lies within one shard at most, and adds a class to it
    kinds = [len(np.unique(labels[by == client])) for client in range(clients)]
    assert sum(kinds) <= clients * per_client + borders


def test_with_two_shards_clients_see_two_classes() -> None:
    """Where classes end at the ends of shards, that is exact."""
    labels = np.repeat(np.arange(10), 600)
    by = splits.shards(labels, 100, 2)
    kinds = [len(np.unique(labels[by == client])) for client in range(100)]
    assert max(kinds) == 2
    assert np.mean(kinds) > 1.8
    np.testing.assert_array_equal(sizes(by, 100), 60)


def test_the_smaller_alpha_the_more_skewed() -> None:
    def skew(alpha: float) -> float:
        """The mean distance between a client's shares of classes and everyone's, 0 to 1."""
        by = splits.dirichlet(LABELS, 50, alpha)
        shares = np.array(
            [np.bincount(LABELS[by == client], minlength=10) / (by == client).sum() for client in range(50)]
        )
        return float(np.abs(shares - np.bincount(LABELS) / len(LABELS)).sum(axis=1).mean() / 2)

    def spread(alpha: float) -> float:
        return float(np.std(sizes(splits.quantity(5000, 50, alpha), 50)))

    for measure in (skew, spread):
        found = [measure(alpha) for alpha in (100.0, 1.0, 0.1)]
        assert found == sorted(found)
    assert skew(100.0) < 0.15
    assert skew(0.05) > 0.7


def test_labels_may_be_words() -> None:
    words = np.array(["cat", "dog"])[LABELS % 2]
    np.testing.assert_array_equal(splits.dirichlet(words, 20, 0.3), splits.dirichlet(LABELS % 2, 20, 0.3))


def test_a_split_makes_a_population() -> None:
    inputs = np.arange(5000.0)[:, None]
    people = sumus.Population.from_arrays(inputs, LABELS, by=splits.dirichlet(LABELS, 100, 0.1))
    assert list(people) == list(range(100))
    dealt = np.concatenate([held[:, 0] for held, _ in people.values()])
    np.testing.assert_array_equal(np.sort(dealt), inputs[:, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: splits.iid(5, 6), "5 examples cannot be dealt to 6 clients with 1 each: lower clients="),
        (lambda: splits.iid(5, 0), "clients=0, at_least=1: both must be 1 or more"),
        (lambda: splits.quantity(10, 4, at_least=3), "10 examples cannot be dealt to 4 clients with 3 each"),
        (lambda: splits.quantity(10, 4, at_least=0), "both must be 1 or more"),
        (lambda: splits.quantity(10, 4, alpha=0.0), "alpha=0.0: give a positive, finite number"),
        (lambda: splits.dirichlet(LABELS, 10, -1.0), "alpha=-1.0: give a positive"),
        (lambda: splits.dirichlet(LABELS, 10, float("inf")), "alpha=inf: give a positive, finite number"),
        (lambda: splits.dirichlet(LABELS, 10, float("nan")), "alpha=nan: give a positive, finite number"),
        (
            lambda: splits.dirichlet(LABELS / 2, 10, 1.0),
            r"labels are float64 of shape \(5000,\); .*iid\(\) or quantity\(\)",
        ),
        (lambda: splits.shards(LABELS.reshape(-1, 2), 10), r"labels are int64 of shape \(2500, 2\)"),
        (lambda: splits.shards(LABELS, 10, per_client=0), "per_client=0: give at least one shard per client"),
        (lambda: splits.shards(LABELS, 3000), "5000 examples cannot be dealt to 3000 clients with 2 each"),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_what_to_change(make: Callable[[], Array], message: str) -> None:
    with pytest.raises(sumus.ExperimentError, match=message):
        make()
