"""A health model, `nn.Linear(20, 10)`: watches train it, their updates are added, and each watch predicts.

An input holds twenty features of one minute of movement; the target is one of ten states. Each person has a resting
level of their own, which the watch subtracts before it trains or predicts.
"""

import numpy as np
import torch
from torch import nn

import sumus

FEATURES, STATES, PEOPLE = 20, 10, 20
PATTERNS = np.random.default_rng(1).normal(size=(STATES, FEATURES)).astype(np.float32)


def watch_data(person: int) -> tuple[np.ndarray, np.ndarray]:
    """Return eighty labelled minutes of one person."""
    rng = np.random.default_rng(2000 + person)
    states = rng.integers(0, STATES, size=80)
    resting = rng.normal(scale=2.0, size=FEATURES)
    return (PATTERNS[states] + resting + rng.normal(scale=0.6, size=(80, FEATURES))).astype(np.float32), states


def less_resting_level(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prepare the data on the watch: subtract the person's own mean."""
    return inputs - inputs.mean(axis=0), targets


people = sumus.Population(range(PEOPLE), watch_data)
task = sumus.Task(
    model=lambda: nn.Linear(FEATURES, STATES),
    loss=sumus.losses.cross_entropy,
    metrics={"accuracy": sumus.metrics.accuracy},
    prepare=less_resting_level,
    name="health-monitor",
)
algorithm = sumus.fedavg(
    client=sumus.sgd(lr=0.2, epochs=2, batch_size=16),
    update=sumus.clip_by_global_norm(2.0),  # no watch moves the model further than a tenth of this
    weight="uniform",
)
experiment = sumus.Experiment(
    plan=sumus.Plan(task, algorithm, sumus.Pacing(cohort=10)),
    population=people.without(range(16, 20)),
    rounds=15,
    evaluate=sumus.Evaluation(unseen=people.subset(range(16, 20)), every=5),
)

if __name__ == "__main__":
    history = sumus.run(experiment)
    watch = nn.Linear(FEATURES, STATES)
    watch.load_state_dict(history.model)
    minutes, states = less_resting_level(*watch_data(17))
    with torch.no_grad():
        predicted = watch(torch.from_numpy(minutes)).argmax(1).numpy()
    print(f"accuracy on people never seen: {history.metrics['accuracy']:.3f}")
    print(f"on one of their watches: {(predicted == states).mean():.3f}")
