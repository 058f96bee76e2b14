"""The history of a run, round by round: to print, to plot, or to put into a table."""

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sumus.errors import ExperimentError, extra
from sumus.metrics import Spread
from sumus.plotting import figure, save
from sumus.simulator.records import RoundRecord, measured_columns
from sumus.simulator.virtual_time.fleet_report import FleetReport
from sumus.text import many
from sumus.training.program import model_bytes

_NESTED = ("metrics", "evaluations", "spreads", "staleness", "reasons", "failed")


_MOST_NAMED = 10
"""The largest number of clients that get a note on their failures."""


def failures_of(rounds: Sequence[RoundRecord]) -> list[str]:
    """Return notes on the clients that failed and were left out of rounds.

    Each of the first few clients gets a note with the number of its rounds and its first reason.
    """
    left_out: dict[str, list[int]] = {}
    why: dict[str, str] = {}
    for record in rounds:
        for client, reason in record.reports.failed.items():
            left_out.setdefault(client, []).append(record.round)
            why.setdefault(client, reason)
    notes = [
        f"client {client!r} was left out of {len(numbers)} {'round' if len(numbers) == 1 else 'rounds'} (the first is round "
        f"{numbers[0]}): {why[client]}"
        for client, numbers in left_out.items()
    ]
    more = len(notes) - _MOST_NAMED
    return (
        notes
        if more <= 0
        else [*notes[:_MOST_NAMED], f"{more} more clients were left out of rounds: see RoundRecord.reports.failed"]
    )


@dataclass(frozen=True, repr=False)
class BestModel:
    """The best model of a run.

    Attributes:
        round: The round after which it was measured; 0 if that was before round 1.
        metric: The metric by which it was chosen.
        value: The metric's value.
        model: A torch state dict.
        model_sha256: A hash of its published leaves.
    """

    round: int
    metric: str
    value: float
    model: Mapping[str, Any]
    model_sha256: str

    def __repr__(self) -> str:
        return f"BestModel(round {self.round}, {self.metric} {self.value:.4g}, model {self.model_sha256[:12]})"


def strict(value: Any) -> Any:
    """Replace NaN and infinity with None, since other readers of JSON refuse them."""
    if isinstance(value, Mapping):
        return {str(name): strict(item) for name, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Provenance:
    """The origin of a history.

    Attributes:
        plan_id: The id of the plan.
        seed: The seed of everything random.
        executor: A sentence on how clients were trained, and why.
    """

    plan_id: str
    seed: int
    executor: str = ""


@dataclass(frozen=True, repr=False)
class History:
    """The outcome of a run.

    Attributes:
        rounds: A record of each round.
        model: A torch state dict that loads into the task's model.
        model_sha256: A hash of the published leaves.
        provenance: The plan, the seed and the executor.
        stopped: The reason why the run ended: "rounds", "target", "patience", "after_round", "interrupted" or "error".
        notes: Notes for the user, without duplicates.
        fleet: The report on the devices in simulated time.
        start: The measurement before round 1, as a record of round 0, if it was requested.
        best: The best model, if it was requested.
    """

    rounds: Sequence[RoundRecord]
    model: Mapping[str, Any]
    model_sha256: str
    provenance: Provenance
    stopped: str = "rounds"
    notes: Sequence[str] = ()
    fleet: FleetReport | None = None
    start: RoundRecord | None = None
    best: BestModel | None = None

    def __repr__(self) -> str:
        measured = "".join(f", {name} {value:.4g}" for name, value in self.metrics.items())
        return f"History({many(len(self.rounds), 'round')}{measured}, model {self.model_sha256[:12]})"

    @property
    def evaluated(self) -> list[RoundRecord]:
        """The rounds that were evaluated."""
        return [record for record in self.rounds if record.metrics]

    @property
    def _shown(self) -> list[RoundRecord]:
        """The records to write and plot, including the measurement before round 1."""
        return [*([] if self.start is None else [self.start]), *self.rounds]

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last evaluation's metrics."""
        return self.evaluated[-1].metrics if self.evaluated else {}

    @property
    def spreads(self) -> Mapping[str, Mapping[str, Spread]]:
        """The last evaluation's spread over clients, by source and metric."""
        return self.evaluated[-1].evaluation.spreads if self.evaluated else {}

    @property
    def seconds(self) -> float:
        """The wall time of all rounds together."""
        return sum(record.seconds for record in self.rounds)

    @property
    def simulated_seconds(self) -> float:
        """The end of the last round, in simulated seconds."""
        return self.rounds[-1].at if self.rounds else 0.0

    def to_frame(self) -> Any:
        """Return a pandas DataFrame with one row per round, and one row for `start` (needs pandas).

        Metrics are columns `metric` and `source/metric`.
        """
        try:
            pandas: Any = importlib.import_module("pandas")
        except ImportError as error:
            raise ExperimentError(f"to_frame() needs pandas: {extra('report')}") from error
        rows: list[dict[str, Any]] = []
        for record in self._shown:
            row = {k: v for k, v in record.to_json().items() if k not in _NESTED}
            rows.append(row | measured_columns(record))
        return pandas.DataFrame(rows).set_index("round")

    def write_jsonl(self, path: str | Path) -> Path:
        """Write one JSON object per round, each on its own line; the measurement before round 1 is a line too."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            "".join(json.dumps(strict(record.to_json()), sort_keys=True) + "\n" for record in self._shown)
        )
        return target

    def write(self, folder: str | Path) -> None:
        """Write `history.jsonl`, `model.safetensors` (a state dict) and, if possible, `best.safetensors` and `plot.png`.

        `best.safetensors` is written if the run kept a best model, `plot.png` if matplotlib is installed.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.write_jsonl(target / "history.jsonl")
        (target / "model.safetensors").write_bytes(model_bytes(self.model))
        if self.best is not None:
            (target / "best.safetensors").write_bytes(model_bytes(self.best.model))
        if importlib.util.find_spec("matplotlib"):
            self.plot(target / "plot.png")

    def plot(self, path: str | Path, title: str = "") -> Path:
        """Draw the run: the loss, and the metrics with their spread over clients (needs matplotlib)."""
        names = [name for name in self.metrics if name != "loss"]
        timed = self.simulated_seconds > 0
        picture = figure(5.0 * (1 + timed + len(names)), 3.6)
        first, *axes = picture.subplots(1, 1 + timed + len(names), squeeze=False)[0]
        self._plot_loss(first, [record.round for record in self.rounds], "round")
        if timed:
            self._plot_loss(axes.pop(0), [record.at for record in self.rounds], "simulated seconds")
        for axis, name in zip(axes, names, strict=True):
            self._plot_metric(axis, name)
        if title:
            picture.suptitle(title)
        return save(picture, path)

    def _plot_loss(self, axis: Any, where: Sequence[float], label: str) -> None:
        axis.plot(where, [record.loss for record in self.rounds], label="local training")
        measured = [(x, r.metrics["loss"]) for x, r in zip(where, self.rounds, strict=True) if "loss" in r.metrics]
        if measured:
            axis.plot(*zip(*measured, strict=True), label="evaluation")
        axis.set(xlabel=label, ylabel="loss")
        axis.legend(frameon=False)

    def _plot_metric(self, axis: Any, name: str) -> None:
        shown = [record for record in self._shown if name in record.metrics]
        axis.plot([record.round for record in shown], [record.metrics[name] for record in shown], label="all examples")
        for source in {source for record in shown for source in record.evaluation.spreads}:
            spreads = [(record.round, record.evaluation.spreads.get(source, {})) for record in shown]
            spread = [(number, by_name[name]) for number, by_name in spreads if name in by_name]
            if spread:
                rounds = [number for number, _ in spread]
                low = [value.worst_decile for _, value in spread]
                middle = [value.median for _, value in spread]
                axis.fill_between(rounds, low, middle, alpha=0.2, label=f"{source}: worst decile to median client")
        axis.set(xlabel="round", ylabel=name)
        axis.legend(frameon=False)
