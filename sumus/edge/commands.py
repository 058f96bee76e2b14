"""The command line of an edge."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sumus.device.commands import Authority
from sumus.operations.commands import (
    AdminHost,
    AdminPort,
    CalledBy,
    EdgeFile,
    Host,
    Log,
    LogForm,
    Memory,
    Names,
    Port,
    Proxies,
    Tls,
    TokenFile,
    Tokens,
    Uses,
    WithTls,
    with_edge_file,
)
from sumus.terminal import echo


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(cls=WithTls)
    def edge(  # pyright: ignore[reportUnusedFunction]
        data: Annotated[Path, typer.Option(help="Folder for all that the edge keeps.")],
        upstream: Annotated[
            str | None, typer.Option(metavar="URL", help="The server above, https://HOST:PORT; a link gives it too.")
        ] = None,
        link_file: Annotated[
            str | None,
            typer.Option(
                help="File with the edge's token or link, - for standard input; else SUMUS_TOKEN may hold it. The server above "
                "makes one with `sumus admin token --edge`."
            ),
        ] = None,
        authority: Authority = None,
        host: Host = "127.0.0.1",
        port: Port = 8090,
        admin_host: AdminHost = "127.0.0.1",
        admin_port: AdminPort = 8091,
        tls: Tls = None,
        name: Names = None,
        url: CalledBy = None,
        proxies: Proxies = "",
        insecure: Annotated[bool, typer.Option(help="Without TLS, also where others reach it, or it reaches.")] = False,
        quota: Annotated[int, typer.Option(min=1, help="Devices that may enrol.")] = 100_000,
        memory: Memory = 64,
        linger: Annotated[
            float, typer.Option(min=0.0, help="Seconds to await more devices, once all that work have ended.")
        ] = 20.0,
        tokens: Tokens = 0,
        uses: Uses = 1,
        token_file: TokenFile = None,
        edges: Annotated[
            int,
            typer.Option(min=0, help="Make so many links, each for one edge below this one, in --edge-file."),
        ] = 0,
        edge_file: EdgeFile = None,
        log: Log = LogForm.text,
        quiet: Annotated[bool, typer.Option(help="Print no line for each sum that went up.")] = False,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print one JSON object when it answers, and nothing else.")
        ] = False,
    ) -> None:
        """Add what devices report, and send one sum to the server above, until Ctrl-C."""
        from sumus.device.link import given
        from sumus.edge.edge import open_edge
        from sumus.http.listening import Listening
        from sumus.logs import log_to
        from sumus.operations.serve import Startup, keep
        from sumus.operations.service import ServerPolicy, Storage

        with_edge_file(edges, edge_file)
        link = given(upstream, link_file, os.environ, insecure, authority)
        log_to(sys.stderr, log.value)
        say = None if quiet or as_json else echo
        conduct = ServerPolicy(quota=quota, memory=memory * 2**20)
        keep(
            lambda own: open_edge(link, Storage(data), conduct, own, linger, say=say),
            data,
            Listening(host, port, admin_host, admin_port, tls or [], name or [], url, proxies, insecure),
            Startup(
                tokens,
                uses,
                token_file,
                edges=edges,
                edge_file=edge_file,
                say=say,
                ready=lambda opened: echo(*([json.dumps(dataclasses.asdict(opened))] if as_json else opened.shown())),
            ),
        )
