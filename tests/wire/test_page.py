"""docs/wire.md says what the code does: its tables of requests, messages, errors and limits against the code's own."""

import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

from sumus.device import words
from sumus.http import answers, bodies, connections
from sumus.wire import messages, reports, tensors
from sumus.wire.messages import AGAIN, ENDPOINTS, EVERYWHERE, MAX_CONTROL, MAX_UNDIGESTED, PROTOCOL, STATUS

PAGE = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
FORMS: dict[str, Any] = {
    name: form
    for name, form in vars(messages).items()
    if isinstance(form, type) and issubclass(form, msgspec.Struct) and form is not msgspec.Struct
}
WORDS = {
    name: getattr(messages, name)
    for name in ("Hash", "Base64", "Word", "Name", "Kind", "Count", "Serial", "Seconds", "Window")
}


def rows_after(mark: str) -> list[list[str]]:
    """The cells of the table that follows a line, without its head."""
    table = re.search(r"\n((?:\|.*\n)+)", PAGE[PAGE.index(mark) + len(mark) :])
    assert table, mark
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[1].splitlines()[2:]]


def codes_in(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def said_of(kind: Any) -> str:
    """A type, as the page says it."""
    for name, form in WORDS.items():
        if kind == form:
            return name
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind.__name__
    if kind in (bool, str, int):
        return {bool: "true or false", str: "string", int: "number"}[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if each is type(None) else said_of(each) for each in inner)
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in inner)
    if origin is dict:
        return f"object of {said_of(inner[1])} by {said_of(inner[0])}"
    if origin is tuple:
        return f"array of {said_of(inner[0])}"
    if hasattr(kind, "__metadata__"):
        meta = kind.__metadata__[0]
        if meta.max_length is not None:
            return f"{said_of(inner[0])}, at most {meta.max_length}"
        return f"from {meta.ge:g} to {meta.le:g}"
    raise AssertionError(kind)


def said_of_absence(field: Any) -> str:
    """What a field means that is left out, as the page says it; nothing where it may not be."""
    if field.default_factory is not msgspec.NODEFAULT:
        return {"{}": "`{}`", "[]": "`[]`"}.get(str(field.default_factory()), "as its own fields left out")
    if field.default is msgspec.NODEFAULT:
        return ""
    if isinstance(field.default, msgspec.Struct):
        return "as its own fields left out"
    return f"`{msgspec.json.encode(field.default).decode()}`"


def rows_of(form: Any) -> list[list[str]]:
    hints = get_type_hints(form, include_extras=True)
    return [[f"`{f.name}`", said_of(hints[f.name]), said_of_absence(f)] for f in msgspec.structs.fields(form)]


@pytest.mark.parametrize("name", sorted(name for name, form in FORMS.items() if msgspec.structs.fields(form)))
def test_each_message_is_on_the_page(name: str) -> None:
    rows = rows_after(f"### {name}\n")
    assert [row[:3] for row in rows] == rows_of(FORMS[name])
    assert all(row[3] for row in rows), "each field is explained"


def test_there_are_no_other_messages() -> None:
    section = re.search(r"^## Messages\n(.*?)^## ", PAGE, re.M | re.S)
    assert section
    listed = set(re.findall(r"^### (\w+)$", section[1], re.M))
    assert listed == {name for name, form in FORMS.items() if msgspec.structs.fields(form)}
    assert {row[0] for row in rows_after("so no clock needs to be right.")} == set(WORDS)


def test_each_request_is_on_the_page() -> None:
    found = rows_after("<!-- endpoints -->")
    forms = {None: "", bytes: "bytes", messages.Nothing: "`{}`"}
    wanted = [
        [
            f"`{each.name}`",
            f"`{each.method} {each.path}`",
            forms.get(each.body, each.body.__name__ if each.body else ""),
            forms.get(each.answer, each.answer.__name__),
            "yes" if each.signed else "",
        ]
        for each in ENDPOINTS
    ]
    assert [row[:5] for row in found] == wanted
    assert [codes_in(row[5]) for row in found] == [set(each.codes) for each in ENDPOINTS]
    assert {each.status for each in ENDPOINTS} == {200}
    everywhere = re.search(r"Every request may also bring\s+(.*?)\.\n", PAGE, re.S)
    assert everywhere
    assert codes_in(everywhere[1]) == set(EVERYWHERE)


def test_each_error_is_on_the_page() -> None:
    rows = rows_after("<!-- errors -->")
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (f"`{code}`", str(status), "yes" if code in AGAIN else "") for code, status in STATUS.items()
    ]
    assert all(row[3] for row in rows)


def test_the_rules_of_a_device_are_its_own() -> None:
    (discarded,) = (row for row in rows_after("begins nothing new:") if row[1] == "it is not, and will not be")
    assert codes_in(discarded[0]) == words.REFUSALS
    final = re.search(r"at a check-in,\s+(.*?)\.\n", PAGE, re.S)
    assert final
    assert codes_in(final[1]) == set(words.FINAL)


def test_the_limits_are_the_code_s() -> None:
    rows = {row[0]: row for row in rows_after("## Limits")}
    assert (MAX_CONTROL, MAX_UNDIGESTED, tensors.MAX_HEADER) == (2**16, 2**16, 2**20)
    assert (bodies.LEAST, bodies.WINDOW_S) == (160 * 2**10, 10.0)
    assert (connections.MOST_HEAD, connections.HEAD_S) == (2**15, 10.0)
    assert (connections.HANDSHAKE_S, connections.STALLED_S, answers.PIECE) == (10.0, 10.0, 2**16)
    assert rows["a JSON body"][1] == "64 KiB"
    assert rows["a signed body without `Sumus-Digest`"][1] == "64 KiB"
    assert rows["a body's rate"][1] == "160 KiB, or the rest of it, every 10 seconds"
    assert rows["an answer's rate"][1] == "64 KiB taken every 10 seconds"
    assert rows["a request's head"][1] == "32 KiB, 10 seconds"
    assert reports.MOST_EXAMPLES == 2**53
    assert set.union(*(codes_in(row[2]) for row in rows.values())) <= set(STATUS)
    assert f"Version {PROTOCOL}. **Normative**" in PAGE
