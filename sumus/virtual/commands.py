"""The command `sumus worker`, for the owner of a worker."""

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sumus.errors import ExperimentError, UsageError
from sumus.terminal import echo
from sumus.transport.hosts import listen_address
from sumus.userfile import load, named, split

if TYPE_CHECKING:
    from sumus.virtual.policy import Policy

VARIABLE = "SUMUS_WORKER_TOKEN"
"""The variable of the environment that may hold the token."""


def worker(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py[:NAME]",
            help="A file with a dict `tensors` (or NAME) of tensors by name, and perhaps a `policy`.",
        ),
    ],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address to listen on; port 0 for any free port.")
    ] = "127.0.0.1:0",
    token_file: Annotated[
        str | None,
        typer.Option(
            help=f"File with the token, created if missing; - for standard input. Without this option, {VARIABLE} holds it."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The worker's name, for its callers; by default NAME, or the file's name.")
    ] = None,
    tls: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="CERT KEY", help="Files of the certificate chain and its key, PEM."),
    ] = None,
    host_name: Annotated[
        list[str] | None, typer.Option(help="Host name or address that callers use; may be given several times.")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="Serve without TLS, even if other machines can connect.")] = False,
) -> None:
    """Let callers compute with the tensors of a file, under its policy, until Ctrl-C."""
    from sumus.virtual.serving import serve

    host, port = listen_address(listen)
    path, part = split(file)
    token = token_of(token_file, os.environ)
    tensors, policy = load_tensors(file)
    serve(
        tensors,
        policy,
        token=token,
        name=name or part or Path(path).stem,
        host=host,
        port=port,
        tls=tls,
        names=host_name or (),
        insecure=insecure,
    )


def load_tensors(file: str) -> tuple[Mapping[str, Any], "Policy"]:
    """Load an owner's file: its `tensors` (or the name after the colon), and its `policy` if it has one."""
    from sumus.virtual.policy import Policy

    module, name = load(file)
    tensors, policy = named(file, module, name or "tensors"), named(file, module, "policy")
    if not isinstance(tensors, Mapping):
        raise ExperimentError(
            f'{file} defines no `{name or "tensors"}`: add `{name or "tensors"} = {{"inputs": inputs, …}}` with the tensors '
            "that this worker offers"
        )
    if policy is not None and not isinstance(policy, Policy):
        raise ExperimentError(f"`policy` in {file} is a {type(policy).__name__}, not a sumus.virtual.Policy")
    return tensors, policy or Policy()


def token_of(file: str | None, environment: Mapping[str, str]) -> str:
    """Read the token from a file, standard input or the environment. A missing file is created, with a new token."""
    from sumus.storage.files import write_whole
    from sumus.virtual.remote import read_token

    if file is None:
        if not environment.get(VARIABLE):
            raise UsageError(
                f"the worker needs a token for its callers: give --token-file FILE (created if missing), or set {VARIABLE}"
            )
        return environment[VARIABLE]
    if file == "-":
        return sys.stdin.readline().strip()
    path = Path(file)
    if not path.exists():
        write_whole(path, f"{secrets.token_urlsafe(32)}\n".encode(), private=True)
        echo(f"{path}: a new token; give it to the people who may use this worker", error=True)
    return read_token(path)
