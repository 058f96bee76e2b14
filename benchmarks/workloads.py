"""The workloads for timing executors and peers, in numpy alone, so that torch and JAX train on the same numbers.

    w1   62 classes of 28 x 28 pictures: two convolutions with pooling, dense layers     100 clients
    w2   6 classes of 561 features: a perceptron with one small hidden layer             200 clients
    w3   next word of 20: embedding, LSTM, softmax over the vocabulary                    50 clients

Sizes of clients are lognormal. The data are synthetic and can be learnt: class prototypes; a linear teacher; a Markov
chain. All clients take part in every round, with one epoch of plain SGD on the mean loss. The last batch may be short.
The server takes the mean weighted by examples. `named("w1")` is the workload of the tables. `named("w1/7")` is a
variant: the same clients, with widths and depths drawn at random from seed 7. Torch is imported only when a module is
made.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Weights: TypeAlias = dict[str, Array]
"""Leaves by their name in the torch module, in its order and layout, float32."""

SIDE, CLASSES = 28, 62
FEATURES, ACTIVITIES = 561, 6
WORDS = 20


@dataclass(frozen=True)
class Workload:
    """The data and the training of a workload; a subclass has the model.

    Attributes:
        name: Its name.
        clients: The number of clients.
        typical: The median of the lognormal sizes, in examples.
        sigma: The deviation of the sizes' logarithm.
        fewest: The smallest size.
        most: The largest size.
        batch: The batch size of a client's SGD.
        lr: The learning rate of a client's SGD.
    """

    name: str
    clients: int
    typical: float
    sigma: float
    fewest: int
    most: int
    batch: int
    lr: float

    @functools.cached_property
    def sizes(self) -> Array:
        """The number of examples of each client. The first k clients are the same for any number of clients."""
        rng = np.random.default_rng(7)
        sizes = np.exp(rng.normal(np.log(self.typical), self.sigma, self.clients))
        return np.clip(sizes, self.fewest, self.most).astype(int)

    def only(self, clients: int) -> Self:
        """Return the same workload on its first clients."""
        return dataclasses.replace(self, clients=min(clients, self.clients))

    def examples(self, double: bool = False) -> list[tuple[Array, Array]]:
        """Return (inputs, targets) of each client: float32 (with `double` float64) or int64, and int64."""
        rng = np.random.default_rng(11)
        pairs = list(self._examples(rng))
        return [(x.astype(np.float64) if double and x.dtype == np.float32 else x, y) for x, y in pairs]

    def initial(self) -> Weights:
        """Return the global model before the first round."""
        return self._initial(np.random.default_rng(3))

    def module(self, double: bool = False) -> Any:
        """Return a torch module with the initial weights."""
        import torch

        module = self._module()
        module.load_state_dict({name: torch.from_numpy(leaf) for name, leaf in self.initial().items()})
        return module.double() if double else module

    @property
    def parameters(self) -> int:
        """The number of parameters in the model."""
        return sum(leaf.size for leaf in self.initial().values())

    @property
    def steps(self) -> int:
        """The number of client steps of a round."""
        return int(sum(-(-size // self.batch) for size in self.sizes))

    @property
    def flops(self) -> int:
        """The matrix FLOPs of a round, with two for a multiply-add: forward, weight gradients, and the input gradients
        that are needed."""
        return int(self.sizes.sum()) * self._flops_an_example()

    @property
    def shape(self) -> str:
        """The model in a few words."""
        raise NotImplementedError

    def _examples(self, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
        raise NotImplementedError

    def _initial(self, rng: np.random.Generator) -> Weights:
        raise NotImplementedError

    def _module(self) -> Any:
        raise NotImplementedError

    def _flops_an_example(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class Pictures(Workload):
    """W1: two convolutions, each with ReLU and 2 x 2 max-pooling, then dense layers with ReLU, then 62 scores."""

    channels: tuple[int, int] = (32, 64)
    kernel: int = 5
    dense: tuple[int, ...] = (512,)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the dense layers, from input to output."""
        return self.channels[1] * (SIDE // 4) ** 2, *self.dense, CLASSES

    @property
    def shape(self) -> str:
        k = self.kernel
        return f"conv{k}x{k} {self.channels[0]}-{self.channels[1]}, dense {'-'.join(map(str, self.widths))}"

    def _examples(self, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
        prototypes = rng.normal(size=(CLASSES, 7, 7)).astype(np.float32).repeat(4, 1).repeat(4, 2)
        for size in self.sizes:
            y = rng.integers(0, CLASSES, size)
            x = prototypes[y] * 0.5 + rng.normal(size=(size, SIDE, SIDE)) * 0.5 + rng.normal() * 0.1
            yield x[:, None].astype(np.float32), y.astype(np.int64)

    def _initial(self, rng: np.random.Generator) -> Weights:
        weights: Weights = {}
        for number, (before, after) in enumerate(zip((1, self.channels[0]), self.channels, strict=True)):
            fan = before * self.kernel**2
            weights[f"convolutions.{number}.weight"] = _uniform(rng, fan, after, before, self.kernel, self.kernel)
            weights[f"convolutions.{number}.bias"] = _uniform(rng, fan, after)
        return weights | _dense(rng, "dense", self.widths)

    def _module(self) -> Any:
        from benchmarks.torch_models import Convolutional

        return Convolutional(self.channels, self.kernel, self.widths)

    def _flops_an_example(self) -> int:
        first = SIDE**2 * self.channels[0] * self.kernel**2
        second = (SIDE // 2) ** 2 * self.channels[1] * self.channels[0] * self.kernel**2
        return 2 * (2 * first + 3 * (second + sum(_products(self.widths))))


@dataclass(frozen=True)
class Activities(Workload):
    """W2: dense layers with ReLU, then six scores."""

    dense: tuple[int, ...] = (64,)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the layers, from input to output."""
        return FEATURES, *self.dense, ACTIVITIES

    @property
    def shape(self) -> str:
        return f"dense {'-'.join(map(str, self.widths))}"

    def _examples(self, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
        teacher = rng.normal(size=(FEATURES, ACTIVITIES))
        for size in self.sizes:
            x = rng.normal(size=(size, FEATURES)) + rng.normal(size=(1, FEATURES)) * 0.2
            yield x.astype(np.float32), (x @ teacher).argmax(1).astype(np.int64)

    def _initial(self, rng: np.random.Generator) -> Weights:
        return _dense(rng, "dense", self.widths)

    def _module(self) -> Any:
        from benchmarks.torch_models import Perceptron

        return Perceptron(self.widths)

    def _flops_an_example(self) -> int:
        first, *others = _products(self.widths)
        return 2 * (2 * first + 3 * sum(others))


@dataclass(frozen=True)
class Sentences(Workload):
    """W3: embedding, one LSTM layer, and scores of every word of the vocabulary at each of 20 places."""

    vocabulary: int = 2000
    embedding: int = 96
    hidden: int = 128

    @property
    def shape(self) -> str:
        return (
            f"embedding {self.vocabulary}-{self.embedding}, LSTM {self.hidden}, dense {self.hidden}-{self.vocabulary}"
        )

    def _examples(self, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
        following = rng.integers(0, self.vocabulary, (self.vocabulary, 4))
        for size in self.sizes:
            text = np.empty((size, WORDS + 1), np.int64)
            text[:, 0] = rng.integers(0, self.vocabulary, size)
            for place in range(WORDS):
                text[:, place + 1] = following[text[:, place], rng.integers(0, 4, size)]
            yield text[:, :-1].copy(), text[:, 1:].copy()

    def _initial(self, rng: np.random.Generator) -> Weights:
        gates, fan = 4 * self.hidden, self.hidden
        return {
            "embedding.weight": rng.normal(size=(self.vocabulary, self.embedding)).astype(np.float32),
            "lstm.weight_ih_l0": _uniform(rng, fan, gates, self.embedding),
            "lstm.weight_hh_l0": _uniform(rng, fan, gates, self.hidden),
            "lstm.bias_ih_l0": _uniform(rng, fan, gates),
            "lstm.bias_hh_l0": _uniform(rng, fan, gates),
            "scores.weight": _uniform(rng, fan, self.vocabulary, self.hidden),
            "scores.bias": _uniform(rng, fan, self.vocabulary),
        }

    def _module(self) -> Any:
        from benchmarks.torch_models import LanguageModel

        return LanguageModel(self.vocabulary, self.embedding, self.hidden)

    def _flops_an_example(self) -> int:
        cell = 4 * self.hidden * (self.embedding + self.hidden)
        return WORDS * 2 * 3 * (cell + self.hidden * self.vocabulary)


WORKLOADS: dict[str, Workload] = {
    "w1": Pictures("w1", clients=100, typical=85, sigma=0.6, fewest=20, most=300, batch=20, lr=0.05),
    "w2": Activities("w2", clients=200, typical=52, sigma=0.5, fewest=10, most=200, batch=10, lr=0.05),
    "w3": Sentences("w3", clients=50, typical=56, sigma=0.5, fewest=10, most=200, batch=16, lr=0.5),
}


def variant(name: str, seed: int) -> Workload:
    """Return a workload with widths and depths drawn at random; each range is inclusive."""
    rng = np.random.default_rng([seed, *name.encode()])

    def draw(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    base, called = WORKLOADS[name], f"{name}/{seed}"
    match base:
        case Pictures():
            channels, kernel = (draw(16, 48), draw(32, 96)), int(rng.choice([3, 5]))
            dense = tuple(draw(256, 768) for _ in range(draw(1, 2)))
            return dataclasses.replace(base, name=called, channels=channels, kernel=kernel, dense=dense)
        case Activities():
            return dataclasses.replace(base, name=called, dense=tuple(draw(32, 128) for _ in range(draw(1, 3))))
        case Sentences():
            sizes = {"embedding": draw(64, 128), "hidden": draw(96, 192), "vocabulary": draw(1000, 3000)}
            return dataclasses.replace(base, name=called, **sizes)
    raise AssertionError(name)


def named(text: str) -> Workload:
    """Return the workload `"w1"`, or with `"w1/7"` its variant of seed 7."""
    name, _, seed = text.partition("/")
    if name not in WORKLOADS:
        raise ValueError(f"no workload {name!r}: one of {', '.join(WORKLOADS)}, or a variant such as w1/7")
    return variant(name, int(seed)) if seed else WORKLOADS[name]


def batches(size: int, batch: int) -> Iterator[slice]:
    """Yield a client's batches in stored order."""
    return (slice(start, start + batch) for start in range(0, size, batch))


def distance(first: Weights, second: Weights) -> float:
    """Return the L2 distance over all leaves, in float64."""
    squares = [np.square(first[name].astype(np.float64) - second[name]).sum() for name in first]
    return float(np.sqrt(sum(squares)))


def _uniform(rng: np.random.Generator, fan: int, *shape: int) -> Array:
    """Draw U(−1, 1) / √fan, as torch's own layers begin."""
    return (rng.uniform(-1, 1, shape) / np.sqrt(fan)).astype(np.float32)


def _dense(rng: np.random.Generator, name: str, widths: tuple[int, ...]) -> Weights:
    weights: Weights = {}
    for number, (before, after) in enumerate(itertools.pairwise(widths)):
        weights[f"{name}.{number}.weight"] = _uniform(rng, before, after, before)
        weights[f"{name}.{number}.bias"] = _uniform(rng, before, after)
    return weights


def _products(widths: tuple[int, ...]) -> list[int]:
    return [before * after for before, after in itertools.pairwise(widths)]
