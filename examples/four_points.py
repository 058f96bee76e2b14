"""The smallest federation: a 2-3-1 network (ReLU, then sigmoid) learns four points, two on each of two devices.

The target is the first coordinate. Neither device could learn it alone, since all its points have the same target.
"""

import torch
from torch import nn

import sumus

POINTS = {
    "alice": (torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0], [0.0]])),
    "bob": (torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0], [1.0]])),
}
ALL = tuple(torch.cat(column) for column in zip(*POINTS.values(), strict=True))


def two_three_one() -> nn.Module:
    """A network with 2 inputs, 3 hidden units and 1 output."""
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.Sigmoid())


task = sumus.Task(
    model=two_three_one,
    loss=sumus.losses.binary_cross_entropy,
    metrics={"accuracy": sumus.metrics.binary_accuracy},
    name="four-points",
)
experiment = sumus.Experiment(
    plan=sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.5, epochs=2)), sumus.Pacing(cohort=2)),
    population=POINTS,
    rounds=300,
    evaluate=sumus.Evaluation(central=ALL, every=10, target={"accuracy": 1.0, "loss": 0.1}),
)

if __name__ == "__main__":
    history = sumus.run(experiment)
    model = two_three_one()
    model.load_state_dict(history.model)
    print(f"{len(history.rounds)} rounds; predictions {model(ALL[0]).detach().flatten().round(decimals=2).tolist()}")
