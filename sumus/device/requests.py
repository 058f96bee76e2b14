"""The requests of a device or an edge to its server: one method for each endpoint in `sumus.wire.messages`.

If the server answers with an error, a method raises `Refused` with the server's code. If no answer comes, or the answer
cannot be read, it raises `Unreachable`.
"""

import hashlib
import secrets
from typing import TypeVar

from sumus.errors import ParticipantError
from sumus.text import printable
from sumus.transport.transport import PATIENCE, Answer, Transport, Unreachable
from sumus.wire.messages import (
    AGAIN,
    ENDPOINTS,
    MAX_UNDIGESTED,
    PROTOCOL,
    Abort,
    AbortReason,
    Assignment,
    Body,
    Challenge,
    CheckInAnswer,
    CheckInRequest,
    Counted,
    Enrolment,
    EnrolmentRequest,
    Kind,
    Nothing,
    Problem,
    Refused,
    RelayAnswer,
    RelayRequest,
    Tasks,
    digest_of,
    enrolment_text,
    read,
    text_over,
    write,
)
from sumus.wire.signing import device_id, public_key_of, sign, to_base64url

M = TypeVar("M")

_ENDPOINTS = {endpoint.name: endpoint for endpoint in ENDPOINTS}
UPLOADING = 600.0
"""The longest time, in seconds, for sending a report or fetching a model."""


class Requests:
    """The requests of one device.

    Args:
        transport: Carries the requests.
        key: The device's private key, 32 bytes.
        population: The device's population; empty before it is enrolled.

    Attributes:
        device: The device's id, which follows from its key.
    """

    def __init__(self, transport: Transport, key: bytes, population: str = "") -> None:
        self.population = population
        self._transport, self._key = transport, key
        self._public_key = public_key_of(key)
        self.device = device_id(self._public_key)

    def enrol(self, token: str) -> Enrolment:
        """Enrol the device. Repeating this with the same key changes nothing.

        Args:
            token: The token of a link; or several, separated by blanks, of which an unused one is used.
        """
        tokens = token.split()
        first = secrets.randbelow(len(tokens))  # so that devices with the same links do not all try the same ones
        *others, last = *tokens[first:], *tokens[:first]
        for other in others:
            try:
                return self._enrol(other)
            except Refused as refused:
                if refused.problem.code != "token_used":
                    raise
        return self._enrol(last)

    def _enrol(self, token: str) -> Enrolment:
        challenge = read_answer(Challenge, self._ask("challenge", write(Nothing())))
        public_key = to_base64url(self._public_key)
        signature = sign(self._key, enrolment_text(challenge.nonce, public_key, token))
        request = EnrolmentRequest(token, public_key, challenge.nonce, to_base64url(signature))
        enrolment = read_answer(Enrolment, self._ask("enrol", write(request)))
        if enrolment.device != self.device:
            raise Unreachable(
                "the server gave the device an id that does not match its key: check the server's address"
            )
        self.population = enrolment.population
        return enrolment

    def check_in(self, request: CheckInRequest) -> CheckInAnswer:
        """Check in: ask for work, and report the device's conditions."""
        return read_answer(CheckInAnswer, self._ask("check_in", write(request), patience=request.wait_s + PATIENCE))

    def report(self, work: Assignment, body: bytes) -> Counted:
        """Send a report. When this returns, the report is counted."""
        return read_answer(Counted, self._ask("report", body, _of(work), patience=UPLOADING))

    def tasks(self) -> Tasks:
        """Ask, as an edge, for the list of tasks."""
        return read_answer(Tasks, self._ask("tasks", b""))

    def relay(self, request: RelayRequest) -> RelayAnswer:
        """Ask, as an edge, for work for its devices."""
        return read_answer(RelayAnswer, self._ask("relay", write(request)))

    def report_sum(self, task: str, kind: Kind, body: bytes) -> Counted:
        """Send, as an edge, the sum of its devices' reports. When this returns, the sum is counted."""
        answer = self._ask("report_sum", body, {"task": task, "kind": kind}, patience=UPLOADING)
        return read_answer(Counted, answer)

    def abort(self, work: Assignment, reason: AbortReason) -> None:
        """Tell the server that no report will come for a piece of work."""
        self._ask("abort", write(Abort(reason)), _of(work))

    def withdraw(self) -> None:
        """Withdraw the owner's consent: the server forgets the device."""
        self._ask("withdraw", write(Nothing()))

    def object(self, body: Body) -> bytes:
        """Fetch an object by its hash. Raise Unreachable if the server sends other bytes."""
        answer = self._ask("object", b"", {"sha256": body.sha256}, patience=UPLOADING, most=body.bytes)
        if hashlib.sha256(answer.body).hexdigest() != body.sha256:
            raise Unreachable(f"the server sent other bytes than those of the object {body.sha256[:12]}…")
        return answer.body

    def _ask(
        self,
        name: str,
        body: bytes,
        where: dict[str, str] | None = None,
        patience: float = PATIENCE,
        most: int = 0,
    ) -> Answer:
        endpoint = _ENDPOINTS[name]
        path = endpoint.path.format(**(where or {}))
        headers = {"Sumus-Protocol": str(PROTOCOL)}
        if endpoint.body is bytes:
            headers["Content-Type"] = "application/octet-stream"
        elif endpoint.body is not None:
            headers["Content-Type"] = "application/json"
        if endpoint.signed:
            digest = digest_of(body)
            text = text_over(endpoint.method, path, self.population, self.device, digest)
            headers |= {"Sumus-Device": self.device, "Sumus-Signature": to_base64url(sign(self._key, text))}
            if endpoint.body is bytes or len(body) > MAX_UNDIGESTED:
                headers["Sumus-Digest"] = digest
        answer = self._transport.request(endpoint.method, path, body, headers, patience, max(most, endpoint.most))
        if answer.status != endpoint.status:
            raise _refused(answer)
        return answer


def read_answer(form: type[M], answer: Answer) -> M:
    """Decode the message in an answer. Raise Unreachable if it cannot be decoded."""
    try:
        return read(form, answer.body)
    except ParticipantError as error:
        raise Unreachable(f"the server's answer cannot be read: {error}") from error


def _refused(answer: Answer) -> Exception:
    """Return the error in a server's answer; Unreachable if the answer does not come from a sumus server."""
    try:
        problem = read(Problem, answer.body)
    except ParticipantError:
        return Unreachable(
            f"the answer, with the status {answer.status}, is not from a sumus server: check the address"
        )
    return Refused(printable(problem.code), printable(problem.detail), problem.retry_after_s, problem.serial)


def _of(work: Assignment) -> dict[str, str]:
    return {"task": work.task, "kind": work.kind, "session": work.session}


def may_be_repeated(refused: Refused) -> bool:
    """Return whether repeating the same request later may give a different answer."""
    return refused.problem.code in AGAIN
