"""The models of the workloads, as a user of torch writes them, and a client's local training, written by hand."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Convolutional(nn.Module):
    """Two convolutions with pooling, then dense layers. inputs `(B, 1, 28, 28)`, outputs `(B, classes)`."""

    def __init__(self, channels: tuple[int, int], kernel: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        pairs = ((1, channels[0]), channels)
        self.convolutions = nn.ModuleList(nn.Conv2d(*pair, kernel, padding=kernel // 2) for pair in pairs)
        self.dense = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, inputs: Tensor) -> Tensor:
        for convolution in self.convolutions:
            inputs = functional.max_pool2d(functional.relu(convolution(inputs)), 2)
        return _through(self.dense, inputs.flatten(1))


class Perceptron(nn.Module):
    """Dense layers. inputs `(B, features)`, outputs `(B, classes)`."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.dense = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, inputs: Tensor) -> Tensor:
        return _through(self.dense, inputs)


class LanguageModel(nn.Module):
    """Embedding, LSTM, scores. inputs `(B, T)` words, outputs `(B, T, vocabulary)`."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.scores = nn.Linear(hidden, vocabulary)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scores(self.lstm(self.embedding(inputs))[0])


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy, as the mean over a batch and all positions in it."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def train_client(model: nn.Module, inputs: Tensor, targets: Tensor, rows: Iterable[Any], lr: float) -> None:
    """Train one local epoch, as a user of torch would write it. rows: of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for batch in rows:
        optimizer.zero_grad()
        mean_loss(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()


def _through(layers: nn.ModuleList, values: Tensor) -> Tensor:
    *hidden, last = layers
    for layer in hidden:
        values = functional.relu(layer(values))
    return last(values)
