"""A real broker, mosquitto: what it retains and ends, and clients that show a certificate. Skipped where it is not installed."""

import getpass
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from sumus.errors import ExperimentError
from sumus.http.tls import issue
from sumus.node import mqtt
from sumus.node.intake import Intake
from sumus.node.mqtt import Broker, Subscription
from sumus.node.readings import Readings
from tests.services import missing

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
MOSQUITTO = shutil.which("mosquitto", path=PATH)


@pytest.fixture(autouse=True)
def installed() -> None:
    if MOSQUITTO is None:
        missing("mosquitto (Debian: apt-get install mosquitto)")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(mqtt, "LONGEST_WAIT", 0.1)


@contextmanager
def broker(folder: Path, *lines: str) -> Iterator[int]:
    """mosquitto, on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = folder / "mosquitto.conf"
    settings.write_text(
        "\n".join(
            [f"user {getpass.getuser()}", f"listener {port} 127.0.0.1", *(lines or ("allow_anonymous true",)), ""]
        )
    )
    process = subprocess.Popen(
        [str(MOSQUITTO), "-c", settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
    )
    try:
        until(lambda: _listens(port))
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def until(met: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Node:
    """A node's subscription, which can be ended and begun again. taken: topic and value of each reading."""

    def __init__(self, folder: Path, port: int, *topics: str, url: str = "mqtt", **more: Any) -> None:
        self.folder, self.said, self.taken = folder, list[str](), list[tuple[str, Any]]()
        self.readings = Readings(folder / "node")
        self._at = Broker(f"{url}://127.0.0.1:{port}", topics, **more)
        self._over = threading.Event()

    def __enter__(self) -> "Node":
        def prepare(raw: Any) -> tuple[Any, Any]:
            self.taken.append((raw["topic"], raw["value"]))
            return [float(raw["value"])], None

        intake = Intake(self.readings, prepare)
        self.subscription = Subscription(self._at, intake, "node-1", self.said.append, self.folder / "topics")
        self._thread = threading.Thread(target=self.subscription.run, args=(self._over,))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self.subscription.stop()
        self._thread.join(10)
        self.readings.close()
        assert not self._thread.is_alive()

    @property
    def is_in(self) -> bool:
        return not self.subscription.trouble


def publish(port: int, topic: str, payload: str | bytes, retain: bool = False) -> None:
    client = Client(CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", port)
    client.loop_start()
    client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()


def test_a_retained_message_counts_once_and_values_may_be_bare(tmp_path: Path) -> None:
    with broker(tmp_path) as port:
        publish(port, "home/kitchen", "21.5", retain=True)
        for _ in range(2):
            with Node(tmp_path, port, "home/#") as node:
                until(lambda node=node: node.is_in)
                publish(port, "home/end", b'{"value": 0}')
                until(lambda node=node: ("home/end", 0) in node.taken)
                time.sleep(0.1)  # until it is acknowledged
                kept = node.readings.kept.count
        assert kept == 3, "the retained one once, and the end twice"
        publish(port, "home/kitchen", "22.5", retain=True)
        with Node(tmp_path, port, "home/#") as node:
            until(lambda: node.taken == [("home/kitchen", 22.5)])
            publish(port, "home/kitchen", "nothing to count")
            until(lambda: node.subscription.refused == 1)
            assert "home/kitchen: refused, " in node.said[-1]
            assert node.subscription.state["messages"] == 2


def test_topics_that_are_not_asked_for_any_more_are_not_taken(tmp_path: Path) -> None:
    with broker(tmp_path) as port:
        with Node(tmp_path, port, "home/#", "garden/#") as node:
            until(lambda: node.is_in)
        publish(port, "home/kitchen", "1")
        with Node(tmp_path, port, "garden/#") as node:
            until(lambda: node.is_in)
            publish(port, "home/kitchen", "2")
            publish(port, "garden/gate", "3")
            until(lambda: node.taken)
            assert node.taken == [("garden/gate", 3)]
            until(lambda: node.readings.kept.count == 1)


def test_why_a_connection_ended_is_said(tmp_path: Path) -> None:
    with broker(tmp_path) as port:
        node = Node(tmp_path, port, "home/#").__enter__()
        until(lambda: node.is_in)
    try:
        until(lambda: node.subscription.ended)
        assert node.subscription.state["last_end"] in ("Server shutting down", "Unspecified error"), (
            "as the broker says"
        )
    finally:
        node.__exit__()


def certificates(folder: Path) -> tuple[Path, Path]:
    """A certificate that a client shows, which vouches for itself, and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node-1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, secret = folder / "client.pem", folder / "client.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    secret.write_bytes(key.private_bytes(*pem, plain))
    secret.chmod(0o600)
    return certificate, secret


def test_a_node_shows_a_certificate(tmp_path: Path) -> None:
    made = issue(tmp_path / "tls", ["127.0.0.1"], datetime.now(UTC))
    certificate, key = certificates(tmp_path)
    lines = [f"cafile {certificate}", f"certfile {made.chain}", f"keyfile {made.key}", "require_certificate true"]
    with broker(tmp_path, *lines, "allow_anonymous true") as port:
        own = {"authority": made.authority, "certificate": certificate, "key": key}
        with Node(tmp_path, port, "home/#", url="mqtts", **own) as node:
            until(lambda: node.is_in)
        with Node(tmp_path, port, "home/#", url="mqtts", authority=made.authority) as node:
            until(lambda: node.subscription.trouble not in ("", "not connected yet"))
            assert not node.is_in
    (tmp_path / "none").write_text("none")
    (tmp_path / "none").chmod(0o600)
    with pytest.raises(ExperimentError, match="the certificates for mqtts://broker.lan cannot be read"):
        Subscription(
            Broker("mqtts://broker.lan", ("a",), certificate=tmp_path / "none", key=tmp_path / "none"),
            None,
            "node",  # type: ignore[arg-type]
        )
