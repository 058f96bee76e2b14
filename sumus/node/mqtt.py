"""Readings by MQTT: a node subscribes, and acknowledges a message once its readings are on the disk.

    broker = Broker("mqtts://broker.lan:8883", topics=("home/+/climate",), user="node", password_file="PASSWORD")
    subscription = Subscription(broker, intake, client="sumus-8c1f", told=print)
    subscription.run(over)                        runs until the event is set

A message is a JSON reading, a list of readings, or a bare value, sent with QoS 1; each reading gets its `topic`. The session
outlasts the connection: messages that arrive while the node is offline are delivered once it is back. QoS 1 delivers at least
once, so readings that must be kept only once need a `key`. A message that the broker retains, and sends again at every
new connection, counts once. The extra `mqtt` is required.
"""

import json
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from sqlite3 import Connection
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from sumus.errors import ExperimentError, UsageError, extra, unread
from sumus.node.access import read_private
from sumus.node.batch import MOST_TEXT, Raw
from sumus.node.formats import read_json
from sumus.node.intake import Intake
from sumus.node.reading import BadReading
from sumus.storage.files import write_whole
from sumus.text import over, printable
from sumus.transport.hosts import is_loopback
from sumus.transport.transport import why_unreached

if TYPE_CHECKING:
    from paho.mqtt.client import Client

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""The first and the longest time, in seconds, between the end of a connection and the next attempt to connect."""
KEEP_ALIVE_S = 60
LONGEST_VALUE = 1000
"""The maximum number of bytes of a bare value."""
MOST_TOPICS = 100_000
"""The maximum number of topics whose last message is remembered."""
OFTEN, OFTEN_S = 3, 600.0
"""A problem is reported if this number of connections end within this number of seconds, even while another one is open."""


@dataclass(frozen=True)
class Broker:
    """A broker that sends readings.

    Attributes:
        url: The address: mqtts://HOST[:PORT], or mqtt:// to this machine.
        topics: The topics, with MQTT's + and #.
        user: The user name with which the node logs in; None to send no user name.
        password_file: A file with the password, accessible only to its owner; None to send no password.
        authority: A file of CA certificates (PEM) with which to verify the broker; None for the system's.
        insecure: Whether mqtt:// to another machine is allowed.
        certificate: A file with the node's own certificate (PEM); None to show none.
        key: A file with the key of that certificate, accessible only to its owner.
    """

    url: str
    topics: tuple[str, ...]
    user: str | None = None
    password_file: str | Path | None = None
    authority: str | Path | None = None
    insecure: bool = False
    certificate: str | Path | None = None
    key: str | Path | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("mqtt", "mqtts") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            parts, known = urlsplit(""), False
        if not known or parts.path not in ("", "/") or parts.query or parts.username is not None:
            raise UsageError("this is not a broker's address: give mqtts://HOST:PORT, without user and password")
        if parts.scheme == "mqtt" and not (self.insecure or is_loopback(parts.hostname or "")):
            raise UsageError(
                f"{self.url} is not encrypted: use mqtts://, or give --insecure if the network itself is encrypted"
            )
        if not self.topics:
            raise UsageError("no topic is given: give --mqtt-topic home/+/climate, once for each topic")
        for topic in self.topics:
            if not _is_filter(topic):
                raise UsageError(
                    f"{topic!r:.80} is not a topic filter: + stands for one whole level, and # at the end for all "
                    "further levels, as in home/+/climate or home/#"
                )
        if self.authority is not None:
            try:
                ssl.create_default_context(cafile=self.authority)
            except (OSError, ssl.SSLError) as error:
                raise UsageError(
                    f"the authority {self.authority} cannot be read ({error.strerror or error}): give CA certificates (PEM)"
                ) from error
        if self.password_file is not None and self.user is None:
            raise UsageError("a password needs a user name: give --mqtt-user too")
        if (self.certificate is None) != (self.key is None):
            raise UsageError("a certificate and its key belong together: give --mqtt-certificate and --mqtt-key")
        if self.certificate is not None and parts.scheme == "mqtt":
            raise UsageError("a certificate needs TLS: use mqtts://")

    @property
    def address(self) -> tuple[str, int]:
        """The broker's host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or (8883 if self.encrypted else 1883)

    @property
    def encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return self.url.startswith("mqtts:")


def _is_filter(topic: str) -> bool:
    """Return whether a broker accepts a topic as a filter (MQTT 3.1.1, section 4.7)."""
    levels = topic.split("/")
    wild = all(level in ("+", "#") or not {"+", "#"} & set(level) for level in levels)
    return bool(topic) and "\0" not in topic and len(topic.encode()) < 2**16 and wild and "#" not in levels[:-1]


class Subscription:
    """A node's subscription.

    Attributes:
        messages: The number of messages that arrived.
        refused: The number of messages with refused readings.
        ended: The number of connections that ended unintentionally.

    Args:
        broker: The broker.
        intake: Accepts the readings.
        client: The node's name at the broker, which identifies the session.
        told: Called with a line for each refused message, and for each refusal by the broker.
        asked: A file that records the session's topics; None to record none.
    """

    def __init__(
        self,
        broker: Broker,
        intake: Intake,
        client: str,
        told: Callable[[str], None] = lambda line: None,
        asked: Path | None = None,
    ) -> None:
        try:
            from paho.mqtt.client import topic_matches_sub
        except ImportError as error:
            raise UsageError(f"MQTT needs paho-mqtt: {extra('mqtt')}") from error
        self.messages = self.refused = self.ended = 0
        self._unreached, self._unkept, self._last_end = "not connected yet", "", ""
        self._let_in, self._denied = False, dict[str, str]()
        self._asking: dict[int, tuple[str, ...]] = {}
        self._ends: deque[float] = deque(maxlen=OFTEN)
        self._broker, self._intake, self._told, self._name, self._asked = broker, intake, told, client, asked
        self._matches, self._newest, self._answered, self._stopped = topic_matches_sub, True, True, False
        self._secret = None if broker.password_file is None else read_private(Path(broker.password_file))
        self._tls = _tls_of(broker) if broker.encrypted else None
        self._client = self._new_client()

    def _new_client(self) -> "Client":
        """Make a client for MQTT 5, in which brokers give a reason when they end a connection; or for 3.1.1 if the broker needs
        that."""
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

        more: dict[str, Any] = {} if self._newest else {"clean_session": False}
        client = Client(
            CallbackAPIVersion.VERSION2,
            self._name,
            protocol=MQTTProtocolVersion.MQTTv5 if self._newest else MQTTProtocolVersion.MQTTv311,
            manual_ack=True,
            reconnect_on_failure=False,
            **more,
        )
        if self._broker.user is not None:
            client.username_pw_set(self._broker.user, self._secret)
        if self._tls is not None:
            cast(Any, client).tls_set_context(self._tls)
        client.on_connect, client.on_message, client.on_disconnect = self._connected, self._came, self._gone
        client.on_subscribe = self._subscribed
        return client

    @property
    def trouble(self) -> str:
        """The reason why no readings arrive, or none are kept; empty if all is well."""
        often = len(self._ends) == OFTEN and time.monotonic() - self._ends[0] < OFTEN_S
        ends = (
            f"the broker ended {OFTEN} connections within {OFTEN_S:g} s, the last one: {self._last_end}"
            if often
            else ""
        )
        return self._unkept or self._unreached or "; ".join(self._denied.values()) or ends

    @property
    def state(self) -> dict[str, Any]:
        """The subscription's state, for a status."""
        return {
            "messages": self.messages,
            "refused": self.refused,
            "ended": self.ended,
            **({"last_end": printable(self._last_end)} if self._last_end else {}),
        }

    def run(self, over: threading.Event) -> None:
        """Receive messages until the event is set; after a lost connection, connect again, with longer and longer waits."""
        wait = FIRST_WAIT
        while not over.is_set():
            self._answered = True
            try:
                self._connect()
                if self._stopped:  # `stop` came before there was a connection to end
                    self._client.disconnect()
                self._answered = False
                self._client.loop_forever(retry_first_connection=False)
            except (OSError, ValueError) as error:
                self._unreached = f"{self._broker.url} cannot be reached: {why_unreached(error)}"
            if not (self._answered or over.is_set()):  # a broker without MQTT 5 may end the connection silently
                self._newest = not self._newest
                self._client = self._new_client()
            wait = min(2 * wait, LONGEST_WAIT) if self._unkept or self._unreached else FIRST_WAIT
            self._unreached = self._unreached or f"{self._broker.url} ended the connection"
            over.wait(wait)

    def _connect(self) -> None:
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        more: dict[str, Any] = {}
        if self._newest:
            lasting = Properties(PacketTypes.CONNECT)
            lasting.SessionExpiryInterval = 2**32 - 1  # the session outlasts the connection, as with MQTT 3.1.1
            more = {"clean_start": False, "properties": lasting}
        self._client.connect(*self._broker.address, keepalive=KEEP_ALIVE_S, **more)

    def stop(self) -> None:
        """End `run`; set its event before, so that it does not connect again."""
        self._stopped = True
        self._client.disconnect()

    def _connected(self, client: "Client", data: Any, flags: Any, reason: Any, properties: Any) -> None:
        self._answered = True
        if reason.is_failure:
            if self._newest and str(reason) == "Unsupported protocol version":
                self._newest = False
                self._client = self._new_client()
            self._unreached = f"{self._broker.url} refuses the login: {reason}"
            return
        for topic in self._asked_before() - set(self._broker.topics):
            client.unsubscribe(topic)
        if self._asked is not None:
            write_whole(self._asked, json.dumps(self._broker.topics).encode(), private=True)
        self._denied.clear()
        for topic in self._broker.topics:
            _, number = client.subscribe(topic, 1) if not self._newest else client.subscribe(topic, options=_once())
            self._asking[number or 0] = (topic,)
        self._unreached, self._let_in = "", True

    def _asked_before(self) -> set[str]:
        """Return the topics to which the session at the broker is still subscribed."""
        if self._asked is None or not self._asked.exists():
            return set()
        try:
            return set(json.loads(self._asked.read_text()))
        except (OSError, ValueError, TypeError):
            return set()

    def _subscribed(self, client: "Client", data: Any, number: int, reasons: Any, properties: Any) -> None:
        topics = self._asking.pop(number, ())
        for topic, reason in zip(topics, reasons, strict=False):
            if reason.is_failure:
                self._denied[topic] = printable(f"{self._broker.url} refuses the topic {topic}: {reason}")
                self._told(self._denied[topic])

    def _gone(self, client: "Client", data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if self._stopped or not reason.is_failure:
            return
        why = getattr(properties, "ReasonString", "") if properties is not None else ""
        said = f"{reason}{f' ({why})' if why else ''}"
        if self._let_in:
            self._let_in, self._last_end = False, said
            self.ended += 1
            self._ends.append(time.monotonic())
            self._unreached = f"the connection to {self._broker.url} was lost: {said}"
        elif not self._answered:
            self._unreached = f"{self._broker.url} ended the connection before the login: {said}"

    def _came(self, client: "Client", data: Any, message: Any) -> None:
        """Receive a message. It is acknowledged once it is kept, or once it is certain that it can never be kept."""
        if not any(self._matches(_filter_of(topic), message.topic) for topic in self._broker.topics):
            client.ack(message.mid, message.qos)  # from a topic to which only an earlier start subscribed
            return
        mark = sha256(message.payload).digest()
        try:
            if message.retain and self._last_of(message.topic) == mark:
                client.ack(message.mid, message.qos)  # a retained message, which comes again with each connection
                return
            bad = self._take(message, mark)
        except BadReading as error:
            bad = str(error)
        except ExperimentError as error:  # a full disk, for example: the message comes again later
            self._unkept = str(error)
            client.disconnect()
            return
        self._unkept = ""
        self.messages += 1
        if bad:
            self.refused += 1
            self._told(printable(f"{message.topic}: refused, {bad}"))
        client.ack(message.mid, message.qos)

    def _take(self, message: Any, mark: bytes) -> str:
        """Keep a message's readings, and record it as the last one of its topic. Return a description of refused readings."""
        now, topic = time.time(), _key_of(message.topic)

        def remember(database: Connection) -> None:
            database.execute("INSERT OR REPLACE INTO topics (topic, mark, at) VALUES (?, ?, ?)", (topic, mark, now))
            database.execute(
                "DELETE FROM topics WHERE topic IN (SELECT topic FROM topics ORDER BY at DESC LIMIT -1 OFFSET ?)",
                (MOST_TOPICS,),
            )

        try:
            raws = _readings_of(message)
        except BadReading as bad:
            self._intake.take([], beside=remember)
            return str(bad)
        taken = self._intake.take(raws, beside=remember)
        return "; ".join(f"reading {number}: {why}" for number, why in list(taken.refused.items())[:3])

    def _last_of(self, topic: str) -> bytes | None:
        """Read the mark of the last message of a topic."""
        with self._intake.readings.transaction() as database:
            row = database.execute("SELECT mark FROM topics WHERE topic = ?", (_key_of(topic),)).fetchone()
        return None if row is None else row[0]


def _once() -> Any:
    """Return subscription options: the broker sends retained messages once per subscription, not at every new connection."""
    from paho.mqtt.subscribeoptions import SubscribeOptions

    return SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB)


def _key_of(topic: str) -> bytes:
    """Return a topic in the form in which it is stored, even if it is not valid text."""
    return topic.encode("utf-8", "surrogatepass")


def _readings_of(message: Any) -> list[Raw | BadReading]:
    """Return the readings of a message, each with its topic; a bare value becomes a reading with a `value`."""
    payload: bytes = message.payload
    if len(payload) > MOST_TEXT:
        raise BadReading(f"it has {over(len(payload), MOST_TEXT)} are read")
    if payload.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        found = read_json(payload)
        return [{"topic": message.topic, **each} if isinstance(each, dict) else each for each in found]
    return [{"topic": message.topic, "value": _bare(payload)}]


def _bare(payload: bytes) -> Any:
    """Read a number, a truth value or a text; sensors with only one value send such messages."""
    try:
        text = payload.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadReading("it is neither JSON nor text in UTF-8") from error
    if not text or len(payload) > LONGEST_VALUE:
        raise BadReading(
            f"it is neither a JSON object nor a bare value of 1 to {LONGEST_VALUE} bytes: it has {len(payload):,} bytes"
        )
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text
    return value


def _no_constant(word: str) -> Any:
    raise BadReading(f"it is {word}, which is not a JSON value: send a finite number or null")


def _filter_of(topic: str) -> str:
    """Return a topic filter without the prefix of a shared subscription, $share/GROUP/."""
    return topic.split("/", 2)[-1] if topic.startswith("$share/") else topic


def _tls_of(broker: Broker) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=broker.authority)
        if broker.certificate is not None and broker.key is not None:
            read_private(Path(broker.key))
            context.load_cert_chain(broker.certificate, broker.key)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(each) for each in (broker.authority, broker.certificate, broker.key) if each is not None)
        raise ExperimentError(f"the certificates for {broker.url} cannot be read ({files}): {unread(error)}") from error
    return context
