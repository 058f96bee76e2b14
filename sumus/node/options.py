"""Options for making a node, grouped into values.

node = Node(
    link,
    task,
    "DATA",
    schema=ReadingSchema(prepare=prepare, time="at"),
    sources=ReadingSources(watch="incoming"),
    retention=Retention(days=30),
    listen=NodeListening("0.0.0.0:8070", access=token, tls="auto", names=["pi.lan"]),
    training=NodeTraining(least=100, consent=Consent(floor=Floor(contributors=50))),
)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sumus.device.news import DeviceNews
from sumus.device.options import Consent, DeviceProfile, ServerConnection
from sumus.http.listening import Listening
from sumus.node.intake import Label, Prepare
from sumus.node.mqtt import Broker
from sumus.transport.hosts import listen_address


@dataclass(frozen=True)
class ReadingSchema:
    """The user's functions that turn a reading as it arrives into an example, and a model's output into an answer.

    Attributes:
        prepare: Maps a reading as it arrived to its input and its target (None if it has no target). By default these are the
            reading's `inputs` and `target`.
        label: Maps a target as its owner writes it to a target for the task. It is used for labels that arrive later, and for
            `target` if `prepare` is None.
        answer: Maps one reading's input and the model's output for it to an answer for people or programs, as a JSON value.
        time: The name of the value that holds the time at which a reading was made, which decides its order and its age; None
            for the time of arrival.
    """

    prepare: Prepare | None = None
    label: Label | None = None
    answer: Callable[[Any, Any], Any] | None = None
    time: str | None = None


@dataclass(frozen=True)
class ReadingSources:
    """The sources of readings, in addition to HTTP and `Node.keep`.

    Attributes:
        watch: A folder whose files contain readings; None for none.
        follow: Whether the files stay where they are, and each line is taken once it is complete.
        mqtt: A broker that sends readings; None for none.
    """

    watch: str | Path | None = None
    follow: bool = False
    mqtt: Broker | None = None


@dataclass(frozen=True)
class NodeListening:
    """The address at which a node answers over HTTP, and the requests that it accepts.

    Attributes:
        address: HOST:PORT, with port 0 for any free port. Requests from other machines are accepted only with `access`.
        access: The token that every request must carry; None accepts every request from this machine.
        tls: "auto" for a certificate that the node makes; or files of a certificate chain and its key (PEM); empty for HTTP.
        names: Host names and addresses of this machine.
        insecure: Whether other machines may reach the node without TLS.
    """

    address: str = "127.0.0.1:0"
    access: str | None = None
    tls: str | Path | Sequence[str | Path] = ()
    names: Sequence[str] = ()
    insecure: bool = False

    def listening(self) -> Listening:
        """Return the same options for one HTTP plane."""
        host, port = listen_address(self.address)
        return Listening(host, port, tls=self.tls, names=self.names, insecure=self.insecure)


@dataclass(frozen=True)
class NodeTraining:
    """The options for a node's part in rounds, as a device of its server.

    Attributes:
        token: The token for enrolment at the server, if the server's link holds none.
        held_out: Examples for evaluating models; None for the training examples.
        least: The minimum number of readings with a target that the node needs to take part in rounds.
        new: How many of these readings must be new since the last round that counted the node's report; 0 to train again on
            the same readings.
        consent: The consent of the node's owner.
        connection: The options for the connection to the server.
        profile: A description of the node as a device.
        news: Called with the device's news.
    """

    token: str | None = None
    held_out: Any = None
    least: int = 1
    new: int = 0
    consent: Consent = field(default_factory=Consent)
    connection: ServerConnection = field(default_factory=ServerConnection)
    profile: DeviceProfile = field(default_factory=lambda: DeviceProfile(name="this node"))
    news: Callable[[DeviceNews], None] | None = None
