"""Times of sessions: when a session began, how long a device rests if it was silent for too long, how long work takes."""

from alembic import op
from sqlalchemy import BigInteger, Column, Double

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add columns. The server treats existing sessions as if they had begun when the current leader took over."""
    for name in ("led", "takes", "takes_by_edge"):
        op.add_column("run", Column(name, Double, nullable=False, server_default="0"))
    op.add_column("session", Column("began", Double, nullable=False, server_default="0"))
    op.add_column("device", Column("lapses", BigInteger, nullable=False, server_default="0"))
    op.add_column("device", Column("rests_until", Double, nullable=False, server_default="0"))
    op.create_index("session_began", "session", ["run", "state", "began"])
