"""Options of the commands that run a server or an edge, in groups, and their conversion to the library's values.

Each option is declared only here. The values are those of `sumus.serve`: `Storage`, `Listening`, `ServerPolicy` and `Startup`.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from sumus.errors import UsageError
from sumus.options import Tls
from sumus.terminal import echo

if TYPE_CHECKING:
    from sumus.http.listening import Listening
    from sumus.operations.policy import ServerPolicy
    from sumus.operations.progress import ServerOpened
    from sumus.operations.serve import Startup
    from sumus.operations.stores import Storage


class LogForm(StrEnum):
    """The formats of a log."""

    text = "text"
    json = "json"


class Promotion(StrEnum):
    """Whether new models are released to devices at once, or only when an operator promotes them."""

    auto = "auto"
    manual = "manual"


Data = Annotated[Path, typer.Option(help="The server's folder.")]
Database = Annotated[
    str | None,
    typer.Option(
        envvar="SUMUS_DATABASE",
        help="The database's URL, postgresql+psycopg://HOST/NAME; by default SQLite in the server's folder.",
    ),
]
Memory = Annotated[int, typer.Option(min=1, metavar="MIB", help="Memory for reports that are being received.")]


@dataclass(frozen=True)
class StorageOptions:
    """The location of a server's data."""

    data: Annotated[Path, typer.Option(help="Folder for all of the server's data.")]
    database: Database = None
    keys: Annotated[
        Path | None, typer.Option(help="Folder for the key ring, preferably on another volume than --data.")
    ] = None
    blobs: Annotated[
        str | None, typer.Option(help="Folder or s3://BUCKET/PREFIX for models and sealed (encrypted) sums.")
    ] = None

    def storage(self) -> "Storage":
        """Return these options as a `Storage`."""
        from sumus.operations.stores import Storage

        return Storage(self.data, without_secret(self.database), self.keys, self.blobs)


@dataclass(frozen=True)
class ListenOptions:
    """The addresses at which a server answers its devices and its operator."""

    host: Annotated[str, typer.Option(help="Address for devices; 0.0.0.0 for all addresses of this machine.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for devices, 0 for any free one.")] = 8080
    admin_host: Annotated[str, typer.Option(help="Address for the admin and for /metrics.")] = "127.0.0.1"
    admin_port: Annotated[int, typer.Option(min=0, max=65535, help="Port for the admin, 0 for any free one.")] = 8081
    tls: Tls = None
    name: Annotated[
        list[str] | None,
        typer.Option(help="Host name or address that devices or the admin use; may be given several times."),
    ] = None
    url: Annotated[str | None, typer.Option(help="The server's URL for devices, if it is behind a proxy.")] = None
    proxies: Annotated[
        str,
        typer.Option(
            help="Addresses and networks of your proxies, separated by commas; the client addresses that they send are trusted."
        ),
    ] = ""
    insecure: Annotated[bool, typer.Option(help="Allow access from other machines without TLS.")] = False

    def listening(self) -> "Listening":
        """Return these options as a `Listening`."""
        from sumus.http.listening import Listening

        return Listening(
            self.host,
            self.port,
            self.admin_host,
            self.admin_port,
            self.tls or (),
            self.name or (),
            self.url,
            self.proxies,
            self.insecure,
        )


@dataclass(frozen=True)
class PolicyOptions:
    """The rules by which a server runs its tasks."""

    population: Annotated[str, typer.Option(help="The population's name.")] = "default"
    quota: Annotated[int, typer.Option(min=1, help="Maximum number of enrolled devices.")] = 1_000_000
    memory: Memory = 256
    evaluate: Annotated[
        int | None, typer.Option(min=1, help="Let this many devices measure (evaluate) each model; by default none do.")
    ] = None
    every: Annotated[int, typer.Option(min=1, help="Measure every Nth version.")] = 1
    promote: Annotated[Promotion, typer.Option(help="Whether a new model is released at once.")] = Promotion.auto
    priority: Annotated[
        list[str] | None, typer.Option(metavar="TASK=N", help="Tasks with a higher number get devices first.")
    ] = None
    warm_start: Annotated[
        bool, typer.Option(help="If leaves or data have changed, begin with the parts of the old model that fit.")
    ] = False
    spool: Annotated[
        bool,
        typer.Option(
            help="Serve plans that need each update separately; updates are kept encrypted on the disk until their round is over."
        ),
    ] = False

    def policy(self, tasks: Collection[str]) -> "ServerPolicy":
        """Return these options as a `ServerPolicy`.

        Args:
            tasks: The names of the tasks that are served.

        Raises:
            UsageError: A priority is given to a task that is not served.
        """
        from sumus.operations.policy import ServerPolicy
        from sumus.server.evaluation import Evaluating

        priority = priorities_of(self.priority or [])
        if unknown := priority.keys() - set(tasks):
            raise UsageError(
                f"--priority {min(unknown)}: there is no such task here; the tasks are {', '.join(sorted(tasks))}"
            )
        return ServerPolicy(
            population=self.population,
            quota=self.quota,
            evaluate=None if self.evaluate is None else Evaluating(self.evaluate, self.every),
            releases=self.promote is Promotion.auto,
            warm_start=self.warm_start,
            spool=self.spool,
            priority=priority,
            memory=self.memory * 2**20,
        )


@dataclass(frozen=True)
class LinkOptions:
    """The links that a server makes when it starts."""

    tokens: Annotated[
        int, typer.Option(min=0, help="Make this many links, each for one device, or for --uses devices.")
    ] = 0
    uses: Annotated[
        int,
        typer.Option(
            min=1, help="Number of devices that may enrol with each link of --tokens; one person may enrol all."
        ),
    ] = 1
    token_file: Annotated[
        Path | None, typer.Option(help="Write these links to a file, one per line, and do not print them.")
    ] = None
    edges: Annotated[int, typer.Option(min=0, help="Write this many links to --edge-file, each for one edge.")] = 0
    edge_file: Annotated[Path | None, typer.Option(help="File for these links, one per line.")] = None

    def check(self) -> None:
        """Refuse links for edges without a file for them, and a file without such links.

        Raises:
            UsageError: One of the two options is given without the other.
        """
        if bool(self.edges) != (self.edge_file is not None):
            raise UsageError(
                "give both --edges N and --edge-file FILE, or neither: links for edges are written to a file, and not printed"
            )


@dataclass(frozen=True)
class OutputOptions:
    """The output of a server."""

    log: Annotated[LogForm, typer.Option(help="Format of the log on standard error.")] = LogForm.text
    quiet: Annotated[bool, typer.Option(help="Do not print a line for each model.")] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object when the server is ready, and nothing else.")
    ] = False

    def begin_log(self) -> None:
        """Write the log to standard error from now on."""
        from sumus.logs import log_to

        log_to(sys.stderr, self.log.value)

    @property
    def say(self) -> Callable[[str], None] | None:
        """The function that prints a line of progress; None if progress is not wanted."""
        return None if self.quiet or self.as_json else echo

    def startup(self, links: LinkOptions, rounds: int | None = None) -> "Startup":
        """Return these options as a `Startup`.

        Args:
            links: The links that the server makes.
            rounds: The number of models after which the server stops; None for never.
        """
        from sumus.operations.serve import Startup

        return Startup(
            links.tokens,
            links.uses,
            links.token_file,
            rounds,
            links.edges,
            links.edge_file,
            self.say,
            self._show,
        )

    def _show(self, opened: "ServerOpened") -> None:
        """Print how to connect to the server."""
        echo(*([json.dumps(dataclasses.asdict(opened))] if self.as_json else opened.shown()))


def without_secret(database: str | None) -> str | None:
    """Return a database's URL, unless it contains a secret.

    Raises:
        UsageError: The URL in the command contains a password, which others on the machine could read; or the text is not a URL.
    """
    try:
        parts = urlsplit(database or "")
    except ValueError as error:
        raise UsageError(f"--database is not a URL ({error}): write postgresql+psycopg://HOST/NAME") from error
    told = database != os.environ.get("SUMUS_DATABASE")
    if told and (parts.password or "password=" in parts.query):
        raise UsageError(
            "the command contains the database's password, which others can read: give it in PGPASSWORD or a .pgpass file, or "
            "the whole URL in SUMUS_DATABASE"
        )
    return database


def priorities_of(words: list[str]) -> dict[str, int]:
    """Read priorities from words such as `health=2`, by task.

    Raises:
        UsageError: A word does not have this form.
    """
    found: dict[str, int] = {}
    for word in words:
        name, _, number = word.rpartition("=")
        try:
            found[name] = int(number)
        except ValueError:
            raise UsageError(f"--priority {word!r}: write TASK=N, where N is a whole number") from None
    return found
