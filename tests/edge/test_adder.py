"""What devices report to an edge is one sum for the server above, and the model is the one that they had made without it."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sumus.aggregate import RunningSum
from sumus.device.link import Link
from sumus.device.requests import Requests
from sumus.edge.edge import Edge, open_edge
from sumus.http.limits import Limits, Rate
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.plan import Plan
from sumus.rounds.run import cancel_newest
from sumus.server.evaluation import Evaluating
from sumus.transport.inprocess import InProcess
from sumus.transport.transport import Answer, Unreachable
from sumus.tree import sha256
from sumus.wire.bundle import Bundle
from sumus.wire.messages import CheckInAnswer, Counted, EndedSession, Refused, RelayRequest
from sumus.wire.reports import encode_sum
from sumus.wire.tensors import decode_tree
from tests.server.devices import ScriptedDevice, tiny, together, update_of

PEOPLE = 8
PLENTY = 60.0
"""Seconds for which an edge may hold a check-in: the longest that there is."""
ENOUGH = 120.0
"""Seconds for what another thread does: as long as a loaded machine may take."""


class Tree:
    """A server, with edges below it."""

    def __init__(
        self, bundle: Bundle, stack: ExitStack, limits: Limits | None = None, evaluates: bool = False, *others: Bundle
    ) -> None:
        self.bundle, self._stack = bundle, stack
        policy = ServerPolicy(group=0.0, limits=limits, evaluate=Evaluating(2) if evaluates else None)
        served = {"tiny": bundle, **{other.plan.description.name: other for other in others}}
        self.service = open_service(served, Storage(), policy)
        stack.callback(self.service.close)
        self.service.server.start()
        self.top = stack.enter_context(InProcess(self.service.device_app))

    def edge(
        self, above: "Service | Edge | None" = None, transport: Any = None, linger: float = 30.0, **more: object
    ) -> Edge:
        """One more edge, below the server or another edge. linger: short only where a device does not come that could."""
        server = (above or self.service).server
        token = server.roll.new_token(server.population, server.clock(), speaks_for=100)
        edge = open_edge(
            Link("http://127.0.0.1:1", token),
            policy=ServerPolicy(group=0.0),
            transport=transport or self.top,  # pyright: ignore[reportArgumentType]
            linger=linger,
            **more,  # pyright: ignore[reportArgumentType]
        )
        edge.start()
        self._stack.callback(edge.close)
        return edge

    def below(self, edge: Edge) -> InProcess:
        """A way to an edge."""
        return self._stack.enter_context(InProcess(edge.device_app))

    def model(self, version: int) -> str:
        """Of the server, once it is there."""
        run = self.service.server.tasks[0].training
        deadline = time.monotonic() + ENOUGH
        while run.version < version:
            assert time.monotonic() < deadline, f"there are {run.version} models"
            time.sleep(0.01)
        return sha256(decode_tree(self.service.blobs.get(run.model(version).model)))


def devices(of: Service | Edge, transport: InProcess, numbers: range) -> list[ScriptedDevice]:
    token = of.server.roll.new_token("default", of.server.clock(), uses=len(numbers))
    found = [ScriptedDevice(transport, number) for number in numbers]
    for device in found:
        device.enrol(token)
    return found


def take_part(plan: Plan, people: list[tuple[int, ScriptedDevice]]) -> None:
    """One round: all ask, all report."""
    works = together(*(partial(device.work, plan, wait_s=PLENTY) for _, device in people))
    assert all(work is not None for work in works)
    together(
        *(
            partial(device.report, work, update_of(plan, number, 0.1 * (number + 1), 5 + number))
            for (number, device), work in zip(people, works, strict=True)
        )
    )


def flat(bundle: Bundle, rounds: int) -> str:
    with ExitStack() as stack:
        tree = Tree(bundle, stack)
        people = list(enumerate(devices(tree.service, tree.top, range(PEOPLE))))
        for _ in range(rounds):
            take_part(bundle.plan, people)
        return tree.model(rounds)


@pytest.mark.parametrize("shape", ["two edges", "an edge and devices", "two levels"])
def test_the_model_is_the_one_without_edges(stack: ExitStack, shape: str) -> None:
    bundle = tiny(cohort=PEOPLE)
    tree = Tree(bundle, stack)
    one = tree.edge()
    if shape == "two edges":
        other = tree.edge()
        people = devices(one, tree.below(one), range(5)) + devices(other, tree.below(other), range(5, PEOPLE))
    elif shape == "an edge and devices":
        people = devices(one, tree.below(one), range(5)) + devices(tree.service, tree.top, range(5, PEOPLE))
    else:
        below = tree.edge(one, tree.below(one))
        people = devices(one, tree.below(one), range(5)) + devices(below, tree.below(below), range(5, PEOPLE))
    for _ in range(2):
        take_part(bundle.plan, list(enumerate(people)))
    assert tree.model(2) == flat(bundle, 2)


# ── the way up is gone, or the edge was ──────────────────────────────────────────────────────────────────────────────


class Cut:
    """A transport that can be cut."""

    def __init__(self, inner: InProcess) -> None:
        self.inner, self.cut, self.requests = inner, False, list[tuple[str, str, bytes]]()
        self.loses_answers = False

    def request(self, method: str, path: str, body: bytes = b"", *more: Any) -> Answer:
        if self.cut:
            raise Unreachable("the line is cut")
        self.requests.append((method, path, body))  # before anybody sees what comes of it
        answer = self.inner.request(method, path, body, *more)
        if self.loses_answers and method == "PUT":
            raise Unreachable("the answer is lost")
        return answer

    def close(self) -> None:
        pass

    def sums(self) -> list[bytes]:
        """Bodies of sums that went up."""
        return [body for method, _, body in self.requests if method == "PUT"]


@pytest.fixture
def tree(stack: ExitStack) -> Tree:
    return Tree(tiny(cohort=3), stack)


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + ENOUGH
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def told(device: ScriptedDevice, *plans: Plan) -> CheckInAnswer:
    """What a device is told once the server above has answered its check-in. Until then the device repeats the same check-in:
    with another serial, the edge would keep the answer for the check-in before."""
    answer = device.check_in(*plans, wait_s=0.5)
    deadline = time.monotonic() + ENOUGH
    while answer.reason == "asking":
        assert time.monotonic() < deadline, "the server above does not answer"
        answer = device.check_in(*plans, wait_s=0.5, again=True)
    return answer


def test_while_the_server_above_is_away_reports_are_taken_and_go_up_once(stack: ExitStack, tree: Tree) -> None:
    way = Cut(tree.top)
    edge = tree.edge(transport=way)
    people = devices(edge, tree.below(edge), range(3))
    plan = tree.bundle.plan
    works = together(*(partial(device.work, plan, wait_s=PLENTY) for device in people))
    way.cut = True
    together(*(partial(d.report, w, update_of(plan, n)) for n, (d, w) in enumerate(zip(people, works, strict=True))))
    wait_until(lambda: edge.uplink.trouble != "", "it was not tried")
    assert (edge.above().trouble, edge.above().waiting) == ("the line is cut", 1)
    assert tree.service.server.tasks[0].training.version == 0
    way.cut = False
    edge.uplink.wake()
    assert tree.model(1)
    wait_until(lambda: (edge.above().waiting, edge.above().trouble) == (0, ""), "it is not known to be counted")
    assert (edge.uplink.sent, len(way.sums())) == (1, 1)


def test_a_sum_whose_answer_is_lost_is_counted_once(stack: ExitStack, tree: Tree) -> None:
    way = Cut(tree.top)
    way.loses_answers = True
    edge = tree.edge(transport=way)
    people = list(enumerate(devices(edge, tree.below(edge), range(3))))
    take_part(tree.bundle.plan, people)
    tree.model(1)
    wait_until(lambda: len(way.sums()) > 1, "it was not sent again")
    way.loses_answers = False
    take_part(tree.bundle.plan, people)
    tree.model(2)
    run = tree.service.server.tasks[0].training
    assert [run.model(version).contributors for version in (1, 2)] == [3, 3]
    assert len(set(way.sums())) == 2, "the same bytes again"


def test_an_edge_that_was_killed_sends_the_sum_that_it_had(stack: ExitStack, tree: Tree, tmp_path: Path) -> None:
    way, where = Cut(tree.top), Storage(tmp_path / "edge")
    edge = tree.edge(transport=way, storage=where)
    people = devices(edge, tree.below(edge), range(3))
    plan = tree.bundle.plan
    works = together(*(partial(device.work, plan, wait_s=PLENTY) for device in people))
    way.cut = True
    together(*(partial(d.report, w, update_of(plan, n)) for n, (d, w) in enumerate(zip(people, works, strict=True))))
    edge.close()
    again = open_edge(Link("http://127.0.0.1:1"), where, ServerPolicy(group=0.0), transport=tree.top, linger=0.3)
    stack.callback(again.close)
    again.start()
    assert tree.model(1)
    assert tree.service.server.tasks[0].training.model(1).contributors == 3
    people[0].transport = tree.below(again)
    assert people[0].report(works[0], update_of(plan, 0)).duplicate


def test_a_sum_that_comes_too_late_is_given_up_and_said_to_be(stack: ExitStack, tree: Tree) -> None:
    way = Cut(tree.top)
    edge = tree.edge(transport=way)
    people = devices(edge, tree.below(edge), range(3))
    plan = tree.bundle.plan
    works = together(*(partial(device.work, plan, wait_s=PLENTY) for device in people))
    way.cut = True
    together(*(partial(d.report, w, update_of(plan, n)) for n, (d, w) in enumerate(zip(people, works, strict=True))))
    run = tree.service.server.tasks[0].training
    tree.service.server.ask_to_do(
        lambda now: cancel_newest(run, now)
    ).result()  # the round is over, as after a deadline
    way.cut = False
    edge.uplink.wake()
    (mine,) = edge.server.tasks[0].runs
    wait_until(lambda: "was not counted by the server above" in mine.trouble, "nobody was told")
    edge.server.ask_to_do(lambda now: None).result()  # the deciding thread is through with what it said
    row = mine.coordinator.round(0)
    assert row is not None
    assert (row.state.value, row.counted) == ("abandoned", 3)
    take_part(plan, list(enumerate(people)))  # and the next round is as ever
    tree.model(1)


def test_a_device_that_moves_is_counted_once(stack: ExitStack, tree: Tree) -> None:
    way = Cut(tree.top)
    one, other = tree.edge(transport=way), tree.edge(linger=0.3)
    plan = tree.bundle.plan
    (mover,) = devices(one, tree.below(one), range(1))
    stayers = devices(other, tree.below(other), range(1, 3))
    work = mover.work(plan, wait_s=PLENTY)
    assert work is not None
    mover.transport = tree.below(other)
    mover.enrol(other.server.roll.new_token("default", other.server.clock()))
    answer = told(mover, plan)
    assert (answer.assignment, answer.reason) == (None, "parent"), "the other edge may have its report"
    works = together(*(partial(device.work, plan, wait_s=PLENTY) for device in stayers))
    together(*(partial(d.report, w, update_of(plan, 1)) for d, w in zip(stayers, works, strict=True)))
    mover.transport = tree.below(one)
    mover.report(work, update_of(plan, 0))
    tree.model(1)
    assert tree.service.server.tasks[0].training.model(1).contributors == 3
    mover.transport = tree.below(other)
    assert mover.work(plan, wait_s=PLENTY) is not None


@pytest.mark.parametrize("when", ["its sum is on its way", "its sum has gone up"])
def test_who_was_counted_and_left_its_edge_is_not_in_the_same_sum_above_under_a_new_key(
    stack: ExitStack, when: str
) -> None:
    tree = Tree(tiny(cohort=4), stack)
    way = Cut(tree.top)
    edge, plan = tree.edge(transport=way), tree.bundle.plan
    link = edge.server.roll.new_token("default", edge.server.clock(), uses=3)
    first, again = (ScriptedDevice(tree.below(edge), number) for number in (50, 51))
    others = devices(tree.service, tree.top, range(4))
    first.enrol(link)
    work = first.work(plan, wait_s=PLENTY)
    assert work is not None
    way.cut = when == "its sum is on its way"
    first.report(work, update_of(plan, 0))
    run = tree.service.server.tasks[0].training
    if not way.cut:
        wait_until(lambda: edge.uplink.sent == 1 and edge.above().waiting == 0, "it has not gone up")
    first.withdraw()
    way.cut = False
    edge.uplink.wake()
    wait_until(lambda: run.coordinator.current.counted == 1, "it is not counted")
    again.enrol(link)
    wait_until(lambda: told(again, plan).reason == "left", "it was not kept out")
    assert told(again, plan).assignment is None
    for device in others:
        if (given := device.work(plan, wait_s=PLENTY)) is not None:  # the place that came back is free a little later
            device.report(given, update_of(plan, 1))
    tree.model(1)
    with run.store.transaction() as rows:
        counted = [session.partition("/")[0] for session in rows.counted_in(0)]
    assert first.id in counted
    assert again.id not in counted
    assert again.work(plan, wait_s=60.0) is not None, "control: the next sum above takes it"


def test_a_device_whose_work_came_down_too_late_asks_anew_and_is_given_work(tree: Tree) -> None:
    edge, plan = tree.edge(), tree.bundle.plan
    device, *_ = devices(edge, tree.below(edge), range(3))
    assert device.work(plan) is None, "it does not wait for the server above"
    (run,) = [run for run in edge.server.tasks[0].runs if run.kind == "train"]
    wait_until(lambda: device.id in run._relay.granted, "no work came down")  # pyright: ignore
    assert device.work(plan, wait_s=60.0) is not None, "its next check-in is another one"


# ── several runs ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("beside", ["evaluation", "another task"])
def test_who_is_in_a_sum_that_has_not_gone_up_gets_no_other_work_by_way_of_this_edge(
    stack: ExitStack, beside: str, rounds: int
) -> None:
    """To the server above it would have forgotten what it did, and the sum would be refused for it."""
    bundle, other = tiny(cohort=3, rounds=rounds), tiny(cohort=3, rounds=rounds, name="other", lr=0.5)
    others = [other] if beside == "another task" else []
    tree = Tree(bundle, stack, None, beside == "evaluation", *others)
    edge = tree.edge(linger=0.3)
    plans = [each.plan for each in (bundle, *others)]
    runs = [run for task in edge.server.tasks for run in task.runs]
    top = [task.training for task in tree.service.server.tasks]
    over = time.monotonic() + ENOUGH

    def live(device: ScriptedDevice) -> None:
        """It asks, and does what it is given; it measures nothing."""
        while all(run.version < 4 for run in top) and not any(run.trouble for run in runs):
            assert time.monotonic() < over, [run.version for run in top]
            with suppress(Refused):  # it came too late for the round
                work = told(device, *plans).assignment
                if work is not None and work.kind == "train":
                    plan = next(plan for plan in plans if plan.description.name == work.task)
                    device.report(work, update_of(plan, device.id))
                elif work is not None:
                    device.abort(work)

    together(*(partial(live, device) for device in devices(edge, tree.below(edge), range(3))))
    assert [run.trouble for run in runs] == [""] * len(runs)
    assert any(run.version >= 4 for run in top)


# ── a day without a way up ───────────────────────────────────────────────────────────────────────────────────────────

HOUR, DAY = 3600.0, 86400.0


def let_a_day_go_by(*of: Service | Edge) -> None:
    """Their clocks go on by a day, an hour at a time, and what is due is done."""
    for _ in range(24):
        for each in of:
            clock = each.server.clock
            each.server.clock = lambda clock=clock: clock() + HOUR
            for task in each.server.tasks:
                for run in task.runs:
                    each.server.ask_to_do(run.tick).result()
            if isinstance(each, Edge):
                each.uplink.wake()


def cut_off_for_a_day(tree: Tree, meanwhile: Callable[[], object] = lambda: None) -> tuple[Edge, Cut]:
    """An edge whose two devices report while it has no way up, and which then has one again."""
    way = Cut(tree.top)
    edge, plan = tree.edge(transport=way), tree.bundle.plan
    people = devices(edge, tree.below(edge), range(10, 12))
    works = together(*(partial(device.work, plan, wait_s=PLENTY) for device in people))
    way.cut = True
    together(*(partial(d.report, w, update_of(plan, n)) for n, (d, w) in enumerate(zip(people, works, strict=True))))
    meanwhile()
    wait_until(lambda: edge.uplink.trouble == "the line is cut", "it was not tried")
    let_a_day_go_by(tree.service, edge)
    assert people[0].check_in(plan).assignment is None, "there is no work that it could give"
    way.cut = False
    edge.uplink.wake()
    return edge, way


def test_who_was_cut_off_for_a_day_delivers_once_where_the_round_still_goes_on(stack: ExitStack) -> None:
    tree = Tree(tiny(cohort=2, deadline=3 * DAY), stack)
    edge, way = cut_off_for_a_day(tree)
    tree.model(1)
    wait_until(lambda: (edge.uplink.waiting, edge.uplink.trouble) == (0, ""), "it is not known to be counted")
    assert (edge.uplink.sent, len(way.sums())) == (1, 1)
    assert tree.service.server.tasks[0].training.model(1).contributors == 2


def test_who_was_cut_off_for_a_day_is_told_so_where_the_round_is_over(stack: ExitStack) -> None:
    tree = Tree(tiny(cohort=2, deadline=HOUR), stack)
    edge, _ = cut_off_for_a_day(tree)
    (mine,) = edge.server.tasks[0].runs
    wait_until(lambda: "was not counted by the server above" in mine.trouble, "nobody was told")
    assert tree.service.server.tasks[0].training.version == 0
    take_part(tree.bundle.plan, list(enumerate(devices(edge, tree.below(edge), range(2)))))
    tree.model(1)


@pytest.mark.parametrize("most_stale", [None, 1])
def test_a_buffer_counts_what_was_cut_off_for_a_day_as_stale_as_it_is_or_says_that_it_is_stale(
    stack: ExitStack, most_stale: int | None
) -> None:
    tree = Tree(tiny(cohort=2, concurrency=6, most_stale=most_stale, deadline=3 * DAY), stack)
    others = list(enumerate(devices(tree.service, tree.top, range(2))))

    def meanwhile() -> None:
        for _ in range(3):
            take_part(tree.bundle.plan, others)
        tree.model(3)

    edge, _ = cut_off_for_a_day(tree, meanwhile)
    run, (mine,) = tree.service.server.tasks[0].training, edge.server.tasks[0].runs
    if most_stale is None:
        tree.model(4)
        assert json.loads(run.model(4).metrics)["staleness"] == {"3": 2}
    else:
        wait_until(lambda: "stale" in mine.trouble, "nobody was told")
        assert run.version == 3


# ── how much at once ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_edge_that_is_told_to_come_later_keeps_to_the_window(stack: ExitStack) -> None:
    tree = Tree(tiny(cohort=3), stack, Limits(edge=Rate(2.0, 4)))
    way = Cut(tree.top)
    edge = tree.edge(transport=way)
    people = list(enumerate(devices(edge, tree.below(edge), range(3))))
    began = time.monotonic()
    for round in range(2):
        take_part(tree.bundle.plan, people)
        tree.model(round + 1)
    took = time.monotonic() - began
    assert len(way.requests) - sum(path.startswith("/v1/objects") for _, path, _ in way.requests) <= 4 + 3 * took + 3
    assert edge.uplink.trouble == "" or edge.uplink.trouble.startswith("rate")


def test_a_device_that_asks_too_much_by_way_of_an_edge_takes_nothing_from_others(stack: ExitStack) -> None:
    tree = Tree(tiny(cohort=2), stack, Limits(device=Rate(0.001, 2)))
    server = tree.service.server
    mine = Requests(tree.top, bytes(range(32)))  # pyright: ignore[reportArgumentType]
    mine.enrol(server.roll.new_token("default", server.clock(), speaks_for=3))
    behind = strangers(tree, 2)

    def asked(device: ScriptedDevice, serial: int) -> CheckInAnswer:
        (told,) = mine.relay(RelayRequest(2, (device.relayed(tree.bundle.plan, serial=serial),))).answers
        assert told.answer is not None
        return told.answer

    for serial in (1, 2):
        asked(behind[0], serial)
    later = asked(behind[0], 3)
    assert (later.assignment, later.reason) == (None, "rate")
    assert later.retry_after_s is not None
    assert later.retry_after_s[0] > 100
    assert asked(behind[1], 1).assignment is not None


# ── what is not believed ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def requests(tree: Tree) -> Requests:
    """An edge's, that a test speaks for."""
    server = tree.service.server
    mine = Requests(tree.top, bytes(range(32)))  # pyright: ignore[reportArgumentType]
    mine.enrol(server.roll.new_token("default", server.clock(), speaks_for=3))
    return mine


def strangers(tree: Tree, count: int) -> list[ScriptedDevice]:
    """Devices that the server does not know: their edge brings them."""
    return [ScriptedDevice(tree.top, number) for number in range(100, 100 + count)]


def sum_of(plan: Plan, sessions: Sequence[str], value: float = 1.0) -> bytes:
    total = RunningSum()
    for session in sessions:
        plan.first_hop.count_in(update_of(plan, session, value), total)
    return encode_sum(sessions, total.total, plan.first_hop)


def refused(what: Callable[[], object]) -> str:
    with pytest.raises(Refused) as error:
        what()
    return error.value.problem.code


def test_who_is_no_edge_speaks_for_nobody(tree: Tree) -> None:
    server = tree.service.server
    device = Requests(tree.top, bytes(32))  # pyright: ignore[reportArgumentType]
    device.enrol(server.roll.new_token("default", server.clock()))
    assert refused(device.tasks) == "not_edge"
    assert refused(lambda: device.relay(RelayRequest(0))) == "not_edge"


def test_an_edge_speaks_for_no_more_than_its_token_says(tree: Tree, requests: Requests) -> None:
    requests.relay(RelayRequest(3))
    assert tree.service.server.crowd.count() == 3
    requests.relay(RelayRequest(4))
    assert tree.service.server.crowd.count() == 3, "and the edge goes on with those that it may have"
    assert {served.most for served in requests.tasks().runs} == {3}, "it adds no more reports either"


def test_a_sum_is_counted_whole_or_not_at_all_and_once(tree: Tree, requests: Requests) -> None:
    plan, behind = tree.bundle.plan, strangers(tree, 2)
    answers = requests.relay(RelayRequest(3, tuple(device.relayed(plan) for device in behind))).answers
    assert [answer.answer is not None and answer.answer.assignment is not None for answer in answers] == [True, True]
    sessions = [f"{device.id}/s1" for device in behind]

    def send(*which: str) -> Counted:
        return requests.report_sum("tiny", "train", sum_of(plan, which))

    assert refused(lambda: send(*sessions, f"{'c' * 64}/s1")) == "unknown_session"
    assert not send(*sessions).duplicate
    assert send(*sessions).duplicate
    assert send(sessions[0]).duplicate, "it is counted; nothing is added"
    run = tree.service.server.tasks[0].training
    assert run.coordinator.current.counted == 2
    (third,) = devices(tree.service, tree.top, range(1))
    third.report(third.work(plan, wait_s=5.0), update_of(plan, 0))  # pyright: ignore[reportArgumentType]
    tree.model(1)
    assert run.model(1).contributors == 3


def test_nobody_reports_for_another_edge_or_for_a_device(tree: Tree, requests: Requests) -> None:
    plan, server = tree.bundle.plan, tree.service.server
    (behind,) = strangers(tree, 1)
    requests.relay(RelayRequest(1, (behind.relayed(plan),)))
    thief = Requests(tree.top, bytes(range(1, 33)))  # pyright: ignore[reportArgumentType]
    thief.enrol(server.roll.new_token("default", server.clock(), speaks_for=2))
    body = sum_of(plan, [f"{behind.id}/s1"])
    assert refused(lambda: thief.report_sum("tiny", "train", body)) == "unknown_session"
    (device,) = devices(tree.service, tree.top, range(1))
    work = device.work(plan, wait_s=5.0)
    assert work is not None
    body = sum_of(plan, [f"{device.id}/{work.session}"])
    assert refused(lambda: thief.report_sum("tiny", "train", body)) == "unknown_session"
    thief.relay(RelayRequest(1, (), (EndedSession("tiny", "train", device.id, work.session, "other"),)))
    assert not device.report(work, update_of(plan, 0)).duplicate, "it was not ended by somebody else"


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ("beyond the bound", "out_of_bounds"),
        ("another count", "bad_report"),
        ("too many", "bad_report"),
        ("not safetensors", "bad_report"),
        ("a session twice", "bad_report"),
    ],
)
def test_what_is_no_sum_of_this_plan_is_refused(tree: Tree, requests: Requests, wrong: str, code: str) -> None:
    plan = tree.bundle.plan
    behind = strangers(tree, 2)
    requests.relay(RelayRequest(3, tuple(device.relayed(plan) for device in behind)))
    sessions = [f"{device.id}/s1" for device in behind]
    total = RunningSum()
    for session in sessions:
        plan.first_hop.count_in(update_of(plan, session), total)
    found = total.total
    if wrong == "beyond the bound":
        found.sums["params"]["w"][0] = plan.first_hop.largest(plan.first_hop.parts[0], 2) + 1
        body = encode_sum(sessions, found, plan.first_hop)
    elif wrong == "another count":
        body = encode_sum(sessions[:1], found, plan.first_hop)
    elif wrong == "too many":
        body = encode_sum([f"{n:064x}/s1" for n in range(4)], found, plan.first_hop)
    elif wrong == "a session twice":
        body = encode_sum([sessions[0], sessions[0]], found, plan.first_hop)
    else:
        body = b"\0" * 100
    assert refused(lambda: requests.report_sum("tiny", "train", body)) == code
    assert not requests.report_sum("tiny", "train", sum_of(plan, sessions)).duplicate, "nothing was lost"


class Garbled:
    """A way to a server that tells its edges nonsense. hop: what it says of `tiny` instead of how reports become integers."""

    def __init__(self, above: InProcess, hop: str) -> None:
        self._above, self._hop = above, hop

    def request(self, method: str, path: str, *arguments: Any, **named: Any) -> Answer:
        answer = self._above.request(method, path, *arguments, **named)
        if path != "/v1/tasks":
            return answer
        said = json.loads(answer.body)
        for run in said["runs"]:
            run["hop"] = self._hop if run["task"] == "tiny" else run["hop"]
        return Answer(answer.status, answer.headers, json.dumps(said).encode())

    def close(self) -> None:
        self._above.close()


@pytest.mark.parametrize(
    "hop", ["[", "7", '{"name":"pacing","with":{"cohort":3}}', '{"name":"first-hop","with":{}}', "[" * 5000]
)
def test_a_task_of_which_the_server_above_says_nonsense_is_left_out_and_others_go_on(
    stack: ExitStack, hop: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny(cohort=2, name="other")
    tree = Tree(tiny(cohort=2), stack, None, False, other)
    edge = tree.edge(transport=Garbled(tree.top, hop))
    take_part(other.plan, list(enumerate(devices(edge, tree.below(edge), range(2)))))
    assert tree.model(1), "of the other task, the first by name"
    assert "task tiny is left out" in caplog.text
