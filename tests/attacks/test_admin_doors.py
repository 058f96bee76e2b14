"""Attacks on the doors of an operator: the admin's plane, /metrics, a node and a worker.

A web page points its own name at 127.0.0.1 and reads what the plane answers (DNS rebinding). A page sends a form to the plane
from a browser on the operator's machine (CSRF). Somebody guesses login codes, so that the operator cannot log in. Somebody writes
`X-Forwarded-For` to be counted as another. Somebody asks without end for what is dear to make and needs no login. Each
attack succeeds on the code before these doors were built; beside each stands what an honest operator does.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sumus.http.listening import Listening, opened_at
from sumus.node.intake import Intake
from sumus.node.plane import plane_app
from sumus.node.readings import Readings
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.server import admin_plane
from sumus.server.access import Access
from sumus.server.admin_plane import admin_app
from sumus.transport.http import HttpTransport
from sumus.transport.inprocess import InProcess
from sumus.virtual.messages import BeginRequest, write
from sumus.virtual.policy import Policy
from sumus.virtual.serving import worker_app
from sumus.wire.messages import Refused
from tests.server.devices import tiny

FOREIGN = (
    "attacker.example", "attacker.example:8081", "localhost.attacker.example", "127.0.0.1.attacker.example", "localhost..",
    "0.0.0.0:8081", "192.0.2.7", "[2001:db8::1]:8081", "localhost@attacker.example", "", "localhost,attacker.example", "127.1",
)  # fmt: skip
OWN = (
    "localhost",
    "LOCALHOST:8081",
    "localhost.",
    "127.0.0.1:8081",
    "127.0.0.2",
    "[::1]:8081",
    "[::ffff:127.0.0.1]:1",
    "in-process",
)
JSON = {"content-type": "application/json"}
TOKEN = "a-token-that-nobody-guesses"


class Plane:
    """A server's admin plane, with a session."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service, self.access = service, Access(folder)
        self.network = InProcess(admin_app(service, self.access, lambda token: f"http://devices/#enrol={token}"))
        self.session = self.access.exchange(self.access.new_code(time.time()), "192.0.2.1", time.time())

    def ask(self, method: str, path: str, headers: Mapping[str, str], body: Any = None) -> int:
        sent = b"" if method == "GET" else json.dumps(body or {}).encode()
        return self.network.request(method, path, sent, {"authorization": f"Bearer {self.session}", **headers}).status


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    folder = tmp_path_factory.mktemp("admin")
    service = open_service({"tiny": tiny()}, Storage())
    service.start()
    plane = Plane(service, folder / "admin")
    yield plane
    plane.network.close()
    service.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[InProcess]:
    readings = Readings(tmp_path)
    with InProcess(plane_app(Intake(readings), lambda raws: None, lambda: {"models": {}}, TOKEN)) as network:  # type: ignore[arg-type,return-value]
        yield network
    readings.close()


# ── DNS rebinding ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/metrics"), ("GET", "/"), ("GET", "/v1/admin/status"), ("GET", "/healthz")]
)
def test_a_page_that_points_its_name_here_reads_nothing(plane: Plane, method: str, path: str, host: str) -> None:
    answer = plane.network.request(method, path, b"", {"host": host, "authorization": f"Bearer {plane.session}"})
    assert answer.status == 421
    assert b"tiny" not in answer.body


@pytest.mark.parametrize("host", OWN)
def test_under_its_own_names_it_answers(plane: Plane, host: str) -> None:
    assert plane.ask("GET", "/metrics", {"host": host}) == 200
    assert plane.ask("POST", "/v1/admin/models/tiny/resume", {"host": host, **JSON}) == 200


def test_a_node_and_a_worker_do_not_answer_to_a_page_s_name(node: InProcess) -> None:
    shown = {"authorization": f"Bearer {TOKEN}", "host": "attacker.example"}
    for path in ("/status", "/readyz", "/healthz"):
        assert node.request("GET", path, b"", shown).status == 421
        assert node.request("GET", path, b"", {**shown, "host": "localhost:8070"}).status in (200, 503)
    with InProcess(worker_app("bob", {"x": torch.ones(2)}, Policy(), TOKEN)) as worker:
        assert worker.request("POST", "/v1/begin", write(BeginRequest()), shown).status == 421
        assert (
            worker.request("POST", "/v1/begin", write(BeginRequest()), {**shown, "host": "127.0.0.1:8090"}).status
            == 200
        )


def test_a_path_with_a_slash_too_many_sends_nobody_elsewhere(plane: Plane, node: InProcess) -> None:
    for network, host in ((plane.network, "localhost:8081"), (node, "localhost:8070")):
        for path in ("/metrics/", "/status/", "//attacker.example/"):
            answer = network.request("GET", path, b"", {"host": host})
            assert (answer.status, "location" in answer.headers) == (404, False)


# ── requests of other pages ──────────────────────────────────────────────────────────────────────────────────────────

CHANGES = [
    *(f"/v1/admin/models/tiny/{verb}" for verb in ("promote", "rollback", "pause", "resume", "cancel")),
    "/v1/admin/tokens", f"/v1/admin/devices/{'0' * 64}/revoke", "/v1/admin/login", "/v1/admin/logout",
]  # fmt: skip


@pytest.mark.parametrize("path", CHANGES)
@pytest.mark.parametrize(
    "kind",
    [
        "text/plain", "text/plain; application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "",
        "application/jsonp",
    ],
)  # fmt: skip
def test_a_form_of_a_page_changes_nothing(plane: Plane, path: str, kind: str) -> None:
    assert plane.ask("POST", path, {"content-type": kind}, {"version": 0}) == 415
    assert not plane.service.server.tasks[0].training.paused


def test_nor_does_a_body_without_a_type(plane: Plane) -> None:
    for path in CHANGES:
        assert plane.ask("POST", path, {}, {"version": 0}) == 415


@pytest.mark.parametrize(
    "said",
    [
        {"origin": "https://attacker.example"}, {"origin": "null"}, {"origin": "http://localhost:3000"},
        {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    ],
)  # fmt: skip
def test_a_page_of_another_site_changes_nothing(plane: Plane, said: dict[str, str]) -> None:
    assert plane.ask("POST", "/v1/admin/models/tiny/pause", {"host": "localhost:8081", **JSON, **said}) == 403
    assert not plane.service.server.tasks[0].training.paused


def test_its_own_page_and_a_command_do_and_links_are_followed(plane: Plane) -> None:
    own = {
        "host": "localhost:8081",
        "origin": "http://localhost:8081",
        "sec-fetch-site": "same-origin",
        "sec-fetch-mode": "cors",
    }
    followed = {"host": "localhost:8081", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    for headers in (own, {**own, "content-type": "application/json; charset=utf-8"}, {}):
        assert plane.ask("POST", "/v1/admin/models/tiny/resume", {**JSON, **headers}) == 200
    assert plane.ask("GET", "/", followed) == 200
    script = plane.network.request("GET", "/page.js", b"", {"host": "localhost"}).body
    assert b'"content-type"] = "application/json"' in script


# ── guesses ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_whoever_guesses_codes_keeps_nobody_out(plane: Plane) -> None:
    code = plane.access.new_code(time.time())
    for _ in range(40):  # from the operator's own address: through a tunnel, or from another account of the machine
        assert plane.ask("POST", "/v1/admin/login", JSON, {"code": "A" * 43}) in (401, 429)
    assert plane.ask("POST", "/v1/admin/login", JSON, {"code": "A" * 43}) == 429, "guesses are slow"
    assert plane.ask("POST", "/v1/admin/login", JSON, {"code": code}) == 200
    assert plane.ask("POST", "/v1/admin/login", JSON, {"code": code}) in (401, 429), "once"


def test_whoever_shows_a_node_wrong_tokens_keeps_nobody_out(tmp_path: Path) -> None:
    readings, stopped = Readings(tmp_path), 0.0
    with InProcess(
        plane_app(Intake(readings), lambda raws: None, lambda: {"models": {}}, TOKEN, lambda: stopped)
    ) as node:  # type: ignore[arg-type,return-value]
        for _ in range(1100):
            node.request("GET", "/status", b"", {"host": "localhost", "authorization": "Bearer guess"})
        assert node.request("GET", "/status", b"", {"host": "localhost", "authorization": "Bearer guess"}).status == 429
        assert (
            node.request("GET", "/status", b"", {"host": "localhost", "authorization": f"Bearer {TOKEN}"}).status == 200
        )
    readings.close()


def test_guesses_from_one_network_do_not_slow_those_from_another(tmp_path: Path) -> None:
    access = Access(tmp_path / "admin")
    for number in range(30):
        with pytest.raises(Refused):
            access.check("Bearer guess", f"192.0.2.{number}", 0.0)
    with pytest.raises(Refused, match="bad_token"):
        access.check("Bearer guess", "198.51.100.1", 0.0)


# ── who asks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def clients(folder: Path, proxies: Mapping[str, str], forwarded: str) -> tuple[str, str]:
    """Which address the devices' plane and the admin's take a request for that comes from 127.0.0.1."""
    seen: dict[str, str] = {}

    def telling(name: str) -> Any:
        async def application(scope: Any, receive: Any, send: Any) -> None:
            seen[name] = scope["client"][0]
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        return application

    async def both() -> None:
        with opened_at(Listening(port=0, admin_port=0, **proxies), folder) as at:
            async with at.planes(telling("devices"), telling("admin")):
                for url in (at.url, at.admin_url):
                    transport = HttpTransport(url)
                    await asyncio.to_thread(transport.request, "GET", "/", b"", {"X-Forwarded-For": forwarded})
                    transport.close()

    asyncio.run(both())
    return seen["devices"], seen["admin"]


@pytest.mark.parametrize(
    ("proxies", "forwarded", "client"),
    [
        ({}, "203.0.113.9", "127.0.0.1"),  # nobody was named
        ({"proxies": "192.0.2.1"}, "203.0.113.9", "127.0.0.1"),  # another was
        ({"proxies": "127.0.0.1"}, "203.0.113.9", "203.0.113.9"),
        (
            {"proxies": "127.0.0.0/8"},
            "198.51.100.66, 203.0.113.9:4711",
            "203.0.113.9",
        ),  # what stands left the client wrote
        ({"proxies": "127.0.0.1, 10.0.0.0/8"}, "198.51.100.66, 203.0.113.9, 10.1.2.3", "203.0.113.9"),
        ({"proxies": "*"}, "198.51.100.66, 203.0.113.9", "203.0.113.9"),
        ({"proxies": "127.0.0.1"}, "198.51.100.66, [2001:db8::9]:80", "2001:db8::9"),
        ({"proxies": "127.0.0.1"}, "203.0.113.9, unknown", "127.0.0.1"),
        ({"proxies": "127.0.0.1"}, "203.0.113.9, \x9b2J", "127.0.0.1"),
        ({"proxies": "127.0.0.1"}, "", "127.0.0.1"),
        ({"proxies": "127.0.0.1"}, f"203.0.113.9:{'1' * 5000}", "127.0.0.1"),
    ],
)
def test_who_writes_another_s_address_is_not_taken_for_it(
    tmp_path: Path, proxies: dict[str, str], forwarded: str, client: str
) -> None:
    assert clients(tmp_path, proxies, forwarded) == (client, "127.0.0.1"), "and never on the admin's port"


# ── what is dear to make ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_protocol_s_document_is_made_once(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    schemas = msgspec.json.schema_components
    monkeypatch.setattr(
        msgspec.json, "schema_components", lambda *form, **more: made.append(1) or schemas(*form, **more)
    )
    with InProcess(plane.service.device_app) as devices:
        answers = {devices.request("GET", "/v1/openapi.json").body for _ in range(30)}
    assert len(made) <= 1
    assert json.loads(answers.pop())["openapi"] == "3.1.0"
    assert not answers


def test_the_figures_for_prometheus_are_made_once_a_second(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    look = admin_plane.look
    monkeypatch.setattr(admin_plane, "look", lambda *what: made.append(1) or look(*what))
    began = time.monotonic()
    assert {plane.ask("GET", "/metrics", {}) for _ in range(60)} == {200}
    assert len(made) <= 1 + (time.monotonic() - began)


def test_whether_a_node_is_ready_is_looked_at_once_a_second(tmp_path: Path) -> None:
    readings, made, stopped = Readings(tmp_path), list[int](), 0.0
    status: Any = lambda: made.append(1) or {"models": {"signs": 1}}  # noqa: E731
    with InProcess(plane_app(Intake(readings), lambda raws: None, status, TOKEN, lambda: stopped)) as node:  # type: ignore[arg-type,return-value]
        assert {node.request("GET", "/readyz", b"", {"host": "localhost"}).status for _ in range(30)} == {200}
    assert len(made) == 1
    readings.close()
