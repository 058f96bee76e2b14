"""A status says what a server waits for, and names no device."""

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import msgspec
import pytest

import sumus
from sumus.device.words import WAITS
from sumus.evaluation import evaluation_report
from sumus.operations.display import shown
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.server.evaluation import Evaluating
from sumus.server.refusals import WORDS, Refusals
from sumus.server.status import CLEAR_MODE, ServerStatus, look
from sumus.transport.inprocess import InProcess
from sumus.wire.messages import AbortReason, Refused
from tests.server.devices import ScriptedDevice, tiny, update_of


class Served:
    """A server in memory, and how its devices are made."""

    def __init__(self, service: Service, transport: InProcess) -> None:
        self.service, self.server, self.transport = service, service.server, transport
        self.token = self.server.roll.new_token("default", self.server.clock(), uses=100)

    def devices(self, count: int) -> list[ScriptedDevice]:
        devices = [ScriptedDevice(self.transport, number) for number in range(count)]
        for device in devices:
            device.enrol(self.token)
        return devices

    def now(self) -> ServerStatus:
        return asyncio.run(look(self.server))

    def waiting(self, which: int = 0) -> str:
        return self.now().tasks[0].runs[which].waiting


@contextmanager
def served(cohort: int = 3, evaluate: Evaluating | None = None, **pacing: object) -> Iterator[Served]:
    bundle = tiny(cohort, **pacing)
    service = open_service({"tiny": bundle}, policy=ServerPolicy(evaluate=evaluate, group=0.0))
    service.server.start()
    with InProcess(service.device_app) as transport:
        yield Served(service, transport)
    service.close()


PLAN = tiny().plan


def test_a_round_says_what_it_waits_for_from_its_first_device_to_its_model() -> None:
    with served() as it:
        assert it.waiting() == "needs 2 more: 0 devices of at least 2 enrolled"
        one, two, three = it.devices(3)
        assert it.waiting() == "no device has asked for work yet; 3 are enrolled"
        works = [device.work(PLAN) for device in (one, two, three)]
        assert it.waiting() == "0 of 3 reports; 3 devices train"
        one.report(works[0], update_of(PLAN, 1))  # pyright: ignore[reportArgumentType]
        two.report(works[1], update_of(PLAN, 2))  # pyright: ignore[reportArgumentType]
        assert it.waiting() == "2 of 3 reports; 1 device trains"
        three.report(works[2], update_of(PLAN, 3))  # pyright: ignore[reportArgumentType]
        status = it.now().tasks[0]
        assert (status.version, status.released, status.model.contributors) == (1, 1, 3)
        assert status.model.staleness == {"0": 3}
        assert status.model.train == {"loss": 0.5}
        assert status.runs[0].round == 1


def test_a_buffer_waits_for_devices_when_nobody_trains_and_shows_how_late_reports_were() -> None:
    with served(2, concurrency=3) as it:
        plan = tiny(2, concurrency=3).plan
        one, two, three = it.devices(3)
        works = [device.work(plan) for device in (one, two, three)]
        one.report(works[0], update_of(plan, 1))  # pyright: ignore[reportArgumentType]
        two.report(works[1], update_of(plan, 2))  # pyright: ignore[reportArgumentType]
        assert it.waiting() == "0 of 2 reports; 1 device trains"
        three.report(works[2], update_of(plan, 3))  # pyright: ignore[reportArgumentType]
        assert it.waiting() == "1 of 2 reports; waits for devices to ask for work"
        work = one.work(plan)
        assert work is not None
        one.report(work, update_of(plan, 1))
        assert it.now().tasks[0].model.staleness == {"0": 1, "1": 1}


def test_a_pause_says_who_made_it() -> None:
    with served() as it:
        run = it.server.tasks[0].training
        it.server.ask_to_do(lambda now: run.pause()).result()
        assert it.waiting() == "paused by an admin"
        it.server.ask_to_do(lambda now: run.pause("round 7 gave no model: its sum overflows")).result()
        assert it.waiting() == "paused: round 7 gave no model: its sum overflows"
        it.server.ask_to_do(lambda now: run.resume()).result()
        assert "paused" not in it.waiting()


def test_what_devices_measured_stands_beside_the_model_that_they_measured() -> None:
    with served(evaluate=Evaluating(cohort=2)) as it:
        one, two = it.devices(2)
        assert it.waiting(1) == "no device has asked for work yet; 2 are enrolled"
        for device in (one, two):
            work = device.check_in(PLAN, kinds=("evaluate",)).assignment
            assert work is not None
            device.report(work, evaluation_report(device.id, {"loss": (2.0, 4)}, 4))
        status = it.now()
        measured = status.tasks[0].evaluated
        assert measured is not None
        assert (measured.version, measured.evaluate["means"], measured.evaluate["devices"]) == (0, {"loss": 0.5}, 2)
        assert sum(measured.evaluate["histograms"]["loss"]) == 2
        assert it.waiting(1) == "all models that should be measured have been measured"


def test_it_counts_what_happened_and_names_no_device() -> None:
    with served() as it:
        devices = it.devices(3)
        for device in devices:
            work = device.work(PLAN)
            assert work is not None
            device.report(work, update_of(PLAN, 1))
        ScriptedDevice(it.transport, 99).request("POST", "/v1/checkins", b"{}")
        status = it.now()
        assert status.devices == 3
        assert status.mode == CLEAR_MODE
        assert status.events["enrolments"] == {"new": 3}
        assert status.events["check-ins"] == {"assigned": 3}
        assert status.events["reports"] == {"counted": 3}
        assert status.events["refused"] == {"unknown_device": 1}
        assert status.bytes_in > 0
        text = msgspec.json.encode(status).decode()
        assert not any(device.id in text or device.session in text for device in devices)


def test_while_storage_fails_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as it:

        def fails(*asked: object) -> None:
            raise OSError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(it.server.tasks[0].training, "recover", fails)
            patch.setattr(it.server.tasks[0].training, "tick", fails)
            with pytest.raises(Exception, match="not_ready"):
                it.server.ask_to_do(fails).result()
            status = it.now()
            assert "the disk is full" in status.trouble
            assert status.tasks == ()
        assert it.now().trouble == ""


def printed(now: ServerStatus, capsys: pytest.CaptureFixture[str]) -> str:
    from rich.console import Console

    Console(width=200).print(shown(json.loads(msgspec.json.encode(now))))
    return capsys.readouterr().out


def test_a_terminal_shows_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with served(evaluate=Evaluating(cohort=2)) as it:
        for device in it.devices(3):
            work = device.check_in(PLAN, kinds=("train",)).assignment
            assert work is not None
            device.report(work, update_of(PLAN, 1))
        out = printed(it.now(), capsys)
    for said in ("3 devices enrolled", CLEAR_MODE, "what it waits for", "tiny: version 1 of 3 reports", "loss 0.5000"):
        assert said in out


# ── why devices took no part ─────────────────────────────────────────────────────────────────────────────────────────


def test_what_devices_refused_is_said_in_words_and_counts_each_device_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with served(deadline=1000.0) as it:
        for device in it.devices(2):
            work = device.work(PLAN)
            assert work is not None
            device.abort(work, "floor-rounds")
        first, *others = it.now().refusals
        assert (first.task, first.kind, first.why, first.devices) == ("tiny", "train", "floor-rounds", 2)
        assert first.said.startswith(
            "2 devices: already took part in as many rounds today as the owner consents to (24 by default;"
        )
        assert {other.why for other in others} <= {"resting"}
        text = printed(it.now(), capsys)
        assert (
            "devices that took no part in the last 10 minutes:\n    tiny train: 2 devices: already took part in" in text
        )


@pytest.mark.parametrize(
    ("pacing", "asked", "said"),
    [
        ({"requires": sumus.Conditions(charging=True)}, {}, "1 device: not charging, but the plan requires it"),
        ({"requires": sumus.Conditions(idle=True)}, {}, "1 device: in use, but the plan requires an idle device"),
        (
            {"requires": sumus.Conditions(version=7)},
            {},
            "1 device: an older version of its program than the plan requires",
        ),
        ({}, {"kinds": ("evaluate",)}, "1 device: measures models, and does not train"),
    ],
)
def test_what_keeps_devices_from_work_is_said(pacing: Any, asked: Any, said: str) -> None:
    with served(**pacing) as it:
        device = it.devices(2)[0]
        for _ in range(3):
            assert device.check_in(PLAN, **asked).assignment is None
        (only,) = it.now().refusals
        assert only.said.startswith(said)


def test_a_device_of_another_release_and_a_report_of_no_use_are_said() -> None:
    with served() as it:
        one, two, _ = it.devices(3)
        with pytest.raises(Refused, match="wrong_task"):
            one.check_in(tiny(size=5).plan)
        work = two.work(PLAN)
        assert work is not None
        with pytest.raises(Refused):
            two.report(work, update_of(PLAN, 1, value=float("nan")))
        said = {each.why: each.said for each in it.now().refusals}
        assert said["wrong_task"].startswith("1 device: its file has another model or other data than any task here")
        assert said["not_finite"] == "1 device: reported NaN or infinity"


def test_who_took_part_after_all_and_what_is_long_past_is_not_said() -> None:
    refusals = Refusals()
    for device in "abc":
        refusals.note("tiny", "train", "charging", device, 0.0)
    refusals.note("tiny", "evaluate", "only trains", "a", 0.0)
    refusals.note("", "", "wrong_task", "c", 0.0)
    refusals.took_part("tiny", "train", "a")
    assert [(each.why, each.devices) for each in refusals.seen(0.0)] == [
        ("charging", 2), ("wrong_task", 1), ("only trains", 1),
    ]  # fmt: skip
    refusals.note("tiny", "train", "charging", "b", 500.0)
    assert [(each.why, each.devices) for each in refusals.seen(601.0)] == [("charging", 1)]
    assert refusals.seen(1101.0) == ()


def test_what_is_remembered_of_refusals_is_bounded() -> None:
    refusals = Refusals()
    for number in range(10_100):
        refusals.note("tiny", "train", "idle", str(number), 0.0)
        refusals.note("tiny", "train", f"a word of its own {number}", str(number), 0.0)
    assert [(each.why, each.devices) for each in refusals.seen(0.0)] == [("idle", 10_000)]


def test_every_reason_of_the_protocol_has_words() -> None:
    assert set(get_args(AbortReason)) <= set(WORDS)
    assert {field.name for field in dataclasses.fields(sumus.Conditions)} <= set(WORDS)
    assert set(WAITS) >= {
        "few",
        "full",
        "pace",
        "paused",
        *(field.name for field in dataclasses.fields(sumus.Conditions)),
    }
