"""Signatures against RFC 8032, and against keys and signatures that are made to deceive."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.errors import ParticipantError
from sumus.wire.signing import (
    _P,
    _SMALL_ORDER,
    device_id,
    from_base64url,
    public_key_of,
    read_public_key,
    sign,
    to_base64url,
    verify,
)

RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655"
        "141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00"
        "d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc02"
        "7beceea1ec40a",
    ),
]
"""Section 7.1: private key, public key, message, signature."""
ORDER = 2**252 + 27742317777372353535851937790883648493
SECRET, TEXT = bytes(range(32)), b"sumus 1"
KEY, SIGNED = public_key_of(SECRET), sign(SECRET, TEXT)


@pytest.mark.parametrize("vector", RFC_8032)
def test_it_is_the_rfcs(vector: tuple[str, ...]) -> None:
    secret, key, text, signature = map(bytes.fromhex, vector)
    assert public_key_of(secret) == key
    assert sign(secret, text) == signature
    assert verify(key, signature, text)


def test_an_id_is_the_keys_hash() -> None:
    assert device_id(KEY) == hashlib.sha256(KEY).hexdigest()


@given(where=st.integers(0, 96 * 8 + 55))
def test_one_bit_changed_anywhere_is_seen(where: int) -> None:
    whole = bytearray(KEY + SIGNED + TEXT)
    whole[where // 8] ^= 1 << where % 8
    assert not verify(bytes(whole[:32]), bytes(whole[32:96]), bytes(whole[96:]))


@given(
    key=st.binary(max_size=40) | st.binary(min_size=32, max_size=32), signature=st.binary(max_size=70), text=st.binary()
)
def test_no_bytes_raise(key: bytes, signature: bytes, text: bytes) -> None:
    assert not verify(key, signature, text)
    assert not verify(KEY, signature, text)
    assert not verify(key, SIGNED, text)


def test_a_signature_has_one_spelling() -> None:
    """S and S + L satisfy one equation: only the first is taken."""
    again = int.from_bytes(SIGNED[32:], "little") + ORDER
    assert not verify(KEY, SIGNED[:32] + again.to_bytes(32, "little"), TEXT)
    assert not verify(KEY, SIGNED + b"\0", TEXT)


def point(y: int) -> bool:
    """Whether there is a point with this y, and 8 times it is the neutral one: by the curve's own formulas."""
    d = -121665 * pow(121666, -1, _P) % _P
    square = (y * y - 1) * pow(d * y * y + 1, -1, _P) % _P
    x = pow(square, (_P + 3) // 8, _P)
    if x * x % _P != square:
        x = x * pow(2, (_P - 1) // 4, _P) % _P
    if x * x % _P != square:
        return False
    for _ in range(3):
        product = d * x * x * y * y % _P
        x, y = 2 * x * y * pow(1 + product, -1, _P) % _P, (y * y + x * x) * pow(1 - product, -1, _P) % _P
    return (x, y) == (0, 1)


def test_the_list_of_small_orders_is_right() -> None:
    assert all(map(point, _SMALL_ORDER))
    assert not point(int.from_bytes(KEY, "little") & (2**255 - 1))


@pytest.mark.parametrize("sign_bit", [0, 1 << 255])
@pytest.mark.parametrize("y", sorted(_SMALL_ORDER | {_P, _P + 1, 2**255 - 1}))
def test_a_key_of_small_order_or_in_a_second_spelling_signs_nothing(y: int, sign_bit: int) -> None:
    key = (y | sign_bit).to_bytes(32, "little")
    with pytest.raises(ParticipantError, match="not an Ed25519 public key"):
        read_public_key(to_base64url(key))
    for first in (
        b"\1" + bytes(31),
        key,
    ):  # the neutral point and itself, with S = 0, satisfy the equation for some texts
        assert not any(verify(key, first + bytes(32), bytes([text])) for text in range(64))


def test_a_key_that_is_no_point_signs_nothing() -> None:
    off = next(y for y in range(2, 99) if not _on_curve(y))
    assert not verify(off.to_bytes(32, "little"), SIGNED, TEXT)


def _on_curve(y: int) -> bool:
    d = -121665 * pow(121666, -1, _P) % _P
    square = (y * y - 1) * pow(d * y * y + 1, -1, _P) % _P
    return pow(square, (_P - 1) // 2, _P) in (0, 1)


@given(st.binary(max_size=80))
def test_base64url_comes_back(body: bytes) -> None:
    assert from_base64url(to_base64url(body)) == body
    assert set(to_base64url(body)) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@given(st.text(max_size=12) | st.text("AB-_=+/ \n", max_size=6))
def test_a_text_has_one_meaning_or_none(text: str) -> None:
    try:
        body = from_base64url(text)
    except ParticipantError:
        return
    assert to_base64url(body) == text


@pytest.mark.parametrize(
    "text", ["A", "AB", "AAB", "AA==", "AA=", "+/AA", "AA AA", "AAAA\n", "é", "AAAAA", "=", "\ud800"]
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(ParticipantError, match="not base64url"):
        from_base64url(text)


def test_a_public_key_is_read() -> None:
    assert read_public_key(to_base64url(KEY)) == KEY
    for other in ("", to_base64url(KEY[:31]), to_base64url(KEY + b"\0"), to_base64url(KEY) + "="):
        with pytest.raises(ParticipantError):
            read_public_key(other)
