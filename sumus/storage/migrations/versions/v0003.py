"""The lease of the leader, the running replicas, and the serials of devices' last check-ins."""

from alembic import op
from sqlalchemy import BigInteger, Column, Double, String
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"

_TEXT = String().with_variant(postgresql.TEXT(collation="C"), "postgresql")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "lease",
        Column("name", _TEXT, primary_key=True),
        Column("holder", _TEXT, nullable=False),
        Column("fence", BigInteger, nullable=False),
        Column("expires", Double, nullable=False),
    )
    op.create_table(
        "replica",
        Column("name", _TEXT, primary_key=True),
        Column("serves", _TEXT, nullable=False),
        Column("seen", Double, nullable=False),
    )
    op.create_table(
        "serial",
        Column("device", _TEXT, primary_key=True),
        Column("serial", BigInteger, nullable=False),
    )
