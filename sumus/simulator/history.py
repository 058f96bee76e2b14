"""What a run did, round by round: to print, to plot, to put into a table."""

import dataclasses
import importlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from sumus.errors import ExperimentError
from sumus.metrics import Spread
from sumus.simulator.picture import figure, save
from sumus.training.program import model_bytes


@dataclass(frozen=True)
class RoundRecord:
    """One round. clients, examples: whose report was counted. dropped: clients whose report was not. loss: of local
    training, averaged over its examples; NaN where nobody was counted. metrics: see `Evaluate`; empty where the round was
    not evaluated. evaluations: all sources, by name. spreads: metrics over clients, by source. bytes_up, bytes_down: of all
    clients together. epsilon: what privacy cost so far, None without privacy. seconds: this round's wall time."""

    round: int
    clients: int
    examples: int
    loss: float
    metrics: Mapping[str, float]
    bytes_up: int
    bytes_down: int
    seconds: float
    dropped: int = 0
    epsilon: float | None = None
    evaluations: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    spreads: Mapping[str, Mapping[str, Spread]] = field(default_factory=dict[str, Mapping[str, Spread]])

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "RoundRecord":
        """The inverse of `to_json`."""
        spreads: dict[str, Any] = {
            source: {name: Spread(**spread) for name, spread in by_metric.items()}
            for source, by_metric in fields["spreads"].items()
        }
        plain: dict[str, Any] = {**fields, "spreads": spreads}
        return RoundRecord(**plain)


def strict(value: Any) -> Any:
    """JSON without NaN and infinity, which other readers refuse: they become null."""
    if isinstance(value, Mapping):
        return {str(name): strict(item) for name, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, repr=False)
class History:
    """The outcome of a run.

    rounds: a record each.  model: a torch state dict that loads into the task's model.  model_sha256: of the published
    leaves.  stopped: why it ended ("rounds", "target").  notes: what the user should know, once each.  executor: how clients
    were trained, and why so.
    """

    rounds: Sequence[RoundRecord]
    model: Mapping[str, Any]
    model_sha256: str
    plan_id: str
    seed: int
    stopped: str = "rounds"
    notes: Sequence[str] = ()
    executor: str = ""

    def __repr__(self) -> str:
        measured = "".join(f", {name} {value:.4g}" for name, value in self.metrics.items())
        return f"History({len(self.rounds)} rounds{measured}, model {self.model_sha256[:12]})"

    @property
    def evaluated(self) -> list[RoundRecord]:
        """The rounds that were evaluated."""
        return [record for record in self.rounds if record.metrics]

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last evaluation's metrics."""
        return self.evaluated[-1].metrics if self.evaluated else {}

    @property
    def spreads(self) -> Mapping[str, Mapping[str, Spread]]:
        """The last evaluation's spread over clients, by source and metric."""
        return self.evaluated[-1].spreads if self.evaluated else {}

    @property
    def seconds(self) -> float:
        """Wall time of all rounds."""
        return sum(record.seconds for record in self.rounds)

    def to_frame(self) -> Any:
        """A pandas DataFrame, one row a round; metrics as columns `metric`, `source/metric` (needs pandas)."""
        try:
            pandas: Any = importlib.import_module("pandas")
        except ImportError as error:
            raise ExperimentError("to_frame() needs pandas: pip install 'sumus[report]'") from error
        rows: list[dict[str, Any]] = []
        for record in self.rounds:
            row = {k: v for k, v in record.to_json().items() if k not in ("metrics", "evaluations", "spreads")}
            row |= {name: value for name, value in record.metrics.items() if name != "loss"}
            row |= {f"{s}/{name}": value for s, found in record.evaluations.items() for name, value in found.items()}
            for source, spreads in record.spreads.items():
                for name, spread in spreads.items():
                    row[f"{source}/{name}/median"] = spread.median
                    row[f"{source}/{name}/worst_decile"] = spread.worst_decile
            rows.append(row)
        return pandas.DataFrame(rows).set_index("round")

    def write_jsonl(self, path: str | Path) -> Path:
        """One JSON object a line and round."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            "".join(json.dumps(strict(record.to_json()), sort_keys=True) + "\n" for record in self.rounds)
        )
        return target

    def write(self, folder: str | Path) -> None:
        """`history.jsonl`, `model.safetensors` (a state dict), and `plot.png` where matplotlib is installed."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.write_jsonl(target / "history.jsonl")
        (target / "model.safetensors").write_bytes(model_bytes(self.model))
        if importlib.util.find_spec("matplotlib"):
            self.plot(target / "plot.png")

    def plot(self, path: str | Path, title: str = "") -> Path:
        """A picture of the run: loss, and the metrics with their spread over clients (needs matplotlib)."""
        names = [name for name in self.metrics if name != "loss"]
        picture = figure(5.0 * (1 + len(names)), 3.6)
        axes = picture.subplots(1, 1 + len(names), squeeze=False)[0]
        rounds = [record.round for record in self.rounds]
        axes[0].plot(rounds, [record.loss for record in self.rounds], label="local training")
        if any("loss" in record.metrics for record in self.evaluated):
            measured = [(record.round, record.metrics["loss"]) for record in self.evaluated if "loss" in record.metrics]
            axes[0].plot(*zip(*measured, strict=True), label="evaluation")
        axes[0].set(xlabel="round", ylabel="loss")
        axes[0].legend(frameon=False)
        for axis, name in zip(axes[1:], names, strict=True):
            self._plot_metric(axis, name)
        if title:
            picture.suptitle(title)
        return save(picture, path)

    def _plot_metric(self, axis: Any, name: str) -> None:
        shown = [record for record in self.evaluated if name in record.metrics]
        axis.plot([record.round for record in shown], [record.metrics[name] for record in shown], label="all examples")
        for source in {source for record in shown for source in record.spreads}:
            spread = [(r.round, r.spreads[source][name]) for r in shown if name in r.spreads.get(source, {})]
            if spread:
                rounds = [number for number, _ in spread]
                low = [value.worst_decile for _, value in spread]
                middle = [value.median for _, value in spread]
                axis.fill_between(rounds, low, middle, alpha=0.2, label=f"{source}: worst decile to median client")
        axis.set(xlabel="round", ylabel=name)
        axis.legend(frameon=False)
