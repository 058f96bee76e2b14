"""The cost of one local step: memory, counted from the tensors that it keeps, and arithmetic, counted from its
products."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sumus.training.noise import Interception
from sumus.training.program import Program, seeded
from sumus.work import ClientWork

_aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """The memory of one local step in bytes, by purpose. The sum is a lower bound, since it leaves out the memory of the
    framework itself."""

    model: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all four fields."""
        return self.model + self.gradients + self.optimizer + self.activations


def cost_of(program: Program, work: ClientWork, inputs: Tensor, targets: Tensor) -> Cost:
    """Count the memory of one step on a batch of these examples. The batch has the size that the work sets.

    If the user's own code trains, only the memory of the model is known.
    """
    if work.loop is not None:
        return Cost(_bytes(*program.tensors.values()), 0, 0, 0)
    size = min(work.batch_size or len(inputs), len(inputs))
    own = {tensor.data_ptr() for tensor in program.tensors.values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nelement() * tensor.element_size()
        return tensor

    with _tried(program), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        program.losses(inputs[:size].clone(), targets[:size].clone())
    trained = _bytes(*program.trained.values())
    slots = sum(_bytes(*work.optimizer.init(param.detach())) for param in program.trained.values())
    return Cost(_bytes(*program.tensors.values()), trained, slots, sum(kept.values()))


def step_flops(program: Program, inputs: Tensor, targets: Tensor) -> float:
    """Return the floating-point operations of a local step for one example.

    Their number is three times that of the products in the forward pass; a multiply-add counts as two operations.
    """
    with _tried(program), torch.no_grad(), _Products() as counted:
        program.losses(inputs[:2].clone(), targets[:2].clone())
    return 3 * counted.flops / min(2, len(inputs))


@contextmanager
def _tried(program: Program) -> Generator[None, None, None]:
    """Let the block run a forward pass, then restore the leaves and the random generator."""
    before = {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
    program.module.train()
    with seeded(0):
        yield
    program.load(before)


class _Products(Interception):
    """Counts the operations of matrix products, convolutions and fused recurrent layers while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (_aten.mm.default, _aten.bmm.default):
            self.flops += 2 * result.nelement() * args[0].shape[-1]
        elif func in (_aten.addmm.default, _aten.baddbmm.default):
            self.flops += 2 * result.nelement() * args[1].shape[-1]
        elif func is _aten.convolution.default:  # weight: (out, in, *space); transposed: (in, out, *space)
            moved = args[0] if args[6] else result
            self.flops += 2 * moved.nelement() * math.prod(args[1].shape[1:])
        elif func is _aten.mkldnn_rnn_layer.default:  # (sequence, batch, features), and both weights
            self.flops += 2 * math.prod(args[0].shape[:2]) * (args[1].nelement() + args[2].nelement())
        return result


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nelement() * tensor.element_size() for tensor in tensors)
