"""The database's form (its schema), and the steps that upgrade it. Steps only go forward: a database is never
downgraded.

No command is needed: a program that opens a database upgrades it, or refuses a newer one. Each step is a file in
`versions/` that imports nothing from the rest of the package. A test checks that all steps together lead to
`tables.py`. A step's revision is a number; `FORM` is the last one.
"""

from pathlib import Path
from threading import Lock

from sqlalchemy import Connection, inspect, text

from sumus.errors import ExperimentError
from sumus.storage.tables import TABLES

FORM = "0006"
"""The revision that this version of sumus works with."""
VERSION_TABLE = "sumus_version"
_LOCK = 0x73756D7573
"""The number of PostgreSQL's advisory lock for `alone`: "sumus" in ASCII."""
_ONE = Lock()
"""A lock with which only one thread at a time runs steps, since alembic's `op` is global."""


def alone(connection: Connection) -> None:
    """Wait for other transactions that have called this function, and make later ones wait.

    In SQLite there is nothing to do, since only one transaction can write at a time.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})


def bring_up_to_date(connection: Connection) -> None:
    """Make or upgrade the tables, within the connection's transaction.

    Raises:
        ExperimentError: The database belongs to a newer version of sumus, or holds other tables with these names.
    """
    alone(connection)
    there = set(inspect(connection).get_table_names())
    form = (
        connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
        if VERSION_TABLE in there
        else None
    )
    if form == FORM:
        return
    if form is None and (others := sorted(there & set(TABLES.tables))):
        raise ExperimentError(
            f"the database holds tables of another program ({', '.join(others)}): give sumus a database of its own"
        )
    _step(connection, form)


def _step(connection: Connection, form: str | None) -> None:
    from alembic import command  # slow to import, and rarely needed
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = [step.revision for step in ScriptDirectory.from_config(config).walk_revisions()]
    if form is not None and form not in known:
        raise ExperimentError(
            f"the database was written by a newer sumus (the version of its tables is {form}, but this sumus knows only "
            f"versions up to {FORM}): install the newer sumus again, or restore a backup that is older than the upgrade"
        )
    with _ONE:
        command.upgrade(config, FORM)
