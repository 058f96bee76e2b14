"""Files that are whole or not there."""

import os
from pathlib import Path

from sumus.errors import ExperimentError


def write_whole(path: Path, body: bytes, lasting: bool = False) -> None:
    """Replace a file in one step: a crash leaves the old one or the new one, whole.

    lasting: return only once the new one would also survive a loss of power; else `sync` it, and its folder, later.
    """
    new = path.with_name(path.name + ".new")
    try:
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


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
