"""Helpers for files: files that are written completely or not at all, private folders, and locks between processes."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from sumus.errors import ExperimentError, UsageError


def write_whole(path: Path, body: bytes, lasting: bool = False, private: bool = False) -> None:
    """Replace a file in one step. A crash leaves the old file or the new one, complete.

    Args:
        path: The file.
        body: The new content.
        lasting: Return only when the new file would survive a loss of power. Otherwise the caller must `sync` the file
            and its folder later.
        private: Make the file readable for its owner alone, from the first byte on.

    Raises:
        ExperimentError: The file cannot be written. The old one is unchanged.
    """
    new = path.with_name(path.name + ".new")
    try:
        if private:
            new.unlink(missing_ok=True)
            new.touch(0o600)
        new.write_bytes(body)
        if lasting:
            sync(new)
        new.replace(path)
        if lasting:
            sync(path.parent)
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be written: {error.strerror or error}; its old content is unchanged"
        ) from error


def make_private_folder(folder: Path) -> None:
    """Make a folder and its parents, if they do not exist. Only the owner may enter a folder that is made here (mode 0700).

    Raises:
        OSError: The folder cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


class LockHeldError(Exception):
    """Another process holds the lock."""


def lock_file(path: Path) -> Callable[[], None]:
    """Lock a file until the process ends, so that no other process can lock it. The file is made if it does not exist.

    The lock belongs to the open file and not to its name: a process that is killed leaves no lock behind. A system
    that is not a Unix has no such locks; there, nothing is locked.

    Returns:
        A function that releases the lock. Only its first call has an effect.

    Raises:
        LockHeldError: Another process holds the lock.
        OSError: The file cannot be opened.
    """
    try:
        import fcntl
    except ImportError:
        return lambda: None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(descriptor)
        raise LockHeldError(str(path)) from error
    except OSError:  # for example, the file system has no locks
        os.close(descriptor)
        raise
    held = [descriptor]

    def let_go() -> None:
        while held:
            os.close(held.pop())

    return let_go


def user_folder(variable: str, below: str, instead: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return a folder for data that belongs to this user, and not to a project.

    Args:
        variable: The name of a variable of the environment that may hold an absolute path, such as XDG_DATA_HOME.
        below: The folder's path relative to the user's home, if the variable holds no such path.
        instead: The remedy if there is no folder, as the end of an error message.
        environment: The environment's variables.

    Raises:
        UsageError: The variable is not set, and the user has no home folder.
    """
    base = environment.get(variable, "")
    if base.startswith("/"):
        return Path(base)
    return _home(Path("~") / below, f"this user has no home folder, and {variable} is not an absolute path: {instead}")


def expanded(path: str | Path) -> Path:
    """Replace `~` at the beginning of a path by the home folder.

    Raises:
        UsageError: The home folder does not exist.
    """
    return _home(Path(path), f"{path} begins with `~`, but the home folder is not known: give the full path")


def _home(path: Path, why_not: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # HOME is not set, and the machine's list of users has no entry
        raise UsageError(why_not) from None


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "ceph",
    "glusterfs",
    "lustre",
    "afs",
    "fuse.sshfs",
    "fuse.glusterfs",
    "fuse.ceph",
)


_OCTAL = re.compile(r"\\([0-7]{3})")
"""The escapes that Linux writes for a blank, a tab, a line feed, a backslash or a `#` in a folder's name."""


def _unescaped(found: re.Match[str]) -> str:
    return chr(int(found[1], 8))


def network_disk(path: Path, mounts: str | None = None) -> str | None:
    """Return the kind of a path's file system if the file system is on another machine; else None.

    Args:
        path: The path.
        mounts: The text of /proc/self/mounts. None reads that file; without that file the answer is None.
    """
    if mounts is None:
        listed = Path("/proc/self/mounts")
        mounts = listed.read_text() if listed.exists() else ""
    within = path.resolve()
    found = (line.split()[1:3] for line in mounts.splitlines())
    of_path = [(folder, kind) for folder, kind in found if within.is_relative_to(_OCTAL.sub(_unescaped, folder))]
    kind = max(of_path, key=lambda each: len(each[0]))[1] if of_path else ""
    return kind if kind in _NETWORK else None
