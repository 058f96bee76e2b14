"""The command line of the demos: demo."""

import importlib
import json
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, cast

import typer

from sumus.simulator.commands import (
    ERR,
    OUT,
    AsJson,
    Device,
    How,
    Out,
    Rounds,
    Seed,
    Workers,
    run_and_show,
    workers_of,
)
from sumus.terminal import echo


class Demo(StrEnum):
    """The demos, with data sets that are part of Python packages."""

    health = "health"
    keyboard = "keyboard"
    digits = "digits"


def demo(
    name: Demo,
    rounds: Rounds = None,
    seed: Seed = None,
    out: Out = None,
    as_json: AsJson = False,
    device: Device = "cpu",
    executor: How = "auto",
    workers: Workers = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Play health's people in the simulator, without a server.")
    ] = False,
) -> None:
    """Train on real data that comes inside packages, person by person.

    health: exercises from a watch; ten people, each a device of a server on this machine, or --simulate. keyboard: the next word,
    one author a client, simulated. digits: images by label, simulated.
    """
    from sumus.simulator.options import Compute, Output

    module = importlib.import_module(f"sumus.demos.{name}")
    OUT.print(f"{name}: {cast(str, module.__doc__).splitlines()[0]}", soft_wrap=True)
    folder = out or Path("runs") / f"demo-{name}"
    if name is Demo.health and not simulate:
        _play(module, folder, rounds, as_json)
        return
    run_and_show(
        module.experiment(),
        name,
        rounds,
        seed,
        as_json,
        Compute(executor, device, workers_of(workers)),
        Output(folder, restart=out is None),
    )


def _play(module: ModuleType, folder: Path, rounds: int | None, as_json: bool) -> None:
    """Run a demo with a server and devices on this machine."""
    from sumus.demos.display import show

    name = module.__name__.rpartition(".")[2]
    done = show(name, module.PEOPLE, folder, rounds or module.ROUNDS, module.EVERY, ERR if as_json else OUT, ERR)
    if as_json:
        last = done.models[-1]
        result = {
            "rounds": last.version,
            "metrics": done.means,
            "histograms": done.histograms,
            "model_sha256": last.model,
            "plan": last.plan,
            "seconds": done.seconds,
            "counted": done.counted,
            "out": str(folder),
        }
        echo(json.dumps(result, sort_keys=True))
