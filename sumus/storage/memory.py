"""Rows in memory: for simulation and tests, and gone with the process."""

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

from sumus.protocol.round import Device, Round, Session
from sumus.storage.store import Fenced, Rows, Run, Shard


class MemoryStore:
    """A `Store`. rounds, sessions, devices: by number and id.  sums: sessions counted, by round, and counted: the round of each.
    run: where it stands."""

    def __init__(self) -> None:
        self.run = Run()
        self.rounds: dict[int, Round] = {0: Round(0)}
        self.sessions: dict[str, Session] = {}
        self.devices: dict[str, Device] = {}
        self.sums: dict[int, dict[str, None]] = {}
        self.counted: dict[str, int] = {}
        self.shards: dict[tuple[int, str], Shard] = {}
        self.keys: dict[int, bytes | None] = {}

    def transaction(self) -> "_Transaction":
        return _Transaction(self)


class _Transaction:
    """What was written, until the end; None for what was forgotten."""

    __slots__ = ("_counted", "_devices", "_forget", "_keys", "_rounds", "_run", "_sessions", "_shards", "_store")

    def __init__(self, store: MemoryStore) -> None:
        self._store, self._run, self._forget = store, store.run, 0
        self._rounds: dict[int, Round] = {}
        self._sessions: dict[str, Session | None] = {}
        self._devices: dict[str, Device] = {}
        self._counted: dict[str, int] = {}
        self._shards: dict[tuple[int, str], Shard] = {}
        self._keys: dict[int, bytes | None] = {}

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            return
        store = self._store
        store.run = self._run
        store.rounds |= self._rounds
        store.devices |= self._devices
        for id, row in self._sessions.items():
            if row is None:
                store.sessions.pop(id, None)
            else:
                store.sessions[id] = row
        for id, number in self._counted.items():
            store.sums.setdefault(number, {})[id] = None
            store.counted[id] = number
        store.shards |= self._shards
        store.keys |= self._keys
        if self._forget:
            store.shards = {which: row for which, row in store.shards.items() if row.round >= self._forget}
            store.keys = {number: wrapped for number, wrapped in store.keys.items() if number >= self._forget}
            store.rounds = {number: row for number, row in store.rounds.items() if number >= self._forget}
            for old in [number for number in store.sums if number < self._forget]:
                for id in store.sums.pop(old):
                    del store.counted[id]

    def run(self) -> Run:
        return self._run

    def round(self, number: int) -> Round | None:
        return (self._rounds.get(number) or self._store.rounds.get(number)) if number >= self._forget else None

    def rounds(self) -> Sequence[Round]:
        rows = {**self._store.rounds, **self._rounds}
        return [rows[number] for number in sorted(rows) if number >= self._forget]

    def session(self, id: str) -> Session | None:
        return self._sessions[id] if id in self._sessions else self._store.sessions.get(id)

    def device(self, id: str) -> Device | None:
        known = self._devices.get(id) or self._store.devices.get(id)
        if known is None or known.session is None:
            return known
        now = self.session(known.session.id)
        return known if now is known.session else replace(known, session=now)

    def overdue(self, now: float) -> Sequence[str]:
        late = [row for row in self._all_sessions() if row.state == "out" and row.expires <= now]
        return [row.id for row in sorted(late, key=lambda row: (row.expires, row.id))]

    def counted_in(self, number: int) -> Sequence[str]:
        if number < self._forget:
            return []
        new = (id for id, its in self._counted.items() if its == number)
        return list(dict.fromkeys([*self._store.sums.get(number, ()), *new]))

    def put_run(self, run: Run) -> None:
        self._run = run

    def put_round(self, row: Round) -> None:
        self._rounds[row.number] = row

    def put_session(self, row: Session) -> None:
        before = self._counted.get(row.id, self._store.counted.get(row.id))
        if before is not None and before >= self._forget and before != row.sum:
            raise Fenced
        if row.sum is not None:
            self._counted[row.id] = row.sum
        self._sessions[row.id] = row

    def put_device(self, row: Device) -> None:
        self._devices[row.id] = row

    def drop_session(self, id: str) -> None:
        self._sessions[id] = None

    def shards(self, number: int) -> Sequence[Shard]:
        if number < self._forget:
            return []
        rows = {**self._store.shards, **self._shards}
        return [rows[which] for which in sorted(rows) if which[0] == number]

    def put_shard(self, row: Shard) -> None:
        which = row.round, row.name
        before = self._shards.get(which) or self._store.shards.get(which)
        if row.seq != 1 + (before.seq if before is not None and row.round >= self._forget else 0):
            raise Fenced
        self._shards[which] = row

    def key(self, number: int) -> bytes | None:
        return self._keys.get(number, self._store.keys.get(number)) if number >= self._forget else None

    def put_key(self, number: int, wrapped: bytes | None) -> None:
        self._keys[number] = wrapped

    def forget_rounds_before(self, number: int) -> None:
        self._forget = max(self._forget, number)

    def _all_sessions(self) -> list[Session]:
        return [row for row in {**self._store.sessions, **self._sessions}.values() if row is not None]
