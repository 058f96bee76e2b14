"""A run's sums without a server around them, and devices that always send the same update."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sumus.aggregate import Aggregate, Part, RunningSum, Update
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.pacing import Conditions, Pacing
from sumus.protocol.round import Action, AssignWork, CheckIn
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.intake import ReportIntake
from sumus.rounds.sealed_sums import SealedSums
from sumus.rounds.stages import ClearReport
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.keyring import KeyRing
from sumus.storage.sql import SqlStore

SIZE, MANY = 2000, 10**6
HOP = FirstHop(
    (Part("params"),), ((("w", (SIZE,)),),), FixedPoint.fit(MANY, max_weight=100, bound=8.0), None, None, ("loss",)
)


def update(device: str) -> Update:
    """Return the update that this device always sends."""
    rng = np.random.default_rng(int(device))
    tree = {"w": rng.normal(size=SIZE).astype(np.float32)}
    return Update(device, {"params": tree}, int(rng.integers(1, 100)), {"loss": (float(rng.random()), 3)})


def recomputed(devices: Sequence[str]) -> Aggregate:
    """Return the sum of the updates of these devices."""
    total = RunningSum()
    for device in devices:
        HOP.count_in(update(device), total)
    return total.total


class Insides(NamedTuple):
    """The parts of a server."""

    coordinator: Coordinator
    sums: SealedSums
    intake: ReportIntake

    def take_in(self, device: str) -> str:
        """Let a device check in, get work and report; return its session."""
        session = f"{device}/1"
        actions = self.coordinator.check_in(device, CheckIn(session, 1, Conditions()), 0.0)
        assert any(isinstance(action, AssignWork) for action in actions)
        self.report(device)
        return session

    def report(self, device: str) -> tuple[Action, ...]:
        """Let a device send its report."""
        return self.intake.stage_all([ClearReport(f"{device}/1", HOP.check(update(device)))], 0.0)[0]

    def commit(self) -> tuple[Action, ...]:
        """Count the reports that have come."""
        return self.intake.commit(0.0)


def opened(url: str, run: str, folder: Path) -> Insides:
    """Make a server's parts on a store and in a folder."""
    pacing = Pacing(MANY, concurrency=MANY)
    coordinator = Coordinator(lambda: Circumstances(pacing, population=MANY), SqlStore.open(url, run))
    sums = SealedSums(coordinator, KeyRing(folder / "keys"), DirectoryBlobs(folder / "sums"))
    return Insides(coordinator, sums, ReportIntake(coordinator, sums, HOP, trains=True, spools=False))
