"""A server behind a real nginx, with the lines of docs/server.md: TLS there, addresses, uploads and long polls, IPv4 and IPv6."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import urllib3

from sumus.http.listening import Listening, opened_at
from sumus.http.tls import Certificates, issue
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.transport.http import HttpTransport
from tests.server.devices import ScriptedDevice, tiny, together, train_round, update_of
from tests.services import nginx

ROOT = Path(__file__).parents[2]
SIZE = 600_000
"""Parameters: a report of 2.4 MB, more than nginx takes by itself."""


def free(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.bind((host, 0))
        return one.getsockname()[1]


def documented(ports: dict[str, int], upstream: str, made: Certificates) -> str:
    """The block of the documentation, for this machine alone."""
    found = re.search(r"^server \{\n.*?^\}\n", (ROOT / "docs" / "server.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    text = found[0]
    for old, new in (
        ("listen 443 ssl;", f"listen 127.0.0.1:{ports['127.0.0.1']} ssl;"),
        ("listen [::]:443 ssl;", f"listen [::1]:{ports['::1']} ssl;"),
        ("server_name fl.example.org;", "server_name _;"),
        ("chain.pem", str(made.chain)),
        ("key.pem", str(made.key)),
        ("http://127.0.0.1:8080", upstream),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@contextmanager
def answering(service: Service, host: str, folder: Path, seen: set[str]) -> Iterator[str]:
    """Its devices' plane at an address, which believes a proxy there; its URL. seen: gets who asked."""
    over, up = threading.Event(), threading.Event()
    at = ExitStack()
    found = at.enter_context(opened_at(Listening(host=host, port=0, admin_port=0, proxies=host), folder / "tls"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.add(scope["client"][0])
        await service.device_app(scope, receive, send)

    async def serve() -> None:
        async with found.planes(app, app):
            up.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert up.wait(30)
        yield found.url
    finally:
        over.set()
        thread.join()
        at.close()


@pytest.mark.parametrize("upstream", ["127.0.0.1", "::1"])
def test_rounds_go_through_it(upstream: str, tmp_path: Path) -> None:
    bundle = tiny(cohort=4, size=SIZE, deadline=600.0)
    made = issue(tmp_path / "nginx", ["127.0.0.1", "::1"], datetime.now(UTC))
    ports = {host: free(host) for host in ("127.0.0.1", "::1")}
    service = open_service({"tiny": bundle}, policy=ServerPolicy(group=0.0))
    seen = set[str]()
    with ExitStack() as stack:
        stack.callback(service.close)
        server = service.server
        server.start()
        url = stack.enter_context(answering(service, upstream, tmp_path, seen))
        log = stack.enter_context(nginx(documented(ports, url, made), tmp_path))
        ways = [
            HttpTransport(f"https://{f'[{host}]' if ':' in host else host}:{port}", made.authority.read_text())
            for host, port in ports.items()
        ]
        for way in ways:
            stack.callback(way.close)
        devices = [ScriptedDevice(ways[number % 2], number) for number in range(4)]
        token = server.roll.new_token("default", server.clock(), uses=4)
        devices[0].enrol(token)

        def others() -> None:
            """Come while the first one is held open, who is alone and waits for them."""
            until = time.monotonic() + 30
            while not server.held:
                assert time.monotonic() < until
                time.sleep(0.01)
            for device in devices[1:]:
                device.enrol(token)

        long, _ = together(lambda: devices[0].work(bundle.plan, wait_s=30.0), others)
        assert long is not None
        devices[0].report(long, update_of(bundle.plan, devices[0].id, value=1.0))
        assert len(train_round(devices[1:], bundle.plan, [2.0, 3.0, 4.0])) == 3
        server.ask_to_do(lambda now: None).result()
        assert server.tasks[0].training.version == 1
        assert "buffered to a temporary file" not in log.read_text()
        assert not [line for line in log.read_text().splitlines() if "[error]" in line or "[crit]" in line]
    assert seen == {"127.0.0.1", "::1"}


def test_who_asks_is_believed_of_nginx_and_of_nobody_before_it(tmp_path: Path) -> None:
    made = issue(tmp_path / "nginx", ["127.0.0.1", "::1"], datetime.now(UTC))
    ports = {host: free(host) for host in ("127.0.0.1", "::1")}
    service = open_service({"tiny": tiny(deadline=600.0)})
    seen = set[str]()
    with ExitStack() as stack:
        stack.callback(service.close)
        url = stack.enter_context(answering(service, "127.0.0.1", tmp_path, seen))
        stack.enter_context(nginx(documented(ports, url, made), tmp_path))
        pool = urllib3.HTTPSConnectionPool(
            "127.0.0.1", ports["127.0.0.1"], ca_certs=str(made.authority), source_address=("127.0.0.2", 0)
        )
        stack.callback(pool.close)
        answer = pool.request("GET", "/healthz", headers={"X-Forwarded-For": "203.0.113.9"})
        assert answer.status == 200
    assert seen == {"127.0.0.2"}
