"""What schemathesis is told of us: how requests are signed, and now and then the name of something that is there.

It runs in the fuzzer's own environment, and so imports nothing of ours. SUMUS_FUZZ names the server's task and its fingerprint.
"""

import atexit
import hashlib
import itertools
import json
import os
import random
from base64 import urlsafe_b64encode
from collections import Counter
from typing import Any

import schemathesis
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

KNOWN = json.loads(os.environ["SUMUS_FUZZ"])
DICE = random.Random(0)
SERIALS = itertools.count(2)
ANSWERS: Counter[tuple[str, str]] = Counter()
"""By request, and by status with the code of what is refused."""


class Device:
    """A key that the server knows."""

    def __init__(self, number: int) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"load {number}".encode()).digest())
        public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.id = hashlib.sha256(public).hexdigest()

    def sign(self, request: Any, body: bytes) -> str:
        """Of a request as it is sent."""
        digest = hashlib.sha256(body).hexdigest()
        text = f"sumus 1\n{request.method} {request.path_url}\ndefault\n{self.id}\n{digest}"
        return urlsafe_b64encode(self._key.sign(text.encode())).rstrip(b"=").decode()


DEVICES = [Device(number) for number in range(KNOWN["devices"])]


def signed(request: Any) -> Any:
    """Four of five are signed by one of a few devices, withdrawals always by the first; the others are as they were made up."""
    body = request.body.encode() if isinstance(request.body, str) else request.body or b""
    if DICE.random() < 0.8 and isinstance(body, bytes) and request.path_url.isascii():
        leaves = request.path_url.startswith("/v1/withdrawals")
        device = DEVICES[0] if leaves else DICE.choice(DEVICES[1:])
        request.headers.update(
            {"Sumus-Protocol": "1", "Sumus-Device": device.id, "Sumus-Signature": device.sign(request, body)}
        )
    return request


schemathesis.auth.set_from_requests(signed)


def damaged(report: bytes) -> bytes:
    """A report, perhaps with a byte of another value, or cut short."""
    where = DICE.randrange(len(report))
    match DICE.randrange(3):
        case 0:
            return report
        case 1:
            return report[:where] + bytes([DICE.randrange(256)]) + report[where + 1 :]
        case _:
            return report[:where]


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Half of them ask for what is there."""
    path, body = case.path_parameters, case.body
    if DICE.random() < 0.5:
        return
    if path and "session" in path:
        path.update(task=KNOWN["task"], kind="train", session="s1")
        if case.operation.label.startswith("PUT"):
            case.body = damaged(bytes.fromhex(KNOWN["report"]))
    if path and "sha256" in path:
        path["sha256"] = KNOWN["plan"]
    if isinstance(body, dict) and "fingerprints" in body:
        body.update(fingerprints=[KNOWN["fingerprint"]], session="s1", serial=next(SERIALS), wait_s=0.0)


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Count what was answered."""
    try:
        code = json.loads(response.content)["code"]
    except (ValueError, KeyError, TypeError):
        code = ""
    ANSWERS[case.operation.label, f"{response.status_code} {code}".strip()] += 1


@atexit.register
def show() -> None:
    """What was answered, so that one sees how far requests came."""
    for label in sorted({label for label, _ in ANSWERS}):
        found = [(said, count) for (where, said), count in ANSWERS.most_common() if where == label]
        print(f"{label}: " + ", ".join(f"{count} × {said}" for said, count in found))
