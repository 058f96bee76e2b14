"""Isolates users' code that runs between training steps, so that its changes to torch's global state do not affect training."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from sumus.training.program import seeded


class TorchApart:
    """Torch's global state for code that runs outside training. Its random generator continues from one use to the
    next."""

    def __init__(self) -> None:
        self._randomness: Any = None

    @contextmanager
    def entered(self) -> Generator[None, None, None]:
        """Run the code in the block, then restore the random state, the gradient mode, the number of threads and the
        default dtype."""
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
