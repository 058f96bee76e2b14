"""Messages: what is written is read, what is hostile is one kind of error, and what is signed has one meaning."""

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import inspect

from sumus.errors import ParticipantError
from sumus.wire import messages
from sumus.wire.messages import (
    AGAIN,
    ENDPOINTS,
    EVERYWHERE,
    MAX_CONTROL,
    PROTOCOL,
    STATUS,
    Abort,
    Body,
    CheckInAnswer,
    CheckInRequest,
    Counted,
    DeviceConditions,
    Enrolment,
    EnrolmentRequest,
    Nothing,
    PreviousSession,
    Problem,
    Refused,
    Released,
    enrolment_text,
    read,
    signed_text,
    write,
)

FORMS: list[Any] = [
    form for form in vars(messages).values() if isinstance(form, type) and issubclass(form, msgspec.Struct)
]
HASH = "ab" * 32
CHECK_IN = CheckInRequest(
    3, "s-1", (HASH,), conditions=DeviceConditions(battery=0.5), previous=PreviousSession("t", "train", "s-0")
)


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Everything of a type, with its bounds and patterns."""
    match kind:
        case inspect.StructType(cls=form, fields=fields):
            return st.builds(form, **{field.name: values(field.type) for field in fields})
        case inspect.UnionType(types=types):
            return st.one_of([values(each) for each in types])
        case inspect.LiteralType(values=words):
            return st.sampled_from(sorted(words))
        case inspect.IntType(ge=low, le=high):
            return st.integers(low, high)
        case inspect.FloatType(ge=low, le=high):
            return st.floats(low, high)
        case inspect.StrType(pattern=None):
            return st.text(st.characters(codec="utf-8"), max_size=20)
        case inspect.StrType(pattern=str(pattern)) if "{64}" in pattern:
            return st.binary(min_size=32, max_size=32).map(bytes.hex)
        case inspect.StrType(pattern=str(pattern)):
            return st.from_regex(pattern.replace("$(?!\n)", r"\Z"))
        case inspect.VarTupleType(item_type=item, max_length=most):
            return st.lists(values(item), max_size=min(most or 4, 4)).map(tuple)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(values, items))
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values(key), values(value), max_size=3)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case _:
            raise NotImplementedError(kind)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read(form: Any) -> None:
    @given(values(inspect.type_info(form)))
    def check(message: Any) -> None:
        body = write(message)
        assert len(body) <= MAX_CONTROL
        assert read(form, body) == message
        assert read(form, memoryview(body)) == message
        more = json.loads(body) | {"a newer side says": [1, {"more": None}]}
        assert read(form, json.dumps(more).encode()) == message

    check()


def test_the_largest_check_in_and_its_answer_fit() -> None:
    request = msgspec.structs.replace(CHECK_IN, serial=2**53, session="s" * 64, fingerprints=(HASH,) * 64)
    assert read(CheckInRequest, write(request)) == request
    answer = CheckInAnswer(released={f"{number:064}": Released(2**53, Body(HASH, 2**53)) for number in range(64)})
    assert read(CheckInAnswer, write(answer)) == answer


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "a blank": b" ",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "half": b'{"serial":1,"session":"s',
    "more behind": write(CHECK_IN) + b"{}",
    "deep lists": b"[" * 30_000 + b"]" * 30_000,
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "deep in an unknown field": b'{"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "a huge number": b'{"serial":' + b"9" * 60_000 + b"}",
    "a huge exponent": b'{"serial":1e999999}',
    "no whole number": b'{"serial":1.5}',
    "NaN": b'{"conditions":{"battery":NaN}}',
    "Infinity": b'{"wait_s":Infinity}',
    "minus": b'{"serial":-1}',
    "beyond JavaScript": b'{"serial":9007199254740993}',
    "not UTF-8": b'{"session":"\xff\xfe"}',
    "half a surrogate": b'{"session":"\\ud800"}',
    "a byte-order mark": b"\xef\xbb\xbf" + write(CHECK_IN),
    "UTF-16": write(CHECK_IN).decode().encode("utf-16"),
    "a NUL": b'{"session":"\\u0000"}',
    "one quote": b"{'session':1}",
    "a comment": b"{/**/}",
    "a comma too many": b'{"serial":1,}',
    "too long": b"{" + b" " * MAX_CONTROL + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_the_participants_error(name: str) -> None:
    with pytest.raises(ParticipantError, match="CheckInRequest") as error:
        read(CheckInRequest, HOSTILE[name])
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("form", FORMS)
def test_no_bytes_raise_anything_else(form: Any) -> None:
    @given(st.binary(max_size=60) | ANY_JSON.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")))
    def check(body: bytes) -> None:
        try:
            message = read(form, body)
        except ParticipantError:
            return
        assert read(form, write(message)) == message

    check()


WORDS = st.sampled_from(sorted({name for form in FORMS for name in form.__struct_fields__}))
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(HASH),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=6),
)


@given(st.data())
def test_a_check_in_with_a_byte_changed_is_read_or_refused(data: st.DataObject) -> None:
    body = bytearray(write(CHECK_IN))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = read(CheckInRequest, bytes(body))
    except ParticipantError:
        return
    assert read(CheckInRequest, write(message)) == message


def changed(field: str, value: Any) -> bytes:
    """The check-in as JSON with one field's value another."""
    whole = json.loads(write(CHECK_IN))
    *way, last = field.split(".")
    inner = whole
    for step in way:
        inner = inner[step]
    inner[last] = value
    return json.dumps(whole).encode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("serial", "3"),
        ("serial", True),
        ("serial", None),
        ("session", ""),
        ("session", "s" * 65),
        ("session", "s/1"),
        ("session", "s\n"),
        ("session", "é"),
        ("session", ".."),
        ("fingerprints", [HASH] * 65),
        ("fingerprints", [HASH + "\n"]),
        ("fingerprints", [HASH.upper()]),
        ("fingerprints", HASH),
        ("kinds", ["predict"]),
        ("kinds", ["x" * 60_000]),
        ("kinds", ["train", "train", "train"]),
        ("conditions.battery", 1.1),
        ("conditions.charging", 1),
        ("previous.task", "-t"),
        ("previous.task", "t\n"),
        ("previous.task", "a/b"),
        ("wait_s", 61),
        ("wait_s", -0.1),
    ],
)
def test_a_field_out_of_its_bounds_is_refused_by_its_path(field: str, value: Any) -> None:
    with pytest.raises(ParticipantError, match=rf"\$\.{re.escape(field)}|length|enum"):
        read(CheckInRequest, changed(field, value))


@pytest.mark.parametrize("form", FORMS)
def test_no_text_with_a_pattern_takes_a_line_feed_at_its_end(form: Any) -> None:
    """Which Python's `$` would let pass."""

    def patterns(kind: inspect.Type) -> set[str]:
        if isinstance(kind, inspect.StrType):
            return {kind.pattern} if kind.pattern else set()
        inner = [getattr(kind, name) for name in ("item_type", "key_type", "value_type") if hasattr(kind, name)]
        inner += [*getattr(kind, "types", ()), *getattr(kind, "item_types", ())]
        inner += [field.type for field in getattr(kind, "fields", ())]
        return set().union(*map(patterns, inner))

    for pattern in patterns(inspect.type_info(form)):
        assert re.search(pattern, HASH)
        assert not re.search(pattern, HASH + "\n")


def test_of_two_fields_of_a_name_the_last_counts() -> None:
    """As everywhere in Python and JavaScript; the signature is over the bytes, so nothing hangs on it."""
    assert read(Abort, b'{"reason":"data","reason":"task"}') == Abort("task")


def test_an_empty_object_acknowledges_nothing() -> None:
    assert read(Nothing, b"{}") == Nothing()
    for form in (Counted, Enrolment):
        with pytest.raises(ParticipantError):
            read(form, b"{}")
    assert write(Counted(duplicate=False)) == b'{"duplicate":false,"status":"counted"}'
    with pytest.raises(ParticipantError):
        read(Counted, b'{"duplicate":false,"status":"staged"}')


def test_an_answer_without_anything_says_so_in_two_bytes() -> None:
    assert write(CheckInAnswer()) == b"{}"


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_code_has_a_status_and_every_code_is_somebodys() -> None:
    mentioned = {code for endpoint in ENDPOINTS for code in endpoint.codes} | set(EVERYWHERE)
    assert mentioned <= set(STATUS)
    assert set(STATUS) - mentioned == {"method"}
    assert set(STATUS) >= AGAIN
    assert all(400 <= status < 600 for status in STATUS.values())


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
def test_the_rows_of_the_table(endpoint: messages.Endpoint) -> None:
    assert len({other.name for other in ENDPOINTS}) == len({(other.method, other.path) for other in ENDPOINTS})
    assert len(set(endpoint.codes)) == len(endpoint.codes)
    assert not set(endpoint.codes) & set(EVERYWHERE)
    assert endpoint.signed == ({"unknown_device", "revoked"} <= set(endpoint.codes))
    for form in (endpoint.body, endpoint.answer):
        assert form in (None, bytes, *FORMS)


def test_a_refusal_is_a_problem_with_a_status() -> None:
    for code in STATUS:
        refused = Refused(code, "why", (1.0, 2.0))
        assert read(Problem, write(refused.problem)) == refused.problem
        assert refused.status == STATUS[code]
        assert refused.problem.protocol == (PROTOCOL if code == "old_protocol" else None)
    assert write(Refused("busy").problem) == b'{"code":"busy"}'


def test_a_code_that_a_newer_server_has_is_read() -> None:
    assert read(Problem, b'{"code":"of_tomorrow","detail":"x"}').code == "of_tomorrow"


# ── what is signed ───────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = st.text("a/ \n", max_size=3)


def text_or_none(make: Callable[..., bytes], *fields: Any) -> bytes | None:
    try:
        return make(*fields)
    except ParticipantError:
        return None


REQUEST = st.tuples(SMALL, SMALL, SMALL, SMALL, st.binary(max_size=1))


@given(REQUEST, REQUEST)
@example(("a", "b c", "d", "e", b""), ("a b", "c", "d", "e", b""))
@example(("a", "b\nc", "d", "e", b""), ("a", "b", "c\nd", "e", b""))
@example(("a", "b", "c\n", "e", b""), ("a", "b", "c", "\ne", b""))
def test_two_requests_have_two_texts(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    first, second = text_or_none(signed_text, *one), text_or_none(signed_text, *other)
    assert one == other or first is None or first != second


@given(st.tuples(SMALL, SMALL, SMALL), st.tuples(SMALL, SMALL, SMALL), REQUEST)
def test_two_enrolments_have_two_texts_and_no_request_has_one_of_them(
    one: tuple[str, ...], other: tuple[str, ...], request: tuple[Any, ...]
) -> None:
    first, second = text_or_none(enrolment_text, *one), text_or_none(enrolment_text, *other)
    assert one == other or first is None or first != second
    assert first is None or first != text_or_none(signed_text, *request)


@given(st.text(max_size=5))
def test_a_field_is_signed_as_it_is_or_not_at_all(field: str) -> None:
    text = text_or_none(signed_text, "POST", "/v1/" + field, "p", "d", b"")
    if text is None:
        assert re.search(r"[^!-~]", field)
    else:
        assert text.split(b"\n")[1] == b"POST /v1/" + field.encode()


def test_every_form_of_a_body_is_signed_alike() -> None:
    texts = {signed_text("PUT", "/", "p", "d", body) for body in (b"abc", bytearray(b"abc"), memoryview(b"abc"))}
    assert len(texts) == 1


@given(values(inspect.type_info(EnrolmentRequest)))
def test_whatever_a_message_holds_can_be_signed(request: Any) -> None:
    assert enrolment_text(request.nonce, request.public_key, request.token).count(b"\n") == 3
