"""The database's form, and the steps that lead to it. They go forward only: a database is never made older.

There is no command for it: whoever opens a database brings it up to date, or refuses a newer one. A step is a file in `versions/`, which says what it does by itself: `tables.py` shows where they lead, and a test compares. Its
revision is a number; `FORM` is the last.
"""

from pathlib import Path

from sqlalchemy import Connection, column, inspect, select, table, text

from sumus.errors import ExperimentError
from sumus.storage.tables import TABLES

FORM = "0001"
"""The revision that this version of sumus works with."""
VERSION_TABLE = "sumus_version"
_LOCK = 0x73756D7572
"""Of PostgreSQL: one process at a time makes these steps."""


def bring_up_to_date(connection: Connection) -> None:
    """Make what is not there yet, within the connection's transaction. ExperimentError where the database is newer, or another's."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    there = set(inspect(connection).get_table_names())
    form = (
        connection.execute(select(column("version_num")).select_from(table(VERSION_TABLE))).scalar()
        if (VERSION_TABLE in there)
        else None
    )
    if form == FORM:
        return
    if form is None and (others := sorted(there & set(TABLES.tables))):
        raise ExperimentError(
            f"the database holds tables of something else ({', '.join(others)}): give sumus one of its own"
        )
    _step(connection, form)


def _step(connection: Connection, form: str | None) -> None:
    from alembic import command  # takes a while to import, and is seldom needed
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = [step.revision for step in ScriptDirectory.from_config(config).walk_revisions()]
    if form is not None and form not in known:
        raise ExperimentError(
            f"the database was written by a newer sumus (its form is {form}, and {FORM} is the last that this one knows): "
            "install that version again, or put back a backup from before"
        )
    command.upgrade(config, FORM)
