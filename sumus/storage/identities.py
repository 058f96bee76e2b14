"""Who may take part: devices by their public keys, and the tokens that let new ones in.

    with identities.transaction() as rows:
        token = rows.token(hash)
        …
        rows.put_identity(…)               all that is written here is durable when the block ends; or, if it raises, none of it

In memory, SQLite and PostgreSQL it is the same. Of a token only its hash is kept, so that who reads the rows lets nobody in.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

State = Literal["enrolled", "revoked", "withdrawn"]
"""Of a device: it may take part; an admin shut it out; it left by itself."""


@dataclass(frozen=True, slots=True)
class Token:
    """Lets devices enrol. hash: SHA-256 of it, in hexadecimal.  population: that they enrol in.  uses: that are left.
    expires: seconds of the server's clock.  speaks_for: devices that who enrols with it may speak for; 0 for none."""

    hash: str
    population: str
    uses: int
    expires: float
    speaks_for: int = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled device. id: SHA-256 of its public key, in hexadecimal.  public_key: Ed25519, 32 bytes.  enrolled, seen: when,
    and when it was heard of last, in seconds of the server's clock.  speaks_for: how many other devices it may speak for, 0 where
    it is no edge.  members: how many it said that it has."""

    id: str
    population: str
    public_key: bytes
    state: State
    enrolled: float
    seen: float
    speaks_for: int = 0
    members: int = 0

    @property
    def people(self) -> int:
        """Devices that take part through it: itself, or an edge's."""
        return (self.members if self.speaks_for else 1) if self.state == "enrolled" else 0


class IdentityRows(Protocol):
    """One transaction. What was written in it is read in it."""

    def token(self, hash: str) -> Token | None:
        """A token's row."""
        ...

    def tokens(self) -> Sequence[Token]:
        """All tokens, by their hash."""
        ...

    def put_token(self, row: Token) -> None:
        """Write a token's row."""
        ...

    def drop_token(self, hash: str) -> None:
        """Forget a token."""
        ...

    def identity(self, id: str) -> Identity | None:
        """A device's row."""
        ...

    def identities(self, after: str = "", limit: int = 100) -> Sequence[Identity]:
        """Devices by their id, from the first one after another on."""
        ...

    def put_identity(self, row: Identity) -> None:
        """Write a device's row."""
        ...

    def count(self, population: str) -> int:
        """Devices that are enrolled in a population, here or at its edges."""
        ...


class Identities(Protocol):
    """The devices and tokens of a server."""

    def transaction(self) -> AbstractContextManager[IdentityRows]:
        """Begin one; it ends with the block. They come one after the other."""
        ...

    def find(self, id: str) -> Identity | None:
        """A device's row, as the last transaction that has ended left it: this waits for none that is on its way."""
        ...


class MemoryIdentities:
    """`Identities`, gone with the process."""

    def __init__(self) -> None:
        self._tokens: dict[str, Token] = {}
        self._identities: dict[str, Identity] = {}

    def transaction(self) -> "_Transaction":
        return _Transaction(self)

    def find(self, id: str) -> Identity | None:
        return self._identities.get(id)

    def rows(self) -> tuple[dict[str, Token], dict[str, Identity]]:
        """Copies of all rows."""
        return dict(self._tokens), dict(self._identities)

    def become(self, tokens: dict[str, Token], identities: dict[str, Identity]) -> None:
        """Keep these rows, and no others."""
        self._tokens, self._identities = tokens, identities


class _Transaction:
    """Works on copies."""

    def __init__(self, store: MemoryIdentities) -> None:
        self._store = store
        self._tokens, self._identities = store.rows()

    def __enter__(self) -> IdentityRows:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self._store.become(self._tokens, self._identities)

    def token(self, hash: str) -> Token | None:
        return self._tokens.get(hash)

    def tokens(self) -> Sequence[Token]:
        return [self._tokens[hash] for hash in sorted(self._tokens)]

    def put_token(self, row: Token) -> None:
        self._tokens[row.hash] = row

    def drop_token(self, hash: str) -> None:
        self._tokens.pop(hash, None)

    def identity(self, id: str) -> Identity | None:
        return self._identities.get(id)

    def identities(self, after: str = "", limit: int = 100) -> Sequence[Identity]:
        return [self._identities[id] for id in sorted(self._identities) if id > after][:limit]

    def put_identity(self, row: Identity) -> None:
        self._identities[row.id] = row

    def count(self, population: str) -> int:
        return sum(row.people for row in self._identities.values() if row.population == population)
