"""Acknowledged means counted: whatever is killed or fails, and whenever; and nothing on a disk tells what anyone sent."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sumus.aggregate import Aggregate
from sumus.errors import ExperimentError, ParticipantError
from sumus.protocol.round import AcceptReport
from sumus.rounds import sealed_sums as module
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.sealed_sums import SealedSums
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.keyring import SealError
from sumus.wire.tensors import encode_aggregate
from tests.server.committing import HOP, opened, recomputed, take_in, update

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(tmp_path: Path) -> tuple[Coordinator, SealedSums]:
    coordinator, sums = opened(f"sqlite:///{tmp_path}/run.db", "run", tmp_path)
    coordinator.tick(0.0)
    return coordinator, sums


def counted(coordinator: Coordinator) -> list[str]:
    with coordinator.store.transaction() as rows:
        return [session.partition("/")[0] for session in rows.counted_in(0)]


def same(one: Aggregate, other: Aggregate) -> bool:
    return encode_aggregate(one) == encode_aggregate(other)


def accepted(actions: tuple[object, ...]) -> list[str]:
    return [action.session for action in actions if isinstance(action, AcceptReport)]


# ── as it should be ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_committed_is_the_sum_of_what_was_sent(server: tuple[Coordinator, SealedSums]) -> None:
    coordinator, sums = server
    told = list[str]()
    for first in (0, 3, 5):
        for device in range(first, first + 3 if first == 0 else first + 2):
            take_in(coordinator, sums, str(device))
        told += accepted(sums.commit(0.0))
    assert told == [f"{device}/1" for device in range(7)]
    assert same(sums.total(0), recomputed([str(device) for device in range(7)]))


def test_a_report_that_comes_again_is_counted_once(server: tuple[Coordinator, SealedSums]) -> None:
    coordinator, sums = server
    take_in(coordinator, sums, "1")
    sums.commit(0.0)
    assert accepted(sums.report("1/1", update("1"), 0.0)) == ["1/1"]
    take_in(coordinator, sums, "2")
    sums.commit(0.0)
    assert same(sums.total(0), recomputed(["1", "2"]))


def test_what_cannot_be_counted_is_refused_before_anything_is_promised(server: tuple[Coordinator, SealedSums]) -> None:
    _, sums = server
    for value in (np.nan, np.inf, 1e6):
        bad = update("1")
        bad.parts["params"]["w"][3] = value
        with pytest.raises(ParticipantError):
            sums.report("1/1", bad, 0.0)


def test_processes_add_apart_and_their_sums_merge_to_the_same_bits(tmp_path: Path) -> None:
    servers = [opened(f"sqlite:///{tmp_path}/run.db", "run", tmp_path) for _ in range(3)]
    servers[0][0].tick(0.0)
    for device in range(12):
        coordinator, sums = servers[device % 3]
        take_in(coordinator, sums, str(device))
        sums.commit(0.0)
    everyone = recomputed([str(device) for device in range(12)])
    assert all(same(sums.total(0), everyone) for _, sums in servers)


def test_a_sum_that_was_read_to_close_its_round_may_still_be_added_to(server: tuple[Coordinator, SealedSums]) -> None:
    coordinator, sums = server
    for device in "12":
        take_in(coordinator, sums, device)
        sums.commit(0.0)
        assert same(sums.total(0), recomputed(list("12")[: int(device)]))


# ── what fails ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def failing(patch: pytest.MonkeyPatch, owner: Any, name: str, after: bool) -> Iterator[None]:
    """The next call of a function fails, before or after it has done its work."""
    real = getattr(owner, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if after:
            real(*args, **kwargs)
        raise OSError(f"{name} failed")

    with patch.context() as inner:
        inner.setattr(owner, name, fails)
        yield


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["_add", "_count_in", "_key", "put", "commit"])
def test_a_commit_that_fails_acknowledges_nothing_and_is_made_again(
    server: tuple[Coordinator, SealedSums], monkeypatch: pytest.MonkeyPatch, where: str, after: bool
) -> None:
    coordinator, sums = server
    take_in(coordinator, sums, "1")
    sums.commit(0.0)
    take_in(coordinator, sums, "2")
    owner = {"commit": coordinator, "put": DirectoryBlobs}.get(where, sums)
    with failing(monkeypatch, owner, where, after), pytest.raises(OSError, match="failed"):
        sums.commit(0.0)
    if where == "commit" and after:  # it was committed, and only the answer was lost: the device asks again
        assert accepted(sums.report("2/1", update("2"), 0.0)) == ["2/1"]
    else:
        assert counted(coordinator) == ["1"]
        assert accepted(sums.commit(0.0)) == ["2/1"]
    take_in(coordinator, sums, "3")
    sums.commit(0.0)
    assert same(sums.total(0), recomputed(["1", "2", "3"]))


def test_a_full_disk_acknowledges_nothing(
    server: tuple[Coordinator, SealedSums], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, sums = server
    take_in(coordinator, sums, "1")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ExperimentError, match="No space left on device"):
            sums.commit(0.0)
    assert counted(coordinator) == []
    assert accepted(sums.commit(0.0)) == ["1/1"]
    assert same(sums.total(0), recomputed(["1"]))


def test_a_sum_that_is_not_all_there_is_not_used(server: tuple[Coordinator, SealedSums], tmp_path: Path) -> None:
    coordinator, sums = server
    take_in(coordinator, sums, "1")
    sums.commit(0.0)
    (file,) = tmp_path.glob("sums/??/*")
    body = file.read_bytes()
    file.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(ExperimentError, match="is damaged"):
        sums.total(0)
    file.unlink()
    with pytest.raises(ExperimentError, match="is missing"):
        sums.total(0)


def test_what_crashes_leave_is_swept(server: tuple[Coordinator, SealedSums], tmp_path: Path) -> None:
    coordinator, sums = server
    take_in(coordinator, sums, "1")
    sums.commit(0.0)
    left = DirectoryBlobs(tmp_path / "sums").put(b"sealed")
    assert sums.sweep() == [left]
    assert sums.sweep() == []
    assert same(sums.total(0), recomputed(["1"]))


def test_a_destroyed_sum_is_gone_and_its_files_open_nothing(
    server: tuple[Coordinator, SealedSums], tmp_path: Path
) -> None:
    coordinator, sums = server
    take_in(coordinator, sums, "1")
    sums.commit(0.0)
    sums.destroy(0)
    assert not list(tmp_path.glob("sums/??/*"))
    with pytest.raises(ExperimentError, match="key of round 0 is gone"):
        sums.total(0)


# ── what a thief of the disk sees ────────────────────────────────────────────────────────────────────────────────────


def found_on_disk(folder: Path, total: Aggregate) -> list[str]:
    """Files that hold 64 bytes of someone's update, in floats or in the sum's integers, or of the sum."""
    windows = [update(str(device)).parts["params"]["w"].tobytes() for device in range(3)]
    windows += [HOP.count_in(update(str(device))).sums["params"]["w"].tobytes() for device in range(3)]
    windows.append(total.sums["params"]["w"].tobytes())
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if any(window[640:704] in path.read_bytes() for window in windows)]


@pytest.mark.parametrize("seals", [True, False], ids=["sealed", "the control: not sealed"])
def test_nothing_on_the_disk_tells_what_anyone_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seals: bool
) -> None:
    def as_it_is(key: bytes, body: bytes, about: str) -> bytes:
        return body

    def joined(key: bytes, pieces: Sequence[bytes | memoryview], about: str) -> bytes:
        return b"".join(pieces)

    if not seals:
        monkeypatch.setattr(module, "seal_pieces", joined)
        monkeypatch.setattr(module, "unseal", as_it_is)
    coordinator, sums = opened(f"sqlite:///{tmp_path}/run.db", "run", tmp_path)
    coordinator.tick(0.0)
    found = list[str]()
    for device in range(3):
        take_in(coordinator, sums, str(device))
        sums.commit(0.0)
        found += found_on_disk(tmp_path, sums.total(0))
    assert bool(found) is not seals


def test_a_run_needs_its_ring(tmp_path: Path) -> None:
    coordinator, sums = opened(f"sqlite:///{tmp_path}/run.db", "run", tmp_path)
    coordinator.tick(0.0)
    take_in(coordinator, sums, "1")
    sums.commit(0.0)
    for file in (tmp_path / "keys").iterdir():
        file.unlink()
    with pytest.raises(SealError):
        opened(f"sqlite:///{tmp_path}/run.db", "run", tmp_path)[1].total(0)
