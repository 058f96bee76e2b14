"""A fixture for folders of tests that run torch on one thread, as the simulator does. Their `conftest.py` imports it."""

from collections.abc import Iterator

import pytest

from sumus.training.program import one_thread


@pytest.fixture(autouse=True)
def single_threaded() -> Iterator[None]:
    """Run each test with one thread of torch."""
    with one_thread():
        yield
