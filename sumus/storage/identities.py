"""Identities: enrolled devices with their public keys, and the tokens with which new devices enrol.

    with identities.transaction() as rows:
        token = rows.token(hash)
        …
        rows.put_identity(…)               all changes are durable when the block ends; none is kept if it raises

Memory, SQLite and PostgreSQL behave the same. Only the hash of a token is kept, so a person who reads the rows cannot
enrol a device.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

State = Literal["enrolled", "revoked", "withdrawn"]
"""The state of a device: it may take part, an admin has barred it, or it has withdrawn by itself."""


@dataclass(frozen=True, slots=True)
class Token:
    """The server's row of a token: a secret text with which devices may enrol.

    Attributes:
        hash: SHA-256 of the token, in hexadecimal.
        population: The population in which devices enrol with this token.
        uses: The number of remaining uses.
        expires: The time at which it expires, in seconds of the server's clock.
        speaks_for: The number of devices that an edge may represent if it enrols with this token; 0 for a device's token.
        made: The number of uses for which the token was made.
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

    Attributes:
        id: SHA-256 of its public key, in hexadecimal.
        population: The population that it belongs to.
        public_key: The Ed25519 key, 32 bytes; empty after the device has withdrawn.
        state: Whether it may take part.
        enrolled: The time at which it enrolled, in seconds of the server's clock.
        seen: The time at which its last request arrived, in seconds of the server's clock.
        speaks_for: The number of devices that it may represent; 0 if it is not an edge.
        members: The number of devices that it claims to have, if it is an edge.
        link: The hash of the token that it enrolled with, if that token was made for several uses; else empty.
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
        """The number of devices that take part through this identity: one, or the members of an edge."""
        return (self.members if self.speaks_for else 1) if self.state == "enrolled" else 0


@dataclass(frozen=True, slots=True)
class Member:
    """A device that checks in through an edge.

    Attributes:
        device: The device's id.
        edge: The edge's id.
        serial: The serial of the check-in with which the device came to this edge.
        seen: The beginning of the last day on which the device checked in, in seconds of the server's clock.
    """

    device: str
    edge: str
    serial: int
    seen: float


class IdentityRows(Protocol):
    """The rows in one transaction. A read returns what the same transaction has written."""

    def token(self, hash: str) -> Token | None:
        """Return a token's row; None if the token does not exist."""
        ...

    def tokens(self) -> Sequence[Token]:
        """Read all tokens, in the order of their hashes."""
        ...

    def put_token(self, row: Token) -> None:
        """Write a token's row."""
        ...

    def drop_token(self, hash: str) -> None:
        """Delete a token."""
        ...

    def identity(self, id: str) -> Identity | None:
        """Return a device's row; None if the device does not exist."""
        ...

    def identities(self, after: str = "", limit: int = 100) -> Sequence[Identity]:
        """Read at most `limit` devices in the order of their ids, beginning after the id `after`."""
        ...

    def put_identity(self, row: Identity) -> None:
        """Write a device's row."""
        ...

    def count(self, population: str) -> int:
        """Count the devices that are enrolled in a population, directly or through its edges."""
        ...

    def read_ahead(self, devices: Sequence[str]) -> None:
        """Read the rows of these devices in advance. This is a hint, and changes only how long later reads take."""
        ...

    def member(self, device: str) -> Member | None:
        """Return the edge through which a device checks in; None if it does not use an edge."""
        ...

    def count_members(self, edge: str) -> int:
        """Count the devices that check in through an edge."""
        ...

    def put_member(self, row: Member) -> None:
        """Write the row that names the edge through which a device checks in."""
        ...

    def drop_member(self, device: str) -> None:
        """Delete the row that names the edge through which a device checks in."""
        ...

    def drop_members(self, edge: str, before: float = math.inf) -> None:
        """Delete the members of an edge that were last seen before a moment."""
        ...


class Identities(Protocol):
    """The devices and tokens of a server."""

    def transaction(self) -> AbstractContextManager[IdentityRows]:
        """Begin a transaction. It ends with the block. Transactions run one after the other."""
        ...

    def find(self, id: str) -> Identity | None:
        """Read a device's row as the last finished transaction left it. This call does not wait for a running
        transaction."""
        ...

    def find_members(self, devices: Sequence[str]) -> Sequence[Member]:
        """Read which edges these devices check in through, in the same way as `find`."""
        ...


class MemoryIdentities:
    """`Identities` in memory. They are gone when the process ends."""

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
        """Return copies of all rows."""
        return dict(self._tokens), dict(self._identities), dict(self._members)

    def become(self, tokens: dict[str, Token], identities: dict[str, Identity], members: dict[str, Member]) -> None:
        """Replace all rows with these rows."""
        self._tokens, self._identities, self._members = tokens, identities, members


class _Transaction:
    """A transaction that works on copies of the rows."""

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
