"""A plain PyTorch loop, as it was before sumus, and the lines that make a federation of it."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def net():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


def person(number):
    inputs = np.random.default_rng(number).normal(size=(60, 4)).astype("float32")
    return inputs, (inputs[:, 0] * inputs[:, 1] > 0).astype("int64")


def fit(model, data):
    optimizer, last = torch.optim.AdamW(model.parameters(), lr=0.02), 0.0
    for _ in range(3):
        for inputs, targets in DataLoader(data, batch_size=10, shuffle=True):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = loss.item()
    return last


# ── sumus ──
import sumus  # noqa: E402


def train(state, examples):
    model = net()
    model.load_state_dict(state)
    loss = fit(model, TensorDataset(*examples))
    return model.state_dict(), len(examples[1]), {"loss": loss}


task = sumus.Task(net, sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, name="plain")
plan = sumus.Plan(task, sumus.fedavg(sumus.client(train)), sumus.Pacing(cohort=5))
unseen = sumus.Evaluation(unseen=sumus.Population(range(20, 25), load=person))
experiment = sumus.Experiment(plan, sumus.Population(range(20), load=person), rounds=15, evaluate=unseen)
