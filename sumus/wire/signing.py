"""Who a device is, and whether it said this: an Ed25519 key, its hash, and signatures over `messages.signed_text`.

    device = device_id(public_key_of(seed))                       64 hexadecimal digits, its name everywhere
    signature = sign(seed, text)                                  64 bytes; the same again for the same text
    verify(public_key, signature, text)                           False for whatever else there is

Nothing here rolls dice: the 32 bytes that a key begins with come from its owner. Ed25519 is that of RFC 8032, checked without
the cofactor, as OpenSSL does it. Bytes travel in base64url without padding (RFC 4648, 5), in the one spelling that they have.
"""

import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sumus.errors import ParticipantError

KEY, SIGNATURE = 32, 64
"""Lengths in bytes."""
_P = 2**255 - 19
_ORDER_8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
_SMALL_ORDER = frozenset({0, 1, _P - 1, _ORDER_8, _P - _ORDER_8})
"""y of the eight points whose order divides 8: under such a key anybody can sign something."""


def to_base64url(body: bytes) -> str:
    """Bytes as text, without padding."""
    return urlsafe_b64encode(body).rstrip(b"=").decode()


def from_base64url(text: str) -> bytes:
    """The bytes of a text. ParticipantError for one that `to_base64url` does not make: padded, in another alphabet, or with
    bits left over."""
    try:
        body = urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except ValueError:  # UnicodeEncodeError and binascii.Error are
        body = b""
    if to_base64url(body) != text:
        raise ParticipantError(None, "not base64url: letters, digits, - and _, without padding")
    return body


def read_public_key(text: str) -> bytes:
    """A public key, 32 bytes, of its base64url. ParticipantError where it is no key that `verify` would take."""
    key = from_base64url(text)
    if not _usable(key):
        raise ParticipantError(None, "no Ed25519 public key: 32 bytes, of a point that is not of small order")
    return key


def device_id(public_key: bytes) -> str:
    """SHA-256 of a public key, in hexadecimal."""
    return hashlib.sha256(public_key).hexdigest()


def public_key_of(seed: bytes) -> bytes:
    """The public key, 32 bytes, of a private one. seed: 32 secret bytes, RFC 8032's private key."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def sign(seed: bytes, text: bytes) -> bytes:
    """64 bytes; the same key signs the same text in the same way."""
    return Ed25519PrivateKey.from_private_bytes(seed).sign(text)


def verify(public_key: bytes, signature: bytes, text: bytes) -> bool:
    """Whether this key's owner signed this text. No bytes make it raise; keys of small order, or spelt in a second way, sign
    nothing."""
    if not _usable(public_key) or len(signature) != SIGNATURE:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def _usable(key: bytes) -> bool:
    """Whether these are 32 bytes of a y below p that is not of small order. That there is a point with it, `verify` finds."""
    y = int.from_bytes(key, "little") & (2**255 - 1)
    return len(key) == KEY and y < _P and y not in _SMALL_ORDER
