"""A site's run: an adder whose devices do rounds of its own before their sum goes up.

    run = SiteRun(served, relay, store, ring, sums, blobs)

It begins as an adder does: devices ask, the server above gives them work, and the round is theirs. What they report there makes a
model of the site's, and the next round is on that, among the same devices: nobody above is asked. After the plan's number of
rounds, what the model has moved by goes up as one sum, under the sessions that the server above has given.

A round of fewer people than the plan's `min_contributors` makes no model: the first goes up as it is, as an adder's does; after a
later one the sum is of the rounds before. Everything between two sums is one note of the run, written where a round is published:
so after a crash the same rounds go on, and the same bytes go up.
"""

from collections.abc import Iterable
from dataclasses import replace

import msgspec
import numpy as np

from sumus.edge.adder import ASKING, LINGER, AdderRun, Purpose, ReadySum, Relay, share_of
from sumus.errors import ExperimentError
from sumus.plan import Plan
from sumus.protocol.round import AbandonRound, Action, ComeLater, Round, Session
from sumus.rounds.circumstances import Crowd
from sumus.rounds.closing import Unusable, usable
from sumus.rounds.recording import newest_of
from sumus.rounds.run import LOG, DeviceCheckIn
from sumus.site import Site, seed_of
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing
from sumus.storage.store import OF_THE_RUN, Store
from sumus.text import many
from sumus.tree import nested, unnested
from sumus.types import Broadcast
from sumus.wire.messages import Assignment, Body, Served
from sumus.wire.reports import encode_sum
from sumus.wire.tensors import decode_tree, encode_tree

_NOTE = "standing"


class SiteStanding(msgspec.Struct, frozen=True):
    """Where a site is between two sums, from the end of the first round on.

    purpose: the work of the server above, and the end of the round that comes.
    sessions: of the server above, that the sum will be of.  model: what the site's devices begin from now.  done: rounds.
    last: the number of the last.  weights, metrics: see `Site`.  over: no round comes any more, and the sum goes up.
    """

    purpose: Purpose
    sessions: tuple[str, ...]
    model: Body
    done: int
    last: int
    weights: dict[str, int]
    metrics: dict[str, tuple[int, int]]
    over: bool

    @property
    def devices(self) -> frozenset[str]:
        """Who takes part."""
        return frozenset(session.partition("/")[0] for session in self.sessions)


class SiteRun(AdderRun):
    """A run of the server above, as a site takes part in it. blobs: where plans and models lie, for devices; the plan's among
    them."""

    def __init__(
        self,
        served: Served,
        relay: Relay,
        store: Store,
        ring: KeyRing,
        sums: Blobs,
        blobs: Blobs,
        crowd: Crowd,
        linger: float = LINGER,
    ) -> None:
        self._blobs = blobs
        self._plan = Plan.from_json(bytes(blobs.get(served.plan.sha256)).decode())
        self._standing: SiteStanding | None = None
        super().__init__(served, relay, store, ring, sums, crowd, linger)
        self.edges = replace(self.edges, rounds=1)  # of what stands below: they add

    # ── what the server asks of every run ────────────────────────────────────────────────────────────────────────────

    def recover(self, now: float, fence: int | None) -> None:
        with self.store.transaction() as rows:
            note = rows.note(OF_THE_RUN, _NOTE)
        before = None if note is None else msgspec.json.decode(note, type=SiteStanding)
        other = before is not None and before.purpose.work.plan != self.served.plan
        self._standing = None if other else before
        super().recover(now, fence)
        if other:  # it is of another plan, and so is what is open
            super().end_all(now)
            self._forget()
        if (standing := self._standing) is not None:
            self._keep_for(standing)
            if standing.over:
                self._send_up(standing, now)

    def carry_out(self, actions: Iterable[Action], now: float) -> None:
        decided = list(actions)
        super().carry_out(decided, now)
        standing = self._standing
        if standing is not None and not standing.over:
            ended = any(isinstance(each, AbandonRound) and each.number > standing.last for each in decided)
            if ended:
                self._finish(standing, now)

    def end_all(self, now: float) -> None:
        if self._standing is not None:
            self._relay.note_ended(self.task, self.kind, self._standing.sessions)
        self._standing = None
        super().end_all(now)
        self._forget()  # last: a start in between ends what is open

    def waits_for(self, row: Round) -> str:
        standing = self._standing
        if standing is None:
            return super().waits_for(row)
        if standing.over:
            return "its sum is on its way to the server above"
        of = many(len(standing.sessions), "device")
        return f"its own round {standing.done + 1} of {self.served.rounds}, on a model of {of}"

    def admits(self, asked: DeviceCheckIn, now: float) -> ComeLater | None:
        standing, device = self._standing, asked.device
        if standing is None:
            return super().admits(asked, now)
        with self.store.transaction() as rows:
            known = rows.device(device)
            last = None if known is None else known.session
            newest = newest_of(rows)
        again = last is not None and last.serial == asked.request.serial
        if not again and (standing.over or device not in standing.devices or _is_counted_in(last, newest)):
            return ComeLater(ASKING, "closed")
        return None

    def offer(self, session: Session, now: float) -> Assignment:
        given = super().offer(session, now)
        standing = self._standing
        if standing is None:
            return given
        self._latest = now
        seed = seed_of(bytes.fromhex(given.seed), standing.done)
        return msgspec.structs.replace(given, broadcast=standing.model, seed=seed.hex())

    def conclude(self, number: int, now: float) -> None:
        """Let the round's sum move the site's model; or add, where that may not be."""
        standing = self._standing
        if standing is not None and number <= standing.last:
            return  # that was done, and its sum goes up from there
        purpose = self._of(number)
        if purpose is None:  # its work was of another plan
            self.carry_out(self.coordinator.cancel(number, now), now)
            return
        total = self.sums.total(number)
        if int(total.count) < self._plan.min_contributors:
            if standing is None:
                super().conclude(number, now)
            else:  # too few to make a model of: that ends it
                self.carry_out(self.coordinator.cancel(number, now), now)
            return
        with self.store.transaction() as rows:
            sessions = tuple(rows.counted_in(number)) if standing is None else standing.sessions
            out = rows.sessions_out()
        self._take_back(lambda granted: True)
        site = self._site(purpose.work, standing)
        with usable():
            after = site.after(total)
        done = self._moved(purpose, sessions, after, number, now)
        self._publish(number, now, lambda rows: rows.put_note(OF_THE_RUN, _NOTE, msgspec.json.encode(done)))
        if standing is None:  # else they are sessions of the site's own
            self._relay.note_ended(self.task, self.kind, out)
        self.coordinator.drop(out, "closed", now)
        self._standing, self._latest, self._full = done, now, False
        self._keep_for(done)
        if done.over:
            self._send_up(done, now)

    def holds(self, device: str) -> bool:
        return super().holds(device) or (self._standing is not None and device in self._standing.devices)

    def tick(self, now: float) -> None:
        if self._standing is not None and self._standing.over and self._standing.last not in self.sums_to_send:
            self._send_up(self._standing, now)
        super().tick(now)

    def turned_away(self, asked: DeviceCheckIn, now: float) -> None:
        if self._standing is None:  # else the round is the site's own
            super().turned_away(asked, now)

    def dropped(self, sessions: Iterable[str], reason: str) -> None:
        if self._standing is None:  # else they are the site's own
            super().dropped(sessions, reason)

    # ── what the uplink brings ───────────────────────────────────────────────────────────────────────────────────────

    def delivered(self, number: int, now: float) -> None:
        if not self._is_standing(number):
            super().delivered(number, now)
        elif self.sums_to_send.pop(number, None) is not None:
            self.trouble = ""
            self._forget()
            self.tick(now)

    def refused(self, number: int, why: str, now: float) -> None:
        if not self._is_standing(number):
            super().refused(number, why, now)
        elif self.sums_to_send.pop(number, None) is not None:
            self.trouble = f"the sum of rounds up to {number} was not counted above: {why}"
            if self._standing is not None:
                self._relay.note_ended(self.task, self.kind, self._standing.sessions)
            self._forget()
            self.tick(now)

    # ── of a round ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _fits(self, work: Assignment, now: float) -> bool:
        return self._standing is None and super()._fits(work, now)

    def _of(self, number: int) -> Purpose | None:
        standing = self._standing
        if standing is None or number <= standing.last:
            return super()._of(number)
        return None if standing.over else standing.purpose

    def _most(self) -> int:
        return super()._most() if self._standing is None else len(self._standing.sessions)

    def _site(self, work: Assignment, standing: SiteStanding | None) -> Site:
        """The value that a standing is of."""
        plan, base = self._plan, self._model(work.broadcast)
        site = Site.of(plan.algorithm, plan.description, plan.sums, bytes.fromhex(work.seed), base)
        if standing is None:
            return site
        metrics = {name: np.array(pair, np.int64) for name, pair in standing.metrics.items()}
        at, weights = self._model(standing.model), standing.weights
        return replace(site, at=at, done=standing.done, weights=weights, metrics=metrics)

    def _moved(self, purpose: Purpose, sessions: tuple[str, ...], site: Site, number: int, now: float) -> SiteStanding:
        """Where the site is after a round, its model kept. The time that is left is shared among the rounds that are."""
        body = encode_tree(unnested(site.at))
        left = self.served.rounds - site.done
        return SiteStanding(
            msgspec.structs.replace(purpose, ends=share_of(purpose.sent, max(1, left), now)),
            sessions,
            Body(self._blobs.put(body), len(body)),
            site.done,
            number,
            dict(site.weights),
            {name: (int(pair[0]), int(pair[1])) for name, pair in site.metrics.items()},
            left <= 0,
        )

    def _finish(self, standing: SiteStanding, now: float) -> None:
        """No more rounds: what there is goes up."""
        done = msgspec.structs.replace(standing, over=True)
        with self.coordinator.leading() as rows:
            rows.put_note(OF_THE_RUN, _NOTE, msgspec.json.encode(done))
        self._standing = done
        self._send_up(done, now)

    def _send_up(self, standing: SiteStanding, now: float) -> None:
        """Keep the sum for the uplink."""
        number = standing.last
        try:
            site = self._site(standing.purpose.work, standing)
        except ExperimentError as error:  # a file that is missing may be put back
            self.trouble = f"the sum of rounds up to {number} cannot go up yet: {error}"
            return
        try:
            with usable():
                total = site.total(len(standing.sessions))
        except Unusable as error:
            LOG.warning("%s: %s", self.task, error)
            self.trouble = f"the sum of rounds up to {number} cannot be counted above: {error}"
            self._relay.note_ended(self.task, self.kind, standing.sessions)
            self._forget()
            return
        body = encode_sum(standing.sessions, total, self.hop_above)
        self.sums_to_send[number] = ReadySum(number, self.task, self.kind, body, len(standing.sessions))
        self._relay.wake()

    def _forget(self) -> None:
        """What was between two sums is over."""
        with self.store.transaction() as rows:
            rows.put_note(OF_THE_RUN, _NOTE, None)
        self._standing = None

    def _is_standing(self, number: int) -> bool:
        return self._standing is not None and self._standing.last == number

    def _keep_for(self, standing: SiteStanding) -> None:
        work = standing.purpose.work
        self._keep(work.plan.sha256, work.broadcast.sha256, standing.model.sha256)

    def _model(self, body: Body) -> Broadcast:
        return nested(decode_tree(self._blobs.get(body.sha256)))


def _is_counted_in(last: Session | None, row: Round) -> bool:
    """Whether a device has done its part in a round."""
    return last is not None and last.state == "counted" and last.round == row.number
