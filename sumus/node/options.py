"""What a node is told when it is made: values of options that belong together.

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
    """How a reading in its owner's words becomes an example, and an output becomes an answer.

    Attributes:
        prepare: Makes of a reading as it came its input and its target, or None for no target. By default these are the
            reading's `inputs` and `target`.
        label: Makes of a target in its owner's words one that the task takes: of labels that come later, and of `target` if there
            is no `prepare`.
        answer: Makes of one reading's input and output what its prediction says in its owner's words, as JSON holds it.
        time: The name of the value that is a reading's own time, by which readings are ordered and grow old; None for the time at
            which a reading comes.
    """

    prepare: Prepare | None = None
    label: Label | None = None
    answer: Callable[[Any, Any], Any] | None = None
    time: str | None = None


@dataclass(frozen=True)
class ReadingSources:
    """Where readings come from, besides HTTP and `Node.keep`.

    Attributes:
        watch: A folder whose files are readings; None for none.
        follow: Whether the files stay where they are, and each line is taken once it has its end.
        mqtt: A broker that sends readings; None for none.
    """

    watch: str | Path | None = None
    follow: bool = False
    mqtt: Broker | None = None


@dataclass(frozen=True)
class NodeListening:
    """Where a node answers over HTTP, and whom it lets in.

    Attributes:
        address: HOST:PORT, port 0 for any. Other machines are let in only with `access`.
        access: The token that every request has to show; None lets in everybody on this machine.
        tls: "auto" for a certificate that is made here; or the files of a certificate's chain and of its key, PEM; else HTTP.
        names: Host names and addresses that this machine is called by.
        insecure: Whether others may reach the node without TLS.
    """

    address: str = "127.0.0.1:0"
    access: str | None = None
    tls: str | Path | Sequence[str | Path] = ()
    names: Sequence[str] = ()
    insecure: bool = False

    def listening(self) -> Listening:
        """Give the same for one plane of HTTP."""
        host, port = listen_address(self.address)
        return Listening(host, port, tls=self.tls, names=self.names, insecure=self.insecure)


@dataclass(frozen=True)
class NodeTraining:
    """How a node takes part in rounds, as a device of its server.

    Attributes:
        token: Lets the node in at the server, the first time, if the server's link holds no token.
        held_out: Examples that models are evaluated on; None for those that the node trains on.
        least: The least number of readings with a target for taking part in rounds.
        new: How many of these must be new since the last round in whose sum the node is; 0 to train on the same ones again.
        consent: What the node's owner agrees to.
        connection: How the node reaches its server.
        profile: What the node is, as a device.
        news: Is told what the device does.
    """

    token: str | None = None
    held_out: Any = None
    least: int = 1
    new: int = 0
    consent: Consent = field(default_factory=Consent)
    connection: ServerConnection = field(default_factory=ServerConnection)
    profile: DeviceProfile = field(default_factory=lambda: DeviceProfile(name="this node"))
    news: Callable[[DeviceNews], None] | None = None
