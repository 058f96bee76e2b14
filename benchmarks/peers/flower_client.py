"""What one of Flower's actors keeps between messages: the data, a module, and the use of one thread."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.torch_models import train_client
from benchmarks.workloads import batches, named


class Held:
    """A workload in an actor."""

    def __init__(self, name: str, clients: int, double: bool) -> None:
        torch.set_num_threads(1)
        self._workload = named(name).only(clients)
        self._pairs = [tuple(map(torch.from_numpy, pair)) for pair in self._workload.examples(double)]
        self._module = self._workload.module(double)

    def train(self, client: int, model: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], int]:
        """Return the client's model after its round, and the number of its examples."""
        inputs, targets = self._pairs[client]
        self._module.load_state_dict(model)
        train_client(self._module, inputs, targets, batches(len(inputs), self._workload.batch), self._workload.lr)
        return self._module.state_dict(), len(inputs)


held = functools.cache(Held)
