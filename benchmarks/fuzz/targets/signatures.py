"""Authentication of a request: keys and signatures as base64url, and the text that is signed."""

from collections.abc import Mapping

from benchmarks.fuzz.target import Target
from sumus.errors import ParticipantError
from sumus.wire.messages import enrolment_text, signed_text
from sumus.wire.signing import (
    device_id,
    from_base64url,
    public_key_of,
    read_public_key,
    sign,
    to_base64url,
    verify,
)

SEED = b"a seed of 32 bytes for a test..."
KEY = public_key_of(SEED)


def check(data: bytes) -> None:
    """Check that base64url has one spelling, that only a key's owner can sign, and that two requests have two texts.

    The lines of an input are a method, a path, a population, a device, a key and a signature; the rest is the body.
    """
    lines = data.split(b"\n", 6)
    method, path, population, device, key, signature, body = [*lines, *[b""] * (7 - len(lines))]
    for word in (key, signature):
        _check_spelling(word)
    words = [word.decode("utf-8", "replace") for word in (method, path, population, device)]
    try:
        signed = signed_text(*words, body)
    except ParticipantError:
        signed = body
    else:
        assert " ".join(words) == signed.decode().split("\n", 1)[1].rpartition("\n")[0].replace("\n", " ")
    assert not verify(KEY, signature, signed) or signature == sign(SEED, signed)
    verify(key, signature, signed)
    try:
        enrolment_text(*words[:3])
    except ParticipantError:
        return


def _check_spelling(word: bytes) -> None:
    text = word.decode("utf-8", "replace")
    try:
        assert to_base64url(from_base64url(text)) == text
        assert len(device_id(read_public_key(text))) == 64
    except ParticipantError:
        return


def _input(key: bytes, signature: bytes = b"", path: bytes = b"/v1/checkins", body: bytes = b"{}") -> bytes:
    return b"\n".join((b"POST", path, b"default", b"0" * 64, key, signature, body))


def seeds() -> Mapping[str, bytes]:
    """Return a signed request, and keys and texts that are invalid."""
    key = to_base64url(KEY).encode()
    text = signed_text("POST", "/v1/checkins", "default", "0" * 64, b"{}")
    return {
        "signed": _input(key, to_base64url(sign(SEED, text)).encode()),
        "signature-as-bytes": _input(KEY, sign(SEED, text)),
        "small-order": _input(to_base64url(bytes(32)).encode()),
        "beyond-p": _input(to_base64url(b"\xff" * 32).encode()),
        "no-point": _input((2).to_bytes(32, "little"), bytes(64)),
        "short": _input(to_base64url(b"a").encode()),
        "padded": _input(key + b"="),
        "bits-left-over": _input(b"AB"),
        "other-letters": _input("é".encode()),
        "blanks": _input(key, path=b"/v1/check ins"),
        "empty": b"",
    }


TARGET = Target(
    "signatures",
    check,
    seeds,
    {
        "sumus.wire.signing": (),
        "sumus.wire.messages": ("signed_text", "enrolment_text", "_lines", "_word"),
    },
    (b"\n", b"=", b"-_", bytes(32), to_base64url(bytes(32)).encode(), to_base64url(KEY).encode(), b"\xc3\xa9", b"\x7f"),
)
