"""What a user's code beside training does to torch is its own: training does not see it, and goes on as if it had not been."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from sumus.training.program import seeded


class TorchApart:
    """Torch as code beside training sees it: with randomness of its own, which goes on from one time to the next."""

    def __init__(self) -> None:
        self._randomness: Any = None

    @contextmanager
    def entered(self) -> Generator[None, None, None]:
        """Randomness, gradients, threads and the default dtype are given back as they were."""
        threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
        with seeded(0), torch.set_grad_enabled(True):
            if self._randomness is not None:
                torch.set_rng_state(self._randomness)
            try:
                yield
            finally:
                self._randomness = torch.get_rng_state()
                torch.set_num_threads(threads)
                torch.set_default_dtype(dtype)
