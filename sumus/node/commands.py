"""The command line of a node."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sumus.device.commands import ConsentOptions, Lines, ServerOptions, floor_of
from sumus.errors import ExperimentError, UsageError
from sumus.options import Tls, TlsCommand, with_option_groups
from sumus.terminal import echo
from sumus.text import many, whole_number
from sumus.userfile import load, split, task_of

if TYPE_CHECKING:
    from sumus.node.mqtt import Broker
    from sumus.node.node import Node
    from sumus.node.options import NodeListening
    from sumus.node.readings import Retention


@dataclass(frozen=True)
class FolderOptions:
    """A folder whose files contain readings."""

    watch: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Read the files in this folder, and move them to its folder done/."),
    ] = None
    follow: Annotated[
        bool, typer.Option(help="Leave the files in the folder, and read each line as soon as it is complete.")
    ] = False
    time: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the value that holds a reading's time.")] = (
        None
    )


@dataclass(frozen=True)
class BrokerOptions:
    """A broker whose messages contain readings."""

    mqtt: Annotated[
        str | None, typer.Option(metavar="URL", help="Receive messages from a broker, mqtts://HOST:PORT.")
    ] = None
    mqtt_topic: Annotated[list[str] | None, typer.Option(help="Topic to subscribe to; may be given several times.")] = (
        None
    )
    mqtt_user: Annotated[str | None, typer.Option(help="User name at the broker.")] = None
    mqtt_password_file: Annotated[Path | None, typer.Option(help="File with the password.")] = None
    mqtt_authority: Annotated[
        Path | None,
        typer.Option(help="File of CA certificates (PEM), if a private authority issued the broker's certificate."),
    ] = None
    mqtt_certificate: Annotated[
        Path | None, typer.Option(help="Certificate (PEM) that the node shows to the broker.")
    ] = None
    mqtt_key: Annotated[Path | None, typer.Option(help="File with the key of that certificate.")] = None

    def broker(self, insecure: bool) -> "Broker | None":
        """Return these options as a `Broker`; None if --mqtt is not given.

        Args:
            insecure: Whether the broker may be reached without TLS.

        Raises:
            UsageError: An option for the broker is given, but --mqtt is not.
        """
        from sumus.node.mqtt import Broker

        of_broker = (
            self.mqtt_topic,
            self.mqtt_user,
            self.mqtt_password_file,
            self.mqtt_authority,
            self.mqtt_certificate,
            self.mqtt_key,
        )
        if self.mqtt is None:
            if any(of_broker):
                raise UsageError("the other options --mqtt-... need a broker: give --mqtt mqtts://HOST:PORT too")
            return None
        return Broker(
            self.mqtt,
            tuple(self.mqtt_topic or ()),
            self.mqtt_user,
            self.mqtt_password_file,
            self.mqtt_authority,
            insecure,
            self.mqtt_certificate,
            self.mqtt_key,
        )


@dataclass(frozen=True)
class NodeListenOptions:
    """The address at which a node answers, and the requests that it accepts."""

    listen: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Address for HTTP; by default, only this machine can reach it."),
    ] = "127.0.0.1:8070"
    access_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the token that clients must send; made if it does not exist. Or set SUMUS_NODE_TOKEN."
        ),
    ] = None
    tls: Tls = None
    tls_name: Annotated[
        list[str] | None, typer.Option(help="Host name or address of this machine; may be given several times.")
    ] = None
    insecure: Annotated[bool, typer.Option(help="Allow connections with other machines without TLS.")] = False

    def listening(self) -> "NodeListening":
        """Return these options as a `NodeListening`."""
        from sumus.node.access import access_token
        from sumus.node.options import NodeListening

        access = access_token(self.access_file, os.environ)
        return NodeListening(self.listen, access, self.tls or (), self.tls_name or (), self.insecure)


@dataclass(frozen=True)
class RetentionOptions:
    """The limits on the readings that a node stores."""

    keep_days: Annotated[float | None, typer.Option(help="Delete readings after this many days.")] = None
    keep_count: Annotated[int | None, typer.Option(min=1, help="Keep at most this many readings.")] = None
    keep_bytes: Annotated[int, typer.Option(min=1, help="Keep at most this many bytes of readings.")] = 2**28

    def retention(self) -> "Retention":
        """Return these options as a `Retention`."""
        from sumus.node.readings import Retention

        return Retention(self.keep_days, self.keep_count, self.keep_bytes)


@dataclass(frozen=True)
class TrainingOptions:
    """The conditions under which a node takes part in rounds."""

    least: Annotated[
        int,
        typer.Option(
            min=1, help="Number of readings with a target that the node needs before it takes part in rounds."
        ),
    ] = 1
    train_when: Annotated[
        str | None,
        typer.Option(
            metavar="new=N", help="Train only once N readings have a target that is new since the last round."
        ),
    ] = None
    name: Annotated[str | None, typer.Option(help="The node's name, in its messages to you.")] = None
    executor: Annotated[str, typer.Option(help="auto, or an executor of `sumus simulate`.")] = "auto"


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(cls=TlsCommand)
    @with_option_groups
    def node(  # pyright: ignore[reportUnusedFunction]
        client: Annotated[
            str,
            typer.Option(
                "--client",
                metavar="FILE.py",
                help="A file that defines `task` (or `plan`), and perhaps `prepare(reading)`, `label(value)` and "
                "`answer(inputs, outputs)`.",
            ),
        ],
        data: Annotated[Path, typer.Option(metavar="DIR", help="Folder for all of the node's data.")],
        server: ServerOptions,
        folder: FolderOptions,
        broker: BrokerOptions,
        listen: NodeListenOptions,
        retention: RetentionOptions,
        training: TrainingOptions,
        consent: ConsentOptions,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON objects, one per line.")] = False,
    ) -> None:
        """Store incoming readings, train on them as a device, and predict with the newest model, until Ctrl-C."""
        from sumus.device.conditions import AllConditionsMet
        from sumus.device.link import given
        from sumus.device.options import Consent, DeviceProfile, ServerConnection
        from sumus.node.node import Node
        from sumus.node.options import NodeTraining, ReadingSchema, ReadingSources

        sources = ReadingSources(folder.watch, folder.follow, broker.broker(listen.insecure))
        link = given(server.url, server.token_file, os.environ, listen.insecure)
        own, floor, new = load_node(client), floor_of(consent.floor or []), new_of(training.train_when)

        def say(line: str) -> None:
            echo(json.dumps({"said": line}) if as_json else line)

        Node(
            f"{link.server}/#pin={link.pin}" if link.pin else link.server or None,
            own["task"],
            data,
            schema=ReadingSchema(own["prepare"], own["label"], own["answer"], folder.time),
            sources=sources,
            retention=retention.retention(),
            listen=listen.listening(),
            training=NodeTraining(
                token=link.token,
                held_out=own["held_out"],
                least=training.least,
                new=new,
                consent=Consent(floor),
                connection=ServerConnection(insecure=listen.insecure, authority=server.authority),
                profile=DeviceProfile(
                    name=training.name or Path(split(client)[0]).stem,
                    sensors=AllConditionsMet() if consent.always else None,
                    executor=training.executor,
                ),
                news=Lines(data, as_json),
            ),
            say=say,
        ).run(lambda begun: say_ready(begun, data, as_json))
        if not as_json:
            echo("stopped; run the same command again to continue", error=True)


def say_ready(node: "Node", data: Path, as_json: bool) -> None:
    """Print the node's addresses, and the number of its readings.

    Args:
        node: The node.
        data: The node's folder.
        as_json: Whether to print one JSON object.
    """
    status, vouched = node.status, node.authority
    if as_json:
        begun = {"url": node.url, **({"authority": str(vouched)} if vouched else {})}
        parts = {name: value for name, value in dataclasses.asdict(status).items() if name != "readings"}
        readings = dataclasses.asdict(status.readings)
        echo(json.dumps({**begun, "readings": readings.pop("kept"), **readings, **parts}))
        return
    echo(f"answers at {node.url}" + (f", vouched for by {vouched}" if vouched else ""))
    echo(f"{many(status.readings.kept, 'reading')} in {data}, {status.readings.labelled:,} with a target")


def new_of(word: str | None) -> int:
    """Read the value of a training option such as `new=50`."""
    if word is None:
        return 0
    name, _, value = (part.strip() for part in word.partition("="))
    number = whole_number(value)
    if name != "new" or not number:
        raise UsageError(f"--train-when {word!r}: write new=N, where N is a whole number of at least 1")
    return number


_FUNCTIONS = {
    "prepare": "a function that takes a reading and returns (input, target); a missing target is None",
    "label": "a function that takes a target as you write it, and returns it in the task's form",
    "answer": "a function that takes one reading's (inputs, outputs) and returns the answer",
}


def load_node(file: str) -> dict[str, Any]:
    """Load a node's file: its task, and, if present, `prepare`, `label`, `answer` and `held_out`."""
    module, name = load(file)
    found = {each: getattr(module, each, None) for each in _FUNCTIONS}
    if name is not None:
        found["prepare"] = getattr(module, name, None)
        if found["prepare"] is None:
            raise ExperimentError(f"{file} defines no {name!r}: write {name}(reading), which returns (input, target)")
    for each, what in _FUNCTIONS.items():
        if found[each] is not None and not callable(found[each]):
            called = name if each == "prepare" and name else each
            raise ExperimentError(f"`{called}` in {file} is a {type(found[each]).__name__}: write {what}")
    return {"task": task_of(file, module), "held_out": getattr(module, "held_out", None), **found}
