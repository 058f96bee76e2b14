"""What a client does: the local rules against torch's own optimizers, gradient clipping, and which rows make a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sumus
from sumus.errors import PlanError
from sumus.work import ClientWork, LocalRun, apply_gradients, clip_gradients

STEPS = 6
SHAPES = {"w": (3, 2), "b": (2,)}

Optimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
RULES: dict[str, tuple[ClientWork, Optimizer]] = {
    "sgd": (sumus.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "sgd with decay": (sumus.sgd(0.1, weight_decay=0.03), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.03)),
    "momentum": (sumus.sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "momentum with decay": (
        sumus.sgd(0.1, momentum=0.7, weight_decay=0.03),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.7, weight_decay=0.03),
    ),
    "nesterov": (
        sumus.sgd(0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    ),
    "nesterov with decay": (
        sumus.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.03),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.03),
    ),
    "adam": (sumus.adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    "adam with decay": (
        sumus.adam(0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.05),
        lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.99), 1e-6, weight_decay=0.05),
    ),
    "adamw": (sumus.adamw(0.01), lambda p: torch.optim.AdamW(p, 0.01)),
    "adamw with decay": (
        sumus.adamw(0.01, weight_decay=0.2),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.2),
    ),
}


def trees(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(count)]


def by_our_rule(
    work: ClientWork, params: Mapping[str, Any], gradients: list[dict[str, Any]], lr: float
) -> list[dict[str, Any]]:
    """The parameters after each step."""
    states = {name: work.optimizer.init(param) for name, param in params.items()}
    path: list[dict[str, Any]] = []
    for number, grads in enumerate(gradients, 1):
        params, states = apply_gradients(work, params, grads, states, {"params": params}, {}, lr, number)
        path.append(params)
    return path


def by_torch(make: Optimizer, params: Mapping[str, np.ndarray], gradients: list[dict[str, np.ndarray]]) -> list[Any]:
    leaves = {name: torch.tensor(param) for name, param in params.items()}
    optimizer = make(list(leaves.values()))
    path: list[Any] = []
    for grads in gradients:
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(grads[name])
        optimizer.step()
        path.append({name: leaf.numpy().copy() for name, leaf in leaves.items()})
    return path


# ── the rules ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", RULES)
def test_a_rule_takes_the_steps_that_torch_takes(name: str) -> None:
    work, make = RULES[name]
    params, *gradients = trees(1 + STEPS)
    ours, theirs = by_our_rule(work, params, gradients, work.lr.at(0)), by_torch(make, params, gradients)
    for step, (own, torchs) in enumerate(zip(ours, theirs, strict=True), 1):
        for leaf in SHAPES:
            np.testing.assert_allclose(
                own[leaf], torchs[leaf], rtol=1e-13, atol=1e-15, err_msg=f"step {step} of {leaf}"
            )


@pytest.mark.parametrize("name", RULES)
def test_numpy_and_torch_arrays_take_the_same_steps(name: str) -> None:
    work, _ = RULES[name]
    params, *gradients = trees(1 + STEPS)
    tensors = [{leaf: torch.tensor(value) for leaf, value in tree.items()} for tree in (params, *gradients)]
    by_numpy = by_our_rule(work, params, gradients, work.lr.at(0))[-1]
    by_tensors = by_our_rule(work, tensors[0], tensors[1:], work.lr.at(0))[-1]
    for leaf in SHAPES:
        np.testing.assert_allclose(by_numpy[leaf], by_tensors[leaf].numpy(), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_changes_none_of_its_arguments(name: str) -> None:
    work, _ = RULES[name]
    params, grads = trees(2)
    states = {leaf: work.optimizer.init(param) for leaf, param in params.items()}
    before = [value.copy() for leaf in SHAPES for value in (params[leaf], grads[leaf], *states[leaf])]
    apply_gradients(work, params, grads, states, {"params": params}, {}, 0.1, 1)
    after = [value for leaf in SHAPES for value in (params[leaf], grads[leaf], *states[leaf])]
    assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))


def test_momentum_starts_afresh_from_zero() -> None:
    rule = sumus.sgd(0.1, momentum=0.9).optimizer
    assert [slot.tolist() for slot in rule.init(np.array([1.0, 2.0]))] == [[0.0, 0.0]]
    assert sumus.sgd(0.1).optimizer.init(np.array([1.0])) == ()


def test_what_is_sent_is_the_broadcast_minus_the_trained() -> None:
    base, trained = trees(2)
    parts, state = sumus.sgd(0.1).rules.finish({"params": base}, trained, {}, LocalRun(steps=1, lr=0.1, examples=5))
    assert np.array_equal(parts["params"]["w"], base["w"] - trained["w"])
    assert state == {}


def test_a_correction_sees_the_shared_leaves_and_never_the_personal_ones() -> None:
    """FedProx as a correction: the personal leaf `b` has no broadcast value to be pulled to."""

    def pull(grads: Any, params: Any, broadcast: Any, state: Any) -> Any:
        return {name: grad + (params[name] - broadcast["params"][name]) for name, grad in grads.items()}

    work = dataclasses.replace(sumus.sgd(1.0), rules=sumus.ClientRules(correct=pull))
    base, params, grads = trees(3)
    states = dict.fromkeys(SHAPES, ())
    moved, _ = apply_gradients(work, params, grads, states, {"params": {"w": base["w"]}}, {}, 1.0, 1)
    np.testing.assert_allclose(moved["w"], base["w"] - grads["w"], atol=1e-15)
    np.testing.assert_allclose(moved["b"], params["b"] - grads["b"], atol=1e-15)


def test_gradients_are_clipped_before_weight_decay_as_torch_users_do() -> None:
    work = sumus.sgd(0.1, weight_decay=0.5, clip_norm=1e-3)
    params, grads = trees(2)
    moved = by_our_rule(work, params, [grads], 0.1)[0]
    clipped = clip_gradients(grads, 1e-3)
    np.testing.assert_allclose(moved["w"], params["w"] - 0.1 * (clipped["w"] + 0.5 * params["w"]), rtol=1e-14)


# ── clipping a step's gradient ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 2.5])
def test_clipping_scales_as_torch_does(max_norm: float) -> None:
    """torch divides by norm + 1e-6 where we divide by the norm, hence the tolerance."""
    (grads,) = trees(1)
    leaves = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = torch.tensor(grad)
    torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    clipped = clip_gradients(grads, max_norm)
    for leaf, own in zip(leaves, clipped.values(), strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(own, leaf.grad.numpy(), rtol=2e-6)


@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), st.floats(1e-3, 1e3))
def test_the_clipped_norm_is_the_smaller_of_norm_and_bound(values: list[float], max_norm: float) -> None:
    grads = {"a": np.array(values[:2]), "b": np.array(values[2:])}
    before = float(np.linalg.norm(values))
    for make in (np.asarray, torch.tensor):
        clipped = clip_gradients({name: make(grad) for name, grad in grads.items()}, max_norm)
        after = float(np.linalg.norm(np.concatenate([np.asarray(grad) for grad in clipped.values()])))
        assert after == pytest.approx(min(before, max_norm), rel=1e-12, abs=1e-150)


def test_gradients_within_the_bound_are_bit_for_bit_the_same() -> None:
    (grads,) = trees(1)
    clipped = clip_gradients(grads, 100.0)
    assert all(np.array_equal(clipped[name], grads[name]) for name in grads)


def test_zero_gradients_stay_zero() -> None:
    assert clip_gradients({"w": np.zeros(3)}, 1.0)["w"].tolist() == [0.0, 0.0, 0.0]


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def batches(work: ClientWork, examples: int, seed: int = 0) -> list[Any]:
    return list(work.batches(examples, np.random.default_rng(seed)))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3))
def test_each_epoch_visits_every_example_once(examples: int, batch_size: int, epochs: int) -> None:
    work = sumus.sgd(0.1, epochs=epochs, batch_size=batch_size)
    rows = [np.arange(examples)[batch] for batch in batches(work, examples)]
    per_epoch = -(-examples // min(batch_size, examples))
    assert len(rows) == epochs * per_epoch
    for epoch in range(epochs):
        visited = np.concatenate(rows[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(visited.tolist()) == list(range(examples))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 30))
def test_steps_gives_exactly_that_many_batches_over_fresh_shuffles(examples: int, batch_size: int, steps: int) -> None:
    rows = [np.arange(examples)[b] for b in batches(sumus.sgd(0.1, steps=steps, batch_size=batch_size), examples)]
    assert len(rows) == steps
    per_epoch = -(-examples // min(batch_size, examples))
    for start in range(0, steps - per_epoch + 1, per_epoch):
        assert sorted(np.concatenate(rows[start : start + per_epoch]).tolist()) == list(range(examples))


def test_only_the_last_batch_of_an_epoch_is_short() -> None:
    sizes = [len(batch) for batch in batches(sumus.sgd(0.1, epochs=2, batch_size=4), 10)]
    assert sizes == [4, 4, 2, 4, 4, 2]


def test_a_client_with_fewer_examples_than_a_batch_gives_one_whole_batch() -> None:
    for work in (sumus.sgd(0.1, epochs=3), sumus.sgd(0.1, steps=3), sumus.sgd(0.1, steps=3, batch_size=7)):
        assert batches(work, 7) == [slice(None)] * 3


def test_epochs_are_shuffled_apart_and_alike_for_the_same_randomness() -> None:
    work = sumus.sgd(0.1, epochs=2, batch_size=20)
    first, second = (np.concatenate(batches(work, 60)[i : i + 3]) for i in (0, 3))
    assert first.tolist() != second.tolist() != list(range(60))
    assert all(np.array_equal(a, b) for a, b in zip(batches(work, 60, 5), batches(work, 60, 5), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(batches(work, 60, 5), batches(work, 60, 6), strict=True))


def test_one_epoch_is_the_default() -> None:
    default, one = sumus.sgd(0.1, batch_size=3), sumus.sgd(0.1, batch_size=3, epochs=1)
    assert (default.epochs, default.steps) == (None, None)
    assert [b.tolist() for b in batches(default, 10)] == [b.tolist() for b in batches(one, 10)]
    assert len(batches(sumus.sgd(0.1, steps=5), 10)) == 5


@given(st.integers(1, 40), st.integers(1, 12), st.one_of(st.none(), st.integers(1, 3)), st.integers(1, 30))
def test_steps_are_known_beforehand(examples: int, batch_size: int, epochs: int | None, steps: int) -> None:
    """FedNova and schedules of time need their number without drawing batches."""
    for work in (sumus.sgd(0.1, epochs=epochs, batch_size=batch_size), sumus.sgd(0.1, steps=steps)):
        assert work.step_count(examples) == len(batches(work, examples))
    assert sumus.sgd(0.1, epochs=epochs, batch_size=batch_size).step_count(examples) == (epochs or 1) * -(
        -examples // batch_size
    )


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_epochs_and_steps_together_are_refused() -> None:
    with pytest.raises(PlanError) as error:
        sumus.sgd(0.1, epochs=1, steps=1)
    assert error.value.rule == "epochs-or-steps"


def test_epochs_and_steps_together_are_refused_in_a_changed_work_too() -> None:
    with pytest.raises(PlanError) as error:
        dataclasses.replace(sumus.sgd(0.1, epochs=2), steps=3)
    assert error.value.rule == "epochs-or-steps"


@pytest.mark.parametrize("name", ["epochs", "steps", "batch_size", "clip_norm"])
@pytest.mark.parametrize("value", [0, -1])
def test_what_is_not_positive_is_refused_by_its_name(name: str, value: int) -> None:
    with pytest.raises(PlanError, match=f"{name}={value}") as error:
        sumus.sgd(0.1, **{name: value})  # pyright: ignore[reportArgumentType]
    assert error.value.rule == "positive"


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(PlanError, match="momentum"):
        sumus.sgd(0.1, nesterov=True)
