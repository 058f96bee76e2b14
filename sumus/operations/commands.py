"""The command line of a server's operator: serve, status, admin, backup, restore, reconcile."""

import json
import os
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from rich.live import Live
from rich.table import Table

from sumus.errors import ExperimentError, UsageError
from sumus.operations.display import means, shown
from sumus.operations.options import (
    Data,
    Database,
    LinkOptions,
    ListenOptions,
    OutputOptions,
    PolicyOptions,
    StorageOptions,
    without_secret,
)
from sumus.options import TlsCommand, with_option_groups
from sumus.terminal import console, echo
from sumus.text import ago, amount, many

if TYPE_CHECKING:
    from rich.console import Group

    from sumus.operations.remote import Remote
    from sumus.wire.bundle import Bundle

_out = console()

Pack = Callable[[str, int | None], "Bundle"]
"""Makes a bundle from FILE.py[:NAME] and a seed. The caller supplies this function, since it has the simulator."""


class RunKind(StrEnum):
    """The kinds of a task's runs."""

    train = "train"
    evaluate = "evaluate"


Url = Annotated[str, typer.Argument(metavar="URL", help="The admin's address, as `sumus serve` prints it.")]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")]
Version = Annotated[int, typer.Argument(metavar="VERSION", min=0, help="A version of the task's model.")]
OfRun = Annotated[RunKind, typer.Option(help="Which of the task's two runs: training or evaluation.")]
Authority = Annotated[
    Path | None,
    typer.Option(help="Certificate (PEM) of the server's own authority, if the server runs with --tls auto."),
]
LinkFile = Annotated[Path | None, typer.Option(help="File with a login link; - reads standard input.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BlobsAt = Annotated[
    str | None, typer.Option("--blobs", help="Where models are stored, if not in the server's folder (--data).")
]

admin = typer.Typer(no_args_is_help=True, help="Look at a running server's models and devices, and change them.")


def register(app: typer.Typer, pack: Pack) -> None:
    """Add the commands."""

    @app.command(cls=TlsCommand)
    @with_option_groups
    def serve(  # pyright: ignore[reportUnusedFunction]
        what: Annotated[
            list[str],
            typer.Argument(
                metavar="FILE.py[:NAME]|PLAN.sumus …", help="A file of Python code, or a bundle that `sumus pack` made."
            ),
        ],
        storage: StorageOptions,
        listen: ListenOptions,
        policy: PolicyOptions,
        links: LinkOptions,
        output: OutputOptions,
        rounds: Annotated[int | None, typer.Option(min=1, help="Stop once every task has this many models.")] = None,
        seed: Annotated[int | None, typer.Option(help="Seed for the first model of a FILE.py.")] = None,
    ) -> None:
        """Serve tasks to real devices, until Ctrl-C."""
        from sumus.operations.serve import bundles_of, run

        links.check()
        bundles = bundles_of([pack(each, seed) if is_file_of_code(each) else each for each in what])
        rules = policy.policy(bundles)
        output.begin_log()
        run(bundles, storage.storage(), rules, listen.listening(), output.startup(links, rounds))

    for command in (status, backup, restore, reconcile):
        app.command()(command)
    for command in (
        login,
        logout,
        link,
        models,
        export,
        promote,
        rollback,
        pause,
        resume,
        cancel,
        token,
        devices,
        revoke,
    ):
        admin.command()(command)
    app.add_typer(admin, name="admin")


def is_file_of_code(what: str) -> bool:
    """Return whether an argument of `serve` is FILE.py[:NAME], rather than a bundle."""
    path = Path(what)
    return path.suffix == ".py" or (not path.is_file() and Path(what.rpartition(":")[0]).suffix == ".py")


# ── status and changes ───────────────────────────────────────────────────────────────────────────────────────────────


def status(
    url: Url,
    watch: Annotated[bool, typer.Option(help="Refresh the status every two seconds, until Ctrl-C.")] = False,
    as_json: AsJson = False,
    authority: Authority = None,
) -> None:
    """Show what a running server does, and what it waits for."""
    remote = _remote(url, authority)
    now = remote.ask("GET", "/v1/admin/status")
    if as_json:
        echo(*json.dumps(now, indent=1).split("\n"))
        return
    if not watch:
        _out.print(_readable(now))
        return
    try:
        with Live(_readable(now), console=_out, auto_refresh=False) as live:
            while True:
                time.sleep(2.0)
                live.update(_readable(remote.ask("GET", "/v1/admin/status")), refresh=True)
    except KeyboardInterrupt:
        return


def _readable(now: Any) -> "Group":
    """Format a status for a terminal.

    Raises:
        ExperimentError: The answer is not a status: it may come from another release, or not from a server.
    """
    try:
        return shown(now)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ExperimentError(
            f"the server's status cannot be read{f': it lacks {error}' if isinstance(error, KeyError) else ''}; the "
            "server may run another release of sumus: upgrade the older one, or print the status with --json"
        ) from error


def login(url: Url, link_file: LinkFile = None, authority: Authority = None) -> None:
    """Log in with the link that the server printed. Type it when asked, or give it in a file or in the variable SUMUS_LOGIN."""
    remote = _remote(url, authority, ask=False)
    remote.log_in(_secret(link_file))
    echo(f"logged in at {remote.url} for 12 hours")


def logout(url: Url, authority: Authority = None) -> None:
    """End your session."""
    _remote(url, authority, ask=False).log_out()


def link(data: Data) -> None:
    """Make a new login link, for the owner of the server's folder."""
    from sumus.server.access import CODE_S, Access, login_link

    try:
        url = (data / "admin" / "url").read_text()
    except OSError as error:
        raise ExperimentError(
            f"no server has used the folder {data}: give the folder of `sumus serve --data`"
        ) from error
    echo(login_link(url, Access(data / "admin").new_code(time.time())))
    echo(f"the link works once, for {CODE_S / 60:.0f} minutes", error=True)


def models(url: Url, task: TaskName, as_json: AsJson = False, authority: Authority = None) -> None:
    """List a task's models, with their origin, their number of reports and their metrics."""
    found = _remote(url, authority).ask("GET", f"/v1/admin/models/{_part(task)}")
    if as_json:
        echo(*json.dumps(found, indent=1).split("\n"))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("version", "from", "round", "contributors", "age", "trained", "measured on devices", ""):
        table.add_column(column, justify="right" if column in ("version", "from", "round", "contributors") else "left")
    for model in found["models"]:
        table.add_row(
            str(model["version"]),
            "-" if model["parent"] is None else str(model["parent"]),
            "-" if model["round"] is None else str(model["round"]),
            str(model["contributors"]),
            ago(model["age_s"]),
            means(model.get("train", {})),
            means(model.get("evaluate", {}).get("means", {})),
            "released" if model["version"] == found["released"] else "",
        )
    _out.print(table)


def export(
    url: Url,
    task: TaskName,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL.safetensors", help="The file to write.")],
    version: Annotated[
        int | None,
        typer.Argument(metavar="[VERSION]", min=0, help="Default: the released version."),
    ] = None,
    authority: Authority = None,
) -> None:
    """Write a version's shared leaves, under the plan's names, to a safetensors file. An existing file is not overwritten."""
    remote = _remote(url, authority)
    found = remote.ask("GET", f"/v1/admin/models/{_part(task)}")
    wanted = found["released"] if version is None else version
    row = next((model for model in found["models"] if model["version"] == wanted), None)
    path = f"/v1/admin/models/{_part(task)}/{wanted}"
    if row is None:
        remote.ask("GET", path)  # the error lists the existing versions
        raise ExperimentError(f"version {wanted} of {task} was added or deleted just now: run the same command again")
    nbytes = remote.fetch(path, row["sha256"], output)
    echo(f"{output}: version {wanted} of {task}, {amount(nbytes)}, sha256 {row['sha256']}")


def promote(url: Url, task: TaskName, version: Version, authority: Authority = None) -> None:
    """Release a version: devices then predict with it."""
    _remote(url, authority).ask("POST", f"/v1/admin/models/{_part(task)}/promote", {"version": version})
    echo(f"devices now predict with version {version} of {task}")


def rollback(url: Url, task: TaskName, version: Version, authority: Authority = None) -> None:
    """Continue training from an earlier version, which gets a new number. Work on other versions is cancelled."""
    made = _remote(url, authority).ask("POST", f"/v1/admin/models/{_part(task)}/rollback", {"version": version})[
        "version"
    ]
    echo(f"{task} continues from version {version}, which is now version {made}")


def pause(url: Url, task: TaskName, kind: OfRun = RunKind.train, authority: Authority = None) -> None:
    """Pause a task: until `resume`, no round begins and no work is given. Reports on work in progress are still counted."""
    _remote(url, authority).ask("POST", f"/v1/admin/models/{_part(task)}/pause", {"kind": kind.value})
    echo(f"{task} is paused")


def resume(url: Url, task: TaskName, kind: OfRun = RunKind.train, authority: Authority = None) -> None:
    """Resume a paused task."""
    _remote(url, authority).ask("POST", f"/v1/admin/models/{_part(task)}/resume", {"kind": kind.value})
    echo(f"{task} continues")


def cancel(url: Url, task: TaskName, kind: OfRun = RunKind.train, authority: Authority = None) -> None:
    """End the open round without a model."""
    number = _remote(url, authority).ask("POST", f"/v1/admin/models/{_part(task)}/cancel", {"kind": kind.value})[
        "round"
    ]
    echo(f"round {number} of {task} has ended, without a model")


def token(
    url: Url,
    links: Annotated[int, typer.Option(min=1, help="Make this many links.")] = 1,
    uses: Annotated[
        int,
        typer.Option(min=1, help="Number of devices that may enrol with each link; one person may enrol all of them."),
    ] = 1,
    days: Annotated[float, typer.Option(min=0.001, help="Days for which each link is valid.")] = 7.0,
    edge: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="DEVICES", help="Make links for edges. Each edge may have at most this many devices."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the links to a file, one per line, and do not print them."),
    ] = None,
    authority: Authority = None,
) -> None:
    """Make links with which devices or edges enrol."""
    from sumus.storage.files import write_whole

    speaks = {} if edge is None else {"speaks_for": edge}
    remote, asked = _remote(url, authority), {"uses": uses, "lasts_s": days * 86400} | speaks
    made = "\n".join(remote.ask("POST", "/v1/admin/tokens", asked)["link"] for _ in range(links))
    if output is None:
        echo(made)
    else:
        write_whole(output, f"{made}\n".encode(), private=True)
        echo(f"{output}: for {many(links * uses, 'edge' if edge else 'device')}")


def devices(
    url: Url,
    after: Annotated[str, typer.Option(help="Begin after this id.")] = "",
    as_json: AsJson = False,
    authority: Authority = None,
) -> None:
    """List enrolled devices, a hundred at a time."""
    found = _remote(url, authority).ask("GET", f"/v1/admin/devices?after={_part(after)}")
    if as_json:
        echo(*json.dumps(found, indent=1).split("\n"))
        return
    today = int(time.time() // 86400)
    for row in found["devices"]:
        seen = f"last seen {_day(today - row['seen'])}" if row["seen"] else ""
        echo(f"{row['id']}  {row['state']:9}  enrolled {_day(today - row['enrolled'])}  {seen}".rstrip())
    if found["after"]:
        echo(f"for more devices: --after {found['after']}", error=True)


def _day(ago: int) -> str:
    return "today" if ago <= 0 else "yesterday" if ago == 1 else f"{ago} days ago"


def revoke(
    url: Url,
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="The device's id.")],
    authority: Authority = None,
) -> None:
    """Exclude a device permanently."""
    _remote(url, authority).ask("POST", f"/v1/admin/devices/{_part(device)}/revoke")
    echo("revoked")


def _part(word: str) -> str:
    """Quote a word for use as one part of a URL's path."""
    return quote(word, safe="")


def _remote(url: str, authority: Path | None, ask: bool = True) -> "Remote":
    """Connect to a server; log in if a link is given and no session is open."""
    from sumus.operations.remote import Remote
    from sumus.server.access import Logins, config_folder

    remote = Remote(url, Logins(config_folder(os.environ)), authority)
    if ask and not remote.logged_in and ("SUMUS_LOGIN" in os.environ or sys.stdin.isatty()):
        remote.log_in(_secret(None))
    return remote


def _secret(file: Path | None) -> str:
    """Read a login link from a file, the environment, the keyboard or standard input; never from a command."""
    if file is not None and str(file) != "-":
        try:
            return file.read_text()
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    if file is None and "SUMUS_LOGIN" in os.environ:
        return os.environ["SUMUS_LOGIN"]
    if sys.stdin.isatty():
        return typer.prompt("login link", hide_input=True)
    return sys.stdin.readline()


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def backup(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the copy.")],
    database: Database = None,
    blobs: BlobsAt = None,
) -> None:
    """Copy a server's database and models, even while it runs. Keys and the sums of open rounds are not copied."""
    from sumus.operations.backup import back_up
    from sumus.operations.stores import Storage

    echo(*back_up(Storage(data, without_secret(database), None, blobs), output).shown())


def restore(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that `sumus backup` made.")],
    data: Data,
    blobs: BlobsAt = None,
) -> None:
    """Restore a backup into a server's folder, and begin a new noise epoch."""
    from sumus.operations.backup import restore as restored
    from sumus.operations.stores import Storage

    echo(*restored(folder, Storage(data, None, None, blobs)).shown())


def reconcile(data: Data, database: Database = None, blobs: BlobsAt = None) -> None:
    """Begin a new noise epoch after a database was restored: no noise that was spent counts as unspent."""
    from sumus.operations.published import reconcile as reconciled
    from sumus.operations.stores import Storage

    for task, epoch in reconciled(Storage(data, without_secret(database), None, blobs)).items():
        echo(f"{task}: epoch {epoch}")
