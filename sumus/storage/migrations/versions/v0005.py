"""The edge through which a device checks in, and the link with which a device enrolled."""

from alembic import op
from sqlalchemy import BigInteger, Column, Double, String
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"

_TEXT = String().with_variant(postgresql.TEXT(collation="C"), "postgresql")


def upgrade() -> None:
    """Make the table of edges' members, and add columns. Existing tokens are treated as tokens for several uses."""
    op.add_column("token", Column("made", BigInteger, nullable=False, server_default="2"))
    op.add_column("identity", Column("link", _TEXT, nullable=False, server_default=""))
    op.create_table(
        "member",
        Column("device", _TEXT, primary_key=True),
        Column("edge", _TEXT, nullable=False),
        Column("serial", BigInteger, nullable=False),
        Column("seen", Double, nullable=False),
    )
    op.create_index("member_edge", "member", ["edge", "seen"])
