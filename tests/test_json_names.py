"""A name that appears twice in one object of JSON is found, with its line, and refused where a person writes JSON."""

import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest

from sumus.errors import PlanError
from sumus.json_names import repeated
from sumus.node.formats import MOST_CONTAINERS, read_json, read_lines
from sumus.node.mqtt import _readings_of  # pyright: ignore[reportPrivateUsage]
from sumus.node.reading import BadReading
from sumus.operations.service import open_service
from sumus.plan import Plan
from sumus.server.access import Access
from sumus.server.admin_plane import admin_app
from sumus.transport.inprocess import InProcess
from tests.server.devices import tiny


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1, "a": 2}', ("a", 1)),
        ('{"a": 1,\n "b": 2,\r\n "a": 3}', ("a", 3)),
        ('{"a": 1, "\\u0061": 2}', ("a", 1)),
        ('{"é": 1, "\\u00e9": 2}', ("é", 1)),
        ('{"": 1, "": 2}', ("", 1)),
        ('{"a\\"": 1, "a\\"": 2}', ('a"', 1)),
        ('[{"x": [1, {"y": 1,\n\n"y": {}}]}]', ("y", 3)),
        ('{"a": {"a": 1}, "b": {"a": 1}}', None),
        ('[{"a": 1}, {"a": 1}]', None),
        ('{"a": "a: a", "b": "{\\"a\\": 1, \\"a\\": 2}", "c": ["a", "a"]}', None),
        ('{"a": "\\\\", "b": ":"}', None),
        ('{"at": "12:00:00", "A": 1, "a": 1}', None),
        ('{"a": 1, "a": ', None),
        ("a: 1, a: 2", None),
        ("[" * 100_000, None),
        ('{"n": 1' + "0" * 5000 + "}", None),
        ("", None),
    ],
)
def test_the_first_name_that_stands_twice(text: str, found: tuple[str, int] | None) -> None:
    assert repeated(text.encode()) == found


@pytest.mark.parametrize(
    "body",
    [
        '{"label": 1, "label": 2}',
        '[{"label": 1}, {"label": 1, "label": 2}]',
        '[{"at": "12:00:00", "label": 1, "label": 2}]',
        '{"inputs": {"label": 1, "label": 2}}',
    ],
)
def test_a_reading_that_says_a_name_twice_is_refused(body: str) -> None:
    with pytest.raises(BadReading, match="the name 'label' appears twice in one object: keep one of the two"):
        read_json(body.encode())
    with pytest.raises(BadReading, match="'label' appears twice"):
        _readings_of(SimpleNamespace(topic="home/1", payload=body.encode()))
    with pytest.raises(BadReading, match="the second time in line 2"):
        read_json(body.replace('"label": 2', '\n"label": 2').encode())
    assert read_json(body.replace('"label": 2', '"other": 2').encode())


def test_of_lines_that_one_is_refused_and_a_document_as_a_whole() -> None:
    batch = read_lines(b'{"a": 1}\n{"a": 1, "a": 2}\n{"a": 3}\n')
    assert [isinstance(each, BadReading) for each in batch.found] == [False, True, False]
    assert "appears twice" in str(batch.found[1])
    assert batch.where(1) == "line 2"
    with pytest.raises(BadReading, match="'a' appears twice in one object, the second time in line 3"):
        read_lines(b'[{"a": 1},\n {"a": 2,\n "a": 3}]\n')


@pytest.mark.parametrize("piece", ["[]", "{}", "[[]]", '{"a":{}}'])
def test_a_body_of_brackets_takes_no_more_memory_than_it_has_bytes(piece: str) -> None:
    body = f"[{','.join([piece] * (2 * MOST_CONTAINERS))}]".encode()
    tracemalloc.start()
    try:
        with pytest.raises(BadReading, match=f"lists and objects, but at most {MOST_CONTAINERS} are read"):
            read_json(body)
        assert tracemalloc.get_traced_memory()[1] < len(body)
    finally:
        tracemalloc.stop()


def test_a_plan_that_says_something_twice_is_refused() -> None:
    text = tiny().plan.to_json()
    assert Plan.from_json(text) == tiny().plan
    first = text.index('"min_contributors"')
    with pytest.raises(PlanError, match=r"'min_contributors' appears twice in one object \(line 1\)"):
        Plan.from_json(text[:first] + '"min_contributors":1,' + text[first:])


def test_what_an_admin_sends_says_everything_once(tmp_path: Any) -> None:
    service = open_service({"tiny": tiny()})
    with InProcess(admin_app(service, Access(tmp_path), str)) as admin:
        headers = {"Host": "localhost", "Content-Type": "application/json"}
        answer = admin.request("POST", "/v1/admin/login", b'{"code": "a",\n"code": "b"}', headers)
    assert answer.status == 400
    assert b"appears twice in one object, the second time in line 2" in answer.body
    service.close()
