"""Data sets for benchmarks that are not part of the product.

They lie in `../shared/data`, or in the folder that SUMUS_DATA names. A benchmark whose data are missing says so.
"""

import gzip
import io
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

Examples: TypeAlias = tuple[np.ndarray, np.ndarray]


class DataAbsent(SystemExit):
    """The data set is not on this machine."""


def folder(name: str) -> Path:
    """Return the folder of a data set."""
    root = Path(os.environ.get("SUMUS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / name).is_dir():
        raise DataAbsent(f"the data set {name!r} is not at {root}; set SUMUS_DATA to the folder that holds it")
    return root / name


def hapt() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Return phone activity recognition, six activities: windows (n, 128, 6) float32, labels, persons, and the unseen
    people.

    The windows are the official ones (128 samples, stride 64, inside one labelled segment), with the official split by
    person. Each person's windows are in the order in which they were recorded.
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


def shakespeare(row: int, at_least: int) -> tuple[dict[str, Examples], dict[str, Examples]]:
    """Return rows of characters and the character that follows each, int64 `(n, row)`, padded with −100.

    Args:
        row: The length of a row.
        at_least: The fewest characters of a role that is used. The vocabulary is that of the used roles.

    Returns:
        By role: the first four fifths of its text, and the last fifth.
    """
    with gzip.open(folder("shakespeare") / "roles.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = {entry["role"]: "\n".join(entry["speeches"]) for entry in map(json.loads, file)}
    texts = {role: text for role, text in texts.items() if len(text) >= at_least}
    codes = {character: code for code, character in enumerate(sorted(set("".join(texts.values()))))}

    def rows(text: str) -> Examples:
        numbers = np.array([codes[character] for character in text])
        count = -(-(len(numbers) - 1) // row)
        inputs, targets = np.zeros(count * row, np.int64), np.full(count * row, -100)
        inputs[: len(numbers) - 1], targets[: len(numbers) - 1] = numbers[:-1], numbers[1:]
        return inputs.reshape(count, row), targets.reshape(count, row)

    cut = {role: len(text) * 4 // 5 for role, text in texts.items()}
    return (
        {role: rows(text[: cut[role]]) for role, text in texts.items()},
        {role: rows(text[cut[role] :]) for role, text in texts.items()},
    )


def cifar10(part: Literal["train", "test"]) -> Examples:
    """Return CIFAR-10 as JPEG, decoded once on each machine: images `(n, 32, 32, 3)` uint8, labels int64, rows ordered
    by class."""
    file = np.load(folder("cifar10_jpeg") / f"{part}.npz")
    labels = file["label"].astype(np.int64)
    kept = Path(tempfile.gettempdir()) / f"sumus-{os.getuid()}-cifar10-{part}.npy"
    if not kept.exists():
        from PIL import Image

        head, body, starts = file["header"].tobytes(), file["data"].tobytes(), file["offsets"].tolist()
        files = (io.BytesIO(head + body[start:stop]) for start, stop in itertools.pairwise(starts))
        images = np.stack([np.asarray(Image.open(jpeg).convert("RGB")) for jpeg in files])
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as new:
            np.save(new, images)
        Path(new.name).replace(kept)
    return np.load(kept, mmap_mode="r"), labels
