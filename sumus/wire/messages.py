"""What devices and servers say to each other besides tensors: small JSON objects, each a record here, and every request as a row.

    asked = read(CheckInRequest, body)            whatever is not this form raises ParticipantError
    body = write(CheckInAnswer(...))

`ENDPOINTS` is the whole of the device plane: the server's routes, the OpenAPI document and docs/wire.md are made or checked from
it. Unknown fields are ignored, so that a newer side may say more. Durations are in seconds; no message holds a moment of time.

Every request of an enrolled device is signed (`signed_text`), so it needs no token that could be stolen, and repeating one gives
the same answer again: check-ins carry a serial that grows, and reports and aborts a session.
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
"""Version of this page of the protocol; a server that is spoken to in another says which it speaks."""
MAX_CONTROL = 64 * 2**10
"""The longest JSON body that is read, in bytes."""
MAX_UNDIGESTED = 64 * 2**10
"""The longest body of a signed request without the header Sumus-Digest, in bytes."""
MAX_RELAY, MOST_RELAYED = 2**20, 256
"""Of an edge, that speaks for many devices: the longest, and how many it may speak for at once."""

CHECK_IN = "/v1/checkins"
"""The path of a check-in, which a device signs also if an edge passes the check-in on."""

Kind: TypeAlias = Literal["train", "evaluate"]
# In Python `$` is also before a last line feed, in JavaScript it is not; `$(?!\n)` is the end of the text in both.
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
    """A nonce to sign, for a little while."""

    nonce: Base64
    expires_in_s: Seconds


class EnrolmentRequest(msgspec.Struct, frozen=True):
    """A device makes itself known. public_key: Ed25519, 32 bytes.  signature: over `enrolment_text`.  Both base64url, not
    padded."""

    token: Base64
    public_key: Base64
    nonce: Base64
    signature: Base64


class Enrolment(msgspec.Struct, frozen=True):
    """device: its id from now on, SHA-256 of its public key in hexadecimal. The same key again gives the same id."""

    device: Hash
    population: Name


# ── check-ins ────────────────────────────────────────────────────────────────────────────────────────────────────────


class DeviceConditions(msgspec.Struct, frozen=True):
    """See `sumus.Conditions`."""

    charging: bool = False
    unmetered: bool = False
    idle: bool = False
    battery: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    version: Count = 0

    def value(self) -> Conditions:
        """As the plan's pacing asks for them."""
        return Conditions(self.charging, self.unmetered, self.idle, self.battery, self.version)


class PreviousSession(msgspec.Struct, frozen=True):
    """A session whose end a device does not know."""

    task: Name
    kind: Kind
    session: Word


class CheckInRequest(msgspec.Struct, frozen=True):
    """A device asks for work. serial: grows with every new request of this device.  session: an id for the work it may be given.
    fingerprints: of the tasks whose code it has.  kinds: of work that it does.  keeps_state: whether it remembers what a client
    keeps between rounds.  wait_s: how long the server may hold the request open until there is work."""

    serial: Count
    session: Word
    fingerprints: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=64)]
    kinds: Annotated[tuple[Kind, ...], msgspec.Meta(max_length=2)] = ("train", "evaluate")
    conditions: DeviceConditions = DeviceConditions()
    keeps_state: bool = True
    previous: PreviousSession | None = None
    wait_s: Annotated[float, msgspec.Meta(ge=0.0, le=60.0)] = 0.0


class Settlement(msgspec.Struct, frozen=True):
    """What became of the session that was asked for; "unknown": send its report again."""

    session: Word
    outcome: Literal["counted", "discarded", "unknown"]


class Body(msgspec.Struct, frozen=True):
    """Bytes under /v1/objects, by what they are."""

    sha256: Hash
    bytes: Count


class Assignment(msgspec.Struct, frozen=True):
    """Work. version: of the model that it begins from, from 0; schedules count it.  broadcast: that model, with whatever else the
    algorithm sends.  seed: of the sum, public, 32 bytes in hexadecimal.  contributors: least, in a sum that is used.
    expires_in_s: None for no end."""

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
    """The model that a task's devices answer with."""

    version: Count
    model: Body


class CheckInAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """settled: of `previous`.  assignment: work, or None.  retry_after_s: the window to come back in, where there is none.
    reason: why there is none, for the curious.  released: by task, of those whose code the device has."""

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
"""Why no report of an edge's device comes: as in an Abort, or the edge ended the work, which is not its device's doing."""


# ── edges ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Served(msgspec.Struct, frozen=True):
    """A run that an edge may take part in. fingerprint: of devices that can do it.  keeps_state: whether it asks of them that
    they remember.  hop: how reports become integers, as canonical JSON.  contributors: least, in a sum that is used.  most:
    reports that one sum of an edge may hold.  released: the model that devices answer with.  rounds: of an edge's own, between
    two of its sums; with more than 1 it is a site, and needs the plan.  noise_at: where noise is added, once there is some."""

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
    """All that is to be done for a population."""

    runs: tuple[Served, ...]


class Relayed(msgspec.Struct, frozen=True):
    """A device's check-in, as its edge passes it on; nothing is held open for it. public_key: of the device.  check_in: the body
    of the device's own request, a CheckInRequest.  signature: of that request, by the device."""

    device: Hash
    public_key: Base64
    check_in: str
    signature: Base64


class EndedSession(msgspec.Struct, frozen=True):
    """A session of an edge's device of which no report will come."""

    task: Name
    kind: Kind
    device: Hash
    session: Word
    reason: EndReason


class RelayRequest(msgspec.Struct, frozen=True):
    """An edge speaks for its devices, each of which it knows. members: how many those are, altogether."""

    members: Count
    asked: Annotated[tuple[Relayed, ...], msgspec.Meta(max_length=MOST_RELAYED)] = ()
    ended: Annotated[tuple[EndedSession, ...], msgspec.Meta(max_length=MOST_RELAYED)] = ()


class RelayedAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """To one of them: an answer, or the code of an error. serial: see `Problem`."""

    device: Hash
    answer: CheckInAnswer | None = None
    code: str = ""
    serial: Serial | None = None


class RelayAnswer(msgspec.Struct, frozen=True):
    """To each who asked, in the same order."""

    answers: tuple[RelayedAnswer, ...]


# ── reports ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Counted(msgspec.Struct, frozen=True):
    """The report is in the sum, and that is durable. duplicate: it was before, and this one was not added; never left
    out, so that `{}` from somebody in between is not taken for this."""

    duplicate: bool
    status: Literal["counted"] = "counted"


class Abort(msgspec.Struct, frozen=True):
    """No report will come. No free text: what a device says of itself is one of these."""

    reason: AbortReason


class Nothing(msgspec.Struct, frozen=True):
    """{}."""


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────

STATUS = {
    "malformed": 400,  # not of the form that this page gives
    "bad_report": 400,  # not of the plan's form: parts, leaves, shapes, dtypes, metrics
    "not_finite": 400,  # NaN or infinity
    "out_of_bounds": 400,  # beyond the plan's bound
    "empty": 400,  # of no examples: such a device contributes nothing, and its place is free again
    "bad_token": 401,  # no enrolment token of this server
    "digest_required": 400,  # so long a signed body needs the header Sumus-Digest
    "bad_digest": 400,  # the body that came is not the one that was signed
    "bad_signature": 401,  # not signed by this device, or not over this request
    "unknown_device": 401,  # not enrolled here
    "revoked": 403,  # enrolled, and barred since
    "quota": 403,  # the population is full
    "not_edge": 403,  # it may not speak for others, or not for so many
    "not_device": 403,  # it enrolled as an edge, with an edge's link: it does no work itself
    "not_found": 404,  # no such path or object
    "unknown_session": 404,  # never given to this device, or long over
    "method": 405,
    "slow": 408,  # the body took too long
    "old_nonce": 409,  # not a challenge of this server, or its time is over: ask for another
    "closed": 409,  # the report is not counted and will not be: its round is over, or its time is
    "stale": 409,  # its model is too old
    "phase": 409,  # not counted: its round was in a phase that takes none
    "replayed": 409,  # a check-in older than one that was answered, or one whose serial is too far above the last
    "token_used": 410,  # the token's uses are up, or its time
    "length_required": 411,
    "too_large": 413,
    "encoding": 415,  # Content-Encoding is not accepted
    "wrong_task": 422,  # no task of this server has any of these fingerprints
    "old_protocol": 426,  # speak the version that the answer names
    "rate": 429,
    "failed": 500,  # a defect of the server
    "not_ready": 503,  # starting, recovering, or its storage fails
    "busy": 503,  # no room for the body in memory
}
"""Every code that an error answer may carry, and its HTTP status."""
AGAIN = frozenset({"bad_digest", "slow", "rate", "not_ready", "busy", "failed"})
"""Codes after which the same request may be sent again."""

Code: TypeAlias = str


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer that is an error, as application/problem+json. code: a key of `STATUS`.  detail: for a person.
    protocol: what the server speaks, of `old_protocol`.  serial: the device's last one that the server knows, of `replayed`: the
    next check-in counts on from there."""

    code: Code
    detail: str = ""
    retry_after_s: Window | None = None
    protocol: int | None = None
    serial: Serial | None = None


class Refused(Exception):
    """A request is answered with an error."""

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
    """A request. body: its form; bytes for tensors, None for none.  answer: of success, with `status`.  signed: by the device.
    codes: of the errors that it may bring, besides those of every request.  most: bytes of a JSON body."""

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
"""Made here: msgspec (0.22) crashes where threads are the first to read a form and do so at the same time."""
_MOST: dict[Any, int] = {form: endpoint.most for endpoint in ENDPOINTS for form in (endpoint.body, endpoint.answer)}


def read(form: type[M], body: bytes | memoryview) -> M:
    """The message of these bytes. ParticipantError where they are not of this form, or more than it may have."""
    if len(body) > (most := _MOST.get(form, MAX_CONTROL)):
        raise ParticipantError(None, f"{len(body)} bytes, and a {form.__name__} has at most {most}")
    try:
        reader = _READERS.get(form)
        return msgspec.json.decode(body, type=form) if reader is None else reader.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # a ValidationError is a DecodeError
        raise ParticipantError(None, f"not a {form.__name__}: {error!s:.200}") from error


def write(message: Any) -> bytes:
    """A message as bytes."""
    return msgspec.json.encode(message)


def signed_text(method: str, path: str, population: str, device: str, body: bytes | bytearray | memoryview) -> bytes:
    """What a device signs of a request: who asks what of whom, and the SHA-256 of the body. path: as it is sent, percent
    signs, query and all.

    Two requests have two texts: ParticipantError for words with blanks, control characters or letters beyond ASCII.
    """
    return text_over(method, path, population, device, digest_of(body))


def text_over(method: str, path: str, population: str, device: str, digest: str) -> bytes:
    """As `signed_text`, of a body's digest alone: so a server checks a signature before it reads the body."""
    words = f"{_word(method)} {_word(path)}", _word(population), _word(device), _word(digest)
    return _lines(f"sumus {PROTOCOL}", *words)


def digest_of(body: bytes | bytearray | memoryview) -> str:
    """SHA-256 of a body, in hexadecimal: what the header Sumus-Digest holds."""
    return hashlib.sha256(body).hexdigest()


def enrolment_text(nonce: str, public_key: str, token: str) -> bytes:
    """What a device signs to enrol: the server's nonce, its own key and the token. ParticipantError as with `signed_text`."""
    return _lines(f"sumus {PROTOCOL} enrolment", _word(nonce), _word(public_key), _word(token))


def _lines(*lines: str) -> bytes:
    return "\n".join(lines).encode()


def _word(text: str) -> str:
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ParticipantError(None, f"{text!r:.80} cannot be signed: printable ASCII without blanks only")
    return text
