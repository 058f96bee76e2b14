"""A site: an edge whose devices do rounds of its own before their sum goes up. It does what a simulated one does, bit for bit."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import sumus
from sumus.aggregate import RunningSum
from sumus.device.device import Device
from sumus.device.link import Link
from sumus.device.requests import Requests
from sumus.device.training import Training
from sumus.edge.edge import Edge, open_edge
from sumus.edge.edge_run import EdgeRun
from sumus.experiment import Experiment
from sumus.first_hop import FirstHop
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.plan import Plan
from sumus.rounds.run import cancel_newest
from sumus.simulator.processes.share import public_seed
from sumus.tree import sha256
from sumus.wire.messages import Assignment, RelayRequest
from sumus.wire.reports import encode_sum
from sumus.wire.tensors import decode_tree
from tests.attacks.parties import code_of, given
from tests.edge.test_adder import HOUR, PLENTY, Cut, Tree, wait_until
from tests.edge.test_adder import devices as scripted
from tests.server.clients import clients, served, train
from tests.server.devices import ScriptedDevice, tiny, together, update_of
from tests.server.over_http import over_http
from tests.simulator.test_wire import ALGORITHMS, PEOPLE, net

SEED, ROUNDS, OWN, SITES = 3, 2, 3, 2


def experiment(algorithm: str) -> Experiment:
    task = sumus.Task(net, sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, name="sites")
    plan = sumus.Plan(
        task, ALGORITHMS[algorithm], sumus.Pacing(len(PEOPLE)), 2, edges=sumus.Edges(OWN), trusts_devices=True
    )
    return Experiment(plan, PEOPLE, ROUNDS, seed=SEED, edge_groups=SITES)


def serve(wanted: Experiment, stack: ExitStack) -> tuple[Service, str, Training]:
    """A server of it over HTTP, its address, and what devices do."""
    bundle, training = served(wanted)
    seeds = partial(public_seed, bundle.plan, SEED)
    policy = ServerPolicy("people", group=0.0)
    service = open_service({"sites": bundle}, Storage(), policy, seeds=lambda task: seeds)
    stack.callback(service.close)
    service.server.start()
    return service, stack.enter_context(over_http(service)), training


def site(service: Service, url: str, stack: ExitStack) -> tuple[Edge, str]:
    """One below it, and its address."""
    token = service.server.roll.new_token("people", service.server.clock(), speaks_for=100)
    edge = open_edge(Link(url, token), policy=ServerPolicy(group=0.0), linger=300.0)
    stack.callback(edge.close)
    edge.start()
    return edge, stack.enter_context(over_http(edge))


def devices(edge: Edge, url: str, numbers: range, training: Training) -> list[Device]:
    token = edge.server.roll.new_token("people", edge.server.clock(), uses=len(numbers))
    return clients(url, token, training, numbers, SEED)


@pytest.mark.parametrize("algorithm", ["fedavg", "adam, over narrow codes"])
def test_a_site_does_what_a_simulated_one_does(stack: ExitStack, algorithm: str) -> None:
    wanted = experiment(algorithm)
    service, url, training = serve(wanted, stack)
    edges = [site(service, url, stack) for _ in range(SITES)]
    each = len(PEOPLE) // SITES
    people = [
        device
        for place, (edge, below) in enumerate(edges)
        for device in devices(edge, below, range(place * each, (place + 1) * each), training)
    ]
    train(people, ROUNDS * OWN)
    run = service.server.tasks[0].training
    wait_until(lambda: run.version == ROUNDS, "the sums did not go up")
    real = sha256(decode_tree(service.blobs.get(run.model(ROUNDS).model)))
    assert real == sumus.run(wanted, compute=sumus.Compute(executor="sequential", workers=1)).model_sha256
    wait_until(lambda: [edge.uplink.sent for edge, _ in edges] == [ROUNDS] * SITES, "a sum for all of its own rounds")
    assert run.model(ROUNDS).contributors == len(PEOPLE)


# ── rounds of its own, step by step ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tree(stack: ExitStack) -> Tree:
    return Tree(tiny(cohort=3, rounds=3), stack)


def own_round(plan: Plan, people: Sequence[ScriptedDevice], value: float) -> list[Assignment]:
    """All ask, and all report the same."""
    works = together(*(partial(device.work, plan, wait_s=PLENTY) for device in people))
    assert all(work is not None for work in works)
    together(
        *(partial(d.report, w, update_of(plan, d.id, value, 10)) for d, w in zip(people, works, strict=True)),
    )
    return works


def cut_off_after_its_first_round(tree: Tree) -> tuple[Edge, Cut, list[ScriptedDevice]]:
    """A site that has done its rounds and could not say so; its way up, and its three devices."""
    way = Cut(tree.top)
    edge, plan = tree.edge(transport=way), tree.bundle.plan
    people = scripted(edge, tree.below(edge), range(3))
    own_round(plan, people, 1.0)
    way.cut = True
    for value in (2.0, 4.0):
        own_round(plan, people, value)
    return edge, way, people


def model_of(tree: Tree, version: int) -> list[float]:
    """Of the server, once it is there."""
    tree.model(version)
    run = tree.service.server.tasks[0].training
    return decode_tree(tree.service.blobs.get(run.model(version).model))["w"].tolist()


def run_of(edge: Edge) -> EdgeRun:
    (run,) = edge.server.tasks[0].runs
    assert isinstance(run, EdgeRun)
    return run


def test_each_round_begins_from_the_sites_own_model_and_nobody_above_is_asked(tree: Tree) -> None:
    way = Cut(tree.top)
    edge, plan = tree.edge(transport=way), tree.bundle.plan
    people = scripted(edge, tree.below(edge), range(3))
    given = [own_round(plan, people, 1.0)[0]]
    asked = sum(path == "/v1/relays" for _, path, _ in way.requests)
    given += [own_round(plan, people, value)[0] for value in (2.0, 4.0)]
    assert model_of(tree, 1) == [-7.0] * 4
    assert sum(path == "/v1/relays" for _, path, _ in way.requests) == asked
    wait_until(lambda: len(way.sums()) == 1, "a sum is of three rounds")
    models = [decode_tree(people[0].object(work.broadcast.sha256))["params/w"].tolist() for work in given]
    assert models == [[0.0] * 4, [-1.0] * 4, [-3.0] * 4]
    assert len({work.seed for work in given}) == 3
    assert {work.version for work in given} == {0}
    assert {work.plan for work in given} == {given[0].plan}
    assert tree.service.server.tasks[0].training.model(1).contributors == 3
    own_round(plan, people, 1.0)  # and so on
    run = run_of(edge)
    wait_until(lambda: run.waits_for(run.coordinator.current).startswith("its own round 2 of 3"), "it does not say")


def test_while_the_server_above_is_away_a_site_goes_on_and_delivers_once(tree: Tree) -> None:
    edge, way, people = cut_off_after_its_first_round(tree)
    plan = tree.bundle.plan
    wait_until(lambda: edge.above().waiting == 1, "it was not tried")
    run = run_of(edge)
    wait_until(lambda: "on its way" in run.waits_for(run.coordinator.current), "it does not say")
    answer = people[0].check_in(plan, wait_s=0.2)
    assert (answer.assignment, answer.reason) == (None, "closed")
    way.cut = False
    edge.uplink.wake()
    assert model_of(tree, 1) == [-7.0] * 4
    wait_until(lambda: len(way.sums()) == 1, "a sum is of three rounds")


def test_a_site_that_was_killed_goes_on_where_it_was_and_sends_the_same_bytes(
    stack: ExitStack, tree: Tree, tmp_path: Path
) -> None:
    way, where, plan = Cut(tree.top), Storage(tmp_path / "edge"), tree.bundle.plan
    edge = tree.edge(transport=way, storage=where)
    people = scripted(edge, tree.below(edge), range(3))
    own_round(plan, people, 1.0)
    work = people[0].work(plan, wait_s=PLENTY)
    assert work is not None
    people[0].report(work, update_of(plan, people[0].id, 2.0, 10))
    way.cut = True
    edge.close()

    def again() -> Edge:
        edge = open_edge(Link("http://127.0.0.1:1"), where, ServerPolicy(group=0.0), transport=way, linger=30.0)  # pyright: ignore[reportArgumentType]
        stack.callback(edge.close)
        edge.start()
        for device in people:
            device.transport = tree.below(edge)
        return edge

    edge = again()
    assert people[0].report(work, update_of(plan, people[0].id, 2.0, 10)).duplicate
    own_round(plan, people[1:], 2.0)
    own_round(plan, people, 4.0)
    wait_until(lambda: 2 in run_of(edge).sums_to_send, "the rounds have not ended")
    bodies = [run_of(edge).sums_to_send[2].body]
    edge.close()
    edge = again()
    bodies += [run_of(edge).sums_to_send[2].body]
    assert bodies[0] == bodies[1]
    way.cut = False
    edge.uplink.wake()
    assert model_of(tree, 1) == [-7.0] * 4


def test_fewer_than_the_plan_asks_for_make_no_model_of_the_sites(stack: ExitStack) -> None:
    tree = Tree(tiny(cohort=4, rounds=3, least=3), stack)
    edge, plan = tree.edge(), tree.bundle.plan
    (below,) = scripted(edge, tree.below(edge), range(1))
    direct = scripted(tree.service, tree.top, range(1, 4))
    own_round(plan, [below, *direct], 1.0)
    assert model_of(tree, 1) == [-1.0] * 4
    wait_until(lambda: edge.uplink.sent == 1, "what it added goes up as it was")


def test_who_does_not_come_back_holds_a_site_no_longer_than_it_lingers(tree: Tree) -> None:
    edge, plan = tree.edge(linger=1.0), tree.bundle.plan
    people = scripted(edge, tree.below(edge), range(3))
    own_round(plan, people, 1.0)
    own_round(plan, people[:2], 2.0)
    own_round(plan, people[:2], 4.0)
    assert model_of(tree, 1) == [-7.0] * 4
    assert tree.service.server.tasks[0].training.model(1).contributors == 3


def test_rounds_that_nobody_comes_to_end_at_their_share_of_the_time(stack: ExitStack) -> None:
    tree = Tree(tiny(cohort=3, rounds=3, deadline=HOUR), stack)
    edge, plan = tree.edge(), tree.bundle.plan
    people = scripted(edge, tree.below(edge), range(3))
    own_round(plan, people, 1.0)
    clock = edge.server.clock
    edge.server.clock = lambda: clock() + 0.5 * HOUR  # a round's share is less, and the sum must go up later
    assert model_of(tree, 1) == [-1.0] * 4
    assert run_of(edge).trouble == ""


def test_who_has_work_and_vanishes_costs_a_round_its_share_of_the_time_and_not_the_others_theirs(
    stack: ExitStack,
) -> None:
    tree = Tree(tiny(cohort=3, rounds=3, deadline=9.0), stack)
    edge, plan = tree.edge(), tree.bundle.plan
    people = scripted(edge, tree.below(edge), range(3))
    works = together(*(partial(device.work, plan, wait_s=PLENTY) for device in people))
    assert works[2].expires_in_s < 3.0
    together(*(partial(d.report, w, update_of(plan, d.id, 1.0)) for d, w in zip(people[:2], works[:2], strict=True)))
    for value in (2.0, 4.0):
        own_round(plan, people[:2], value)
    assert model_of(tree, 1) == [-7.0] * 4
    assert tree.service.server.tasks[0].training.model(1).contributors == 2


def test_a_later_round_of_too_few_ends_it_and_the_sum_is_of_the_rounds_before(tree: Tree) -> None:
    edge, plan = tree.edge(linger=0.3), tree.bundle.plan
    people = scripted(edge, tree.below(edge), range(3))
    own_round(plan, people, 1.0)
    own_round(plan, people[:1], 50.0)
    assert model_of(tree, 1) == [-1.0] * 4
    row = run_of(edge).coordinator.round(1)
    assert row is not None
    assert (row.state.value, row.counted) == ("abandoned", 1)


def test_only_who_was_in_the_first_round_is_in_the_others(tree: Tree) -> None:
    edge, plan = tree.edge(), tree.bundle.plan
    people = scripted(edge, tree.below(edge), range(3))
    (late,) = scripted(edge, tree.below(edge), range(3, 4))
    own_round(plan, people, 1.0)
    answer = late.check_in(plan, wait_s=0.2)
    assert (answer.assignment, answer.reason) == (None, "closed")
    work = people[0].work(plan, wait_s=PLENTY)
    assert work is not None
    people[0].report(work, update_of(plan, people[0].id, 2.0, 10))
    answer = people[0].check_in(plan, wait_s=0.2)
    assert (answer.assignment, answer.reason) == (None, "closed"), "once in a round"


def test_a_sum_that_comes_too_late_is_given_up_and_said_to_be(tree: Tree) -> None:
    edge, way, people = cut_off_after_its_first_round(tree)
    plan = tree.bundle.plan
    run = tree.service.server.tasks[0].training
    tree.service.server.ask_to_do(
        lambda now: cancel_newest(run, now)
    ).result()  # the round is over, as after a deadline
    way.cut = False
    edge.uplink.wake()
    wait_until(lambda: "was not counted by the server above" in run_of(edge).trouble, "nobody was told")
    for value in (1.0, 1.0, 1.0):  # and the next rounds are as ever
        own_round(plan, people, value)
    assert model_of(tree, 1) == [-3.0] * 4
    wait_until(lambda: run_of(edge).trouble == "", "the trouble did not end")  # once the edge has read the answer


def test_a_site_above_an_edge(tree: Tree) -> None:
    upper = tree.edge()
    lower = tree.edge(upper, tree.below(upper))
    plan = tree.bundle.plan
    people = scripted(lower, tree.below(lower), range(2)) + scripted(upper, tree.below(upper), range(2, 3))
    for value in (1.0, 2.0, 4.0):
        own_round(plan, people, value)
    assert model_of(tree, 1) == [-7.0] * 4
    wait_until(lambda: (lower.uplink.sent, upper.uplink.sent) == (3, 1), "sums of other rounds")


def test_what_comes_from_below_a_site_is_as_long_as_one_round_of_clipped_updates(stack: ExitStack) -> None:
    """The site's own sum may be as long as its rounds are many; a sum of an edge below it may not."""
    open_plan = tiny(cohort=3, rounds=3)
    clipped = sumus.fedavg(sumus.sgd(lr=0.1), update=sumus.clip_by_global_norm(1.0))
    bundle = replace(open_plan, plan=replace(open_plan.plan, algorithm=clipped))
    tree = Tree(bundle, stack)
    edge = tree.edge()
    (runs,) = [task.runs for task in edge.server.tasks]
    below = Requests(tree.below(edge), bytes(32))
    below.enrol(edge.server.roll.new_token("default", edge.server.clock(), speaks_for=2))
    hop = FirstHop.from_json(below.tasks().runs[0].hop)
    assert (hop.rounds, runs[0].hop_above.rounds) == (1, 3)
    people = [ScriptedDevice(tree.below(edge), 70 + number) for number in range(2)]

    def send(value: float) -> str:
        total, longer = RunningSum(), replace(hop, norms=tuple(None for _ in hop.norms))
        for device in people:
            longer.count_in(update_of(bundle.plan, device.id, value), total)
        sessions = [f"{device.id}/s1" for device in people]
        return code_of(lambda: below.report_sum("tiny", "train", encode_sum(sessions, total.total, hop)))

    asked = RelayRequest(2, tuple(device.relayed(bundle.plan) for device in people))
    wait_until(
        lambda: given(below.relay(asked).answers) == [True, True],
        "no work came down",
    )
    assert send(0.6) == "out_of_bounds", "four numbers of 0.6 are 1.2 long"
    assert send(0.5) == "counted", "control"
