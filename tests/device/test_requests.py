"""What a device asks of its server, as it goes over the wire: signed, and with a digest if the server wants one first."""

import hashlib
from collections.abc import Mapping
from typing import Any

import pytest

from sumus.device.requests import Requests
from sumus.transport.transport import Answer
from sumus.wire.messages import (
    MAX_UNDIGESTED,
    Assignment,
    Body,
    CheckInAnswer,
    CheckInRequest,
    Counted,
    RelayAnswer,
    Relayed,
    RelayRequest,
    text_over,
    write,
)
from sumus.wire.signing import from_base64url, public_key_of, verify

KEY = b"k" * 32
SOME = Body("0" * 64, 1)
WORK = Assignment("tiny", "train", "s1", 0, SOME, SOME, "0" * 64, 2)


class Recorded:
    """A `Transport` that answers with a message, and keeps the last request."""

    def __init__(self, answer: Any) -> None:
        self.answer = write(answer)
        self.method, self.path, self.body, self.headers = "", "", b"", dict[str, str]()

    def request(self, method: str, path: str, body: bytes, headers: Mapping[str, str], *rest: Any) -> Answer:
        self.method, self.path, self.body, self.headers = method, path, body, dict(headers)
        return Answer(200, {}, self.answer)

    def close(self) -> None: ...


@pytest.mark.parametrize("size", [0, 10, MAX_UNDIGESTED + 1, 2**20])
def test_reports_and_sums_carry_their_digest(size: int) -> None:
    for send in (
        lambda requests: requests.report(WORK, b"x" * size),
        lambda requests: requests.report_sum("tiny", "train", b"x" * size),
    ):
        sent = Recorded(Counted(False))
        send(Requests(sent, KEY, "people"))  # pyright: ignore[reportArgumentType]
        digest = hashlib.sha256(b"x" * size).hexdigest()
        assert sent.headers["Sumus-Digest"] == digest
        text = text_over(sent.method, sent.path, "people", sent.headers["Sumus-Device"], digest)
        assert verify(public_key_of(KEY), from_base64url(sent.headers["Sumus-Signature"]), text)


def test_messages_carry_a_digest_only_if_they_are_long() -> None:
    asked = CheckInRequest(1, "s1", ("0" * 64,))
    sent = Recorded(CheckInAnswer())
    Requests(sent, KEY, "people").check_in(asked)  # pyright: ignore[reportArgumentType]
    assert "Sumus-Digest" not in sent.headers
    sent = Recorded(RelayAnswer(()))
    many = tuple(Relayed(f"{number:064x}", "A" * 43, write(asked).decode(), "A" * 86) for number in range(250))
    Requests(sent, KEY, "people").relay(RelayRequest(250, many))  # pyright: ignore[reportArgumentType]
    assert len(sent.body) > MAX_UNDIGESTED
    assert sent.headers["Sumus-Digest"] == hashlib.sha256(sent.body).hexdigest()
