"""A task's runs on a server: in one its devices train, in the other they evaluate. Both are the same rounds.

    run = TrainingRun("health", plan, initial, store, blobs, ring, sums)
    run.begin(initial, now)              its first model
    run.recover(now, fence)              what a crash left undone; or, with None, as one that another process leads
    run.offer(session, now)              an assignment for a session that the coordinator gave
    run.carry_out(actions, now)          what was decided: a sum becomes a model, or is destroyed

A sum becomes a model in steps that may each be the last: what the model depends on besides the sum (the seed that transforms are
undone by, how many people there are) is written before it is used, models are objects under their own hash, and one transaction
publishes. So doing it again gives the same bits, and nobody sees two models of one round.
"""

import json
import math
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from sumus.aggregate import Aggregate
from sumus.errors import ExperimentError, ParticipantError, SumusError, said
from sumus.evaluation import evaluation_hop, evaluation_of, medians_of
from sumus.first_hop import FirstHop
from sumus.logs import logger
from sumus.optimizers import ServerState
from sumus.pacing import Pacing
from sumus.plan import ADDING, Plan
from sumus.protocol.round import Abandon, Action, Close, Later, Round, Session, State
from sumus.protocol.rows import changed
from sumus.server.coordinator import FOLLOWS, Also, Coordinator
from sumus.server.sums import SealedSums, merged
from sumus.spec import canonical_json
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing, SealError
from sumus.storage.store import OF_THE_RUN, Model, Rows, Store
from sumus.text import many
from sumus.tree import nested, unnested
from sumus.types import Tree
from sumus.wire.messages import Assignment, Body, CheckInRequest, Kind, Relayed, Released
from sumus.wire.tensors import decode_tree, encode_tree

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
KEPT_MODELS = 100
"""Versions that are kept, before the newest; the released one and the first stay."""


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
class Asked:
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
    no edge may take part.  edges: what edges do.  people: how many devices there are, for parts
    that are divided by it.  changes: grows with what may bring work to devices that wait, besides what the coordinator knows.
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
        spools: bool = False,
    ) -> None:
        self.task, self.hop, self.store, self.least = task, hop, store, least
        self.coordinator = Coordinator(pacing, 0, store=store)
        self.sums = SealedSums(self.coordinator, hop, ring, sums, spools)
        self.trouble = ""
        self.unfinished: list[int] = []
        self.people: Callable[[], int] = lambda: self.coordinator.population
        self.changes = 0
        self._seeds = seeds
        self._seed_of: dict[int, bytes] = {}
        self._given_up: set[int] = set()

    @property
    def pacing(self) -> Pacing:
        """Of its rounds, as served."""
        return self.coordinator.pacing

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
            if isinstance(action, Close):
                self._close_all(action.number, now)
            elif isinstance(action, Abandon):
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
        self.coordinator.paused, self.trouble = True, trouble

    def resume(self) -> None:
        """Go on after a pause."""
        with self.coordinator.leading() as rows:
            rows.put_note(OF_THE_RUN, "paused", None)
        self.coordinator.paused, self.trouble = False, ""

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

    def admits(self, asked: Asked, now: float) -> Later | None:
        """None where the round decides whether this check-in is given work; else what is said before it is asked."""
        return None

    def turned_away(self, asked: Asked, now: float) -> None:
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
            self.coordinator.paused, self.trouble = True, f"round {number} cannot be closed yet: {error}"
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
        self.coordinator.paused, self.trouble = paused is not None, (paused or b"").decode()

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


class TrainingRun(Run):
    """Devices train, and a round's sum becomes the next model.

    plan: with its data declared.  releases: whether a new model is at once the one that devices answer with; else an admin
    promotes it.  version, shown: the newest model, and the one that devices answer with.
    """

    kind: Kind = "train"

    def __init__(
        self,
        task: str,
        plan: Plan,
        store: Store,
        blobs: Blobs,
        ring: KeyRing,
        sums: Blobs,
        seeds: Seeds = any_seed,
        releases: bool = True,
    ) -> None:
        pacing = served(plan.pacing, plan.min_contributors)
        spools = plan.algorithm.aggregator.needs_each_update
        super().__init__(task, pacing, plan.first_hop, store, ring, sums, seeds, plan.min_contributors, spools)
        self.plan, self.blobs, self.releases = plan, blobs, releases
        self.plan_body = Body(blobs.put(plan.to_json().encode()), len(plan.to_json().encode()))
        self.most_together = 0 if spools or plan.sums.max_count < pacing.chosen else pacing.chosen
        self.edges = plan.edges
        self.version, self.shown = 0, 0
        self._at: tuple[str, str, ServerState] | None = None
        self._models: dict[int, Model] = {}
        self._bodies: dict[str, Body] = {}

    def begin(self, initial: Tree, now: float) -> None:
        """Write the first model, where there is none. initial: every shared leaf. Another plan than before goes on from the
        newest model, with its own optimizer's first state; the round that is open ends, since its sum is of the old plan."""
        with self.store.transaction() as rows:
            run, head = rows.run(), rows.model(rows.run().version)
        if head is None:
            first = self._model(0, self.plan.algorithm.start(initial, self.plan.description), None, None, now)
            with self.store.transaction() as rows:
                if not rows.models():  # another process may begin at the same time
                    rows.put_model(first)
        elif head.plan != self.plan.id:
            self.end_all(now)  # what is out would report by the old plan
            self._add(self.plan.algorithm.start(self._shared(head), self.plan.description), head, now, run.released)

    def recover(self, now: float, fence: int | None) -> None:
        self.see()
        super().recover(now, fence)

    def look(self) -> None:
        super().look()
        self.see()

    def offer(self, session: Session, now: float) -> Assignment:
        model = self.model(session.version)
        if model.plan != self.plan.id:
            raise ExperimentError(
                f"{self.task} is served with another plan since, by another server: stop one of the two"
            )
        broadcast = self.body(model.broadcast)
        return self._assignment(session, session.version, self.plan_body, broadcast, now)

    def conclude(self, number: int, now: float) -> None:
        seed, known = self.seed(number), self.people()
        with self.coordinator.leading() as rows:
            version = rows.run().version
            people = int(self._noted(rows, number, "people", lambda: str(known).encode()))
            late = [row.staleness for row in map(rows.session, rows.counted_in(number)) if row is not None]
        apart = self.sums.shards(number) if self.sums.spools else None
        total = self.sums.total(number) if apart is None else merged(apart)
        people = max(people, int(total.count))  # some in the sum have left since, or an edge has told of fewer
        after = self._after(total, apart, self.state(self.model(version)), seed, people)
        train = {name: mean for name, mean in total.metric_means().items() if name == "loss"}  # every report holds it
        measured = {"train": train, "staleness": {str(s): late.count(s) for s in sorted(set(late))}}
        made = self._model(version + 1, after, version, number, now, int(total.count), measured)

        def also(rows: Rows) -> None:
            rows.put_model(made)
            if self.releases:
                rows.put_run(changed(rows.run(), released=made.version))

        self._publish(number, now, also)
        self._at = made.broadcast, made.memory, after
        self.see()
        self._forget_models()

    def _after(
        self, total: Aggregate, apart: Sequence[Aggregate] | None, state: ServerState, seed: bytes, people: int
    ) -> ServerState:
        """The server's state after a sum. apart: its reports, where the plan needs each."""
        if int(total.count) < self.least:
            raise Unusable(
                f"it has {many(int(total.count), 'contributor')}, and the plan asks for {self.least} at least"
            )
        algorithm = self.plan.algorithm
        with usable():
            if apart is not None:
                combined = algorithm.combine_each(apart, self.plan.description, self.plan.sums, seed, people)
            else:
                combined = algorithm.combine(total, self.plan.description, self.plan.sums, seed, people)
            return algorithm.step(combined, state, self.plan.description)

    def see(self) -> None:
        """Read what is newest, what is shown, and what may be fetched."""
        with self.store.transaction() as rows:
            run, models = rows.run(), rows.models()
        self._models = {model.version: model for model in models}
        self.version, self.shown = run.version, run.released
        self.objects = frozenset({self.plan_body.sha256, *(m.broadcast for m in models), *(m.model for m in models)})
        self._bodies = {sha: body for sha, body in self._bodies.items() if sha in self.objects}

    def _forget_models(self) -> None:
        """Drop versions that are long past, and what only they point to."""
        with self.coordinator.leading() as rows:
            models = rows.models()
            old = [m for m in models if 0 < m.version < self.version - KEPT_MODELS and m.version != self.shown]
            for model in old:
                rows.drop_model(model.version)
        kept = {sha for m in models if m not in old for sha in (m.broadcast, m.memory, m.model)}
        for sha in {sha for m in old for sha in (m.broadcast, m.memory, m.model)} - kept:
            self.blobs.delete(sha)

    def model(self, version: int) -> Model:
        """A version's row."""
        if version not in self._models:
            with self.store.transaction() as rows:
                found = rows.model(version)
            if found is None:
                raise ExperimentError(self._no_model(version))
            self._models[version] = found
        return self._models[version]

    def _no_model(self, version: int) -> str:
        with self.store.transaction() as rows:
            kept = sorted(model.version for model in rows.models())
        if version > self.version:
            return f"{self.task} has no version {version} yet: its newest is {self.version}"
        spans, first = list[str](), 0
        for place, each in enumerate(kept):
            if place + 1 == len(kept) or kept[place + 1] != each + 1:
                spans.append(f"{kept[first]}" if first == place else f"{kept[first]} to {each}")
                first = place + 1
        return f"version {version} of {self.task} is not kept any more; there are {', '.join(spans)}"

    def state(self, model: Model) -> ServerState:
        """What the server kept of a version: what it broadcasts, and its optimizer's memory."""
        if self._at is None or self._at[:2] != (model.broadcast, model.memory):
            trees = [nested(decode_tree(self.blobs.get(which))) for which in (model.broadcast, model.memory)]
            self._at = model.broadcast, model.memory, ServerState(trees[0], trees[1])
        return self._at[2]

    def released(self) -> Released:
        """The model that devices answer with."""
        return Released(self.shown, self.body(self.model(self.shown).model))

    def promote(self, version: int) -> None:
        """Let devices answer with this version."""
        self.model(version)
        with self.coordinator.leading() as rows:
            rows.put_run(changed(rows.run(), released=version))
        self.see()

    def roll_back(self, version: int, now: float) -> Model:
        """Train on from an earlier version: it becomes the newest, under a new number, and what trains on the others is ended.

        A noise epoch begins with it: what was spent and published stays so.
        """
        earlier = self.model(version)
        self.end_all(now)
        state = self.state(earlier)
        if earlier.plan != self.plan.id:  # its optimizer's memory means nothing to this one
            state = self.plan.algorithm.start(self._shared(earlier), self.plan.description)
        return self._add(state, earlier, now, None, epoch=1)

    def note_evaluation(self, version: int, measured: Mapping[str, Any]) -> None:
        """Write beside a version what devices measured of it, unless it is forgotten since."""
        with self.coordinator.leading() as rows:
            if (model := rows.model(version)) is None:
                return
            noted = replace(model, metrics=canonical_json({**json.loads(model.metrics), "evaluate": measured}))
            rows.put_model(noted)
        self._models[version] = noted

    def _add(self, state: ServerState, parent: Model, now: float, released: int | None, epoch: int = 0) -> Model:
        """A version that is of no round. released: what devices answer with from now on; None for this one."""
        with self.store.transaction() as rows:
            run = rows.run()
        kept = {name: value for name, value in json.loads(parent.metrics).items() if name == "evaluate"}
        made = self._model(run.version + 1, state, parent.version, None, now, measured=kept)
        with self.coordinator.leading() as rows:
            rows.put_model(made)
            shown = made.version if released is None else released
            rows.put_run(changed(rows.run(), version=made.version, released=shown, epoch=run.epoch + epoch))
        self.see()
        return made

    def _model(
        self,
        version: int,
        state: ServerState,
        parent: int | None,
        number: int | None,
        now: float,
        contributors: int = 0,
        measured: Mapping[str, Any] | None = None,
    ) -> Model:
        """A row, with what it points to kept."""
        kept = [
            self.blobs.put(encode_tree(tree))
            for tree in (unnested(state.broadcast), unnested(state.memory), self.plan.algorithm.release(state))
        ]
        return Model(
            version=version,
            round=number,
            parent=parent,
            broadcast=kept[0],
            memory=kept[1],
            model=kept[2],
            plan=self.plan.id,
            contributors=contributors,
            metrics=canonical_json(measured or {}),
            at=now,
        )

    def _shared(self, model: Model) -> Tree:
        """The shared leaves of a version."""
        broadcast = self.state(model).broadcast
        return {**broadcast["params"], **broadcast.get("buffers", {})}

    def body(self, sha256: str) -> Body:
        """An object as devices are told of it. Where it lies is asked once: it may be far away."""
        if sha256 not in self._bodies:
            size = self.blobs.size(sha256)
            if size is None:
                raise ExperimentError(f"object {sha256} is gone from the server's blobs: put the folder back as it was")
            self._bodies[sha256] = Body(sha256, size)
        return self._bodies[sha256]


@dataclass(frozen=True)
class Evaluating:
    """How devices are asked what a model is worth. cohort: devices that measure it.  every: how many versions apart.
    deadline: seconds."""

    cohort: int
    every: int = 1
    deadline: float = 600.0


class EvaluationRun(Run):
    """Devices measure a model of the training run, and a round's sum becomes that version's metrics. measured: the version that
    was measured last, −1 for none."""

    kind: Kind = "evaluate"

    def __init__(
        self, training: TrainingRun, how: Evaluating, store: Store, ring: KeyRing, sums: Blobs, seeds: Seeds = any_seed
    ) -> None:
        least = training.least
        if how.cohort < least:
            raise ExperimentError(
                f"{how.cohort} devices to measure a model of {training.task}, and its plan publishes no metric of fewer than "
                f"{least} (min_contributors): ask more of them"
            )
        pacing = served(Pacing(how.cohort, deadline=how.deadline), least)
        plan = training.plan
        hop = evaluation_hop(plan.description, how.cohort, plan.metric_cap)
        super().__init__(training.task, pacing, hop, store, ring, sums, seeds, least)
        self.training, self._how = training, how
        self.plan_body, self.most_together = training.plan_body, pacing.chosen
        self.measured = -1
        self._asked: tuple[int, int] | None = None

    def recover(self, now: float, fence: int | None) -> None:
        self._read_measured()
        self._asked = None
        super().recover(now, fence)

    def look(self) -> None:
        super().look()
        self._read_measured()

    def _ended_what_was_open(self, now: float) -> bool:
        plan = self.training.plan.id.encode()
        with self.store.transaction() as rows:
            before = rows.note(OF_THE_RUN, "plan")
        if before == plan:
            return False
        self.end_all(now)  # it may be of other metrics
        with self.coordinator.leading() as rows:
            rows.put_note(OF_THE_RUN, "plan", plan)
        return True

    def _read_measured(self) -> None:
        with self.store.transaction() as rows:
            self.measured = _measured(rows)

    def wanted(self) -> bool:
        """Whether there is a model to measure that was not measured yet, be it under another number: two sums over the same model
        would tell what the devices measured that are in one of them alone."""
        newest = self._newest()
        return newest > self.measured and "evaluate" not in json.loads(self.training.model(newest).metrics)

    def offer(self, session: Session, now: float) -> Assignment:
        version = self._version(session.round)
        broadcast = self.training.body(self.training.model(version).broadcast)
        return self._assignment(session, version, self.training.plan_body, broadcast, now)

    def conclude(self, number: int, now: float) -> None:
        version, total = self._version(number), self.sums.total(number)
        if int(total.count) < self.least:
            raise Unusable(
                f"it has {many(int(total.count), 'contributor')}, and the plan asks for {self.least} at least"
            )
        means, histograms = evaluation_of(total, self.hop)
        enough = [name for name, bins in histograms.items() if sum(bins) >= self.least]  # a device may leave one out
        means = {name: means[name] for name in enough if name in means}
        histograms = {name: histograms[name] for name in enough}
        measured = {
            "means": means,
            "medians": medians_of(histograms, self.hop),
            "histograms": histograms,
            "devices": int(total.count),
        }
        self.training.note_evaluation(version, measured)
        note = str(version).encode()
        self._publish(number, now, lambda rows: rows.put_note(OF_THE_RUN, "measured", note))
        self.measured = version

    def _version(self, number: int) -> int:
        """The model that a round measures: the newest when its first device was asked."""
        if self._asked is None or self._asked[0] != number:
            with self.coordinator.transaction() as rows:
                newest = self._newest()
                if rows.note(number, "model") is None and newest <= _measured(rows):
                    raise ExperimentError(
                        f"version {newest} of {self.task} was measured since, on devices of another server"
                    )
                version = int(self._noted(rows, number, "model", lambda: str(newest).encode()))
            self._asked = number, version
        return self._asked[1]

    def _newest(self) -> int:
        newest = self.training.version
        return newest - newest % self._how.every


def _measured(rows: Rows) -> int:
    return int(rows.note(OF_THE_RUN, "measured") or -1)
