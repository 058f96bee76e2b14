"""A server for one test. It checks signatures and forms, and answers as the test tells it to. It adds no reports."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from torch import nn

import sumus
from sumus.device.conditions import AllConditionsMet
from sumus.device.device import Device
from sumus.device.keys import keyed
from sumus.device.options import Consent, DeviceProfile, DeviceSystem, ServerConnection
from sumus.device.training import Training
from sumus.errors import ParticipantError
from sumus.pacing import Pacing
from sumus.plan import Plan
from sumus.protocol.session import Floor
from sumus.transport.transport import Answer
from sumus.tree import unnested
from sumus.wire.messages import (
    STATUS,
    Abort,
    Assignment,
    Body,
    Challenge,
    CheckInAnswer,
    CheckInRequest,
    Counted,
    Enrolment,
    EnrolmentRequest,
    Nothing,
    Problem,
    Released,
    Settlement,
    enrolment_text,
    read,
    signed_text,
    write,
)
from sumus.wire.signing import device_id, from_base64url, read_public_key, verify
from sumus.wire.tensors import encode_tree

SEED = bytes(range(32))
FREE = Floor(contributors=0, rounds=1000)


def some_examples(client: int = 0, count: int = 12) -> tuple[Any, Any]:
    rng = np.random.default_rng(client)
    inputs = rng.normal(size=(count, 4)).astype(np.float32)
    return inputs, (inputs.sum(1, keepdims=True) > 0).astype(np.float32)


def a_task(**changes: Any) -> sumus.Task:
    return sumus.Task(
        **{
            "model": lambda: nn.Linear(4, 1),
            "loss": sumus.losses.mean_squared_error,
            "metrics": {"error": sumus.metrics.mean_absolute_error},
            **changes,
        }
    )


TEN = Pacing(cohort=10)
FEDAVG = sumus.fedavg(sumus.sgd(lr=0.1, epochs=2, batch_size=5))
SCAFFOLD = sumus.scaffold(sumus.sgd(lr=0.1, epochs=1, batch_size=5))


@dataclass
class Served:
    """A `Transport` to a server with one task.

    Attributes:
        algorithm: The algorithm of its plan.
        works: How many more assignments it gives.
        fates: By request (check_in, report, abort, object, withdraw, enrol), what is answered instead, from the front.
            None means the usual answer; a function is called with the usual answer.
        asked: Every request that came, with its name.
        counted: The reports by session.
    """

    algorithm: sumus.Algorithm = FEDAVG
    works: int = 1
    kind: str = "train"
    contributors: int = 10
    version: int = 3
    releases: bool = False
    fates: dict[str, list[Any]] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    sessions: dict[str, str] = field(default_factory=dict)
    counted: dict[str, bytes] = field(default_factory=dict)
    keys: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=lambda: {"token"})
    pacing: Pacing = TEN
    task: Any = None
    on_report: Callable[[str], None] = lambda session: None

    def __post_init__(self) -> None:
        training = Training(self.task or a_task(), some_examples())
        self.plan = Plan(training.description, self.algorithm, self.pacing, trusts_devices=True)
        self.state = self.algorithm.start(training.program.initial_shared, training.description)
        self.objects: dict[str, bytes] = {}
        self.plan_body = self.keep(self.plan.to_json().encode())
        self.broadcast = self.keep(encode_tree(unnested(self.state.broadcast)))
        self.model = self.keep(encode_tree(self.algorithm.release(self.state)))
        self.serials: dict[str, int] = {}

    def keep(self, body: bytes) -> Body:
        name = hashlib.sha256(body).hexdigest()
        self.objects[name] = body
        return Body(name, len(body))

    def close(self) -> None: ...

    def named(self, name: str) -> list[Any]:
        return [what for asked, what in self.asked if asked == name]

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        patience: float = 30.0,
        most: int = 2**20,
    ) -> Answer:
        try:
            name, what, where = self._understood(method, path, body)
        except ParticipantError:  # cut off on its way
            return refused("malformed")
        device = headers.get("Sumus-Device", "")
        assert headers["Sumus-Protocol"] == "1"
        self.asked.append((name, what))
        if name in ("check_in", "report", "abort", "withdraw"):
            if device not in self.keys:
                return refused("unknown_device")
            text = signed_text(method, path, "people", device, body)
            if not verify(self.keys[device], from_base64url(headers["Sumus-Signature"]), text):
                return refused("bad_signature")
        fates = self.fates.get(name, [])
        fate = fates.pop(0) if fates else None
        if callable(fate):
            fate = fate(lambda: self._usual(name, what, where, device, body))
        if isinstance(fate, BaseException):
            raise fate
        return self._usual(name, what, where, device, body) if fate is None else fate

    def _understood(self, method: str, path: str, body: bytes) -> tuple[str, Any, re.Match[str] | None]:
        if path == "/v1/enrolments/challenge":
            return "challenge", read(Nothing, body), None
        if path == "/v1/enrolments":
            return "enrol", read(EnrolmentRequest, body), None
        if path == "/v1/withdrawals":
            return "withdraw", read(Nothing, body), None
        if path == "/v1/checkins":
            return "check_in", read(CheckInRequest, body), None
        if match := re.fullmatch(r"/v1/objects/([0-9a-f]{64})", path):
            assert method == "GET"
            return "object", match[1], match
        match = re.fullmatch(r"/v1/tasks/(\w+)/(train|evaluate)/([A-Za-z0-9_-]+)(/abort)?", path)
        assert match, path
        if match[4]:
            return "abort", read(Abort, body).reason, match
        assert method == "PUT"
        return "report", body, match

    def _usual(self, name: str, what: Any, where: Any, device: str, body: bytes) -> Answer:
        match name:
            case "challenge":
                return Answer(200, {}, write(Challenge("nonce", 60.0)))
            case "enrol":
                return self._enrol(what)
            case "withdraw":
                del self.keys[device]
                return Answer(200, {}, b"{}")
            case "object":
                return Answer(200, {}, self.objects[what]) if what in self.objects else refused("not_found")
            case "check_in":
                return self._check_in(device, what)
            case "abort":
                self.sessions[where[3]] = "discarded"
                return Answer(200, {}, b"{}")
            case _:
                return self._report(where[3], body)

    def _enrol(self, asked: EnrolmentRequest) -> Answer:
        key = read_public_key(asked.public_key)
        text = enrolment_text(asked.nonce, asked.public_key, asked.token)
        assert verify(key, from_base64url(asked.signature), text)
        if device_id(key) not in self.keys:
            if asked.token not in self.tokens:
                return refused("bad_token")
            self.tokens.discard(asked.token)
        self.keys[device_id(key)] = key
        return Answer(200, {}, write(Enrolment(device_id(key), "people")))

    def _check_in(self, device: str, asked: CheckInRequest) -> Answer:
        if asked.serial <= self.serials.get(device, 0):
            return refused("replayed", serial=self.serials[device])
        self.serials[device] = asked.serial
        released = {"a": Released(self.version, self.model)} if self.releases else {}
        settled = None
        if asked.previous is not None:
            outcome = self.sessions.get(asked.previous.session, "discarded")
            settled = Settlement(asked.previous.session, "unknown" if outcome == "assigned" else outcome)  # type: ignore
            if outcome == "assigned":
                return Answer(200, {}, write(CheckInAnswer(settled=settled)))
        if not self.works or self.plan.description.fingerprint not in asked.fingerprints:
            return Answer(200, {}, write(CheckInAnswer(settled, None, (5.0, 10.0), "no work", released)))
        self.works -= 1
        self.sessions[asked.session] = "assigned"
        work = Assignment(
            "a",
            self.kind,
            asked.session,
            self.version,
            self.plan_body,
            self.broadcast,
            SEED.hex(),
            self.contributors,
            600.0,  # type: ignore
        )
        return Answer(200, {}, write(CheckInAnswer(settled, work, None, "", released)))

    def _report(self, session: str, body: bytes) -> Answer:
        self.on_report(session)
        if session not in self.sessions:
            return refused("unknown_session")
        if self.sessions[session] == "discarded":
            return refused("closed")
        before = self.counted.get(session)
        assert before in (None, body), "the same bytes at each time"
        self.counted[session], self.sessions[session] = body, "counted"
        return Answer(200, {}, write(Counted(duplicate=before is not None)))


def refused(code: str, window: tuple[float, float] | None = None, serial: int | None = None) -> Answer:
    return Answer(STATUS[code], {}, write(Problem(code, "said so", window, serial=serial)))


class Clock:
    """A clock that advances when `sleep` is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def a_device(server: Any, **changes: Any) -> Device:
    """Return a device for a test: its keys are not random, it has its own clock, and it consents to nearly everything.

    `changes` are fields of any of the device's options, or `task`, `examples` and `clock`.
    """
    clock = changes.pop("clock", None) or Clock()
    options: dict[str, Any] = {
        "token": "token",
        "transport": server,
        "floor": FREE,
        "sensors": AllConditionsMet(),
        "keys": keyed(7),
        "name": "alice",
        "clock": clock,
        "sleep": clock.sleep,
        "today": lambda: 1,
        "executor": "autograd",
        **changes,
    }
    task, examples = options.pop("task", None) or a_task(), options.pop("examples", None) or some_examples()

    def of(kind: Any) -> dict[str, Any]:
        return {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}

    consent, connection, system = Consent(**of(Consent)), ServerConnection(**of(ServerConnection)), of(DeviceSystem)
    profile = DeviceProfile(**of(DeviceProfile), system=DeviceSystem(**system))
    return Device(
        "https://example.org", task, examples, consent=consent, connection=connection, profile=profile, **options
    )
