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
from sumus.first_hop import CheckedUpdate
from sumus.protocol.round import AcceptReport
from sumus.rounds import sealed_sums as module
from sumus.rounds.coordinator import Coordinator
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.keyring import SealError
from sumus.wire.reports import encode_report
from sumus.wire.tensors import encode_aggregate
from tests.server.committing import HOP, Insides, opened, recomputed, update

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(tmp_path: Path) -> Insides:
    server = opened(f"sqlite:///{tmp_path}/run.db", "run", tmp_path)
    server.coordinator.tick(0.0)
    return server


def counted(coordinator: Coordinator) -> list[str]:
    with coordinator.store.transaction() as rows:
        return [session.partition("/")[0] for session in rows.counted_in(0)]


def same(one: Aggregate, other: Aggregate) -> bool:
    return encode_aggregate(one) == encode_aggregate(other)


def accepted(actions: tuple[object, ...]) -> list[str]:
    return [action.session for action in actions if isinstance(action, AcceptReport)]


# ── as it should be ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_committed_is_the_sum_of_what_was_sent(server: Insides) -> None:
    told = list[str]()
    for first in (0, 3, 5):
        for device in range(first, first + 3 if first == 0 else first + 2):
            server.take_in(str(device))
        told += accepted(server.commit())
    assert told == [f"{device}/1" for device in range(7)]
    assert same(server.sums.total(0), recomputed([str(device) for device in range(7)]))


def test_a_report_that_comes_again_is_counted_once(server: Insides) -> None:
    server.take_in("1")
    server.commit()
    assert accepted(server.report("1")) == ["1/1"]
    server.take_in("2")
    server.commit()
    assert same(server.sums.total(0), recomputed(["1", "2"]))


def test_what_cannot_be_counted_is_refused_before_anything_is_promised(server: Insides) -> None:
    for value in (np.nan, np.inf, 1e6):
        bad = update("1")
        bad.parts["params"]["w"][3] = value
        with pytest.raises(ParticipantError):
            server.intake.read_report(encode_report(bad), "1", "1/1")


def test_processes_add_apart_and_their_sums_merge_to_the_same_bits(tmp_path: Path) -> None:
    servers = [opened(f"sqlite:///{tmp_path}/run.db", "run", tmp_path) for _ in range(3)]
    servers[0].coordinator.tick(0.0)
    for device in range(12):
        server = servers[device % 3]
        server.take_in(str(device))
        server.commit()
    everyone = recomputed([str(device) for device in range(12)])
    assert all(same(server.sums.total(0), everyone) for server in servers)


def test_a_sum_that_was_read_to_close_its_round_may_still_be_added_to(server: Insides) -> None:
    for device in "12":
        server.take_in(device)
        server.commit()
        assert same(server.sums.total(0), recomputed(list("12")[: int(device)]))


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
@pytest.mark.parametrize("where", ["add", "count_in", "_key", "put", "commit"])
def test_a_commit_that_fails_acknowledges_nothing_and_is_made_again(
    server: Insides, monkeypatch: pytest.MonkeyPatch, where: str, after: bool
) -> None:
    server.take_in("1")
    server.commit()
    server.take_in("2")
    owner: Any = server.sums
    if where in ("commit", "put", "count_in"):
        owner = {"commit": server.coordinator, "put": DirectoryBlobs, "count_in": CheckedUpdate}[where]
    with failing(monkeypatch, owner, where, after), pytest.raises(OSError, match="failed"):
        server.commit()
    if where == "commit" and after:  # it was committed, and only the answer was lost: the device asks again
        assert accepted(server.report("2")) == ["2/1"]
    else:
        assert counted(server.coordinator) == ["1"]
        assert accepted(server.commit()) == ["2/1"]
    server.take_in("3")
    server.commit()
    assert same(server.sums.total(0), recomputed(["1", "2", "3"]))


def test_a_full_disk_acknowledges_nothing(server: Insides, monkeypatch: pytest.MonkeyPatch) -> None:
    server.take_in("1")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ExperimentError, match="No space left on device"):
            server.commit()
    assert counted(server.coordinator) == []
    assert accepted(server.commit()) == ["1/1"]
    assert same(server.sums.total(0), recomputed(["1"]))


def test_a_sum_that_is_not_all_there_is_not_used(server: Insides, tmp_path: Path) -> None:
    server.take_in("1")
    server.commit()
    (file,) = tmp_path.glob("sums/??/*")
    body = file.read_bytes()
    file.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(ExperimentError, match="is damaged"):
        server.sums.total(0)
    file.unlink()
    with pytest.raises(ExperimentError, match="is missing"):
        server.sums.total(0)


def test_what_crashes_leave_is_swept(server: Insides, tmp_path: Path) -> None:
    server.take_in("1")
    server.commit()
    left = DirectoryBlobs(tmp_path / "sums").put(b"sealed")
    assert server.sums.sweep() == [left]
    assert server.sums.sweep() == []
    assert same(server.sums.total(0), recomputed(["1"]))


def test_a_destroyed_sum_is_gone_and_its_files_open_nothing(server: Insides, tmp_path: Path) -> None:
    server.take_in("1")
    server.commit()
    server.sums.destroy(0)
    assert not list(tmp_path.glob("sums/??/*"))
    with pytest.raises(ExperimentError, match="key of round 0 is gone"):
        server.sums.total(0)


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
    server = opened(f"sqlite:///{tmp_path}/run.db", "run", tmp_path)
    server.coordinator.tick(0.0)
    found = list[str]()
    for device in range(3):
        server.take_in(str(device))
        server.commit()
        found += found_on_disk(tmp_path, server.sums.total(0))
    assert bool(found) is not seals


def test_a_run_needs_its_ring(tmp_path: Path) -> None:
    server = opened(f"sqlite:///{tmp_path}/run.db", "run", tmp_path)
    server.coordinator.tick(0.0)
    server.take_in("1")
    server.commit()
    for file in (tmp_path / "keys").iterdir():
        file.unlink()
    with pytest.raises(SealError):
        opened(f"sqlite:///{tmp_path}/run.db", "run", tmp_path).sums.total(0)
