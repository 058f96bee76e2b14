"""The devices that have left a server or were revoked, stored outside its database: a restored backup must not admit them again.

    departures = Departures(data / "departed.txt")
    departures.note(identity)              on the disk when this returns
    departures.hold(identities)            updates a database that lacks some of these departures

The file has one line for each device: `revoked` or `withdrawn`, the id, the population. An id is the hash of a key.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sumus.errors import ExperimentError
from sumus.storage.files import sync
from sumus.storage.identities import Identities, Identity, IdentityRows

_LINE = re.compile(r"(revoked|withdrawn) ([0-9a-f]{64}) (\S+)")
_BATCH = 1000
"""The number of rows to process in one transaction."""


class Departures:
    """The file of departed devices. Only its owner has access, and it only grows. A partial line after a crash is ignored.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, row: Identity) -> None:
        """Add a device that is revoked or withdrawn. Raise ExperimentError if the file cannot be written."""
        there = self._path.exists()
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "ab") as file:
                file.write(f"\n{row.state} {row.id} {row.population}\n".encode())
                file.flush()
                os.fsync(descriptor)
            if not there:
                sync(self._path.parent)
        except OSError as error:
            raise ExperimentError(
                f"{self._path} cannot be written: {error.strerror or error}; no device is removed until the file can be written"
            ) from error

    def hold(self, identities: Identities) -> None:
        """Mark each departed device in a database's rows. Repeating this changes nothing."""
        left = list(self._read())
        for first in range(0, len(left), _BATCH):
            with identities.transaction() as rows:
                for state, device, population in left[first : first + _BATCH]:
                    _depart(rows, state, device, population)

    def _read(self) -> Iterator[tuple[str, str, str]]:
        try:
            lines = self._path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            raise ExperimentError(
                f"{self._path} cannot be read: {error.strerror or error}; it lists the devices that must not come back, so "
                "check the disk"
            ) from error
        for line in lines:
            if (found := _LINE.fullmatch(line)) is not None:
                yield found[1], found[2], found[3]


def _depart(rows: IdentityRows, state: str, device: str, population: str) -> None:
    row = rows.identity(device) or Identity(device, population, b"", "enrolled", 0.0, 0.0)
    if state == "revoked" and row.state != "revoked":
        rows.put_identity(replace(row, state="revoked"))
        rows.drop_members(device)
    elif state == "withdrawn" and row.state == "enrolled":
        rows.put_identity(replace(row, state="withdrawn", public_key=b"", seen=0.0, link=""))
        rows.drop_members(device)
