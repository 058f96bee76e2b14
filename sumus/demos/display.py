"""The output of a demo: a progress bar while it runs, and its results at the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sumus.demos.live import DemoView, Outcome, behind_edge, play
from sumus.demos.people import DemoPeople
from sumus.evaluation import EDGES, LOSS_EDGES
from sumus.text import amount, many


def show(module: str, people: DemoPeople, folder: Path, rounds: int, every: int, out: Console, err: Console) -> Outcome:
    """Run a demo, with a progress bar for its rounds on `err` and its results on `out`."""
    out.print(
        f"server   sumus serve PLAN.sumus: SQLite in a temporary folder, loopback; no code of the model, no PyTorch\n"
        f"edge     sumus edge: {len(behind_edge(people))} of the devices are behind it: the edge sends one sum per round\n"
        f"devices  {len(people.training)} × sumus join, each with one person's examples; {len(people.unseen)} more people, never "
        "seen in training, measure the models",
        soft_wrap=True,
    )
    columns = (
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[said]}", markup=False),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=err, expand=True) as bar:
        task = bar.add_task("", total=rounds, said="pack, serve, and wait for devices")

        def watch(look: DemoView) -> None:
            measured = "".join(f"  {name} {value:.3f}" for name, value in look.measured.items() if name != "loss")
            loss = "" if look.loss is None else f"  loss {look.loss:.4f}"
            bar.update(task, completed=look.version, said=f"{look.counted}/{look.goal} counted{loss}{measured}")

        done = play(module, people, folder, rounds, every, watch)
        bar.update(task, completed=done.models[-1].version)
    _result(done, people, out)
    return done


def _result(done: Outcome, people: DemoPeople, out: Console) -> None:
    rounds = done.models[-1].version
    out.print(
        f"{many(rounds, 'round')} over HTTP in {done.seconds:.1f} s, {many(done.counted, 'report')} acknowledged and counted"
    )
    if done.means:
        out.print(f"\non {len(people.unseen)} people never seen in training, each of whom reported only sums:")
        out.print(_measured(done.means, done.histograms))
    out.print(f"\ntraffic  {amount(done.bytes_down)} down, {amount(done.bytes_up)} up, at the server")
    out.print("mode     clear mode: the server sees each update in memory; its disk holds only sealed sums")
    for label, file in (
        ("weights", done.model),
        ("plot", done.plot),
        ("history", done.history),
        ("logs", done.model.parent / "logs"),
    ):
        out.print(f"{label:8} {file}", soft_wrap=True)


def _measured(means: Mapping[str, float], histograms: Mapping[str, Sequence[int]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("all examples", justify="right")
    table.add_column("devices by their own mean")
    for name, mean in means.items():
        edges = (LOSS_EDGES if name == "loss" else EDGES).tolist()
        bins = [
            f"{count} in {low:.2f}–{high:.2f}"
            for count, low, high in zip(histograms.get(name, ()), edges, edges[1:], strict=False)
            if count
        ]
        table.add_row(name, f"{mean:.3f}", ", ".join(bins))
    return table
