"""The command line of a node."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sumus.device.commands import Authority, Lines, floor_of
from sumus.errors import ExperimentError, UsageError
from sumus.operations.commands import Tls, WithTls
from sumus.terminal import echo
from sumus.text import many, whole_number
from sumus.userfile import load, split, task_of


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(cls=WithTls)
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
        data: Annotated[Path, typer.Option(metavar="DIR", help="Folder for all that the node keeps.")],
        url: Annotated[
            str | None, typer.Argument(metavar="[URL]", help="The server, https://HOST:PORT; a link gives it too.")
        ] = None,
        token_file: Annotated[
            str | None,
            typer.Option(help="File with a token or a link, - for standard input; else SUMUS_TOKEN may hold it."),
        ] = None,
        watch: Annotated[
            Path | None, typer.Option(metavar="FOLDER", help="Take the files that are put into a folder.")
        ] = None,
        follow: Annotated[
            bool, typer.Option(help="Leave the files there, and take each line once it is whole: for files that grow.")
        ] = False,
        time: Annotated[
            str | None, typer.Option(metavar="NAME", help="The value that is a reading's own time.")
        ] = None,
        mqtt: Annotated[
            str | None, typer.Option(metavar="URL", help="Take messages of a broker, mqtts://HOST:PORT.")
        ] = None,
        mqtt_topic: Annotated[
            list[str] | None, typer.Option(help="Of these topics; several times for several.")
        ] = None,
        mqtt_user: Annotated[str | None, typer.Option(help="As this user.")] = None,
        mqtt_password_file: Annotated[Path | None, typer.Option(help="With the password in this file.")] = None,
        mqtt_authority: Annotated[
            Path | None, typer.Option(help="Certificates, PEM, that the broker's must come from.")
        ] = None,
        mqtt_certificate: Annotated[
            Path | None, typer.Option(help="Certificate, PEM, that this node shows the broker.")
        ] = None,
        mqtt_key: Annotated[Path | None, typer.Option(help="The key of that certificate.")] = None,
        listen: Annotated[
            str,
            typer.Option(metavar="HOST:PORT", help="Where it answers: this machine alone, unless you say otherwise."),
        ] = "127.0.0.1:8070",
        access_file: Annotated[
            Path | None,
            typer.Option(
                help="File with the token of whoever may use it, made if it is not there; else SUMUS_NODE_TOKEN may hold it."
            ),
        ] = None,
        tls: Tls = None,
        tls_name: Annotated[
            list[str] | None, typer.Option(help="Host name or address of this machine; several times for several.")
        ] = None,
        keep_days: Annotated[float | None, typer.Option(help="Let go of readings after so many days.")] = None,
        keep_count: Annotated[int | None, typer.Option(min=1, help="Keep so many readings at most.")] = None,
        keep_bytes: Annotated[int, typer.Option(min=1, help="Keep so many bytes of readings at most.")] = 2**28,
        least: Annotated[int, typer.Option(min=1, help="Readings with a target before it takes part in rounds.")] = 1,
        train_when: Annotated[
            str | None,
            typer.Option(metavar="new=N", help="Train only once N readings have a target that the last round had not."),
        ] = None,
        name: Annotated[str | None, typer.Option(help="The node's name, in its messages to you.")] = None,
        always: Annotated[bool, typer.Option(help="Take charging, unmetered and idle as met.")] = False,
        floor: Annotated[
            list[str] | None,
            typer.Option(
                help="What this node consents to, as rounds=100; see sumus.Device. May be given several times."
            ),
        ] = None,
        executor: Annotated[str, typer.Option(help="auto, or one of those of simulate.")] = "auto",
        insecure: Annotated[bool, typer.Option(help="Without TLS, also where others reach it, or it reaches.")] = False,
        authority: Authority = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON objects, one a line.")] = False,
    ) -> None:
        """Keep readings as they come, train on them as a device, and answer with the last model, until Ctrl-C."""
        from sumus.device.conditions import AllConditionsMet
        from sumus.device.link import given
        from sumus.node.access import access_token
        from sumus.node.mqtt import Broker
        from sumus.node.node import Node

        of_broker = (mqtt_topic, mqtt_user, mqtt_password_file, mqtt_authority, mqtt_certificate, mqtt_key)
        if mqtt is None and any(of_broker):
            raise UsageError("of which broker? Give --mqtt mqtts://HOST:PORT too")
        broker = None
        if mqtt is not None:
            broker = Broker(
                mqtt,
                tuple(mqtt_topic or ()),
                mqtt_user,
                mqtt_password_file,
                mqtt_authority,
                insecure,
                mqtt_certificate,
                mqtt_key,
            )
        link = given(url, token_file, os.environ, insecure)
        own, consents, new = load_node(client), floor_of(floor or []), new_of(train_when)

        def say(line: str) -> None:
            echo(json.dumps({"said": line}) if as_json else line)

        def ready(node: Node) -> None:
            begun = {"url": node.url, **({"authority": str(node.authority)} if node.authority else {})}
            if as_json:
                echo(json.dumps({**begun, **dataclasses.asdict(node.status)}))
                return
            status = node.status
            say(f"answers at {node.url}" + (f", vouched for by {node.authority}" if node.authority else ""))
            say(f"{many(status.readings, 'reading')} in {data}, {status.labelled:,} with a target")

        at = f"{link.server}/#pin={link.pin}" if link.pin else link.server or None
        Node(
            at,
            own["task"],
            data,
            prepare=own["prepare"],
            label=own["label"],
            answer=own["answer"],
            token=link.token,
            held_out=own["held_out"],
            keep_days=keep_days,
            keep_count=keep_count,
            keep_bytes=keep_bytes,
            watch=watch,
            follow=follow,
            time=time,
            mqtt=broker,
            listen=listen,
            access=access_token(access_file, os.environ),
            tls=tls or (),
            names=tls_name or (),
            least=least,
            new=new,
            floor=consents,
            sensors=AllConditionsMet() if always else None,
            executor=executor,
            name=name or Path(split(client)[0]).stem,
            insecure=insecure,
            authority=authority,
            news=Lines(data, as_json),
            say=say,
        ).run(ready)
        if not as_json:
            echo("stopped; run the same again to go on", error=True)


def new_of(word: str | None) -> int:
    """When to train, in words: `new=50`."""
    if word is None:
        return 0
    name, _, value = (part.strip() for part in word.partition("="))
    number = whole_number(value)
    if name != "new" or not number:
        raise UsageError(f"--train-when {word!r}: write new=N, with a whole number of 1 or more")
    return number


_FUNCTIONS = {
    "prepare": "a function of a reading that gives (input, target), where the target is None if there is none",
    "label": "a function of a target in your words that gives it as the task takes it",
    "answer": "a function of one reading's (inputs, outputs) that gives what to answer",
}


def load_node(file: str) -> dict[str, Any]:
    """A node's file: its task; and `prepare`, `label`, `answer` and `held_out` if there are any."""
    module, name = load(file)
    found = {each: getattr(module, each, None) for each in _FUNCTIONS}
    if name is not None:
        found["prepare"] = getattr(module, name, None)
        if found["prepare"] is None:
            raise ExperimentError(f"{file} defines no {name!r}: write {name}(reading), which gives (input, target)")
    for each, what in _FUNCTIONS.items():
        if found[each] is not None and not callable(found[each]):
            called = name if each == "prepare" and name else each
            raise ExperimentError(f"`{called}` in {file} is a {type(found[each]).__name__}: write {what}")
    return {"task": task_of(file, module), "held_out": getattr(module, "held_out", None), **found}
