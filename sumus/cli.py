"""The command line: simulate, check, pack, demo. A user's mistake ends in a one-line message, not in a traceback."""

import dataclasses
import importlib
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import sumus
from sumus.device import commands as device_commands
from sumus.edge import commands as edge_commands
from sumus.errors import ExperimentError, Interrupted, PlanError, SumusError, UsageError, needs
from sumus.experiment import Experiment
from sumus.interrupt import terminate_like_ctrl_c
from sumus.node import commands as node_commands
from sumus.operations import commands as server_commands
from sumus.options import with_option_groups
from sumus.plan import Plan
from sumus.terminal import console, echo, show_defect
from sumus.text import amount, many, printable, whole_number
from sumus.userfile import experiment_or_plan, load_experiment, load_plan, split
from sumus.virtual import commands as virtual_commands

if TYPE_CHECKING:
    from sumus.fleet import Fleet
    from sumus.simulator.history import History
    from sumus.simulator.options import Compute, Output
    from sumus.wire.bundle import Bundle


class _Commands(TyperGroup):
    """The group of commands. If the user stops one, it says so and how to resume, and then exits with 130."""

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
_out, _err = console(), console(error=True)


class Demo(StrEnum):
    """The demos, with data sets that are part of Python packages."""

    health = "health"
    keyboard = "keyboard"
    digits = "digits"


class SimulationPath(StrEnum):
    """The path of a simulated client's report."""

    memory = "memory"
    wire = "wire"


File = Annotated[str, typer.Argument(metavar="FILE.py[:NAME]", help="A file that defines `experiment` (or NAME).")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds, instead of those of the experiment.")]
Seed = Annotated[int | None, typer.Option(help="Seed of all randomness, instead of the experiment's.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for checkpoint, model, history and plot; an interrupted run goes on from it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line on standard output.")]
Restart = Annotated[bool, typer.Option(help="Start over, even if --out holds an earlier part of this run.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
FleetText = Annotated[
    str | None,
    typer.Option(
        "--fleet", help="Devices, as seconds=60,spread=10,lost=0.1, or a CSV file of measured ones; see sumus.Fleet."
    ),
]
How = Annotated[
    str,
    typer.Option(
        "--executor",
        help="auto (measured on this model, and remembered), autograd, sequential, sequential+onednn, or vectorized[:K] "
        "with K a power of two.",
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        help="Processes that train at once, this one too; ray for a Ray cluster here, or its address. By default as many as pay."
    ),
]


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
    """Federated learning: devices train on data that never leaves them, and the server works with their sum."""


@dataclass(frozen=True)
class ComputeOptions:
    """The hardware and the processes that run a simulation, and the path of its clients' reports."""

    device: Device = "cpu"
    executor: How = "auto"
    workers: Workers = None
    insecure: Annotated[bool, typer.Option(help="Use a Ray cluster even if it lets everyone in.")] = False
    through: Annotated[
        SimulationPath,
        typer.Option(help="wire: each client is a device of a real server, in this process; the same model, slower."),
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
        typer.Option(help="Folder for what clients keep between rounds, if that is more than memory holds."),
    ] = None


@dataclass(frozen=True)
class EdgeOptions:
    """The edges through which the clients of a simulation report."""

    edge_groups: Annotated[
        int | None,
        typer.Option(min=1, help="How many edges the clients report through, each edge with as many clients."),
    ] = None
    edge_rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of an edge's own between two of its sums; 1: it only adds.")
    ] = None

    def of(self, experiment: Experiment) -> Experiment:
        """Return the experiment with these edges instead of its own."""
        if self.edge_groups is not None:
            experiment = dataclasses.replace(experiment, edge_groups=self.edge_groups)
        if self.edge_rounds is None:
            return experiment
        edges = dataclasses.replace(experiment.plan.edges, rounds=self.edge_rounds)
        return dataclasses.replace(experiment, plan=dataclasses.replace(experiment.plan, edges=edges))


@app.command()
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
    _simulate(
        experiment if fleet is None else dataclasses.replace(experiment, fleet=fleet_of(fleet)),
        Path(split(file)[0]).stem,
        rounds,
        seed,
        result.as_json,
        Compute(compute.executor, compute.device, _workers(compute.workers), compute.insecure, compute.through.value),
        Output(result.out, result.checkpoint_every, result.restart, result.client_states),
    )


@app.command()
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
    _out.print(f"{name}: {cast(str, module.__doc__).splitlines()[0]}", soft_wrap=True)
    folder = out or Path("runs") / f"demo-{name}"
    if name is Demo.health and not simulate:
        _play(module, folder, rounds, as_json)
        return
    _simulate(
        module.experiment(),
        name,
        rounds,
        seed,
        as_json,
        Compute(executor, device, _workers(workers)),
        Output(folder, restart=out is None),
    )


def _play(module: ModuleType, folder: Path, rounds: int | None, as_json: bool) -> None:
    """Run a demo with a server and its devices."""
    from sumus.demos.display import show

    name = module.__name__.rpartition(".")[2]
    done = show(name, module.PEOPLE, folder, rounds or module.ROUNDS, module.EVERY, _err if as_json else _out, _err)
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


def _workers(text: str | None) -> int | str | None:
    """Read a number of processes, or the name of a cluster."""
    number = whole_number((text or "").removeprefix("-"))
    if number is None:
        return text
    return -number if text and text.startswith("-") else number


_MADE_UP = "the file has no examples, so that it was tried on made-up ones"


@app.command()
def check(file: File) -> None:
    """Try a plan on its first client: data, one round, shapes, memory, bytes, and whether real devices may run it."""
    from sumus.simulator.check import check as check_plan

    trial = load_plan(file)
    plan = trial.plan
    report = check_plan(plan, trial.population)
    table = Table(show_header=False, box=None, pad_edge=False)
    data = report.data
    classes = f", {data.classes} classes" if data.classes else ""
    table.add_row(
        "data",
        f"inputs {data.inputs_dtype}{list(data.inputs)}, targets {data.targets_dtype}{list(data.targets)}"
        f"{classes}; {_MADE_UP if trial.made_up else many(report.first.examples, 'example') + ' at the first client'}",
    )
    table.add_row(
        "model", f"{report.model.parameters:,} shared parameters, output {_shape_text(report.model.outputs)} an example"
    )
    if not trial.made_up:
        table.add_row("one round", f"loss {report.first.loss:.4f} at the first client")
    cost = report.model.cost
    table.add_row(
        "memory",
        f"{amount(cost.total)} a step at least: model {amount(cost.model)}, gradients "
        f"{amount(cost.gradients)}, optimizer {amount(cost.optimizer)}, activations "
        f"{amount(cost.activations)}",
    )
    table.add_row("traffic", f"{amount(report.bytes.down)} down and {amount(report.bytes.up)} up, a client and round")
    if report.bytes.kept:
        table.add_row("client state", f"{amount(report.bytes.kept)} kept by each client between rounds")
    sums = plan.sums
    table.add_row(
        "sums",
        f"{sums.fraction_bits} fraction bits, |u| ≤ {sums.bound:g}, weight ≤ {sums.max_weight}, "
        f"≤ {many(sums.max_count, 'contributor')}",
    )
    table.add_row("influence", report.influence.said)
    if not trial.made_up:
        table.add_row("updates", report.updates.proposal())
    table.add_row("plan", report.plan_id)
    table.add_row("simulator", Text("legal", "green"))
    for rule, message in report.deployable.items():
        table.add_row("real devices", Text(f"refused by {rule}: ", "yellow").append(message, "default"))
    if not report.deployable:
        table.add_row("real devices", Text("legal", "green"))
    for note in report.notes:
        table.add_row("note", Text(note, "yellow"))
    for warning in report.warnings:
        table.add_row("", Text("warning: ", "yellow").append(warning, "default"))
    _out.print(table)


@app.command()
def rehearse(
    file: File,
    devices: Annotated[int, typer.Option(min=1, help="How many devices.")] = 1000,
    days: Annotated[float, typer.Option(min=0.001, help="Simulated days.")] = 7.0,
    fleet: FleetText = None,
    seed: Seed = None,
    plot: Annotated[Path | None, typer.Option(help="A file for a picture.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let a fleet run a file's plan in simulated time, with nobody training: rounds a day, wasted work, load on the server."""
    from sumus.fleet import PERFECT
    from sumus.plotting import check_path
    from sumus.simulator.virtual_time.rehearsal import rehearse as rehearsed

    _, value = experiment_or_plan(file)
    plan, own, own_seed = (value, PERFECT, 0) if isinstance(value, Plan) else (value.plan, value.fleet, value.seed)
    kind = own if fleet is None else fleet_of(fleet)
    if plot is not None:
        check_path(plot)
    with _progress_of_days(days) as watch:
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
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("rounds", f"{report.rounds_a_day:.1f} models a day, {many(report.abandoned, 'round')} abandoned")
    table.add_row(
        "devices", f"{int((report.participations > 0).sum()):,} of {devices:,} took part, {report.idle_share:.1%} idle"
    )
    table.add_row(
        "by speed", "  ".join(f"{mean:.2f}" for mean in report.by_speed) + "  participations, fastest tenth first"
    )
    table.add_row("work", f"{report.wasted_share:.1%} of the device time is in no model")
    table.add_row("check-ins", f"{report.busiest:.1f} a second at most, {report.load.planned:g} planned")
    table.add_row("server", f"{many(report.load.staged, 'report')} waited at once, {report.load.waited:.2f} s at most")
    table.add_row("traffic", f"{amount(report.traffic.up)} up, {amount(report.traffic.down)} down")
    _out.print(table)
    if plot is not None:
        _out.print(f"picture: {report.plot(plot)}", soft_wrap=True)
    if as_json:
        echo(json.dumps(report.to_json()))


@app.command()
def pack(
    file: File,
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to write, PLAN.sumus.")],
    seed: Seed = None,
) -> None:
    """Write what a server needs to run a plan without its code: the plan as data, and the initial model."""
    bundle, warnings = _packed(file, seed)
    output.write_bytes(content := bundle.to_bytes())
    _out.print(f"{output}: plan {bundle.plan.id}, {amount(len(content))}", soft_wrap=True)
    _out.print(bundle.plan.influence.said, soft_wrap=True)
    for warning in warnings:
        _err.print(printable(f"warning: {warning}"), soft_wrap=True)


def packed(file: str, seed: int | None) -> "Bundle":
    """Return a file's plan with its first model, in the form that a server takes."""
    return _packed(file, seed)[0]


def _packed(file: str, seed: int | None) -> "tuple[Bundle, Sequence[str]]":
    """Return a file's plan with its first model, and the reasons why devices would not take part."""
    from sumus.simulator.check import check as check_plan
    from sumus.training.program import Program
    from sumus.wire.bundle import Bundle

    trial = load_plan(file)
    report = check_plan(trial.plan, trial.population)
    for note in report.notes:
        _out.print(printable(f"note: {note}"), soft_wrap=True)
    plan = trial.plan.with_data(report.data).for_devices()
    broken = dict(plan.violations("deployed"))
    if set(broken) - {"needs-each-update"} == {"trusts-devices"}:
        proposal = "add `examples`, and it does" if trial.made_up else f"Here {report.updates.proposal()}"
        raise PlanError("trusts-devices", f"{broken['trusts-devices']}. {proposal}")
    plan.check_deployable(spools=True)  # whether a server does is its own choice
    seed = trial.seed if seed is None else seed
    return Bundle(plan, Program(cast(Any, plan.task), seed=seed).initial), report.warnings


server_commands.register(app, packed)
edge_commands.register(app)
for command in (device_commands.join, device_commands.predict, device_commands.forget):
    app.command()(command)
app.command()(virtual_commands.worker)
node_commands.register(app)


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
                f"--fleet {word.strip()!r}: write NAME=VALUE, with a name of {', '.join(known)}; or a .csv file"
            )
        given[name] = {"true": True, "yes": True, "false": False, "no": False}.get(value.lower(), value)
        if name != "trace":
            with suppress(ValueError):
                given[name] = float(value)
    return Fleet.of(given)


@contextmanager
def _progress_of_days(days: float) -> Generator[Callable[[float], None], None, None]:
    """Show a progress bar on standard error, if that is a terminal."""
    with Progress(console=_err, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("days", total=days)
        yield lambda day: bar.update(task, completed=day)


# ── what the commands share ──────────────────────────────────────────────────────────────────────────────────────────


def _simulate(
    experiment: Experiment,
    name: str,
    rounds: int | None,
    seed: int | None,
    as_json: bool,
    compute: "Compute",
    output: "Output",
) -> None:
    """Run an experiment, and show its results."""
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
        stop.args = (f"{stop}, {done}kept in {folder}: add --out {folder} to go on from there",)
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
    _show(history, out)


def _interrupted_names(name: str) -> Generator[str, None, None]:
    yield f"{name}-interrupted"
    yield from (f"{name}-interrupted-{number}" for number in itertools.count(2))


def _show(history: "History", out: Path | None) -> None:
    last = history.rounds[-1]
    why = "the target was reached" if history.stopped == "target" else "all rounds done"
    _out.print(f"{many(len(history.rounds), 'round')} in {history.seconds:.1f} s, {why}")
    nothing: Mapping[str, Mapping[str, float]] = {}
    evaluations = history.evaluated[-1].evaluation.by_source if history.evaluated else nothing
    for source, measured in evaluations.items():
        spreads = history.spreads.get(source, {})
        clients = next((spread.clients for spread in spreads.values()), 0)
        trained_on = f"{many(clients, 'client')} that trained"
        title = {"central": "central held-out data", "unseen": f"{many(clients, 'client')} never seen in training"}
        _out.print(f"\non {title.get(source, trained_on)}:")
        _out.print(_measurements(measured, spreads))
    if not evaluations:
        _out.print(f"loss of local training {last.loss:.4f}")
    _out.print(
        f"\ntraffic  {amount(sum(record.traffic.down for record in history.rounds))} down, "
        f"{amount(sum(record.traffic.up for record in history.rounds))} up, all clients together"
    )
    if above := sum(record.traffic.above for record in history.rounds):
        _out.print(f"edges    {amount(above)} in sums to the server")
    if dropped := sum(record.reports.dropped for record in history.rounds):
        asked = dropped + sum(record.clients for record in history.rounds)
        reasons = sum((Counter(record.reports.reasons) for record in history.rounds), Counter[str]())
        why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        _out.print(
            f"reports  {asked - dropped:,} of {asked:,} counted{f'; of others: {why}' if why else ''}", soft_wrap=True
        )
    if history.simulated_seconds and history.fleet is not None:
        by_speed = history.fleet.by_speed
        _out.print(
            f"fleet    {_duration(history.simulated_seconds)} of simulated time, {history.fleet.wasted_share:.0%} of the work "
            f"in no model; a device of the fastest tenth was counted {by_speed[0]:.1f} times, of the slowest {by_speed[-1]:.1f}",
            soft_wrap=True,
        )
    _out.print(f"trained  {history.provenance.executor}", soft_wrap=True)
    _out.print(f"model    sha256 {history.model_sha256}", soft_wrap=True)
    if out is not None:
        for label, file in (("weights", "model.safetensors"), ("plot", "plot.png"), ("history", "history.jsonl")):
            if (out / file).exists():
                _out.print(f"{label:8} {out / file}", soft_wrap=True)
    for note in history.notes:
        _err.print(printable(f"note: {note}"))


def _measurements(measured: Mapping[str, float], spreads: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    columns = ("mean client", "median", "worst decile", "deviation", "worst") if spreads else ()
    for column in ("all examples", *columns):
        table.add_column(column, justify="right")
    for metric, value in measured.items():
        spread = spreads.get(metric)
        cells = [spread.mean, spread.median, spread.worst_decile, spread.deviation] if spread else []
        worst = [printable(f"{spread.worst:.3f} ({spread.worst_client})")] if spread else []
        table.add_row(printable(metric), f"{value:.3f}", *(f"{cell:.3f}" for cell in cells), *worst)
    return table


def _duration(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


_EXTRA_OF = {
    "serve": "server,train",
    "worker": "server,device",
    "node": "node",
    "demo": "all",
    **dict.fromkeys(("edge", "status", "admin", "backup", "restore", "reconcile"), "server"),
    **dict.fromkeys(("join", "predict", "forget"), "device"),
    **dict.fromkeys(("simulate", "check", "pack", "rehearse"), "train"),
}
"""The extras that bring the imports of each command; `serve` needs no `train` for a bundle that `pack` has made."""


def main() -> None:
    """Run a command. Exit with 0; 1 for invalid data from a participant; 2 for a mistake to correct; 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows only ASCII
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


def _shape_text(outputs: Any) -> str:
    """Format the shape of an output, such as `[10]`, or of several outputs."""
    if isinstance(outputs, Mapping):
        return ", ".join(f"{name} {_shape_text(value)}" for name, value in cast(Mapping[str, Any], outputs).items())
    if not isinstance(outputs, tuple):
        return str(outputs)
    sides = list(cast(tuple[Any, ...], outputs))
    return str(sides) if all(isinstance(side, int) for side in sides) else ", ".join(map(_shape_text, sides))


def _say(message: str, status: int) -> int:
    _err.print(printable(f"sumus: {' '.join(message.split())}"), soft_wrap=True)
    return status
