"""Disks that are full or cannot be written, a database that restarts, clocks that jump: nothing is lost or counted twice, the
state is clear, and it goes on by itself once that is over."""

import errno
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from sqlalchemy import event

from benchmarks.kills.fleet import Scripted
from sumus.operations.stores import Storage
from sumus.wire.messages import Refused
from tests.server.standing import Standing, in_process, standing
from tests.services import postgresql, restart_postgresql

Fault: TypeAlias = Callable[[Standing], AbstractContextManager[None]]


@contextmanager
def files_are_not_written(at: Standing) -> Iterator[None]:
    """The disk of sums and models is full; the database is on another one."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


@contextmanager
def nothing_is_written(at: Standing) -> Iterator[None]:
    """No file of this process may grow: the system refuses, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def files_are_read_only(at: Standing) -> Iterator[None]:
    """The disk of sums and models was mounted again after an error."""

    real = os.open

    def refused(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refused)
        yield


@contextmanager
def the_database_is_read_only(at: Standing) -> Iterator[None]:
    """Its disk was."""
    engine: Any = at.service.server.tasks[0].training.store._engine  # pyright: ignore[reportAttributeAccessIssue]
    only = "ON"

    def taken(connection: Any, *_: object) -> None:
        connection.execute(f"PRAGMA query_only = {only}")

    event.listen(engine, "checkout", taken)
    yield
    only = "OFF"


FAULTS: tuple[Fault, ...] = (files_are_not_written, files_are_read_only, nothing_is_written, the_database_is_read_only)


def meet(at: Standing, fault: Fault) -> None:
    """A round, and in the next one a report that cannot be written; then it can."""
    at.round()
    at.train()
    first, *others = at.devices
    with fault(at):
        assert not first.send()
        assert at.book.answers["not_ready"] == 1
        answer = at.ready()
        assert answer.status == 503
        assert b"storage fails" in answer.body
        at.look_again()
        assert at.ready().status == 503
    at.look_again()
    assert at.ready().status == 200
    for device in (first, *others):
        assert device.send()
    at.round()
    found = at.audit()
    assert found.good, f"{found} {found.wrong}"
    assert (found.acknowledged, found.models) == (12, 4)


@pytest.mark.parametrize("kind", ["synchronous", "buffered"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_where_nothing_can_be_written_nothing_is_lost(tmp_path: Path, fault: Fault, kind: str) -> None:
    with standing(tmp_path / "data", kind) as at:
        meet(at, fault)


def test_who_enrols_meanwhile_is_told_to_come_again(tmp_path: Path) -> None:
    with standing(tmp_path / "data") as at:
        server = at.service.server
        token = server.roll.new_token("default", server.clock())
        new = Scripted(9, at.bundle.plan, at.book, in_process(at.service, 9))
        with the_database_is_read_only(at), pytest.raises(Refused) as refused:
            new.requests.enrol(token)
        assert refused.value.problem.code == "not_ready", "and not that the server has a defect"
        new.enrol(token)
        new.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("disks can be mounted by root alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_that_is_full(small_disk: Path) -> None:
    @contextmanager
    def filled(at: Standing) -> Iterator[None]:
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"\1" * 4096):
                pass
        yield
        filler.unlink()

    with standing(small_disk / "data") as at:
        meet(at, filled)


def test_postgresql_restarts_in_the_middle_of_commits(tmp_path: Path) -> None:
    with postgresql() as url, standing(Storage(tmp_path / "data", url), "buffered", devices=8, twice=0.1) as at:
        restarts, one = [10, 20], threading.Lock()

        def enough() -> bool:
            with one:  # the others go on
                if restarts and len(at.book.acknowledged) >= restarts[0]:
                    restarts.pop(0)
                    restart_postgresql(url)
            return not restarts and len(at.book.acknowledged) >= 40

        at.work(enough)
        found = at.audit()
        assert found.good, f"{found} {found.wrong}"
        assert at.book.answers["not_ready"] > 0
        assert at.ready().status == 200


@pytest.mark.parametrize("years", [-10, 10])
def test_clocks_that_are_off_by_ten_years_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    now = time.time
    with standing(tmp_path / "data") as at:
        at.round()
        at.train()
        assert all(device.unsettled is not None for device in at.devices)
        monkeypatch.setattr(time, "time", lambda: now() + years * 365.25 * 86400)  # of devices, and of the server too
        for device in at.devices:
            assert device.send()
        at.round()
        found = at.audit()
        assert found.good, f"{found} {found.wrong}"
        assert found.acknowledged == 12


def test_a_server_whose_clock_was_put_back_while_it_was_down_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    with standing(tmp_path / "data") as at:
        at.round()
        at.train()
        monkeypatch.setattr(time, "time", lambda: now() - 10 * 365.25 * 86400)
        at.open_again()
        for device in at.devices:
            assert device.send()
        at.round()
        found = at.audit()
        assert found.good, f"{found} {found.wrong}"
        assert found.acknowledged == 12
