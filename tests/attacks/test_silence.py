"""Silence: a device takes a place in a round and says nothing, or gives the place up, again and again.

Before, one silent device held a round of ten of ten until its deadline, and a place that was given up was lost to the round: who
took places and gave them up at once used up a round. Each attack stands beside a control in which honest devices pass.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sumus
from sumus.aggregate import Update
from sumus.evaluation import evaluation_report
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import open_service
from sumus.operations.stores import Storage
from sumus.pacing import Pacing
from sumus.protocol.round import Action, AssignWork, CheckIn, CloseRound
from sumus.rng import generator
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.run import Run
from sumus.server.evaluation import Evaluating
from sumus.simulator.virtual_time.fleet_model import RoundDemand
from sumus.simulator.virtual_time.timeline import Timeline
from sumus.transport.inprocess import InProcess
from sumus.wire.bundle import Bundle
from sumus.wire.messages import Assignment, Refused
from sumus.wire.reports import encode_report
from tests.edge.test_adder import Cut, Tree, wait_until
from tests.edge.test_adder import devices as devices_of
from tests.server.devices import ScriptedDevice, path_of, tiny, together, update_of

DEADLINE = 3600.0
LIMIT = 61.0
"""Seconds after which a place is let go, once reports have shown that the work takes no time; and one for what is rounded."""
UNKNOWN = DEADLINE / 4 + 1
"""And before any has."""


class Served:
    """A server of ten of ten, whose clock goes on when it is told to."""

    def __init__(self, bundle: Bundle, where: Storage, stack: ExitStack, **policy: Any) -> None:
        self.bundle, self.plan, self._where, self._stack, self._conduct = bundle, bundle.plan, where, stack, policy
        self.open()

    def open(self) -> None:
        """Start, also once more."""
        self.service = open_service({"tiny": self.bundle}, self._where, ServerPolicy(group=0.0, **self._conduct))
        self.server = self.service.server
        self.server.start()
        self.transport = InProcess(self.service.device_app)
        self._stack.callback(self.close)

    def close(self) -> None:
        """End."""
        self.transport.close()
        self.service.close()

    @property
    def runs(self) -> list[Run]:
        return list(self.server.tasks[0].runs)

    def people(self, count: int, first: int = 0) -> list[ScriptedDevice]:
        """So many devices, enrolled."""
        found = [ScriptedDevice(self.transport, first + number) for number in range(count)]
        for device in found:
            device.enrol(self.server.roll.new_token("default", self.server.clock()))
        return found

    def wait(self, seconds: float) -> None:
        """Let time go by, and what is due be done."""
        let_go_by(self.server, seconds)

    def report(self, device: ScriptedDevice, work: Assignment | None, value: float = 1.0) -> str:
        """What becomes of a report."""
        assert work is not None
        (answer,) = together(lambda: device.report(work, update_of(self.plan, device.id, value)))
        return answer if isinstance(answer, str) else answer.status

    def contributors(self) -> list[int]:
        """Of each model, the first apart."""
        self.server.ask_to_do(lambda now: None).result()
        with self.server.tasks[0].training.store.transaction() as rows:
            return [model.contributors for model in rows.models()][1:]


def let_go_by(server: Any, seconds: float) -> None:
    clock = server.clock
    server.clock = lambda: clock() + seconds
    for task in server.tasks:
        for run in task.runs:
            server.ask_to_do(run.tick).result()


Serve = Callable[..., Served]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is begun here ends with the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(tmp_path: Path, stack: ExitStack) -> Serve:
    """Starts a server of ten of ten, at which two contributors are enough."""

    def started(cohort: int = 10, least: int = 2, policy: Any = None, **pacing: Any) -> Served:
        bundle = tiny(cohort, least=least, **{"deadline": DEADLINE, **pacing})
        return Served(bundle, Storage(tmp_path / "data"), stack, **(policy or {}))

    return started


def ten_are_given(served: Served) -> tuple[list[ScriptedDevice], list[Assignment | None], ScriptedDevice]:
    """Ten of eleven devices have work, and the eleventh has none."""
    *ten, spare = served.people(11)
    works = [device.work(served.plan) for device in ten]
    assert all(works)
    assert spare.check_in(served.plan).reason == "full"
    return ten, works, spare


# ── who says nothing ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_silent_device_costs_a_round_of_ten_of_ten_the_limit_of_its_session(serve: Serve) -> None:
    served = serve()
    ten, works, spare = ten_are_given(served)
    assert [served.report(*each) for each in zip(ten[1:], works[1:], strict=True)] == ["counted"] * 9
    served.wait(LIMIT)
    assert served.report(spare, spare.work(served.plan)) == "counted"
    assert served.contributors() == [10]


def test_control_ten_honest_devices_need_no_eleventh(serve: Serve) -> None:
    served = serve()
    ten, works, spare = ten_are_given(served)
    served.wait(LIMIT - 2)
    assert spare.check_in(served.plan).assignment is None, "nobody's place is given away before its time"
    assert [served.report(*each) for each in zip(ten, works, strict=True)] == ["counted"] * 10
    assert served.contributors() == [10]


def test_a_round_whose_places_all_fell_to_silent_devices_goes_to_others(serve: Serve) -> None:
    served = serve()
    silent, honest = served.people(10), served.people(10, first=10)
    assert all(device.work(served.plan) for device in silent)
    served.wait(UNKNOWN)
    works = [device.work(served.plan) for device in honest]
    assert [served.report(*each) for each in zip(honest, works, strict=True)] == ["counted"] * 10
    assert served.contributors() == [10]


def rounds_with(silent: int, honest: int = 30, rounds: int = 40) -> tuple[list[float], Counter[str]]:
    """How long rounds of ten of ten last, and how often each silent key was given a place. Silent keys ask every ten seconds,
    before everybody else; honest devices take twenty seconds for their work."""
    pacing, now, ended = Pacing(10, deadline=DEADLINE), 0.0, list[float]()
    server = Coordinator(lambda: Circumstances(pacing, population=silent + honest))
    given, serials, reports = Counter[str](), Counter[str](), dict[str, float]()
    names = [*(f"silent {number}" for number in range(silent)), *(f"honest {number}" for number in range(honest))]

    def carry_out(actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, CloseRound):
                ended.append(now)
                server.publish(action.number, now)

    server.tick(now)
    while len(ended) < rounds and now < 2 * rounds * DEADLINE:
        for name in names:
            serials[name] += 1
            if f"{name}/{serials[name] - 1}" in reports:
                serials[name] -= 1
                continue
            for action in server.check_in(name, CheckIn(f"{name}/{serials[name]}", serials[name]), now):
                if isinstance(action, AssignWork) and name.startswith("silent"):
                    given[name] += action.session.began == now  # else it is the place that it has
                elif isinstance(action, AssignWork):
                    reports[action.session.id] = now + 20.0
        now += 10.0
        for session in [session for session, when in reports.items() if when <= now]:
            del reports[session]
            server.report(session, now)
        for decided in (server.commit(now), server.expire(now), server.tick(now)):
            carry_out(decided)
        server.tick(now)
    return [end - begin for begin, end in pairwise([0.0, *ended])], given


def test_a_party_with_many_silent_keys_holds_ever_fewer_places_and_rounds_go_on() -> None:
    lasted, given = rounds_with(silent=15)
    assert len(lasted) == 40
    assert max(lasted) < DEADLINE
    assert sum(lasted[10:]) / 30 < 3 * sum(rounds_with(silent=0)[0]) / 40, "after a while they cost next to nothing"
    most = 1 + math.log2(1 + sum(lasted) / 60.0)  # each rest is twice as long as the one before
    assert max(given.values()) <= most


def test_who_forgets_its_work_again_and_again_holds_its_place_no_longer(serve: Serve) -> None:
    served = serve()
    ten, works, spare = ten_are_given(served)
    for each in zip(ten[1:], works[1:], strict=True):
        served.report(*each)
    for _ in range(4):
        served.wait(LIMIT / 4)
        ten[0].work(served.plan)
    served.wait(1.0)
    assert served.report(spare, spare.work(served.plan)) == "counted"
    assert served.contributors() == [10]


def test_a_silent_device_frees_its_slot_in_a_buffer(serve: Serve) -> None:
    served = serve(cohort=2, concurrency=2)
    silent, honest, spare = served.people(3)
    assert silent.work(served.plan) is not None
    assert served.report(honest, honest.work(served.plan)) == "counted"
    assert spare.work(served.plan) is not None
    assert honest.check_in(served.plan).assignment is None
    served.wait(LIMIT)
    other = served.people(1, first=3)[0]
    assert served.report(other, other.work(served.plan)) == "counted"
    assert served.contributors() == [2]


def test_a_silent_device_does_not_stop_a_measurement(serve: Serve) -> None:
    served = serve(cohort=3, policy={"evaluate": Evaluating(3, deadline=DEADLINE)})
    *three, spare = served.people(4)

    def measure(device: ScriptedDevice) -> Assignment | None:
        return device.check_in(served.plan, kinds=("evaluate",)).assignment

    works = [measure(device) for device in three]
    assert all(works)

    def send(device: ScriptedDevice, work: Assignment | None) -> None:
        assert work is not None
        body = encode_report(evaluation_report(device.id, {"loss": (1.0, 10)}, 10))
        together(lambda: device.request("PUT", path_of(work), body))

    for each in zip(three[1:], works[1:], strict=True):
        send(*each)
    served.wait(LIMIT)
    send(spare, measure(spare))
    assert served.contributors() == []
    (evaluation,) = (run for run in served.runs if run.kind == "evaluate")
    with evaluation.store.transaction() as rows:
        assert rows.run().version == 1


# ── who gives a place up ─────────────────────────────────────────────────────────────────────────────────────────────


def test_who_takes_places_and_gives_them_up_at_once_uses_up_no_round(serve: Serve) -> None:
    served = serve()
    attacker, *honest = served.people(11)
    works = list[Assignment | None]()
    for device in honest:
        if (taken := attacker.work(served.plan)) is not None:
            attacker.abort(taken)
        works.append(device.work(served.plan))
    assert all(works), "each place that is given up is the next device's"
    assert [served.report(*each) for each in zip(honest, works, strict=True)] == ["counted"] * 10
    assert served.contributors() == [10]


def spoilt(plan: Any, device: ScriptedDevice) -> Update:
    """An update that no server counts."""
    good = update_of(plan, device.id)
    return replace(good, parts={"params": {"w": np.full(4, np.nan, np.float32)}})


def aborts(served: Served, device: ScriptedDevice, work: Assignment) -> None:
    device.abort(work)


def leaves(served: Served, device: ScriptedDevice, work: Assignment) -> None:
    device.withdraw()


def is_shut_out(served: Served, device: ScriptedDevice, work: Assignment) -> None:
    served.server.ask_to_do(lambda now: served.server.forget(device.id, "", now, "revoked")).result()


def sends_nan(served: Served, device: ScriptedDevice, work: Assignment) -> None:
    with pytest.raises(Refused, match="not_finite"):
        device.report(work, spoilt(served.plan, device))


def sends_rubbish(served: Served, device: ScriptedDevice, work: Assignment) -> None:
    device.request("PUT", path_of(work), b"this is no report")


@pytest.mark.parametrize("gives_up", [aborts, leaves, is_shut_out, sends_nan, sends_rubbish])
def test_a_place_that_is_given_up_is_the_next_devices_and_costs_no_report(
    serve: Serve, gives_up: Callable[[Served, ScriptedDevice, Assignment], None]
) -> None:
    served = serve(least=10)  # with nine there is no model, and nine reports are lost
    ten, works, spare = ten_are_given(served)
    assert [served.report(*each) for each in zip(ten[1:], works[1:], strict=True)] == ["counted"] * 9
    assert works[0] is not None
    gives_up(served, ten[0], works[0])
    assert served.report(spare, spare.work(served.plan)) == "counted"
    assert served.contributors() == [10]


def test_who_gives_up_shortly_before_the_limit_rests_as_if_it_had_been_silent(serve: Serve) -> None:
    served = serve()
    ten, works, _ = ten_are_given(served)
    served.report(ten[1], works[1])
    served.wait(LIMIT - 5)
    assert works[0] is not None
    ten[0].abort(works[0])
    answer = ten[0].check_in(served.plan)
    assert (answer.assignment, answer.reason) == (None, "resting")
    assert answer.retry_after_s is not None
    assert 0.5 * LIMIT < answer.retry_after_s[0] <= LIMIT
    served.wait(LIMIT)
    assert ten[0].work(served.plan) is not None


# ── who is only slow ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_control_a_late_report_is_counted_while_there_is_room_and_clears_what_is_held_against_its_device(
    serve: Serve,
) -> None:
    served = serve()
    ten, works, spare = ten_are_given(served)
    for each in zip(ten[1:], works[1:], strict=True):
        served.report(*each)
    served.wait(LIMIT)
    given = spare.work(served.plan)
    assert ten[0].check_in(served.plan, previous=works[0]).settled.outcome == "unknown", "it may still be counted"  # pyright: ignore[reportOptionalMemberAccess]
    assert served.report(ten[0], works[0]) == "counted"
    assert served.contributors() == [10]
    assert served.report(spare, given) == "closed", "its round is full"
    assert served.report(ten[0], works[0]) == "counted", "the same answer again, and not a second count"
    assert served.contributors() == [10]
    assert ten[0].work(served.plan) is not None, "it does not rest"


def test_control_a_server_that_was_away_blames_nobody(serve: Serve) -> None:
    served = serve(least=10)
    ten, works, _ = ten_are_given(served)
    served.report(ten[1], works[1])
    served.close()
    served.open()
    clock = served.server.clock  # it was away for so long
    served.server.clock = lambda: clock() + LIMIT
    (run,) = served.runs
    served.server.ask_to_do(lambda now: run.recover(now, served.server.replica.fence)).result()
    served.wait(1.0)
    assert run.coordinator.current.out == 9
    for device, work in zip(ten[2:], works[2:], strict=True):
        device.transport = served.transport
        assert served.report(device, work) == "counted"


def shares(deadline: float | None, spread: float = 100.0, rounds: int = 120) -> np.ndarray:
    """How often each fifth of a fleet's devices is counted, from the fastest to the slowest; of all that is counted."""
    fleet = sumus.Fleet(seconds=60, spread=spread)
    drawn = fleet.devices(60, generator(5, "devices"))
    line = Timeline(Pacing(10, deadline=deadline), fleet, drawn, RoundDemand(), 5)
    times = np.zeros(60)
    for number in range(rounds):
        for each in line.ended(number).counted:
            times[each.position] += 1
    return times[np.argsort(drawn.seconds)].reshape(5, 12).sum(1) / times.sum()


def test_control_slow_devices_are_not_starved_by_a_limit_that_begins_too_tight() -> None:
    """Speeds are 1:100. Nobody is silent, so nobody's place should have been given away, once the limit has adapted."""
    assert shares(2400.0)[-1] > 0.75 * shares(None)[-1]


def test_silent_devices_of_a_simulated_fleet_cost_their_limits_and_not_the_deadline() -> None:
    def mean_seconds(**more: Any) -> float:
        fleet = sumus.Fleet(seconds=60, spread=2, **more)
        line = Timeline(
            Pacing(10, deadline=36_000.0), fleet, fleet.devices(100, generator(5, "devices")), RoundDemand(), 5
        )
        played = [line.ended(number) for number in range(60)]
        assert all(len(each.counted) == 10 for each in played)
        return played[-1].ended / 60

    assert mean_seconds(lost=0.05) < 10 * mean_seconds()


# ── behind edges ─────────────────────────────────────────────────────────────────────────────────────────────────────


def report(tree: Tree, device: ScriptedDevice, work: Assignment | None) -> None:
    """Send an update, whatever becomes of it."""
    assert work is not None
    together(partial(device.report, work, update_of(tree.bundle.plan, device.id)))


def four_of_five(stack: ExitStack) -> tuple[Tree, Any, Cut, list[ScriptedDevice], list[ScriptedDevice]]:
    """A round of four: two devices behind an edge, two beside it, and a third beside it for which there is no place."""
    tree = Tree(tiny(cohort=4, deadline=DEADLINE), stack)
    way = Cut(tree.top)
    edge = tree.edge(transport=way)
    below, beside = devices_of(edge, tree.below(edge), range(2)), devices_of(tree.service, tree.top, range(2, 6))
    return tree, edge, way, below, beside


def test_a_silent_device_behind_an_edge_costs_its_own_place_there_and_above(stack: ExitStack) -> None:
    tree, edge, _, below, beside = four_of_five(stack)
    plan = tree.bundle.plan
    works = together(*(partial(device.work, plan, wait_s=20.0) for device in below))
    given = [device.work(plan) for device in beside[:2]]
    for device, work in zip(beside, given, strict=False):
        report(tree, device, work)
    report(tree, below[0], works[0])
    assert beside[2].work(plan) is None
    let_go_by(edge.server, LIMIT)
    work = beside[2].work(plan, wait_s=20.0)
    report(tree, beside[2], work)
    tree.model(1)
    assert tree.service.server.tasks[0].training.model(1).contributors == 4
    assert edge.server.tasks[0].runs[0].trouble == ""


def test_a_silent_edge_costs_the_places_of_its_devices(stack: ExitStack) -> None:
    tree, _, way, below, beside = four_of_five(stack)
    plan = tree.bundle.plan
    together(*(partial(device.work, plan, wait_s=20.0) for device in below))
    way.cut = True
    for device in beside[:2]:
        report(tree, device, device.work(plan))
    assert beside[2].work(plan) is None
    let_go_by(tree.service.server, UNKNOWN)
    for device in beside[2:]:
        report(tree, device, device.work(plan))
    tree.model(1)
    assert tree.service.server.tasks[0].training.model(1).contributors == 4


def test_control_an_edge_whose_sum_comes_late_is_counted_while_there_is_room(stack: ExitStack) -> None:
    tree, edge, way, below, beside = four_of_five(stack)
    plan = tree.bundle.plan
    works = together(*(partial(device.work, plan, wait_s=20.0) for device in below))
    way.cut = True
    together(*(partial(d.report, w, update_of(plan, d.id)) for d, w in zip(below, works, strict=True)))
    for device in beside[:2]:
        report(tree, device, device.work(plan))
    let_go_by(tree.service.server, UNKNOWN)
    way.cut = False
    edge.uplink.wake()
    tree.model(1)
    assert tree.service.server.tasks[0].training.model(1).contributors == 4


def test_a_device_that_asks_for_other_work_and_then_reports_the_first_spoils_no_sum(stack: ExitStack) -> None:
    """To the server above, a device that asks anew has forgotten its work: a sum with a report of that would be refused whole."""
    tree = Tree(tiny(cohort=3, deadline=DEADLINE), stack)
    edge = tree.edge()
    attacker, *others = devices_of(edge, tree.below(edge), range(3))
    plan = tree.bundle.plan
    first, *works = together(*(partial(device.work, plan, wait_s=20.0) for device in (attacker, *others)))
    attacker.work(plan)  # the question goes up
    report(tree, attacker, first)
    for device, work in zip(others, works, strict=True):
        report(tree, device, work)
    report(tree, attacker, attacker.check_in(plan, wait_s=20.0, again=True).assignment)  # what it asked, now answered
    tree.model(1)
    assert tree.service.server.tasks[0].training.model(1).contributors == 3
    assert edge.server.tasks[0].runs[0].trouble == ""


def in_a_slow_fleet(
    stack: ExitStack, fast: int, slow: int
) -> tuple[Tree, Any, list[ScriptedDevice], list[Assignment | None]]:
    """Devices behind an edge have work. The fast ones have reported, and the others take longer than a place is held for."""
    tree = Tree(tiny(cohort=fast + slow, deadline=DEADLINE), stack)
    edge = tree.edge()
    people = devices_of(edge, tree.below(edge), range(fast + slow))
    works = together(*(partial(device.work, tree.bundle.plan, wait_s=20.0) for device in people))
    for device, work in list(zip(people, works, strict=True))[:fast]:
        report(tree, device, work)
    let_go_by(edge.server, UNKNOWN)
    return tree, edge, people, works


def test_control_a_slow_fleet_behind_an_edge_is_waited_for(stack: ExitStack) -> None:
    """All have lapsed at the edge, which does not know yet how long the work takes."""
    tree, edge, people, works = in_a_slow_fleet(stack, fast=0, slow=3)
    for device, work in zip(people, works, strict=True):
        report(tree, device, work)
    tree.model(1)
    assert tree.service.server.tasks[0].training.model(1).contributors == 3
    with edge.server.tasks[0].runs[0].store.transaction() as rows:
        assert rows.run().takes > 1.0, "now the edge knows"


def test_control_an_edge_learns_from_reports_that_come_too_late(stack: ExitStack) -> None:
    """It closes without a few that are slow, and once they report, it gives the next ones more time; each report teaches once."""
    tree, edge, people, works = in_a_slow_fleet(stack, 3, 1)
    run = edge.server.tasks[0].runs[0]
    wait_until(lambda: run.coordinator.round(0).state.value != "open", "it waits for one of four")

    def takes() -> float:
        with run.store.transaction() as rows:
            return rows.run().takes

    before = takes()
    for _ in range(3):
        with pytest.raises(Refused) as error:
            people[-1].report(works[-1], update_of(tree.bundle.plan, people[-1].id))
        assert error.value.problem.code == "closed"
    assert takes() == pytest.approx(1.35 * before)
    with run.store.transaction() as rows:
        late = rows.device(people[-1].id)
    assert late is not None
    assert (late.lapses, late.rests_until) == (0, 0.0), "it was slow and not silent, and does not rest"
