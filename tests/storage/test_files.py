"""A lock on a file is one process's, and ends with the process; a private folder is its owner's alone."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sumus.storage.files import LockHeldError, lock_file, make_private_folder

HOLDER = """
import sys, time
from pathlib import Path
from sumus.storage.files import lock_file
lock_file(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_is_held_by_one_until_it_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    let_go = lock_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(LockHeldError):
        lock_file(path)
    let_go()
    again = lock_file(path)
    let_go()  # once more, and it lets nothing of the next one go
    with pytest.raises(LockHeldError):
        lock_file(path)
    again()


def test_a_lock_ends_with_its_process_even_if_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            with pytest.raises(LockHeldError):
                lock_file(path)
        finally:
            process.kill()
    lock_file(path)()


def test_a_lock_where_nothing_can_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock_file(tmp_path / "no folder" / "lock")


def test_a_lock_leaves_no_file_open_that_could_not_be_locked(tmp_path: Path) -> None:
    let_go, before = lock_file(tmp_path / "lock"), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(LockHeldError):
            lock_file(tmp_path / "lock")
    assert len(os.listdir("/proc/self/fd")) == before
    let_go()


def test_a_private_folder_is_its_owners_alone_and_one_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    make_private_folder(tmp_path / "a" / "b")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    make_private_folder(tmp_path / "open")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o755
