"""A process that checks devices in, commits their reports and tells them so on its output, until it is killed.

python -m tests.server.committing URL RUN FOLDER FIRST [acknowledges-early]       the last: a bug that kills must find
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sumus.aggregate import Aggregate, Part, RunningSum, Update
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.pacing import Conditions, Pacing
from sumus.protocol.round import Accept, Assign, CheckIn
from sumus.server.coordinator import Coordinator
from sumus.server.sums import SealedSums
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
    coordinator = Coordinator(Pacing(MANY, concurrency=MANY), MANY, store=SqlStore.open(url, run))
    return coordinator, SealedSums(coordinator, HOP, KeyRing(folder / "keys"), DirectoryBlobs(folder / "sums"))


def take_in(coordinator: Coordinator, sums: SealedSums, device: str) -> str:
    """A device checks in, is given work and reports; its session."""
    session = f"{device}/1"
    actions = coordinator.check_in(device, CheckIn(session, 1, Conditions()), 0.0)
    assert any(isinstance(action, Assign) for action in actions)
    sums.report(session, update(device), 0.0)
    return session


def main(url: str, run: str, folder: str, first: int, planted: str = "") -> None:
    """Serve until the end."""
    coordinator, sums = opened(url, run, Path(folder))
    coordinator.tick(0.0)
    rng = np.random.default_rng()
    while True:
        batch = [take_in(coordinator, sums, str(first + number)) for number in range(int(rng.integers(1, 5)))]
        first += len(batch)
        if planted == "acknowledges-early":
            print(*batch, sep="\n", flush=True)
        for action in sums.commit(0.0):
            if isinstance(action, Accept):
                print(action.session, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), *sys.argv[5:])
