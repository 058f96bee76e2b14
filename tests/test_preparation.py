"""Preparation on the device."""

import numpy as np
import pytest

from sumus import preparation


def test_steps_are_done_in_order() -> None:
    def double(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return inputs * 2, targets

    def plus_one(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return inputs + 1, targets

    inputs, _ = preparation.steps(double, plus_one)(np.array([1.0]), np.array([0]))
    assert inputs.tolist() == [3.0]


def test_examples_with_gaps_are_left_out() -> None:
    inputs = np.array([[1.0, 2.0], [np.nan, 1.0], [3.0, np.inf], [4.0, 5.0]])
    kept, targets = preparation.drop_missing(inputs, np.array([0, 1, 2, 3]))
    assert targets.tolist() == [0, 3]
    assert np.isfinite(kept).all()
    _, numbers = preparation.drop_missing(np.ones((3, 1)), np.array([1.0, np.nan, 2.0]))
    assert numbers.tolist() == [1.0, 2.0]


def test_a_running_estimate_never_looks_ahead() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(20, 16, 3))
    prepare = preparation.standardize_running(prior=2, center=0.5, scale=2.0)
    whole, _ = prepare(inputs, None)
    for count in (1, 7, 19):
        early, _ = prepare(inputs[:count], None)
        np.testing.assert_array_equal(whole[:count], early)


def test_without_a_prior_the_last_example_is_standardised_by_all() -> None:
    inputs = np.random.default_rng(1).normal(loc=3, scale=[1, 5], size=(30, 16, 2))
    prepared, _ = preparation.standardize_running()(inputs, None)
    mean, deviation = inputs.mean((0, 1)), inputs.std((0, 1))
    np.testing.assert_allclose(prepared[-1], (inputs[-1] - mean) / deviation, rtol=1e-5)


def test_features_without_a_time_axis_are_standardised_too() -> None:
    inputs = np.random.default_rng(2).normal(loc=[10, -10], size=(50, 2))
    prepared, _ = preparation.standardize_running(prior=1)(inputs, None)
    assert np.abs(prepared[25:].mean(0)).max() < 0.5


def test_a_large_prior_is_the_public_scale() -> None:
    inputs = np.random.default_rng(3).normal(size=(10, 8, 2))
    running, _ = preparation.standardize_running(prior=1e9, center=0.3, scale=2.0)(inputs, None)
    public, _ = preparation.standardize(0.3, 2.0)(inputs, None)
    np.testing.assert_allclose(running, public, atol=1e-6)


def test_recordings_are_cut_into_windows_with_their_label() -> None:
    recordings = [np.arange(10.0)[:, None], np.arange(3.0)[:, None], np.arange(6.0)[:, None]]
    cut, labels = preparation.windows(length=4, stride=3)(recordings, np.array([7, 8, 9]))
    assert cut[:, :, 0].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [0, 1, 2, 3]]
    assert labels.tolist() == [7, 7, 7, 9]
    with pytest.raises(ValueError, match="as long as a window of 50"):
        preparation.windows(50, 10)(recordings, np.array([7, 8, 9]))
