"""What one local step costs in memory, counted from the tensors that it keeps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sumus.training.program import Program
from sumus.work import ClientWork


@dataclass(frozen=True)
class Cost:
    """Bytes of one local step, by what holds them. The sum is a lower bound: the framework itself comes on top."""

    model: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.model + self.gradients + self.optimizer + self.activations


def cost_of(program: Program, work: ClientWork, inputs: Tensor, targets: Tensor) -> Cost:
    """Count one step on a batch of these examples, as large as the work's batches."""
    size = min(work.batch_size or len(inputs), len(inputs))
    own = {tensor.data_ptr() for tensor in program.tensors.values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nelement() * tensor.element_size()
        return tensor

    program.module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        program.losses(inputs[:size], targets[:size])
    trained = _bytes(*program.trained.values())
    slots = sum(_bytes(*work.optimizer.init(param.detach())) for param in program.trained.values())
    return Cost(_bytes(*program.tensors.values()), trained, slots, sum(kept.values()))


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nelement() * tensor.element_size() for tensor in tensors)
