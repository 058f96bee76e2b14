"""What `check` proposes makes a plan legal for devices, and leaves nearly all of the examples' updates alone."""

import re
from typing import Any

import numpy as np
import pytest
from torch import nn

import sumus
from sumus.simulator.check import Updates

WORK, CLIENTS = sumus.sgd(lr=0.1, epochs=2), 12


def person(client: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(client)
    inputs = rng.normal(1.0, 2.0, size=(20, 4)).astype(np.float32)
    return inputs, (inputs.sum(1) > 4).astype(np.int64)


PEOPLE = {client: person(client) for client in range(CLIENTS)}


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def plan(model: Any, algorithm: sumus.Algorithm) -> sumus.Plan:
    data = sumus.Data((4,), "float32", (), "int64", classes=2)
    return sumus.Plan(sumus.Task(model, sumus.losses.cross_entropy, data=data), algorithm, sumus.Pacing(10))


def proposed(made: sumus.Plan) -> dict[str, float]:
    """Each number that `check` proposes, by what takes it."""
    said = sumus.check(made, PEOPLE).updates.proposal()
    return {name: float(number) for name, number in re.findall(r"(\w+)(?:\(|=)([0-9.e+-]+)\)", said)}


@pytest.mark.parametrize("which", ["clip_buffers", "control_bound"])
def test_the_proposed_bounds_are_legal_and_change_no_update_of_the_examples(which: str) -> None:
    if which == "clip_buffers":
        first = plan(normed, sumus.fedavg(WORK, weight="uniform"))
        found = proposed(first)
        chained = sumus.chain(
            sumus.clip_by_global_norm(2 * found["clip_by_global_norm"]), sumus.clip_buffers(found[which])
        )
        bounded = plan(normed, sumus.fedavg(WORK, chained, weight="uniform"))
    else:
        first = plan(plain, sumus.scaffold(WORK))
        found = proposed(first)
        clip = sumus.clip_by_global_norm(2 * found["clip_by_global_norm"])
        bounded = plan(plain, sumus.scaffold(WORK, clip, control_bound=found[which]))
    assert "trusts-devices" in dict(first.violations("deployed"))
    assert dict(bounded.for_devices().violations("deployed")) == {}
    free, held = (
        sumus.simulate(made.task, made.algorithm, PEOPLE, rounds=8, pacing=made.pacing).model
        for made in (first, bounded)
    )
    for name, leaf in free.items():
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(held[name]), atol=1e-6, err_msg=name)


def test_a_proposal_names_nothing_beside_the_chain_where_nothing_is_open() -> None:
    assert set(proposed(plan(plain, sumus.fedavg(WORK)))) == {"clip_by_global_norm"}
    assert "control" not in proposed(plan(plain, sumus.scaffold(WORK, control_bound=0.5)))


@pytest.mark.parametrize(("bound", "small"), [(40.0, True), (0.1, False), (None, False)])
def test_it_says_when_one_device_can_take_the_smallest_variance(bound: float | None, small: bool) -> None:
    update = None if bound is None else sumus.clip_buffers(bound)
    made = plan(normed, sumus.fedavg(WORK, update, weight="uniform"))
    updates = sumus.check(made, PEOPLE).updates
    assert updates.variance is not None
    assert 0.01 < updates.variance < 4.0
    assert updates.variance_move == pytest.approx((bound or proposed(made)["clip_buffers"]) / 10)
    assert (updates.variance_move > updates.variance) is small
    assert ("one dishonest device can change a variance by" in updates.proposal()) is small


def test_a_model_without_variances_is_told_nothing_of_them() -> None:
    assert sumus.check(plan(plain, sumus.fedavg(WORK)), PEOPLE).updates.variance is None


def test_a_part_of_ones_own_is_proposed_as_a_bound_of_its_part() -> None:
    said = Updates((1.0,), (5,), {"slope": (0.5, 3.0)}).proposal()
    assert (
        "the largest number in `slope` is 0.5 to 3: Part('slope', bound=6) leaves numbers up to 2 times as large unchanged"
        in said
    )
