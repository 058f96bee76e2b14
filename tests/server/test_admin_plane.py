"""The admin plane: who may ask, what is changed, and what is written of it."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.server.access import CODE_S, SESSION_S, Access
from sumus.server.admin_plane import admin_app
from sumus.transport.inprocess import InProcess
from sumus.transport.transport import Answer
from tests.server.devices import ScriptedDevice, tiny, train_round

PLAN = tiny().plan


class Admin:
    """Whoever runs a server, and its devices."""

    def __init__(self, service: Service, access: Access, admin: InProcess, devices: InProcess) -> None:
        self.service, self.access, self.transport, self.devices_transport = service, access, admin, devices
        self.session = ""

    def log_in(self) -> None:
        code = self.access.new_code(time.time())
        self.session = self.ask("POST", "/v1/admin/login", {"code": code})["session"]

    def answer(self, method: str, path: str, body: Any = None) -> Answer:
        headers = {"authorization": f"Bearer {self.session}"} if self.session else {}
        headers |= {} if method == "GET" else {"content-type": "application/json"}
        sent = b"" if method == "GET" else json.dumps(body or {}).encode()
        return self.transport.request(method, path, sent, headers)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.answer(method, path, body)
        assert answer.status == 200, answer.body
        return json.loads(answer.body)

    def refused(self, method: str, path: str, body: Any = None) -> str:
        answer = self.answer(method, path, body)
        assert answer.status >= 400
        return json.loads(answer.body)["code"]

    def devices(self, count: int) -> list[ScriptedDevice]:
        server = self.service.server
        token = server.roll.new_token("default", server.clock(), uses=count)
        devices = [ScriptedDevice(self.devices_transport, number) for number in range(count)]
        for device in devices:
            device.enrol(token)
        return devices

    def settle(self) -> None:
        """Wait until all is decided that was asked."""
        self.service.server.ask_to_do(lambda now: None).result()


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[Admin]:
    service = open_service({"tiny": tiny()}, Storage(tmp_path / "data"), ServerPolicy(group=0.0, releases=False))
    service.server.start()
    access = Access(tmp_path / "data" / "admin")
    app = admin_app(service, access, lambda token: f"http://devices/#enrol={token}")
    with InProcess(app) as plane, InProcess(service.device_app) as devices:
        yield Admin(service, access, plane, devices)
        assert not plane.failures
    service.close()


WITH_SESSION = [
    ("GET", "/v1/admin/status"),
    ("GET", "/v1/admin/models/tiny"),
    *(("POST", f"/v1/admin/models/tiny/{verb}") for verb in ("promote", "rollback", "pause", "resume", "cancel")),
    ("POST", "/v1/admin/tokens"),
    ("GET", "/v1/admin/devices"),
    ("POST", f"/v1/admin/devices/{'0' * 64}/revoke"),
    ("POST", "/v1/admin/logout"),
]


@pytest.mark.parametrize(("method", "path"), WITH_SESSION)
def test_nothing_is_shown_or_changed_without_a_session(admin: Admin, method: str, path: str) -> None:
    assert admin.refused(method, path, {"version": 0}) == "bad_token"
    admin.session = "A" * 43
    assert admin.refused(method, path, {"version": 0}) == "bad_token"


def test_a_code_is_good_for_one_session_which_may_be_ended(admin: Admin) -> None:
    code = admin.access.new_code(time.time())
    admin.session = admin.ask("POST", "/v1/admin/login", {"code": code})["session"]
    assert admin.ask("GET", "/v1/admin/status")["population"] == "default"
    assert admin.refused("POST", "/v1/admin/login", {"code": code}) == "bad_token"
    admin.ask("POST", "/v1/admin/logout")
    assert admin.refused("GET", "/v1/admin/status") == "bad_token"


def test_a_link_is_good_where_the_server_s_clock_is_ahead_of_the_machine_s(
    admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = admin.service.server.clock
    monkeypatch.setattr(admin.service.server, "clock", lambda: clock() + 3 * SESSION_S)
    admin.log_in()
    assert admin.ask("GET", "/v1/admin/status")["population"] == "default"


def test_codes_and_sessions_end_by_the_machine_s_clock(admin: Admin) -> None:
    late = admin.access.new_code(time.time() - CODE_S)
    assert admin.refused("POST", "/v1/admin/login", {"code": late}) == "bad_token"
    for then in (time.time() - SESSION_S, time.time() + 3 * SESSION_S):
        admin.session = admin.access.exchange(admin.access.new_code(then), "192.0.2.1", then)
        assert admin.refused("GET", "/v1/admin/status") == "bad_token"


def test_every_answer_says_which_plane_it_is_of_and_lets_no_page_do_anything(admin: Admin) -> None:
    for path in ("/healthz", "/v1/admin/status", "/nowhere", "/metrics"):
        headers = admin.answer("GET", path).headers
        assert headers["sumus-plane"] == "admin"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["cache-control"] == "no-store"
    assert "sumus-plane" not in admin.devices_transport.request("GET", "/healthz").headers


def test_a_page_and_its_script_come_from_the_package(admin: Admin) -> None:
    page, script = admin.answer("GET", "/"), admin.answer("GET", "/page.js")
    assert page.headers["content-type"].startswith("text/html")
    assert b"<script src=" in page.body
    assert page.body.count(b"<script") == 1, "none of it is inline"
    assert script.headers["content-type"].startswith("text/javascript")
    assert b"innerHTML" not in script.body
    assert "script-src 'self'" in page.headers["content-security-policy"]


def test_machines_may_ask_how_it_goes(admin: Admin) -> None:
    assert admin.ask("GET", "/healthz") == {}
    assert admin.ask("GET", "/readyz") == {}
    assert b"sumus_ready 1.0" in admin.answer("GET", "/metrics").body


def test_a_model_is_promoted_and_an_earlier_one_trained_on(admin: Admin) -> None:
    admin.log_in()
    devices = admin.devices(3)
    for value in (1.0, 2.0):
        train_round(devices, PLAN, [value] * 3)
        admin.settle()
    found = admin.ask("GET", "/v1/admin/models/tiny")
    assert [model["version"] for model in found["models"]] == [0, 1, 2]
    assert [model["parent"] for model in found["models"]] == [None, 0, 1]
    assert (found["version"], found["released"]) == (2, 0)
    assert admin.ask("POST", "/v1/admin/models/tiny/promote", {"version": 2})["version"] == 2
    assert devices[0].check_in(PLAN, kinds=()).released["tiny"].version == 2
    assert admin.ask("POST", "/v1/admin/models/tiny/rollback", {"version": 1})["version"] == 3
    found = admin.ask("GET", "/v1/admin/models/tiny")
    assert (found["models"][3]["parent"], found["version"], found["released"]) == (1, 3, 3)
    assert admin.ask("GET", "/v1/admin/status")["tasks"][0]["epoch"] == 1
    assert admin.refused("POST", "/v1/admin/models/tiny/promote", {"version": 9}) == "not_found"
    assert admin.refused("POST", "/v1/admin/models/tiny/rollback", {"version": 9}) == "not_found"
    assert admin.refused("GET", "/v1/admin/models/other") == "not_found"
    assert admin.refused("POST", "/v1/admin/models/tiny/promote", {"version": "2"}) == "malformed"


def test_a_pause_gives_no_work_and_outlasts_the_process(admin: Admin, tmp_path: Path) -> None:
    admin.log_in()
    device = admin.devices(2)[0]
    admin.ask("POST", "/v1/admin/models/tiny/pause")
    assert device.check_in(PLAN).reason == "paused"
    admin.service.close()
    again = open_service({"tiny": tiny()}, Storage(tmp_path / "data"))
    again.server.start()
    assert again.server.tasks[0].training.paused
    again.server.ask_to_do(lambda now: again.server.tasks[0].training.resume()).result()
    assert not again.server.tasks[0].training.paused
    again.close()


def test_a_round_is_cancelled_and_its_reports_are_refused(admin: Admin) -> None:
    admin.log_in()
    one, two = admin.devices(2)
    work = one.work(PLAN)
    assert work is not None
    assert admin.ask("POST", "/v1/admin/models/tiny/cancel")["round"] == 0
    assert one.check_in(PLAN, previous=work).settled.outcome == "discarded"  # pyright: ignore[reportOptionalMemberAccess]
    assert two.work(PLAN) is not None
    assert admin.refused("POST", "/v1/admin/models/tiny/cancel", {"kind": "evaluate"}) == "not_found"


def test_a_link_lets_so_many_devices_in(admin: Admin) -> None:
    admin.log_in()
    link = admin.ask("POST", "/v1/admin/tokens", {"uses": 2, "lasts_s": 60})["link"]
    token = link.partition("#enrol=")[2]
    for number in (1, 2):
        ScriptedDevice(admin.devices_transport, number).enrol(token)
    with pytest.raises(Exception, match="token_used"):
        ScriptedDevice(admin.devices_transport, 3).enrol(token)
    assert admin.refused("POST", "/v1/admin/tokens", {"uses": 0}) == "malformed"


def test_a_device_is_shut_out_and_its_place_is_free(admin: Admin) -> None:
    admin.log_in()
    bad, good, other = admin.devices(3)
    for device in (bad, good, other):
        assert device.work(PLAN) is not None
    admin.ask("POST", f"/v1/admin/devices/{bad.id}/revoke")
    with pytest.raises(Exception, match="revoked"):
        bad.check_in(PLAN)
    run = admin.ask("GET", "/v1/admin/status")["tasks"][0]["runs"][0]
    assert (run["out"], run["dropped"]) == (2, 1)
    rows = admin.ask("GET", "/v1/admin/devices")["devices"]
    assert {row["id"]: row["state"] for row in rows} == {
        bad.id: "revoked",
        good.id: "enrolled",
        other.id: "enrolled",
    }
    first = rows[0]["id"]
    assert [row["id"] for row in admin.ask("GET", f"/v1/admin/devices?after={first}")["devices"]] == [
        row["id"] for row in rows[1:]
    ]
    assert admin.refused("POST", f"/v1/admin/devices/{'0' * 64}/revoke") == "not_found"


def test_every_change_is_a_line_in_the_log_without_devices_and_secrets(
    admin: Admin, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sumus.admin")
    admin.log_in()
    device = admin.devices(2)[0]
    device.work(PLAN)
    link = admin.ask("POST", "/v1/admin/tokens")["link"]
    for verb in ("pause", "resume", "cancel"):
        admin.ask("POST", f"/v1/admin/models/tiny/{verb}")
    admin.ask("POST", "/v1/admin/models/tiny/promote", {"version": 0})
    admin.ask("POST", "/v1/admin/models/tiny/rollback", {"version": 0})
    admin.ask("POST", f"/v1/admin/devices/{device.id}/revoke")
    lines = [record for record in caplog.records if record.name == "sumus.admin"]
    assert [record.message for record in lines] == [
        "login", "token", "pause", "resume", "cancel", "promote", "rollback", "revoke",
    ]  # fmt: skip
    written = "".join(str(record.__dict__) for record in caplog.records)
    for secret in (admin.session, link.partition("=")[2], device.id, device.session):
        assert secret not in written


def test_too_long_a_body_is_refused_before_it_is_read(admin: Admin) -> None:
    answer = admin.transport.request(
        "POST", "/v1/admin/login", b"x", {"content-length": str(2**40), "content-type": "application/json"}
    )
    assert json.loads(answer.body)["code"] == "too_large"
