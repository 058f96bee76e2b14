"""Attacks by numbers: a number of five thousand digits in a header, an address or a message.

Python refuses to read more than 4,300 digits, with an error of its own that nobody expects: a request for a model with such a
`Range` was answered as a defect, with a traceback in the log each time. Python also reads digits of other scripts, signs and
underscores where HTTP has none. The control: numbers as honest devices write them.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sumus.device.link import read_link
from sumus.device.requests import Requests
from sumus.edge.edge_run import EdgeRun
from sumus.errors import ExperimentError, ParticipantError, PlanError, UsageError
from sumus.node.formats import read_file, read_json
from sumus.node.mqtt import Broker
from sumus.node.node import Node
from sumus.node.plane import plane_app
from sumus.node.reading import BadReading
from sumus.operations.commands import without_secret
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.server import objects
from sumus.server.access import origin
from sumus.storage.blobs import open_blobs
from sumus.transport.http import HttpTransport
from sumus.transport.inprocess import InProcess
from sumus.transport.transport import Answer, Unreachable
from sumus.wire.messages import Body, CheckInRequest, Served, read
from tests.server.devices import tiny

DIGITS = "9" * 5000
STRANGE = (DIGITS, f"-{DIGITS}", f"+{DIGITS}", "1_0", "1 1", "\xd9\xa3", "1e3", "0x10", "-1", f"0.{DIGITS}", "½", "")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = open_service({"tiny": tiny()}, Storage(tmp_path_factory.mktemp("server") / "data"))
    service.start()
    yield service
    service.close()


@pytest.fixture(params=["from memory", "from a file"])
def model(
    service: Service, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[InProcess, str, bytes]]:
    """A device plane that gives an object out of memory, or out of its file; the object's path, and its bytes."""
    if request.param == "from a file":
        monkeypatch.setattr(objects, "LARGE", 0)
    body = service.server.tasks[0].training.plan_body
    with InProcess(service.device_app) as network:
        yield network, f"/v1/objects/{body.sha256}", service.blobs.get(body.sha256)
        assert not network.failures


@pytest.mark.parametrize(
    "asked",
    [
        *(f"bytes={number}-" for number in STRANGE if number), *(f"bytes=0-{number}" for number in STRANGE if number),
        *(f"bytes=-{number}" for number in STRANGE), f"bytes={DIGITS}-{DIGITS}", f"bytes=0-1,{DIGITS}-", "bytes=0-0,1-1",
        "bytes=",
        "bytes=--",
        "bytes=5-3", f"pages=0-{DIGITS}", "bytes", "=0-1", ",".join(["bytes=0-0"] * 500), "\xb2-", "bytes=\xb2-\xb3",
    ],
)  # fmt: skip
def test_a_range_that_is_none_is_left_out(
    model: tuple[InProcess, str, bytes], asked: str, caplog: pytest.LogCaptureFixture
) -> None:
    network, path, body = model
    answer = network.request("GET", path, b"", {"range": asked}, most=2**24)
    assert (answer.status, bytes(answer.body)) == (200, body)
    assert not caplog.records


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [("0-9", 0, 10), ("10-", 10, None), ("-7", -7, None), (f"5-{2**53}", 5, None), ("0-0", 0, 1)],
)
def test_a_download_that_was_cut_off_goes_on(
    model: tuple[InProcess, str, bytes], asked: str, begin: int, end: int | None
) -> None:
    network, path, body = model
    answer = network.request("GET", path, b"", {"range": f"bytes={asked}"}, most=2**24)
    assert (answer.status, bytes(answer.body)) == (206, body[begin:end])
    assert network.request("GET", path, b"", {"range": f"bytes={len(body)}-"}).status == 416


@pytest.mark.parametrize("length", STRANGE)
def test_a_length_that_is_none_is_refused(
    service: Service, length: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"content-length": length, "sumus-protocol": "1", "content-type": "application/json", "host": "localhost"}
    with InProcess(service.device_app) as devices:
        answer = devices.request("POST", "/v1/enrolments/challenge", b"{}", headers)
        assert (answer.status, json.loads(answer.body)["code"]) == (411, "length_required")
        assert (
            devices.request("POST", "/v1/enrolments/challenge", b"{}", {**headers, "content-length": "2"}).status == 200
        )
    with InProcess(plane_app(None, None, None, None)) as node:  # type: ignore[arg-type]  # pyright: ignore
        assert node.request("POST", "/v1/readings", b"{}", headers).status == 411
    assert not caplog.records


@pytest.mark.parametrize(
    "body",
    [
        f'{{"serial": {DIGITS}, "session": "a", "fingerprints": []}}',
        f'{{"serial": 1, "session": "a", "fingerprints": [], "wait_s": {DIGITS}}}',
        f'{{"serial": 1, "session": "a", "fingerprints": [], "wait_s": 1e{DIGITS}}}', f'{{"serial": -{DIGITS}, "x": 1}}',
    ],
)  # fmt: skip
def test_a_message_with_such_a_number_is_malformed(body: str) -> None:
    with pytest.raises(ParticipantError, match="not a CheckInRequest"):
        read(CheckInRequest, body.encode())
    assert read(CheckInRequest, b'{"serial": 1, "session": "a", "fingerprints": []}').serial == 1


@pytest.mark.parametrize(
    "hop", [DIGITS, f'{{"name": "first_hop", "with": {DIGITS}}}', "[" * 5000, "1", "{}", "nonsense"]
)
def test_an_edge_leaves_out_what_its_server_describes_so(hop: str) -> None:
    """As an error that its way up survives, and not as one that ends it."""
    body = Body("0" * 64, 1)
    served = Served("tiny", "train", "0" * 64, False, body, hop, 1, 1)
    with pytest.raises(PlanError):
        EdgeRun(served, None, None, None, None, None, None)  # type: ignore[arg-type]  # pyright: ignore


def test_a_server_that_answers_so_was_not_reached() -> None:
    class Server:
        def request(self, *asked: Any, **more: Any) -> Answer:
            return Answer(
                429, {"retry-after": DIGITS}, f'{{"code": "rate", "retry_after_s": [{DIGITS}, {DIGITS}]}}'.encode()
            )

        def close(self) -> None: ...

    with pytest.raises(Unreachable, match="is not from a sumus server"):
        Requests(Server(), bytes(32)).enrol("token")


@pytest.mark.parametrize("number", [DIGITS, f"-{DIGITS}", f"1e{DIGITS}"])
def test_a_reading_with_such_a_number_is_refused_alone(number: str) -> None:
    with pytest.raises(BadReading):
        read_json(f'{{"inputs": [{number}]}}'.encode())
    found = read_file("a.jsonl", f'{{"inputs": {number}}}\n{{"inputs": 1}}\n'.encode()).found
    assert [isinstance(one, BadReading) for one in found] == [True, False]
    found = read_file("a.csv", f"inputs\n{number}\n1\n".encode()).found
    assert [type(one["inputs"]) for one in found if isinstance(one, dict)] == [float, int]


def test_an_array_s_header_with_such_a_number_is_refused() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    body = buffer.getvalue().replace(b"(3,)", f"({'9' * 50},)".encode())
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x.npy", body)
    with pytest.raises(BadReading):
        read_file("a.npz", archive.getvalue())


@pytest.mark.parametrize(
    "rest", [f"localhost:{DIGITS}", "[", "[::1", "localhost:٣", "a:-1", "\u2100.example", "[v1.a]:99999999"]
)
def test_an_address_that_is_none_is_said_in_a_sentence(rest: str) -> None:
    with pytest.raises(ExperimentError, match="neither a server's address nor a link: give https://HOST:PORT"):
        read_link(f"https://{rest}")
    with pytest.raises(UsageError, match="is not the URL of a server"):
        origin(f"http://{rest}")
    with pytest.raises(UsageError, match="not a broker's address: give mqtts://HOST:PORT"):
        Broker(f"mqtts://{rest}", ("a",))
    with pytest.raises(UsageError, match="blobs cannot be kept at"):
        open_blobs(f"http://{rest}")
    with pytest.raises(UsageError, match="write HOST:PORT"):
        Node(None, None, "folder", listen=rest)  # type: ignore[arg-type]  # pyright: ignore


def test_a_database_s_address_that_is_none_is_said_in_a_sentence() -> None:
    with pytest.raises(UsageError, match="--database is not a URL"):
        without_secret("postgresql://[")


def test_addresses_as_they_are_written_are_read() -> None:
    assert read_link("https://fl.example:8443").server == "https://fl.example:8443"
    assert origin("http://[::1]:8081") == "http://[::1]:8081"
    assert Broker("mqtts://[2001:db8::1]:1", ("a",)).address == ("2001:db8::1", 1)
    assert (
        without_secret("postgresql+psycopg://sumus@db.example/sumus") == "postgresql+psycopg://sumus@db.example/sumus"
    )
    with pytest.raises(ExperimentError, match="is not the address of a server"):
        HttpTransport("https://exa mple:1")
