"""Check-ins that wait together are decided together, with few transactions."""

from collections.abc import Iterator
from typing import Any

import pytest

from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.rounds.run import DeviceCheckIn
from sumus.server.committer import PendingRequest
from sumus.server.evaluation import Evaluating
from sumus.server.requests import Item
from sumus.transport.inprocess import InProcess
from sumus.wire.messages import CheckInAnswer, CheckInRequest, Kind, PreviousSession, Refused
from tests.server.devices import ScriptedDevice, tiny, together, update_of

PEOPLE = 4
BUNDLE = tiny(PEOPLE)
FINGERPRINTS = (BUNDLE.plan.description.fingerprint,)


class Together:
    """A server in this process, and check-ins that it decides in one turn."""

    def __init__(self, service: Service, transport: InProcess) -> None:
        self.service, self.server = service, service.server
        token = self.server.roll.new_token("default", self.server.clock(), uses=PEOPLE)
        self.devices = [ScriptedDevice(transport, number) for number in range(PEOPLE)]
        for device in self.devices:
            device.enrol(token)

    def ask(self, requests: list[tuple[ScriptedDevice, CheckInRequest]]) -> list[Any]:
        """What each of these devices is told, in one turn."""
        waiting = [PendingRequest[Item](DeviceCheckIn(device.id, request)) for device, request in requests]
        decide = self.server._check_ins.decide  # pyright: ignore[reportPrivateUsage]
        self.server.ask_to_do(lambda now: decide(waiting, now)).result()
        return [each.answer.exception() or each.answer.result() for each in waiting]


@pytest.fixture
def them() -> Iterator[Together]:
    service = open_service({"tiny": BUNDLE}, policy=ServerPolicy(evaluate=Evaluating(2), group=0.0))
    service.server.start()
    with InProcess(service.device_app) as transport:
        yield Together(service, transport)
    service.close()


def asks_about(session: str, kind: Kind = "train", task: str = "tiny", serial: int = 9) -> CheckInRequest:
    """A check-in that asks what became of an earlier session."""
    previous = PreviousSession(task, kind, session)
    return CheckInRequest(serial, f"s{serial}", FINGERPRINTS, (kind,), previous=previous)


def test_what_became_of_earlier_sessions_is_one_transaction_for_all_devices_that_ask(
    them: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [device.work(BUNDLE.plan) for device in them.devices]
    assert all(works)
    reports = [
        lambda device=device, work=work: device.report(work, update_of(BUNDLE.plan, device.id))  # type: ignore[misc]
        for device, work in zip(them.devices, works, strict=True)
    ]
    together(*reports)
    coordinator = them.server.tasks[0].training.coordinator
    real, calls = coordinator.check_in_all, list[list[bool]]()

    def counted(asked: Any, now: float) -> Any:
        calls.append([event.works for _, event in asked])
        return real(asked, now)

    monkeypatch.setattr(coordinator, "check_in_all", counted)
    answers = them.ask(
        [(device, asks_about(work.session)) for device, work in zip(them.devices, works, strict=True) if work]
    )
    assert [answer.settled.outcome for answer in answers] == ["counted"] * PEOPLE
    assert [works for works in calls if not all(works)] == [[False] * PEOPLE]


def test_each_device_hears_of_its_own_session_whatever_the_others_ask(them: Together) -> None:
    first, second, third, fourth = them.devices
    work = first.work(BUNDLE.plan)
    given_up = second.work(BUNDLE.plan)
    assert work is not None
    assert given_up is not None
    second.abort(given_up)
    answers = them.ask(
        [
            (first, asks_about(work.session)),
            (second, asks_about(given_up.session)),
            (third, asks_about("never-given")),
            (fourth, asks_about("s1", task="gone")),
        ]
    )
    assert [answer.settled.outcome for answer in answers] == ["unknown", "discarded", "discarded", "discarded"]
    assert answers[0].assignment is None, "it is to send that report again first"
    assert (answers[1].assignment, answers[1].reason) == (None, "resting"), "it has just given a place up"
    assert all(answer.assignment is not None for answer in answers[2:])


def test_a_check_in_is_the_last_of_its_device_or_is_refused(them: Together) -> None:
    device = them.devices[0]
    early, late = (CheckInRequest(serial, f"s{serial}", FINGERPRINTS) for serial in (3, 4))
    refused, answered = them.ask([(device, early), (device, late)])
    assert isinstance(refused, Refused)
    assert (refused.problem.code, refused.problem.serial) == ("replayed", 4)
    assert isinstance(answered, CheckInAnswer)
    assert answered.assignment is not None
