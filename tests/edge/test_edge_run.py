"""Random days at an edge and at a site: every session that comes down ends exactly once, whatever happens.

The edge's run is real, on rows in memory. The server above is a few lines here: it gives sessions, hears which have ended, and
counts sums as a real server would: not if one of their sessions has ended or was given up for a newer check-in.
"""

import random
from collections import Counter
from pathlib import Path

import pytest

from sumus.edge.edge_run import EdgeRun
from sumus.edge.relay import Relay
from sumus.edge.site_model import SiteModel
from sumus.protocol.edge import SumCounted
from sumus.protocol.round import AssignWork, CheckIn, ComeLater, State
from sumus.rounds.circumstances import Crowd
from sumus.rounds.run import DeviceCheckIn, cancel_newest
from sumus.rounds.stages import ClearReport
from sumus.spec import canonical_json, to_json
from sumus.storage.blobs import MemoryBlobs
from sumus.storage.keyring import KeyRing
from sumus.storage.memory import MemoryStore
from sumus.tree import unnested
from sumus.wire.messages import Assignment, Body, CheckInAnswer, CheckInRequest, Served
from sumus.wire.reports import decode_sum
from sumus.wire.tensors import encode_tree
from tests.server.devices import tiny, update_of

DEVICES = [f"{number:064x}" for number in range(6)]
LINGER, LASTS = 20.0, 600.0


class World:
    """An edge with six devices, and what the server above knows.

    Attributes:
        above: What became of each session that came down: "out", "superseded", "ended", "counted", "refused", "forgotten".
        told: How often the server above was told that a session has ended.
        now: The clock.
        lasts: Seconds that the server above gives for work.
    """

    def __init__(self, seed: int, rounds: int, keys: Path) -> None:
        self.dice = random.Random(seed)
        self.bundle = tiny(cohort=4, rounds=rounds, least=2)
        self.plan = self.bundle.plan
        self.above: dict[str, str] = {}
        self.told: Counter[str] = Counter()
        self.now, self.fence, self.lasts = 1000.0, 0, LASTS
        self._store, self._blobs, self._sums, self._ring = MemoryStore(), MemoryBlobs(), MemoryBlobs(), KeyRing(keys)
        self._version, self._counted = 0, set[str]()
        self._requests: dict[str, CheckInRequest] = {}
        self._serials = Counter[str]()
        self._out: dict[str, str] = {}
        self._rounds, self._sum_of = rounds, dict[str, int]()
        start = self.plan.algorithm.start(self.bundle.model, self.plan.description).broadcast
        self._body, self._plan_body = self._put(encode_tree(unnested(start))), self._put(self.plan.to_json().encode())
        self.start()

    def _put(self, body: bytes) -> Body:
        return Body(self._blobs.put(body), len(body))

    # ── the edge ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Begin a process of the edge on the same rows."""
        plan = self.plan
        hop = canonical_json(to_json(plan.first_hop))
        fingerprint = plan.description.fingerprint
        served = Served("tiny", "train", fingerprint, False, self._plan_body, hop, 2, 4, None, self._rounds)
        crowd = Crowd(lambda: len(DEVICES))
        crowd.count()
        self.relay = Relay(lambda: None, self)
        model = SiteModel(served, self._store, self._blobs) if self._rounds > 1 else None
        looks = lambda: None  # noqa: E731
        self.run = EdgeRun(served, self.relay, self._store, self._ring, self._sums, crowd, looks, LINGER, model)
        self.fence += 1
        self.run.recover(self.now, self.fence)
        self.run.tick(self.now)

    def holds(self, device: str) -> bool:
        return self.run.holds(device)

    def forget_work(self, device: str, now: float) -> None:
        self.run.forget_work(device, now)

    def crash(self) -> None:
        """What is in memory is gone: work that was not fetched, newer check-ins, and what was to be said."""
        for device, granted in self.relay.granted.items():
            self._forget(f"{device}/{granted.work.session}")
        for _, _, session in self.relay.ended:
            self._forget(session)
        for session in self.above:
            if session.partition("/")[0] in self.relay.asking:
                self._forget(session)
        self._requests.clear()
        self.start()

    def _forget(self, session: str) -> None:
        if self.above.get(session) in ("out", "refused"):
            self.above[session] = "forgotten"

    # ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, anew: bool = False) -> None:
        """A device checks in: with the check-in that it is held with, or a new one."""
        device = self.dice.choice(DEVICES)
        if device in self._out and not anew:
            return
        request = self._requests.get(device)
        if request is None or anew:
            self._serials[device] += 1
            serial = self._serials[device]
            request = self._requests[device] = CheckInRequest(
                serial, f"s{serial}", (self.plan.description.fingerprint,)
            )
        if (later := self.run.admits(DeviceCheckIn(device, request), self.now)) is not None:
            if later.reason == "replayed":
                del self._requests[device]  # the next check-in has another serial
            return
        event = CheckIn(f"{device}/{request.session}", request.serial)
        actions = self.run.coordinator.check_in(device, event, self.now)
        for action in actions:
            if isinstance(action, AssignWork):
                assert self.run.offer(action.session, self.now).session == action.session.id.partition("/")[2]
                self._out[device] = action.session.id
                self._requests.pop(device, None)
            elif isinstance(action, ComeLater):
                self._requests.pop(device, None)
        self.run.carry_out(actions, self.now)

    def report(self) -> None:
        """A device reports, and the report is committed."""
        if self._out:
            device = self.dice.choice(sorted(self._out))
            session = self._out.pop(device)
            checked = self.run.hop.check(update_of(self.plan, session))
            self.run.intake.stage_all([ClearReport(session, checked)], self.now)
            self.run.carry_out(self.run.intake.commit(self.now), self.now)

    def drop(self) -> None:
        """A device gives up."""
        if self._out:
            session = self._out.pop(self.dice.choice(sorted(self._out)))
            self.run.dropped([session], "data", self.now)
            self.run.carry_out(self.run.coordinator.drop([session], "data", self.now), self.now)

    def keep_out(self) -> None:
        """A device that asks turns out to be one that was counted above under another key."""
        device = self.dice.choice(DEVICES)
        if (request := self._requests.pop(device, None)) is not None:
            self.run.turned_away(DeviceCheckIn(device, request), self.now)

    # ── the server above ─────────────────────────────────────────────────────────────────────────────────────────────

    def pass_on(self, gives: float = 0.8) -> None:
        """The uplink passes on what waits, and brings the answers. gives: how likely a device is given work."""
        batch = self.relay.batch()
        for _, _, session in batch.ended:
            self.told[session] += 1
            assert session in self.above, "a session that the server above has never given"
            if self.above[session] != "superseded":
                assert self.above[session] != "counted"
                self.above[session] = "ended"
        given = {device: self._given(device, asked.request, gives) for device, asked in batch.asked.items()}
        self.relay.going_up.clear()
        for device, asked in batch.asked.items():
            if (work := given[device]) is not None:
                self.run.give(device, asked.request, work, self.now)
            else:
                known = f"{device}/{asked.request.session}" in self.above
                reason = "replayed" if known else self.dice.choice(["full", "closed", "separation"])
                answer = CheckInAnswer(retry_after_s=(1.0, 2.0), reason=reason)
                self.relay.send_away(device, asked.request, answer, self.now)
                self.run.no_work(reason, self.now)

    def _given(self, device: str, request: CheckInRequest, gives: float) -> Assignment | None:
        session = f"{device}/{request.session}"
        again = self.above.get(session)
        for other, state in self.above.items():
            if other.startswith(device) and other != session and state == "out":
                self.above[other] = "superseded"
        if again not in (None, "out") or (again is None and (device in self._counted or self.dice.random() > gives)):
            return None
        if again is None:
            self.above[session], self._sum_of[session] = "out", self._version
        seed = f"{self._version:064x}"
        return Assignment(
            "tiny", "train", request.session, self._version, self._plan_body, self._body, seed, 2, self.lasts
        )

    def begin_another_sum(self) -> None:
        """The round of the server above is over."""
        self._version += 1
        self._counted.clear()

    def answer(self, refuses: float = 0.2) -> None:
        """The sums that wait are sent, and answered."""
        for number, ready in list(self.run.sums_to_send.items()):
            least = 2 if self._rounds > 1 else None
            sessions, _ = decode_sum(ready.body, "edge", self.plan.first_hop, 4, least)
            assert len(sessions) == ready.sessions
            for session in sessions:
                assert self.above[session] == "out", f"the server above would refuse the sum: {self.above[session]}"
            old = any(self._sum_of[session] != self._version for session in sessions)
            if old or self.dice.random() < refuses:
                self.above |= dict.fromkeys(sessions, "refused")
                self.run.refused(number, "it is over", self.now)
            else:
                self.above |= dict.fromkeys(sessions, "counted")
                self._counted |= {session.partition("/")[0] for session in sessions}
                self.run.delivered(number, self.now)

    def wait(self, seconds: float) -> None:
        """Time goes by."""
        self.now += seconds
        self.run.tick(self.now)
        self._out = {device: session for device, session in self._out.items() if self._is_out(session)}

    def _is_out(self, session: str) -> bool:
        row = self.run.coordinator.session(session)
        return row is not None and row.awaited

    def step(self) -> None:
        """Something happens."""
        happens = [
            (60, self.ask), (25, self.pass_on), (25, self.report), (4, self.drop), (0.7, self.keep_out),
            (8, self.answer), (12, lambda: self.wait(self.dice.choice([0.5, 3.0, 25.0]))),
            (0.5, lambda: self.wait(100.0)), (0.5, self.begin_another_sum), (0.7, self.crash),
            (1.5, lambda: self.ask(anew=True)), (0.3, lambda: cancel_newest(self.run, self.now)),
        ]  # fmt: skip
        self.dice.choices([do for _, do in happens], [weight for weight, _ in happens])[0]()

    def come_to_rest(self) -> None:
        """Nobody asks any more, time goes by, and everything that waits goes up."""
        self._requests.clear()
        for _ in range(40):
            self.wait(30.0)
            self.answer(refuses=0.0)
            self.pass_on(gives=0.0)


def day(seed: int, rounds: int, keys: Path) -> World:
    """A random day, after which everything comes to rest."""
    world = World(seed, rounds, keys)
    for _ in range(400):
        world.step()
    world.come_to_rest()
    return world


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("seed", range(12))
def test_every_session_that_comes_down_ends_exactly_once(seed: int, rounds: int, tmp_path: Path) -> None:
    world = day(seed, rounds, tmp_path / "keys")
    assert [session for session, state in world.above.items() if state in ("out", "refused")] == []
    assert [session for session, times in world.told.items() if times > 1] == []
    assert world.run.coordinator.current.state in (State.PLANNED, State.OPEN), "and the edge waits for work again"
    assert not world.run.coordinator.illegal


@pytest.mark.parametrize("rounds", [1, 3])
def test_control_on_these_days_all_of_it_happens(rounds: int, tmp_path: Path) -> None:
    happened = Counter[str]()
    for seed in range(4):
        happened.update(day(seed, rounds, tmp_path / f"{seed}").above.values())
    assert set(happened) == {"superseded", "ended", "counted", "forgotten"}


# ── days that went wrong once ────────────────────────────────────────────────────────────────────────────────────────


def given(world: World, *numbers: int) -> list[str]:
    """Let these devices ask until work has come down for them; return their sessions."""
    for number in numbers:
        device, serial = DEVICES[number], 1
        request = CheckInRequest(serial, "s1", (world.plan.description.fingerprint,))
        assert world.run.admits(DeviceCheckIn(device, request), world.now) is not None
        world._requests[device] = request  # pyright: ignore[reportPrivateUsage]
    world.pass_on(gives=1.0)
    return [f"{DEVICES[number]}/s1" for number in numbers]


def fetched(world: World, session: str) -> None:
    """Let a device fetch its work."""
    device = session.partition("/")[0]
    request = world._requests[device]  # pyright: ignore[reportPrivateUsage]
    assert world.run.admits(DeviceCheckIn(device, request), world.now) is None
    actions = world.run.coordinator.check_in(device, CheckIn(session, request.serial), world.now)
    assert [type(action) for action in actions] == [AssignWork]
    world._out[device] = session  # pyright: ignore[reportPrivateUsage]
    world.run.offer(actions[0].session, world.now)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


def test_work_that_no_device_has_fetched_does_not_outlive_its_round(tmp_path: Path) -> None:
    world = World(0, 1, tmp_path / "keys")
    world.lasts = 50.0
    first, second = given(world, 0, 1)
    fetched(world, first)
    world.report()
    world.wait(45.0)  # the round's time is over, and the second device has not come
    assert second not in {f"{device}/{work.work.session}" for device, work in world.relay.granted.items()}
    world.pass_on()
    assert (world.above[second], len(world.run.sums_to_send)) == ("ended", 1)


def test_a_session_whose_time_is_over_is_said_to_have_ended(tmp_path: Path) -> None:
    world = World(0, 1, tmp_path / "keys")
    (session,) = given(world, 0)
    fetched(world, session)
    world.wait(LASTS / 2)
    row = world.run.coordinator.session(session)
    assert row is not None
    assert row.state == "lapsed", "it has lost its place, and may still report"
    world.wait(LASTS)
    world.pass_on()
    assert world.above[session] == "ended"


def test_a_session_that_has_ended_does_not_end_again_when_its_device_gives_up(tmp_path: Path) -> None:
    world = World(0, 1, tmp_path / "keys")
    (session,) = given(world, 0)
    fetched(world, session)
    cancel_newest(world.run, world.now)
    world.pass_on()
    world.drop()
    world.pass_on()
    assert (world.above[session], world.told[session]) == ("ended", 1)


def test_a_sum_of_a_round_that_is_cancelled_here_does_not_go_up(tmp_path: Path) -> None:
    world = World(0, 1, tmp_path / "keys")
    (session,) = given(world, 0)
    fetched(world, session)
    world.report()
    world.wait(LINGER)
    (ready,) = world.run.sums_to_send.values()
    cancel_newest(world.run, world.now)
    assert world.run.sums_to_send == {}
    world.run.delivered(ready.number, world.now)  # it was on its way
    world.pass_on()
    assert world.above[session] == "ended"
    (row,) = [world.run.coordinator.round(ready.number)]
    assert row is not None
    assert row.state is State.ABANDONED


def test_a_site_that_was_killed_while_its_rounds_were_being_ended_begins_again(tmp_path: Path) -> None:
    world = World(0, 3, tmp_path / "keys")
    held = given(world, 0, 1)
    for session in held:
        fetched(world, session)
    world.report()
    world.report()
    world.wait(LINGER)
    world.wait(0.5)
    own = world.run.coordinator.current
    device = held[0].partition("/")[0]
    actions = world.run.coordinator.check_in(device, CheckIn(f"{device}/s2", 2), world.now)
    assert [type(action) for action in actions] == [AssignWork], "an own round has begun"
    world.run.all_ends(world.now)  # the note is gone, and the process dies before the round is cancelled
    world.start()
    row = world.run.coordinator.round(own.number)
    assert row is not None
    assert row.state is State.ABANDONED
    assert world.run.waits_for(world.run.coordinator.current) in ("no work has arrived from the server above yet", "")


@pytest.mark.parametrize("rounds", [1, 3])
def test_an_event_that_the_table_does_not_allow_is_counted(rounds: int, tmp_path: Path) -> None:
    """And nothing else happens. `/metrics` shows the count beside those of the round table."""
    run = World(0, rounds, tmp_path / "keys").run
    assert run._rounds.decide(SumCounted(), 1000.0) == ()  # pyright: ignore[reportPrivateUsage]
    assert run.coordinator.illegal == {("edge:waiting", "SumCounted"): 1}
