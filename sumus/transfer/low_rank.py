"""Adapters: a layer keeps its weight W, and learns the product of two small matrices that is added to it.

    y = W x + s · B (A x)              A: (rank, in), B: (out, rank), s = alpha / rank

B begins at zero, so a model with new adapters computes what it did before. [LoRA: Hu et al. 2021, arXiv:2106.09685]

With `freeze_a`, only B is trained. Then the mean of the clients' products is the product of the means, which is not so if both
change: mean(B A) ≠ mean(B) mean(A). [FFA-LoRA: Sun et al. 2024, arXiv:2403.12313]

A is drawn from the layer's name, and not from a generator: every process that makes the model has the same A.
"""

import copy
import fnmatch
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sumus.errors import TaskError
from sumus.task import Role

Net = TypeVar("Net", bound=nn.Module)

A, B = "lora_a", "lora_b"
"""The names of a layer's two factors."""


class LowRank(nn.Module):
    """A layer with an adapter. Its weight W is frozen.

    Attributes:
        lora_a: A.
        lora_b: B.
        scale: s.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float

    def product(self, shape: torch.Size) -> Tensor:
        """Return s · B A in float64, in the shape of the weight."""
        a, b = self.lora_a.detach().double(), self.lora_b.detach().double()
        return self.scale * (b.flatten(1) @ a.flatten(1)).reshape(shape)


class LowRankLinear(LowRank, nn.Linear):
    """A linear layer with an adapter."""

    def forward(self, input: Tensor) -> Tensor:
        low = functional.linear(functional.linear(input, self.lora_a), self.lora_b)
        return super().forward(input) + self.scale * low


class _LowRankConvolution(LowRank):
    """A convolution with an adapter. A is a convolution to `rank` channels, and B has the kernel size 1."""

    def forward(self, input: Tensor) -> Tensor:
        convolve = cast(Any, self)._conv_forward
        low = convolve(input, self.lora_a, None)
        apply = functional.conv1d if self.lora_b.dim() == 3 else functional.conv2d
        return super().forward(input) + self.scale * apply(low, self.lora_b)


class LowRankConv1d(_LowRankConvolution, nn.Conv1d):
    """A convolution over one axis, with an adapter."""


class LowRankConv2d(_LowRankConvolution, nn.Conv2d):
    """A convolution over two axes, with an adapter."""


class LowRankEmbedding(LowRank, nn.Embedding):
    """An embedding with an adapter. A is (rank, embedding), and B is (rows, rank)."""

    def forward(self, input: Tensor) -> Tensor:
        low = functional.embedding(input, self.lora_b, self.padding_idx) @ self.lora_a
        return super().forward(input) + self.scale * low


KINDS: dict[type[nn.Module], type[LowRank]] = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Embedding: LowRankEmbedding,
}
"""The layers that can have an adapter. A subclass of them may not call `forward`, or may do something else there."""


def adapters(
    module: Net,
    rank: int,
    targets: str | Sequence[str],
    freeze_a: bool = True,
    train: str | Sequence[str] = (),
    alpha: float | None = None,
) -> Net:
    """Give layers of a module adapters, and freeze everything else.

    Args:
        module: The module. It is changed in place.
        rank: The rank of the products, at least 1 and below both sides of each weight.
        targets: Shell-style patterns of the names of layers, such as "encoder.*". Layers of other kinds that match are
            left as they are.
        freeze_a: Whether only B is trained.
        train: Shell-style patterns of the names of parameters or layers that are trained whole, such as "head".
        alpha: The products are multiplied by alpha / rank; None for a factor of 1.

    Returns:
        The same module. Its parameters without `requires_grad` are frozen in a task.

    Raises:
        TaskError: The rank is too high, or a pattern matches no layer that can have an adapter. The module has not changed.
    """
    chosen = _layers(module, [targets] if isinstance(targets, str) else list(targets))
    if rank < 1 or (alpha is not None and not 0 < alpha < math.inf):
        raise TaskError(f"rank={rank} and alpha={alpha}: give a rank of at least 1, and an alpha above 0")
    scale = 1.0 if alpha is None else alpha / rank
    for name, layer in chosen.items():
        lowest = min(_sides(layer))
        if rank >= lowest:
            raise TaskError(
                f"rank={rank} is no low rank for `{name}`, whose weight has the rank {lowest}: lower rank=, or leave the layer "
                "out of targets= and name it in train="
            )
    whole = _parameters(module, [train] if isinstance(train, str) else list(train))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for name, layer in chosen.items():
        _adapt(name, layer, rank, scale, freeze_a)
    for parameter in whole:
        parameter.requires_grad_(True)
    return module


def adapter_leaves(module: nn.Module) -> dict[str, Role]:
    """Return the roles of a module's leaves for `Task(leaves=)`: shared if the leaf is trained, and frozen otherwise.

    Args:
        module: A module of `adapters`, or a PEFT model as it is. Running statistics are frozen too.

    Raises:
        TaskError: No parameter is trained.
    """
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trained:
        raise TaskError("no parameter of the module has requires_grad=True: there is nothing to train")
    return {"*": "frozen", **{_escaped(name): "shared" for name in trained}}


def merged(module: Net) -> Net:
    """Return a copy of a module in which each product is added to its weight: plain layers, with the names of before.

    All parameters of the copy are trained, as those of a new module.
    """
    plain = copy.deepcopy(module)
    for layer in list(plain.modules()):
        if isinstance(layer, LowRank):
            weight = cast(Tensor, layer.weight)
            with torch.no_grad():
                weight.copy_(weight.double() + layer.product(weight.shape))
            kind = next(kind for kind, adapted in KINDS.items() if type(layer) is adapted)
            for name in (A, B, "scale"):
                delattr(layer, name)
            cast(Any, layer).__class__ = kind
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    return plain


def _layers(module: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    """Return the layers that get an adapter, by name."""
    able = {name: layer for name, layer in module.named_modules() if type(layer) in KINDS}
    owners: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if owners.setdefault(id(parameter), name) != name:
            owners[id(parameter)] += f"` and `{name}"
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns or [""]:
        found = [name for name in able if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            if any(
                isinstance(layer, LowRank) and fnmatch.fnmatchcase(name, pattern)
                for name, layer in module.named_modules()
            ):
                raise TaskError(f"targets={pattern!r}: these layers have adapters already; use `merged` first")
            raise TaskError(
                f"targets={pattern!r} matches no Linear, Conv1d, Conv2d or Embedding: give a pattern of "
                f"{', '.join(able) or 'these; the module has none'}"
            )
        chosen |= {name: able[name] for name in found}
    for name, layer in chosen.items():
        shared = owners[id(layer.weight)]
        if "`" in shared:
            raise TaskError(
                f"`{shared}` are one tensor: leave `{name}` out of targets=, since only one of them would change"
            )
        if getattr(layer, "groups", 1) != 1:
            raise TaskError(
                f"`{name}` is a convolution in groups, which has no product of two factors: leave it out of targets="
            )
    return chosen


def _parameters(module: nn.Module, patterns: list[str]) -> list[nn.Parameter]:
    """Return the parameters that are trained whole."""
    named = dict(module.named_parameters())
    found: list[nn.Parameter] = []
    for pattern in patterns:
        matched = [
            parameter
            for name, parameter in named.items()
            if fnmatch.fnmatchcase(name, pattern) or any(fnmatch.fnmatchcase(layer, pattern) for layer in _above(name))
        ]
        if not matched:
            raise TaskError(
                f"train={pattern!r} matches no parameter and no layer: give a pattern of {', '.join(named)}"
            )
        found += matched
    return found


def _above(name: str) -> Iterator[str]:
    """Yield the names of the layers that hold a parameter, the closest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _sides(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of rows and columns of a layer's weight, seen as a matrix."""
    weight = cast(Tensor, layer.weight)
    return len(weight), weight[0].numel()


def _adapt(name: str, layer: nn.Module, rank: int, scale: float, freeze_a: bool) -> None:
    """Give a layer its factors, and the class that uses them."""
    weight = cast(Tensor, layer.weight)
    rows, columns = _sides(layer)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
    bound = columns**-0.5  # as in LoRA's own code: Kaiming's uniform distribution with a = √5
    drawn = torch.rand((rank, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = ((2 * drawn - 1) * bound).reshape(rank, *weight.shape[1:])
    b = torch.zeros(rows, rank, *([1] * (weight.dim() - 2)))
    layer.register_parameter(A, nn.Parameter(a.to(weight.dtype).to(weight.device), requires_grad=not freeze_a))
    layer.register_parameter(B, nn.Parameter(b.to(weight.dtype).to(weight.device)))
    adapted = cast(Any, layer)
    adapted.scale = scale
    adapted.__class__ = KINDS[type(layer)]


def _escaped(name: str) -> str:
    """Return a pattern that matches a name and no other."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
