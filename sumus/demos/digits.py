"""Which digit is this? Twenty clients with few kinds of digits each; the model must know all ten.

sumus demo digits
"""

import numpy as np
from torch import nn

import sumus
from sumus.demos import sources
from sumus.simulator.populations import splits

CLIENTS, SHARDS_EACH = 20, 3


def experiment() -> sumus.Experiment:
    """FedAvgM. Each client holds three runs of the images sorted by label. [McMahan et al. 2017, section 3]"""
    images, labels = sources.digits()
    order = np.random.default_rng(0).permutation(len(images))
    held_out, training = order[:360], order[360:]
    by = splits.shards(labels[training], CLIENTS, SHARDS_EACH)
    task = sumus.Task(
        model=lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8)),
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        ),
        loss=sumus.losses.cross_entropy,
        metrics={"accuracy": sumus.metrics.accuracy},
        name="digits",
    )
    algorithm = sumus.fedavgm(
        sumus.sgd(lr=0.05, epochs=2, batch_size=16), lr=0.5, beta=0.8, update=sumus.clip_by_global_norm(1.0), cap=80
    )
    return sumus.Experiment(
        plan=sumus.Plan(task, algorithm, sumus.Pacing(cohort=10)),
        population=sumus.Population.from_arrays(images[training], labels[training], by=by),
        rounds=40,
        evaluate=sumus.Evaluation(central=(images[held_out], labels[held_out]), seen=CLIENTS, every=2),
    )
