"""What the commands of the simulator print: the results of a simulation, a check and a rehearsal."""

import sys
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from sumus.plan import Plan
from sumus.text import amount, many, printable

if TYPE_CHECKING:
    from sumus.simulator.check import CheckReport
    from sumus.simulator.history import History
    from sumus.simulator.virtual_time.fleet_report import FleetReport


def show_history(history: "History", out: Path | None, console: Console, notes: Console) -> None:
    """Print the results of a simulation.

    Args:
        history: The results.
        out: The folder in which the results are saved; None if they are not saved.
        console: The console for the results.
        notes: The console for notes.
    """
    last = history.rounds[-1]
    why = "the target was reached" if history.stopped == "target" else "all rounds done"
    console.print(f"{many(len(history.rounds), 'round')} in {history.seconds:.1f} s, {why}")
    nothing: Mapping[str, Mapping[str, float]] = {}
    evaluations = history.evaluated[-1].evaluation.by_source if history.evaluated else nothing
    for source, measured in evaluations.items():
        spreads = history.spreads.get(source, {})
        clients = next((spread.clients for spread in spreads.values()), 0)
        trained_on = f"{many(clients, 'client')} that trained"
        title = {"central": "central held-out data", "unseen": f"{many(clients, 'client')} never seen in training"}
        console.print(f"\non {title.get(source, trained_on)}:")
        console.print(measurements(measured, spreads))
    if not evaluations:
        console.print(f"loss of local training {last.loss:.4f}")
    console.print(
        f"\ntraffic  {amount(sum(record.traffic.down for record in history.rounds))} down, "
        f"{amount(sum(record.traffic.up for record in history.rounds))} up, all clients together"
    )
    if above := sum(record.traffic.above for record in history.rounds):
        console.print(f"edges    {amount(above)} in sums to the server")
    if dropped := sum(record.reports.dropped for record in history.rounds):
        asked = dropped + sum(record.clients for record in history.rounds)
        reasons = sum((Counter(record.reports.reasons) for record in history.rounds), Counter[str]())
        why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        console.print(
            f"reports  {asked - dropped:,} of {asked:,} counted{f'; of others: {why}' if why else ''}", soft_wrap=True
        )
    if history.simulated_seconds and history.fleet is not None:
        by_speed = history.fleet.by_speed
        console.print(
            f"fleet    {_duration(history.simulated_seconds)} of simulated time, {history.fleet.wasted_share:.0%} of the work "
            f"in no model; a device of the fastest tenth was counted {by_speed[0]:.1f} times, of the slowest {by_speed[-1]:.1f}",
            soft_wrap=True,
        )
    console.print(f"trained  {history.provenance.executor}", soft_wrap=True)
    console.print(f"model    sha256 {history.model_sha256}", soft_wrap=True)
    if out is not None:
        for label, file in (("weights", "model.safetensors"), ("plot", "plot.png"), ("history", "history.jsonl")):
            if (out / file).exists():
                console.print(f"{label:8} {out / file}", soft_wrap=True)
    for note in history.notes:
        notes.print(printable(f"note: {note}"))


def measurements(measured: Mapping[str, float], spreads: Mapping[str, Any]) -> Table:
    """Return a table of metrics: over all examples, and their spread over the clients.

    Args:
        measured: The metrics over all examples, by name.
        spreads: The spread of each metric over the clients, by name; empty if it was not measured.
    """
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
    """Format a duration in seconds, minutes, hours or days."""
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


_MADE_UP = "the file has no examples, so that it was tried on made-up ones"


def check_table(plan: Plan, report: "CheckReport", made_up: bool) -> Table:
    """Return a table of the results of a check.

    Args:
        plan: The plan that was checked.
        report: The results.
        made_up: Whether the plan's file has no examples, so that invented ones were used.
    """
    table = Table(show_header=False, box=None, pad_edge=False)
    data = report.data
    classes = f", {data.classes} classes" if data.classes else ""
    table.add_row(
        "data",
        f"inputs {data.inputs_dtype}{list(data.inputs)}, targets {data.targets_dtype}{list(data.targets)}"
        f"{classes}; {_MADE_UP if made_up else many(report.first.examples, 'example') + ' at the first client'}",
    )
    table.add_row(
        "model", f"{report.model.parameters:,} shared parameters, output {_shape_text(report.model.outputs)} an example"
    )
    if not made_up:
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
    if not made_up:
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
    return table


def _shape_text(outputs: Any) -> str:
    """Format the shape of an output, such as `[10]`, or of several outputs."""
    if isinstance(outputs, Mapping):
        return ", ".join(f"{name} {_shape_text(value)}" for name, value in cast(Mapping[str, Any], outputs).items())
    if not isinstance(outputs, tuple):
        return str(outputs)
    sides = list(cast(tuple[Any, ...], outputs))
    return str(sides) if all(isinstance(side, int) for side in sides) else ", ".join(map(_shape_text, sides))


def rehearsal_table(report: "FleetReport") -> Table:
    """Return a table of the results of a rehearsal."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("rounds", f"{report.rounds_a_day:.1f} models a day, {many(report.abandoned, 'round')} abandoned")
    table.add_row(
        "devices",
        f"{int((report.participations > 0).sum()):,} of {len(report.participations):,} took part, {report.idle_share:.1%} idle",
    )
    table.add_row(
        "by speed", "  ".join(f"{mean:.2f}" for mean in report.by_speed) + "  participations, fastest tenth first"
    )
    table.add_row("work", f"{report.wasted_share:.1%} of the device time is in no model")
    table.add_row("check-ins", f"{report.busiest:.1f} a second at most, {report.load.planned:g} planned")
    table.add_row("server", f"{many(report.load.staged, 'report')} waited at once, {report.load.waited:.2f} s at most")
    table.add_row("traffic", f"{amount(report.traffic.up)} up, {amount(report.traffic.down)} down")
    return table


@contextmanager
def progress_of_days(days: float, console: Console) -> Generator[Callable[[float], None], None, None]:
    """Show a progress bar of simulated days on a console, if standard error is a terminal."""
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("days", total=days)
        yield lambda day: bar.update(task, completed=day)
