"""A message is acknowledged when its readings are on the disk: the real client, at a broker of the test's own."""

import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sumus.errors import ExperimentError, UsageError
from sumus.http.tls import issue
from sumus.node import mqtt
from sumus.node.access import access_token, read_private
from sumus.node.intake import Intake
from sumus.node.mqtt import Broker, Subscription
from sumus.node.readings import Readings
from tests.node import broker as test_broker

TOPICS = ("home/+/climate",)


@pytest.fixture
def readings(tmp_path: Path) -> Iterator[Readings]:
    with Readings(tmp_path / "node") as readings:
        yield readings


@pytest.fixture
def there() -> Iterator[test_broker.Broker]:
    there = test_broker.Broker()
    yield there
    there.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(mqtt, "LONGEST_WAIT", 0.02)


@contextmanager
def subscribed(readings: Readings, there: test_broker.Broker, **more: Any) -> Iterator[tuple[Subscription, list[str]]]:
    """A node's subscription, while it runs, and what it said."""
    said: list[str] = []
    at = Broker(f"mqtt://127.0.0.1:{there.port}", TOPICS, **more)
    subscription, over = Subscription(at, Intake(readings), "node-1", said.append), threading.Event()
    thread = threading.Thread(target=subscription.run, args=(over,))
    thread.start()
    try:
        yield subscription, said
    finally:
        over.set()
        subscription.stop()
        thread.join(10.0)
        assert not thread.is_alive()


def message(number: int, **more: Any) -> bytes:
    return json.dumps({"inputs": [number], "target": 0, **more}).encode()


def test_what_is_acknowledged_is_kept(readings: Readings, there: test_broker.Broker) -> None:
    with subscribed(readings, there) as (subscription, _):
        there.until(lambda it: it.topics)
        assert there.topics == [(TOPICS[0], 1)]
        assert there.clients == [("node-1", False)], "its session outlasts the connection"
        for number in range(20):
            there.publish("home/kitchen/climate", message(number))
        there.publish("home/attic/climate", b"[" + message(20) + b"," + message(21) + b"]")
        there.until(lambda it: len(it.acknowledged) == 21)
        assert readings.examples()[0].ravel().tolist() == list(range(22))
        assert subscription.trouble == ""


def test_what_came_while_it_was_away_comes_then(readings: Readings, there: test_broker.Broker) -> None:
    with subscribed(readings, there):
        there.until(lambda it: it.topics)
    there.publish("home/kitchen/climate", message(1))
    with subscribed(readings, there):
        there.until(lambda it: it.acknowledged == [1])
    assert readings.kept.count == 1


def test_a_lost_connection_is_found_again(readings: Readings, there: test_broker.Broker) -> None:
    with subscribed(readings, there):
        there.until(lambda it: it.topics)
        there.drop()
        there.until(lambda it: len(it.clients) == 2)
        there.publish("home/kitchen/climate", message(1))
        there.until(lambda it: it.acknowledged == [1])
    assert readings.kept.count == 1


@pytest.mark.parametrize("moment", ["before", "while", "after"])
def test_it_ends_if_it_is_stopped_while_it_connects(readings: Readings, there: test_broker.Broker, moment: str) -> None:
    over = threading.Event()

    class Stopped(Subscription):
        def _connect(self) -> None:
            self._end("before")
            super()._connect()
            self._end("after")

        def _new_client(self) -> Any:
            client = super()._new_client()
            client.on_pre_connect = lambda *_: self._end("while")
            return client

        def _end(self, now: str) -> None:
            if now == moment:
                over.set()
                self.stop()

    at = Broker(f"mqtt://127.0.0.1:{there.port}", TOPICS)
    stopped = Stopped(at, Intake(readings), "node-1")
    stopped._newest = False
    stopped._client = stopped._new_client()  # of the version that this broker knows, which would else end it by itself
    thread = threading.Thread(target=stopped.run, args=(over,), daemon=True)
    thread.start()
    thread.join(20.0)
    assert not thread.is_alive()


def test_what_cannot_be_kept_is_not_acknowledged_and_comes_again(readings: Readings, there: test_broker.Broker) -> None:
    database: Any = vars(readings)["_file"].database
    database.execute("PRAGMA query_only = ON")  # a full disk, say
    with subscribed(readings, there) as (subscription, _):
        there.publish("home/kitchen/climate", message(1, key="a"))
        there.until(lambda it: len(it.delivered) >= 2)
        assert there.acknowledged == []
        assert "nothing can be stored" in subscription.trouble
        database.execute("PRAGMA query_only = OFF")
        there.until(lambda it: it.acknowledged == [1])
    assert there.delivered[:2] == [(1, False), (1, True)]
    assert readings.kept.count == 1


def test_a_key_makes_at_least_once_exactly_once(readings: Readings, there: test_broker.Broker) -> None:
    Intake(readings).take([json.loads(message(1, key="a"))])  # and the node was killed before it acknowledged
    there.publish("home/kitchen/climate", message(1, key="a"))
    with subscribed(readings, there):
        there.until(lambda it: it.acknowledged == [1])
    assert readings.kept.count == 1


@pytest.mark.parametrize("payload", [b"", b"nonsense", b"{}", b"[" * 5000, b'{"inputs": [1, null]}', b"x" * 2**20])
def test_what_is_no_reading_is_said_once_and_blocks_nothing(
    payload: bytes, readings: Readings, there: test_broker.Broker
) -> None:
    there.publish("home/kitchen/climate", payload)
    there.publish("home/kitchen/climate", message(2))
    with subscribed(readings, there) as (subscription, said):
        there.until(lambda it: it.acknowledged == [1, 2])
        assert subscription.refused == 1
    assert readings.examples()[0].tolist() == [[2]]
    assert said[0].startswith("home/kitchen/climate: refused, ")
    assert len(said) == 1


def test_a_topic_that_is_denied_is_said(readings: Readings, there: test_broker.Broker) -> None:
    there.denied.add(TOPICS[0])
    with subscribed(readings, there) as (subscription, said):
        while "refuses the topic home/+/climate: " not in subscription.trouble:
            threading.Event().wait(0.01)
    assert len(said) == 1


def test_a_message_of_a_topic_that_was_not_asked_for_is_not_taken(
    readings: Readings, there: test_broker.Broker
) -> None:
    there.publish("garden/gate", message(1))
    there.publish("home/kitchen/climate", message(2))
    with subscribed(readings, there):
        there.until(lambda it: it.acknowledged == [1, 2])
    assert readings.examples()[0].tolist() == [[2]]


def test_a_password_from_a_file(readings: Readings, tmp_path: Path) -> None:
    secret = tmp_path / "PASSWORD"
    secret.write_text("open sesame\n")
    there = test_broker.Broker(("ali", "open sesame"))
    try:
        with (
            pytest.raises(ExperimentError, match="others can read it: run `chmod 600"),
            subscribed(readings, there, user="ali", password_file=secret),
        ):
            pass
        secret.chmod(0o600)
        with subscribed(readings, there, user="ali", password_file=secret):
            there.until(lambda it: it.topics)
        there.topics = []
        with subscribed(readings, there, user="kasim") as (subscription, _):
            there.until(lambda it: len(it.clients) >= 3)
            assert there.topics == []
        assert "refuses the login: Not authorized" in subscription.trouble
    finally:
        there.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_by_an_authority_of_ones_own(readings: Readings, tmp_path: Path) -> None:
    """The client leaves a socket to the garbage collector where a certificate is refused."""
    made = issue(tmp_path / "tls", ["127.0.0.1"], datetime.now(UTC))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.chain, made.key)
    there = test_broker.Broker(context=context)
    over = threading.Event()
    try:
        trusting = Broker(f"mqtts://127.0.0.1:{there.port}", TOPICS, authority=made.authority)
        subscription = Subscription(trusting, Intake(readings), "node-1")
        thread = threading.Thread(target=subscription.run, args=(over,))
        thread.start()
        there.publish("home/kitchen/climate", message(1))
        there.until(lambda it: it.acknowledged == [1])
        over.set()
        subscription.stop()
        thread.join(10.0)
        met = len(there.clients)
        wary = Subscription(Broker(f"mqtts://127.0.0.1:{there.port}", TOPICS), Intake(readings), "node-1")
        again = threading.Event()
        thread = threading.Thread(target=wary.run, args=(again,))
        thread.start()
        until = time.monotonic() + 60.0
        while "its certificate is not trusted" not in wary.trouble:
            assert time.monotonic() < until, wary.trouble
            thread.join(0.01)
        again.set()
        thread.join(10.0)
        assert len(there.clients) == met, "it never spoke"
    finally:
        there.close()


def test_a_broker_that_is_not_there_is_said(readings: Readings, there: test_broker.Broker) -> None:
    there.close()
    with subscribed(readings, there) as (subscription, _):
        while "cannot be reached" not in subscription.trouble:
            threading.Event().wait(0.01)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"url": "http://127.0.0.1"}, "mqtts://HOST:PORT"),
        ({"url": "127.0.0.1:1883"}, "mqtts://HOST:PORT"),
        ({"url": "mqtts://user:secret@127.0.0.1"}, "without user and password"),
        ({"url": "mqtt://broker.lan"}, "not encrypted: use mqtts://"),
        ({"url": "mqtts://broker.lan:99999"}, "mqtts://HOST:PORT"),
        ({"topics": ()}, "no topic is given"),
        ({"password_file": "PASSWORD"}, "a password needs a user name"),
        ({"certificate": "CERTIFICATE"}, "a certificate and its key belong together"),
        ({"url": "mqtt://127.0.0.1", "certificate": "a", "key": "b"}, "a certificate needs TLS"),
    ],
)
def test_an_address_that_is_none(given: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why) as refused:
        Broker(**{"url": "mqtts://broker.lan", "topics": TOPICS, **given})
    assert "secret" not in str(refused.value)


def test_where_it_is() -> None:
    assert Broker("mqtts://broker.lan", TOPICS).address == ("broker.lan", 8883)
    assert Broker("mqtt://broker.lan:1", TOPICS, insecure=True).address == ("broker.lan", 1)
    assert Broker("mqtt://[::1]", TOPICS).address == ("::1", 1883)


def test_a_token_is_made_read_and_never_shared(tmp_path: Path) -> None:
    file = tmp_path / "TOKEN"
    token = access_token(file, {})
    assert token is not None
    assert len(token) == 43
    assert access_token(file, {"SUMUS_NODE_TOKEN": "x" * 20}) == token
    assert access_token(None, {"SUMUS_NODE_TOKEN": "x" * 20}) == "x" * 20
    assert access_token(None, {}) is None
    file.chmod(0o640)
    with pytest.raises(ExperimentError, match="others can read it"):
        read_private(file)
    with pytest.raises(UsageError, match="at least 16 ASCII characters"):
        access_token(None, {"SUMUS_NODE_TOKEN": "short"})


@pytest.mark.parametrize("topic", ["home/#/climate", "home/+x", "home/x#", "", "#/home", "home\0"])
def test_a_topic_that_is_no_filter_is_refused_at_once(topic: str) -> None:
    with pytest.raises(UsageError, match="is not a topic filter"):
        Broker("mqtts://broker.example", (topic,))


@pytest.mark.parametrize("topic", ["#", "+", "+/+/#", "/", "home//x", "$SYS/#", "home/+/climate"])
def test_a_topic_filter_is_taken(topic: str) -> None:
    assert Broker("mqtts://broker.example", (topic,)).topics == (topic,)


def test_an_authority_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name, words in (("none.pem", "No such file"), ("empty.pem", "PEM|NO_CERT|no cert|start line")):
        with pytest.raises(UsageError, match=f"the authority .*{name} cannot be read.*({words})"):
            Broker("mqtts://broker.example", ("x",), authority=tmp_path / name)
