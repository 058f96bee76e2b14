"""The JSON messages of devices, edges and servers. The first byte of an input chooses the form."""

from collections.abc import Mapping
from typing import Any

from benchmarks.fuzz.framing import text
from benchmarks.fuzz.target import Target
from sumus.errors import ParticipantError
from sumus.wire.messages import ENDPOINTS, MAX_CONTROL, Problem, read, write

FORMS: tuple[Any, ...] = (
    *sorted(
        {form for each in ENDPOINTS for form in (each.body, each.answer) if form not in (None, bytes)},
        key=lambda form: form.__name__,
    ),
    Problem,
)
_HASH, _OTHER = "0" * 64, "f" * 64


def check(data: bytes) -> None:
    """Check that a message that is read can be written, and is read again unchanged."""
    form = FORMS[data[0] % len(FORMS)] if data else Problem
    try:
        message = read(form, data[1:])
    except ParticipantError:
        return
    assert read(form, write(message)) == message
    assert write(read(form, write(message))) == write(message)


def _check_in(**fields: Any) -> dict[str, Any]:
    return {"serial": 1, "session": "s1", "fingerprints": [_HASH], **fields}


def examples() -> dict[str, list[Any]]:
    """Return some messages of each form, as JSON values."""
    body, window = {"sha256": _HASH, "bytes": 1}, [1.0, 2.5]
    previous = {"task": "tiny", "kind": "train", "session": "s0"}
    conditions = {"charging": True, "unmetered": True, "idle": False, "battery": 0.5, "version": 3}
    assignment = {
        **previous,
        "version": 0,
        "plan": body,
        "broadcast": body,
        "seed": _HASH,
        "contributors": 2,
        "expires_in_s": 9.0,
    }
    settled = {"session": "s0", "outcome": "counted"}
    released = {"tiny": {"version": 1, "model": body}}
    answer = {"settled": settled, "assignment": assignment, "retry_after_s": window, "reason": "", "released": released}
    served = {
        "task": "tiny",
        "kind": "evaluate",
        "fingerprint": _HASH,
        "keeps_state": False,
        "plan": body,
        "hop": "{}",
        "contributors": 2,
        "most": 10,
        "rounds": 2,
        "noise_at": "edges",
    }
    ended = {**previous, "device": _HASH, "reason": "floor-bytes"}
    asked = _check_in(kinds=["train"], conditions=conditions, keeps_state=False, previous=previous, wait_s=60.0)
    return {
        "Challenge": [{"nonce": "a_-", "expires_in_s": 60}],
        "EnrolmentRequest": [{"token": "a", "public_key": "b", "nonce": "c", "signature": "d"}],
        "Enrolment": [{"device": _HASH, "population": "default"}],
        "CheckInRequest": [_check_in(), asked, _check_in(wait_s=61), _check_in(serial=-1), _check_in(session="s1\n")],
        "CheckInAnswer": [{}, answer],
        "Tasks": [{"runs": []}, {"runs": [served]}],
        "RelayRequest": [
            {"members": 1},
            {"members": 2, "asked": [{"device": _OTHER, "request": asked}], "ended": [ended]},
        ],
        "RelayAnswer": [{"answers": [{"device": _HASH, "code": "rate"}, {"device": _OTHER, "answer": answer}]}],
        "Counted": [{"duplicate": False, "status": "counted"}, {}],
        "Abort": [{"reason": "memory"}, {"reason": "mine"}],
        "Nothing": [{}, {"more": 1}],
        "Problem": [{"code": "rate", "detail": "é", "retry_after_s": window, "protocol": 1}, {"code": "\x00"}],
    }


def seeds() -> Mapping[str, bytes]:
    """Return messages of every form, and bytes that are no messages."""
    found: dict[str, bytes] = {"empty": b""}
    for number, form in enumerate(FORMS):
        first = bytes([65 + (number - 65) % len(FORMS)])
        assert FORMS[first[0] % len(FORMS)] is form
        for which, value in enumerate(examples()[form.__name__]):
            found[f"{form.__name__}-{which}"] = first + text(value)
    first = found["CheckInRequest-0"][:1]
    return found | {
        "deep": first + b"[" * 3000,
        "long": first + b" " * (MAX_CONTROL + 1),
        "no-text": first + b'{"serial":"\xff"}',
        "large-number": first + text(_check_in()).replace(b"1", b"1" * 400, 1),
    }


TARGET = Target(
    "messages",
    check,
    seeds,
    {"sumus.wire.messages": ("read", "write")},
    (*(f'"{name}":'.encode() for form in FORMS for name in form.__struct_fields__), b"null", b"1e400", b"\\ud800"),
)
