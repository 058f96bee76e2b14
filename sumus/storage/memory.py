"""Rows in memory, for simulations and tests. They are gone when the process ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

from sumus.protocol.round import DeviceRow, Round, Session
from sumus.storage.store import Fenced, Model, Rows, RunRow, Shard

K = TypeVar("K")
V = TypeVar("V")


class MemoryStore:
    """A `Store` in memory.

    Attributes:
        run: The run's row.
        rounds: Rounds by number.
        sessions: Sessions by id.
        devices: Devices by id.
        sums: For each round, the ids of the sessions whose reports are in its sum, in the order of counting.
        counted: For each session id, the round in which its report was counted.
        shards: Shards by round and name.
        notes: Notes by round and name.
        models: Models by version.
    """

    def __init__(self) -> None:
        self.run = RunRow()
        self.rounds: dict[int, Round] = {0: Round(0)}
        self.sessions: dict[str, Session] = {}
        self.devices: dict[str, DeviceRow] = {}
        self.sums: dict[int, dict[str, None]] = {}
        self.counted: dict[str, int] = {}
        self.shards: dict[tuple[int, str], Shard] = {}
        self.notes: dict[tuple[int, str], bytes] = {}
        self.models: dict[int, Model] = {}

    def transaction(self) -> "_Transaction":
        return _Transaction(self)


class _Transaction:
    """A transaction: the changes that are written to the store at its end. None means that the row is deleted.

    Rounds of the store with a number below `_forget` count as forgotten.
    """

    __slots__ = (
        "_began",
        "_counted",
        "_devices",
        "_forget",
        "_models",
        "_notes",
        "_rounds",
        "_run",
        "_sessions",
        "_shards",
        "_store",
    )

    def __init__(self, store: MemoryStore) -> None:
        self._store, self._run, self._began, self._forget = store, store.run, store.run, 0
        self._rounds: dict[int, Round] = {}
        self._sessions: dict[str, Session | None] = {}
        self._devices: dict[str, DeviceRow | None] = {}
        self._counted: dict[str, int] = {}
        self._shards: dict[tuple[int, str], Shard | None] = {}
        self._notes: dict[tuple[int, str], bytes | None] = {}
        self._models: dict[int, Model | None] = {}

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            return
        store, least = self._store, self._forget
        if least:
            store.shards = {which: row for which, row in store.shards.items() if which[0] >= least}
            store.notes = {which: body for which, body in store.notes.items() if which[0] >= least}
            store.rounds = {number: row for number, row in store.rounds.items() if number >= least}
            for old in [number for number in store.sums if number < least]:
                for id in store.sums.pop(old):
                    del store.counted[id]
        if self._run is not self._began:  # a transaction that only read must not undo another thread's write
            store.run = self._run
        store.rounds |= self._rounds
        _write(store.devices, self._devices)
        _write(store.sessions, self._sessions)
        for id, number in self._counted.items():
            store.sums.setdefault(number, {})[id] = None
            store.counted[id] = number
        _write(store.shards, self._shards)
        _write(store.notes, self._notes)
        _write(store.models, self._models)

    def run(self) -> RunRow:
        return self._run

    def round(self, number: int) -> Round | None:
        mine = self._rounds.get(number)
        return mine or (self._store.rounds.get(number) if number >= self._forget else None)

    def rounds(self) -> Sequence[Round]:
        rows = {number: row for number, row in self._store.rounds.items() if number >= self._forget} | self._rounds
        return [rows[number] for number in sorted(rows)]

    def session(self, id: str) -> Session | None:
        return self._sessions[id] if id in self._sessions else self._store.sessions.get(id)

    def device(self, id: str) -> DeviceRow | None:
        known = self._devices[id] if id in self._devices else self._store.devices.get(id)
        if known is None or known.session is None:
            return known
        now = self.session(known.session.id)
        return known if now is known.session else replace(known, session=now)

    def overdue(self, now: float) -> Sequence[str]:
        return self._awaited(now)

    def out_since(self, began: float) -> Sequence[str]:
        out = [row for row in self._all_sessions() if row.state == "out" and row.began <= began]
        return [row.id for row in sorted(out, key=lambda row: (row.began, row.id))]

    def sessions_out(self) -> Sequence[str]:
        return self._awaited(math.inf)

    def read_ahead(self, devices: Sequence[str] = (), sessions: Sequence[str] = ()) -> None:
        pass

    def counted_in(self, number: int) -> Sequence[str]:
        old = self._store.sums.get(number, ()) if number >= self._forget else ()
        return list(dict.fromkeys([*old, *(id for id, its in self._counted.items() if its == number)]))

    def sum_of(self, id: str) -> int | None:
        number = self._counted.get(id, self._store.counted.get(id))
        return number if number is not None and number >= self._forget else None

    def put_run(self, run: RunRow) -> None:
        self._run = run

    def put_round(self, row: Round) -> None:
        self._rounds[row.number] = row

    def put_session(self, row: Session) -> None:
        before = self._counted.get(row.id)
        if before is None and (old := self._store.counted.get(row.id)) is not None and old >= self._forget:
            before = old
        if before is not None and before != row.sum:
            raise Fenced
        if row.sum is not None:
            self._counted[row.id] = row.sum
        self._sessions[row.id] = row

    def put_device(self, row: DeviceRow) -> None:
        self._devices[row.id] = row

    def drop_session(self, id: str) -> None:
        self._sessions[id] = None

    def forget_device(self, id: str) -> None:
        self._devices[id] = None
        self._sessions |= {row.id: None for row in self._all_sessions() if row.device == id}

    def shards(self, number: int) -> Sequence[Shard]:
        old = self._store.shards if number >= self._forget else {}
        found = [row for row in {**old, **self._shards}.values() if row is not None and row.round == number]
        return sorted(found, key=lambda row: row.name)

    def put_shard(self, row: Shard) -> None:
        which, before = (row.round, row.name), None
        if which in self._shards:
            before = self._shards[which]
        elif row.round >= self._forget:
            before = self._store.shards.get(which)
        if row.seq != 1 + (0 if before is None else before.seq):
            raise Fenced
        self._shards[which] = row

    def drop_shards(self, number: int) -> None:
        self._shards |= {(number, row.name): None for row in self.shards(number)}

    def note(self, number: int, name: str) -> bytes | None:
        which = number, name
        if which in self._notes:
            return self._notes[which]
        return self._store.notes.get(which) if number >= self._forget else None

    def put_note(self, number: int, name: str, body: bytes | None) -> None:
        self._notes[number, name] = body

    def model(self, version: int) -> Model | None:
        return self._models[version] if version in self._models else self._store.models.get(version)

    def models(self) -> Sequence[Model]:
        rows = {**self._store.models, **self._models}
        return [row for version in sorted(rows) if (row := rows[version]) is not None]

    def put_model(self, row: Model) -> None:
        self._models[row.version] = row

    def drop_model(self, version: int) -> None:
        self._models[version] = None

    def forget_rounds_before(self, number: int) -> None:
        self._forget = max(self._forget, number)
        self._rounds = {which: row for which, row in self._rounds.items() if which >= number}
        self._counted = {id: its for id, its in self._counted.items() if its >= number}
        self._shards = {which: row for which, row in self._shards.items() if which[0] >= number}
        self._notes = {which: body for which, body in self._notes.items() if which[0] >= number}

    def _all_sessions(self) -> list[Session]:
        return [row for row in {**self._store.sessions, **self._sessions}.values() if row is not None]

    def _awaited(self, until: float) -> list[str]:
        """Return the ids of the sessions whose report is awaited and that expire by this time, in the order in which
        they expire."""
        found = [row for row in self._all_sessions() if row.awaited and row.expires <= until]
        return [row.id for row in sorted(found, key=lambda row: (row.expires, row.id))]


def _write(rows: dict[K, V], written: Mapping[K, V | None]) -> None:
    for which, row in written.items():
        if row is None:
            rows.pop(which, None)
        else:
            rows[which] = row
