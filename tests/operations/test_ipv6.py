"""A server at an IPv6 address: its own certificate, its links, its admin."""

import asyncio
from pathlib import Path

import pytest

from sumus.device.link import fetch_authority, read_link
from sumus.http.listening import Listening, opened_at
from sumus.operations.remote import Remote
from sumus.server.access import Logins
from sumus.transport.http import HttpTransport
from tests.operations.test_serve import serving
from tests.server.devices import ScriptedDevice, tiny, train_round


def test_devices_and_the_admin_reach_a_server_with_its_own_certificate(tmp_path: Path) -> None:
    bundle = tiny(cohort=2, deadline=60.0)
    (tmp_path / "tiny.sumus").write_bytes(bundle.to_bytes())
    words = (tmp_path / "tiny.sumus", "--data", tmp_path / "data", "--host", "::1", "--admin-host", "[::1]")
    with serving(*words, "--tls", "auto", "--tokens", 2, "--rounds", 1) as served:
        assert served.opened["url"].startswith("https://[::1]:")
        remote = Remote(served.opened["admin_url"], Logins(tmp_path / "admin"))
        remote.log_in(served.opened["login"])
        assert remote.ask("GET", "/v1/admin/status")["certificate_s"] > 0
        links = [read_link(line) for line in served.opened["enrolment"].splitlines()]
        transport = HttpTransport(links[0].server, fetch_authority(links[0]))
        devices = [ScriptedDevice(transport, number) for number in range(2)]
        for device, link in zip(devices, links, strict=True):
            device.enrol(str(link.token))
        assert len(train_round(devices, bundle.plan, [1.0, 2.0])) == 2
        transport.close()
        code, out, err = served.ended()
        assert (code, out.strip()) == (0, "loaded []"), err


@pytest.mark.parametrize(
    ("host", "names", "url"),
    [
        ("::1", (), "https://[::1]"),
        ("[::1]", (), "https://[::1]"),
        ("0:0:0:0:0:0:0:1", (), "https://[0:0:0:0:0:0:0:1]"),
        ("::1", ("2001:db8::7",), "https://[2001:db8::7]"),
        ("::1", ("[2001:db8::7]", "fl.example"), "https://[2001:db8::7]"),
        ("127.0.0.1", ("fl.example", "::1"), "https://fl.example"),
    ],
)
def test_an_address_is_in_brackets_in_a_url_and_nowhere_else(
    host: str, names: tuple[str, ...], url: str, tmp_path: Path
) -> None:
    with opened_at(Listening(host=host, port=0, admin_port=0, tls=["auto"], names=names), tmp_path) as at:
        assert at.url == f"{url}:{at.sockets[0].getsockname()[1]}"
        assert at.authority is not None

        async def answer(scope: object, receive: object, send: object) -> None:
            raise AssertionError

        async def planes() -> None:
            async with at.planes(answer, answer):
                pass

        asyncio.run(planes())
