"""Preparation steps: functions for `Task(prepare=)` that clean and transform examples on the device, in numpy.

    Task(..., prepare=steps(drop_missing, windows(128, 64), standardize_running(prior=200)))

A step takes one client's `(inputs, targets)` and returns them changed. It sees only this client's data, and its results
do not leave the device.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from sumus.columns import array_of, first_changed, numbers_of, where
from sumus.types import Array

Step: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]


def steps(*each: Step) -> Step:
    """Combine several steps into one that applies them in order."""

    def prepare(inputs: Any, targets: Any) -> tuple[Any, Any]:
        for step in each:
            inputs, targets = step(inputs, targets)
        return inputs, targets

    return prepare


def drop_missing(inputs: Any, targets: Any) -> tuple[Array, Array]:
    """Leave out examples with a NaN or an infinity in their input or target."""
    inputs, targets = numbers_of(inputs), array_of(targets)
    whole = np.isfinite(inputs).reshape(len(inputs), -1).all(1)
    if targets.dtype.kind == "f":
        whole &= np.isfinite(targets).reshape(len(targets), -1).all(1)
    return inputs[whole], targets[whole]


def standardize(center: Any, scale: Any) -> Step:
    """Make a step that computes (x − center) / scale, in float32, with constants that are broadcast over an example.

    The constants are public: do not compute them from other people's data.
    """
    middle, width = np.asarray(center, np.float32), np.asarray(scale, np.float32)

    def prepare(inputs: Any, targets: Any) -> tuple[Array, Any]:
        return ((numbers_of(inputs) - middle) / width).astype(np.float32), targets

    return prepare


def standardize_running(
    prior: float = 0.0, center: Any = 0.0, scale: Any = 1.0, axes: tuple[int, ...] | None = None
) -> Step:
    """Make a step that scales each channel to mean 0 and deviation 1, by a running estimate over this person's own
    examples. It does not need labels.

    Examples come in the order in which they were recorded. Example i is standardized by the mean and the deviation of
    examples 0 to i. No later examples are used, so a device can do the same while data arrives.

    Args:
        prior: The number of examples that `center` and `scale` count for at the start; 0 to ignore them.
        center: The mean at the start.
        scale: The deviation at the start.
        axes: The axes of one example that are averaged over; by default all but the last, for `(time, channel)`
            windows.
    """

    def prepare(inputs: Any, targets: Any) -> tuple[Array, Any]:
        x = numbers_of(inputs).astype(np.float64)
        over = tuple(axis + 1 for axis in axes) if axes is not None else tuple(range(1, x.ndim - 1))
        means = x.mean(over, keepdims=True) if over else x
        squares = (x * x).mean(over, keepdims=True) if over else x * x
        seen = (np.arange(1, len(x) + 1) + prior).reshape(-1, *[1] * (x.ndim - 1))
        start, spread = np.asarray(center, np.float64), np.asarray(scale, np.float64)
        mean = (np.cumsum(means, 0) + prior * start) / seen
        square = (np.cumsum(squares, 0) + prior * (spread**2 + start**2)) / seen
        deviation = np.sqrt(np.maximum(square - mean**2, 1e-12))
        return ((x - mean) / np.maximum(deviation, 1e-6)).astype(np.float32), targets

    return prepare


def windows(length: int, stride: int) -> Step:
    """Make a step that cuts recordings into windows. Recordings shorter than a window are left out.

    Inputs `(n,)` of arrays `(time, channels)` and targets `(n,)`, one for each recording, become inputs `(windows,
    length, channels)` and targets `(windows,)`.

    Args:
        length: The number of time steps in a window.
        stride: The number of time steps from the start of a window to the start of the next.
    """

    def prepare(inputs: Any, targets: Any) -> tuple[Array, Array]:
        cut = [
            (recording[start : start + length], label)
            for recording, label in zip(map(numbers_of, inputs), targets, strict=True)
            for start in range(0, len(recording) - length + 1, stride)
        ]
        if not cut:
            raise ValueError(f"no recording is as long as a window of {length}")
        found = np.stack([window for window, _ in cut])
        narrow = found.astype(np.float32)
        if (changed := first_changed(found, narrow)) is not None:
            raise ValueError(
                f"{where(changed)} of the windows is {found[changed]}, which float32 rounds: scale it first"
            )
        return narrow, array_of([label for _, label in cut])

    return prepare
