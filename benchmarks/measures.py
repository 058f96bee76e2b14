"""Metrics and losses against torchmetrics, scikit-learn and float64: equal, or refused.

    python -m benchmarks.measures            10,000 draws
    python -m benchmarks.measures --seed 7   one draw, with its details

A draw is a metric or a loss on outputs and targets of random shapes and dtypes. They are cut into random batches, as
the clients of an evaluation would cut them, and examples have integer weights. Some draws have a shape that the
function does not take, a target that is no class, a probability beyond 1, or a NaN. These must be refused, or give NaN.
If torchmetrics is not installed, scikit-learn and float64 are the references.
"""

import argparse
import importlib
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import metrics as sklearn_metrics

from sumus import losses, metrics
from sumus.errors import TaskError
from sumus.metrics import IGNORED

FAULTS = ("none", "none", "none", "none", "axes", "one column", "no class", "nan")
CLASSES = ("accuracy", "accuracy along 1", "top k", "cross entropy", "cross entropy along 1")
TWO = ("binary accuracy", "binary accuracy with logits", "binary cross entropy", "binary cross entropy with logits")
NUMBERS = ("mean absolute error", "mean squared error", "squared loss")
Numbers = NDArray[Any]


@dataclass
class Draw:
    """One comparison.

    Attributes:
        name: The function.
        outputs: Scores with the classes last, probabilities, or numbers, float64.
        targets: Targets as the function takes them.
        weights: Integer weights, one for each example.
        k: The k of top k.
        fault: What is wrong with it.
        dtype: The dtype of the outputs.
        batches: Where the batches begin and end.
    """

    name: str
    outputs: Numbers
    targets: Numbers
    weights: Numbers
    k: int
    fault: str
    dtype: torch.dtype
    batches: list[int]


def drawn(seed: int) -> Draw:
    """Return the draw of a seed."""
    rng = np.random.default_rng(seed)
    name = str(rng.choice([*CLASSES, *TWO, *NUMBERS]))
    rows, steps = int(rng.integers(2, 30)), tuple(rng.integers(1, 5, int(rng.integers(0, 3))).tolist())
    if "along" in name and not steps:
        steps = (int(rng.integers(1, 5)),)
    classes = int(rng.integers(2, 8))
    if name in CLASSES and "along" not in name and len(steps) > 0 and steps[0] == classes:
        classes += 5  # otherwise it is rightly refused: the classes could be on either axis
    dtype = [torch.float32, torch.float64][int(rng.integers(2))]
    if name in CLASSES:
        outputs = rng.normal(size=(rows, *steps, classes)) * 3
        targets = rng.integers(0, classes, (rows, *steps))
        targets[rng.random(targets.shape) < 0.1] = IGNORED
    else:
        outputs = rng.normal(size=(rows, *steps)) * 3
        if name in TWO:
            outputs = outputs if "logits" in name else 1 / (1 + np.exp(-outputs))
            targets = rng.integers(0, 2, outputs.shape).astype(float)
        else:
            targets = rng.normal(size=outputs.shape)
    cuts = np.unique(rng.integers(1, rows, 3)).tolist()
    return Draw(name, outputs, targets, rng.integers(1, 5, rows), int(rng.integers(1, classes + 1)), str(rng.choice(FAULTS)),
                dtype, [0, *cuts, rows])  # fmt: skip


def function_of(draw: Draw) -> Callable[[Any, Any], Any]:
    """Return sumus's function for a draw."""
    return {
        "accuracy": metrics.accuracy,
        "accuracy along 1": metrics.accuracy_along(1),
        "top k": metrics.top_k_accuracy(draw.k),
        "cross entropy": losses.cross_entropy,
        "cross entropy along 1": losses.cross_entropy_along(1),
        "binary accuracy": metrics.binary_accuracy,
        "binary accuracy with logits": metrics.binary_accuracy_with_logits,
        "binary cross entropy": losses.binary_cross_entropy,
        "binary cross entropy with logits": losses.binary_cross_entropy_with_logits,
        "mean absolute error": metrics.mean_absolute_error,
        "mean squared error": metrics.mean_squared_error,
        "squared loss": losses.mean_squared_error,
    }[draw.name]


def measured(draw: Draw, outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return sumus's result: sums and counts of the batches, added up, with each example repeated by its weight."""
    function, total, count = function_of(draw), 0.0, 0
    for begin, end in zip(draw.batches, draw.batches[1:], strict=False):
        value = function(outputs[begin:end], targets[begin:end])
        weights = torch.from_numpy(draw.weights[begin:end])
        sums, counts = value if isinstance(value, tuple) else (value, torch.ones(end - begin))
        total += float((sums.double() * weights).sum())
        count += int((counts * weights).sum())
    return total / count if count else math.nan


def wanted(draw: Draw) -> dict[str, float]:
    """Return the results of the references, by their names."""
    outputs, targets = _rounded(draw), draw.targets
    spread = np.broadcast_to(draw.weights.reshape(-1, *[1] * (targets.ndim - 1)), targets.shape)
    if draw.name in CLASSES:
        return _of_classes(draw, outputs, spread)
    each = spread.ravel().astype(float)
    flat, true = outputs.ravel(), targets.ravel()
    if "accuracy" in draw.name:
        above = flat > (0.0 if "logits" in draw.name else 0.5)
        found = {"scikit-learn": float(sklearn_metrics.accuracy_score(true > 0.5, above, sample_weight=each))}
        return found | _torchmetrics("accuracy", torch.from_numpy(above), true, spread, task="binary")
    if "entropy" in draw.name:
        chance = 1 / (1 + np.exp(-flat)) if "logits" in draw.name else flat
        both = np.stack([1 - chance, chance], 1)
        return {"scikit-learn": float(sklearn_metrics.log_loss(true, both, sample_weight=each, labels=[0, 1]))}
    absolute = draw.name == "mean absolute error"
    error = sklearn_metrics.mean_absolute_error if absolute else sklearn_metrics.mean_squared_error
    name = "mean_absolute_error" if absolute else "mean_squared_error"
    return {"scikit-learn": float(error(true, flat, sample_weight=each))} | _torchmetrics(
        name, torch.from_numpy(flat), true, spread
    )


def _of_classes(draw: Draw, outputs: Numbers, spread: Numbers) -> dict[str, float]:
    known = draw.targets != IGNORED
    scores, true, each = outputs[known], draw.targets[known], spread[known].astype(float)
    classes = outputs.shape[-1]
    if "entropy" in draw.name:  # averaged over an example, and then over examples
        chance = np.exp(outputs - outputs.max(-1, keepdims=True))
        losses_ = (
            -np.log(np.take_along_axis(chance, draw.targets.clip(0)[..., None], -1)[..., 0] / chance.sum(-1)) * known
        )
        rows = len(outputs)
        own = losses_.reshape(rows, -1).sum(1) / np.maximum(known.reshape(rows, -1).sum(1), 1)
        return {"float64": float(np.average(own, weights=draw.weights))}
    if not len(true):
        return {"nothing is known": math.nan}
    k = draw.k if draw.name == "top k" else 1
    within = (np.argsort(-scores, -1, kind="stable")[:, :k] == true[:, None]).any(1)
    found = {"float64": float(np.average(within, weights=each))}
    if k == 1:
        found["scikit-learn"] = float(sklearn_metrics.accuracy_score(true, scores.argmax(-1), sample_weight=each))
    elif classes > 2 and k < classes:
        found["scikit-learn"] = float(
            sklearn_metrics.top_k_accuracy_score(true, scores, k=k, sample_weight=each, labels=range(classes))
        )
    if k < classes:
        found |= _torchmetrics(
            "accuracy",
            torch.from_numpy(scores),
            true,
            each,
            task="multiclass",
            num_classes=classes,
            top_k=k,
            average="micro",
        )
    return found


def _torchmetrics(
    name: str, outputs: torch.Tensor, targets: Numbers, weights: Numbers, **more: Any
) -> dict[str, float]:
    """Return torchmetrics's result on examples that are repeated by their weights; empty if torchmetrics is not
    installed."""
    if importlib.util.find_spec("torchmetrics") is None:
        return {}
    functional: Any = importlib.import_module("torchmetrics.functional")
    times = torch.from_numpy(np.ascontiguousarray(weights).ravel().astype(np.int64))
    true = torch.from_numpy(np.ascontiguousarray(targets).ravel())
    true = true.long() if "task" in more else true
    said = getattr(functional, name)(outputs.repeat_interleave(times, 0), true.repeat_interleave(times), **more)
    return {"torchmetrics": float(said)}


def _rounded(draw: Draw) -> Numbers:
    """Return the outputs rounded to their dtype, in float64."""
    return torch.from_numpy(draw.outputs).to(draw.dtype).double().numpy()


def tensors(draw: Draw, seed: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the draw as sumus gets it, with its fault; None if the fault is impossible for it."""
    rng = np.random.default_rng(seed + 2**32)
    outputs, targets = torch.from_numpy(draw.outputs).to(draw.dtype), torch.from_numpy(draw.targets)
    if draw.name in NUMBERS and draw.fault == "none" and rng.random() < 0.5:
        outputs = outputs[:, None]  # an axis of length one is none
    targets = targets.to(draw.dtype) if draw.name in TWO else targets
    last = draw.name in CLASSES
    if draw.fault == "axes":
        if targets.dim() < 2 or targets.shape[1] == 1:
            return None
        doubled = torch.cat([targets, targets], 1)
        swapped = doubled.movedim(1, -1)  # twice as many elements, in another order
        targets = swapped if targets.dim() > 2 and swapped.shape != targets.shape else doubled
    if draw.fault == "one column":
        if not last:
            return None
        outputs = outputs[..., :1]
    if draw.fault == "no class":
        if draw.name in NUMBERS or (not last and "entropy" in draw.name):
            return None  # numbers may be of any size; the inputs of losses of two classes are checked earlier
        targets = targets.clone()
        targets[(0,) * targets.dim()] = outputs.shape[-1] if last else -1
        if last and "entropy" in draw.name:
            return None  # torch itself raises
    if draw.fault == "nan":
        outputs = outputs.clone()
        outputs[(0,) * outputs.dim()] = math.nan
        if (last and targets[(0,) * targets.dim()] == IGNORED) or draw.name == "binary cross entropy":
            return None
    return (outputs.movedim(-1, 1) if "along" in draw.name else outputs), targets


def compared(seed: int) -> str:
    """Try one draw, and return "equal", "refused", "nan" or "no draw".

    Raises:
        AssertionError: sumus's result differs from the references.
    """
    draw = drawn(seed)
    given = tensors(draw, seed)
    if given is None:
        return "no draw"
    try:
        found = measured(draw, *given)
    except TaskError:
        assert draw.fault not in ("none", "nan"), f"{draw} is refused"
        return "refused"
    assert draw.fault in ("none", "nan"), (
        f"{draw.name} of {tuple(given[0].shape)} and {tuple(given[1].shape)} gives {found}"
    )
    if draw.fault == "nan":
        assert math.isnan(found), f"{draw} gives {found}"
        return "nan"
    for who, said in wanted(draw).items():
        near = math.isclose(found, said, rel_tol=1e-4 if draw.dtype == torch.float32 else 1e-9, abs_tol=1e-6)
        assert near or (math.isnan(found) and math.isnan(said)), f"{who} says {said}, and sumus {found}: {draw}"
    return "equal"


def main() -> int:
    """Compare all draws. The exit status is 1 if a figure differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--seed", type=int, help="one draw alone")
    args = parser.parse_args()
    if args.seed is not None:
        print(drawn(args.seed))
        print(compared(args.seed))
        return 0
    counts, wrong = Counter[str](), 0
    for seed in range(args.draws):
        try:
            counts[compared(seed)] += 1
        except AssertionError as error:
            wrong += 1
            print(f"seed {seed}: {error}", file=sys.stderr)
    there = importlib.util.find_spec("torchmetrics") is not None
    print(f"{dict(counts)}, {wrong} wrong, torchmetrics {'was' if there else 'was not'} there")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
