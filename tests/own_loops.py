"""A plain PyTorch loop of a user's own, as tests of own loops share it."""

import random
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from sumus.own_loop import ClientRound
from tests.simulator.test_wire import net


def train(state: Any, examples: Any, about: ClientRound) -> tuple[Any, int, dict[str, float]]:
    """Two passes in an order that torch draws. numpy and Python draw too, so that a test notices other seeds."""
    model, losses = net(), []
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * random.uniform(0.9, 1.1) * np.random.uniform(0.9, 1.1))
    inputs, targets = examples
    for _ in range(2):
        for rows in torch.randperm(len(targets)).split(5):
            loss = cross_entropy(model(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model.state_dict(), len(targets), {"loss": sum(losses) / len(losses)}


def evaluate(state: Any, examples: Any) -> tuple[int, dict[str, float]]:
    model = net().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        outputs = model(examples[0])
    right = (outputs.argmax(1) == examples[1]).double().mean()
    return len(outputs), {"loss": cross_entropy(outputs, examples[1]).item(), "accuracy": float(right)}
