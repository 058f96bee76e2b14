"""Servers that share a round: any takes any request, one leads, and none goes on with what another has changed."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sumus
from benchmarks.kills.__main__ import database
from benchmarks.kills.replicas import crowd, harassed
from benchmarks.kills.served import Life
from sumus.errors import ExperimentError
from sumus.operations.policy import ServerPolicy
from sumus.operations.published import reconcile
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.operations.upkeep import turn_keys
from sumus.protocol.round import State
from sumus.server.access import Access
from sumus.server.admin_plane import admin_app
from sumus.server.evaluation import Evaluating
from sumus.storage.store import TakenOver
from sumus.transport.inprocess import InProcess
from sumus.wire.bundle import Bundle
from sumus.wire.messages import Assignment, Refused
from tests.server.devices import MOST, ScriptedDevice, tiny, update_of


class Replicas:
    """Servers of one process on one database, each with a folder of its own, and what they share."""

    def __init__(self, folder: Path, url: str, stack: ExitStack) -> None:
        self.folder, self.url, self._stack = folder, url, stack
        (folder / "shared").mkdir()
        self.services = list[Service]()
        self.transports = list[InProcess]()

    def opened(self, bundle: Bundle, name: str = "", shared: str = "shared", **policy: Any) -> Service:
        """One that is not started."""
        name, shares = name or f"r{len(self.services)}", self.folder / shared
        shares.mkdir(exist_ok=True)
        lease = policy.pop("lease", 60.0)
        where = Storage(self.folder / name, self.url, shares / "keys", str(shares / "blobs"), lease)
        return open_service({"tiny": bundle}, where, ServerPolicy(**{"group": 0.0, **policy}))

    def start(self, bundle: Bundle, **policy: Any) -> Service:
        """Another one."""
        service = self.opened(bundle, **policy)
        self._stack.callback(service.close)
        service.server.start()
        self.services.append(service)
        self.transports.append(self._stack.enter_context(InProcess(service.device_app)))
        return service

    def device(self, number: int) -> ScriptedDevice:
        """An enrolled one."""
        server = self.services[0].server
        device = ScriptedDevice(self.transports[0], number)
        device.enrol(server.roll.new_token("default", server.clock()))
        return device

    def at(self, which: int, device: ScriptedDevice) -> ScriptedDevice:
        """A device, as it asks this one."""
        device.transport = self.transports[which]
        return device

    def look(self) -> None:
        """Let time go by at all of them, the leader first."""
        for service in sorted(self.services, key=lambda service: not service.server.leads):
            server = service.server
            server._next_tick = server._next_count = 0.0  # pyright: ignore[reportPrivateUsage]
            server.ask_to_do(lambda now: None).result()
            server.ask_to_do(lambda now: None).result()

    def stop_time(self, which: int) -> None:
        """Let no time go by at one of them, until `look`: it does not look by itself at what others have done."""
        server = self.services[which].server
        far = time.monotonic() + 3600.0
        server.ask_to_do(lambda now: setattr(server, "_next_tick", far)).result()


@contextmanager
def replicas_at(folder: Path, url: str) -> Iterator[Replicas]:
    with ExitStack() as stack:
        yield Replicas(folder, url, stack)


@pytest.fixture
def replicas(tmp_path: Path, postgres: str) -> Iterator[Replicas]:
    with database(postgres) as url:
        assert url is not None
        with replicas_at(tmp_path, url) as found:
            yield found


def eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30.0
    while not holds():
        assert time.monotonic() < until
        threading.Event().wait(0.005)


def work(device: ScriptedDevice, bundle: Bundle, **how: Any) -> Assignment:
    found = device.check_in(bundle.plan, **how).assignment
    assert found is not None
    return found


def test_any_takes_any_request_and_the_leader_makes_the_model(replicas: Replicas) -> None:
    bundle = tiny(3)
    one, two, three = (replicas.start(bundle) for _ in range(3))
    assert [each.server.leads for each in (one, two, three)] == [True, False, False]
    devices = [replicas.device(number) for number in range(3)]
    replicas.look()
    works = [work(replicas.at(number, device), bundle) for number, device in enumerate(devices)]
    assert len({each.seed for each in works}) == 1
    for number, (device, given) in enumerate(zip(devices, works, strict=True)):
        replicas.at((number + 1) % 3, device).report(given, update_of(bundle.plan, device.id, value=float(number)))
    assert devices[0].check_in(bundle.plan, previous=works[0]).settled.outcome == "counted"  # pyright: ignore[reportOptionalMemberAccess]
    replicas.look()
    assert [each.server.tasks[0].training.version for each in (one, two, three)] == [1, 1, 1]
    run = one.server.tasks[0].training
    assert run.model(1).contributors == 3
    assert sorted(path.name for path in (replicas.folder / "shared" / "blobs").iterdir() if len(path.name) > 2) == [
        "sums"
    ]
    with run.store.transaction() as rows:
        assert len(rows.shards(0)) == 3, "each has added to it"
        assert rows.note(0, "key") is None


def test_a_model_of_another_is_served_before_it_was_looked_at(replicas: Replicas) -> None:
    bundle = tiny(2)
    one, two = (replicas.start(bundle) for _ in range(2))
    devices = [replicas.device(number) for number in range(2)]
    replicas.look()
    replicas.stop_time(1)
    for given, device in [(work(device, bundle), device) for device in devices]:
        device.report(given, update_of(bundle.plan, device.id))
    one.server.ask_to_do(lambda now: None).result()
    model = one.server.tasks[0].training.model(1)
    assert two.server.tasks[0].training.version == 0
    answer = replicas.transports[1].request("GET", f"/v1/objects/{model.broadcast}", most=MOST)
    assert (answer.status, answer.body) == (200, one.blobs.get(model.broadcast))
    eventually(lambda: replicas.transports[1].request("GET", f"/v1/objects/{'0' * 64}").status == 404)


def test_whoever_is_held_open_is_woken_by_what_another_does(replicas: Replicas) -> None:
    bundle = tiny(2)
    replicas.start(bundle)
    replicas.start(bundle)
    devices = [replicas.device(number) for number in range(3)]
    replicas.look()
    works = [work(replicas.at(0, device), bundle) for device in devices[:2]]
    waiting = list[Assignment]()
    thread = threading.Thread(target=lambda: waiting.append(work(replicas.at(1, devices[2]), bundle, wait_s=30.0)))
    thread.start()
    eventually(lambda: replicas.services[1].server.held == 1)
    for device, given in zip(devices, works, strict=False):
        device.report(given, update_of(bundle.plan, device.id))
    thread.join(30.0)
    assert [given.version for given in waiting] == [1]


def test_one_that_leaves_is_followed_at_once(replicas: Replicas) -> None:
    bundle = tiny(2)
    one, two = (replicas.start(bundle, lease=20.0) for _ in range(2))
    fence = two.server.replica.last_fence
    one.close()
    eventually(lambda: two.server.leads)
    assert two.server.replica.fence == fence + 1
    assert two.server.replica.there == (two.server.replica.name,)


def test_a_leader_that_is_behind_writes_nothing_more_and_follows(replicas: Replicas) -> None:
    """As one that was stopped: its thread for the lease does not run."""
    bundle = tiny(2)
    one, two = (replicas.start(bundle) for _ in range(2))
    devices = [replicas.device(number) for number in range(2)]
    replicas.look()
    replicas.stop_time(0)
    works = [work(device, bundle) for device in devices]
    leases, run = one.server.replica.leases, one.server.tasks[0].training
    leases.leave(one.server.replica._holder)  # pyright: ignore[reportPrivateUsage]
    eventually(lambda: two.server.replica.look() is not None)
    two.server.ask_to_do(lambda now: None).result()
    assert two.server.leads
    for write in (
        run.pause,
        lambda: run.roll_back(0, 1.0),
        lambda: run.promote(0),
        lambda: run.sums.sweep(),
        lambda: run.sums.destroy(0),
        lambda: run.seeds.of(0) if run.seeds.forget() is None else None,
        lambda: one.shared.wrap_again(one.server.replica.fence),
    ):
        with pytest.raises(TakenOver):
            write()
    with pytest.raises(Refused, match="not_ready"):
        replicas.at(0, devices[0]).report(works[0], update_of(bundle.plan, 0))
    eventually(lambda: not one.server.trouble and not one.server.leads)
    for device, given in zip(devices, works, strict=True):
        device.report(given, update_of(bundle.plan, device.id))
    replicas.look()
    assert [each.server.tasks[0].training.version for each in (one, two)] == [1, 1]


def test_a_report_that_comes_to_a_closed_round_is_refused_wherever_it_comes(replicas: Replicas) -> None:
    bundle = tiny(2, over_select=1.5)
    replicas.start(bundle)
    replicas.start(bundle)
    devices = [replicas.device(number) for number in range(3)]
    replicas.look()
    works = [work(device, bundle) for device in devices]
    for device, given in list(zip(devices, works, strict=True))[:2]:
        device.report(given, update_of(bundle.plan, device.id))
    late = replicas.at(1, devices[2])
    with pytest.raises(Refused, match="closed"):
        late.report(works[2], update_of(bundle.plan, late.id))
    settled = replicas.at(0, late).check_in(bundle.plan, previous=works[2]).settled
    assert settled is not None
    assert settled.outcome == "discarded"


def test_the_cap_is_exact_however_many_add_at_once(replicas: Replicas) -> None:
    bundle = tiny(4, over_select=3.0)
    for _ in range(3):
        replicas.start(bundle)
    devices = [replicas.device(number) for number in range(12)]
    replicas.look()
    works = [work(device, bundle) for device in devices]
    answers = list[str]()

    def report(number: int) -> None:
        device = replicas.at(number % 3, devices[number])
        try:
            device.report(works[number], update_of(bundle.plan, device.id))
            answers.append("counted")
        except Refused as refused:
            answers.append(refused.problem.code)

    threads = [threading.Thread(target=report, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == ["closed"] * 8 + ["counted"] * 4


def test_a_check_in_that_another_has_answered_since_is_replayed(replicas: Replicas) -> None:
    bundle = tiny(2)
    replicas.start(bundle)
    replicas.start(bundle)
    device = replicas.device(0)
    replicas.device(1)
    replicas.look()
    first = work(replicas.at(0, device), bundle)
    again = work(replicas.at(1, device), bundle, again=True)
    assert (again.session, again.seed) == (first.session, first.seed)
    nothing = replicas.at(1, device).check_in(bundle.plan, kinds=("evaluate",))
    assert nothing.assignment is None
    device.serial -= 2
    with pytest.raises(Refused, match="replayed"):
        replicas.at(0, device).check_in(bundle.plan)


def test_a_device_has_work_of_one_run_whoever_gave_it(replicas: Replicas) -> None:
    bundle = tiny(2)
    one, two = (replicas.start(bundle, evaluate=Evaluating(2)) for _ in range(2))
    devices = [replicas.device(number) for number in range(2)]
    replicas.look()
    measured = work(replicas.at(0, devices[0]), bundle, kinds=("evaluate",))
    again = work(replicas.at(1, devices[0]), bundle, again=True)
    assert (again.kind, again.session) == ("evaluate", measured.session), "the same request: not other work besides"
    assert work(replicas.at(1, devices[0]), bundle, kinds=("train",)).kind == "train"
    run = one.server.tasks[0].evaluation
    assert run is not None
    row = run.coordinator.session(f"{devices[0].id}/{measured.session}")
    assert row is not None
    assert (row.state, row.reason) == ("dropped", "forgotten")
    assert two.server.tasks[0].evaluation is not None


def test_a_version_that_another_has_seen_measured_is_not_measured_again(replicas: Replicas) -> None:
    bundle = tiny(2)
    one, two = (replicas.start(bundle, evaluate=Evaluating(2)) for _ in range(2))
    device = replicas.device(0)
    replicas.device(1)
    replicas.look()
    replicas.stop_time(1)
    leads, follows = (each.server.tasks[0].evaluation for each in (one, two))
    assert leads is not None
    assert follows is not None
    with leads.coordinator.leading() as rows:
        rows.put_note(2**31 - 1, "measured", b"0")
    assert follows.measured == -1
    assert replicas.at(1, device).check_in(bundle.plan, kinds=("evaluate",)).assignment is None


def test_a_challenge_of_one_is_good_for_another_and_who_is_shut_out_is_so_everywhere(replicas: Replicas) -> None:
    bundle = tiny(2)
    one, two = (replicas.start(bundle) for _ in range(2))
    nonce = one.server.roll.challenge(one.server.clock()).nonce
    two.server.roll._check_nonce(nonce, two.server.clock())  # pyright: ignore[reportPrivateUsage]
    device = replicas.device(0)
    replicas.look()
    replicas.at(1, device).check_in(bundle.plan)
    one.server.roll.revoke(device.id)
    two.server.roll._fresh = 0.0  # pyright: ignore[reportPrivateUsage] (a minute later)
    with pytest.raises(Refused, match="revoked"):
        device.check_in(bundle.plan)


def test_what_is_not_shared_is_refused_at_the_start(replicas: Replicas) -> None:
    bundle = tiny(2)
    first = replicas.start(bundle)
    name = first.server.replica.name
    (replicas.folder / "other").mkdir()
    where = Storage(
        replicas.folder / "new", replicas.url, replicas.folder / "shared" / "keys", str(replicas.folder / "x")
    )
    with pytest.raises(
        ExperimentError, match=f"replica {name} keeps models and sums elsewhere: give all replicas the same --blobs"
    ):
        open_service({"tiny": bundle}, where)
    where = replace(where, keys=replicas.folder / "other" / "keys", blobs=str(replicas.folder / "shared" / "blobs"))
    with pytest.raises(
        ExperimentError, match=f"replica {name} has another key ring: give all replicas the same --keys"
    ):
        open_service({"tiny": bundle}, where)
    for served, policy in (
        (replace(bundle, plan=replace(bundle.plan, algorithm=sumus.fedavg(sumus.sgd(lr=0.3)))), {}),
        (bundle, {"releases": False}),
        (bundle, {"evaluate": Evaluating(2)}),
    ):
        with pytest.raises(ExperimentError, match=f"replica {name} serves other tasks, plans or options"):
            replicas.opened(served, "new", **policy)
    with pytest.raises(ExperimentError, match=f"replica {name} works on this database: stop all replicas first"):
        reconcile(replace(where, data=replicas.folder / "new"))
    assert first.server.tasks[0].training.version == 0
    replicas.start(bundle)


def test_keys_that_are_turned_leave_what_is_shared(replicas: Replicas) -> None:
    bundle = tiny(2)
    one = replicas.start(bundle)
    for _ in range(3):
        one.server.ask_to_do(lambda now: turn_keys(one)).result()
    two = replicas.start(bundle)
    two.server.ask_to_do(lambda now: turn_keys(two)).result()
    assert one.ring.current == 4, "who follows turns none"
    assert sorted(path.name for path in (replicas.folder / "shared" / "keys").iterdir()) == ["3.key", "4.key"]
    two.server.roll._check_nonce(one.server.roll.challenge(one.server.clock()).nonce, two.server.clock())  # pyright: ignore[reportPrivateUsage]


def test_status_and_metrics_say_who_leads_and_who_follows_is_ready(replicas: Replicas) -> None:
    bundle = tiny(2)
    for _ in range(2):
        replicas.start(bundle)
    one, two = (each.server.replica.name for each in replicas.services)
    for service in replicas.services:
        service.server.replica.look()
    for service, leads in zip(replicas.services, (True, False), strict=True):
        access = Access(replicas.folder / service.server.replica.name)
        with InProcess(admin_app(service, access, lambda token: token)) as admin:
            session = access.exchange(access.new_code(time.time()), "", time.time())
            headers = {"authorization": f"Bearer {session}"}
            status = json.loads(admin.request("GET", "/v1/admin/status", headers=headers).body)
            said = {"name": service.server.replica.name, "leads": leads, "leader": one, "fence": 1}
            assert status["replica"] == {**said, "there": sorted([one, two])}
            text = admin.request("GET", "/metrics").body.decode().splitlines()
            assert {f"sumus_leader {float(leads)}", "sumus_fence 1.0", "sumus_replicas 2.0"} <= set(text)
            assert admin.request("GET", "/readyz").status == 200
            answer = admin.request(
                "POST", "/v1/admin/models/tiny/pause", b"{}", {**headers, "content-type": "application/json"}
            )
            if leads:
                assert answer.status == 200
            else:
                assert (answer.status, f"replica {one} leads" in answer.body.decode()) == (404, True)
    replicas.look()
    assert [each.server.tasks[0].training.paused for each in replicas.services] == [True, True]


def test_a_round_that_a_follower_ends_is_cleared_away_by_the_leader(replicas: Replicas) -> None:
    bundle = tiny(2, deadline=600.0)
    one, two = (replicas.start(bundle) for _ in range(2))
    device = replicas.device(0)
    replicas.device(1)
    replicas.look()
    replicas.stop_time(0)
    given = work(replicas.at(1, device), bundle)
    device.report(given, update_of(bundle.plan, device.id))
    run = two.server.tasks[0].training
    row = run.coordinator.current
    assert (row.state, row.counted) == (State.OPEN, 1)
    two.server.ask_to_do(lambda now: run.coordinator.drop([], "", now)).result()
    with run.store.transaction() as rows:
        rows.put_round(replace(row, since=row.since - 1000.0))
        assert rows.note(row.number, "key") is not None
    assert replicas.at(1, device).check_in(bundle.plan).assignment is None, "it is past its deadline, and ends"
    assert run.coordinator.round(row.number).state is State.ABANDONED  # pyright: ignore[reportOptionalMemberAccess]
    replicas.look()
    with run.store.transaction() as rows:
        assert rows.note(row.number, "key") is None
    assert not list(one.server.tasks[0].training.sums._blobs)  # pyright: ignore[reportPrivateUsage]


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Life]]:
    folder = tmp_path_factory.mktemp("lives")
    with ExitStack() as stack:
        yield [stack.enter_context(Life(folder / f"log{number}")) for number in range(3)]


@pytest.mark.parametrize("kind", ["synchronous", "buffered"])
def test_leaders_that_are_killed_stopped_and_woken_break_no_promise(
    kind: str, lives: list[Life], tmp_path: Path, postgres: str
) -> None:
    with database(postgres) as url:
        assert url is not None
        with crowd(lives, tmp_path, url, kind, 9) as going:
            found = harassed(going, 2, random.Random(5))
    assert found.good, f"{found} {found.wrong}"
    assert found.acknowledged > 3
    assert going.took


def test_one_that_leads_for_ever_is_found(lives: list[Life], tmp_path: Path, postgres: str) -> None:
    with database(postgres) as url:
        assert url is not None
        with crowd(lives, tmp_path, url, "synchronous", 9, planted="leads-for-ever") as going:
            found = harassed(going, 0, random.Random(5))
    assert any("did not lead" in wrong for wrong in found.wrong), found.wrong
