"""Metrics that are no mean over predictions: values by class, AUC, F1, a root. One rule in a simulation and over the wire."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, recall_score, roc_auc_score, root_mean_squared_error
from torch import nn

import sumus
from sumus import figures, metrics
from sumus.aggregate import RunningSum
from sumus.device.compute import DeviceJob
from sumus.device.training import Training
from sumus.errors import BeyondBoundError
from sumus.evaluation import (
    check_measured,
    check_sum_measured,
    evaluation_hop,
    evaluation_of,
    evaluation_report,
    medians_of,
)
from sumus.metrics import SeveralSums
from sumus.training.program import Program
from sumus.wire.reports import decode_report
from tests.simulating import simulated

DRAWS = 60


def value_of(metric: Any, outputs: Any, targets: Any, splits: int = 3) -> dict[str, float]:
    """The figures of a metric, measured in parts and added."""
    sums: dict[str, tuple[float, int]] = {}
    for rows in np.array_split(np.arange(len(targets)), splits):
        if len(rows):
            values, counts = metric(outputs[rows], targets[rows])
            for name, value, count in zip(
                metric.names("it"), values.sum(0).tolist(), counts.sum(0).tolist(), strict=True
            ):
                before, counted = sums.get(name, (0.0, 0))
                sums[name] = (before + value, counted + count)
    return metrics.pooled(sums)


def bound_of(metric: Any, outputs: Any, targets: Any) -> float:
    """The stated bound: half the share of pairs of a positive and a negative prediction that lie in one bin."""
    counted = metric(outputs, targets)[0].sum(0)
    negative, positive = counted[: len(counted) // 2], counted[len(counted) // 2 :]
    return float((negative * positive).sum() / (negative.sum() * positive.sum()) / 2)


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("bins", [2, 100])
def test_auc_is_scikit_learns_within_the_stated_bound(scale: float, bins: int) -> None:
    rng = np.random.default_rng(bins)
    for draw in range(8):
        count = int(rng.integers(2, 300))
        targets = torch.tensor((rng.random(count) < rng.uniform(0.1, 0.9)).astype(np.float32))
        targets[:2] = torch.tensor([0.0, 1.0])
        logits = torch.tensor(
            scale * (rng.normal(size=count) + rng.uniform(0, 3) * targets.numpy()), dtype=torch.float32
        )
        for metric, scores in (
            (metrics.roc_auc_with_logits(bins), logits),
            (metrics.roc_auc(bins), logits.sigmoid()),
            (metrics.roc_auc(bins), logits.sigmoid().reshape(count, 1)),
        ):
            shaped = targets.reshape(scores.shape) if draw % 2 else targets
            wanted = roc_auc_score(targets, scores.reshape(-1))
            found = value_of(metric, scores, shaped)["it"]
            assert abs(found - wanted) <= bound_of(metric, scores, shaped) + 1e-9


def test_the_bound_is_small_where_scores_are_spread() -> None:
    rng = np.random.default_rng(0)
    targets = torch.tensor(rng.integers(0, 2, 2000).astype(np.float32))
    logits = torch.tensor(2 * rng.normal(size=2000) + 1.5 * targets.numpy(), dtype=torch.float32)
    assert bound_of(metrics.roc_auc_with_logits(), logits, targets) < 0.02
    assert bound_of(metrics.roc_auc_with_logits(1000), logits, targets) < 0.002
    found = value_of(metrics.roc_auc_with_logits(), logits, targets)["it"]
    assert found == pytest.approx(roc_auc_score(targets, logits), abs=1e-3)


def test_chances_at_both_ends_are_kept_apart() -> None:
    targets = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert value_of(metrics.roc_auc(), torch.tensor([0.0, 1e-9, 1e-7, 1.0]), targets)["it"] == 1.0
    assert value_of(metrics.roc_auc_with_logits(), torch.tensor([-math.inf, 5.0, 6.0, math.inf]), targets)["it"] == 1.0


def test_f1_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    for _ in range(DRAWS):
        classes, count = int(rng.integers(2, 7)), int(rng.integers(1, 40))
        outputs, targets = torch.randn(count, classes), torch.tensor(rng.integers(0, classes, count))
        wanted = f1_score(targets, outputs.argmax(1), average="macro")
        assert value_of(metrics.f1(classes), outputs, targets)["it"] == pytest.approx(wanted)
    padded = torch.tensor([[0, 1, -100], [1, -100, -100]])
    outputs = nn.functional.one_hot(torch.tensor([[0, 0, 1], [1, 0, 0]]), 2).float()
    assert value_of(metrics.f1(2), outputs, padded)["it"] == pytest.approx(
        f1_score([0, 1, 1], [0, 0, 1], average="macro")
    )


def test_values_by_class_are_scikit_learns_recalls() -> None:
    rng = np.random.default_rng(2)
    for _ in range(DRAWS):
        classes, count = int(rng.integers(2, 7)), int(rng.integers(1, 40))
        outputs, targets = torch.randn(count, classes), torch.tensor(rng.integers(0, classes, count))
        there = sorted(set(targets.tolist()))
        found = value_of(metrics.by_class(metrics.accuracy, classes), outputs, targets)
        assert list(found) == [f"it.{number}" for number in there]
        assert list(found.values()) == pytest.approx(
            recall_score(targets, outputs.argmax(1), average=None, labels=there)
        )


def test_values_by_class_of_texts_of_errors_and_of_two_classes() -> None:
    outputs = nn.functional.one_hot(torch.tensor([[0, 0, 1], [1, 0, 0]]), 2).float()
    padded = torch.tensor([[0, 1, -100], [1, -100, -100]])
    assert value_of(metrics.by_class(metrics.accuracy, ["no", "yes"]), outputs, padded) == {"it.no": 1.0, "it.yes": 0.5}
    sides = metrics.by_class(metrics.binary_accuracy, 2)
    chances, labels = torch.tensor([0.1, 0.9, 0.2]), torch.tensor([0.0, 1.0, 1.0])
    assert value_of(sides, chances, labels) == {"it.0": 1.0, "it.1": 0.5}
    errors = metrics.by_class(metrics.mean_absolute_error, 2)
    assert errors.lower_is_better
    assert value_of(errors, torch.tensor([0.5, 3.0]), torch.tensor([0.0, 1.0])) == {"it.0": 0.5, "it.1": 2.0}


def test_the_root_is_of_the_mean_over_everyone() -> None:
    outputs, targets = torch.randn(30, 2), torch.randn(30, 2)
    found = value_of(metrics.root_mean_squared_error(), outputs, targets)["it"]
    assert found == pytest.approx(math.sqrt(float(((outputs - targets) ** 2).mean())), rel=1e-6)
    assert value_of(metrics.root_mean_squared_error(), outputs[:, 0], targets[:, 0])["it"] == pytest.approx(
        root_mean_squared_error(targets[:, 0], outputs[:, 0]), rel=1e-6
    )


def test_one_class_alone_has_no_auc_and_nan_is_nan() -> None:
    assert value_of(metrics.roc_auc(), torch.tensor([0.1, 0.9]), torch.ones(2)) == {}
    both = torch.tensor([0.0, 1.0])
    assert math.isnan(value_of(metrics.roc_auc(), torch.tensor([math.nan, 0.9]), both)["it"])
    assert math.isnan(value_of(metrics.f1(2), torch.tensor([[math.nan, 0.9], [1.0, 0.0]]), both.long())["it"])
    by = value_of(metrics.by_class(metrics.accuracy, 2), torch.tensor([[math.nan, 0.9], [0.0, 1.0]]), both.long())
    assert (math.isnan(by["it.0"]), by["it.1"]) == (True, 1.0)  # of that class, and no other


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: metrics.roc_auc(1), "from 2 to 1000 bins"),
        (lambda: metrics.roc_auc()(torch.tensor([0.5, 1.5]), torch.tensor([0.0, 1.0])), "use roc_auc_with_logits"),
        (lambda: metrics.roc_auc()(torch.tensor([0.5]), torch.tensor([2.0])), "the target 2 is not a class"),
        (lambda: metrics.roc_auc()(torch.tensor([0.5]), torch.tensor([0.5])), "whole numbers from 0"),
        (lambda: metrics.roc_auc()(torch.rand(2, 3), torch.zeros(2)), "have 2 and 1 axes"),
        (lambda: metrics.f1(1), "2 or more classes"),
        (lambda: metrics.f1(3)(torch.rand(2, 4), torch.zeros(2).long()), "the model scores 4 classes"),
        (lambda: metrics.by_class(metrics.roc_auc(), 2), "a metric with a single mean"),
        (lambda: metrics.by_class(metrics.accuracy, ["a", "a"]), "each once"),
        (lambda: metrics.by_class(metrics.accuracy, ["a/b"]), "without a slash"),
        (lambda: metrics.by_class(metrics.accuracy, 0), "the number of classes"),
        (
            lambda: metrics.by_class(metrics.accuracy, 2)(torch.rand(1, 3), torch.tensor([2])),
            "the target 2 is not a class",
        ),
        (lambda: task_of(auc=metrics.roc_auc(), **{"auc@roc_auc:n3": metrics.accuracy}), "choose another"),
        (lambda: task_of(**{"a": metrics.by_class(metrics.accuracy, 2), "a.1": metrics.accuracy}), "are called 'a.1'"),
    ],
    ids=range(14),
)
def test_what_cannot_be_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(sumus.TaskError, match=said):
        make()


# ── everywhere by one rule ───────────────────────────────────────────────────────────────────────────────────────────


def task_of(**measured: Any) -> sumus.Task:
    model = lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))  # noqa: E731
    return sumus.Task(model, sumus.losses.binary_cross_entropy_with_logits, measured)


def person(number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    inputs = rng.normal(size=(8 + number, 3)).astype(np.float32)
    return inputs, (inputs.sum(1) + rng.normal(size=len(inputs)) > 0).astype(np.float32)


TASK = task_of(
    auc=metrics.roc_auc_with_logits(),
    side=metrics.by_class(metrics.binary_accuracy_with_logits, ["no", "yes"]),
    rms=metrics.root_mean_squared_error(),
    **{"recall@5": metrics.binary_accuracy_with_logits},
)
NAMES = {"loss", "auc", "side.no", "side.yes", "rms", "recall@5"}
PEOPLE = sumus.Population(range(9), person)


def over_the_wire() -> tuple[RunningSum, Any]:
    """What nine devices report of their own examples, through bytes."""
    training = Training(TASK, person(0))
    plan = sumus.Plan(TASK, sumus.fedavg(sumus.sgd(0.1)), sumus.Pacing(9)).with_data(training.description.data)
    plan = sumus.Plan.from_json(plan.to_json())  # a server has no more of the task
    hop, total = evaluation_hop(plan.description, 9), RunningSum()
    broadcast = plan.algorithm.start(training.program.initial_shared, plan.description).broadcast
    for number in PEOPLE:
        job = DeviceJob(number, training.read(number, person(number)), 0, b"", lambda *words: b"")
        done = training.evaluate(plan, broadcast, job)
        update = decode_report(done.report, number, hop)
        check_measured(update, trains=False)
        hop.count_in(update, into=total)
    check_sum_measured(total.total, hop, "edge", 0)
    return total, hop


def test_a_server_makes_the_figures_of_a_simulation() -> None:
    history = sumus.simulate(
        TASK, sumus.fedavg(sumus.sgd(0.1)), PEOPLE, 1, evaluate=sumus.Evaluation(seen=9, first=True, best="auc")
    )
    assert history.start is not None
    total, hop = over_the_wire()
    means, histograms = evaluation_of(total.total, hop)
    here = history.start.metrics
    assert set(means) == set(here) == set(histograms) == NAMES
    for name in NAMES - {"loss", "rms"}:  # whole numbers: the same bits
        assert means[name] == here[name]
    assert means["rms"] == pytest.approx(here["rms"], abs=1e-5)  # in steps of 2^−20
    assert all(sum(bins) <= 9 for bins in histograms.values())
    low, high = medians_of(histograms, hop)["auc"]
    assert (low or 0.0) <= history.start.evaluation.spreads["seen"]["auc"].median <= (high or 1.0)


def test_a_run_with_them_is_the_same_run() -> None:
    """Processes, and the wire; a target and the best model may name a figure."""
    algorithm = sumus.fedavg(sumus.sgd(0.3))
    evaluate = sumus.Evaluation(unseen=PEOPLE.subset([7, 8]), best="auc", target={"auc": 0.8, "rms": 5.0})
    options: dict[str, Any] = {"pacing": sumus.Pacing(4), "executor": "autograd", "evaluate": evaluate}
    runs = [
        simulated(TASK, algorithm, PEOPLE.without([7, 8]), 6, **options, **more)
        for more in ({}, {"workers": 2}, {"through": "wire"})
    ]
    assert len({(run.stopped, len(run.rounds)) for run in runs}) == 1
    for run in runs:
        assert run.metrics == runs[0].metrics
        assert set(run.metrics) == NAMES
        assert run.spreads["unseen"]["rms"].worst >= run.spreads["unseen"]["rms"].mean  # an error: the highest is worst


def test_a_target_that_is_a_sum_of_a_figure_is_not_measured() -> None:
    with pytest.raises(
        sumus.ExperimentError, match=r"not measured; give one of loss, auc, side.no, side.yes, rms, recall@5"
    ):
        sumus.simulate(
            TASK,
            sumus.fedavg(sumus.sgd(0.1)),
            PEOPLE,
            1,
            evaluate=sumus.Evaluation(seen=2, target={"auc@roc_auc:n0": 1.0}),
        )


# ── what a device claims ─────────────────────────────────────────────────────────────────────────────────────────────


def measured_by(number: int) -> dict[str, tuple[float, int]]:
    program = Program(TASK)
    return program.evaluate(*map(torch.from_numpy, person(number)))


@pytest.mark.parametrize(
    "lie",
    [
        lambda own: own | {"auc@roc_auc:p99": (8.0, 8), "auc@roc_auc:p98": (8.0, 8)},  # each prediction in two bins
        lambda own: own | {"auc@roc_auc:p99": (1.0, 900)},  # another count
        lambda own: {
            name: (float(count), count) if "@roc" in name else (total, count) for name, (total, count) in own.items()
        },
    ],
    ids=["twice", "count", "everywhere"],
)
def test_sums_that_no_predictions_add_up_to_are_refused(lie: Any) -> None:
    own = measured_by(0)
    check_measured(evaluation_report("ada", own, 8), trains=False)
    with pytest.raises(BeyondBoundError, match="the sums of 'auc'"):
        check_measured(evaluation_report("ada", lie(own), 8), trains=False)
    with pytest.raises(BeyondBoundError, match="the sums of 'auc'"):
        figures.check_slots("edge", lie(own))


def test_a_share_outside_of_its_range_is_refused() -> None:
    hop = evaluation_hop(dataclasses.replace(TASK.description), 9)
    own = measured_by(0) | {"auc@roc_auc:p99": (-3.0, 8)}
    with pytest.raises(BeyondBoundError, match="on every client it must be from 0 to 1"):
        hop.check(evaluation_report("ada", own, 8))


def test_a_metric_of_another_kind_is_a_plain_metric() -> None:
    assert figures.figure_names(["recall@5", "a@b:c", "auc@roc_auc:n0", "auc@roc_auc:p0"]) == (
        "recall@5",
        "a@b:c",
        "auc",
    )
    assert figures.figures({"a@b:c": 0.5}) == {"a@b:c": 0.5}
    assert isinstance(metrics.roc_auc(), SeveralSums)
