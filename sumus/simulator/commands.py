"""The command line of the simulator: simulate, check, rehearse, pack."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sumus.errors import ExperimentError, Interrupted, PlanError, SumusError
from sumus.experiment import Experiment
from sumus.options import with_option_groups
from sumus.plan import Plan
from sumus.simulator.display import check_table, progress_of_days, rehearsal_table, show_history
from sumus.terminal import console, echo
from sumus.text import amount, printable, whole_number
from sumus.userfile import experiment_or_plan, load_experiment, load_plan, split

if TYPE_CHECKING:
    from sumus.fleet import Fleet
    from sumus.simulator.options import Compute, Output
    from sumus.wire.bundle import Bundle

OUT, ERR = console(), console(error=True)
"""The consoles of standard output and standard error."""


class SimulationPath(StrEnum):
    """The path of a simulated client's report."""

    memory = "memory"
    wire = "wire"


File = Annotated[str, typer.Argument(metavar="FILE.py[:NAME]", help="A file that defines `experiment` (or NAME).")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Number of rounds, instead of the experiment's.")]
Seed = Annotated[int | None, typer.Option(help="Seed of all randomness, instead of the experiment's.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for checkpoint, model, history and plot; an interrupted run continues from it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line on standard output.")]
Restart = Annotated[bool, typer.Option(help="Start over, even if --out holds an earlier part of this run.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
FleetText = Annotated[
    str | None,
    typer.Option(
        "--fleet",
        help="Simulated devices, such as seconds=60,spread=10,lost=0.1, or a CSV file of measured devices; see sumus.Fleet.",
    ),
]
How = Annotated[
    str,
    typer.Option(
        "--executor",
        help="auto (chosen by measurements on this model, which are remembered), autograd, sequential, sequential+onednn, or "
        "vectorized[:K], where K is a power of two.",
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        help="Number of processes that train at the same time, including this one; ray to start a Ray cluster on this machine; "
        "or the address of a running Ray cluster. Default: as many as make training faster."
    ),
]


@dataclass(frozen=True)
class ComputeOptions:
    """The hardware and the processes that run a simulation, and the path of its clients' reports."""

    device: Device = "cpu"
    executor: How = "auto"
    workers: Workers = None
    insecure: Annotated[bool, typer.Option(help="Use a Ray cluster even if it has no access control.")] = False
    through: Annotated[
        SimulationPath,
        typer.Option(
            help="wire: each client is a device of a real server in this process; the same model, but slower."
        ),
    ] = SimulationPath.memory


@dataclass(frozen=True)
class ResultOptions:
    """The results that a simulation saves and prints."""

    out: Out = None
    as_json: AsJson = False
    restart: Restart = False
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Rounds between checkpoints.")] = 10
    client_states: Annotated[
        Path | None,
        typer.Option(help="Folder for the state that clients keep between rounds, if it does not fit in memory."),
    ] = None


@dataclass(frozen=True)
class EdgeOptions:
    """The edges through which the clients of a simulation report."""

    edge_groups: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of edges through which clients report. The clients are divided equally among them."
        ),
    ] = None
    edge_rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Number of rounds that an edge runs before it sends a sum; 1: it only adds reports."),
    ] = None

    def of(self, experiment: Experiment) -> Experiment:
        """Return the experiment with these edges instead of its own."""
        if self.edge_groups is not None:
            experiment = dataclasses.replace(experiment, edge_groups=self.edge_groups)
        if self.edge_rounds is None:
            return experiment
        edges = dataclasses.replace(experiment.plan.edges, rounds=self.edge_rounds)
        return dataclasses.replace(experiment, plan=dataclasses.replace(experiment.plan, edges=edges))


@with_option_groups
def simulate(
    file: File,
    compute: ComputeOptions,
    result: ResultOptions,
    edges: EdgeOptions,
    rounds: Rounds = None,
    seed: Seed = None,
    fleet: FleetText = None,
) -> None:
    """Run the experiment of a file."""
    from sumus.simulator.options import Compute, Output

    experiment = edges.of(load_experiment(file))
    run_and_show(
        experiment if fleet is None else dataclasses.replace(experiment, fleet=fleet_of(fleet)),
        Path(split(file)[0]).stem,
        rounds,
        seed,
        result.as_json,
        Compute(compute.executor, compute.device, workers_of(compute.workers), compute.insecure, compute.through.value),
        Output(result.out, result.checkpoint_every, result.restart, result.client_states),
    )


def check(file: File) -> None:
    """Try a plan on its first client: data, one round, shapes, memory, bytes, and whether real devices may run it."""
    from sumus.simulator.check import check as check_plan

    trial = load_plan(file)
    report = check_plan(trial.plan, trial.population)
    OUT.print(check_table(trial.plan, report, trial.made_up))


def rehearse(
    file: File,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1000,
    days: Annotated[float, typer.Option(min=0.001, help="Number of simulated days.")] = 7.0,
    fleet: FleetText = None,
    seed: Seed = None,
    plot: Annotated[Path | None, typer.Option(help="File for a plot of the results.")] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a fleet that runs a file's plan, without training: shows rounds per day, wasted work and the server's load."""
    from sumus.fleet import PERFECT
    from sumus.plotting import check_path
    from sumus.simulator.virtual_time.rehearsal import rehearse as rehearsed

    _, value = experiment_or_plan(file)
    plan, own, own_seed = (value, PERFECT, 0) if isinstance(value, Plan) else (value.plan, value.fleet, value.seed)
    kind = own if fleet is None else fleet_of(fleet)
    if plot is not None:
        check_path(plot)
    with progress_of_days(days, ERR) as watch:
        report = rehearsed(
            plan.pacing,
            kind,
            devices,
            days,
            own_seed if seed is None else seed,
            plan.broadcast_nbytes,
            plan.first_hop.nbytes,
            watch=watch,
        )
    OUT.print(rehearsal_table(report))
    if plot is not None:
        OUT.print(f"picture: {report.plot(plot)}", soft_wrap=True)
    if as_json:
        echo(json.dumps(report.to_json()))


def pack(
    file: File,
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to write, PLAN.sumus.")],
    seed: Seed = None,
) -> None:
    """Write what a server needs to run a plan without its code: the plan as data, and the initial model."""
    bundle, warnings = _packed(file, seed)
    output.write_bytes(content := bundle.to_bytes())
    OUT.print(f"{output}: plan {bundle.plan.id}, {amount(len(content))}", soft_wrap=True)
    OUT.print(bundle.plan.influence.said, soft_wrap=True)
    for warning in warnings:
        ERR.print(printable(f"warning: {warning}"), soft_wrap=True)


def packed(file: str, seed: int | None) -> "Bundle":
    """Return a file's plan with its initial model, in the form that a server accepts."""
    return _packed(file, seed)[0]


def _packed(file: str, seed: int | None) -> "tuple[Bundle, Sequence[str]]":
    """Return a file's plan with its initial model, and the reasons why devices would not take part."""
    from sumus.simulator.check import check as check_plan
    from sumus.training.program import Program
    from sumus.wire.bundle import Bundle

    trial = load_plan(file)
    report = check_plan(trial.plan, trial.population)
    for note in report.notes:
        OUT.print(printable(f"note: {note}"), soft_wrap=True)
    plan = trial.plan.with_data(report.data).for_devices()
    broken = dict(plan.violations("deployed"))
    if set(broken) - {"needs-each-update"} == {"trusts-devices"}:
        proposal = (
            "Add `examples` to this file, so that `sumus check` can propose values"
            if trial.made_up
            else f"Here {report.updates.proposal()}"
        )
        raise PlanError("trusts-devices", f"{broken['trusts-devices']}. {proposal}")
    plan.check_deployable(spools=True)  # the operator of a server decides whether it spools
    seed = trial.seed if seed is None else seed
    return Bundle(plan, Program(cast(Any, plan.task), seed=seed).initial), report.warnings


def run_and_show(
    experiment: Experiment,
    name: str,
    rounds: int | None,
    seed: int | None,
    as_json: bool,
    compute: "Compute",
    output: "Output",
) -> None:
    """Run an experiment, and show its results.

    If the run is stopped or fails, its last checkpoint is saved, and the error's message says how to continue.

    Args:
        experiment: The experiment.
        name: The beginning of the name of the folder in which the checkpoint of a stopped run is saved.
        rounds: The number of rounds; None for that of the experiment.
        seed: The seed; None for that of the experiment.
        as_json: Whether the results are printed as JSON.
        compute: The hardware and the processes.
        output: The results to save.
    """
    from sumus.interrupt import undisturbed
    from sumus.simulator.history import strict
    from sumus.simulator.progress import LineProgress
    from sumus.simulator.simulate import run

    experiment = dataclasses.replace(
        experiment,
        rounds=experiment.rounds if rounds is None else rounds,
        seed=experiment.seed if seed is None else seed,
    )
    out = output.path
    try:
        progress = None if sys.stderr.isatty() else LineProgress(first=0.0)
        history = run(experiment, compute, dataclasses.replace(output, progress=progress))
    except (SumusError, Interrupted) as stop:
        if out is not None or stop.checkpoint is None or not stop.checkpoint.rounds:
            raise
        folder = next(path for path in map(Path, _interrupted_names(name)) if not path.exists())
        with undisturbed():
            stop.checkpoint.write(folder)
        done = f"after round {len(stop.checkpoint.rounds)}, " if not isinstance(stop, Interrupted) else ""
        stop.args = (f"{stop}, {done}kept in {folder}: add --out {folder} to continue from there",)
        raise
    if as_json:
        result = {
            "rounds": len(history.rounds),
            "metrics": dict(history.metrics),
            "model_sha256": history.model_sha256,
            "seconds": history.seconds,
            "stopped": history.stopped,
            "spreads": {s: {n: v.to_json() for n, v in found.items()} for s, found in history.spreads.items()},
            "plan": history.provenance.plan_id,
            "seed": history.provenance.seed,
            "executor": history.provenance.executor,
            "simulated_seconds": history.simulated_seconds,
            "fleet": None if history.fleet is None else history.fleet.to_json(),
            "out": None if out is None else str(out),
        }
        echo(json.dumps(strict(result), sort_keys=True))
        return
    show_history(history, out, OUT, ERR)


def _interrupted_names(name: str) -> Generator[str, None, None]:
    """Yield names for the folder of a stopped run."""
    yield f"{name}-interrupted"
    yield from (f"{name}-interrupted-{number}" for number in itertools.count(2))


def workers_of(text: str | None) -> int | str | None:
    """Parse the option --workers: a number of processes, or the name of a cluster."""
    number = whole_number((text or "").removeprefix("-"))
    if number is None:
        return text
    return -number if text and text.startswith("-") else number


def fleet_of(text: str) -> "Fleet":
    """Read a fleet from words such as `seconds=60,spread=10`, or from a file of measured devices such as `phones.csv`."""
    from sumus.fleet import PERFECT, Fleet

    if text.endswith(".csv") and "=" not in text:
        return Fleet(trace=text)
    given: dict[str, Any] = {}
    known = list(PERFECT.figures)
    for word in text.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or name not in known:
            raise ExperimentError(
                f"--fleet {word.strip()!r}: write NAME=VALUE, where NAME is one of {', '.join(known)}; or give a .csv "
                "file"
            )
        given[name] = {"true": True, "yes": True, "false": False, "no": False}.get(value.lower(), value)
        if name != "trace":
            with suppress(ValueError):
                given[name] = float(value)
    return Fleet.of(given)
