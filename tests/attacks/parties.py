"""A server in this process, and the parties that send it requests: honest devices, edges that a test plays, and
attackers."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from sumus.aggregate import RunningSum
from sumus.device.requests import Requests
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.plan import Plan
from sumus.transport.inprocess import InProcess
from sumus.wire.bundle import Bundle
from sumus.wire.messages import Assignment, Counted, Refused, RelayedAnswer, RelayRequest
from sumus.wire.reports import encode_sum
from tests.server.devices import ScriptedDevice, update_of

HERE = Storage()


class Parties:
    """The server of one task, `tiny`.

    Attributes:
        plan: The task's plan.
        run: Its training run.
    """

    def __init__(self, bundle: Bundle, service: Service, transport: InProcess) -> None:
        self.plan, self.server, self.transport = bundle.plan, service.server, transport
        self.run = service.server.tasks[0].training
        self._number = 0

    def token(self, uses: int = 1, speaks_for: int = 0) -> str:
        """Return a new enrolment token."""
        return self.server.roll.new_token("default", self.server.clock(), uses, speaks_for=speaks_for)

    def stranger(self) -> ScriptedDevice:
        """Return a device with a new key, which is not enrolled here."""
        self._number += 1
        return ScriptedDevice(self.transport, self._number)

    def device(self, token: str = "") -> ScriptedDevice:
        """Return a device that is enrolled with this token, or with one of its own."""
        device = self.stranger()
        device.enrol(token or self.token())
        return device

    def edge(self, speaks_for: int, token: str = "") -> "EdgeParty":
        """Return an edge that a test plays, enrolled with a token for this many devices."""
        self._number += 1
        requests = Requests(self.transport, self._number.to_bytes(32, "big"))
        requests.enrol(token or self.token(speaks_for=speaks_for))
        return EdgeParty(requests, self.plan)

    def works(self, devices: Sequence[ScriptedDevice]) -> list[Assignment]:
        """Return the work that devices are given; each must get some."""
        works = [device.work(self.plan) for device in devices]
        assert all(work is not None for work in works)
        return [work for work in works if work is not None]

    def let_rest(self, device: ScriptedDevice) -> None:
        """Wait until a device that let its place go may have another. It held the place for only a moment here."""
        with self.run.store.transaction() as rows:
            known = rows.device(device.id)
        if known is not None:
            time.sleep(max(0.0, known.rests_until - self.server.clock()))

    def settled(self) -> int:
        """Return the newest model's version, once all work is done."""
        self.server.ask_to_do(lambda now: None).result()
        return self.run.version

    def report(self, device: ScriptedDevice, work: Assignment, examples: int = 10, value: float = 1.0) -> str:
        """Send a report, and return "counted", or the code of the refusal. Its loss is over one prediction, for any
        number of examples."""
        update = replace(update_of(self.plan, device.id, value, examples), metrics={"loss": (0.7, 1)})
        return code_of(lambda: device.report(work, update))


class EdgeParty:
    """An edge without a program behind it: it sends what a test wants."""

    def __init__(self, requests: Requests, plan: Plan) -> None:
        self.requests, self.plan, self.id = requests, plan, requests.device

    def relay(self, *devices: ScriptedDevice, serial: int = 1, members: int = 1) -> tuple[RelayedAnswer, ...]:
        """Pass on check-ins that these devices signed."""
        asked = tuple(device.relayed(self.plan, serial=serial) for device in devices)
        return self.requests.relay(RelayRequest(members, asked)).answers

    def withdraw(self) -> None:
        """Withdraw."""
        self.requests.withdraw()

    def send(self, sessions: Sequence[str], examples: int = 10) -> Counted:
        """Send the sum of these sessions, each as `DEVICE/SESSION`. examples: of each session."""
        hop, total = self.plan.first_hop, RunningSum()
        for session in sessions:
            hop.count_in(update_of(self.plan, session, examples=examples), total)
        return self.requests.report_sum("tiny", "train", encode_sum(sessions, total.total, hop))


@contextmanager
def parties(bundle: Bundle, where: Storage = HERE, **policy: Any) -> Iterator[Parties]:
    """A server of one task that commits each report at once, and enough sleeping devices for a round to begin."""
    service = open_service({"tiny": bundle}, where, ServerPolicy(group=0.0, **policy))
    service.server.start()
    transport = InProcess(service.device_app)
    them = Parties(bundle, service, transport)
    for _ in range(bundle.plan.pacing.cohort):
        them.device()
    try:
        yield them
    finally:
        transport.close()
        service.close()


def given(answers: Sequence[RelayedAnswer]) -> list[bool]:
    """Return which of an edge's devices were given work."""
    return [each.answer is not None and each.answer.assignment is not None for each in answers]


def code_of(call: Callable[[], object]) -> str:
    """Return the code of the error of a request; "counted" if there is none."""
    try:
        call()
    except Refused as refused:
        return refused.problem.code
    return "counted"


def refused(call: Callable[[], object]) -> str:
    """Return the code of the error of a request, which must have one."""
    with pytest.raises(Refused) as error:
        call()
    return error.value.problem.code
