"""Lightning's `Trainer`, and the lines that make a federation of it.

It needs `pip install lightning`.
"""

import lightning
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, inputs):
        return self.layers(inputs)

    def training_step(self, batch, number):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def person(number):
    inputs = np.random.default_rng(number).normal(size=(40, 4)).astype("float32")
    return inputs, (inputs[:, 0] > 0).astype("int64")


def fit(model, data):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", devices=1, **quiet)
    trainer.fit(model, DataLoader(data, batch_size=10, shuffle=True))


# ── sumus ──
import sumus  # noqa: E402


def train(state, examples):
    model = Net()
    model.load_state_dict(state)
    fit(model, TensorDataset(*examples))
    return model.state_dict(), len(examples[1]), {}


task = sumus.Task(Net, sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, name="lightning")
plan = sumus.Plan(task, sumus.fedavg(sumus.client(train)), sumus.Pacing(cohort=3))
experiment = sumus.Experiment(plan, sumus.Population(range(6), load=person), rounds=3)
