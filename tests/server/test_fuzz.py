"""Whatever is sent to a real server, the answer is of its document: never a defect, always a status and a form that the document
names, and an error always with a code of the closed list.

schemathesis makes up the requests, from the OpenAPI document that the server gives of its device plane, and from one that is made
here of its admin plane. `--hypothesis-profile deep` makes up fifty times as many.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.server_load import generator
from benchmarks.server_load.devices import Device, report_body
from benchmarks.server_load.served import Job, bundle, process
from sumus.server import admin_messages, admin_plane
from sumus.server.access import Access
from sumus.server.openapi import _plain  # pyright: ignore[reportPrivateUsage]
from sumus.server.status import ServerStatus
from sumus.wire.messages import ENDPOINTS, STATUS, Endpoint, Nothing, Problem, read

pytestmark = pytest.mark.xdist_group("fuzzed server")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SIZE, DEVICES = 16, 6
REPORT = report_body(SIZE)[0]
FEW = max(10, settings.default.max_examples // 3)  # pyright: ignore[reportOptionalMemberAccess]
ADMIN: tuple[tuple[str, str, Any, Any], ...] = (
    ("POST", "/v1/admin/login", admin_messages.Login, admin_messages.LoggedIn),
    ("POST", "/v1/admin/logout", None, Nothing),
    ("GET", "/v1/admin/status", None, ServerStatus),
    ("GET", "/v1/admin/models/{task}", None, admin_messages.Lineage),
    ("GET", "/v1/admin/models/{task}/{version}", None, bytes),
    ("POST", "/v1/admin/models/{task}/promote", admin_messages.VersionRef, admin_messages.ChangeMade),
    ("POST", "/v1/admin/models/{task}/rollback", admin_messages.VersionRef, admin_messages.ChangeMade),
    ("POST", "/v1/admin/models/{task}/pause", admin_messages.RunRef, admin_messages.ChangeMade),
    ("POST", "/v1/admin/models/{task}/resume", admin_messages.RunRef, admin_messages.ChangeMade),
    ("POST", "/v1/admin/models/{task}/cancel", admin_messages.RunRef, admin_messages.ChangeMade),
    ("POST", "/v1/admin/tokens", admin_messages.NewToken, admin_messages.EnrolmentLink),
    ("GET", "/v1/admin/devices", None, admin_messages.DevicePage),
    ("POST", "/v1/admin/devices/{device}/revoke", None, Nothing),
)
"""Method, path, and the forms of the body and of the answer, of the requests of the admin plane."""


@dataclass(frozen=True)
class Served:
    """A server in a process of its own.

    Args:
        url: where devices ask.
        admin_url: where admins ask.
        known: what a request may name that is there, by the name of a parameter of its path.
        session: of an admin.
    """

    url: str
    admin_url: str
    known: dict[str, str]
    session: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a task, a device of which has work; the others that a round needs never ask."""
    job = Job(str(tmp_path_factory.mktemp("served") / "data"), None, (SIZE,), 3, DEVICES)
    plan = bundle(SIZE, job).plan
    with process(job) as server:
        fingerprint = plan.description.fingerprint
        work = generator.work_for(server.port, 1, 1, fingerprint)
        access, now = Access(Path(job.data) / "admin"), time.time()
        known = {"task": work.task, "kind": work.kind, "session": work.session, "sha256": work.plan.sha256}
        yield Served(
            f"http://127.0.0.1:{server.port}",
            server.admin,
            known | {"device": Device(DEVICES - 1).id, "fingerprint": fingerprint},
            access.exchange(access.new_code(now), "127.0.0.1", now),
        )


# ── what is sent ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Signed(requests.auth.AuthBase):
    """Signs a request as it is sent. number: of the device."""

    def __init__(self, number: int) -> None:
        self._device = Device(number)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        body = request.body or b""
        body = body.encode() if isinstance(body, str) else bytes(body)  # pyright: ignore[reportArgumentType]
        digest = hashlib.sha256(body).hexdigest()
        head, _ = self._device._signed(str(request.method), request.path_url, body, digest)
        lines = (line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
        request.headers.update({name: value for name, value in lines if name.startswith("Sumus-")})
        return request


def damaged(body: bytes) -> st.SearchStrategy[bytes]:
    """A body with a few bytes of others in it, or cut short."""
    places = st.integers(0, len(body))
    return st.builds(
        lambda begin, end, more: body[:begin] + more + body[max(begin, end) :], places, places, st.binary(max_size=9)
    )


@st.composite
def cases(draw: st.DrawFn, operation: Any, known: dict[str, str]) -> Case:
    """A request for an operation, right or wrong; half of them name what is there."""
    mode = draw(st.sampled_from([GenerationMode.POSITIVE, GenerationMode.NEGATIVE]))
    case = draw(operation.as_strategy(generation_mode=mode))
    if draw(st.booleans()):
        return case
    if case.path_parameters:
        case.path_parameters.update({name: known[name] for name in case.path_parameters if name in known})
    if case.media_type == "application/octet-stream":
        case.body = draw(st.just(REPORT) | damaged(REPORT))
    if isinstance(case.body, dict) and "fingerprints" in case.body:
        case.body.update(fingerprints=[known["fingerprint"]], session="s1", wait_s=0.0)
    return case


# ── the device plane ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
def test_whatever_is_sent_to_the_device_plane_the_answer_is_of_its_document(served: Served, endpoint: Endpoint) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/v1/openapi.json")
    operation = schema[endpoint.path][endpoint.method]
    answered = set[int]()
    devices = [0] if endpoint.name == "withdraw" else range(1, DEVICES)

    @settings(max_examples=FEW, suppress_health_check=list(HealthCheck))
    @given(cases(operation, served.known), st.sampled_from([*devices, None]))
    def answers(case: Case, device: int | None) -> None:
        if isinstance(case.body, dict) and "wait_s" in case.body:
            case.body["wait_s"] = 0.0  # nothing is held open
        auth = None if device is None else Signed(device)
        answered.add(_validated(case, auth=auth).status_code)

    answers()
    assert any(status >= 400 for status in answered)
    assert answered & {200, 409, 410, 422} or endpoint.name in ("enrol", "relay", "report_sum", "tasks")


def _validated(case: Case, **more: Any) -> Any:
    """The answer to a request, after it was compared with the document."""
    response = case.call(**more, timeout=30.0, allow_redirects=False)
    case.validate_response(response, checks=CHECKS)
    if response.status_code >= 400:
        assert STATUS[read(Problem, response.content).code] == response.status_code
    return response


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
def test_other_methods_are_refused_by_name(served: Served, endpoint: Endpoint, method: str) -> None:
    allowed = {each.method for each in ENDPOINTS if each.path == endpoint.path}
    if method in allowed or (method == "HEAD" and "GET" in allowed):
        return
    answer = requests.request(method, served.url + endpoint.path.format(**served.known), timeout=30.0)
    assert answer.status_code == 405
    assert method == "HEAD" or read(Problem, answer.content).code == "method"


@settings(max_examples=FEW)
@given(
    st.dictionaries(
        st.sampled_from(["Content-Encoding", "If-None-Match", "Range", "Sumus-Protocol", "Sumus-Signature", "Accept"]),
        st.sampled_from(
            [
                "1",
                "0",
                "-1",
                "gzip",
                "bytes=0-",
                "bytes=-1",
                "bytes=9-1",
                "bytes=-",
                '"',
                "*",
                "9" * 5000,
                "bytes=" + "9" * 5000 + "-",
                "é",
            ]
        ),
        max_size=3,
    ),
    st.sampled_from(["/v1/objects/{sha256}", "/v1/checkins", "/healthz", "/v1/openapi.json"]),
)
def test_headers_that_mean_nothing_are_answered(served: Served, headers: dict[str, str], path: str) -> None:
    method = "POST" if path == "/v1/checkins" else "GET"
    sent = {name: value.encode() for name, value in headers.items()}
    answer = requests.request(method, served.url + path.format(**served.known), headers=sent, timeout=30.0)
    assert answer.status_code in (200, 206, 304, 400, 401, 411, 415, 416, 426)


# ── the admin plane ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "asked", "answer"), ADMIN, ids=lambda each: each if isinstance(each, str) else ""
)
def test_whatever_is_sent_to_the_admin_plane_the_answer_is_of_its_form(
    served: Served, method: str, path: str, asked: Any, answer: Any
) -> None:
    schema = schemathesis.openapi.from_dict(admin_document())
    schema.config.update(base_url=served.admin_url)
    operation = schema[path][method]
    answered = set[int]()

    @settings(max_examples=FEW, suppress_health_check=list(HealthCheck))
    @given(cases(operation, served.known), st.booleans())
    def answers(case: Case, mine: bool) -> None:
        headers = {} if method == "GET" else {"Content-Type": "application/json"}
        if mine and not path.endswith("logout"):
            headers["Authorization"] = f"Bearer {served.session}"
        answered.add(_validated(case, headers=headers).status_code)

    answers()
    assert answered & {400, 401, 429}
    assert answered & {200, 404} or path.endswith(("login", "logout"))


def admin_document() -> dict[str, Any]:
    """An OpenAPI document of the admin plane."""
    forms = {form for row in ADMIN for form in row[2:] if form not in (None, bytes)} | {Problem}
    _, components = msgspec.json.schema_components(sorted(forms, key=str), ref_template="#/components/schemas/{name}")
    paths = dict[str, dict[str, Any]]()
    for method, path, asked, answer in ADMIN:
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        operation: dict[str, Any] = {
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ],
            "responses": {"200": _BYTES if answer is bytes else _said("application/json", answer)},
        }
        for status in {400, 401, 403, 404, 408, 411, 413, 415, 429}:
            operation["responses"][str(status)] = _said("application/problem+json", Problem)
        if asked is not None:
            operation["requestBody"] = {"required": True, **_said("application/json", asked)}
        if path == "/v1/admin/devices":
            operation["parameters"].append({"name": "after", "in": "query", "schema": {"type": "string"}})
        paths.setdefault(path, {})[method.lower()] = operation
    info = {"title": "the admin plane", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": _plain(components)}}


_BYTES = {
    "description": "",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}
"""An answer that is a model's file."""


def _said(media: str, form: Any) -> dict[str, Any]:
    return {"description": "", "content": {media: {"schema": {"$ref": f"#/components/schemas/{form.__name__}"}}}}


def test_every_request_of_the_admin_plane_is_tried() -> None:
    nobody: Any = SimpleNamespace(server=None, blobs=None)
    found = admin_plane.admin_routes(nobody, nobody, str)
    routes: set[Any] = {route.path for route in found}  # pyright: ignore[reportAttributeAccessIssue]
    mine = {path for path in routes if path.startswith("/v1/admin/")}
    assert mine == {path for _, path, _, _ in ADMIN}
