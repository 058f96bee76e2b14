"""A watched folder: takes each reading once from files that are put there or appended to.

    watched = WatchedFolder(Path("incoming"), intake)
    for seen in watched.look():          about once a second
        print(seen.said)

A file is taken once it is complete: it has not changed for two seconds, and ends as a file of its format should. Its readings
are kept, and then the file is moved to `done/`. Readings that cannot be kept go to `refused/`, with the reasons in a file next
to them; once corrected, they can be put into the folder again. A program that still has the file open may continue: readings
that it writes into the moved file are taken too.

With `follow=True`, files stay where they are, and each line is taken once it is complete, even if files are renamed, replaced or
started again.

Files whose names begin with a dot, or have an unknown ending, are left alone. `WatchedFolder.state` lists the waiting files,
with reasons.

    WatchedFolder   scans the folder
      WholeFiles      takes and moves whole files         FollowedFiles   takes lines of files that stay
      LateWrites      takes readings that are written into moved files
        FileLines       finds the new lines of one file, and keeps their readings
          Archive         moves files to `done/` and `refused/`, and deletes old ones
"""

import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sumus.errors import ExperimentError
from sumus.node.archive import Archive
from sumus.node.file_lines import FileLines
from sumus.node.folder_state import DONE, REFUSED, FolderState, SeenFile, UnchangedSince
from sumus.node.followed_files import FollowedFiles
from sumus.node.formats import is_read
from sumus.node.intake import Intake
from sumus.node.ledger import FileState, Ledger
from sumus.node.readings import USUAL, Retention
from sumus.node.whole_files import LateWrites, WholeFiles

LOOK_S = 1.0
"""The seconds between two scans of the folder."""
PRUNE_S = 60.0
"""The seconds between two checks for files that are too old, if no new ones arrive."""


class WatchedFolder:
    """A folder whose files contain readings.

    Args:
        folder: The folder; it is made if it does not exist.
        intake: Keeps the readings.
        retention: The limits on the files in each of `done/` and `refused/`, in bytes and in days since the node put them there.
        clock: Returns seconds that never go backwards.
        now: Returns the seconds since 1970.
        follow: Whether files stay where they are, and each line is taken once it is complete.

    Raises:
        ExperimentError: The path is not a folder, or files in it cannot be moved.
    """

    def __init__(
        self,
        folder: Path,
        intake: Intake,
        retention: Retention = USUAL,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        follow: bool = False,
    ) -> None:
        self._folder, self._clock, self.state = folder, clock, FolderState()
        self._ledger, self._since = Ledger(intake.readings), UnchangedSince()
        self._archive = Archive(folder, self._ledger, retention, now)
        lines = FileLines(intake, self._ledger, self._archive, self._since, self.state, not follow, now)
        self._whole = WholeFiles(folder, lines, self._archive, self._ledger, self._since, self.state)
        self._late = LateWrites(folder, lines, self._ledger, self._since)
        self._followed: FollowedFiles | None = None
        if follow:
            self._followed = FollowedFiles(folder, lines, self._ledger, self._since, self.state, clock, now)
        self._next_prune = 0.0

    def close(self) -> None:
        """Close the files that are followed."""
        if self._followed is not None:
            self._followed.close()

    def look(self) -> list[SeenFile]:
        """Take the new readings in the folder.

        Returns:
            The files from which readings were taken.

        Raises:
            ExperimentError: Readings cannot be stored now, or files cannot be moved. Readings that were not taken stay in their
                files.
        """
        states, now = self._states(), self._clock()
        self.state.waiting.clear()
        self._since.look(states, now)
        seen = list((self._whole if self._followed is None else self._followed).take(states, now))
        seen += self._late.take(now)
        if seen or now >= self._next_prune:
            self._next_prune = now + PRUNE_S
            self._archive.prune()
        return seen

    def _states(self) -> dict[str, FileState]:
        """Find the files that may contain readings, and record the files that are left alone."""
        found, left = dict[str, FileState](), dict[str, str]()
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in (DONE, REFUSED):
                        continue
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if not stat.S_ISREG(status.st_mode):
                            left[entry.name] = "it is not a regular file"
                        elif is_read(entry.name) or self._is_followed(FileState.of(status)):
                            found[entry.name] = FileState.of(status)
                        else:
                            left[entry.name] = "files with this ending are not read"
        except OSError as error:
            raise ExperimentError(f"{self._folder} cannot be watched: {error.strerror or error}") from error
        self.state.left_alone = left
        return found

    def _is_followed(self, state: FileState) -> bool:
        """Return whether a file is followed, even if it was renamed."""
        return self._followed is not None and bool(self._ledger.of_inode(state.inode))
