"""Data sets for benchmarks that are not part of the product.

They lie in `../shared/data`, or where SUMUS_DATA says; what needs one says so where it is absent.
"""

import os
from pathlib import Path

import numpy as np


class DataAbsent(SystemExit):
    """The data set is not on this machine."""


def folder(name: str) -> Path:
    """The folder of a data set."""
    root = Path(os.environ.get("SUMUS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / name).is_dir():
        raise DataAbsent(f"the data set {name!r} is not at {root}; set SUMUS_DATA to the folder that holds it")
    return root / name


def hapt() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Phone activity recognition, six activities: windows (n, 128, 6) float32, labels, person, and the unseen people.

    The official windows (128 samples, stride 64, inside one labelled segment) and the official split by person; each
    person's windows in the order in which they were recorded.
    """
    file = np.load(folder("hapt") / "hapt.npz")
    signal = (file["signal"] / file["scale"]).astype(np.float32)
    inputs, labels, people = [], [], []
    for _, person, activity, start, stop in file["segments"].tolist():
        if activity <= 6:
            for first in range(start, stop - 128 + 1, 64):
                inputs.append(signal[first : first + 128])
                labels.append(activity - 1)
                people.append(person)
    return np.stack(inputs), np.array(labels), np.array(people), file["test_subjects"].tolist()
