"""Readings by MQTT: a node subscribes, and a message is acknowledged when its readings are on the disk.

    broker = Broker("mqtts://broker.lan:8883", topics=("home/+/climate",), user="node", password_file="PASSWORD")
    subscription = Subscription(broker, intake, client="sumus-8c1f", told=print)
    subscription.run(over)                        until the event is set

A message is a JSON reading, or a list of them, sent with QoS 1; the session outlasts the connection, so that what came while the
node was away comes then. QoS 1 delivers at least once: what is to be kept once has a `key`. It needs the extra `mqtt`.
"""

import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from sumus.errors import ExperimentError, UsageError
from sumus.node.access import read_private
from sumus.node.formats import MOST_TEXT, read_json
from sumus.node.intake import Intake
from sumus.node.readings import BadReading
from sumus.text import printable
from sumus.transport.hosts import is_loopback

if TYPE_CHECKING:
    from paho.mqtt.client import Client

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds until a lost connection is tried again, at first and at most."""
KEEP_ALIVE_S = 60


@dataclass(frozen=True)
class Broker:
    """Where readings come from. url: mqtts://HOST[:PORT], or mqtt:// to this machine.  topics: with + and # as MQTT has them.
    password_file: of its owner's alone.  authority: a file of certificates, PEM, that the broker's must come from; None for the
    system's.  insecure: take mqtt:// to another machine."""

    url: str
    topics: tuple[str, ...]
    user: str | None = None
    password_file: str | Path | None = None
    authority: str | Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("mqtt", "mqtts") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            parts, known = urlsplit(""), False
        if not known or parts.path not in ("", "/") or parts.query or parts.username is not None:
            raise UsageError("a broker's address is mqtts://HOST:PORT, without user and password")
        if parts.scheme == "mqtt" and not (self.insecure or is_loopback(parts.hostname or "")):
            raise UsageError(f"{self.url} is not encrypted: use mqtts://, or --insecure where the network itself is")
        if not self.topics:
            raise UsageError("which topics? Give --mqtt-topic home/+/climate, several times for several")
        for topic in self.topics:
            if not _is_filter(topic):
                raise UsageError(
                    f"{topic!r:.80} is no topic filter: + stands for one whole level, and # at the end for all that "
                    "follow, as in home/+/climate or home/#"
                )
        if self.authority is not None:
            try:
                ssl.create_default_context(cafile=self.authority)
            except (OSError, ssl.SSLError) as error:
                raise UsageError(
                    f"the authority {self.authority} cannot be read ({error.strerror or error}): give a file of certificates, PEM"
                ) from error
        if self.password_file is not None and self.user is None:
            raise UsageError("a password is somebody's: give --mqtt-user too")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or (8883 if self.encrypted else 1883)

    @property
    def encrypted(self) -> bool:
        """Whether by TLS."""
        return self.url.startswith("mqtts:")


def _is_filter(topic: str) -> bool:
    """Whether a broker takes a topic as a filter (MQTT 3.1.1, section 4.7)."""
    levels = topic.split("/")
    wild = all(level in ("+", "#") or not {"+", "#"} & set(level) for level in levels)
    return bool(topic) and "\0" not in topic and len(topic.encode()) < 2**16 and wild and "#" not in levels[:-1]


class Subscription:
    """A node's subscription. client: its name at the broker, by which that knows its session.  told: hears of each message.
    refused: messages of which something was refused, so far."""

    def __init__(
        self, broker: Broker, intake: Intake, client: str, told: Callable[[str], None] = lambda line: None
    ) -> None:
        try:
            from paho.mqtt.client import Client
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError as error:
            raise UsageError("MQTT needs the extra: pip install 'sumus[mqtt]'") from error
        self.refused = 0
        self._unreached, self._unkept = "not connected yet", ""
        self._broker, self._intake, self._told = broker, intake, told
        self._client = Client(
            CallbackAPIVersion.VERSION2, client, clean_session=False, manual_ack=True, reconnect_on_failure=False
        )
        if broker.user is not None:
            secret = broker.password_file
            self._client.username_pw_set(broker.user, None if secret is None else read_private(Path(secret)))
        if broker.encrypted:
            cast(Any, self._client).tls_set_context(ssl.create_default_context(cafile=broker.authority))
        self._client.on_connect, self._client.on_message = self._connected, self._came
        self._client.on_disconnect = self._gone

    @property
    def trouble(self) -> str:
        """Why nothing comes, or nothing is kept; empty where all is well."""
        return self._unkept or self._unreached

    def run(self, over: threading.Event) -> None:
        """Take what comes, until it is over; where the connection is lost it is tried again, each time later."""
        wait = FIRST_WAIT
        while not over.is_set():
            try:
                self._client.connect(*self._broker.address, keepalive=KEEP_ALIVE_S)
                self._client.loop_forever(retry_first_connection=False)
            except (OSError, ValueError) as error:
                self._unreached = f"{self._broker.url} is not reached: {error}"
            wait = min(2 * wait, LONGEST_WAIT) if self.trouble else FIRST_WAIT
            self._unreached = self._unreached or f"{self._broker.url} ended the connection"
            over.wait(wait)

    def stop(self) -> None:
        """End what `run` waits for; its event is set before."""
        self._client.disconnect()

    def _connected(self, client: "Client", data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._unreached = f"{self._broker.url} does not let it in: {reason}"
            return
        client.subscribe([(topic, 1) for topic in self._broker.topics])
        self._unreached = ""

    def _gone(self, client: "Client", data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure and not self._unreached:
            self._unreached = f"the connection to {self._broker.url} was lost: {reason}"

    def _came(self, client: "Client", data: Any, message: Any) -> None:
        """A message: acknowledged once it is kept, or once it is known that it cannot be, now or ever."""
        try:
            if len(message.payload) > MOST_TEXT:
                raise BadReading(f"it has {len(message.payload)} bytes, and at most {MOST_TEXT} are read")
            taken = self._intake.take(read_json(message.payload))
            bad = "; ".join(f"reading {number}: {why}" for number, why in list(taken.refused.items())[:3])
        except BadReading as error:
            bad = str(error)
        except ExperimentError as error:  # the disk, say: it comes again with the next connection
            self._unkept = str(error)
            client.disconnect()
            return
        self._unkept = ""
        if bad:
            self.refused += 1
            self._told(printable(f"{message.topic}: refused, {bad}"))
        client.ack(message.mid, message.qos)
