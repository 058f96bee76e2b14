"""The command line of an edge."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sumus.device.commands import Authority, secret_file
from sumus.operations.options import LinkOptions, ListenOptions, Memory, OutputOptions
from sumus.options import TlsCommand, with_option_groups


@dataclass(frozen=True)
class UpstreamOptions:
    """The server above an edge."""

    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="URL of the server above, https://HOST:PORT; not needed if --link-file holds a link."
        ),
    ] = None
    link_file: Annotated[
        str | None,
        secret_file("the edge's token or link", "On the server above, `sumus admin token --edge` makes one."),
    ] = None
    authority: Authority = None


@dataclass(frozen=True)
class EdgeListenOptions(ListenOptions):
    """The addresses at which an edge answers its devices and its operator."""

    insecure: Annotated[bool, typer.Option(help="Allow connections with other machines without TLS.")] = False


@dataclass(frozen=True)
class EdgeLinkOptions(LinkOptions):
    """The links that an edge makes when it starts."""

    edges: Annotated[
        int, typer.Option(min=0, help="Write this many links to --edge-file, each for one edge below this one.")
    ] = 0


@dataclass(frozen=True)
class EdgeOutputOptions(OutputOptions):
    """The output of an edge."""

    quiet: Annotated[bool, typer.Option(help="Do not print a line for each sum that was sent.")] = False


BESIDE_A_SERVER = EdgeListenOptions(port=8090, admin_port=8091)
"""Ports that differ from those of a server, so that both can run on the same machine."""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(cls=TlsCommand)
    @with_option_groups
    def edge(  # pyright: ignore[reportUnusedFunction]
        data: Annotated[Path, typer.Option(help="Folder for all of the edge's data.")],
        above: UpstreamOptions,
        links: EdgeLinkOptions,
        output: EdgeOutputOptions,
        listen: EdgeListenOptions = BESIDE_A_SERVER,
        quota: Annotated[int, typer.Option(min=1, help="Maximum number of enrolled devices.")] = 100_000,
        memory: Memory = 64,
        linger: Annotated[
            float, typer.Option(min=0.0, help="Seconds to wait for more devices once all work has ended.")
        ] = 20.0,
    ) -> None:
        """Add the reports of devices, and send one sum for each round to the server above, until Ctrl-C."""
        from sumus.device.link import given
        from sumus.edge.edge import open_edge
        from sumus.operations.policy import ServerPolicy
        from sumus.operations.serve import keep
        from sumus.operations.stores import Storage

        links.check()
        link = given(above.upstream, above.link_file, os.environ, listen.insecure, above.authority, "--link-file")
        output.begin_log()
        policy = ServerPolicy(quota=quota, memory=memory * 2**20)
        keep(
            lambda own: open_edge(link, Storage(data), policy, own, linger, say=output.say),
            data,
            listen.listening(),
            output.startup(links),
        )
