"""Bad input over HTTP: the right answer, with a code of the closed list, and honest devices unaffected."""

import gzip
import json
import struct
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sumus.aggregate import Update
from sumus.http import bodies
from sumus.http.limits import Limits, Rate
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import open_service
from sumus.server.openapi import openapi
from sumus.transport.inprocess import InProcess
from sumus.transport.transport import Answer
from sumus.wire.messages import (
    ENDPOINTS,
    STATUS,
    CheckInRequest,
    EnrolmentRequest,
    Nothing,
    Problem,
    Refused,
    digest_of,
    read,
    signed_text,
    write,
)
from sumus.wire.reports import encode_report
from sumus.wire.signing import sign, to_base64url
from tests.server.devices import ScriptedDevice, path_of, tiny, together, update_of
from tests.server.test_server import Running

BUNDLE = tiny(2)
WORD = "s1"


@pytest.fixture
def running() -> Iterator[Running]:
    service = open_service({"tiny": BUNDLE}, policy=ServerPolicy(group=0.0))
    service.server.start()
    with InProcess(service.device_app) as transport:
        running = Running(service, transport)
        running.device(1000)  # alone, nobody is given work
        yield running
    service.close()


@pytest.fixture
def device(running: Running) -> ScriptedDevice:
    return running.device()


def code(answer: Answer) -> str:
    """Of an answer that is an error; its status is the code's."""
    said = read(Problem, answer.body)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.status == STATUS[said.code]
    return said.code


def refused(device: ScriptedDevice, method: str, path: str, body: bytes, **headers: str) -> str:
    """The code that a signed request is refused with. headers: in place of what would be sent; empty ones are left out."""
    sent = {name.lower(): value for name, value in device.headers(method, path, body).items()}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    return code(device.transport.request(method, path, body, {k: v for k, v in sent.items() if v}))


def honest_still_work(running: Running, *begun: tuple[ScriptedDevice, Any]) -> None:
    """A whole round, after whatever was sent before. begun: who was given work in it already."""
    given = list(begun)
    while len(given) < 2:
        given.append((each := running.device(), each.work(BUNDLE.plan)))
    calls = [lambda d=d, w=w: d.report(w, update_of(BUNDLE.plan, d.id)) for d, w in given]
    assert [answer.status for answer in together(*calls)] == ["counted"] * 2


# ── reports ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def body_of(parts: dict[str, Any] | None = None, examples: int = 10, metrics: Any = None) -> bytes:
    tree = {"w": np.ones(4, np.float32)} if parts is None else parts
    return encode_report(Update("x", {"params": tree}, examples, {"loss": (5.0, 10)} if metrics is None else metrics))


def header_of(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


REPORTS = {
    "NaN": (body_of({"w": np.array([1, np.nan, 1, 1], np.float32)}), "not_finite"),
    "infinity": (body_of({"w": np.array([1, np.inf, 1, 1], np.float32)}), "not_finite"),
    "beyond the bound": (body_of({"w": np.full(4, 1e6, np.float32)}), "out_of_bounds"),
    "another shape": (body_of({"w": np.ones(5, np.float32)}), "bad_report"),
    "another dtype": (body_of({"w": np.ones(4, np.int64)}), "bad_report"),
    "another leaf": (body_of({"w": np.ones(4, np.float32), "v": np.ones(1, np.float32)}), "bad_report"),
    "no leaf": (encode_report(Update("x", {}, 1)), "bad_report"),
    "a metric that nobody measures": (body_of(metrics={"secret": (1.0, 1)}), "bad_report"),
    "no safetensors": (b"x" * 100, "bad_report"),
    "nothing": (b"", "bad_report"),
    "a header that lies about its length": (struct.pack("<Q", 2**60) + b"{}", "bad_report"),
    "a header of a hundred thousand tensors": (
        header_of({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}),
        "too_large",
    ),
    "a header of many tensors that is just short enough": (
        header_of({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(14_000)}),
        "bad_report",
    ),
    "a body that is larger than any report": (b"\0" * 2**21, "too_large"),
}


@pytest.mark.parametrize("what", REPORTS)
def test_a_report_that_cannot_be_counted_is_refused(running: Running, device: ScriptedDevice, what: str) -> None:
    work = device.work(BUNDLE.plan)
    assert work is not None
    body, expected = REPORTS[what]
    assert refused(device, "PUT", path_of(work), body) == expected
    assert running.server.tasks[0].training.coordinator.staged == {}
    honest_still_work(running, (device, work))


def test_another_devices_session_is_not_known(running: Running, device: ScriptedDevice) -> None:
    work, thief = device.work(BUNDLE.plan), running.device()
    assert work is not None
    with pytest.raises(Refused, match="unknown_session"):
        thief.report(work, update_of(BUNDLE.plan, "thief"))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/tasks/tiny/train/never-given",
        "/v1/tasks/other/train/s1",
        "/v1/tasks/tiny/other/s1",
        "/v1/tasks/tiny/evaluate/s1",
    ],
)
def test_a_session_that_was_never_given_is_not_known(device: ScriptedDevice, path: str) -> None:
    assert refused(device, "PUT", path, body_of()) == "unknown_session"


def test_a_compressed_body_is_not_opened(device: ScriptedDevice) -> None:
    bomb = gzip.compress(b"\0" * 2**20)
    path = "/v1/tasks/tiny/train/s1"
    assert refused(device, "PUT", path, bomb, content_encoding="gzip") == "encoding"
    assert refused(device, "POST", "/v1/checkins", bomb, content_encoding="gzip") == "encoding"


@pytest.mark.parametrize("said", ["", "-1", "abc", "1e3", "9" * 30])
def test_a_body_says_how_long_it_is(device: ScriptedDevice, said: str) -> None:
    found = refused(device, "PUT", "/v1/tasks/tiny/train/s1", body_of(), content_length=said or "x")
    assert found == "length_required"


@pytest.mark.parametrize("more", [-1, 1])
def test_a_body_is_as_long_as_it_said(device: ScriptedDevice, more: int) -> None:
    body = body_of()
    assert refused(device, "PUT", "/v1/tasks/tiny/train/s1", body, content_length=str(len(body) + more)) == "malformed"


def test_a_body_that_comes_too_slowly_is_given_up(
    running: Running, device: ScriptedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "WINDOW_S", 0.05)

    async def trickle(scope: Any, receive: Any, send: Any) -> None:
        async def slowly() -> Any:
            import asyncio

            await asyncio.Event().wait()

        await running.service.device_app(scope, slowly if scope["type"] == "http" else receive, send)

    with InProcess(trickle) as transport:
        device.transport = transport
        assert refused(device, "PUT", "/v1/tasks/tiny/train/s1", body_of()) == "slow"
        assert refused(device, "POST", "/v1/checkins", write(Nothing())) == "slow"
    honest_still_work(running)


def test_there_is_no_room_for_more_than_there_is_memory_for(device: ScriptedDevice) -> None:
    service = open_service({"tiny": BUNDLE}, policy=ServerPolicy(group=0.0))
    service.room.shares.most = 64
    service.server.start()
    with InProcess(service.device_app) as transport:
        own = ScriptedDevice(transport, 7)
        own.enrol(service.server.roll.new_token("default", service.server.clock()))
        body = body_of()
        found = refused(own, "PUT", "/v1/tasks/tiny/train/s1", body, sumus_digest=digest_of(body))
        assert found in ("busy", "too_large")
    service.close()


# ── who asks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_in(serial: int = 1) -> bytes:
    return write(CheckInRequest(serial, WORD, (BUNDLE.plan.description.fingerprint,)))


def test_a_request_is_signed_by_its_device(running: Running, device: ScriptedDevice) -> None:
    other = running.device()
    body = check_in()
    for signature in ("A" * 86, "", "not base64!", to_base64url(b"short")):
        assert refused(device, "POST", "/v1/checkins", body, sumus_signature=signature) == "bad_signature"
    text = signed_text("POST", "/v1/checkins", "default", device.id, body)
    theirs = other._sign(text)  # pyright: ignore[reportPrivateUsage]
    assert refused(device, "POST", "/v1/checkins", body, sumus_signature=theirs) == "bad_signature"


def test_a_signature_is_of_one_request_alone(device: ScriptedDevice) -> None:
    for method, path, population, body in (
        ("PUT", "/v1/checkins", "default", check_in()),
        ("POST", "/v1/withdrawals", "default", check_in()),
        ("POST", "/v1/checkins", "other", check_in()),
        ("POST", "/v1/checkins", "default", check_in(2)),
    ):
        signature = to_base64url(sign(device._seed, signed_text(method, path, population, device.id, body)))  # pyright: ignore[reportPrivateUsage]
        assert refused(device, "POST", "/v1/checkins", check_in(), sumus_signature=signature) == "bad_signature"


def test_who_is_not_enrolled_is_not_heard(running: Running) -> None:
    stranger = ScriptedDevice(running.transport, 99)
    assert refused(stranger, "POST", "/v1/checkins", check_in()) == "unknown_device"
    assert refused(stranger, "PUT", "/v1/tasks/tiny/train/s1", body_of()) == "unknown_device"
    assert refused(stranger, "POST", "/v1/checkins", check_in(), sumus_device="../../etc") == "unknown_device"


def test_a_revoked_device_is_shut_out_at_once(running: Running, device: ScriptedDevice) -> None:
    work = device.work(BUNDLE.plan)
    assert work is not None
    running.server.roll.revoke(device.id)
    with pytest.raises(Refused, match="revoked"):
        device.report(work, update_of(BUNDLE.plan, 1))
    with pytest.raises(Refused, match="revoked"):
        device.enrol(running.server.roll.new_token("default", running.server.clock()))


def test_who_leaves_is_forgotten_and_may_come_again(running: Running, device: ScriptedDevice) -> None:
    assert device.work(BUNDLE.plan) is not None
    device.withdraw()
    with pytest.raises(Refused, match="unknown_device"):
        device.work(BUNDLE.plan)
    with running.server.tasks[0].training.store.transaction() as rows:
        assert rows.device(device.id) is None
    with pytest.raises(Refused, match="make a new key"):
        device.enrol(running.server.roll.new_token("default", running.server.clock()))
    assert running.device(77).work(BUNDLE.plan) is not None


def test_enrolment_needs_a_token_that_is_not_used_up(running: Running) -> None:
    token = running.server.roll.new_token("default", running.server.clock())
    first, second = ScriptedDevice(running.transport, 1), ScriptedDevice(running.transport, 2)
    assert first.enrol(token) == first.enrol(token), "the same key again is the same device"
    with pytest.raises(Refused, match="token_used"):
        second.enrol(token)
    with pytest.raises(Refused, match="bad_token"):
        second.enrol("A" * 43)
    asked = write(EnrolmentRequest(token, to_base64url(second.key), "A" * 32, "A" * 86))
    answer = running.transport.request("POST", "/v1/enrolments", asked, {"sumus-protocol": "1"})
    assert code(answer) in ("malformed", "old_nonce", "bad_signature")


def test_a_device_that_asks_too_often_is_told_when_to_come_again() -> None:
    limits = Limits(device=Rate(0.001, 2))
    service = open_service({"tiny": BUNDLE}, policy=ServerPolicy(group=0.0, limits=limits))
    service.server.start()
    with InProcess(service.device_app) as transport:
        eager, other = ScriptedDevice(transport, 1), ScriptedDevice(transport, 2)
        for each in (eager, other):
            each.enrol(service.server.roll.new_token("default", service.server.clock()))
        for _ in range(2):
            eager.check_in(BUNDLE.plan)
        with pytest.raises(Refused, match="rate") as caught:
            eager.check_in(BUNDLE.plan)
        assert caught.value.problem.retry_after_s is not None
        other.check_in(BUNDLE.plan)
    service.close()


# ── form ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"serial":-1}', b"[" * 10_000, b'{"serial":1e999,"session":"a","fingerprints":[]}', b"\xff\xfe",
     b'{"serial":1,"session":"a\\nb","fingerprints":[]}', b'{"serial":1,"session":"../x","fingerprints":[]}',
     b'{"serial":true,"session":"a","fingerprints":[]}'],
)  # fmt: skip
def test_what_is_no_message_is_said_to_be_none(device: ScriptedDevice, body: bytes) -> None:
    assert refused(device, "POST", "/v1/checkins", body) == "malformed"


def test_a_message_that_is_too_long_is_not_read(device: ScriptedDevice) -> None:
    assert refused(device, "POST", "/v1/checkins", b" " * (2**16 + 1)) == "too_large"


@pytest.mark.parametrize("version", ["", "0", "2", "one"])
def test_who_speaks_another_version_is_told_which(running: Running, device: ScriptedDevice, version: str) -> None:
    assert refused(device, "POST", "/v1/checkins", check_in(), sumus_protocol=version) == "old_protocol"
    said = read(Problem, running.transport.request("POST", "/v1/checkins", b"{}", {}).body)
    assert said.protocol == 1


def test_an_unknown_path_and_a_wrong_method_have_codes_too(running: Running) -> None:
    assert code(running.transport.request("GET", "/nowhere")) == "not_found"
    assert code(running.transport.request("DELETE", "/v1/checkins")) == "method"
    assert code(running.transport.request("GET", "/v1/objects/..%2f..%2fetc%2fpasswd")) == "not_found"


def test_a_server_that_is_not_ready_says_so_and_decides_nothing(running: Running, device: ScriptedDevice) -> None:
    running.server.trouble = "starting"
    assert refused(device, "POST", "/v1/checkins", check_in()) == "not_ready"
    assert refused(device, "PUT", "/v1/tasks/tiny/train/s1", body_of()) == "not_ready"
    assert code(running.transport.request("GET", "/readyz")) == "not_ready"
    assert running.transport.request("GET", "/healthz").status == 200


# ── objects ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_object_may_be_asked_for_in_part_and_not_twice(running: Running, device: ScriptedDevice) -> None:
    work = device.work(BUNDLE.plan)
    assert work is not None
    path = f"/v1/objects/{work.broadcast.sha256}"
    whole = running.transport.request("GET", path)
    assert (whole.status, len(whole.body)) == (200, work.broadcast.bytes)
    assert "immutable" in whole.headers["cache-control"]
    assert running.transport.request("GET", path, headers={"if-none-match": whole.headers["etag"]}).status == 304
    for asked, part in (("bytes=4-9", whole.body[4:10]), ("bytes=10-", whole.body[10:]), ("bytes=-5", whole.body[-5:])):
        answer = running.transport.request("GET", path, headers={"range": asked})
        assert (answer.status, answer.body) == (206, part)
    assert running.transport.request("GET", path, headers={"range": "bytes=999999-"}).status == 416
    assert running.transport.request("GET", path, headers={"range": "pages=1-2"}).body == whole.body


# ── the document ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_openapi_document_has_every_endpoint_with_every_code(running: Running) -> None:
    served = json.loads(running.transport.request("GET", "/v1/openapi.json").body)
    assert served == json.loads(json.dumps(openapi()))
    for each in ENDPOINTS:
        answers = served["paths"][each.path][each.method.lower()]["responses"]
        assert {str(STATUS[one]) for one in each.codes} <= set(answers)
    names = set(served["components"]["schemas"])
    references = [part.split('"')[0] for part in json.dumps(served).split("#/components/schemas/")[1:]]
    assert set(references) <= names


# ── what a hostile user found ────────────────────────────────────────────────────────────────────────────────────────


def test_a_word_that_was_used_before_is_refused_and_harms_nobody_else(running: Running) -> None:
    devices = [running.device(), running.device()]
    given = [each.work(BUNDLE.plan, wait_s=10.0) for each in devices]
    honest_still_work(running, *zip(devices, given, strict=True))
    devices[0].serial, devices[0].session = 7, "s1"
    again = CheckInRequest(7, "s1", (BUNDLE.plan.description.fingerprint,))
    assert refused(devices[0], "POST", "/v1/checkins", write(again)) == "replayed"
    assert running.server.trouble == ""
    assert devices[1].work(BUNDLE.plan, wait_s=10.0) is not None


def test_who_knows_a_devices_id_keeps_it_from_nothing() -> None:
    service = open_service({"tiny": BUNDLE}, policy=ServerPolicy(group=0.0, limits=Limits(device=Rate(0.001, 4))))
    service.server.start()
    with InProcess(service.device_app) as transport:
        running = Running(service, transport)
        devices = [running.device(), running.device()]
        given = [each.work(BUNDLE.plan) for each in devices]
        for _ in range(10):
            found = refused(devices[0], "PUT", path_of(given[0]), body_of(), sumus_signature="A" * 86)  # pyright: ignore[reportArgumentType]
            assert found == "bad_signature"
        honest_still_work(running, *zip(devices, given, strict=True))
    service.close()


def test_a_report_of_training_tells_its_loss(running: Running, device: ScriptedDevice) -> None:
    work = device.work(BUNDLE.plan)
    assert work is not None
    assert refused(device, "PUT", path_of(work), body_of(metrics={})) == "bad_report"
    assert refused(device, "PUT", path_of(work), body_of(metrics={"loss": (0.0, 0)})) == "bad_report"
    honest_still_work(running, (device, work))


def test_a_query_is_signed_too(device: ScriptedDevice) -> None:
    body, path = check_in(), "/v1/checkins?later=1"
    plain = device._sign(signed_text("POST", "/v1/checkins", device.population, device.id, body))  # pyright: ignore[reportPrivateUsage]
    assert refused(device, "POST", path, body, sumus_signature=plain) == "bad_signature"
    assert device.request("POST", path, body).status == 200


def test_who_is_shut_out_while_it_waits_is_given_nothing(running: Running) -> None:
    devices = [running.device(), running.device()]
    given = [each.work(BUNDLE.plan) for each in devices]
    third, said = running.device(), list[Any]()

    def wait() -> None:
        try:
            said.append(third.work(BUNDLE.plan, wait_s=30.0))
        except Refused as refusal:
            said.append(refusal.problem.code)

    thread = threading.Thread(target=wait)
    thread.start()
    while not running.server.held:
        running.server.ask_to_do(lambda now: None).result()
    running.server.roll.revoke(third.id)
    running.server.ask_to_do(lambda now: running.server.forget(third.id, "", now)).result()
    thread.join()
    assert said == ["unknown_device"]
    honest_still_work(running, *zip(devices, given, strict=True))
