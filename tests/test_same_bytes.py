"""What other programs and older runs have written stays readable: plans, models, messages and tables keep their bytes.

The digests were taken on the commit before the rooms were rebuilt (decision 32). A test that fails here says that a device, a
checkpoint or a database of an older version would not be understood any more. Change a digest only together with the version of
what it is a digest of, and say so in the changelog.
"""

import hashlib
import json
import sqlite3
from pathlib import Path

import numpy as np
import torch
from torch import nn

import sumus
from sumus.algorithm import Algorithm
from sumus.pacing import Pacing
from sumus.plan import Plan
from sumus.storage.sql import SqlStore
from sumus.task import Data, Description, Leaf
from sumus.update import chain, clip_by_global_norm, quantize, rotate, weight

TASK = Description(
    "digits",
    (Leaf("fc.weight", (3, 2), "float32", "shared", True), Leaf("fc.bias", (3,), "float32", "shared", True)),
    "cross_entropy",
    ("accuracy",),
    Data((2,), "float32", (), "int64", classes=3),
)
LOCAL = sumus.sgd(0.5, steps=3, batch_size=4)
ALGORITHMS: dict[str, Algorithm] = {
    "fedavg": sumus.fedavg(LOCAL),
    "fedavg of many stages": sumus.fedavg(
        sumus.adamw(sumus.schedules.cosine(0.25, rounds=9), batch_size=2),
        chain(weight(cap=9), clip_by_global_norm(2.0), rotate(), quantize(6)),
    ),
    "fedprox": sumus.fedprox(LOCAL, 0.5),
    "fedadam": sumus.fedadam(LOCAL, 0.25),
    "scaffold": sumus.scaffold(LOCAL),
    "feddyn": sumus.feddyn(LOCAL, 0.5),
    "fednova": sumus.fednova(LOCAL),
}
PACINGS = {"round": Pacing(cohort=20), "deadline": Pacing(cohort=20, deadline=60.0, over_select=1.25)}
PLAN_IDS = "9276a171dbe01cda8056e0d201af36abd427b2fa8f0aa964c73ab4a82f0eda69"
MODEL = "dfd7802849e31c28ac266e8be8ea1789e3e8bdb930a780ebc1bb4a99cfc4bba1"
TABLES = "85b7ebd493f89c58d05a71dc7052e8406e4a63c384871251403585be21dcc7e1"
VECTORS = "df09765e9e798de630adacaf4cdb7191a64cbc8b925ee3c674097deb4c1b64f8"


def digest(value: object) -> str:
    """SHA-256 of a value's JSON, keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def test_the_ids_of_plans_are_those_of_before() -> None:
    ids = {
        f"{name}, {pace}": Plan(TASK, algorithm, pacing, trusts_devices=True).id
        for name, algorithm in ALGORITHMS.items()
        for pace, pacing in PACINGS.items()
    }
    assert digest(ids) == PLAN_IDS


def squared(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs[:, 0] - targets) ** 2


def test_the_numbers_of_a_run_are_those_of_before() -> None:
    """All numbers are small multiples of powers of two, so that no processor rounds any of them: the same bits everywhere."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.25]]))
        model.bias.fill_(1.0)
    people = {
        f"person {number}": (
            np.array([[1, 0], [0, 1], [1, 1], [number % 3, 1]], np.float32),
            np.array([1, 2, 3, number % 2], np.float32),
        )
        for number in range(4)
    }
    algorithm = sumus.fedavg(sumus.sgd(0.25, batch_size=4))
    history = sumus.simulate(sumus.Task(lambda: model, squared), algorithm, people, rounds=2, seed=7)
    assert history.model_sha256 == MODEL


def test_the_tables_of_a_database_are_those_of_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.db"
    SqlStore.open(path).close()
    with sqlite3.connect(path) as connection:
        found = connection.execute("select type, name, tbl_name, sql from sqlite_master order by type, name").fetchall()
    connection.close()
    assert digest(found) == TABLES


def test_the_vectors_of_the_wire_are_those_of_before() -> None:
    """docs/wire.md in numbers. `tests/wire/test_vectors.py` holds the code to them."""
    path = Path(__file__).parent / "vectors" / "wire.json"
    assert digest(json.loads(path.read_text(encoding="utf-8"))) == VECTORS
