"""The way out of a network: the proxy that the environment names, and an authority of one's own."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sumus.device.device import Device
from sumus.device.link import Link, fetch_authority
from sumus.device.options import ServerConnection
from sumus.edge.edge import open_edge
from sumus.errors import UsageError
from sumus.http.tls import Certificates, enrolment_link, issue
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.transport.http import HttpTransport
from sumus.transport.outbound import proxy_to
from sumus.transport.transport import Unreachable
from tests.device.served import a_task, some_examples
from tests.server.devices import tiny
from tests.transport.echoing import Echo, listening
from tests.transport.forward import Forward
from tests.transport.test_transport import Giving, shown

NAMES = [f"{name}_PROXY" for name in ("HTTPS", "HTTP", "ALL", "NO")]
P = "http://proxy.lan:3128"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    ("environment", "server", "by"),
    [
        ({"HTTPS_PROXY": P}, ("https", "fl.example.org", 443), P),
        ({"https_proxy": P}, ("https", "fl.example.org", 443), P),
        ({"HTTPS_PROXY": "proxy.lan:3128"}, ("https", "fl.example.org", 443), P),
        ({"ALL_PROXY": P}, ("https", "fl.example.org", 443), P),
        ({"HTTPS_PROXY": "http://[2001:db8::1]:8"}, ("https", "[2001:db8::2]", 443), "http://[2001:db8::1]:8"),
        ({"HTTPS_PROXY": P}, ("http", "fl.example.org", 80), None),
        ({"HTTP_PROXY": P}, ("http", "fl.example.org", 80), None),  # a header of a request, to a web server
        ({"http_proxy": P}, ("http", "fl.example.org", 80), P),
        ({"HTTPS_PROXY": ""}, ("https", "fl.example.org", 443), None),
        ({"HTTPS_PROXY": P}, ("https", "localhost", 8080), None),
        ({"HTTPS_PROXY": P}, ("https", "127.0.0.2", 8080), None),
        ({"HTTPS_PROXY": P}, ("https", "[::1]", 8080), None),
        *[
            ({"HTTPS_PROXY": P, "NO_PROXY": excepted}, ("https", host, 8443), None if goes else P)
            for excepted, host, goes in (
                ("*", "fl.example.org", True),
                ("lan, example.org", "fl.example.org", True),
                (".example.org", "FL.example.org", True),
                ("*.example.org", "fl.example.org", True),
                ("ample.org", "fl.example.org", False),
                ("fl.example.org:8443", "fl.example.org", True),
                ("fl.example.org:443", "fl.example.org", False),
                ("10.0.0.0/8", "10.1.2.3", True),
                ("10.0.0.0/8", "11.1.2.3", False),
                ("2001:db8::/32", "[2001:db8::7]", True),
                ("2001:db8::7", "[2001:db8:0::7]", True),
                ("[2001:db8::7]:8443", "[2001:db8::7]", True),
                (",,", "fl.example.org", False),
            )
        ],
    ],
)
def test_which_proxy_leads_where(environment: dict[str, str], server: tuple[str, str, int], by: str | None) -> None:
    found = proxy_to(*server, environment)
    assert (None if found is None else found.url) == by


@pytest.mark.parametrize("said", ["socks5://proxy.lan:1080", "http://", "://", "http://proxy.lan:port"])
def test_what_is_no_proxy_of_http_is_refused_by_its_name(said: str) -> None:
    with pytest.raises(UsageError, match="HTTPS_PROXY in the environment names"):
        proxy_to("https", "fl.example.org", 443, {"HTTPS_PROXY": said})


@pytest.fixture
def mine(tmp_path: Path) -> Certificates:
    return issue(tmp_path / "tls", ["fl.example"], datetime.now(UTC))


def test_a_server_is_reached_through_a_tunnel_whose_proxy_reads_nothing(
    mine: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(Giving(mine.authority.read_bytes()), **shown(mine)) as port, Forward("me:p%") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%25@127.0.0.1:{proxy.port}")
        url = f"https://fl.example:{port}"
        assert fetch_authority(Link(url, pin=mine.pin)) == mine.authority.read_text().strip()
        transport = HttpTransport(url, mine.authority.read_text())
        assert transport.request("GET", "/").status == 200
        assert transport.request("POST", "/", b"a report", {"X-Mine": "mine"}).status == 200
        transport.close()
        assert len(proxy.heads) == 2  # a tunnel each
        assert all(head.startswith(f"CONNECT fl.example:{port} ") and "mine" not in head for head in proxy.heads)


def test_a_plain_server_is_reached_as_the_proxy_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(Echo()) as port, Forward() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        transport = HttpTransport(f"http://fl.example:{port}")
        answer = transport.request("POST", "/some/path?a=b%20c", b"body", {"X-Mine": "mine"})
        transport.close()
        said = json.loads(answer.body)
        assert (said["path"], said["query"], said["bytes"], said["mine"]) == ("/some/path", "a=b%20c", 4, "mine")
        assert proxy.heads[0].startswith(f"POST http://fl.example:{port}/some/path?a=b%20c HTTP/1.1")


@pytest.mark.parametrize("asks", ["request", "pin"])
def test_a_proxy_that_does_not_lead_there_is_named_without_its_password(
    asks: str, mine: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> object:
        if asks == "pin":
            return fetch_authority(Link("https://fl.example", pin=mine.pin))
        return HttpTransport("https://fl.example", mine.authority.read_text()).request("GET", "/")

    def reach() -> str:
        with pytest.raises(Unreachable) as caught:
            ask()
        return str(caught.value)

    with Forward("me:right") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:wrong@127.0.0.1:{proxy.port}")
        refused = reach()
    gone = reach()
    for said in (refused, gone):
        assert f"through the proxy http://127.0.0.1:{proxy.port} (HTTPS_PROXY of the environment)" in said
        assert "wrong" not in said
    assert "407" in refused
    assert "nothing listens there" in gone


# ── an authority of one's own ────────────────────────────────────────────────────────────────────────────────────────


def trusting(authority: Path | None) -> ServerConnection:
    return ServerConnection(authority=authority)


@pytest.fixture
def service() -> Iterator[Service]:
    found = open_service({"tiny": tiny()})
    found.server.start()
    yield found
    found.close()


def test_a_device_and_an_edge_trust_the_authority_that_they_are_given_and_remember_it(
    service: Service, mine: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = service.server
    with listening(service.device_app, **shown(mine)) as port, Forward() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        url = f"https://fl.example:{port}"

        def device(authority: Path | None = None, link: str | None = None) -> Device:
            found = Device(link, a_task(), some_examples(), folder=tmp_path / "device", connection=trusting(authority))
            found.close()
            return found

        link = enrolment_link(url, server.roll.new_token("default", server.clock()))
        with pytest.raises(Unreachable, match="give --authority FILE"):
            device(link=link).enrol()
        asking = device(mine.authority, link)
        known = asking.enrol()
        again = device()
        again._access.requests.withdraw()  # pyright: ignore[reportPrivateUsage]
        assert again.status.device == known

        token = server.roll.new_token("default", server.clock(), speaks_for=10)
        given = Link(url, token).vouched_for_by(mine.authority)
        open_edge(given, Storage(tmp_path / "edge")).close()
        edge = open_edge(Link(""), Storage(tmp_path / "edge"))
        assert edge.uplink._requests.tasks().runs  # pyright: ignore[reportPrivateUsage]
        edge.close()


@pytest.mark.parametrize(
    "content", [None, "", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_an_authority_that_is_none_is_refused_by_its_files_name(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=r"the authority .*ca\.pem cannot be read"):
        Device("https://fl.example", a_task(), some_examples(), connection=trusting(file))


def test_a_link_with_a_pin_needs_no_authority(mine: Certificates) -> None:
    link = enrolment_link("https://fl.example", "TOKEN", mine.pin)
    with pytest.raises(UsageError, match="leave --authority"):
        Device(link, a_task(), some_examples(), connection=trusting(mine.authority))
