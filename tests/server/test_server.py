"""A server's tasks: who is given which work, what becomes of it, and what remains after a restart."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import sumus
from sumus.errors import ExperimentError
from sumus.evaluation import evaluation_report
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.plan import Plan
from sumus.rounds.run import cancel_newest
from sumus.rounds.stages import ClearReport
from sumus.server.evaluation import Evaluating
from sumus.task import Leaf
from sumus.transport.inprocess import InProcess
from sumus.tree import nested
from sumus.wire.bundle import Bundle
from sumus.wire.messages import Counted, Refused, Settlement, read
from sumus.wire.reports import encode_report
from sumus.wire.tensors import decode_tree
from tests.server.devices import ScriptedDevice, path_of, tiny, together, update_of

Start = Callable[..., "Running"]


class Running:
    """A server in this process. number: of the next device."""

    def __init__(self, service: Service, transport: InProcess) -> None:
        self.service, self.server, self.transport = service, service.server, transport
        self.number = 0

    def device(self, number: int | None = None) -> ScriptedDevice:
        """One that is enrolled."""
        device = ScriptedDevice(self.transport, self.number if number is None else number)
        self.number += 1
        token = self.server.roll.new_token(self.server.population, self.server.clock())
        device.enrol(token)
        return device

    def models(self, task: str = "tiny") -> list[Any]:
        """All versions of a task, once all is done that is to do."""
        self.server.ask_to_do(lambda now: None).result()
        training = next(each.training for each in self.server.tasks if each.name == task)
        with training.store.transaction() as rows:
            return list(rows.models())

    def weights(self, device: ScriptedDevice, version: int = -1, task: str = "tiny") -> Any:
        """What a version's `w` is, as devices fetch it."""
        return nested(decode_tree(device.object(self.models(task)[version].broadcast)))["params"]["w"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a server on a folder, on SQLite; it may be started again."""
    with ExitStack() as stack:

        def started(bundles: Mapping[str, Bundle], stop: "Running | None" = None, **policy: Any) -> Running:
            if stop is not None:
                stop.transport.close()
                stop.service.close()
            service = open_service(bundles, Storage(tmp_path / "data"), ServerPolicy(group=0.0, **policy))
            service.server.start()
            running = Running(service, InProcess(service.device_app))
            stack.callback(service.close)
            stack.callback(running.transport.close)
            return running

        yield started


def settled(work: Any, outcome: Any) -> Settlement:
    """What a server says of a session's end."""
    return Settlement(work.session, outcome)


def round_of(running: Running, devices: list[ScriptedDevice], plan: Plan, *values: float) -> None:
    """Let these devices take part in a round."""
    given = [device.work(plan, wait_s=20.0) for device in devices]
    assert all(given)
    reports = [
        lambda device=device, work=work, value=value: device.report(work, update_of(plan, device.id, value))
        for device, work, value in zip(devices, given, values, strict=True)
    ]
    assert [counted.status for counted in together(*reports)] == ["counted"] * len(devices)


# ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_round_gives_the_mean_of_what_was_reported(start: Start) -> None:
    bundle = tiny(3)
    running = start({"tiny": bundle})
    devices = [running.device() for _ in range(3)]
    round_of(running, devices, bundle.plan, 1.0, 2.0, 6.0)
    round_of(running, devices, bundle.plan, 1.0, 1.0, 1.0)
    assert [model.contributors for model in running.models()] == [0, 3, 3]
    np.testing.assert_allclose(running.weights(devices[0], 1), -3.0)
    np.testing.assert_allclose(running.weights(devices[0], 2), -4.0)
    assert json.loads(running.models()[1].metrics) == {"staleness": {"0": 3}, "train": {"loss": 0.5}}


def test_a_buffer_takes_reports_of_older_models_and_says_how_stale_they_were(start: Start) -> None:
    bundle = tiny(2, concurrency=4)
    running = start({"tiny": bundle})
    devices = [running.device() for _ in range(4)]
    work = [device.work(bundle.plan) for device in devices]
    for device, given in zip(devices, work, strict=True):
        assert given is not None
        together(lambda device=device, given=given: device.report(given, update_of(bundle.plan, device.id)))
    assert [model.contributors for model in running.models()] == [0, 2, 2]
    assert json.loads(running.models()[2].metrics)["staleness"] == {"1": 2}


def test_whoever_waits_is_woken_when_there_is_work(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    first, second, third = (running.device() for _ in range(3))
    given = [device.work(bundle.plan) for device in (first, second)]
    waiting: list[Any] = []
    thread = threading.Thread(target=lambda: waiting.append(third.work(bundle.plan, wait_s=30.0)))
    thread.start()
    together(
        *(
            lambda d=d, w=w: d.report(w, update_of(bundle.plan, d.id))
            for d, w in zip((first, second), given, strict=True)
        )
    )
    thread.join()
    assert waiting[0].version == 1


def test_who_asks_in_vain_is_told_when_to_come_back(start: Start) -> None:
    bundle = tiny(2, requires=sumus.Conditions(charging=True))
    running = start({"tiny": bundle})
    answer = running.device().check_in(bundle.plan)
    assert answer.assignment is None
    assert (answer.reason, answer.retry_after_s is not None) == ("charging", True)


def test_the_same_request_is_given_the_same_work(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    device, _ = running.device(), running.device()
    first, second = device.check_in(bundle.plan), device.check_in(bundle.plan, again=True)
    assert first.assignment is not None
    assert second.assignment is not None
    assert first.assignment.session == second.assignment.session


def test_an_old_request_is_answered_no_more(start: Start) -> None:
    bundle = tiny(2)
    device = start({"tiny": bundle}).device()
    device.work(bundle.plan)
    device.serial -= 2
    with pytest.raises(Refused, match="replayed"):
        device.work(bundle.plan)


def test_who_asks_what_became_of_a_session_is_told(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    one, other = running.device(), running.device()
    work = [one.work(bundle.plan), other.work(bundle.plan)]
    assert one.check_in(bundle.plan, previous=work[0]).settled == settled(work[0], "unknown")
    reports = [
        lambda d=d, w=w: d.report(w, update_of(bundle.plan, d.id)) for d, w in zip((one, other), work, strict=True)
    ]
    together(*reports)
    answer = one.check_in(bundle.plan, previous=work[0])
    assert answer.settled == settled(work[0], "counted")
    assert answer.assignment is not None, "and is given work in the same answer"
    gone = msgspec.structs.replace(work[0], session="never-given")
    assert other.check_in(bundle.plan, previous=gone).settled == settled(gone, "discarded")


def test_who_gives_up_makes_room(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    one, other, third = (running.device() for _ in range(3))
    work = [one.work(bundle.plan), other.work(bundle.plan)]
    assert work[0] is not None
    one.abort(work[0], "data")
    with pytest.raises(Refused, match="closed"):
        one.report(work[0], update_of(bundle.plan, one.id))
    assert running.server.counts.events["dropped", "data"] == 1
    assert third.check_in(bundle.plan).assignment is not None, "its place is the next device's that asks"


def test_whoever_is_alone_is_given_no_work(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    device = running.device()
    assert device.check_in(bundle.plan).reason == "few", "no sum of one is ever used"
    running.device()
    assert device.work(bundle.plan) is not None


def test_too_few_reports_make_no_model(start: Start) -> None:
    bundle = tiny(3, least=3)
    running = start({"tiny": bundle})
    devices = [running.device() for _ in range(3)]
    work = [device.work(bundle.plan) for device in devices]
    assert work[0] is not None
    assert work[1] is not None
    assert work[2] is not None
    devices[2].abort(work[2])
    together(
        *(
            lambda d=d, w=w: d.report(w, update_of(bundle.plan, d.id))
            for d, w in zip(devices[:2], work[:2], strict=True)
        )
    )
    assert len(running.models()) == 1
    again = devices[2].work(bundle.plan, wait_s=20.0)
    assert again is not None, "what is counted is not lost: it may still come"
    together(lambda: devices[2].report(again, update_of(bundle.plan, devices[2].id)))
    assert [model.contributors for model in running.models()] == [0, 3]


# ── several tasks, and evaluation ────────────────────────────────────────────────────────────────────────────────────


def test_the_more_urgent_task_is_given_first(start: Start) -> None:
    plain, urgent = tiny(2), tiny(2, name="urgent", lr=0.5)
    running = start({"plain": plain, "urgent": urgent}, priority={"urgent": 5})
    devices = [running.device() for _ in range(3)]
    given = [device.work(plain.plan, urgent.plan) for device in devices]
    assert [work and work.task for work in given] == ["urgent", "urgent", "plain"]


def test_a_device_that_forgot_its_work_is_given_other_work_and_holds_no_place(start: Start) -> None:
    plain, urgent = tiny(2, size=3), tiny(1 + 1, name="urgent", size=5)
    running = start({"plain": plain, "urgent": urgent}, priority={"urgent": 5})
    device, _ = running.device(), running.device()
    assert device.work(plain.plan).task == "plain"  # pyright: ignore[reportOptionalMemberAccess]
    assert device.work(plain.plan, urgent.plan).task == "urgent"  # pyright: ignore[reportOptionalMemberAccess]
    assert running.server.counts.events["dropped", "forgotten"] == 1


def test_a_device_with_another_task_is_told_so(start: Start) -> None:
    running = start({"tiny": tiny(2)})
    with pytest.raises(Refused, match="wrong_task"):
        running.device().work(tiny(2, size=7).plan)


def test_evaluation_is_a_sum_too_and_lies_beside_the_model(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle}, evaluate=Evaluating(3))
    devices = [running.device() for _ in range(3)]
    work = [device.check_in(bundle.plan, kinds=("evaluate",)).assignment for device in devices]
    assert [given and (given.kind, given.version) for given in work] == [("evaluate", 0)] * 3
    bodies = [encode_report(evaluation_report(d.id, {"loss": (10.0 * n, 10)}, 10)) for n, d in enumerate(devices, 1)]
    calls = [
        lambda d=d, w=w, b=b: read(Counted, d.request("PUT", path_of(w), b).body)
        for d, w, b in zip(devices, work, bodies, strict=True)
    ]
    answers = together(*calls)
    assert [answer.status for answer in answers] == ["counted"] * 3
    running.server.ask_to_do(lambda now: None).result()
    measured = json.loads(running.models()[0].metrics)["evaluate"]
    assert measured["means"] == {"loss": 2.0}
    assert measured["devices"] == 3
    assert sum(measured["histograms"]["loss"]) == 3
    assert devices[0].check_in(bundle.plan, kinds=("evaluate",)).assignment is None, "a model is measured once"


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_roll_back_trains_on_from_an_earlier_model_under_a_new_number(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    devices = [running.device() for _ in range(2)]
    for value in (1.0, 1.0):
        round_of(running, devices, bundle.plan, value, value)
    work = devices[0].work(bundle.plan, wait_s=20.0)
    assert work is not None
    training = running.server.tasks[0].training
    running.server.ask_to_do(lambda now: training.roll_back(1, now)).result()
    with pytest.raises(Refused, match="closed"):
        devices[0].report(work, update_of(bundle.plan, devices[0].id))
    round_of(running, devices, bundle.plan, 5.0, 5.0)
    models = running.models()
    assert [(m.version, m.parent, m.round is None) for m in models[-2:]] == [(3, 1, True), (4, 3, False)]
    np.testing.assert_allclose(running.weights(devices[0]), -6.0)
    with training.store.transaction() as rows:
        assert rows.run().epoch == 1


def test_devices_answer_with_the_model_that_was_promoted(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle}, releases=False)
    devices = [running.device() for _ in range(2)]
    round_of(running, devices, bundle.plan, 1.0, 1.0)
    assert devices[0].check_in(bundle.plan).released["tiny"].version == 0
    training = running.server.tasks[0].training
    running.server.ask_to_do(lambda now: training.promote(1)).result()
    assert devices[1].check_in(bundle.plan).released["tiny"].version == 1
    with pytest.raises(ExperimentError, match="tiny has no version 7 yet: its newest is 1"):
        running.server.ask_to_do(lambda now: training.promote(7)).result()


def test_only_plans_and_models_may_be_fetched(start: Start) -> None:
    bundle = replace(tiny(2), plan=replace(tiny(2).plan, algorithm=sumus.fedadam(sumus.sgd(lr=0.1), 0.1)))
    running = start({"tiny": bundle})
    device = running.device()
    model = running.models()[0]
    assert device.object(model.broadcast)
    assert running.transport.request("GET", f"/v1/objects/{model.memory}").status == 404
    assert running.transport.request("GET", f"/v1/objects/{'0' * 64}").status == 404


# ── another time ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_restart_goes_on_where_it_was(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    devices = [running.device(number) for number in range(2)]
    round_of(running, devices, bundle.plan, 1.0, 3.0)
    work = [device.work(bundle.plan, wait_s=20.0) for device in devices]
    thread = threading.Thread(target=lambda: together(lambda: devices[0].report(work[0], update_of(bundle.plan, 0))))  # pyright: ignore[reportArgumentType]
    thread.start()
    thread.join()
    again = start({"tiny": bundle}, stop=running)
    devices = [ScriptedDevice(again.transport, number, serial=10) for number in range(2)]
    assert devices[0].check_in(bundle.plan, previous=work[0]).settled == settled(work[0], "counted")
    assert work[1] is not None
    devices[1].report(work[1], update_of(bundle.plan, 1, 5.0))
    again.server.ask_to_do(lambda now: None).result()
    assert [model.contributors for model in again.models()] == [0, 2, 2]
    np.testing.assert_allclose(again.weights(devices[0]), -5.0)


def test_no_two_servers_on_one_folder(start: Start) -> None:
    start({"tiny": tiny(2)})
    with pytest.raises(ExperimentError, match="another server is using"):
        start({"tiny": tiny(2)})


def test_another_plan_for_the_same_task_goes_on_from_its_model(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    devices = [running.device(number) for number in range(2)]
    round_of(running, devices, bundle.plan, 1.0, 1.0)
    work = devices[0].work(bundle.plan, wait_s=20.0)
    other = replace(bundle, plan=replace(bundle.plan, algorithm=sumus.fedadam(sumus.sgd(lr=0.2), 0.1)))
    again = start({"tiny": other}, stop=running)
    devices = [ScriptedDevice(again.transport, number, serial=10) for number in range(2)]
    answer = devices[0].check_in(other.plan, previous=work)
    assert answer.settled == settled(work, "discarded"), "its sum was of the old plan"
    assert [(model.version, model.parent) for model in again.models()] == [(0, None), (1, 0), (2, 1)]
    np.testing.assert_allclose(again.weights(devices[0]), -1.0)
    round_of(again, devices, other.plan, 1.0, 1.0)
    assert again.models()[-1].plan == other.plan.id


@pytest.mark.parametrize("warm", [False, True], ids=["anew", "from the old model"])
def test_a_task_whose_leaves_changed_is_another_version_of_it(start: Start, warm: bool) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    devices = [running.device(number) for number in range(2)]
    round_of(running, devices, bundle.plan, 1.0, 1.0)
    description = bundle.plan.description
    wider = replace(description, leaves=(*description.leaves, Leaf("b", (2,), "float32", "shared", True)))
    larger = Bundle(
        Plan(wider, bundle.plan.algorithm, bundle.plan.pacing, 2, trusts_devices=True),
        {**bundle.model, "b": np.ones(2, np.float32)},
    )
    again = start({"tiny": larger}, stop=running, warm_start=warm)
    assert [task.name for task in again.server.tasks] == ["tiny.2"]
    assert any("version 2 of the task" in note for note in again.service.notes)
    device = ScriptedDevice(again.transport, 0, serial=10)
    params = nested(decode_tree(device.object(again.models("tiny.2")[0].broadcast)))["params"]
    np.testing.assert_allclose(params["w"], -1.0 if warm else 0.0)
    np.testing.assert_allclose(params["b"], 1.0)
    with pytest.raises(Refused, match="wrong_task"):
        device.work(bundle.plan)


def test_a_database_that_is_older_than_what_was_published_is_not_served(start: Start, tmp_path: Path) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    running.service.close()
    head = tmp_path / "data" / "head.json"
    head.write_text(json.dumps({"tiny": {"version": 5, "epoch": 0}}))
    with pytest.raises(ExperimentError, match="version 5 was already published.*sumus reconcile"):
        start({"tiny": bundle})


def test_a_plan_that_cannot_be_served_says_why(start: Start) -> None:
    with pytest.raises(sumus.PlanError, match="min_contributors"):
        start({"tiny": tiny(2, least=1)})
    with pytest.raises(ExperimentError, match="letters, digits"):
        start({"../tiny": tiny(2)})


# ── when something breaks ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_storage_that_fails_is_said_and_nothing_is_lost(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    devices = [running.device() for _ in range(2)]
    work = [device.work(bundle.plan) for device in devices]
    assert work[0] is not None
    training = running.server.tasks[0].training

    def full(body: object) -> str:
        raise ExperimentError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(training.sums._blobs, "put", full)  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(Refused, match="not_ready"):
            devices[0].report(work[0], update_of(bundle.plan, 0))
        assert running.transport.request("GET", "/readyz").status in (200, 503)
    running.server.ask_to_do(lambda now: None).result()
    assert running.transport.request("GET", "/readyz").status == 200
    reports = [
        lambda d=d, w=w: d.report(w, update_of(bundle.plan, d.id, 2.0)) for d, w in zip(devices, work, strict=True)
    ]
    assert [counted.status for counted in together(*reports)] == ["counted"] * 2
    running.server.ask_to_do(lambda now: None).result()
    np.testing.assert_allclose(running.weights(devices[0]), -2.0)


def test_a_sum_that_gives_no_model_pauses_the_run_and_says_why(start: Start) -> None:
    bundle = tiny(2)
    plan = replace(bundle.plan, algorithm=sumus.fedavg(sumus.sgd(lr=0.1), server=sumus.optimizers.sgd(1e38)))
    running = start({"tiny": Bundle(plan, bundle.model)})
    devices = [running.device() for _ in range(2)]
    round_of(running, devices, plan, 200.0, 200.0)
    training = running.server.tasks[0].training
    running.server.ask_to_do(lambda now: None).result()
    assert "gave NaN or infinity" in training.trouble
    assert devices[0].check_in(plan).reason == "paused"
    assert len(running.models()) == 1


# ── updates apart ────────────────────────────────────────────────────────────────────────────────────────────────────


def of_median(cohort: int = 3) -> Bundle:
    """A plan whose rule needs every update apart."""
    bundle = tiny(cohort)
    algorithm = sumus.fedavg(sumus.sgd(lr=0.1), aggregator=sumus.robust.median(sumus.Part("params", weight="uniform")))
    return Bundle(replace(bundle.plan, algorithm=algorithm), bundle.model)


def test_a_rule_that_needs_each_update_is_served_only_where_that_is_wanted(start: Start) -> None:
    with pytest.raises(sumus.PlanError, match="--spool"):
        start({"tiny": of_median()})


def test_spooled_updates_are_sealed_and_give_the_median(start: Start, tmp_path: Path) -> None:
    bundle = of_median()
    running = start({"tiny": bundle}, spool=True)
    devices = [running.device(number) for number in range(3)]
    given = [device.work(bundle.plan) for device in devices]
    together(lambda: devices[0].report(given[0], update_of(bundle.plan, 0, 100.0)))  # pyright: ignore[reportArgumentType]
    sealed = [path.read_bytes() for path in (tmp_path / "data" / "sums").rglob("*") if path.is_file()]
    assert len(sealed) == 1
    for each in (np.full(4, 100.0, np.float32), np.full(4, 100 << bundle.plan.sums.fraction_bits, np.int64)):
        assert each.tobytes() not in sealed[0]
    again = start({"tiny": bundle}, stop=running, spool=True)
    devices = [ScriptedDevice(again.transport, number, serial=10) for number in range(3)]
    calls = [
        lambda d=d, w=w, v=v: d.report(w, update_of(bundle.plan, d.id, v))
        for d, w, v in zip(devices[1:], given[1:], (1.0, 2.0), strict=True)
    ]
    assert [answer.status for answer in together(*calls)] == ["counted"] * 2
    again.models()
    np.testing.assert_allclose(again.weights(devices[0]), -2.0)
    assert not [path for path in (tmp_path / "data" / "sums").rglob("*") if path.is_file()], "nothing is left of them"


# ── what readers found ───────────────────────────────────────────────────────────────────────────────────────────────


def test_another_plan_counts_no_report_of_the_old_one_in_buffers_either(start: Start) -> None:
    bundle = tiny(2, concurrency=4)
    running = start({"tiny": bundle})
    devices = [running.device(number) for number in range(2)]
    work = [device.work(bundle.plan) for device in devices]
    other = replace(bundle, plan=replace(bundle.plan, algorithm=sumus.fedadam(sumus.sgd(lr=0.2), 0.1)))
    again = start({"tiny": other}, stop=running)
    devices = [ScriptedDevice(again.transport, number, serial=10) for number in range(2)]
    for device, given in zip(devices, work, strict=True):
        with pytest.raises(Refused, match="closed"):
            device.report(given, update_of(other.plan, device.id))  # pyright: ignore[reportArgumentType]


def test_a_second_server_on_a_database_takes_over_and_the_first_says_so(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    bundle = tiny(2)
    services = [
        open_service({"tiny": bundle}, Storage(tmp_path / name, url), ServerPolicy(group=0.0))
        for name in ("one", "two")
    ]
    for service in services:
        service.server.start()
    with pytest.raises(Refused, match="not_ready"):
        services[0].server.ask_to_do(lambda now: services[0].server.tasks[0].training.tick(now)).result()
    with pytest.raises(Refused, match="not_ready"):
        services[0].server.ask_to_do(lambda now: None).result()
    assert "taken over" in services[0].server.trouble
    services[1].server.ask_to_do(lambda now: None).result()
    assert services[1].server.trouble == ""
    for service in services:
        service.close()


def test_a_name_that_looks_like_a_version_is_refused(start: Start) -> None:
    with pytest.raises(ExperimentError, match="versions of a task"):
        start({"tiny.2": tiny(2)})


def test_a_start_that_fails_uses_up_no_version(start: Start) -> None:
    running = start({"tiny": tiny(2, least=2)})
    running.service.close()
    with pytest.raises(ExperimentError, match="publishes only metrics of at least"):
        start({"tiny": tiny(2, size=9)}, evaluate=Evaluating(1))
    again = start({"tiny": tiny(2, size=11)})
    assert [task.name for task in again.server.tasks] == ["tiny.2"]


def test_a_round_whose_devices_are_all_done_ends_though_somebody_has_left(start: Start) -> None:
    bundle = tiny(3, over_select=4 / 3)
    running = start({"tiny": bundle})
    devices = [running.device() for _ in range(4)]
    work = [device.work(bundle.plan) for device in devices]
    devices[3].withdraw()
    devices[2].withdraw()
    calls = [
        lambda d=d, w=w: d.report(w, update_of(bundle.plan, d.id)) for d, w in zip(devices[:2], work[:2], strict=True)
    ]
    together(*calls)
    assert [model.contributors for model in running.models()] == [0, 2]


def test_whoever_waits_for_others_is_woken_when_they_have_come(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    first = running.device()
    waiting: list[Any] = []
    thread = threading.Thread(target=lambda: waiting.append(first.work(bundle.plan, wait_s=30.0)))
    thread.start()
    running.device()
    thread.join()
    assert waiting[0] is not None


def test_of_two_reports_of_one_session_the_first_is_counted(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    devices = [running.device() for _ in range(2)]
    sessions = [f"{device.id}/{device.work(bundle.plan).session}" for device in devices]  # pyright: ignore[reportOptionalMemberAccess]
    training, hop = running.server.tasks[0].training, bundle.plan.first_hop

    def both(now: float) -> None:
        for value in (1.0, 9.0):
            reports = [ClearReport(one, hop.check(update_of(bundle.plan, one, value))) for one in sessions]
            training.intake.stage_all(reports, now)
        training.carry_out(training.intake.commit(now), now)

    running.server.ask_to_do(both).result()
    np.testing.assert_allclose(running.weights(devices[0]), -1.0)


def test_a_sum_that_is_missing_stops_its_task_alone_until_it_is_back_or_given_up(start: Start, tmp_path: Path) -> None:
    broken, whole = tiny(2), tiny(2, size=5)
    running = start({"broken": broken, "whole": whole})
    devices = [running.device() for _ in range(2)]
    run = running.server.tasks[0].training
    assert run.task == "broken"
    given = [device.work(broken.plan) for device in devices]
    together(lambda: devices[0].report(given[0], update_of(broken.plan, 0)))  # pyright: ignore[reportArgumentType]
    real, lost = run.sums.total, ExperimentError("blob 00 is missing: restore it from a backup")

    def missing(number: int) -> Any:
        raise lost

    run.sums.total = missing  # pyright: ignore[reportAttributeAccessIssue]
    devices[1].report(given[1], update_of(broken.plan, 1))  # pyright: ignore[reportArgumentType]
    running.server.ask_to_do(lambda now: None).result()
    assert "cannot be closed yet" in run.trouble
    round_of(running, devices, whole.plan, 1.0, 1.0)
    run.sums.total = real  # pyright: ignore[reportAttributeAccessIssue]
    running.server.ask_to_do(lambda now: run.closed.finish(now)).result()
    assert (run.trouble, len(running.models("broken"))) == ("", 2)


def with_adam(bundle: Bundle) -> Bundle:
    """The same task, with another optimizer at the server."""
    return replace(bundle, plan=replace(bundle.plan, algorithm=sumus.fedadam(sumus.sgd(lr=0.1), 0.1)))


@pytest.mark.parametrize("how", ["another plan", "a roll back"])
def test_what_ends_a_round_publishes_none_of_it(start: Start, how: str) -> None:
    bundle = tiny(3)
    running = start({"tiny": bundle})
    devices = [running.device(number) for number in range(3)]
    given = [device.work(bundle.plan) for device in devices]
    calls = [
        lambda d=d, w=w: d.report(w, update_of(bundle.plan, d.id, 9.0))
        for d, w in zip(devices[:2], given[:2], strict=True)
    ]
    assert [answer.status for answer in together(*calls)] == ["counted"] * 2
    if how == "a roll back":
        training = running.server.tasks[0].training
        running.server.ask_to_do(lambda now: training.roll_back(0, now)).result()
    else:
        running = start({"tiny": with_adam(bundle)}, stop=running)
    assert [(model.version, model.round) for model in running.models()] == [(0, None), (1, None)]
    np.testing.assert_allclose(running.weights(ScriptedDevice(running.transport, 0)), 0.0)


def test_a_roll_back_to_a_model_of_another_optimizer_goes_on(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    round_of(running, [running.device(number) for number in range(2)], bundle.plan, 1.0, 1.0)
    adam = with_adam(bundle)
    again = start({"tiny": adam}, stop=running)
    training = again.server.tasks[0].training
    again.server.ask_to_do(lambda now: training.roll_back(1, now)).result()
    devices = [ScriptedDevice(again.transport, number, serial=10) for number in range(2)]
    round_of(again, devices, adam.plan, 1.0, 1.0)
    assert [model.parent for model in again.models()] == [None, 0, 1, 1, 3]
    assert training.trouble == ""


def measured_by(running: Running, devices: list[ScriptedDevice], plan: Plan, *losses: float | None) -> list[Any]:
    """Let these devices evaluate; None for a figure that is left out."""
    work = [device.check_in(plan, kinds=("evaluate",)).assignment for device in devices]
    bodies = [
        encode_report(
            evaluation_report(d.id, {"loss": (0.0 if loss is None else loss * 10, 0 if loss is None else 10)}, 10)
        )
        for d, loss in zip(devices, losses, strict=True)
    ]
    calls = [
        lambda d=d, w=w, b=b: read(Counted, d.request("PUT", path_of(w), b).body)
        for d, w, b in zip(devices, work, bodies, strict=True)
    ]
    return together(*calls)


def test_a_figure_that_too_few_have_given_is_in_no_metric(start: Start) -> None:
    bundle = tiny(3, least=3)
    running = start({"tiny": bundle}, evaluate=Evaluating(3))
    devices = [running.device() for _ in range(3)]
    measured_by(running, devices, bundle.plan, 1.0, None, None)
    found = json.loads(running.models()[0].metrics)["evaluate"]
    assert (found["means"], found["histograms"], found["devices"]) == ({}, {}, 3)


def test_a_model_that_was_measured_is_not_measured_again_under_another_number(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle}, evaluate=Evaluating(2))
    devices = [running.device() for _ in range(3)]
    measured_by(running, devices[:2], bundle.plan, 1.0, 2.0)
    training = running.server.tasks[0].training
    running.server.ask_to_do(lambda now: training.roll_back(0, now)).result()
    assert devices[2].check_in(bundle.plan, kinds=("evaluate",)).assignment is None
    assert json.loads(running.models()[1].metrics) == {"evaluate": json.loads(running.models()[0].metrics)["evaluate"]}


def test_another_metric_in_the_plan_ends_the_evaluation_that_is_open(start: Start) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle}, evaluate=Evaluating(2))
    devices = [running.device(number) for number in range(2)]
    work = [device.check_in(bundle.plan, kinds=("evaluate",)).assignment for device in devices]
    body = encode_report(evaluation_report(devices[0].id, {"loss": (1.0, 1)}, 1))
    together(lambda: devices[0].request("PUT", path_of(work[0]), body))  # pyright: ignore[reportArgumentType]
    task = replace(bundle.plan.description, metrics=("accuracy",))
    other = replace(bundle, plan=replace(bundle.plan, task=task))
    again = start({"tiny": other}, stop=running, evaluate=Evaluating(2))
    devices = [ScriptedDevice(again.transport, number, serial=10) for number in range(2)]
    assert devices[0].check_in(other.plan, previous=work[0]).settled is not None
    given = devices[1].check_in(other.plan, kinds=("evaluate",)).assignment
    assert (given and given.kind) == "evaluate"
    assert again.server.trouble == ""


def without_its_sums(running: Running, patch: pytest.MonkeyPatch) -> Any:
    """The training run, whose sums cannot be read for now."""
    run = running.server.tasks[0].training

    def missing(number: int) -> Any:
        raise ExperimentError("blob 00 is missing: restore it from a backup")

    patch.setattr(run.sums, "total", missing)
    return run


def test_behind_a_sum_that_cannot_be_read_yet_others_wait_and_none_is_lost(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny(2, concurrency=4)
    running = start({"tiny": bundle})
    devices = [running.device() for _ in range(4)]
    given = [device.work(bundle.plan) for device in devices]
    with monkeypatch.context() as patch:
        run = without_its_sums(running, patch)
        for pair in (0, 2):
            calls = [
                lambda d=d, w=w: d.report(w, update_of(bundle.plan, d.id))
                for d, w in zip(devices[pair : pair + 2], given[pair : pair + 2], strict=True)
            ]
            assert [answer.status for answer in together(*calls)] == ["counted"] * 2
        running.server.ask_to_do(lambda now: None).result()
        assert run.closed.unfinished == [0, 1]
    running.server.ask_to_do(run.closed.finish).result()
    assert [model.contributors for model in running.models()] == [0, 2, 2]
    assert (run.closed.unfinished, run.trouble, run.paused) == ([], "", False)


@pytest.mark.parametrize("how", ["cancelled", "rolled back"])
def test_a_round_that_cannot_be_closed_may_be_given_up_and_the_next_begins(
    start: Start, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    bundle = tiny(2)
    running = start({"tiny": bundle})
    devices = [running.device() for _ in range(2)]
    with monkeypatch.context() as patch:
        run = without_its_sums(running, patch)
        round_of(running, devices, bundle.plan, 1.0, 1.0)
        running.server.ask_to_do(
            lambda now: cancel_newest(run, now) if how == "cancelled" else run.roll_back(0, now)
        ).result()
    assert (run.closed.unfinished, run.trouble, run.paused) == ([], "", False)
    round_of(running, devices, bundle.plan, 3.0, 3.0)
    np.testing.assert_allclose(running.weights(devices[0]), -3.0)
