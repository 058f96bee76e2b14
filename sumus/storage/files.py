"""Files that are whole or not there, folders that are private, and locks that one process holds."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from sumus.errors import ExperimentError, UsageError


def write_whole(path: Path, body: bytes, lasting: bool = False, private: bool = False) -> None:
    """Replace a file in one step: a crash leaves the old one or the new one, whole.

    lasting: return only once the new one would also survive a loss of power; else `sync` it, and its folder, later.
    private: for its owner alone, from the first byte on.
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
            f"{path} cannot be written: {error.strerror or error}; what was there is as it was"
        ) from error


def make_private_folder(folder: Path) -> None:
    """Make a folder, and those above it, if there is none. Only its owner may enter a folder that is made here (mode 0700).

    Raises:
        OSError: The folder cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


class LockHeldError(Exception):
    """Another process holds a lock."""


def lock_file(path: Path) -> Callable[[], None]:
    """Hold a file until the process ends, so that no other process can hold it. The file is made if there is none.

    The lock belongs to the open file and not to its name: a process that is killed leaves no lock behind. Systems without such
    locks, which are no Unix, give none.

    Returns:
        A function that lets the lock go. Only its first call has an effect.

    Raises:
        LockHeldError: Another process holds the file.
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
    except OSError:  # such as a file system that knows no locks
        os.close(descriptor)
        raise
    held = [descriptor]

    def let_go() -> None:
        while held:
            os.close(held.pop())

    return let_go


def user_folder(variable: str, below: str, instead: str, environment: Mapping[str, str] = os.environ) -> Path:
    """A folder for what belongs to this user, and not to a project.

    Args:
        variable: Name in the environment that may hold an absolute path, as XDG_DATA_HOME.
        below: Where it lies in the user's home otherwise.
        instead: What a person can do if there is neither; the end of a sentence.
        environment: See `variable`.

    Raises:
        UsageError: The user has no home folder.
    """
    base = environment.get(variable, "")
    if base.startswith("/"):
        return Path(base)
    return _home(Path("~") / below, f"this user has no home folder, and {variable} names no other: {instead}")


def expanded(path: str | Path) -> Path:
    """A path whose `~` is a home folder. UsageError if there is no such home."""
    return _home(Path(path), f"{path} begins with the home folder of a user who has none: give the whole path")


def _home(path: Path, why_not: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # no HOME, and no entry among the machine's users
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
"""A blank, a tab, a line feed, a backslash or a `#` in a folder's name, as Linux lists them."""


def _unescaped(found: re.Match[str]) -> str:
    return chr(int(found[1], 8))


def network_disk(path: Path, mounts: str | None = None) -> str | None:
    """The kind of file system of a path, if it is another machine's. mounts: as Linux lists them; elsewhere none is known."""
    if mounts is None:
        listed = Path("/proc/self/mounts")
        mounts = listed.read_text() if listed.exists() else ""
    within = path.resolve()
    found = (line.split()[1:3] for line in mounts.splitlines())
    of_path = [(folder, kind) for folder, kind in found if within.is_relative_to(_OCTAL.sub(_unescaped, folder))]
    kind = max(of_path, key=lambda each: len(each[0]))[1] if of_path else ""
    return kind if kind in _NETWORK else None
