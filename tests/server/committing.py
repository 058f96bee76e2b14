"""A run's sums without a server around them, and devices that always send the same."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sumus.aggregate import Aggregate, Part, RunningSum, Update
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.pacing import Conditions, Pacing
from sumus.protocol.round import AssignWork, CheckIn
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.sealed_sums import SealedSums
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.keyring import KeyRing
from sumus.storage.sql import SqlStore

SIZE, MANY = 2000, 10**6
HOP = FirstHop(
    (Part("params"),), ((("w", (SIZE,)),),), FixedPoint.fit(MANY, max_weight=100, bound=8.0), None, None, ("loss",)
)


def update(device: str) -> Update:
    """What this device sends: always the same."""
    rng = np.random.default_rng(int(device))
    tree = {"w": rng.normal(size=SIZE).astype(np.float32)}
    return Update(device, {"params": tree}, int(rng.integers(1, 100)), {"loss": (float(rng.random()), 3)})


def recomputed(devices: Sequence[str]) -> Aggregate:
    """The sum of what these devices sent."""
    total = RunningSum()
    for device in devices:
        HOP.count_in(update(device), total)
    return total.total


def opened(url: str, run: str, folder: Path) -> tuple[Coordinator, SealedSums]:
    """A server's insides."""
    pacing = Pacing(MANY, concurrency=MANY)
    coordinator = Coordinator(lambda: Circumstances(pacing, population=MANY), SqlStore.open(url, run))
    return coordinator, SealedSums(coordinator, HOP, KeyRing(folder / "keys"), DirectoryBlobs(folder / "sums"))


def take_in(coordinator: Coordinator, sums: SealedSums, device: str) -> str:
    """A device checks in, is given work and reports; its session."""
    session = f"{device}/1"
    actions = coordinator.check_in(device, CheckIn(session, 1, Conditions()), 0.0)
    assert any(isinstance(action, AssignWork) for action in actions)
    sums.report(session, update(device), 0.0)
    return session
