"""What a run leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import sumus
from sumus.simulator.records import RoundRecord

Make = Callable[..., sumus.Experiment]


def test_a_frame_has_a_row_a_round_and_a_column_a_metric(experiment: Make) -> None:
    pandas = pytest.importorskip("pandas", reason="pip install 'sumus[report]'")
    frame = sumus.run(experiment(rounds=3)).to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.tolist() == [1, 2, 3]
    assert {"loss", "accuracy", "unseen/accuracy", "seen/accuracy", "unseen/accuracy/worst_decile", "bytes_up"} <= set(
        frame
    )
    assert frame["accuracy"].tolist() == frame["unseen/accuracy"].tolist()


def test_lines_of_json_hold_every_round_whole(experiment: Make, tmp_path: Path) -> None:
    history = sumus.run(experiment(rounds=3))
    lines = history.write_jsonl(tmp_path / "history.jsonl").read_text().splitlines()
    read = [RoundRecord.from_json(json.loads(line)) for line in lines]
    assert [record.to_json() for record in read] == [record.to_json() for record in history.rounds]
    worst = [record.evaluation.spreads["unseen"]["loss"].worst_client for record in read]
    assert worst == [str(record.evaluation.spreads["unseen"]["loss"].worst_client) for record in history.rounds]


def test_a_folder_holds_model_history_and_picture(experiment: Make, tmp_path: Path) -> None:
    history = sumus.run(experiment(rounds=3), out=tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == history.model.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(array, history.model[name].numpy())
    assert (tmp_path / "history.jsonl").read_text().count("\n") == 3
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_spread_over_clients_is_exact() -> None:
    spread = sumus.Spread.over(list("abcdefghijklmnopqrst"), [i / 20 for i in range(20)])
    assert spread.clients == 20
    assert spread.mean == pytest.approx(0.475)
    assert spread.median == pytest.approx(0.475)
    assert spread.worst_decile == pytest.approx((0.0 + 0.05) / 2)
    assert (spread.worst, spread.worst_client) == (0.0, "a")
    assert spread.deviation == pytest.approx(float(np.std(np.arange(20) / 20)))
    losses = sumus.Spread.over(["a", "b"], [1.0, 3.0], lower_is_better=True)
    assert (losses.worst, losses.worst_client, losses.worst_decile) == (3.0, "b", 3.0)


def test_all_examples_count_alike_in_the_pool_and_all_clients_in_the_spread(task: sumus.Task) -> None:
    big, small = np.ones((30, 6), np.float32), np.ones((10, 6), np.float32)
    unseen = {"big": (big, np.zeros(30, np.int64)), "small": (small, np.ones(10, np.int64))}
    people = {"one": (big, np.zeros(30, np.int64))}
    history = sumus.simulate(
        task, sumus.fedavg(sumus.sgd(lr=0.5, epochs=5)), people, rounds=3, evaluate=sumus.Evaluation(unseen=unseen)
    )
    assert history.metrics["accuracy"] == 0.75
    spread = history.spreads["unseen"]["accuracy"]
    assert (spread.mean, spread.worst_client) == (0.5, "small")
