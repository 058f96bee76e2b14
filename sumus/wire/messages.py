"""The messages between devices, edges and servers, except tensors. Each message is a small JSON object and a class of this
module. `ENDPOINTS` is the table of all requests.

    asked = read(CheckInRequest, body)            raises ParticipantError if the body is not such a message
    body = write(CheckInAnswer(...))

`ENDPOINTS` lists every request of the device plane. The server's routes and the OpenAPI document are made from it, and
docs/wire.md is checked against it. Unknown fields are ignored, so that a newer version may add fields. Durations are in
seconds. No message contains a time of day or a date.

Every request of an enrolled device is signed (`signed_text`), so there is no token that could be stolen. A repeated
request gets the same answer again: check-ins carry a serial that grows, and reports and aborts carry the id of their
session.
"""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec

from sumus.errors import ParticipantError
from sumus.pacing import Conditions
from sumus.site import MOST_ROUNDS, NoiseAt
from sumus.text import printable

PROTOCOL = 1
"""The version of the protocol. If a request has another version, the server's error answer contains the version that the server
uses.
"""
MAX_CONTROL = 64 * 2**10
"""The longest JSON body that is accepted, in bytes."""
MAX_UNDIGESTED = 64 * 2**10
"""The longest body of a signed request without the header Sumus-Digest, in bytes."""
MAX_RELAY, MOST_RELAYED = 2**20, 256
"""The limits of a request from an edge, which sends for many devices: the longest JSON body, in bytes, and the largest number
of devices.
"""

CHECK_IN = "/v1/checkins"
"""The path of a check-in. A device signs this path even if an edge relays the check-in."""

Kind: TypeAlias = Literal["train", "evaluate"]
# `$(?!\n)` is the end of the text in Python and in JavaScript; in Python, `$` alone also matches before a line
# feed at the end.
Word: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]
Name: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$(?!\n)")]
Hash: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Base64: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,512}$(?!\n)")]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Serial: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**52)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
Window: TypeAlias = tuple[Seconds, Seconds]

# ── enrolment ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Challenge(msgspec.Struct, frozen=True):
    """A nonce that a device signs when it enrols. It is valid for a short time."""

    nonce: Base64
    expires_in_s: Seconds


class EnrolmentRequest(msgspec.Struct, frozen=True):
    """A device asks to be enrolled.

    Attributes:
        token: The enrolment token.
        public_key: Its Ed25519 key, 32 bytes, as base64url without padding.
        nonce: The nonce of the challenge.
        signature: Its signature over `enrolment_text`, as base64url without padding.
    """

    token: Base64
    public_key: Base64
    nonce: Base64
    signature: Base64


class Enrolment(msgspec.Struct, frozen=True):
    """A device is enrolled. The same key always gets the same id.

    Attributes:
        device: The device's id: the SHA-256 of its public key, in hexadecimal.
        population: The population to which the device now belongs.
    """

    device: Hash
    population: Name


# ── check-ins ────────────────────────────────────────────────────────────────────────────────────────────────────────


class DeviceConditions(msgspec.Struct, frozen=True):
    """The conditions of a device at a check-in. See `sumus.Conditions`."""

    charging: bool = False
    unmetered: bool = False
    idle: bool = False
    battery: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    version: Count = 0

    def value(self) -> Conditions:
        """Return the conditions in the form that a plan's pacing uses."""
        return Conditions(self.charging, self.unmetered, self.idle, self.battery, self.version)


class PreviousSession(msgspec.Struct, frozen=True):
    """An earlier session whose end the device does not know."""

    task: Name
    kind: Kind
    session: Word


class CheckInRequest(msgspec.Struct, frozen=True):
    """A device asks for work.

    Attributes:
        serial: A number that grows with every new request of this device.
        session: An id, chosen by the device, for the work that it may be given.
        fingerprints: The fingerprints of the tasks whose code the device has.
        kinds: The kinds of work that the device does.
        conditions: The conditions of the device.
        keeps_state: Whether the device keeps client state between rounds.
        previous: An earlier session whose end the device does not know.
        wait_s: The number of seconds for which the server may hold the request open until there is work.
    """

    serial: Count
    session: Word
    fingerprints: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=64)]
    kinds: Annotated[tuple[Kind, ...], msgspec.Meta(max_length=2)] = ("train", "evaluate")
    conditions: DeviceConditions = DeviceConditions()
    keeps_state: bool = True
    previous: PreviousSession | None = None
    wait_s: Annotated[float, msgspec.Meta(ge=0.0, le=60.0)] = 0.0


class Settlement(msgspec.Struct, frozen=True):
    """The outcome of a previous session. If the outcome is "unknown", the device must send its report again."""

    session: Word
    outcome: Literal["counted", "discarded", "unknown"]


class Body(msgspec.Struct, frozen=True):
    """The hash and the length of bytes that can be fetched under /v1/objects."""

    sha256: Hash
    bytes: Count


class Assignment(msgspec.Struct, frozen=True):
    """Work for a device.

    Attributes:
        task: The task's name.
        kind: Training or evaluation.
        session: The session's id.
        version: The version of the model from which the work begins. Versions are counted from 0; learning-rate schedules use
            this number.
        plan: The plan.
        broadcast: The model, and other tensors that the algorithm sends to devices.
        seed: The public seed of the sum, 32 bytes in hexadecimal.
        contributors: The smallest number of contributors with which the sum is used.
        expires_in_s: The number of seconds until the session expires; None if it does not expire.
    """

    task: Name
    kind: Kind
    session: Word
    version: Count
    plan: Body
    broadcast: Body
    seed: Hash
    contributors: Count
    expires_in_s: Seconds | None = None


class Released(msgspec.Struct, frozen=True):
    """The released model of a task, which devices use for predictions."""

    version: Count
    model: Body


class CheckInAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to a check-in.

    Attributes:
        settled: The outcome of the session `previous`.
        assignment: The work; None if there is none.
        retry_after_s: If there is no work, the earliest and the latest time for the next check-in, in seconds from now.
        reason: Why there is no work, as text for a person.
        released: The released models, keyed by task, of the tasks whose code the device has.
    """

    settled: Settlement | None = None
    assignment: Assignment | None = None
    retry_after_s: Window | None = None
    reason: str = ""
    released: dict[Name, Released] = {}


AbortReason: TypeAlias = Literal[
    "floor-steps",
    "floor-seconds",
    "floor-bytes",
    "floor-contributors",
    "floor-rounds",
    "floor-memory",
    "floor-task",
    "conditions",
    "diverged",
    "data",
    "task",
    "plan",
    "memory",
    "stopped",
    "other",
]
EndReason: TypeAlias = Literal[AbortReason, "edge"]
"""The reasons why a device behind an edge will send no report: a reason of the device's Abort, or "edge" if the edge ended the
work.
"""


# ── edges ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Served(msgspec.Struct, frozen=True):
    """A run in which an edge may take part.

    Attributes:
        task: The task's name.
        kind: Training or evaluation.
        fingerprint: The fingerprint of the task; devices need code with this fingerprint.
        keeps_state: Whether devices must keep client state between rounds.
        plan: The plan.
        hop: The rules by which reports are converted to integers, as canonical JSON.
        contributors: The smallest number of contributors with which a sum is used.
        most: The largest number of reports in one sum of an edge.
        released: The released model, which devices use for predictions.
        rounds: The number of rounds that an edge runs for each sum that it sends. If it is more than 1, the edge is a site, and
            needs the plan.
        noise_at: The place where noise will be added in a future version with differential privacy.
    """

    task: Name
    kind: Kind
    fingerprint: Hash
    keeps_state: bool
    plan: Body
    hop: str
    contributors: Count
    most: Count
    released: Released | None = None
    rounds: Annotated[int, msgspec.Meta(ge=1, le=MOST_ROUNDS)] = 1
    noise_at: NoiseAt = "top"


class Tasks(msgspec.Struct, frozen=True):
    """All runs of a population that need work."""

    runs: tuple[Served, ...]


class Relayed(msgspec.Struct, frozen=True):
    """A device's check-in that an edge relays. The server answers it at once, without waiting for work.

    Attributes:
        device: The device's id.
        public_key: The device's key.
        check_in: The body of the device's own request, a CheckInRequest.
        signature: The device's signature of that request.
    """

    device: Hash
    public_key: Base64
    check_in: str
    signature: Base64


class EndedSession(msgspec.Struct, frozen=True):
    """A session of an edge's device for which no report will come."""

    task: Name
    kind: Kind
    device: Hash
    session: Word
    reason: EndReason


class RelayRequest(msgspec.Struct, frozen=True):
    """An edge relays check-ins of the devices that it has enrolled, and the ends of their sessions.

    Attributes:
        members: The number of all devices of the edge.
        asked: The relayed check-ins.
        ended: The sessions for which no report will come.
    """

    members: Count
    asked: Annotated[tuple[Relayed, ...], msgspec.Meta(max_length=MOST_RELAYED)] = ()
    ended: Annotated[tuple[EndedSession, ...], msgspec.Meta(max_length=MOST_RELAYED)] = ()


class RelayedAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to one relayed check-in: an answer, or the code of an error.

    Attributes:
        device: The device's id.
        answer: The answer.
        code: The code of an error, a key of `STATUS`; empty if there is none.
        serial: See `Problem`.
    """

    device: Hash
    answer: CheckInAnswer | None = None
    code: str = ""
    serial: Serial | None = None


class RelayAnswer(msgspec.Struct, frozen=True):
    """The answers to the relayed check-ins, in the order of the request."""

    answers: tuple[RelayedAnswer, ...]


# ── reports ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Counted(msgspec.Struct, frozen=True):
    """The report is in the sum, durably.

    Attributes:
        duplicate: The report was counted before, and this copy was not added. The field is always present, so a proxy's
            `{}` is not mistaken for this message.
        status: Always "counted".
    """

    duplicate: bool
    status: Literal["counted"] = "counted"


class Abort(msgspec.Struct, frozen=True):
    """A device will send no report. The reason is one of a fixed list; the device cannot send its own text."""

    reason: AbortReason


class Nothing(msgspec.Struct, frozen=True):
    """An empty object, {}."""


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────

STATUS = {
    "malformed": 400,  # the body is not such a message as docs/wire.md describes
    "bad_report": 400,  # the report does not fit the plan: parts, leaves, shapes, dtypes, metrics
    "not_finite": 400,  # NaN or infinity
    "out_of_bounds": 400,  # a number exceeds the plan's bound
    "empty": 400,  # a report of no examples: it adds nothing, and the device's place is free again
    "bad_token": 401,  # the token is not an enrolment token of this server
    "digest_required": 400,  # a signed body of this length needs the header Sumus-Digest
    "bad_digest": 400,  # the body that arrived is not the signed body
    "bad_signature": 401,  # the signature is not this device's, or not over this request
    "unknown_device": 401,  # the device is not enrolled here
    "revoked": 403,  # the device is enrolled, but an admin has barred it
    "quota": 403,  # the population is full
    "not_edge": 403,  # the sender may not send for other devices, or not for so many
    "not_device": 403,  # the sender enrolled as an edge, with an edge's link, so it does no work itself
    "not_found": 404,  # no such path or object
    "unknown_session": 404,  # the session was never given to this device, or ended long ago
    "method": 405,
    "slow": 408,  # the body took too long
    "old_nonce": 409,  # the nonce is not of this server, or has expired: ask for another
    "closed": 409,  # the report will never be counted: its round is over, or its session has expired
    "stale": 409,  # the report's model is too old
    "phase": 409,  # not counted: the round was in a phase in which it takes no reports
    "replayed": 409,  # the check-in is older than one that was answered, or its serial is much higher than the last one
    "token_used": 410,  # the token has no uses left, or has expired
    "length_required": 411,
    "too_large": 413,
    "encoding": 415,  # Content-Encoding is not accepted
    "wrong_task": 422,  # no task of this server has any of these fingerprints
    "old_protocol": 426,  # use the version that the answer names
    "rate": 429,
    "failed": 500,  # a defect of the server
    "not_ready": 503,  # the server is starting or recovering, or its storage fails
    "busy": 503,  # there is no memory for the body now
}
"""Every code that an error answer may carry, and its HTTP status."""
AGAIN = frozenset({"bad_digest", "slow", "rate", "not_ready", "busy", "failed"})
"""The codes after which a client may send the same request again."""

Code: TypeAlias = str


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error answer, as application/problem+json.

    Attributes:
        code: A key of `STATUS`.
        detail: Text for a person.
        retry_after_s: The earliest and the latest time for the next attempt, in seconds from now.
        protocol: With `old_protocol`: the version that the server uses.
        serial: With `replayed`: the device's last serial that the server knows. The next check-in must have a higher one.
    """

    code: Code
    detail: str = ""
    retry_after_s: Window | None = None
    protocol: int | None = None
    serial: Serial | None = None


class Refused(Exception):
    """Raised to refuse a request: the client gets an error answer."""

    def __init__(
        self, code: str, detail: str = "", retry_after_s: Window | None = None, serial: int | None = None
    ) -> None:
        super().__init__(printable(f"{code}: {detail}"))
        self.problem = Problem(code, detail, retry_after_s, PROTOCOL if code == "old_protocol" else None, serial)

    @property
    def status(self) -> int:
        return STATUS[self.problem.code]


# ── the device plane ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Endpoint:
    """One request of the device plane.

    Attributes:
        name: The request's name in code.
        method: The HTTP method.
        path: The path; words in braces are parameters.
        body: The message in the body; `bytes` for tensors, None for no body.
        answer: The message of a successful answer; `bytes` for an object.
        signed: Whether the device signs the request.
        codes: The error codes that this request may get, in addition to the codes of every request (`EVERYWHERE`).
        status: The HTTP status of a successful answer.
        most: The largest number of bytes of a JSON body.
    """

    name: str
    method: str
    path: str
    body: type | None
    answer: type
    signed: bool
    codes: tuple[str, ...]
    status: int = 200
    most: int = MAX_CONTROL


EVERYWHERE = (
    "malformed",
    "old_protocol",
    "rate",
    "not_ready",
    "failed",
    "length_required",
    "too_large",
    "encoding",
    "slow",
    "busy",
)
_WHO = ("digest_required", "bad_digest", "bad_signature", "unknown_device", "revoked")
_REPORT = (
    *_WHO,
    "bad_report",
    "not_finite",
    "out_of_bounds",
    "empty",
    "unknown_session",
    "closed",
    "stale",
    "phase",
)

ENDPOINTS = (
    Endpoint("challenge", "POST", "/v1/enrolments/challenge", Nothing, Challenge, False, ()),
    Endpoint(
        "enrol",
        "POST",
        "/v1/enrolments",
        EnrolmentRequest,
        Enrolment,
        False,
        ("bad_token", "bad_signature", "old_nonce", "token_used", "quota", "revoked"),
    ),
    Endpoint("withdraw", "POST", "/v1/withdrawals", Nothing, Nothing, True, _WHO),
    Endpoint(
        "check_in",
        "POST",
        CHECK_IN,
        CheckInRequest,
        CheckInAnswer,
        True,
        (*_WHO, "not_device", "replayed", "wrong_task"),
    ),
    Endpoint("object", "GET", "/v1/objects/{sha256}", None, bytes, False, ("not_found",)),
    Endpoint(
        "report",
        "PUT",
        "/v1/tasks/{task}/{kind}/{session}",
        bytes,
        Counted,
        True,
        _REPORT,
    ),
    Endpoint(
        "abort", "POST", "/v1/tasks/{task}/{kind}/{session}/abort", Abort, Nothing, True, (*_WHO, "unknown_session")
    ),
    Endpoint("tasks", "GET", "/v1/tasks", None, Tasks, True, (*_WHO, "not_edge"), most=MAX_RELAY),
    Endpoint("relay", "POST", "/v1/relays", RelayRequest, RelayAnswer, True, (*_WHO, "not_edge"), most=MAX_RELAY),
    Endpoint("report_sum", "PUT", "/v1/tasks/{task}/{kind}", bytes, Counted, True, (*_REPORT, "not_edge")),
)

# ── reading, writing, signing ────────────────────────────────────────────────────────────────────────────────────────

M = TypeVar("M")
_FORMS = {form for endpoint in ENDPOINTS for form in (endpoint.body, endpoint.answer) if form not in (None, bytes)}
_READERS: dict[Any, msgspec.json.Decoder[Any]] = {form: msgspec.json.Decoder(form) for form in (*_FORMS, Problem)}
"""The decoders of all messages. They are made at import, since msgspec (0.22) crashes if several threads decode the same type
for the first time at once.
"""
_MOST: dict[Any, int] = {form: endpoint.most for endpoint in ENDPOINTS for form in (endpoint.body, endpoint.answer)}


def read(form: type[M], body: bytes | memoryview) -> M:
    """Decode a message.

    Args:
        form: The message's class.
        body: The bytes.

    Raises:
        ParticipantError: The bytes are not such a message, or are longer than such a message may be.
    """
    if len(body) > (most := _MOST.get(form, MAX_CONTROL)):
        raise ParticipantError(None, f"the body has {len(body)} bytes, but a {form.__name__} has at most {most}")
    try:
        reader = _READERS.get(form)
        return msgspec.json.decode(body, type=form) if reader is None else reader.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # a ValidationError is a DecodeError
        raise ParticipantError(None, f"not a {form.__name__}: {error!s:.200}") from error


def write(message: Any) -> bytes:
    """Encode a message as JSON."""
    return msgspec.json.encode(message)


def signed_text(method: str, path: str, population: str, device: str, body: bytes | bytearray | memoryview) -> bytes:
    """Return the text that a device signs for a request.

    The text names the protocol, the method and path, the population, the device, and the SHA-256 of the body. Two
    different requests never have the same text.

    Args:
        method: The HTTP method.
        path: The path as it is sent, percent-encoded and with its query.
        population: The population's name.
        device: The device's id.
        body: The body.

    Raises:
        ParticipantError: A word contains spaces, control characters or characters that are not ASCII.
    """
    return text_over(method, path, population, device, digest_of(body))


def text_over(method: str, path: str, population: str, device: str, digest: str) -> bytes:
    """Return `signed_text`, given a body's digest instead of the body. So a server can check a signature before it reads the
    body.
    """
    words = f"{_word(method)} {_word(path)}", _word(population), _word(device), _word(digest)
    return _lines(f"sumus {PROTOCOL}", *words)


def digest_of(body: bytes | bytearray | memoryview) -> str:
    """Return the SHA-256 of a body, in hexadecimal. The header Sumus-Digest holds this value."""
    return hashlib.sha256(body).hexdigest()


def enrolment_text(nonce: str, public_key: str, token: str) -> bytes:
    """Return the text that a device signs to enrol: the server's nonce, its own key and the token.

    Raises:
        ParticipantError: As with `signed_text`.
    """
    return _lines(f"sumus {PROTOCOL} enrolment", _word(nonce), _word(public_key), _word(token))


def _lines(*lines: str) -> bytes:
    return "\n".join(lines).encode()


def _word(text: str) -> str:
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ParticipantError(None, f"{text!r:.80} cannot be signed: use only printable ASCII without spaces")
    return text
