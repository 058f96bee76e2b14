"""The display of a status in a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sumus.text import ago, amount, many

_COLUMNS = ("task", "", "round", "state", "reports", "train", "dropped", "since", "left", "what it waits for")
OPEN_END = 1_000_000
"""A goal of at least this many reports is not shown. An edge without work yet has the largest goal that the server above
allows."""
_NUMBERS = ("round", "reports", "train", "dropped")
SOON_S = 14 * 86400.0
"""A certificate that expires within this many seconds is shown in red."""


def shown(now: dict[str, Any]) -> Group:
    """Format a ServerStatus, in the form of its JSON, for a terminal."""
    up = ago(now["up_s"])
    lines: list[Any] = [
        Text(
            f"population {now['population']}: {many(now['devices'], 'device')} enrolled, "
            f"{amount(now['bytes_in'])} in, {amount(now['bytes_out'])} out, up for {up}"
        ),
        Text(now["mode"], "yellow"),
    ]
    if (above := now["above"]) is not None:
        waiting = f"; {many(above['waiting'], 'sum')} on the way" if above["waiting"] else ""
        told = f"an edge of {above['server']}: {many(above['sums'], 'sum')} sent, {amount(above['bytes'])}{waiting}"
        lines.append(Text(told))
        if above["trouble"]:
            lines.append(Text(f"this edge cannot reach the server above: {above['trouble']}", "red"))
    replica = now["replica"]
    if len(replica["there"]) > 1 or not replica["leads"]:
        leader = "this replica leads" if replica["leads"] else f"{replica['leader'] or 'no replica'} leads"
        lines.append(Text(f"replica {replica['name']}, {len(replica['there'])} running; {leader}"))
    if (left := now["certificate_s"]) is not None and left < SOON_S:
        lines.append(
            Text(f"the certificate {f'expires in {ago(left)}' if left > 0 else 'has expired'}: renew it", "red")
        )
    if now["trouble"]:
        lines.append(Text(f"waiting for storage: {now['trouble']}", "red"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    for task in now["tasks"]:
        for run in task["runs"]:
            table.add_row(*_row(task["name"], run))
    lines += [Text(), table, Text()]
    for task in now["tasks"]:
        lines += map(Text, _of_task(task))
    lines += _refusals(now["refusals"])
    if refused := now["events"].get("refused"):
        lines.append(
            Text(
                "requests refused since the start: " + ", ".join(f"{code} {times:,}" for code, times in refused.items())
            )
        )
    return Group(*lines)


def _row(task: str, run: dict[str, Any]) -> Iterator[str | Text]:
    reports = f"{run['counted']}/{run['goal']}" if run["goal"] < OPEN_END else str(run["counted"])
    yield from (task, run["kind"], str(run["round"]), "paused" if run["paused"] else run["state"])
    yield from (reports, str(run["out"]), str(run["dropped"]), ago(run["since_s"]))
    yield "" if run["left_s"] is None else ago(run["left_s"])
    yield Text(run["waiting"], "red" if run["trouble"] else "")


def _refusals(refused: list[dict[str, Any]]) -> Iterator[Text]:
    """Describe why devices have taken no part in recent minutes."""
    if refused:
        yield Text("devices that took no part in the last 10 minutes:")
    for each in refused:
        run = f"{each['task']} {each['kind']}: " if each["task"] else ""
        yield Text(f"    {run}{each['said']}", "yellow")


def _of_task(task: dict[str, Any]) -> Iterator[str]:
    """Describe a task's newest model, the newest measured one, the influence of one device, and the work of edges."""
    yield from _of_models(task)
    if (influence := task["influence"]) is not None:
        yield f"    {influence['said']}"
    own = f"; edges do {task['edge_rounds']} rounds of their own between two sums" if task["edge_rounds"] > 1 else ""
    yield f"    no noise is added yet; its place would be {'the top server' if task['noise_at'] == 'top' else 'the edges'}{own}"


def _of_models(task: dict[str, Any]) -> Iterator[str]:
    model, measured = task["model"], task["evaluated"]
    if model is None:
        yield f"{task['name']}: devices predict with version {task['released']}"
        return
    said = [
        f"{task['name']}: version {model['version']} of {many(model['contributors'], 'report')}, {ago(model['age_s'])} ago"
    ]
    if model["train"]:
        said.append(f"local training: {means(model['train'])}")
    late = {versions: reports for versions, reports in model["staleness"].items() if versions != "0"}
    if late:
        said.append(
            "late: " + ", ".join(f"{reports} by {many(int(versions), 'version')}" for versions, reports in late.items())
        )
    if task["released"] != task["version"]:
        said.append(f"devices predict with version {task['released']}")
    yield "; ".join(said)
    if measured is not None:
        found = measured["evaluate"]
        yield f"    version {measured['version']} measured on {many(found['devices'], 'device')}: {means(found['means'])}"
        if medians := found.get("medians"):
            yield "    the median device: " + ", ".join(f"{name} {between(*ends)}" for name, ends in medians.items())


def between(low: float | None, high: float | None) -> str:
    """Describe the bin that contains a median. An end that is None is open."""
    if low is None:
        return "anywhere" if high is None else f"below {high:.4g}"
    return f"above {low:.4g}" if high is None else f"{low:.4g} to {high:.4g}"


def means(values: dict[str, float]) -> str:
    """Format metrics on one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
