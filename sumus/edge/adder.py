"""An edge's run: devices work for a round of the server above, and what they report becomes one sum for it.

    relay = Relay()                        of all its runs: who asks, and what came down
    run = AdderRun(served, relay, store, ring, sums)
    run.give(device, request, work, now)   work came down for a device
    run.sums_to_send                       rounds that are closed, as bodies
    run.delivered(number, now)             the server above has counted one; or run.refused(number, why, now)

An edge's round is a server's, with a pacing of its own: its cohort are the devices that the server above has given work to. It
closes when they all have ended; or before the time is over in which the server above counts its sum.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

import msgspec

from sumus.first_hop import FirstHop
from sumus.pacing import Pacing
from sumus.protocol.round import AbandonRound, Action, ComeLater, Round, Session, State, lets_go_at
from sumus.protocol.rows import changed
from sumus.rounds.circumstances import Crowd
from sumus.rounds.departures import keep_departed
from sumus.rounds.recording import newest_of
from sumus.rounds.run import DeviceCheckIn, Run
from sumus.rounds.seeds import any_seed
from sumus.site import Edges
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing
from sumus.storage.store import Store
from sumus.wire.messages import Assignment, CheckInAnswer, CheckInRequest, EndReason, Kind, Released, Served
from sumus.wire.reports import encode_sum

MOST = 1_000_000
"""Devices in an edge's round, where the server above has not ended it yet."""
MARGIN = 0.2
"""The share of the time that the server above gives which is kept for the sum's own way."""
LINGER = 20.0
"""Seconds for which more devices are awaited, once all who were given work have ended."""
ASKING = (0.3, 1.0)
"""The window to come back in while a check-in is on its way up."""
NOT_NOW = ComeLater(ASKING, "asking")
MOST_OBJECTS = 12
"""Plans and models that are kept for devices to fetch."""
REASONS = frozenset(get_args(EndReason))
ASK_AGAIN = 5.0
"""Seconds after which a check-in that is held here is passed on again, though its window is longer: it goes up with others."""
MOST_SENT_AWAY = 100_000
"""Devices of which it is remembered when they may ask again."""
TURNED_AWAY = (5.0, 15.0)
"""The window to come back in, of a device that is kept out of the sum that is open above."""
PICK_UP = 60.0
"""Seconds after which work that came down for a device, and that it has not fetched, is given back."""


class Granted(NamedTuple):
    """Work that came down for a device. since: when, by the server's clock."""

    work: Assignment
    serial: int
    since: float


class Relay:
    """What all runs of an edge share: by device, the last check-in that is to be passed on; work that came down and waits to be
    fetched; and who is to come later. On the deciding thread.

    ended: sessions of which no report will come, by (task, kind, device and session), with the reason.
    going_up: check-ins that are on their way.  wake: is called when there is something to pass on.  holds: whether what a device
    has done is in a sum that has not gone up yet.  forgets: is called, with the time, for a device that asks for other work than
    it has.  members: devices that the edge has.
    """

    def __init__(self) -> None:
        self.asking: dict[str, DeviceCheckIn] = {}
        self.going_up: dict[str, DeviceCheckIn] = {}
        self.granted: dict[str, Granted] = {}
        self.ended: dict[tuple[str, Kind, str], str] = {}
        self.wake: Callable[[], None] = lambda: None
        self.holds: Callable[[str], bool] = lambda device: False
        self.forgets: Callable[[str, float], None] = lambda device, now: None
        self.members = 0
        self._later: OrderedDict[str, tuple[int, float, ComeLater]] = OrderedDict()
        self._next = math.inf

    def clear(self) -> None:
        """Know of nobody who asks, and of no work that waits."""
        for each in (self.asking, self.going_up, self.granted):
            each.clear()

    def ask(self, asked: DeviceCheckIn, now: float) -> ComeLater:
        """Pass a check-in on, unless that was done, and what came down says when it may be done again. Whoever is held must wait:
        to the server above a device that asks anew has forgotten its work, and with that the whole sum would be refused."""
        device = asked.device
        serial, until, later = self._later.get(device, (-1, now, NOT_NOW))
        if serial == asked.request.serial and now < until:
            return later
        if device not in self.granted and asked not in (self.going_up.get(device), self.asking.get(device)):
            if self.holds(device):
                return ComeLater(ASKING, "closed")
            self.forgets(device, now)
            self.asking[device] = asked
            self.wake()
        return NOT_NOW

    def send_away(self, device: str, request: CheckInRequest, answer: CheckInAnswer, now: float) -> None:
        """A device is to come later."""
        window = answer.retry_after_s or ASKING
        until = math.inf if answer.reason == "replayed" else now + min(window[0], ASK_AGAIN)
        self._later[device] = request.serial, until, ComeLater(window, answer.reason)
        self._next = min(self._next, until)
        self._later.move_to_end(device)
        while len(self._later) > MOST_SENT_AWAY:
            self._later.popitem(last=False)

    def note_members(self, members: int) -> None:
        """How many devices the edge has: the server above is told where that has changed."""
        if members != self.members:
            self.members = members
            self.wake()

    def is_due(self, now: float) -> bool:
        """Whether somebody who was to come later may ask again by now."""
        if now < self._next:
            return False
        left = [until for _, until, _ in self._later.values() if until > now]
        self._next = min(left, default=math.inf)
        return True

    def note_ended(self, task: str, kind: Kind, sessions: Iterable[str], reason: str = "edge") -> None:
        """No report will come of these. reason: "edge" if that is not their devices' doing."""
        said = "edge" if reason == "closed" else reason if reason in REASONS else "other"
        self.ended |= {(task, kind, session): said for session in sessions}
        if self.ended:
            self.wake()


class Purpose(msgspec.Struct, frozen=True):
    """What a round of an edge's is for. work: of the server above, as its first device got it.  ends: when the round must be
    over, by the edge's clock, and sent: when its sum must go up; None for never."""

    work: Assignment
    ends: float | None
    sent: float | None


class ReadySum(NamedTuple):
    """A sum that goes up. sessions: how many it is of."""

    number: int
    task: str
    kind: Kind
    body: bytes
    sessions: int


class AdderRun(Run):
    """A run of the server above, as this edge takes part in it.

    served: what that server says of it.  hop_above: how it counts this edge's sums.  sums_to_send: by round's number.
    linger: seconds for which more devices are awaited, once all who were given work have ended.
    """

    def __init__(
        self,
        served: Served,
        relay: Relay,
        store: Store,
        ring: KeyRing,
        sums: Blobs,
        crowd: Crowd,
        linger: float = LINGER,
    ) -> None:
        self.kind = served.kind
        hop = FirstHop.from_json(served.hop)
        below = replace(hop, rounds=1)  # devices and edges below report of one round, however many a site does
        super().__init__(served.task, Pacing(MOST), below, store, ring, sums, any_seed, 1, crowd)
        self._open_pacing = Pacing(MOST)
        self.hop_above = hop
        self.plan_body, self.most_together = served.plan, min(served.most, hop.sums.max_count)
        self.edges = Edges(served.rounds, served.noise_at)
        self.sums_to_send: dict[int, ReadySum] = {}
        self._relay, self._linger = relay, linger
        self._purpose: tuple[int, Purpose] | None = None
        self._latest = 0.0
        self._recent: list[str] = []
        self._full = False
        self.serve(served)

    # ── what the server asks of every run ────────────────────────────────────────────────────────────────────────────

    @property
    def pacing(self) -> Pacing:
        """How the open round is paced, as `_pace` has found last."""
        return self._open_pacing

    def recover(self, now: float, fence: int | None) -> None:
        self._relay.clear()
        self.sums_to_send.clear()
        self._purpose, self._latest = None, now
        super().recover(now, fence)
        if (purpose := self._of(self.coordinator.current.number)) is not None:
            self._keep(purpose.work.plan.sha256, purpose.work.broadcast.sha256)
        self._pace(now)

    def carry_out(self, actions: Iterable[Action], now: float) -> None:
        decided = list(actions)
        super().carry_out(decided, now)
        for action in decided:
            if isinstance(action, AbandonRound):
                self._give_back(action.number, now)

    def _give_back(self, number: int, now: float) -> None:
        """A round came to nothing: no report of its sessions will go up, and the server above may give their places away."""
        with self.store.transaction() as rows:
            awaited = [row for row in map(rows.session, rows.sessions_out()) if row is not None]
        out = [session.id for session in awaited if session.round == number]
        if out:
            self.dropped(out, "other")
            self.coordinator.drop(out, "closed", now)

    def holds(self, device: str) -> bool:
        """Whether what a device has done is in a sum that has not gone up yet."""
        with self.store.transaction() as rows:
            known = rows.device(device)
            last = None if known is None else known.session
            row = None if last is None or last.sum is None else rows.round(last.sum)
        return row is not None and not row.over

    def is_of(self, served: Served) -> bool:
        """Whether reports are counted as they say now."""
        return (self.served.hop, self.served.plan) == (served.hop, served.plan)

    def serve(self, served: Served) -> None:
        """The server above has said anew what this run is."""
        self.served = served
        if served.released is not None:
            self._keep(served.plan.sha256, served.released.model.sha256)

    def _keep(self, *objects: str) -> None:
        """Let devices fetch these, and those before them, up to a few."""
        self._recent = [*(each for each in self._recent if each not in objects), *objects][-MOST_OBJECTS:]
        self.objects = frozenset(self._recent)

    def released(self) -> Released | None:
        return self.served.released

    def waits_for(self, row: Round) -> str:
        if row.state is State.CLOSING:
            return "its sum is on its way to the server above"
        if row.state is State.OPEN and self._of(row.number) is None:
            return "no work has come down yet"
        return ""

    def admits(self, asked: DeviceCheckIn, now: float) -> ComeLater | None:
        """None where work for this very check-in has come down. Else it is to be passed on, unless what the device did last is
        still on its way up: the server above would take that for forgotten."""
        device, request = asked.device, asked.request
        granted = self._relay.granted.get(device)
        if granted is not None and (granted.serial, granted.work.session) == (request.serial, request.session):
            return None if self._is_mine(granted) else NOT_NOW
        if granted is not None and granted.serial < request.serial:
            del self._relay.granted[device]  # it came too late for the check-in that asked for it; the device asks anew
        with self.store.transaction() as rows:
            known, newest = rows.device(device), newest_of(rows)
            last = None if known is None else known.session
            row = None if last is None else rows.round(last.round)
        if last is not None and last.serial == request.serial:
            return None  # the same check-in again
        if known is not None and now < known.rests_until:
            rest = known.rests_until - now
            return ComeLater((rest, rest + ASKING[1]), "resting")
        state = "" if last is None or row is None or row.over else last.state
        if newest.state is State.CLOSING or state == "counted":
            return ComeLater(ASKING, "closed")
        if state != "out" and not self._has_room(newest):
            return ComeLater(ASKING, "full")
        return self._relay.ask(asked, now)

    def forget_work(self, device: str, now: float) -> None:
        """A device asks for other work than it has of this run. The server above forgets its session when it hears so, and would
        refuse a whole sum that holds its report: so from before the question goes up, no report of it is counted here."""
        out = [session.id for session in self.coordinator.last_sessions([device]) if session.awaited]
        if out:
            self.carry_out(self.coordinator.drop(out, "closed", now), now)

    def offer(self, session: Session, now: float) -> Assignment:
        self._relay.granted.pop(session.device, None)
        purpose = self._of(session.round)
        assert purpose is not None, "a session is given in a round that has work"
        left = None if purpose.ends is None else max(0.0, purpose.ends - now)
        return msgspec.structs.replace(purpose.work, session=session.id.rpartition("/")[2], expires_in_s=left)

    def conclude(self, number: int, now: float) -> None:
        """Keep the sum for the uplink; the round stays as it is until the server above has answered."""
        with self.store.transaction() as rows:
            sessions, out = rows.counted_in(number), rows.sessions_out()
        self._relay.note_ended(self.task, self.kind, out)
        self.coordinator.drop(out, "closed", now)
        total = self.sums.total(number)
        body = encode_sum(sessions, total, self.hop_above)
        self.sums_to_send[number] = ReadySum(number, self.task, self.kind, body, len(sessions))
        self._relay.wake()

    def tick(self, now: float) -> None:
        self.changes += self._relay.is_due(now)  # who is held may ask again
        self._relay.note_members(self.crowd.population)
        self._take_back(lambda granted: now - granted.since > PICK_UP, "other")
        self._pace(now)
        super().tick(now)
        self._pace(now)  # of a round that has just begun

    def rounds_of_sum(self) -> Sequence[int]:
        """This edge's rounds that went, or will go, into one sum of the server above."""
        newest = self.coordinator.current.number
        purpose = self._of(newest)
        rounds = [newest if purpose is not None else newest - 1]
        purpose = purpose or self._of(rounds[0])
        while purpose is not None and (before := self._of(rounds[0] - 1)) is not None:
            if not _same(before.work, purpose.work):
                break
            rounds.insert(0, rounds[0] - 1)
        return rounds

    # ── what the uplink brings ───────────────────────────────────────────────────────────────────────────────────────

    def give(self, device: str, request: CheckInRequest, work: Assignment, now: float) -> None:
        """Work came down for a device, and waits here to be fetched."""
        self.changes += 1
        with self.store.transaction() as rows:
            taken = rows.session(f"{device}/{work.session}")
        if taken is not None:  # it asked twice, and has fetched it since
            return
        if self._fits(work, now):
            self._relay.granted[device] = Granted(work, request.serial, now)
            self._latest, self._full = now, False
        else:  # it is of another round than the one that is open here
            self._relay.note_ended(self.task, self.kind, [f"{device}/{work.session}"])
        self._pace(now)

    def send_away(self, reason: str, now: float) -> None:
        """Somebody was given no work."""
        self.changes += 1
        self._full |= reason in ("full", "closed")
        self._pace(now)

    def turned_away(self, asked: DeviceCheckIn, now: float) -> None:
        """Give back work that has come down for this device. If nobody else has any, then end the round, so that the server above
        is asked again a little later: it may have begun another sum."""
        granted = self._relay.granted.get(asked.device)
        self._take_back(lambda each: each is granted)
        self._relay.send_away(asked.device, asked.request, CheckInAnswer(retry_after_s=TURNED_AWAY, reason="left"), now)
        row = self.coordinator.current
        if row.state is State.OPEN and row.given == row.dropped and not self._waiting() and not self._lapsed(row):
            self.carry_out(self.coordinator.cancel(row.number, now), now)

    def dropped(self, sessions: Iterable[str], reason: str) -> None:
        self._relay.note_ended(self.task, self.kind, sessions, reason)

    def delivered(self, number: int, now: float) -> None:
        """The server above has counted a sum."""
        if self.sums_to_send.pop(number, None) is not None:
            self.trouble = ""
            self._publish(number, now)
            self.tick(now)

    def refused(self, number: int, why: str, now: float) -> None:
        """It has not, and will not."""
        if self.sums_to_send.pop(number, None) is not None:
            self.trouble = f"the sum of round {number} was not counted above: {why}"
            with self.store.transaction() as rows:
                sessions = rows.counted_in(number)
            self._relay.note_ended(self.task, self.kind, sessions)
            self.carry_out(self.coordinator.cancel(number, now), now)
            self.tick(now)

    # ── of a round ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _has_room(self, row: Round) -> bool:
        """Whether the sum of the round that is open can hold one report more."""
        return row.given - row.dropped + self._waiting() < self.most_together

    def _fits(self, work: Assignment, now: float) -> bool:
        """Whether work is of the round that is open here, or opens it. What is of an earlier one of the server's above ends."""
        row = self.coordinator.current
        if row.state is State.PLANNED:
            super().tick(now)
            row = self.coordinator.current
        if row.state is not State.OPEN:
            return False
        if (mine := self._of(row.number)) is None:
            self._note(row.number, work, now)
            return True
        if _same(mine.work, work):
            return self._has_room(row)
        self._end(now)
        return self.coordinator.current.state is State.PLANNED and self._fits(work, now)

    def _end(self, now: float) -> None:
        """No more devices come into this round: it closes when those that work have ended, or at once where none does."""
        with self.store.transaction() as rows:
            out = rows.sessions_out()
        self._take_back(lambda granted: True)
        self._full = True
        self._pace(now)
        self.dropped(out, "closed")
        self.carry_out(self.coordinator.drop(out, "closed", now), now)
        super().tick(now)

    def _take_back(self, which: Callable[[Granted], bool], reason: str = "edge") -> None:
        """Give back work that nobody has fetched. reason: "edge" if that is not their devices' doing."""
        granted = self._relay.granted
        for device in [device for device, each in granted.items() if self._is_mine(each) and which(each)]:
            gone = granted.pop(device)
            self._relay.note_ended(self.task, self.kind, [f"{device}/{gone.work.session}"], reason)

    def _waiting(self) -> int:
        """Work of this run that waits to be fetched."""
        return sum(map(self._is_mine, self._relay.granted.values()))

    def _is_mine(self, granted: Granted) -> bool:
        return (granted.work.task, granted.work.kind) == (self.task, self.kind)

    def _pace(self, now: float) -> None:
        """The pacing of the round that is open: whether more devices may come into it, and its end.

        Devices that have lapsed are waited for until one has reported: the work itself may take so long. After that, those are
        waited for that would not lapse by what the reports have shown.
        """
        row = self.coordinator.current
        purpose = self._of(row.number)
        if row.state is not State.OPEN or purpose is None:
            return
        lapsed = self._lapsed(row)
        if row.counted:
            facts = self.coordinator.facts(now)
            lapsed = [session for session in lapsed if now < lets_go_at(session, facts)]
        expected = row.given - row.dropped + self._waiting() + len(lapsed)
        awaited = not self._full and (not expected or now - self._latest < self._linger)
        cohort = min(
            self.most_together, max(1, expected, self._most() if awaited else 0)
        )  # more would be refused above
        deadline = None if purpose.ends is None else max(1e-3, purpose.ends - row.since)
        if row.given and not expected and not awaited:  # all have ended without a report, and nobody comes any more
            deadline = 1e-3
        self._open_pacing = replace(self._open_pacing, cohort=cohort, deadline=deadline)

    def _lapsed(self, row: Round) -> list[Session]:
        """Sessions of a round that have lost their places, and may still report."""
        if not row.dropped:
            return []
        with self.store.transaction() as rows:
            awaited = [session for session in map(rows.session, rows.sessions_out()) if session is not None]
        return [session for session in awaited if session.state == "lapsed" and session.round == row.number]

    def _most(self) -> int:
        """Devices that may come into the round that is open."""
        return min(self.most_together, self.crowd.population or MOST)

    def _note(self, number: int, work: Assignment, now: float) -> None:
        """Write down what a round of ours is for, and when it ends."""
        sent = None if work.expires_in_s is None else now + work.expires_in_s * (1 - MARGIN)
        before = self._of(number - 1)
        with self.store.transaction() as rows:
            if before is not None and _same(before.work, work):  # both sums go into one of the server above
                keep_departed(rows, number - 1, number)
            purpose = Purpose(work, share_of(sent, self.served.rounds, now), sent)
            rows.put_note(number, "work", msgspec.json.encode(purpose))
            row = rows.round(number)
            assert row is not None, "work is of the round that is open"
            rows.put_round(changed(row, since=now))  # what is a share of the round's time begins with its work
        self._purpose = None
        self._keep(work.plan.sha256, work.broadcast.sha256)

    def _of(self, number: int) -> Purpose | None:
        """What a round is for; None where it has no work yet."""
        if self._purpose is None or self._purpose[0] != number:
            with self.store.transaction() as rows:
                note = rows.note(number, "work")
            if note is None:
                return None
            self._purpose = number, msgspec.json.decode(note, type=Purpose)
        return self._purpose[1]


def share_of(until: float | None, rounds: int, now: float) -> float | None:
    """When the first of so many rounds must be over, that share the time from now."""
    return None if until is None else now + max(0.0, until - now) / rounds


def _same(one: Assignment, other: Assignment) -> bool:
    """Whether two are of one round of the server's above."""
    return msgspec.structs.replace(one, session=other.session, expires_in_s=other.expires_in_s) == other
