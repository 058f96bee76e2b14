"""The command line: it puts together the commands of all parts of sumus, and runs one.

A user's mistake ends in a one-line message, not in a traceback.
"""

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import sumus
from sumus.demos import commands as demo_commands
from sumus.device import commands as device_commands
from sumus.edge import commands as edge_commands
from sumus.errors import Interrupted, SumusError, UsageError, needs
from sumus.interrupt import terminate_like_ctrl_c
from sumus.node import commands as node_commands
from sumus.operations import commands as server_commands
from sumus.simulator import commands as simulator_commands
from sumus.terminal import console, echo, show_defect
from sumus.text import printable
from sumus.virtual import commands as virtual_commands


class _Commands(TyperGroup):
    """The group of all commands. If the user stops a command, a message says how to resume it, and the process exits with 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Interrupted as stop:
            sys.exit(_say(str(stop), 130))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_err = console(error=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(sumus.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated learning: devices train on data that never leaves them, and the server works with the sum of their updates."""


for command in (
    simulator_commands.simulate,
    demo_commands.demo,
    simulator_commands.check,
    simulator_commands.rehearse,
    simulator_commands.pack,
):
    app.command()(command)
server_commands.register(app, simulator_commands.packed)
edge_commands.register(app)
for command in (device_commands.join, device_commands.predict, device_commands.forget):
    app.command()(command)
app.command()(virtual_commands.worker)
node_commands.register(app)


_EXTRA_OF = {
    "serve": "server,train",
    "worker": "server,device",
    "node": "node",
    "demo": "all",
    **dict.fromkeys(("edge", "status", "admin", "backup", "restore", "reconcile"), "server"),
    **dict.fromkeys(("join", "predict", "forget"), "device"),
    **dict.fromkeys(("simulate", "check", "pack", "rehearse"), "train"),
}
"""The extras that install the imports of each command. `serve` needs no `train` for a bundle that `pack` has made."""


def main() -> None:
    """Run a command. Exit with 0; 1 for invalid data from a participant; 2 for a mistake to correct; 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the terminal may support only ASCII
    sys.excepthook = show_defect
    terminate_like_ctrl_c()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(_say("stopped before the first round; nothing was kept", 130))
    except SumusError as error:
        sys.exit(_say(str(error), 2 if isinstance(error, UsageError) else 1))
    except ModuleNotFoundError as error:
        if not (why := needs(error, _EXTRA_OF.get(next(iter(sys.argv[1:]), ""), ""))):
            raise
        sys.exit(_say(why, 2))
    except OSError as error:
        sys.exit(_say(f"{error.strerror or error}: {error.filename or 'output'}", 2))


def _say(message: str, status: int) -> int:
    """Print a message on standard error in one line, and return the exit status."""
    _err.print(printable(f"sumus: {' '.join(message.split())}"), soft_wrap=True)
    return status
