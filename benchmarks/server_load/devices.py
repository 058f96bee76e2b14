"""Devices that a generator plays. Their requests are signed beforehand, as bytes that are sent over a connection."""

import hashlib
from typing import TypeAlias

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sumus.aggregate import Update
from sumus.wire.messages import CheckInRequest, text_over, write
from sumus.wire.reports import encode_report
from sumus.wire.signing import device_id, to_base64url

Pieces: TypeAlias = tuple[bytes, bytes]
"""A request's head and its body. Requests may share a body."""


class Device:
    """One device. number: its key is made from it, so the device is the same in every process."""

    def __init__(self, number: int) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"load {number}".encode()).digest())
        self.public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.id = device_id(self.public)

    def check_in(self, fingerprints: tuple[str, ...], serial: int, wait_s: float = 0.0) -> Pieces:
        """Return its check-in number `serial`, for a session `sSERIAL`."""
        asked = CheckInRequest(serial, f"s{serial}", fingerprints, ("train",), wait_s=wait_s)
        body = write(asked)
        return self._signed("POST", "/v1/checkins", body, hashlib.sha256(body).hexdigest())

    def report(self, task: str, serial: int, body: bytes, digest: str) -> Pieces:
        """Return its report for session `sSERIAL`. digest: SHA-256 of the body, which many reports share."""
        return self._signed("PUT", f"/v1/tasks/{task}/train/s{serial}", body, digest)

    def _signed(self, method: str, path: str, body: bytes, digest: str) -> Pieces:
        text = text_over(method, path, "default", self.id, digest)
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: load\r\nSumus-Protocol: 1\r\nSumus-Device: {self.id}\r\n"
            f"Sumus-Signature: {to_base64url(self._key.sign(text))}\r\nSumus-Digest: {digest}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode(), body


def report_body(size: int) -> tuple[bytes, str]:
    """Return a report of a model of this many float32, and its SHA-256."""
    values = np.random.default_rng(0).normal(0.0, 0.5 / size**0.5, size).astype(np.float32)
    body = encode_report(Update("", {"params": {"w": values}}, 10, {"loss": (5.0, 10)}))
    return body, hashlib.sha256(body).hexdigest()


def fetch(sha256: str, known: bool = False) -> Pieces:
    """Return a request for an object, or, with `known`, a request whether it has changed."""
    condition = f'If-None-Match: "{sha256}"\r\n' if known else ""
    return f"GET /v1/objects/{sha256} HTTP/1.1\r\nHost: load\r\n{condition}\r\n".encode(), b""
