"""Randomness inside models (dropout), keyed: the same numbers in every executor, however clients are dealt or stacked.

The `call`-th random operator of a client's `step` gets uniform numbers of its own stream, keyed by (client's key, step,
call), in the shape of its tensor. Rows that pad a batch come last, and so change no other row's numbers. Where a model
draws what is not listed here, it keeps torch's generator, seeded by the client's key, and trains sequentially.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sumus.rng import generator

_aten = torch.ops.aten


@dataclass(frozen=True)
class NoiseShape:
    """What a random operator wants: uniform numbers in [0, 1), or standard normal ones, of this shape."""

    normal: bool
    shape: tuple[int, ...]

    def numbers(self, key: bytes, step: int, call: int) -> np.ndarray:
        """float32, for a client's step (from 1) and the number of the call in it (from 0)."""
        rng = generator(key, "noise", step, call)
        return rng.standard_normal(self.shape, np.float32) if self.normal else rng.random(self.shape, np.float32)


@dataclass(frozen=True)
class Random:
    """How a random operator is made of noise.

    normal: whether it wants normal numbers.  make: (noise, its arguments) → what it gives, in operators that trace.
    """

    normal: bool
    make: Callable[..., Any]


def _bernoulli(noise: Tensor, like: Tensor, p: float = 0.5, **_: Any) -> Tensor:
    return (noise < p).to(like.dtype)


def _bernoulli_by(noise: Tensor, chances: Tensor, **_: Any) -> Tensor:
    return (noise.to(chances.dtype) < chances).to(chances.dtype)


def _dropout(noise: Tensor, values: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    """The rule of `_bernoulli`, by which torch's own dropout on a CPU keeps units, and that dropout's arithmetic: a unit is
    kept where noise < 1 − p, and multiplied by 1 / (1 − p) in the values' dtype."""
    share = 1.0 - p if train in (None, True) else 1.0
    kept = noise < share
    return values * (kept.to(values.dtype) / (share or 1.0)), kept


def dropout_gradient(grad: Tensor, kept: Tensor, scale: float) -> Tensor:
    """What dropout passes back. scale: 1 / (1 − p), or 0 where nothing is kept."""
    return grad * (kept.to(grad.dtype) / (1.0 / scale if scale else 1.0))


def _uniform(noise: Tensor, like: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return (low + (high - low) * noise).to(like.dtype)


def _normal(noise: Tensor, like: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return (mean + std * noise).to(like.dtype)


def _like(noise: Tensor, like: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return noise.to(dtype or like.dtype)


def _sized(noise: Tensor, size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return noise.to(dtype or torch.get_default_dtype())


KEYED: dict[Any, Random] = {
    _aten.bernoulli_.float: Random(False, _bernoulli),
    _aten.bernoulli.p: Random(False, _bernoulli),
    _aten.bernoulli.default: Random(False, _bernoulli_by),
    _aten.native_dropout.default: Random(False, _dropout),
    _aten.uniform_.default: Random(False, _uniform),
    _aten.normal_.default: Random(True, _normal),
    _aten.uniform.default: Random(False, _uniform),  # this and the next: their forms in a functional graph
    _aten.normal_functional.default: Random(True, _normal),
    _aten.rand_like.default: Random(False, _like),
    _aten.randn_like.default: Random(True, _like),
    _aten.rand.default: Random(False, _sized),
    _aten.randn.default: Random(True, _sized),
}
"""The random operators that noise stands in for."""


def is_random(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an aten operator draws numbers when it is called so: fused attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(operator, "tags", ()):
        return False
    names = [argument.name for argument in operator._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return not any(name in names and not given.get(name, 0.0) for name in ("dropout_p", "dropout"))


class Interception(TorchDispatchMode):
    """A dispatch mode without torch's compiler, whose import alone would take a second."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class KeyedNoise(Interception):
    """While it is entered, one step's random operators get a client's noise. calls: how many there were."""

    def __init__(self, key: bytes, step: int) -> None:
        super().__init__()
        self._key, self._step = key, step
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        random = KEYED.get(func)
        if random is None:
            return func(*args, **kwargs)
        first = args[0]
        shape, device = (
            (tuple(first.shape), first.device)
            if isinstance(first, Tensor)
            else (tuple(first), torch.device(kwargs.get("device") or "cpu"))
        )
        numbers = NoiseShape(random.normal, shape).numbers(self._key, self._step, self.calls)
        self.calls += 1
        kwargs.pop("generator", None)
        made = random.make(torch.from_numpy(numbers).to(device), *args, **kwargs)
        return first.copy_(made) if func._schema.is_mutable else made


class RandomOperatorWatch(Interception):
    """Notes which random operators run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.unkeyed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_random(func, args, kwargs or {}):
            self.seen.append(str(func))
            if func not in KEYED:
                self.unkeyed.append(str(func))
        return func(*args, **(kwargs or {}))
