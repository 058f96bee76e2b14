"""Keyed randomness inside models (dropout): the same numbers in every executor, however clients are distributed or
stacked.

The calls of random operators are numbered within a step. Each call gets numbers in the shape of its tensor, from a stream
that is keyed by (client's key, step, number of the call). These numbers are the client's noise. Rows that pad a batch come
last, so they do not change the numbers of other rows. A model with a random operator that is not listed here uses torch's
generator, seeded by the client's key, and its clients train one after the other.
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
    """The noise that a random operator needs.

    Attributes:
        normal: Whether it needs standard normal numbers; otherwise uniform numbers in [0, 1).
        shape: Their shape.
    """

    normal: bool
    shape: tuple[int, ...]

    def numbers(self, key: bytes, step: int, call: int) -> np.ndarray:
        """Return the float32 numbers for a client's step (from 1) and the number of the call in the step (from 0)."""
        rng = generator(key, "noise", step, call)
        return rng.standard_normal(self.shape, np.float32) if self.normal else rng.random(self.shape, np.float32)


@dataclass(frozen=True)
class Random:
    """The rule that computes a random operator's result from noise.

    Attributes:
        normal: Whether it needs standard normal numbers.
        make: (noise, *arguments of the operator) → the operator's result, in operators that can be traced.
    """

    normal: bool
    make: Callable[..., Any]


def _bernoulli(noise: Tensor, like: Tensor, p: float = 0.5, **_: Any) -> Tensor:
    return (noise < p).to(like.dtype)


def _bernoulli_by(noise: Tensor, chances: Tensor, **_: Any) -> Tensor:
    return (noise.to(chances.dtype) < chances).to(chances.dtype)


def _dropout(noise: Tensor, values: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    """Return dropout's result by the rule of `_bernoulli`, as torch's own dropout on a CPU computes it: a unit is kept
    if noise < 1 − p, and multiplied by 1 / (1 − p) in the values' dtype."""
    share = 1.0 - p if train in (None, True) else 1.0
    kept = noise < share
    return values * (kept.to(values.dtype) / (share or 1.0)), kept


def dropout_gradient(grad: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Return the gradient that dropout passes back. `scale` is 1 / (1 − p), or 0 if no unit is kept."""
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
    _aten.uniform.default: Random(False, _uniform),  # this and the next: the functional forms of the two above
    _aten.normal_functional.default: Random(True, _normal),
    _aten.rand_like.default: Random(False, _like),
    _aten.randn_like.default: Random(True, _like),
    _aten.rand.default: Random(False, _sized),
    _aten.randn.default: Random(True, _sized),
}
"""The random operators whose results are computed from a client's noise."""


def is_random(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an aten operator draws numbers when it is called with these arguments: fused attention without
    dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(operator, "tags", ()):
        return False
    names = [argument.name for argument in operator._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return not any(name in names and not given.get(name, 0.0) for name in ("dropout_p", "dropout"))


class Interception(TorchDispatchMode):
    """A dispatch mode that does not import torch's compiler: the import would take a second."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class KeyedNoise(Interception):
    """A mode in which the random operators of one step get a client's noise.

    Attributes:
        calls: The number of random operators that have run so far.
    """

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
    """Records which random operators run while it is entered.

    Attributes:
        seen: All random operators.
        unkeyed: The random operators that are not in `KEYED`.
    """

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
