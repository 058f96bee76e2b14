"""The command line of a device: join, predict, forget."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import numpy as np
import typer

from sumus.errors import ExperimentError, Interrupted, UsageError, unread
from sumus.options import with_option_groups
from sumus.protocol.session import Floor
from sumus.storage.files import user_folder
from sumus.terminal import echo
from sumus.text import many
from sumus.userfile import Client, load_client, split

if TYPE_CHECKING:
    from sumus.device.news import DeviceNews

ClientFile = Annotated[
    str,
    typer.Option(
        "--client", metavar="FILE.py[:NAME]", help="A file that defines `task` (or `plan`) and `examples` (or NAME)."
    ),
]
Folder = Annotated[Path | None, typer.Option(help="The device's folder; by default the one that `join` uses.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON objects, one per line.")]
Authority = Annotated[
    Path | None,
    typer.Option(
        help="File of CA certificates (PEM), if the server's certificate comes from a private authority.",
        metavar="FILE",
    ),
]


def secret_file(content: str, source: str = "") -> Any:
    """Declare an option for a file with the token or the link by which a device or an edge enrols at a server.

    Args:
        content: The content of the file.
        source: A sentence about where the operator gets the content.
    """
    text = f"File with {content}, or - for standard input. Without it, SUMUS_TOKEN is used."
    return typer.Option(help=f"{text} {source}".rstrip())


@dataclass(frozen=True)
class ServerOptions:
    """The server that a device or a node uses."""

    url: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL]", help="The server's URL, https://HOST:PORT; not needed if --token-file holds a link."
        ),
    ] = None
    token_file: Annotated[str | None, secret_file("a token or a link")] = None
    authority: Authority = None


@dataclass(frozen=True)
class WorkOptions:
    """The work that a device accepts, and when it stops."""

    rounds: Annotated[int | None, typer.Option(min=1, help="End after this many counted reports.")] = None
    once: Annotated[bool, typer.Option(help="Check in once, do the work that the server gives, and end.")] = False
    evaluate_only: Annotated[bool, typer.Option(help="Evaluate models, and never train.")] = False
    train_only: Annotated[bool, typer.Option(help="Train, and never evaluate models.")] = False
    executor: Annotated[str, typer.Option(help="auto, or an executor of `sumus simulate`.")] = "auto"


@dataclass(frozen=True)
class ConsentOptions:
    """The owner's consent, for a device or a node."""

    always: Annotated[bool, typer.Option(help="Treat the conditions charging, unmetered and idle as met.")] = False
    floor: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit that the owner consents to, such as rounds=100; see sumus.Floor. May be given several times."
        ),
    ] = None


@with_option_groups
def join(
    client: ClientFile,
    server: ServerOptions,
    work: WorkOptions,
    consent: ConsentOptions,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for the device's key and memory; by default in this user's data folder.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The device's name, in its messages to you.")] = None,
    insecure: Annotated[bool, typer.Option(help="Allow http:// to another machine.")] = False,
    move: Annotated[
        bool,
        typer.Option(help="Move to the edge that the link names, of the same population. The device keeps its key."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take part in a server's rounds with the examples of a file, until Ctrl-C."""
    from sumus.device.conditions import AllConditionsMet
    from sumus.device.device import Device
    from sumus.device.link import given
    from sumus.device.options import Consent, DeviceProfile, ServerConnection
    from sumus.transport.transport import Unreachable

    link = given(server.url, server.token_file, os.environ, insecure)
    consents, own, where = floor_of(consent.floor or []), load_client(client), folder or folder_of(client)
    device = Device(
        f"{link.server}/#pin={link.pin}" if link.pin else link.server or None,
        own.task,
        own.examples,
        folder=where,
        token=link.token,
        held_out=own.held_out,
        consent=Consent(consents, trains=not work.evaluate_only, evaluates=not work.train_only),
        connection=ServerConnection(insecure=insecure, moves=move, authority=server.authority),
        profile=DeviceProfile(
            name=name or Path(split(client)[0]).stem,
            sensors=AllConditionsMet() if consent.always else None,
            executor=work.executor,
        ),
        watch=Lines(where, as_json),
    )
    with device:
        if not as_json and device.status.server:
            echo(
                f"asks {device.status.server} for work; press Ctrl-C to stop, and run the same command to continue",
                error=True,
            )
        before = device.status.checkins
        try:
            device.run(
                work.rounds, (lambda status: status.checkins > before or status.unanswered > 0) if work.once else None
            )
        except KeyboardInterrupt:
            done = device.status.counts.get("counted", 0)
            raise Interrupted(
                f"stopped; {many(done, 'report')} counted so far; run the same command again to continue"
            ) from None
        if work.once and device.status.unanswered:
            raise Unreachable(f"the check-in failed: {device.status.trouble}; run the same command again later")


def predict(
    client: ClientFile,
    folder: Folder = None,
    inputs: Annotated[Path | None, typer.Option(help="Inputs (.npy); by default the examples of the file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the outputs to a file (.npy).")] = None,
    task: Annotated[str | None, typer.Option(help="The task whose model predicts, if the server has several.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict with the newest model that the device has. No network is needed."""
    from sumus.device.device import Device
    from sumus.device.store import FolderDeviceStore

    store, own = FolderDeviceStore(folder or folder_of(client), look=True), load_client(client)
    device = Device(None, own.task, own.examples, folder=store)
    found = device.prediction(_inputs(own) if inputs is None else _read(inputs), task)
    outputs, of = found.outputs, f"version {found.version} of {found.task}"
    if output is not None:
        try:
            with output.open("wb") as file:
                np.save(file, outputs)
        except OSError as error:
            raise ExperimentError(f"{output} cannot be written: {error.strerror or error}") from error
        echo(f"{output}: outputs of shape {list(outputs.shape)} from {of}")
    elif as_json:
        echo(json.dumps({"task": found.task, "version": found.version, "outputs": outputs.tolist()}))
    else:
        echo(f"outputs from {of}", error=True)
        for row in outputs:
            echo(" ".join(f"{value:g}" for value in np.ravel(row)))


def forget(
    client: Annotated[
        str | None,
        typer.Option("--client", metavar="FILE.py", help="The file that was given to `join`; it is not run."),
    ] = None,
    folder: Folder = None,
) -> None:
    """Withdraw the owner's consent: the server forgets the device, and the device's data are erased."""
    from sumus.device.requests import Requests
    from sumus.device.store import FolderDeviceStore
    from sumus.device.withdrawal import forget as forgotten
    from sumus.transport.http import HttpTransport

    if folder is None and client is None:
        raise UsageError(
            "no device is named: give --client FILE.py as for `sumus join`, or --folder DIR, which `sumus join` printed"
        )
    where = folder or folder_of(client or "")
    FolderDeviceStore(where, look=True)  # raises, and changes nothing, unless the folder is a device's
    with closing(FolderDeviceStore(where)) as store:
        record, key = store.read(), store.key()
        requests = None
        if record.membership is not None and key is not None:
            transport = HttpTransport(record.membership.server, record.authority or None)
            requests = Requests(transport, key, record.membership.population)
        done = forgotten(store, requests)
    for word, said in (("erased", done.erased), ("remains", done.remains)):
        for line in said:
            echo(f"{word:8} {line}")


def floor_of(words: list[str]) -> Floor:
    """Make a floor from words such as `rounds=100`."""
    given: dict[str, Any] = {}
    known = get_type_hints(Floor)
    for word in words:
        name, _, value = (part.strip() for part in word.partition("="))
        try:
            given[name] = known[name](value)
        except (KeyError, ValueError):
            raise ExperimentError(
                f"--floor {word!r}: write NAME=NUMBER, where NAME is one of {', '.join(known)}"
            ) from None
    return Floor(**given)


def folder_of(client: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the default folder for a device of this user.

    Its name combines the file's name and a hash of the file's path and the NAME in it, so that each client has a device
    of its own.
    """
    base = user_folder("XDG_DATA_HOME", ".local/share", "give the device's folder, --folder DIR", environment)
    text, name = split(client)
    file = Path(text).resolve()
    of = os.fsencode(file) + (f":{name}".encode() if name else b"")
    stem = f"{file.stem}-{name}" if name else file.stem
    return base / "sumus" / f"{stem}-{hashlib.sha256(of).hexdigest()[:8]}"


def _inputs(own: Client) -> Any:
    """Return the inputs of the examples that a file defines, in their stored form."""
    from sumus.device.compute import loaded
    from sumus.training.examples import as_pair

    return as_pair("this device", loaded("this device", own.examples if own.held_out is None else own.held_out))[0]


def _read(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except OSError as error:
        raise ExperimentError(f"--inputs {path} cannot be read: {unread(error)}") from error
    except ValueError as error:
        raise ExperimentError(
            f"--inputs {path} is not an .npy file of numbers, or contains Python objects: write it with numpy.save"
        ) from error


class Lines:
    """Prints a device's news: a line for each report that was counted or discarded, and for each other event of interest."""

    def __init__(self, folder: Path, as_json: bool) -> None:
        self._folder, self._as_json = folder, as_json
        self._done: DeviceNews | None = None
        self._last = ("", "")

    def __call__(self, news: "DeviceNews") -> None:
        if self._as_json:
            if news.what != "training":
                said = {field.name: getattr(news, field.name) for field in dataclasses.fields(news)}
                said["folder"] = str(self._folder) if news.what == "enrolled" else ""
                echo(json.dumps({name: value for name, value in said.items() if value not in ("", -1, {})}))
            return
        if news.what in ("trained", "evaluated"):
            self._done = news
        elif news.what in ("counted", "discarded"):
            echo(f"{_work_of(self._done or news)}: {'counted' if news.what == 'counted' else 'not counted'}")
            self._done = None
        elif news.what == "enrolled":
            echo(f"{news.said}; kept in {self._folder}")
        elif news.what in ("aborted", "trouble", "waiting") and news.said and (news.what, news.said) != self._last:
            echo(f"{_AS[news.what]}: {news.said}{_again(news.again_s)}", error=True)
            self._last = (news.what, news.said)


_AS = {"aborted": "gave up", "trouble": "trouble", "waiting": "waits"}


def _again(seconds: float, now: Callable[[], datetime] = datetime.now) -> str:
    """Describe when the device checks in again: in seconds, or as a time of day."""
    if seconds <= 0:
        return ""
    if seconds < 120:
        return f"; asks again within {math.ceil(seconds)} s"
    at, today = now() + timedelta(seconds=seconds), now().date()
    return f"; asks again by {at:%H:%M}" + ("" if at.date() == today else f" on {at:%Y-%m-%d}")


def _work_of(news: "DeviceNews") -> str:
    if not news.examples:  # the work was done by an earlier process
        return f"model {news.version}, {news.task}"
    verb = "trained" if news.what == "trained" else "evaluated"
    measured = ", ".join(f"{name} {value:.4f}" for name, value in news.measured.items())
    return f"model {news.version}, {news.task}: {verb} on {many(news.examples, 'example')} in {news.seconds:.1f} s, {measured}"
