"""Alembic reads this file. The steps run on the connection that alembic is given, in that connection's transaction."""

from alembic import context

from sumus.storage.migrations import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
