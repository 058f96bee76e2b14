"""Backup and restoration of a server's folder.

    back_up(Storage(data), folder)       copies the rows as they are at one moment, and their models, even while the server runs
    restore(folder, Storage(data))       needs a folder without a database; starts a new epoch, and gives up open rounds

A backup holds no data that could open a sum: no keys, no seeds and no sums of open rounds. A device whose report was counted
after the backup is not asked for it again. The model with that report is lost, like all other data after the backup.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from sumus.errors import ExperimentError
from sumus.operations.published import reconcile
from sumus.operations.stores import Storage, make_private
from sumus.storage.blobs import Blobs, DirectoryBlobs, open_blobs
from sumus.storage.files import LockHeldError, lock_file, sync, write_whole
from sumus.storage.sql import SqlStore
from sumus.text import amount

DATABASE, MODELS, ABOUT = "sumus.db", "blobs", "backup.json"


@dataclass(frozen=True)
class BackupContents:
    """The contents of a backup or of a restoration.

    Attributes:
        tasks: The newest version of each task.
        objects: The number of plans and models.
        nbytes: The size of all plans and models, in bytes.
        epochs: The new epoch of each restored task; None for a backup.
    """

    tasks: Mapping[str, int]
    objects: int
    nbytes: int
    epochs: Mapping[str, int] | None = None

    def shown(self) -> list[str]:
        """Return lines for a terminal."""
        lines = [f"{self.objects:,} plans and models, {amount(self.nbytes)}"]
        for task, version in self.tasks.items():
            epoch = "" if self.epochs is None else f", epoch {self.epochs[task]}"
            lines.append(f"{task}: version {version}{epoch}")
        return lines


def back_up(storage: Storage, folder: Path) -> BackupContents:
    """Copy a server's rows, with the plans and models that they point to, to a new folder.

    Raises:
        ExperimentError: The server has no database, or the folder cannot be made.
    """
    if storage.data is None or not (storage.database or (storage.data / DATABASE).exists()):
        raise ExperimentError(
            f"there is no server's database in {storage.data}: give the folder of `sumus serve --data`"
        )
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise ExperimentError(f"{folder} cannot be made: {error.strerror}; give the backup a new folder") from error
    try:
        return _backed_up(storage, storage.data, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _backed_up(storage: Storage, data: Path, folder: Path) -> BackupContents:
    with closing(SqlStore.open(storage.database or data / DATABASE, "tasks")) as store:
        store.backup(folder / DATABASE)
    tasks, wanted, needed = _pointed_to(folder / DATABASE)
    objects, nbytes = _copy(open_blobs(storage.blobs or data / MODELS), DirectoryBlobs(folder / MODELS), wanted, needed)
    copied = BackupContents(tasks, objects, nbytes)
    about = {"tasks": dict(tasks), "objects": objects, "bytes": nbytes}
    write_whole(folder / ABOUT, json.dumps(about).encode(), lasting=True)
    return copied


def restore(folder: Path, storage: Storage) -> BackupContents:
    """Restore a backup into a server's folder that has no database.

    Raises:
        ExperimentError: The backup is incomplete, or the server's folder has a database.
    """
    if not (folder / ABOUT).exists():
        raise ExperimentError(f"{folder} is not a complete backup: give the folder that `sumus backup -o` made")
    if storage.data is None or storage.database is not None:
        raise ExperimentError(
            "a backup can only be restored into a folder: give the server's folder, without the URL of a database"
        )
    make_private(storage.data)
    with ExitStack() as held:
        try:
            held.callback(lock_file(storage.data / "lock"))
        except LockHeldError:
            raise ExperimentError(f"a server is using {storage.data}: stop it first") from None
        if (storage.data / DATABASE).exists():
            raise ExperimentError(
                f"there is a database in {storage.data}: move {DATABASE}, {DATABASE}-wal and {DATABASE}-shm away, and keep "
                "keys/, head.json and departed.txt where they are"
            )
        tasks, wanted, needed = _pointed_to(folder / DATABASE)
        into = open_blobs(storage.blobs or storage.data / MODELS)
        objects, nbytes = _copy(DirectoryBlobs(folder / MODELS), into, wanted, needed)
        new = storage.data / f"{DATABASE}.new"
        try:
            shutil.copyfile(folder / DATABASE, new)
            new.chmod(0o600)
            sync(new)
            new.replace(storage.data / DATABASE)
            sync(storage.data)
        except OSError as error:
            raise ExperimentError(
                f"{storage.data} cannot be written: {error.strerror or error}; check its disk"
            ) from error
    return BackupContents(tasks, objects, nbytes, reconcile(storage))


def _pointed_to(database: Path) -> tuple[dict[str, int], list[str], set[str]]:
    """Return versions by task, the objects that a database's rows point to, and the objects that a server cannot run without."""
    tasks, wanted, needed = dict[str, int](), dict[str, None](), set[str]()
    with closing(SqlStore.open(database, "tasks")) as store:
        for name in store.runs():
            with store.beside(name).transaction() as rows:
                run, models = rows.run(), rows.models()
            for model in models:
                objects = (model.broadcast, model.memory, model.model)
                wanted |= dict.fromkeys((*objects, model.plan))
                if model.version in (run.version, run.released):
                    needed |= {*objects}
            if models:
                tasks[name.rpartition(".")[0]] = run.version
    return tasks, list(wanted), needed


def _copy(source: Blobs, target: Blobs, wanted: Iterable[str], needed: set[str]) -> tuple[int, int]:
    """Copy objects; return their number and their size in bytes. Only objects that are not needed may be missing."""
    objects = nbytes = 0
    for name in wanted:
        if name not in needed and source.size(name) is None:
            continue
        body = source.get(name)
        target.put(body)
        objects, nbytes = objects + 1, nbytes + len(body)
    return objects, nbytes
