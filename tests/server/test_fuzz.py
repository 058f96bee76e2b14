"""Whatever is sent, the answer is of the protocol: never a defect, always a code of the closed list. `benchmarks.fuzz` is the
long form."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.operations.service import Conduct, open_service
from sumus.server.limits import Limits, Rate
from sumus.transport.inprocess import InProcess
from sumus.wire.messages import ENDPOINTS, STATUS, Assignment, Endpoint, Problem, read, signed_text
from sumus.wire.reports import encode_report
from tests.server.devices import ScriptedDevice, path_of, tiny, update_of
from tests.server.test_server import Running

MUCH = Rate(1e9, 10**9)
BUNDLE = tiny(2)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
WORDS = st.sampled_from(["tiny", "train", "evaluate", "s1", "0" * 64, BUNDLE.plan.id, "", ".", "..", "a/b"])
SEGMENTS = (WORDS | st.text(max_size=70)).filter(lambda text: text.isascii() or text.isprintable())
FIELDS: dict[str, Any] = {
    "serial": 1,
    "session": "s1",
    "fingerprints": [BUNDLE.plan.description.fingerprint],
    "kinds": ["train"],
    "conditions": {},
    "previous": {"task": "tiny", "kind": "train", "session": "s1"},
    "wait_s": 0.0,
    "reason": "other",
    "token": "a",
    "public_key": "a",
    "nonce": "a",
    "signature": "a",
}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    service = open_service({"tiny": BUNDLE}, conduct=Conduct(group=0.0, limits=Limits(MUCH, MUCH, MUCH, MUCH)))
    service.server.start()
    with InProcess(service.device_app) as transport:
        yield Running(service, transport)
    service.close()


@pytest.fixture(scope="module")
def working(running: Running) -> tuple[ScriptedDevice, Assignment]:
    """A device with work; the other one that a round needs never asks."""
    device, _ = running.device(), running.device()
    work = device.work(BUNDLE.plan)
    assert work is not None
    return device, work


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """JSON of which much is as it should be."""
    form = dict(FIELDS)
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=2)):
        form[name] = draw(JSON)
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=1)):
        form.pop(name)
    return json.dumps(form).encode()


@st.composite
def damaged(draw: st.DrawFn, body: bytes) -> bytes:
    """A report, or what is left of it."""
    begin, end = sorted((draw(st.integers(0, len(body))), draw(st.integers(0, len(body)))))
    return body[:begin] + draw(st.binary(max_size=9)) + body[end:]


REPORT = encode_report(update_of(BUNDLE.plan, "fuzz"))
BODIES = st.binary(max_size=300) | messages() | JSON.map(lambda value: json.dumps(value).encode()) | damaged(REPORT)
HEADERS = st.dictionaries(
    st.sampled_from(["Content-Encoding", "Content-Length", "If-None-Match", "Range", "Sumus-Protocol", "Accept"]),
    st.sampled_from(["1", "0", "-1", "gzip", "identity", "bytes=0-", "bytes=-1", "bytes=9-1", '"', "*"]),
    max_size=2,
)


@given(
    st.sampled_from([each for each in ENDPOINTS if each.name != "withdraw"]),
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", None, None, None]),
    st.tuples(SEGMENTS, SEGMENTS, SEGMENTS),
    st.booleans(),
    BODIES,
    HEADERS,
    st.sampled_from(["right", "right", "right", "of another", "none", "damaged"]),
)
def test_whatever_is_sent_the_answer_is_of_the_protocol(
    running: Running,
    working: tuple[ScriptedDevice, Assignment],
    endpoint: Endpoint,
    method: str | None,
    segments: tuple[str, str, str],
    mine: bool,
    body: bytes,
    headers: dict[str, str],
    signature: str,
) -> None:
    device, work = working
    task, kind, session = (quote(segment, safe="") for segment in segments)
    path = endpoint.path.format(task=task, kind=kind, session=session, sha256=task)
    if mine and endpoint.name in ("report", "abort"):
        path = path_of(work) + path[len(path.removesuffix("/abort")) :]
    method = method or endpoint.method
    text = signed_text(method, path, device.population, device.id, body if signature != "of another" else b"other")
    sent = {"Sumus-Protocol": "1", "Sumus-Device": device.id, "Sumus-Signature": device._sign(text)}  # pyright: ignore[reportPrivateUsage]
    if signature == "none":
        del sent["Sumus-Signature"]
    elif signature == "damaged":
        sent["Sumus-Signature"] = sent["Sumus-Signature"][:-1] + "é"
    answer = running.transport.request(method, path, body, {**sent, **headers})
    assert running.transport.failures == []
    if answer.status < 400:
        assert answer.status in (200, 206, 304)
        return
    if answer.status == 416:
        return
    assert answer.headers["content-type"] == "application/problem+json"
    if method != "HEAD":
        code = read(Problem, answer.body).code
        assert STATUS[code] == answer.status, code
        assert answer.status < 500 or code == "busy", answer.body
