"""Linear regression over five devices: `nn.Linear(10, 1)`, mean squared error, SGD with rate 0.01, five local epochs.

sumus simulate examples/linear_regression.py
python examples/linear_regression.py
"""

import numpy as np
from torch import nn

import sumus

TRUE_WEIGHTS = np.linspace(-1.0, 1.0, 10, dtype=np.float32)


def device_data(device: int) -> tuple[np.ndarray, np.ndarray]:
    """Return forty measurements of one device. The devices differ in the range of their inputs."""
    rng = np.random.default_rng(device)
    inputs = rng.normal(loc=0.2 * device, size=(40, 10)).astype(np.float32)
    noise = 0.01 * rng.normal(size=40).astype(np.float32)
    return inputs, (inputs @ TRUE_WEIGHTS + 0.5 + noise)[:, None]


task = sumus.Task(
    model=lambda: nn.Linear(10, 1),
    loss=sumus.losses.mean_squared_error,
    metrics={"absolute_error": sumus.metrics.mean_absolute_error},
    name="linear-regression",
)
experiment = sumus.Experiment(
    plan=sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.01, epochs=5, batch_size=10)), sumus.Pacing(cohort=5)),
    population=sumus.Population(range(5), device_data),
    rounds=40,
    evaluate=sumus.Evaluation(central=device_data(99)),
)

if __name__ == "__main__":
    history = sumus.run(experiment)
    print(f"absolute error on unseen measurements: {history.metrics['absolute_error']:.4f}")
