"""The database's tables. Every change of a table needs a step in `migrations/`."""

from sqlalchemy import BigInteger, Column, Double, Index, LargeBinary, MetaData, String, Table
from sqlalchemy.dialects import postgresql

TEXT = String().with_variant(postgresql.TEXT(collation="C"), "postgresql")
"""A text column that is sorted by bytes, independently of the database server's language setting."""

TABLES = MetaData()
RUN = Table(
    "run",
    TABLES,
    Column("run", TEXT, primary_key=True),
    Column("newest", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("lasts", Double, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("released", BigInteger, nullable=False),
    Column("led", Double, nullable=False),
    Column("takes", Double, nullable=False),
    Column("takes_by_edge", Double, nullable=False),
    Column("models", BigInteger, nullable=False),
)
ROUND = Table(
    "round",
    TABLES,
    Column("run", TEXT, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("state", TEXT, nullable=False),
    Column("since", Double, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("given", BigInteger, nullable=False),
    Column("dropped", BigInteger, nullable=False),
    Column("counted", BigInteger, nullable=False),
    Column("reason", TEXT, nullable=False),
)
SESSION = Table(
    "session",
    TABLES,
    Column("run", TEXT, primary_key=True),
    Column("id", TEXT, primary_key=True),
    Column("device", TEXT, nullable=False),
    Column("serial", BigInteger, nullable=False),
    Column("round", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("expires", Double, nullable=False),
    Column("state", TEXT, nullable=False),
    Column("reason", TEXT, nullable=False),
    Column("sum", BigInteger),
    Column("staleness", BigInteger, nullable=False),
    Column("parent", TEXT, nullable=False),
    Column("began", Double, nullable=False),
    Index("session_expires", "run", "state", "expires"),
    Index("session_began", "run", "state", "began"),
    Index("session_device", "run", "device"),
)
DEVICE = Table(
    "device",
    TABLES,
    Column("run", TEXT, primary_key=True),
    Column("id", TEXT, primary_key=True),
    Column("session", TEXT),
    Column("last_sum", BigInteger),
    Column("last_counted", TEXT),
    Column("times_counted", BigInteger, nullable=False),
    Column("lapses", BigInteger, nullable=False),
    Column("rests_until", Double, nullable=False),
    Column("models", BigInteger, nullable=False),
)
COUNTED = Table(
    "counted",
    TABLES,
    Column("run", TEXT, primary_key=True),
    Column("session", TEXT, primary_key=True),
    Column("sum", BigInteger, nullable=False),
    Column("place", BigInteger, nullable=False),
    Index("counted_sum", "run", "sum", "place"),
)
"""The primary key (run, session) makes sure that a report counts once."""
SHARD = Table(
    "shard",
    TABLES,
    Column("run", TEXT, primary_key=True),
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("name", TEXT, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("file", TEXT, nullable=False),
)
NOTE = Table(
    "note",
    TABLES,
    Column("run", TEXT, primary_key=True),
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("name", TEXT, primary_key=True),
    Column("body", LargeBinary, nullable=False),
)
MODEL = Table(
    "model",
    TABLES,
    Column("run", TEXT, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("round", BigInteger),
    Column("parent", BigInteger),
    Column("broadcast", TEXT, nullable=False),
    Column("memory", TEXT, nullable=False),
    Column("model", TEXT, nullable=False),
    Column("plan", TEXT, nullable=False),
    Column("contributors", BigInteger, nullable=False),
    Column("metrics", TEXT, nullable=False),
    Column("at", Double, nullable=False),
)
TOKEN = Table(
    "token",
    TABLES,
    Column("hash", TEXT, primary_key=True),
    Column("population", TEXT, nullable=False),
    Column("uses", BigInteger, nullable=False),
    Column("expires", Double, nullable=False),
    Column("speaks_for", BigInteger, nullable=False),
    Column("made", BigInteger, nullable=False),
)
IDENTITY = Table(
    "identity",
    TABLES,
    Column("id", TEXT, primary_key=True),
    Column("population", TEXT, nullable=False),
    Column("public_key", LargeBinary, nullable=False),
    Column("state", TEXT, nullable=False),
    Column("enrolled", Double, nullable=False),
    Column("seen", Double, nullable=False),
    Column("speaks_for", BigInteger, nullable=False),
    Column("members", BigInteger, nullable=False),
    Column("link", TEXT, nullable=False),
    Index("identity_population", "population", "state"),
)
MEMBER = Table(
    "member",
    TABLES,
    Column("device", TEXT, primary_key=True),
    Column("edge", TEXT, nullable=False),
    Column("serial", BigInteger, nullable=False),
    Column("seen", Double, nullable=False),
    Index("member_edge", "edge", "seen"),
)
LEASE = Table(
    "lease",
    TABLES,
    Column("name", TEXT, primary_key=True),
    Column("holder", TEXT, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("expires", Double, nullable=False),
)
REPLICA = Table(
    "replica",
    TABLES,
    Column("name", TEXT, primary_key=True),
    Column("serves", TEXT, nullable=False),
    Column("seen", Double, nullable=False),
)
SERIAL = Table(
    "serial",
    TABLES,
    Column("device", TEXT, primary_key=True),
    Column("serial", BigInteger, nullable=False),
)
"""The serials of devices' last check-ins, if several processes answer devices."""
