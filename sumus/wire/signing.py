"""A device's identity and signatures: an Ed25519 key, the key's hash, and signatures over `messages.signed_text`.

    device = device_id(public_key_of(seed))                       64 hexadecimal digits: the device's id
    signature = sign(seed, text)                                  64 bytes; the same text always gives the same bytes
    verify(public_key, signature, text)                           False for any other signature

No random numbers are drawn here: the owner supplies the 32 bytes of a private key. Ed25519 is used as in RFC 8032, and verified
without the cofactor, as in OpenSSL. Bytes are sent as base64url without padding (RFC 4648, section 5), which gives each byte
string exactly one encoding.
"""

import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sumus.errors import ParticipantError

KEY, SIGNATURE = 32, 64
"""The lengths of a key and of a signature, in bytes."""
_P = 2**255 - 19
_ORDER_8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
_SMALL_ORDER = frozenset({0, 1, _P - 1, _ORDER_8, _P - _ORDER_8})
"""The y coordinates of the eight points whose order divides 8. For a public key that is one of these points, anybody can make a
valid signature of some text.
"""


def to_base64url(body: bytes) -> str:
    """Encode bytes as base64url, without padding."""
    return urlsafe_b64encode(body).rstrip(b"=").decode()


def from_base64url(text: str) -> bytes:
    """Decode base64url.

    Raises:
        ParticipantError: The text has padding, characters of another alphabet, or unused bits that are not 0.
    """
    try:
        body = urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except ValueError:  # UnicodeEncodeError and binascii.Error are ValueErrors
        body = b""
    if to_base64url(body) != text:
        raise ParticipantError(None, "not base64url: use only letters, digits, - and _, without padding")
    return body


def read_public_key(text: str) -> bytes:
    """Decode a public key (32 bytes) from base64url.

    Raises:
        ParticipantError: The text is not a key that `verify` would accept.
    """
    key = from_base64url(text)
    if not _usable(key):
        raise ParticipantError(
            None, "not an Ed25519 public key: it must be the 32 bytes of a point that does not have a small order"
        )
    return key


def device_id(public_key: bytes) -> str:
    """Return the SHA-256 of a public key, in hexadecimal."""
    return hashlib.sha256(public_key).hexdigest()


def public_key_of(seed: bytes) -> bytes:
    """Return the public key (32 bytes) that belongs to `seed`: 32 secret bytes, the private key of RFC 8032."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def sign(seed: bytes, text: bytes) -> bytes:
    """Sign a text. The signature has 64 bytes; the same key and text always give the same signature."""
    return Ed25519PrivateKey.from_private_bytes(seed).sign(text)


def verify(public_key: bytes, signature: bytes, text: bytes) -> bool:
    """Return whether this key's owner signed this text.

    This function raises no exception, whatever its input. It returns False for keys of small order, and for keys that are not
    encoded canonically.
    """
    if not _usable(public_key) or len(signature) != SIGNATURE:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def _usable(key: bytes) -> bool:
    """Return whether these 32 bytes are a y coordinate smaller than p that is not of small order. `verify` then checks whether
    a point with this y exists.
    """
    y = int.from_bytes(key, "little") & (2**255 - 1)
    return len(key) == KEY and y < _P and y not in _SMALL_ORDER
