"""TensorBoard, MLflow and Weights & Biases hold what a run's rounds hold. docs/loop.md has the lines."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import sumus

TASK = sumus.Task(lambda: nn.Linear(3, 2), sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy})


def run(log: Any) -> sumus.History:
    people = {number: (np.full((4, 3), number, np.float32), np.arange(4) % 2) for number in range(4)}
    evaluate = sumus.Evaluation(seen=4, first=True)
    return sumus.simulate(TASK, sumus.fedavg(sumus.sgd(0.1)), people, 2, evaluate=evaluate, after_round=log)


def accuracies(history: sumus.History) -> list[float]:
    assert history.start is not None
    return [record.metrics["accuracy"] for record in (history.start, *history.rounds)]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:

        def log(outcome: Any) -> None:
            for name, value in outcome.figures.items():
                writer.add_scalar(name, value, outcome.round)

        history = run(log)
    events = EventAccumulator(str(tmp_path)).Reload()
    found = events.Scalars("seen/accuracy.median")
    assert [event.step for event in found] == [0, 1, 2]
    assert [event.value for event in events.Scalars("accuracy")] == pytest.approx(accuracies(history))


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    with mlflow.start_run() as started:
        history = run(lambda outcome: mlflow.log_metrics(outcome.figures, step=outcome.round))
    found = mlflow.MlflowClient().get_metric_history(started.info.run_id, "seen/accuracy")
    assert [metric.step for metric in found] == [0, 1, 2]
    assert [metric.value for metric in found] == accuracies(history)


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.chdir(tmp_path)
    with wandb.init(project="sumus") as started:
        history = run(lambda outcome: started.log(dict(outcome.figures), step=outcome.round))
        assert started.step == 2
        assert started.summary["accuracy"] == history.metrics["accuracy"]
        assert started.summary["seen/accuracy.median"] == history.spreads["seen"]["accuracy"].median
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_sumus_imports_none_of_them() -> None:
    import subprocess

    code = (
        "import sumus.simulator.simulate, sys; "
        "sys.exit(any(name in sys.modules for name in ('tensorboard', 'mlflow', 'wandb')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
