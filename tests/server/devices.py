"""Devices that send what a test tells them to send, signed like real ones; and a plan small enough to compute by hand.

    bundle = tiny(cohort=3)
    device = ScriptedDevice(transport, 1)
    device.enrol(token)
    work = device.work(bundle.plan)                  an assignment; None if there is none
    device.report(work, update_of(bundle.plan, 1, value=2.0))

A server's answer is returned as its message. If the answer is an error, `Refused` is raised with its code.
"""

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

import sumus
from sumus.aggregate import Update
from sumus.plan import Plan
from sumus.task import Data, Description, Leaf
from sumus.transport.transport import Answer, Transport
from sumus.wire.bundle import Bundle
from sumus.wire.messages import (
    CHECK_IN,
    MAX_UNDIGESTED,
    Abort,
    Assignment,
    Challenge,
    CheckInAnswer,
    CheckInRequest,
    Counted,
    Enrolment,
    EnrolmentRequest,
    Kind,
    Nothing,
    PreviousSession,
    Problem,
    Refused,
    Relayed,
    digest_of,
    enrolment_text,
    read,
    signed_text,
    write,
)
from sumus.wire.reports import encode_report
from sumus.wire.signing import device_id, public_key_of, sign, to_base64url

MOST = 2**30


def tiny(
    cohort: int = 3, size: int = 4, least: int = 2, name: str = "tiny", lr: float = 0.1, rounds: int = 1, **pacing: Any
) -> Bundle:
    """Return FedAvg with one leaf `w` of zeros, float32 `(size,)`: each model is the one before minus the mean of the
    reports, weighted by examples. rounds: of edges of their own."""
    description = Description(
        name,
        (Leaf("w", (size,), "float32", "shared", True),),
        "loss",
        (),
        Data((3,), "float32", (), "int64", 2),
    )
    algorithm, edges = sumus.fedavg(sumus.sgd(lr=lr)), sumus.Edges(rounds)
    plan = Plan(description, algorithm, sumus.Pacing(cohort, **pacing), least, edges=edges, trusts_devices=True)
    return Bundle(plan, {"w": np.zeros(size, np.float32)})


def update_of(plan: Plan, client: object, value: float = 1.0, examples: int = 10, loss: float = 0.5) -> Update:
    """Return an update of a plan's form, with every number equal to `value`."""
    hop = plan.first_hop
    parts = {
        part.name: {leaf: np.full(shape, value, np.float32) for leaf, shape in layout}
        for part, layout in zip(hop.parts, hop.layouts, strict=True)
    }
    return Update(client, parts, examples, {"loss": (loss * examples, examples)})


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run calls in a thread each; return their results, or the exceptions that they raised."""
    given: list[Any] = [None] * len(calls)

    def run(place: int) -> None:
        try:
            given[place] = calls[place]()
        except Refused as refused:
            given[place] = refused.problem.code

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given


class ScriptedDevice:
    """One device.

    Args:
        transport: The way to the server.
        number: Its number. Its key is made from it, so that it is the same device in another process.
        population: Its population.
        serial: The serial of its last check-in.

    Attributes:
        session: The session that it asked for last.
    """

    def __init__(self, transport: Transport, number: int, population: str = "default", serial: int = 0) -> None:
        self.transport, self.population, self.serial = transport, population, serial
        self._seed = hashlib.sha256(f"scripted device {number}".encode()).digest()
        self.key = public_key_of(self._seed)
        self.id = device_id(self.key)
        self.session = ""

    def enrol(self, token: str) -> Enrolment:
        """Enrol at the server."""
        challenge = said(Challenge, self._plain("/v1/enrolments/challenge", Nothing()))
        public_key = to_base64url(self.key)
        signature = self._sign(enrolment_text(challenge.nonce, public_key, token))
        asked = EnrolmentRequest(token, public_key, challenge.nonce, signature)
        return said(Enrolment, self._plain("/v1/enrolments", asked))

    def check_in(
        self,
        *plans: Plan,
        wait_s: float = 0.0,
        previous: Assignment | None = None,
        kinds: tuple[Kind, ...] = ("train", "evaluate"),
        again: bool = False,
    ) -> CheckInAnswer:
        """Ask for work of these plans. previous: work whose end is not known. again: use the serial and session of the
        last time."""
        if not again:
            self.serial += 1
            self.session = f"s{self.serial}"
        request = CheckInRequest(
            self.serial,
            self.session,
            tuple(plan.description.fingerprint for plan in plans),
            kinds,
            previous=None if previous is None else PreviousSession(previous.task, previous.kind, previous.session),
            wait_s=wait_s,
        )
        patience = 30.0 + wait_s
        return said(CheckInAnswer, self.request("POST", "/v1/checkins", write(request), patience))

    def relayed(self, *plans: Plan, serial: int = 1, session: str = "") -> Relayed:
        """Return a check-in for these plans, as an edge passes it on."""
        fingerprints = tuple(plan.description.fingerprint for plan in plans)
        body = write(CheckInRequest(serial, session or f"s{serial}", fingerprints))
        signature = self._sign(signed_text("POST", CHECK_IN, self.population, self.id, body))
        return Relayed(self.id, to_base64url(self.key), body.decode(), signature)

    def work(self, *plans: Plan, wait_s: float = 0.0) -> Assignment | None:
        """Ask for work, and return it."""
        return self.check_in(*plans, wait_s=wait_s).assignment

    def report(self, work: Assignment, update: Update) -> Counted:
        """Send the report of this work."""
        return said(Counted, self.request("PUT", path_of(work), encode_report(update)))

    def abort(self, work: Assignment, reason: Any = "other") -> Nothing:
        """Give the work up."""
        return said(Nothing, self.request("POST", f"{path_of(work)}/abort", write(Abort(reason))))

    def withdraw(self) -> Nothing:
        """Withdraw."""
        return said(Nothing, self.request("POST", "/v1/withdrawals", write(Nothing())))

    def object(self, sha256: str) -> bytes:
        """Fetch a plan or a model."""
        return self.transport.request("GET", f"/v1/objects/{sha256}", most=MOST).body

    def request(self, method: str, path: str, body: bytes, patience: float = 30.0) -> Answer:
        """Send any request, signed."""
        return self.transport.request(method, path, body, self.headers(method, path, body), patience=patience)

    def headers(self, method: str, path: str, body: bytes) -> dict[str, str]:
        """Return the headers of a signed request, with a digest if it is required."""
        signature = self._sign(signed_text(method, path, self.population, self.id, body))
        digest = {"Sumus-Digest": digest_of(body)} if len(body) > MAX_UNDIGESTED else {}
        return {"Sumus-Protocol": "1", "Sumus-Device": self.id, "Sumus-Signature": signature, **digest}

    def _plain(self, path: str, message: Any) -> Answer:
        return self.transport.request("POST", path, write(message), {"Sumus-Protocol": "1"})

    def _sign(self, text: bytes) -> str:
        return to_base64url(sign(self._seed, text))


def path_of(work: Assignment) -> str:
    """Return the path of a report."""
    return f"/v1/tasks/{work.task}/{work.kind}/{work.session}"


def said(form: type[Any], answer: Answer) -> Any:
    """Return the message of an answer."""
    if answer.status == 200:
        return read(form, answer.body)
    problem = read(Problem, answer.body)
    raise Refused(problem.code, problem.detail, problem.retry_after_s, problem.serial)


def train_round(devices: list[ScriptedDevice], plan: Plan, values: list[float], wait_s: float = 5.0) -> list[Counted]:
    """Let devices ask one after the other, and then report one after the other."""
    works = [device.work(plan, wait_s=wait_s) for device in devices]
    return [
        device.report(work, update_of(plan, device.id, value))
        for device, work, value in zip(devices, works, values, strict=True)
        if work is not None
    ]
