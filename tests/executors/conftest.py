"""Torch on one thread, as the simulator runs it."""

from collections.abc import Iterator

import pytest

from sumus.training.program import one_thread


@pytest.fixture(autouse=True)
def single_threaded() -> Iterator[None]:
    with one_thread():
        yield
