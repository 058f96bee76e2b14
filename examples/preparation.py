"""Preparation on the device: the task turns raw recordings with gaps into clean features.

A device may store its data in any form, since the model receives only what `prepare` returns. The same function runs in
the simulator and on a device, and its results never leave the device.
"""

import numpy as np
from torch import nn

import sumus
from sumus import preparation

RATE = 50  # samples a second


def recordings(home: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the recordings of one home's vibration sensor, and whether the machine runs (1) or not (0) in each.

    There are twelve recordings of 8 to 12 s, with gaps (NaN).
    """
    rng = np.random.default_rng(3000 + home)
    running = rng.integers(0, 2, size=12)
    signals: list[np.ndarray] = []
    for on in running:
        time = np.arange(int(rng.integers(8 * RATE, 12 * RATE))) / RATE
        signal = rng.normal(scale=0.5, size=len(time)) + on * np.sin(2 * np.pi * rng.uniform(6, 9) * time)
        signal[rng.random(len(time)) < 0.002] = np.nan
        signals.append(signal[:, None])
    return signals, running


def band_energies(windows: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute eight features for each window: the log energy in eight frequency bands."""
    power = np.abs(np.fft.rfft(windows[:, :, 0], axis=1)) ** 2
    bands = np.stack([band.mean(axis=1) for band in np.array_split(power[:, 1:], 8, axis=1)], axis=1)
    return np.log(bands + 1e-6).astype(np.float32), targets


homes = sumus.Population(range(12), recordings)
task = sumus.Task(
    model=lambda: nn.Linear(8, 2),
    loss=sumus.losses.cross_entropy,
    metrics={"accuracy": sumus.metrics.accuracy},
    prepare=preparation.steps(
        preparation.windows(length=2 * RATE, stride=RATE),  # windows of two seconds, which overlap by half
        preparation.drop_missing,  # drops windows with a gap
        band_energies,
        preparation.standardize_running(prior=5),
    ),
    name="machine-on",
)
experiment = sumus.Experiment(
    plan=sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.2, epochs=2, batch_size=16)), sumus.Pacing(cohort=6)),
    population=homes.without([9, 10, 11]),
    rounds=15,
    evaluate=sumus.Evaluation(unseen=homes.subset([9, 10, 11]), every=5),
)

if __name__ == "__main__":
    history = sumus.run(experiment)
    print(f"accuracy at homes never seen: {history.metrics['accuracy']:.3f}")
