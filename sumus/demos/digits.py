"""Which digit is this? Twenty clients with few kinds of digits each; the model must know all ten.

sumus demo digits
"""

import numpy as np
from torch import nn

import sumus
from sumus.demos import sources

CLIENTS, SHARDS_EACH = 20, 3


def experiment() -> sumus.Experiment:
    """FedAvgM over clients that hold three runs of the images sorted by label. [McMahan et al. 2017, section 3]"""
    images, labels = sources.digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    held_out, training = order[:360], order[360:]
    by_label = training[np.argsort(labels[training], kind="stable")]
    shards = np.array_split(by_label, CLIENTS * SHARDS_EACH)
    dealt = rng.permutation(len(shards)).reshape(CLIENTS, SHARDS_EACH)
    rows = [np.concatenate([shards[shard] for shard in mine]) for mine in dealt]
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
    algorithm = sumus.fedavgm(sumus.sgd(lr=0.05, epochs=2, batch_size=16), lr=0.5, beta=0.8)
    return sumus.Experiment(
        plan=sumus.Plan(task, algorithm, sumus.Pacing(cohort=10)),
        population=sumus.Population(range(CLIENTS), lambda client: (images[rows[client]], labels[rows[client]])),
        rounds=40,
        evaluate=sumus.Evaluate(central=(images[held_out], labels[held_out]), seen=CLIENTS, every=2),
    )
