"""A task's training run on a server: devices train, and a round's sum becomes the next model.

    run = TrainingRun("health", plan, store, blobs, ring, sums, crowd)
    run.begin(initial, now)              the first model
    run.recover(now, fence)              finishes the work that a crash interrupted; fence is None if another process leads
    run.offer(session, now)              returns the assignment for a session that the coordinator gave
    run.carry_out(actions, now)          carries out decisions: a sum becomes a model, or is destroyed

A sum becomes a model in steps, and the process may die after each step. All other inputs of the model (the seed with which
transforms are inverted, the number of devices) are stored before they are used. A model is stored under its own hash, and is
published in one transaction. So a repeated attempt gives the same bits, and a round never has two models.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sumus.aggregate import Aggregate
from sumus.errors import ExperimentError
from sumus.optimizers import ServerState
from sumus.plan import Plan
from sumus.protocol.round import Session
from sumus.protocol.rows import changed
from sumus.rounds.circumstances import Crowd
from sumus.rounds.closing import Unusable, usable
from sumus.rounds.run import Run, pacing_on_server
from sumus.rounds.sealed_sums import merged
from sumus.rounds.seeds import Seeds, any_seed, noted
from sumus.spec import canonical_json
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing
from sumus.storage.store import Model, Rows, Store
from sumus.text import many
from sumus.tree import nested, unnested
from sumus.types import Tree
from sumus.wire.messages import Assignment, Body, Kind, Released
from sumus.wire.tensors import decode_tree, encode_tree

KEPT_MODELS = 100
"""The number of versions that are kept before the newest one. The released version and the first version are always kept."""


class TrainingRun(Run):
    """A run in which devices train; a round's sum becomes the next model.

    Attributes:
        plan: The plan, which contains a description of its data.
        blobs: The store of plans and models.
        releases: Whether a new model is released at once; otherwise an admin promotes it.
        version: The version of the newest model.
        shown: The version of the released model, which devices use for predictions.
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
        crowd: Crowd,
        seeds: Seeds = any_seed,
        releases: bool = True,
    ) -> None:
        pacing, least = pacing_on_server(plan.pacing, plan.min_contributors), plan.min_contributors
        spools = plan.algorithm.aggregator.needs_each_update
        super().__init__(task, pacing, plan.first_hop, store, ring, sums, seeds, least, crowd, spools)
        self.plan, self.blobs, self.releases = plan, blobs, releases
        self.plan_body = Body(blobs.put(plan.to_json().encode()), len(plan.to_json().encode()))
        self.most_together = 0 if spools or plan.sums.max_count < pacing.chosen else pacing.chosen
        self.edges = plan.edges
        self.version, self.shown = 0, 0
        self._at: tuple[str, str, ServerState] | None = None
        self._models: dict[int, Model] = {}
        self._bodies: dict[str, Body] = {}

    def begin(self, initial: Tree, now: float) -> None:
        """Write the first model, unless a model exists already.

        If the plan has changed, training continues from the newest model, with the initial state of the new plan's optimizer.
        The open round is ended, since its sum belongs to the old plan.

        Args:
            initial: The shared leaves of the first model.
            now: Seconds of the server's clock.
        """
        with self.store.transaction() as rows:
            run, head = rows.run(), rows.model(rows.run().version)
        if head is None:
            first = self._model(0, self.plan.algorithm.start(initial, self.plan.description), None, None, now)
            with self.store.transaction() as rows:
                if not rows.models():  # another process may begin at the same time
                    rows.put_model(first)
        elif head.plan != self.plan.id:
            self.end_all(now)  # devices at work would report by the old plan
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
            raise ExperimentError(f"{self.task} is now served with another plan by another server: stop one of the two")
        broadcast = self.body(model.broadcast)
        return assignment_of(self, session, session.version, self.plan_body, broadcast, now)

    def conclude(self, number: int, now: float) -> None:
        seed, known = self.seeds.of(number), self.crowd.count()
        with self.coordinator.leading() as rows:
            version = rows.run().version
            people = int(noted(rows, number, "people", lambda: str(known).encode()))
            late = [row.staleness for row in map(rows.session, rows.counted_in(number)) if row is not None]
        apart = self.sums.shards(number) if self.sums.spools else None
        total = self.sums.total(number) if apart is None else merged(apart)
        people = max(people, int(total.count))  # devices in the sum have left, or an edge has reported fewer devices
        after = self._after(total, apart, self.state(self.model(version)), seed, people)
        train = {
            name: mean for name, mean in total.metric_means().items() if name == "loss"
        }  # all reports have the loss
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
        """Compute the server's state after a sum. If the plan needs the reports of the sum one by one, `apart` holds them."""
        check_enough(total, self.least)
        algorithm = self.plan.algorithm
        # noise for differential privacy enters here: between the sum and the model's step
        with usable():
            if apart is not None:
                combined = algorithm.combine_each(apart, self.plan.description, self.plan.sums, seed, people)
            else:
                combined = algorithm.combine(total, self.plan.description, self.plan.sums, seed, people)
            return algorithm.step(combined, state, self.plan.description)

    def see(self) -> None:
        """Read which model is the newest, which one is released, and which objects devices may fetch."""
        with self.store.transaction() as rows:
            run, models = rows.run(), rows.models()
        self._models = {model.version: model for model in models}
        self.version, self.shown = run.version, run.released
        self.objects = frozenset({self.plan_body.sha256, *(m.broadcast for m in models), *(m.model for m in models)})
        self._bodies = {sha: body for sha, body in self._bodies.items() if sha in self.objects}

    def _forget_models(self) -> None:
        """Delete old versions, and the objects that belong only to these versions."""
        with self.coordinator.leading() as rows:
            models = rows.models()
            old = [m for m in models if 0 < m.version < self.version - KEPT_MODELS and m.version != self.shown]
            for model in old:
                rows.drop_model(model.version)
        kept = {sha for m in models if m not in old for sha in (m.broadcast, m.memory, m.model)}
        for sha in {sha for m in old for sha in (m.broadcast, m.memory, m.model)} - kept:
            self.blobs.delete(sha)

    def model(self, version: int) -> Model:
        """Return a version's row."""
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
        return f"version {version} of {self.task} is no longer kept; the kept versions are {', '.join(spans)}"

    def state(self, model: Model) -> ServerState:
        """Read the server's state at a version: the broadcast, and the state of the optimizer."""
        if self._at is None or self._at[:2] != (model.broadcast, model.memory):
            trees = [nested(decode_tree(self.blobs.get(which))) for which in (model.broadcast, model.memory)]
            self._at = model.broadcast, model.memory, ServerState(trees[0], trees[1])
        return self._at[2]

    def released(self) -> Released:
        """Return the released model, which devices use for predictions."""
        return Released(self.shown, self.body(self.model(self.shown).model))

    def promote(self, version: int) -> None:
        """Release this version: devices use it for predictions from now on."""
        self.model(version)
        with self.coordinator.leading() as rows:
            rows.put_run(changed(rows.run(), released=version))
        self.see()

    def roll_back(self, version: int, now: float) -> Model:
        """Continue from an earlier version, which becomes the newest version under a new number. All open work is ended.

        This begins a new noise epoch (a new account of the noise for differential privacy): the privacy budget that was spent
        before stays spent, since published models stay published.
        """
        earlier = self.model(version)
        self.end_all(now)
        state = self.state(earlier)
        if earlier.plan != self.plan.id:  # the optimizer of this plan cannot use that optimizer's state
            state = self.plan.algorithm.start(self._shared(earlier), self.plan.description)
        return self._add(state, earlier, now, None, epoch=1)

    def note_evaluation(self, version: int, measured: Mapping[str, Any]) -> None:
        """Store the metrics that devices measured with a version. If the version was deleted meanwhile, do nothing."""
        with self.coordinator.leading() as rows:
            if (model := rows.model(version)) is None:
                return
            noted = replace(model, metrics=canonical_json({**json.loads(model.metrics), "evaluate": measured}))
            rows.put_model(noted)
        self._models[version] = noted

    def _add(self, state: ServerState, parent: Model, now: float, released: int | None, epoch: int = 0) -> Model:
        """Add a version that was not made by a round.

        Args:
            state: The server's state at the new version.
            parent: The version from which it continues.
            now: Seconds of the server's clock.
            released: The version that is released from now on; None for the new one.
            epoch: The number of noise epochs that begin with the version.
        """
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
        """Make the row of a version, and store the objects that it points to."""
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
        """Return the shared leaves of a version."""
        broadcast = self.state(model).broadcast
        return {**broadcast["params"], **broadcast.get("buffers", {})}

    def body(self, sha256: str) -> Body:
        """Return an object's hash and size, as they are sent to devices. The size is read only once, since reading may be slow
        (blobs may be in a bucket).
        """
        if sha256 not in self._bodies:
            size = self.blobs.size(sha256)
            if size is None:
                raise ExperimentError(
                    f"object {sha256} is missing in the server's blobs: restore the folder from a backup"
                )
            self._bodies[sha256] = Body(sha256, size)
        return self._bodies[sha256]


def assignment_of(run: Run, session: Session, version: int, plan: Body, broadcast: Body, now: float) -> Assignment:
    """Return the assignment of a session.

    Args:
        run: The run that gave the session.
        session: The session.
        version: The version of the model from which the device trains, or which it measures.
        plan: The hash and size of the plan.
        broadcast: The hash and size of the broadcast from which the device begins.
        now: Seconds of the server's clock.
    """
    left = max(0.0, session.expires - now)
    return Assignment(
        task=run.task,
        kind=run.kind,
        session=session.id.rpartition("/")[2],
        version=version,
        plan=plan,
        broadcast=broadcast,
        seed=run.seeds.of(session.round).hex(),
        contributors=run.least,
        expires_in_s=left if math.isfinite(left) else None,
    )


def check_enough(total: Aggregate, least: int) -> None:
    """Raise Unusable if a sum has too few contributors."""
    if int(total.count) < least:
        raise Unusable(f"the sum has {many(int(total.count), 'contributor')}, but the plan requires at least {least}")
