"""No way of training a model with state of its own gives another result without a word. 2,000 draws: `python -m
benchmarks.hidden_state`; here `SUMUS_STATE_DRAWS`, 100 without it."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.hidden_state import FEATURES, PLANTED, WAYS, difference, second_process, trained
from sumus.training.hidden import HiddenState

OTHERS = [way for way in WAYS if way != "autograd"]


@pytest.fixture(scope="module", autouse=True)
def two_processes() -> Iterator[None]:
    with second_process():
        yield


@settings(max_examples=int(os.environ.get("SUMUS_STATE_DRAWS", "100")))
@given(st.lists(st.sampled_from(list(FEATURES)), max_size=3, unique=True), st.sampled_from(OTHERS))
def test_no_pair_of_ways_differs_without_a_word(features: list[str], way: str) -> None:
    plain = trained(features, "autograd")
    assert difference(features, way, plain, trained(features, way)) is None


@pytest.mark.parametrize("planted", PLANTED)
def test_each_planted_kind_is_said_or_refused(planted: str) -> None:
    found = trained([planted], "autograd")
    assert found.refused or any("changes while the code runs" in note for note in found.notes)


@pytest.mark.parametrize(
    "planted", ["late state", "a loss's closure", "a loss's bound method", "a gradient's hook that counts"]
)
def test_a_look_that_sees_nothing_is_found_out(planted: str) -> None:
    with mock.patch.object(HiddenState, "changed", return_value=[]):
        plain = trained([planted], "autograd")
        assert difference([planted], "resumed", plain, trained([planted], "resumed")) is not None
