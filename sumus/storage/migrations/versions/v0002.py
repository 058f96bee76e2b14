"""Edges: the edge that requested a session, and the number of devices that an edge may represent."""

from alembic import op
from sqlalchemy import BigInteger, Column, String
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"

_TEXT = String().with_variant(postgresql.TEXT(collation="C"), "postgresql")


def upgrade() -> None:
    """Add columns. Existing rows belong to devices without an edge."""
    op.add_column("session", Column("parent", _TEXT, nullable=False, server_default=""))
    op.add_column("token", Column("speaks_for", BigInteger, nullable=False, server_default="0"))
    op.add_column("identity", Column("speaks_for", BigInteger, nullable=False, server_default="0"))
    op.add_column("identity", Column("members", BigInteger, nullable=False, server_default="0"))
