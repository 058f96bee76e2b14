"""A server that listens on loopback in a thread of the test, and connections of which the test decides every byte."""

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import uvloop

from sumus.http.certificates import Certificate
from sumus.http.limits import Limits, Rate
from sumus.http.listening import Planes, bound
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.transport.http import HttpTransport
from sumus.wire.bundle import Bundle
from sumus.wire.messages import Assignment, signed_text
from sumus.wire.reports import encode_report
from sumus.wire.signing import sign, to_base64url
from tests.server.devices import ScriptedDevice, path_of, update_of

MUCH = Rate(1e9, 10**9)
ELSEWHERE = "127.1.0.1"
"""An address in another neighbourhood than 127.0.0.1."""


class Besieged:
    """The common part of attacks and controls: a server, its connections, and honest devices.

    Attributes:
        app: The application that listens.
        planes: Its connections.
    """

    def __init__(self, service: Service, bundle: Bundle, port: int, planes: Planes) -> None:
        self.service, self.bundle, self.port, self.planes = service, bundle, port, planes
        self._number = 0

    def device(self) -> ScriptedDevice:
        """Return an enrolled device."""
        self._number += 1
        device = ScriptedDevice(HttpTransport(f"http://127.0.0.1:{self.port}"), self._number)
        device.enrol(self.service.server.roll.new_token("default", self.service.server.clock()))
        return device

    def working(self) -> tuple[ScriptedDevice, Assignment]:
        """Return a device with work."""
        device = self.device()
        work = device.work(self.bundle.plan, wait_s=10.0)
        assert work is not None
        return device, work

    def report(self, device: ScriptedDevice, work: Assignment) -> tuple[bytes, bytes]:
        """Return the head and the body of a signed report."""
        body = encode_report(update_of(self.bundle.plan, device.id))
        return head_of(device, "PUT", path_of(work), body), body

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        """Open a connection from an address."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20.0, source_address=(source, 0))

    def whole_round(self, *begun: tuple[ScriptedDevice, Assignment]) -> None:
        """Check, as the control, that honest devices still make a model."""
        given = list(begun)
        while len(given) < self.bundle.plan.pacing.cohort:
            given.append(self.working())
        for device, work in given:
            assert device.report(work, update_of(self.bundle.plan, device.id)).status == "counted"


def head_of(device: ScriptedDevice, method: str, path: str, body: bytes, **headers: str) -> bytes:
    """Return a signed request's head. headers: replace those that would be sent; with _ for -."""
    text = signed_text(method, path, device.population, device.id, body)
    sent = {
        "Host": "besieged",
        "Sumus-Protocol": "1",
        "Sumus-Device": device.id,
        "Sumus-Signature": to_base64url(sign(device._seed, text)),  # pyright: ignore[reportPrivateUsage]
        "Sumus-Digest": hashlib.sha256(body).hexdigest(),
        "Content-Length": str(len(body)),
    }
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode()


def code_of(answer: bytes) -> str:
    """Return the code of an answer that is an error; else its status."""
    _, found, rest = answer.partition(b'"code":"')
    return rest.partition(b'"')[0].decode() if found else answer[9:12].decode()


def heard(connection: socket.socket) -> bytes:
    """Return the next answer; empty if the connection ends first."""
    answer = b""
    try:
        while piece := connection.recv(2**16):
            answer += piece
            head, end, body = answer.partition(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
            if end and len(body) >= int(length or 0):
                break
    except ConnectionError:
        pass
    return answer


def is_ended(connection: socket.socket) -> bool:
    """Return whether the server ends a connection without another answer; False if the server keeps it."""
    connection.settimeout(10.0)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def floods(connection: socket.socket, piece: bytes, most: int) -> bool:
    """Return whether the server takes this many repeated bytes; False if it ends the connection before, or stops
    reading."""
    connection.settimeout(10.0)
    sent = 0
    try:
        while sent < most:
            sent += connection.send(piece)
    except (ConnectionError, TimeoutError):
        return False
    return True


def comes_true(what: Callable[[], bool], within: float = 20.0) -> bool:
    """Return whether a condition becomes true within a long time."""
    until = time.monotonic() + within
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def listening(app: Any, tls: Certificate | None = None) -> Generator[tuple[int, Planes], None, None]:
    """Run an application on loopback, on any port."""
    ready, over = threading.Event(), threading.Event()
    made: list[Planes] = []

    async def serve(listening: socket.socket) -> None:
        async with Planes([(listening, app, tls)]) as planes:
            made.append(planes)
            ready.set()
            await asyncio.to_thread(over.wait)
            planes.hurry()

    def run(listening: socket.socket) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(listening))

    with bound("127.0.0.1", 0, "--port") as at:
        port = at.getsockname()[1]
        thread = threading.Thread(target=run, args=(at,), daemon=True)
        thread.start()
        assert ready.wait(30.0)
        try:
            yield port, made[0]
        finally:
            over.set()
            thread.join()


@contextmanager
def besieged(bundle: Bundle, **policy: Any) -> Generator[Besieged, None, None]:
    """A server of a task, without limits of requests."""
    service = open_service(
        {"tiny": bundle}, policy=ServerPolicy(group=0.0, limits=Limits(MUCH, MUCH, MUCH, MUCH), **policy)
    )
    service.server.start()
    try:
        with listening(service.device_app) as (port, planes):
            server = Besieged(service, bundle, port, planes)
            for _ in range(bundle.plan.pacing.cohort):  # with fewer devices, none is given work
                server.device()
            yield server
    finally:
        service.close()
