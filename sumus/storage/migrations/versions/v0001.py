"""The first version of all tables."""

from alembic import op
from sqlalchemy import BigInteger, Column, Double, LargeBinary, String
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

_TEXT = String().with_variant(postgresql.TEXT(collation="C"), "postgresql")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "run",
        Column("run", _TEXT, primary_key=True),
        Column("newest", BigInteger, nullable=False),
        Column("version", BigInteger, nullable=False),
        Column("fence", BigInteger, nullable=False),
        Column("lasts", Double, nullable=False),
        Column("epoch", BigInteger, nullable=False),
        Column("released", BigInteger, nullable=False),
    )
    op.create_table(
        "round",
        Column("run", _TEXT, primary_key=True),
        Column("number", BigInteger, primary_key=True, autoincrement=False),
        Column("state", _TEXT, nullable=False),
        Column("since", Double, nullable=False),
        Column("fence", BigInteger, nullable=False),
        Column("given", BigInteger, nullable=False),
        Column("dropped", BigInteger, nullable=False),
        Column("counted", BigInteger, nullable=False),
        Column("reason", _TEXT, nullable=False),
    )
    op.create_table(
        "session",
        Column("run", _TEXT, primary_key=True),
        Column("id", _TEXT, primary_key=True),
        Column("device", _TEXT, nullable=False),
        Column("serial", BigInteger, nullable=False),
        Column("round", BigInteger, nullable=False),
        Column("version", BigInteger, nullable=False),
        Column("expires", Double, nullable=False),
        Column("state", _TEXT, nullable=False),
        Column("reason", _TEXT, nullable=False),
        Column("sum", BigInteger),
        Column("staleness", BigInteger, nullable=False),
    )
    op.create_index("session_expires", "session", ["run", "state", "expires"])
    op.create_index("session_device", "session", ["run", "device"])
    op.create_table(
        "device",
        Column("run", _TEXT, primary_key=True),
        Column("id", _TEXT, primary_key=True),
        Column("session", _TEXT),
        Column("last_sum", BigInteger),
        Column("last_counted", _TEXT),
        Column("times_counted", BigInteger, nullable=False),
    )
    op.create_table(
        "counted",
        Column("run", _TEXT, primary_key=True),
        Column("session", _TEXT, primary_key=True),
        Column("sum", BigInteger, nullable=False),
        Column("place", BigInteger, nullable=False),
    )
    op.create_index("counted_sum", "counted", ["run", "sum", "place"])
    op.create_table(
        "shard",
        Column("run", _TEXT, primary_key=True),
        Column("round", BigInteger, primary_key=True, autoincrement=False),
        Column("name", _TEXT, primary_key=True),
        Column("seq", BigInteger, nullable=False),
        Column("count", BigInteger, nullable=False),
        Column("file", _TEXT, nullable=False),
    )
    op.create_table(
        "note",
        Column("run", _TEXT, primary_key=True),
        Column("round", BigInteger, primary_key=True, autoincrement=False),
        Column("name", _TEXT, primary_key=True),
        Column("body", LargeBinary, nullable=False),
    )
    op.create_table(
        "model",
        Column("run", _TEXT, primary_key=True),
        Column("version", BigInteger, primary_key=True, autoincrement=False),
        Column("round", BigInteger),
        Column("parent", BigInteger),
        Column("broadcast", _TEXT, nullable=False),
        Column("memory", _TEXT, nullable=False),
        Column("model", _TEXT, nullable=False),
        Column("plan", _TEXT, nullable=False),
        Column("contributors", BigInteger, nullable=False),
        Column("metrics", _TEXT, nullable=False),
        Column("at", Double, nullable=False),
    )
    op.create_table(
        "token",
        Column("hash", _TEXT, primary_key=True),
        Column("population", _TEXT, nullable=False),
        Column("uses", BigInteger, nullable=False),
        Column("expires", Double, nullable=False),
    )
    op.create_table(
        "identity",
        Column("id", _TEXT, primary_key=True),
        Column("population", _TEXT, nullable=False),
        Column("public_key", LargeBinary, nullable=False),
        Column("state", _TEXT, nullable=False),
        Column("enrolled", Double, nullable=False),
        Column("seen", Double, nullable=False),
    )
    op.create_index("identity_population", "identity", ["population", "state"])
