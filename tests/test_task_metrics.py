"""Figures: metrics and losses of the right shapes are right, and what has the right number of elements alone is refused."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sumus
from sumus import losses, metrics
from sumus.simulator.records import RoundRecord

LOGITS = losses.binary_cross_entropy_with_logits
EQUAL = [metrics.mean_absolute_error, metrics.mean_squared_error, losses.mean_squared_error]


@pytest.mark.parametrize("function", EQUAL)
@pytest.mark.parametrize(
    ("outputs", "targets", "said"),
    [
        ((4, 3, 5), (4, 5, 3), r"differ in axis 1 \(3 and 5\), and hold the same axes in another order"),
        ((4, 6), (4, 2, 3), "have 2 and 3 axes"),
        ((4, 2, 3), (4, 3, 2), "another order"),
        ((4, 1, 2, 3), (4, 3, 2), "have 4 and 3 axes"),
        ((2, 6), (6, 2), r"differ in axis 0 \(2 and 6\)"),
        ((1, 4), (4,), "have 2 and 1 axes"),
    ],
)
def test_as_many_elements_are_not_enough(
    function: Callable[[Any, Any], Any], outputs: Any, targets: Any, said: str
) -> None:
    with pytest.raises(sumus.TaskError, match=said):
        function(torch.rand(outputs), torch.rand(targets))


@pytest.mark.parametrize("function", EQUAL)
def test_an_axis_of_length_one_may_be_left_out(function: Callable[[Any, Any], Any]) -> None:
    one, other = torch.rand(4, 3), torch.rand(4, 3)
    wanted = function(one, other)
    for outputs, targets in ((one[..., None], other), (one, other[:, None]), (one[:, None], other[..., None])):
        assert torch.equal(function(outputs, targets), wanted)


CLASSES = [losses.cross_entropy, metrics.accuracy, metrics.top_k_accuracy(2)]


@pytest.mark.parametrize("function", CLASSES)
@pytest.mark.parametrize(
    ("outputs", "targets", "said"),
    [
        ((4, 1), (4,), "hold one score per prediction"),
        ((4, 7, 1), (4, 7), "hold one score per prediction"),
        ((4,), (4,), "have no axis of classes"),
        ((4, 5, 6), (4, 6), r"need targets \(4, 5\), but the targets are \(4, 6\).* use \w+_along\(1\)"),
        ((4, 5, 5), (4, 5), r"with the classes on axis 1 and on axis 2: choose one, by \w+_along\(1\) or"),
        ((4, 6, 2, 3), (4, 3, 2), r"need targets \(4, 6, 2\)"),
        ((4, 3, 2, 5), (4, 2, 3), "another order"),
        ((6, 3), (3,), "differ in axis 0"),
    ],
)
def test_scores_have_their_classes_on_one_known_axis(
    function: Callable[[Any, Any], Any], outputs: Any, targets: Any, said: str
) -> None:
    with pytest.raises(sumus.TaskError, match=said):
        function(torch.rand(outputs), torch.zeros(targets, dtype=torch.int64))


def test_classes_on_the_axis_that_is_said_are_right() -> None:
    """Also where both would fit: as many classes as steps."""
    targets = torch.arange(20).reshape(4, 5) % 5
    perfect = 9 * nn.functional.one_hot(targets, 5).float()
    for axis, outputs in ((-1, perfect), (1, perfect.movedim(-1, 1)), (2, perfect)):
        hits, counts = metrics.accuracy_along(axis)(outputs, targets)
        assert (hits.tolist(), counts.tolist()) == ([5.0] * 4, [5] * 4)
        torch.testing.assert_close(
            losses.cross_entropy_along(axis)(outputs, targets),
            nn.functional.cross_entropy(perfect.movedim(-1, 1), targets, reduction="none").mean(1),
        )
    with pytest.raises(sumus.TaskError, match="no axis 0"):
        metrics.accuracy_along(0)(perfect, targets)
    with pytest.raises(sumus.TaskError, match="no axis 3"):
        losses.cross_entropy_along(3)(perfect, targets)


def test_a_loss_with_its_classes_second_trains_and_knows_its_classes() -> None:
    x = np.random.default_rng(0).normal(size=(8, 3, 6)).astype("f4")
    task = sumus.Task(
        lambda: nn.Conv1d(3, 4, 1), losses.cross_entropy_along(1), {"accuracy": metrics.accuracy_along(1)}
    )
    people = {k: (x, np.abs(x).argmax(1)) for k in range(2)}
    runs = [
        sumus.simulate(
            task, sumus.fedavg(sumus.sgd(lr=0.1)), people, 2, evaluate=sumus.Evaluation(seen=2), compute=executor
        )
        for executor in ("autograd", "sequential")
    ]
    assert runs[0].metrics["loss"] == pytest.approx(runs[1].metrics["loss"], rel=1e-5)
    people[1] = (x, np.full((8, 6), 4))
    with pytest.raises(sumus.DataError, match="label 4 of example 0 is out of range: the model has 4 classes"):
        sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=0.1)), people, 1)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_top_k_needs_as_many_classes(k: int) -> None:
    with pytest.raises(sumus.SumusError, match="k"):
        metrics.top_k_accuracy(k)(torch.rand(2, 3), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("targets", [torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.5, 1.0])])
def test_targets_that_are_no_class_are_no_miss(targets: torch.Tensor) -> None:
    with pytest.raises(sumus.TaskError, match="is not a class|classes are whole numbers"):
        metrics.accuracy(torch.rand(2, 3), targets)


def test_scores_before_a_sigmoid_are_not_cut_at_one_half() -> None:
    scores, targets = torch.tensor([0.2, -3.0, 0.4, 2.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert metrics.binary_accuracy_with_logits(scores, targets).tolist() == [1.0] * 4
    assert metrics.binary_accuracy(scores.sigmoid(), targets).tolist() == [1.0] * 4
    with pytest.raises(sumus.TaskError, match="from -3 to 2: use binary_accuracy_with_logits"):
        metrics.binary_accuracy(scores, targets)
    with pytest.raises(sumus.TaskError, match="metric 'right' .* use sumus.metrics.binary_accuracy_with_logits"):
        sumus.Task(nn.Identity, LOGITS, {"right": metrics.binary_accuracy})
    for loss in (nn.BCEWithLogitsLoss(reduction="none"), nn.functional.binary_cross_entropy_with_logits):
        with pytest.raises(sumus.TaskError, match="use sumus.metrics.binary_accuracy_with_logits"):
            sumus.Task(nn.Identity, loss, {"right": metrics.binary_accuracy})
    sumus.Task(nn.Identity, losses.binary_cross_entropy, {"right": metrics.binary_accuracy})
    sumus.Task(nn.Identity, LOGITS, {"right": metrics.binary_accuracy_with_logits})


@pytest.mark.parametrize("metric", [metrics.binary_accuracy, metrics.binary_accuracy_with_logits])
@pytest.mark.parametrize("targets", [[-1.0, 1.0], [1.0, 2.0], [-100.0, 1.0], [math.nan, 0.0]])
def test_targets_of_two_classes_are_zero_and_one(metric: Callable[[Any, Any], Any], targets: list[float]) -> None:
    with pytest.raises(sumus.TaskError, match="targets of two classes must be 0 and 1"):
        metric(torch.tensor([0.2, 0.7]), torch.tensor(targets))


@pytest.mark.parametrize("loss", [LOGITS, losses.binary_cross_entropy])
def test_targets_beyond_a_loss_of_two_classes_name_client_and_example(loss: Callable[[Any, Any], Any]) -> None:
    people = {"a": (np.zeros((3, 2), "f4"), np.array([[0], [1], [-1]], "f4"))}
    task = sumus.Task(lambda: nn.Sequential(nn.Linear(2, 1), nn.Sigmoid()), loss)
    with pytest.raises(sumus.DataError, match="client 'a': the target -1 of example 2 is out of range: the loss takes"):
        sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=0.1)), people, 1)


def test_a_score_that_is_nan_is_neither_hit_nor_miss() -> None:
    scores, targets = torch.tensor([[0.0, math.nan], [0.1, 0.2]]), torch.tensor([1, 1])
    for metric in (metrics.accuracy, metrics.top_k_accuracy(2)):
        hits, counts = metric(scores, targets)
        assert math.isnan(hits[0])
        assert (hits[1], counts.tolist()) == (1.0, [1, 1])
    for metric in (metrics.binary_accuracy, metrics.binary_accuracy_with_logits, metrics.mean_absolute_error):
        values = metric(torch.tensor([math.nan, 0.9]), torch.tensor([0.0, 1.0]))
        assert math.isnan(values[0])
        assert not math.isnan(values[1])


def test_large_whole_numbers_are_not_rounded_before_they_are_compared() -> None:
    outputs, targets = torch.tensor([2**24 + 1, 3]), torch.tensor([2**24, 5])
    assert metrics.mean_absolute_error(outputs, targets).tolist() == [1.0, 2.0]
    assert metrics.mean_absolute_error(outputs.to(torch.uint8), targets.to(torch.uint8)).tolist() == [1.0, 2.0]
    with pytest.raises(sumus.TaskError, match="complex"):
        metrics.mean_squared_error(torch.zeros(2, dtype=torch.complex64), torch.zeros(2))


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", RoundRecord(1, 0, 0, 0.0).to_json())
def test_no_metric_takes_the_place_of_a_record_s_own_field(name: str) -> None:
    with pytest.raises(sumus.TaskError, match=f"a metric cannot be called '{name}'"):
        sumus.Task(nn.Identity, losses.mean_squared_error, {name: metrics.mean_absolute_error})


@pytest.mark.parametrize(
    "name", ["", " ", 7, None, "seen/accuracy", "accuracy/median", "a\nb", "index", "client", "rounds"]
)
def test_other_names_that_no_metric_can_have(name: Any) -> None:
    with pytest.raises(sumus.TaskError, match="metric"):
        sumus.Task(nn.Identity, losses.mean_squared_error, {name: metrics.mean_absolute_error})


def test_a_metric_is_a_function() -> None:
    with pytest.raises(sumus.TaskError, match="metric 'accuracy' takes a function"):
        sumus.Task(nn.Identity, losses.mean_squared_error, {"accuracy": 0.5})  # pyright: ignore[reportArgumentType]


# ── spread ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lower", [False, True])
def test_nan_is_the_worst_of_a_spread(lower: bool) -> None:
    """Worse than infinity, wherever it stands; the median is the client's in the middle."""
    values = [0.5, math.nan, 0.25, math.inf if lower else -math.inf, 0.75]
    spread = sumus.Spread.over(list("abcde"), values, lower)
    assert (spread.worst_client, spread.clients) == ("b", 5)
    assert all(map(math.isnan, (spread.worst, spread.mean, spread.worst_decile, spread.deviation)))
    assert spread.median == (0.75 if lower else 0.25)
    plain = sumus.Spread.over(list("abcd"), [0.5, 0.1, 0.9, 0.3], lower)
    assert (plain.median, plain.worst_client) == (pytest.approx(0.4), "c" if lower else "b")
