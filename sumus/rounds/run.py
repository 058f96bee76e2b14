"""What every kind of run shares: the rounds of a task on a server, at an edge, and at a site.

    run.recover(now, fence)              what a crash left undone; or, with None, as one that another process leads
    run.offer(session, now)              an assignment for a session that the coordinator gave
    run.carry_out(actions, now)          what was decided: a sum is concluded, or destroyed
    run.tick(now)                        time has gone by

A kind of run says what its devices are told (`offer`) and what becomes of a round's sum (`conclude`).
"""

import math
import secrets
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

from sumus.errors import ExperimentError, ParticipantError, SumusError, said
from sumus.first_hop import FirstHop
from sumus.logs import logger
from sumus.pacing import Pacing
from sumus.plan import ADDING
from sumus.protocol.round import AbandonRound, Action, CloseRound, ComeLater, Round, Session, State
from sumus.rounds.circumstances import Circumstances, Crowd
from sumus.rounds.coordinator import FOLLOWS, Also, Coordinator
from sumus.rounds.sealed_sums import SealedSums
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing, SealError
from sumus.storage.store import OF_THE_RUN, Rows, Store
from sumus.wire.messages import Assignment, Body, CheckInRequest, Kind, Relayed, Released

LOG = logger("sumus.server")
Seeds: TypeAlias = Callable[[int], bytes]
"""32 bytes for a sum, by its round's number: from the system's generator, or keyed in simulation and tests."""


class Unusable(Exception):
    """No model can be made of a sum, however often it is tried."""


@contextmanager
def usable() -> Generator[None, None, None]:
    """Whatever a plan makes of a sum, it must not take the server with it: what goes wrong in here is Unusable."""
    try:
        yield
    except Exception as error:
        raise Unusable(
            str(error) if isinstance(error, SumusError) else f"the plan failed with {said(error)}"
        ) from error


PATIENCE = 3600.0
"""Seconds to a round's end where the plan gives none: on a server a device that is gone must not hold a round for ever."""
KEPT_ROUNDS = 100
"""Rounds whose rows are kept, before the newest."""


def any_seed(number: int) -> bytes:
    """A seed that nobody can guess."""
    return secrets.token_bytes(32)


def served(pacing: Pacing, least: int) -> Pacing:
    """A plan's pacing as a server keeps it: no sum of fewer people is used, and every round has an end."""
    deadline = PATIENCE if pacing.deadline is None else pacing.deadline
    if pacing.buffered:
        return replace(pacing, deadline=deadline)
    return replace(pacing, deadline=deadline, least=max(pacing.least, min(1.0, least / pacing.cohort)))


@dataclass(frozen=True)
class DeviceCheckIn:
    """A check-in of a device.

    Args:
        device: The device's id.
        request: What it asks.
        parent: The edge that passed it on; empty if the device asked here itself.
        signed: The same request as the device signed it, for an edge to pass on.
    """

    device: str
    request: CheckInRequest
    parent: str = ""
    signed: Relayed | None = None


class Run:
    """What training and evaluation share. task: its name on the wire.  least: contributors of a sum that is used.

    trouble: why no model can be made, empty where all is well; then the run is paused.  A pause outlasts the process.
    unfinished: rounds whose sum could not be read, or whose model not be written; they are tried again, or an admin cancels them.
    plan_body: the plan.  objects: hashes of what devices may fetch.  most_together: reports that an edge's sum may hold, 0 where
    no edge may take part.  edges: what edges do.  crowd: the devices of the server.  paused: whether no round begins and no work
    is given.  changes: grows with what may bring work to devices that wait, besides what the coordinator knows.
    """

    kind: Kind
    plan_body: Body
    objects: frozenset[str] = frozenset()
    most_together = 0
    edges = ADDING

    def __init__(
        self,
        task: str,
        pacing: Pacing,
        hop: FirstHop,
        store: Store,
        ring: KeyRing,
        sums: Blobs,
        seeds: Seeds,
        least: int,
        crowd: Crowd,
        spools: bool = False,
    ) -> None:
        self.task, self.hop, self.store, self.least, self.crowd = task, hop, store, least, crowd
        self.coordinator = Coordinator(self.circumstances, store)
        self.sums = SealedSums(self.coordinator, hop, ring, sums, spools)
        self.trouble = ""
        self.paused = False
        self.unfinished: list[int] = []
        self.changes = 0
        self._pacing = pacing
        self._seeds = seeds
        self._seed_of: dict[int, bytes] = {}
        self._given_up: set[int] = set()

    @property
    def pacing(self) -> Pacing:
        """How the open round is paced. A kind of run whose rounds change while they are open overrides this property."""
        return self._pacing

    def circumstances(self) -> Circumstances:
        """What the coordinator's decisions depend on, besides rows."""
        return Circumstances(self.pacing, self.paused, self.crowd.population, self.crowd.arriving)

    @property
    def leads(self) -> bool:
        """Whether this process makes models of sums; else another does, and this one hears of it in `look`."""
        return self.coordinator.fence != FOLLOWS

    def recover(self, now: float, fence: int | None) -> None:
        """Take up what another process left, or this one after its storage failed. fence: of the lease; None where another
        process leads."""
        self.sums.restart()
        self._seed_of.clear()
        self._given_up.clear()
        self.unfinished.clear()
        self._read_pause()
        self.sums.probe()
        if fence is None:
            self.coordinator.follow()
            return
        actions = self.coordinator.recover(now, fence)
        if not self._ended_what_was_open(now):
            self.carry_out(actions, now)
        self.sums.sweep()

    def carry_out(self, actions: Iterable[Action], now: float) -> None:
        """Do what was decided about sums, where this process leads; who does finds it in the rows. What else was decided is
        answers to devices."""
        for action in actions if self.leads else ():
            if isinstance(action, CloseRound):
                self._close_all(action.number, now)
            elif isinstance(action, AbandonRound):
                self._destroy(action.number)

    def take_up(self, now: float) -> None:
        """Do what other processes' transactions have decided about sums."""
        with self.coordinator.leading() as rows:
            rounds = rows.rounds()
        self._given_up &= {row.number for row in rounds}
        for row in rounds:
            if row.state is State.ABANDONED and row.number not in self._given_up:
                self._destroy(row.number)
        self._close_all(rounds[-1].number, now)

    def look(self) -> None:
        """Hear what whoever leads has done."""
        self._read_pause()
        with self.store.transaction() as rows:
            self.sums.keep_open(rows)

    def pause(self, trouble: str = "") -> None:
        """Begin no round and give no work, until `resume`; what was given may still be reported."""
        with self.coordinator.leading() as rows:
            rows.put_note(OF_THE_RUN, "paused", trouble.encode())
        self.hold(trouble)

    def hold(self, why: str) -> None:
        """Begin no round and give no work in this process.

        Unlike a `pause`, this is not written down, and ends with the process.
        """
        self.paused, self.trouble = True, why

    def resume(self) -> None:
        """Go on after a pause."""
        with self.coordinator.leading() as rows:
            rows.put_note(OF_THE_RUN, "paused", None)
        self.paused, self.trouble = False, ""

    def give_up(self, error: Exception, now: float) -> None:
        """The key ring or the sums of the open rounds are lost: end them, and pause, until somebody has looked."""
        self.pause(f"its open rounds were given up: {error}")
        self.end_all(now)
        self.sums.restart()

    def end_all(self, now: float) -> None:
        """End all work that is out, and every round that is not over."""
        with self.store.transaction() as rows:
            out = rows.sessions_out()
            rounds = [row.number for row in rows.rounds() if not row.over]
        if self.unfinished:
            self.unfinished.clear()
            self._read_pause()
        for number in rounds:  # first: else the last of those who are dropped would close its round
            self.carry_out(self.coordinator.cancel(number, now), now)
        self.carry_out(self.coordinator.drop(out, "closed", now), now)

    def finish(self, now: float) -> None:
        """Try again to close what could not be closed; once there is nothing of that, be paused only as it is written."""
        waiting, self.unfinished = self.unfinished, []
        for number in waiting:
            self._close(number, now)
        if not self.unfinished:
            self._read_pause()

    def cancel(self, now: float) -> int | None:
        """End the round that is on its way, or could not be closed, without a model, and begin the next; its number, or None
        where there is none."""
        stuck = bool(self.unfinished)
        row = self.coordinator.round(self.unfinished.pop(0)) if stuck else self.coordinator.current
        if row is None or row.state is State.PLANNED or row.over:
            return None
        self.carry_out(self.coordinator.cancel(row.number, now), now)
        if stuck:
            self.finish(now)
        self.tick(now)
        return row.number

    def tick(self, now: float) -> None:
        """Let time have gone by: sessions expire, deadlines pass, the next round opens. Where another process sees to that, look
        what it has done."""
        if not self.leads:
            self.look()
            return
        for decided in (self.coordinator.expire(now), self.coordinator.tick(now)):
            self.carry_out(decided, now)

    def wanted(self) -> bool:
        """Whether there is anything that devices could do."""
        return True

    def admits(self, asked: DeviceCheckIn, now: float) -> ComeLater | None:
        """None where the round decides whether this check-in is given work; else what is said before it is asked."""
        return None

    def turned_away(self, asked: DeviceCheckIn, now: float) -> None:
        """Be told of a check-in whose device is not to be in the sum which is open."""

    def dropped(self, sessions: Iterable[str], reason: str) -> None:
        """Be told of sessions that will not report."""

    def rounds_of_sum(self) -> Sequence[int]:
        """The numbers of the rounds that go into the sum which is open, the last one last. Nobody is in one sum twice."""
        return [self.coordinator.current.number]

    def released(self) -> Released | None:
        """The model that devices answer with."""
        return None

    def waits_for(self, row: Round) -> str:
        """In a sentence, what its newest round waits for, where that is not what rounds wait for everywhere."""
        return ""

    def offer(self, session: Session, now: float) -> Assignment:
        """What a device is told that was given a session."""
        raise NotImplementedError

    def conclude(self, number: int, now: float) -> None:
        """Make of a round's sum what it is for, and publish that. Raises Unusable; after anything else it may be done again."""
        raise NotImplementedError

    def seed(self, number: int) -> bytes:
        """What all who report into a sum share: of a round; of the run, where a sum takes reports of several models."""
        where = OF_THE_RUN if self.pacing.buffered else number
        if where not in self._seed_of:
            with self.coordinator.transaction() as rows:
                seed = self._noted(rows, where, "seed", lambda: self._seeds(0 if self.pacing.buffered else number))
            self._seed_of = {where: seed}
        return self._seed_of[where]

    def _close_all(self, last: int, now: float) -> None:
        """Make models of the rounds that have closed, up to this one, in their order: some may be other processes' doing."""
        with self.coordinator.leading() as rows:
            closing = [row.number for row in rows.rounds() if row.state is State.CLOSING and row.number <= last]
        for number in closing:
            if number not in self.unfinished:
                self._close(number, now)

    def _close(self, number: int, now: float) -> None:
        """A sum that cannot be used ends its round and pauses the run, and says why: trying again would give the same. Models
        come in the order of their rounds: behind one that cannot be closed yet, others wait."""
        if self.unfinished:
            self.unfinished.append(number)
            return
        try:
            self.conclude(number, now)
        except (Unusable, SealError, ParticipantError) as error:
            self.pause(f"round {number} gave no model: {error}")
            self.carry_out(self.coordinator.cancel(number, now), now)
        except ExperimentError as error:
            # a file that is missing may be put back, a full disk be emptied: nothing is lost yet
            self.unfinished.append(number)
            self.hold(f"round {number} cannot be closed yet: {error}")
            LOG.warning("%s: %s", self.task, self.trouble)

    def _ended_what_was_open(self, now: float) -> bool:
        """End the rounds that are open, where nothing can come of them any more; whether that was so."""
        return False

    def _destroy(self, number: int) -> None:
        self.sums.destroy(number)
        self._given_up.add(number)

    def _read_pause(self) -> None:
        """Be paused as it is written."""
        with self.store.transaction() as rows:
            paused = rows.note(OF_THE_RUN, "paused")
        self.paused, self.trouble = paused is not None, (paused or b"").decode()

    def _assignment(self, session: Session, version: int, plan: Body, broadcast: Body, now: float) -> Assignment:
        left = max(0.0, session.expires - now)
        return Assignment(
            task=self.task,
            kind=self.kind,
            session=session.id.rpartition("/")[2],
            version=version,
            plan=plan,
            broadcast=broadcast,
            seed=self.seed(session.round).hex(),
            contributors=self.least,
            expires_in_s=left if math.isfinite(left) else None,
        )

    def _publish(self, number: int, now: float, also: Also = lambda rows: None) -> None:
        """Publish a round's result; once it is durable, forget what led to it. also: see `Coordinator.publish`."""
        done = False

        def written(rows: Rows) -> None:
            nonlocal done
            also(rows)
            done = True

        self.coordinator.publish(number, now, written)
        if not done:
            raise ExperimentError("a round before it is not published yet")
        self.sums.destroy(number)
        with self.coordinator.leading() as rows:
            rows.forget_rounds_before(rows.run().newest - KEPT_ROUNDS)

    def _noted(self, rows: Rows, number: int, name: str, make: Callable[[], bytes]) -> bytes:
        """What a round remembers under a name, made by whoever is the first to need it."""
        if (body := rows.note(number, name)) is None:
            rows.put_note(number, name, body := make())
        return body
