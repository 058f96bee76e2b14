"""A site's own model, and the site's standing (its saved progress) between two of its sums.

    model = SiteModel(served, store, blobs)
    model.read()                           what was written before a crash
    model.move(work, total, number, now, publish)     after a round: its sum updates the model
    model.total()                          the sum for the server above: the change of the model

The whole state between two sums is one note of the run. It is written in the transaction that publishes a round, so that after
a crash the same rounds continue and the same bytes are sent.
"""

from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np

from sumus.aggregate import Aggregate
from sumus.edge.edge_work import EdgeWork, share_of
from sumus.plan import Plan
from sumus.protocol.site import OwnRounds
from sumus.rounds.closing import usable
from sumus.rounds.coordinator import Also, Coordinator
from sumus.site import Site, seed_of
from sumus.storage.blobs import Blobs
from sumus.storage.store import OF_THE_RUN, Rows, Store
from sumus.tree import nested, unnested
from sumus.types import Broadcast
from sumus.wire.messages import Assignment, Body, Served
from sumus.wire.tensors import decode_tree, encode_tree

_NOTE = "standing"


class SiteStanding(msgspec.Struct, frozen=True):
    """A site's saved progress between two sums that it sends, from the end of its first round on.

    Attributes:
        purpose: The work of the server above, with the time limits of the next round.
        sessions: The sessions of the server above for which the sum will count as the report.
        model: The model from which the site's devices begin now.
        done: The number of rounds that have changed the model.
        last: The number of the last such round.
        weights: The weight of each part, summed over these rounds.
        metrics: The metrics of the last such round.
        over: Whether the rounds have ended, and the sum must be sent.
    """

    purpose: EdgeWork
    sessions: tuple[str, ...]
    model: Body
    done: int
    last: int
    weights: dict[str, int]
    metrics: dict[str, tuple[int, int]]
    over: bool

    @property
    def own(self) -> OwnRounds:
        """The same standing in the form of the site's table."""
        return OwnRounds(self.sessions, self.done, self.last, self.over)


class SiteModel:
    """The model of a site, and the note with the site's standing.

    Attributes:
        plan: The plan of the server above.
        rounds: The number of rounds between two sums, as set by the plan.
        standing: The site's standing; None in its first round.
    """

    def __init__(self, served: Served, store: Store, blobs: Blobs) -> None:
        """Read the plan. `read` must be called later, to read the site's standing (how far its own rounds have got).

        Args:
            served: The run, as the server above describes it.
            store: The rows of the run.
            blobs: The plans and models that devices fetch; the plan must be among them.
        """
        self.plan = Plan.from_json(bytes(blobs.get(served.plan.sha256)).decode())
        self.standing: SiteStanding | None = None
        self.rounds, self._store, self._blobs = served.rounds, store, blobs

    @property
    def own(self) -> OwnRounds | None:
        """The site's own rounds since its last sum; None in the first round."""
        return None if self.standing is None else self.standing.own

    def read(self, plan: Body) -> bool:
        """Read the site's standing. A standing of another plan is no longer valid.

        Returns:
            Whether the standing belongs to another plan.
        """
        with self._store.transaction() as rows:
            note = rows.note(OF_THE_RUN, _NOTE)
        before = None if note is None else msgspec.json.decode(note, type=SiteStanding)
        other = before is not None and before.purpose.work.plan != plan
        self.standing = None if other else before
        return other

    def forget(self) -> None:
        """Delete the standing: the next round is a first round again."""
        with self._store.transaction() as rows:
            rows.put_note(OF_THE_RUN, _NOTE, None)
        self.standing = None

    def work_of(self, number: int) -> EdgeWork | None:
        """Return the work of an own round; None if the round is not one of the site's own, or if its rounds have ended."""
        standing = self.standing
        return None if standing is None or standing.over or number <= standing.last else standing.purpose

    def has_done(self, number: int) -> bool:
        """Return whether this round has changed the model since the last sum."""
        return self.standing is not None and number <= self.standing.last

    def began_before(self, number: int) -> bool:
        """Return whether a round came after the first round. Then its work is in the site's note, not in a note of the round."""
        return self.standing is not None and number > self.standing.last

    def assignment(self, given: Assignment) -> Assignment:
        """Return the assignment of an own round: it begins from the site's model, and has a seed of its own."""
        if (standing := self.standing) is None:
            return given
        seed = seed_of(bytes.fromhex(given.seed), standing.done)
        return msgspec.structs.replace(given, broadcast=standing.model, seed=seed.hex())

    def move(
        self, work: EdgeWork, total: Aggregate, number: int, now: float, publish: Callable[[int, float, Also], None]
    ) -> None:
        """Update the model with the sum of a round, and publish the round.

        Args:
            work: The work of the round.
            total: The sum of the round.
            number: The round's number.
            now: The store's clock, in seconds.
            publish: Publishes a round, given its number, the time, and a function that writes further rows in the same
                transaction.

        Raises:
            Unusable: No model can be made of the sum.
        """
        with self._store.transaction() as rows:
            sessions = tuple(rows.counted_in(number)) if self.standing is None else self.standing.sessions
        moved = self._after(work, sessions, total, number, now)
        publish(number, now, lambda rows: _write(rows, moved))
        self.standing = moved

    def end_rounds(self, coordinator: Coordinator) -> None:
        """Record that the site's rounds have ended."""
        assert self.standing is not None, "own rounds end after the first round"
        ended = msgspec.structs.replace(self.standing, over=True)
        with coordinator.leading() as rows:
            _write(rows, ended)
        self.standing = ended

    def _after(
        self, work: EdgeWork, sessions: tuple[str, ...], total: Aggregate, number: int, now: float
    ) -> SiteStanding:
        """Return the site's standing after a round; the new model is stored among the blobs.

        The remaining rounds share evenly the time until the sum must be sent.
        """
        before = self._site(work.work)
        with usable():
            site = before.after(total)
        body = encode_tree(unnested(site.at))
        left = self.rounds - site.done
        return SiteStanding(
            purpose=msgspec.structs.replace(work, ends=share_of(work.sent, max(1, left), now)),
            sessions=sessions,
            model=Body(self._blobs.put(body), len(body)),
            done=site.done,
            last=number,
            weights=dict(site.weights),
            metrics={name: (int(pair[0]), int(pair[1])) for name, pair in site.metrics.items()},
            over=left <= 0,
        )

    def total(self) -> Aggregate:
        """Return the sum for the server above: the change of the model.

        Raises:
            ExperimentError: A file is missing; it may be restored.
            Unusable: The model has changed by more than the limit for a sum of this many reports.
        """
        assert self.standing is not None, "a site has a sum after its first round"
        site = self._site(self.standing.purpose.work)
        with usable():
            return site.total(len(self.standing.sessions))

    def _site(self, work: Assignment) -> Site:
        """Return the `Site` value for the standing."""
        plan, base = self.plan, self._model(work.broadcast)
        site = Site.of(plan.algorithm, plan.description, plan.sums, bytes.fromhex(work.seed), base)
        if (standing := self.standing) is None:
            return site
        metrics = {name: np.array(pair, np.int64) for name, pair in standing.metrics.items()}
        at, weights = self._model(standing.model), standing.weights
        return replace(site, at=at, done=standing.done, weights=weights, metrics=metrics)

    def _model(self, body: Body) -> Broadcast:
        return nested(decode_tree(self._blobs.get(body.sha256)))


def _write(rows: Rows, standing: SiteStanding) -> None:
    """Write a site's standing as a note."""
    rows.put_note(OF_THE_RUN, _NOTE, msgspec.json.encode(standing))
