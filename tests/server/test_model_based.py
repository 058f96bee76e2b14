"""Rounds, sums and stores together, driven in any order, with crashes at any transaction: what a machine finds that people do not
think of. Beside them runs what devices know, from which everything is computed again."""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from sumus.aggregate import Part, RunningSum, Update
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.pacing import Conditions, Pacing
from sumus.protocol.round import (
    ORDER,
    AbandonRound,
    AcceptReport,
    Action,
    AssignWork,
    CheckIn,
    CloseRound,
    Decision,
    Facts,
    RefuseReport,
    Report,
    StageReport,
    State,
    decide,
)
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Coordinator, Rules
from sumus.rounds.intake import ReportIntake
from sumus.rounds.sealed_sums import SealedSums
from sumus.rounds.stages import ClearReport
from sumus.storage.blobs import MemoryBlobs
from sumus.storage.keyring import KeyRing
from sumus.storage.memory import MemoryStore
from sumus.storage.sql import SqlStore
from sumus.storage.store import Model, Rows, Store
from sumus.wire.tensors import encode_aggregate

HOP = FirstHop(
    (Part("params"),), ((("w", (5,)),),), FixedPoint.fit(8, max_weight=100, bound=8.0), None, None, ("loss",)
)
_LONG = settings(max_examples=40, stateful_step_count=30)
_SHORT = settings(max_examples=5, stateful_step_count=20)
_FOLDER = tempfile.mkdtemp(prefix="sumus-rounds-")
atexit.register(shutil.rmtree, _FOLDER)
DEVICES = st.integers(0, 5).map(str)


class Crashed(Exception):
    """The process is gone."""


class Crashing:
    """A store whose process dies in one of its next transactions, just before it ends, or just after."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.dies: tuple[int, bool] | None = None

    def transaction(self) -> AbstractContextManager[Rows]:
        return self._transaction()

    @contextmanager
    def _transaction(self) -> Iterator[Rows]:
        dies, after = (None, False) if self.dies is None else self.dies
        if dies is not None:
            self.dies = (dies - 1, after) if dies else None
        with self._store.transaction() as rows:
            yield rows
            if dies == 0 and not after:
                raise Crashed
        if dies == 0:
            raise Crashed


class Rounds(RuleBasedStateMachine):
    """sent: what devices sent, by session.  told: what they were told of it.  seen: the states that rounds have been in."""

    pacing = Pacing(3, over_select=1.4, deadline=20.0)
    decides: Rules = staticmethod(decide)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=_FOLDER))
        self.store, self.blobs, self.ring = (
            Crashing(self.new_store()),
            MemoryBlobs(),
            KeyRing(self.folder / "keys"),
        )
        self.now = 0.0
        self.serials: dict[str, int] = {}
        self.out: dict[str, str] = {}
        self.sent: dict[str, Update] = {}
        self.told: dict[str, str] = {}
        self.seen: dict[int, State] = {}
        self.make_anew()

    def new_store(self) -> Store:
        return MemoryStore()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # what a server does

    def make_anew(self) -> None:
        """A new process on what is durable; where it dies while it recovers, another one."""
        while True:
            self.coordinator = Coordinator(lambda: Circumstances(self.pacing, population=6), self.store, self.decides)
            self.sums = SealedSums(self.coordinator, self.ring, self.blobs)
            self.intake = ReportIntake(self.coordinator, self.sums, HOP, trains=True, spools=False)
            try:
                self.carry_out(self.coordinator.recover(self.now))
                self.sums.sweep()
                self.carry_out(self.coordinator.tick(self.now))
                return
            except Crashed:
                continue

    def do(self, what: Callable[[], tuple[Action, ...]]) -> tuple[Action, ...]:
        """Something, and what follows; the process may die of it, and then nobody hears an answer."""
        try:
            actions = what()
            self.carry_out(actions)
        except Crashed:
            self.make_anew()
            return ()
        finally:
            self.store.dies = None
        for action in actions:
            if isinstance(action, AcceptReport | RefuseReport):
                said = "counted" if isinstance(action, AcceptReport) else "discarded"
                assert self.told.setdefault(action.session, said) == said
        return actions

    def carry_out(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if isinstance(action, CloseRound):
                self.publish(action.number)
            elif isinstance(action, AbandonRound):
                self.sums.destroy(action.number)

    def publish(self, number: int) -> None:
        total = self.sums.total(number)
        assert encode_aggregate(total) == encode_aggregate(self.recomputed(number).total)

        def also(rows: Rows) -> None:
            version = rows.run().version
            rows.put_model(Model(version, number, version - 1, "", "", "", "", contributors=int(total.count)))

        self.coordinator.publish(number, self.now, also)
        self.sums.destroy(number)

    def recomputed(self, number: int) -> RunningSum:
        total = RunningSum()
        with self.store.transaction() as rows:
            counted = rows.counted_in(number)
        for session in counted:
            HOP.count_in(self.sent[session], total)
        return total

    # what may happen

    @rule(device=DEVICES, dies=st.none() | st.tuples(st.integers(0, 1), st.booleans()))
    def checks_in(self, device: str, dies: tuple[int, bool] | None) -> None:
        self.store.dies = dies
        serial = self.serials[device] = self.serials.get(device, 0) + 1
        event = CheckIn(f"{device}/{serial}", serial, Conditions())
        for action in self.do(lambda: self.coordinator.check_in(device, event, self.now)):
            if isinstance(action, AssignWork):
                self.out[device] = action.session.id

    @rule(device=DEVICES, number=st.integers(0, 2**32))
    def reports(self, device: str, number: int) -> None:
        if device in self.out:
            session, rng = self.out[device], np.random.default_rng(number)
            tree = {"w": rng.normal(size=5).astype(np.float32)}
            update = Update(device, {"params": tree}, int(rng.integers(1, 100)), {"loss": (float(rng.random()), 3)})
            self.sent.setdefault(session, update)
            self.do(lambda: self.report(session))

    def report(self, session: str) -> tuple[Action, ...]:
        return self.intake.stage_all([ClearReport(session, HOP.check(self.sent[session]))], self.now)[0]

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def reports_again(self, data: Any) -> None:
        session = data.draw(st.sampled_from(sorted(self.sent)))
        self.do(lambda: self.report(session))

    @precondition(lambda self: self.coordinator.staged)
    @rule(dies=st.none() | st.tuples(st.integers(0, 4), st.booleans()))
    def commits(self, dies: tuple[int, bool] | None) -> None:
        self.store.dies = dies
        self.do(lambda: self.intake.commit(self.now))
        self.do(lambda: self.coordinator.tick(self.now))

    @rule(number=st.integers(0, 2**32), dies=st.none() | st.tuples(st.integers(0, 5), st.booleans()))
    def a_round_goes_by(self, number: int, dies: tuple[int, bool] | None) -> None:
        for device in "012345":
            self.checks_in(device, None)
            self.reports(device, number + int(device))
        self.commits(dies)

    @rule(dies=st.tuples(st.integers(0, 4), st.booleans()))
    def crashes(self, dies: tuple[int, bool]) -> None:
        self.store.dies = dies  # and perhaps again while it recovers
        self.make_anew()
        self.store.dies = None

    @rule(seconds=st.sampled_from([1.0, 7.0, 25.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds
        self.do(lambda: self.coordinator.expire(self.now))
        self.do(lambda: self.coordinator.tick(self.now))

    @rule(device=DEVICES)
    def gives_up(self, device: str) -> None:
        if device in self.out:
            self.do(lambda: self.coordinator.drop([self.out[device]], "conditions", self.now))

    # what must hold

    @invariant()
    def everything_is_counted_once_and_in_the_sum(self) -> None:
        with self.store.transaction() as rows:
            rounds, run, models = rows.rounds(), rows.run(), rows.models()
            counted = {row.number: list(rows.counted_in(row.number)) for row in rounds}
        everyone = [session for those in counted.values() for session in those]
        assert len(everyone) == len(set(everyone))
        assert set(everyone) <= set(self.sent)
        assert {session for session, said in self.told.items() if said == "counted"} <= set(everyone)
        assert not {session for session, said in self.told.items() if said == "discarded"} & set(everyone)
        for row in rounds:
            assert row.counted == len(counted[row.number]) <= self.pacing.cohort
            before = self.seen.setdefault(row.number, row.state)
            assert ORDER.index(row.state) >= ORDER.index(before)
            assert before not in (State.PUBLISHED, State.ABANDONED) or row.state is before
            self.seen[row.number] = row.state
            if row.counted and row.state in (State.OPEN, State.CLOSING):
                total = self.sums.total(row.number)
                assert encode_aggregate(total) == encode_aggregate(self.recomputed(row.number).total)
        published = [row.number for row in rounds if row.state is State.PUBLISHED]
        assert [model.round for model in models] == published
        assert [model.version for model in models] == list(range(1, run.version + 1))

    @invariant()
    def what_is_over_cannot_be_opened(self) -> None:
        with self.store.transaction() as rows:
            for row in rows.rounds():
                over = row.state in (State.PUBLISHED, State.ABANDONED)
                assert not (over and rows.note(row.number, "key") is not None)


class Buffers(Rounds):
    pacing = Pacing(2, concurrency=4, deadline=20.0, most_stale=2)


class OnSqlite:
    """The same rows in a file, which a new process opens anew."""

    folder: Path

    def new_store(self) -> Store:
        self.sql = SqlStore.open(f"sqlite:///{self.folder}/run.db")
        return self.sql

    def teardown(self) -> None:
        self.sql.close()
        shutil.rmtree(self.folder)


class RoundsOnSqlite(OnSqlite, Rounds):
    """Synchronous."""


class BuffersOnSqlite(OnSqlite, Buffers):
    """Buffered."""


def _early(facts: Facts, event: Any) -> Decision:
    """A bug: a report that is staged is acknowledged."""
    decision = decide(facts, event)
    staged = [
        action.session for action in decision.actions if isinstance(event, Report) and isinstance(action, StageReport)
    ]
    return replace(decision, actions=(*decision.actions, *(AcceptReport(session) for session in staged)))


class AcknowledgesEarly(Rounds):
    decides = staticmethod(_early)


class LeavesKeys(Rounds):
    """A bug: what is over is not forgotten where the process died before it came to that."""

    def make_anew(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SealedSums, "sweep", lambda sums: [])
            super().make_anew()


@pytest.mark.parametrize("bug", [AcknowledgesEarly, LeavesKeys])
def test_the_machine_finds_a_bug(bug: type[Rounds]) -> None:
    with pytest.raises(AssertionError):
        run_state_machine_as_test(bug, settings=settings(_LONG, phases=[Phase.generate], print_blob=False))


TestRounds = Rounds.TestCase
TestRounds.settings = _LONG
TestBuffers = Buffers.TestCase
TestBuffers.settings = _LONG
TestRoundsOnSqlite = RoundsOnSqlite.TestCase
TestRoundsOnSqlite.settings = _SHORT
TestBuffersOnSqlite = BuffersOnSqlite.TestCase
TestBuffersOnSqlite.settings = _SHORT
