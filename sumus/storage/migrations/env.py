"""Read by alembic: its steps go over the connection that it is given, in that one's transaction."""

from alembic import context

from sumus.storage.migrations import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
