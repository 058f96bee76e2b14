"""Clients as users of Flower 1.42 write them: the functions of a ClientApp, and a NumPyClient."""

from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from torch import nn

PEOPLE, ROUNDS = 4, 3
app = ClientApp()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def person(number: int) -> tuple[Any, Any]:
    inputs = np.random.default_rng(number).normal(size=(16 + 4 * number, 4)).astype("float32")
    return inputs, (inputs[:, 0] > 0).astype("int64")


def fit(model: nn.Module, number: int, server_round: int) -> tuple[int, float]:
    """Train on a partition, in an order that a seed gives."""
    inputs, targets = map(torch.from_numpy, person(number))
    torch.manual_seed(1000 * server_round + number)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for rows in torch.randperm(len(targets)).split(8):
        loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(targets), loss.item()  # pyright: ignore[reportPossiblyUnboundVariable]


@app.train()
def train(message: Message, context: Context) -> Message:
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    count, loss = fit(model, int(context.node_config["partition-id"]), int(message.content["config"]["server-round"]))
    metrics = MetricRecord({"train_loss": loss, "num-examples": count})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"eval_loss": 0.25, "eval_acc": 0.75, "num-examples": 8})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


class Client(NumPyClient):
    def __init__(self, number: int) -> None:
        self.number = number

    def fit(self, parameters: Any, config: Any) -> Any:
        model = net()
        state = dict(zip(model.state_dict(), map(torch.from_numpy, parameters), strict=True))
        model.load_state_dict(state)
        count, loss = fit(model, self.number, int(config["server-round"]))
        return [leaf.numpy() for leaf in model.state_dict().values()], count, {"train_loss": loss}


def client_fn(context: Any) -> Any:
    return Client(int(context.node_config["partition-id"])).to_client()
