"""The models of the workloads in JAX, with channels-last pictures. Leaves have the names of the torch modules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workloads import Pictures, Sentences, Workload

Leaves = dict[str, Any]


class Model:
    """A workload's model, loss and examples in the layout of JAX."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._pictures = isinstance(workload, Pictures)
        self._scores = _sentence_scores if isinstance(workload, Sentences) else _scores
        self._torch_shapes = {name: leaf.shape for name, leaf in workload.initial().items()}

    def examples(self, double: bool) -> list[tuple[Any, Any]]:
        """Return (inputs, targets) of each client."""
        pairs = self._workload.examples(double)
        return [(x.transpose(0, 2, 3, 1) if self._pictures else x, y.astype(np.int32)) for x, y in pairs]

    def initial(self, double: bool) -> Leaves:
        """Return the global model before the first round."""
        leaves = self._workload.initial()
        return {
            name: self._to_jax(name, leaf.astype(np.float64 if double else np.float32)) for name, leaf in leaves.items()
        }

    def as_torch(self, leaves: Leaves) -> Leaves:
        """Return leaves in torch's layout."""
        return {name: self._to_torch(name, np.asarray(leaf)) for name, leaf in leaves.items()}

    def loss(self, leaves: Leaves, inputs: Any, targets: Any, real: Any) -> Any:
        """Return the cross-entropy, as the mean over examples. real: 1 for examples, 0 for padding."""
        scores = jax.nn.log_softmax(self._scores(leaves, inputs))
        losses = -jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
        losses = losses.reshape(len(losses), -1).mean(1)
        return (losses * real).sum() / jnp.maximum(real.sum(), 1.0)

    def _to_jax(self, name: str, leaf: Any) -> Any:
        if leaf.ndim == 4:
            return leaf.transpose(2, 3, 1, 0)
        if name == "dense.0.weight" and self._pictures:  # its inputs: channels first in torch, last here
            return leaf.reshape(len(leaf), -1, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(leaf))
        return leaf.T if name.startswith("dense") else leaf

    def _to_torch(self, name: str, leaf: Any) -> Any:
        if leaf.ndim == 4:
            return leaf.transpose(3, 2, 0, 1)
        if name == "dense.0.weight" and self._pictures:
            rows, columns = self._torch_shapes[name]
            return leaf.reshape(7, 7, columns // 49, rows).transpose(3, 2, 0, 1).reshape(rows, columns)
        return leaf.T if name.startswith("dense") else leaf


def _scores(leaves: Leaves, values: Any) -> Any:
    """Compute convolutions with pooling, if there are any, then dense layers."""
    for number in range(_count(leaves, "convolutions")):
        kernel, bias = leaves[f"convolutions.{number}.weight"], leaves[f"convolutions.{number}.bias"]
        layout = ("NHWC", "HWIO", "NHWC")
        values = jax.lax.conv_general_dilated(values, kernel, (1, 1), "SAME", dimension_numbers=layout) + bias
        many, side, _, channels = values.shape
        blocks = jax.nn.relu(values).reshape(many, side // 2, 2, side // 2, 2, channels)
        values = blocks.max((2, 4))  # equals 2 x 2 max-pooling
    values = values.reshape(len(values), -1)
    layers = _count(leaves, "dense")
    for number in range(layers):
        values = values @ leaves[f"dense.{number}.weight"] + leaves[f"dense.{number}.bias"]
        values = jax.nn.relu(values) if number + 1 < layers else values
    return values


def _sentence_scores(leaves: Leaves, words: Any) -> Any:
    """Compute embedding, LSTM and dense layer."""
    biases = leaves["lstm.bias_ih_l0"] + leaves["lstm.bias_hh_l0"]
    gates = leaves["embedding.weight"][words] @ leaves["lstm.weight_ih_l0"].T + biases

    def cell(carried: tuple[Any, Any], gate: Any) -> tuple[tuple[Any, Any], Any]:
        hidden, memory = carried
        enter, forget, new, out = jnp.split(gate + hidden @ leaves["lstm.weight_hh_l0"].T, 4, -1)
        memory = jax.nn.sigmoid(forget) * memory + jax.nn.sigmoid(enter) * jnp.tanh(new)
        hidden = jax.nn.sigmoid(out) * jnp.tanh(memory)
        return (hidden, memory), hidden

    zeros = jnp.zeros((len(words), leaves["lstm.weight_hh_l0"].shape[1]), gates.dtype)
    _, hidden = jax.lax.scan(cell, (zeros, zeros), gates.swapaxes(0, 1))
    return hidden.swapaxes(0, 1) @ leaves["scores.weight"].T + leaves["scores.bias"]


def _count(leaves: Leaves, name: str) -> int:
    return sum(leaf.startswith(f"{name}.") and leaf.endswith("weight") for leaf in leaves)
