"""The number of sums that have become a model: in a run so far, and at the time when a device was last counted."""

from alembic import op
from sqlalchemy import BigInteger, Column, text

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add columns. It is not known which earlier sums were abandoned, so a device's wait between two sums begins anew."""
    op.add_column("run", Column("models", BigInteger, nullable=False, server_default="0"))
    op.add_column("device", Column("models", BigInteger, nullable=False, server_default="0"))
    op.execute(text("UPDATE run SET models = version"))
    op.execute(
        text(
            "UPDATE device SET models = (SELECT version FROM run WHERE run.run = device.run) "
            "WHERE EXISTS (SELECT 1 FROM run WHERE run.run = device.run)"
        )
    )
