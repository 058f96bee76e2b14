"""Whatever a caller asks, in whatever order: with the owner's policy closed, no answer depends on the owner's numbers.

Random programs run at two workers that differ in nothing but these numbers (`benchmarks/virtual_privacy.py`, which runs 20,000).
Workers with leaks that were there once, and one that is open, are told apart, so the programs do reach what must be hidden.
"""

import random
from collections.abc import Iterator

import pytest
import torch

from benchmarks.virtual_privacy import BYTES, ONE, PLANTED, TWO, TellsApart, look, transcript

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
"""torch warns of what random programs do, such as losses of shapes that differ."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of four elements are no work for several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_no_answer_depends_on_private_numbers() -> None:
    total = look(500, derandomize=True)
    assert total.done > total.asked / 4, "programs do something"


@pytest.mark.parametrize("leak", PLANTED)
def test_a_planted_leak_is_found(leak: str) -> None:
    with pytest.raises(TellsApart):
        look(300, leak, derandomize=True)


def test_an_open_worker_is_told_apart() -> None:
    program = random.Random(0).randbytes(BYTES)
    assert transcript(ONE, program, "all").answers != transcript(TWO, program, "all").answers
