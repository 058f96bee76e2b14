"""Who may take part: devices by their public keys, and the tokens that let new ones in.

    with identities.transaction() as rows:
        token = rows.token(hash)
        …
        rows.put_identity(…)               all that is written here is durable when the block ends; or, if it raises, none of it

In memory, SQLite and PostgreSQL it is the same. Of a token only its hash is kept, so that who reads the rows lets nobody in.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

State = Literal["enrolled", "revoked", "withdrawn"]
"""Of a device: it may take part; an admin shut it out; it left by itself."""


@dataclass(frozen=True, slots=True)
class Token:
    """Lets devices enrol.

    Args:
        hash: SHA-256 of the token, in hexadecimal.
        population: The population that its devices enrol in.
        uses: Uses that are left.
        expires: When it ends, in seconds of the server's clock.
        speaks_for: How many devices an edge that enrols with it may speak for; 0 for a device's token.
        made: Uses that it was made for.
    """

    hash: str
    population: str
    uses: int
    expires: float
    speaks_for: int = 0
    made: int = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled device, or an edge.

    Args:
        id: SHA-256 of its public key, in hexadecimal.
        population: The population that it is in.
        public_key: Ed25519, 32 bytes; empty once it has withdrawn.
        state: Whether it may take part.
        enrolled: When it enrolled, in seconds of the server's clock.
        seen: When it was heard of last, in the same seconds.
        speaks_for: How many devices it may speak for; 0 if it is no edge.
        members: How many devices it said that it has.
        link: Hash of the token that it enrolled with, if that token was made for several uses; else empty.
    """

    id: str
    population: str
    public_key: bytes
    state: State
    enrolled: float
    seen: float
    speaks_for: int = 0
    members: int = 0
    link: str = ""

    @property
    def people(self) -> int:
        """Devices that take part through it: itself, or an edge's."""
        return (self.members if self.speaks_for else 1) if self.state == "enrolled" else 0


@dataclass(frozen=True, slots=True)
class Member:
    """A device that asks through an edge.

    Args:
        device: The device's id.
        edge: The id of the edge that it asks through.
        serial: Of the check-in with which it came to that edge.
        seen: The last day on which it asked, in seconds of the server's clock.
    """

    device: str
    edge: str
    serial: int
    seen: float


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

    def read_ahead(self, devices: Sequence[str]) -> None:
        """Hint that these devices are read next. It changes nothing but how long that takes."""
        ...

    def member(self, device: str) -> Member | None:
        """Read the edge that a device asks through; None if it asks through none."""
        ...

    def count_members(self, edge: str) -> int:
        """Count the devices that ask through an edge."""
        ...

    def put_member(self, row: Member) -> None:
        """Write the edge that a device asks through."""
        ...

    def drop_member(self, device: str) -> None:
        """Forget the edge that a device asks through."""
        ...

    def drop_members(self, edge: str, before: float = math.inf) -> None:
        """Forget the devices that ask through an edge, and were seen last before that moment."""
        ...


class Identities(Protocol):
    """The devices and tokens of a server."""

    def transaction(self) -> AbstractContextManager[IdentityRows]:
        """Begin one; it ends with the block. They come one after the other."""
        ...

    def find(self, id: str) -> Identity | None:
        """A device's row, as the last transaction that has ended left it: this waits for none that is on its way."""
        ...

    def find_members(self, devices: Sequence[str]) -> Sequence[Member]:
        """Which edges these devices ask through, in the same way."""
        ...


class MemoryIdentities:
    """`Identities`, gone with the process."""

    def __init__(self) -> None:
        self._tokens: dict[str, Token] = {}
        self._identities: dict[str, Identity] = {}
        self._members: dict[str, Member] = {}

    def transaction(self) -> "_Transaction":
        return _Transaction(self)

    def find(self, id: str) -> Identity | None:
        return self._identities.get(id)

    def find_members(self, devices: Sequence[str]) -> Sequence[Member]:
        members = self._members
        return [members[device] for device in devices if device in members]

    def rows(self) -> tuple[dict[str, Token], dict[str, Identity], dict[str, Member]]:
        """Copies of all rows."""
        return dict(self._tokens), dict(self._identities), dict(self._members)

    def become(self, tokens: dict[str, Token], identities: dict[str, Identity], members: dict[str, Member]) -> None:
        """Keep these rows, and no others."""
        self._tokens, self._identities, self._members = tokens, identities, members


class _Transaction:
    """Works on copies."""

    def __init__(self, store: MemoryIdentities) -> None:
        self._store = store
        self._tokens, self._identities, self._members = store.rows()

    def __enter__(self) -> IdentityRows:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self._store.become(self._tokens, self._identities, self._members)

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

    def read_ahead(self, devices: Sequence[str]) -> None:
        pass

    def member(self, device: str) -> Member | None:
        return self._members.get(device)

    def count_members(self, edge: str) -> int:
        return sum(row.edge == edge for row in self._members.values())

    def put_member(self, row: Member) -> None:
        self._members[row.device] = row

    def drop_member(self, device: str) -> None:
        self._members.pop(device, None)

    def drop_members(self, edge: str, before: float = math.inf) -> None:
        self._members = {device: row for device, row in self._members.items() if row.edge != edge or row.seen >= before}
