"""The database's form, and the steps that lead to it. They go forward only: a database is never made older.

There is no command for it: whoever opens a database brings it up to date, or refuses a newer one. A step is a file in
`versions/` that says by itself what it does; `tables.py` shows where they all lead, and a test compares. Its revision is a
number, and `FORM` the last one.
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
"""Of PostgreSQL, for `alone`: "sumus"."""
_ONE = Lock()
"""One thread at a time: alembic's steps say `op`, which there is one of."""


def alone(connection: Connection) -> None:
    """Wait for other transactions that are to be alone, and keep them waiting. In SQLite every one is."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})


def bring_up_to_date(connection: Connection) -> None:
    """Make what is not there yet, within the connection's transaction. ExperimentError where it is newer, or not ours."""
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
    with _ONE:
        command.upgrade(config, FORM)
