"""Which exercise is this? Watch recordings of ten people: seven train together, three are never seen in training.

sumus demo health
"""

import torch
from torch import nn

import sumus
from sumus import preparation
from sumus.demos import sources
from sumus.demos.people import DemoPeople

PEOPLE = DemoPeople(training=range(1, 8), unseen=(8, 9, 10), least=3)
ROUNDS, EVERY = 30, 5


class ActivityNet(nn.Module):
    """Three convolutions over time, the mean over time, and one linear layer: 45 thousand parameters. (B, time, 6) → (B, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(6, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(64, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(64, 64, 5, padding=2),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 7)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(windows.transpose(1, 2)).mean(2))


def experiment() -> sumus.Experiment:
    """FedAdam over seven people; the running mean of its models is published."""
    recordings, exercise, person, _ = sources.watch()
    rows = {who: [i for i, p in enumerate(person) if p == who] for who in sorted(set(person.tolist()))}
    people = sumus.Population(list(rows), lambda who: ([recordings[i] for i in rows[who]], exercise[rows[who]]))
    task = sumus.Task(
        model=ActivityNet,
        loss=sumus.losses.cross_entropy,
        metrics={"accuracy": sumus.metrics.accuracy},
        # on each watch: five-second windows, in units of typical movement (g, rad/s)
        prepare=preparation.steps(
            preparation.windows(length=256, stride=128),
            preparation.standardize(center=[0, 0.4, -0.1, 0, 0, 0], scale=[0.9, 0.5, 0.5, 1.0, 2.5, 1.0]),
        ),
        name="watch-activity",
    )
    algorithm = sumus.fedavg(
        client=sumus.sgd(lr=0.05, epochs=2, batch_size=16),
        # The bound is below the norm of most updates, so that no person moves the model further than another.
        update=sumus.clip_by_global_norm(0.15),
        cap=150,
        server=sumus.optimizers.averaged(sumus.optimizers.adam(lr=0.02, bias_correction=True), decay=0.8),
    )
    return sumus.Experiment(
        plan=sumus.Plan(task, algorithm, sumus.Pacing(cohort=7, deadline=120.0), min_contributors=PEOPLE.least),
        population=people.without(PEOPLE.unseen),
        rounds=ROUNDS,
        evaluate=sumus.Evaluation(unseen=people.subset(PEOPLE.unseen), every=EVERY),
    )
