"""The published versions of a server's tasks, recorded outside the database (DIR/head.json).

They show whether a database was restored from an older backup. `reconcile` continues from such a database.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

from sumus.errors import ExperimentError
from sumus.operations.stores import HEAD, Storage, Stores
from sumus.protocol.round import Round, State
from sumus.protocol.rows import changed
from sumus.server.replica import LASTS
from sumus.server.tasks import ServedTask
from sumus.storage.files import write_whole
from sumus.storage.store import Rows


def _heads(tasks: list[ServedTask]) -> dict[str, Any]:
    heads: dict[str, Any] = {}
    for task in tasks:
        with task.training.store.transaction() as rows:
            run = rows.run()
        heads[task.name] = {"version": run.version, "epoch": run.epoch}
    return heads


def check_head(path: Path, tasks: list[ServedTask]) -> None:
    """Refuse a database that is older than the published versions: noise that was spent since then counts in it as unspent.

    Args:
        path: The file with the published versions.
        tasks: The tasks, as the database has them.

    Raises:
        ExperimentError: The database is older, or the file is damaged.
    """
    if not path.exists():
        return
    try:
        known = cast(dict[str, dict[str, int]], json.loads(path.read_text()))
    except ValueError as error:
        raise ExperimentError(
            f"{path} is damaged: restore it from a backup, or run `sumus reconcile` to continue from the database"
        ) from error
    for name, at in _heads(tasks).items():
        head = known.get(name) or at
        if (head["epoch"], head["version"]) > (at["epoch"], at["version"]):
            raise ExperimentError(
                f"the database has version {at['version']} of {name}, but version {head['version']} was already published, so it "
                "is an older database, from a backup: run `sumus reconcile`, which begins a new noise epoch from it"
            )


def head_writer(path: Path, tasks: list[ServedTask]) -> Callable[[], None]:
    """Return a function that writes the published versions to a file if they have changed."""
    written: dict[str, Any] = {}

    def write() -> None:
        now = {task.name: {"version": task.training.version} for task in tasks}
        if now != written:
            write_whole(path, json.dumps(_heads(tasks)).encode(), lasting=True)
            written.clear()
            written.update(now)

    return write


def reconcile(storage: Storage) -> dict[str, int]:
    """Continue from a database that was restored from a backup.

    Each task's noise epoch is raised above the published one. Open rounds are given up: their sums do not match the database.

    Args:
        storage: The location of the server's data.

    Returns:
        The epochs, by task.

    Raises:
        ExperimentError: Another server works on the database, or the data is in memory.
    """
    if storage.data is None:
        raise ExperimentError("there is nothing to reconcile in memory: give the server's folder")
    path = storage.data / HEAD
    known: dict[str, dict[str, int]] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text())
    epochs: dict[str, int] = {}
    with ExitStack() as stack:
        stores = Stores(storage, stack)
        if stores.leases.shared and (there := [each.name for each in stores.leases.present(LASTS)]):
            raise ExperimentError(f"replica {there[0]} works on this database: stop all replicas first")
        for name in stores.runs():
            task, _, kind = name.rpartition(".")
            with stores.store(name).transaction() as rows:
                _give_up(rows)
                if kind == "train" and rows.model(rows.run().version) is not None:
                    run = rows.run()
                    epochs[task] = max(run.epoch, known.get(task, {}).get("epoch", 0)) + 1
                    rows.put_run(changed(run, epoch=epochs[task]))
                    known[task] = {"version": run.version, "epoch": epochs[task]}
        write_whole(path, json.dumps(known).encode(), lasting=True)
    return epochs


def _give_up(rows: Rows) -> None:
    """Abandon open rounds and sessions, since their sums are lost."""
    ended = [row for row in rows.rounds() if row.state is not State.PLANNED and not row.over]
    for row in ended:
        rows.put_round(changed(row, state=State.ABANDONED, reason="restored"))
        rows.drop_shards(row.number)
        rows.put_note(row.number, "key", None)
    for session in map(rows.session, rows.sessions_out()):
        if session is not None:
            rows.put_session(changed(session, state="dropped", reason="restored"))
    if ended:
        newest = rows.run().newest
        last = rows.round(newest)
        rows.put_round(
            Round(newest + 1, since=0.0 if last is None else last.since, fence=0 if last is None else last.fence)
        )
        rows.put_run(changed(rows.run(), newest=newest + 1))
