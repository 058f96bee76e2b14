"""Rates within a round and by leaf, decay by leaf, and short batches left out: as plain torch does it, everywhere alike."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sumus
from sumus import schedules
from tests.simulating import simulated

COUNT = 22


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def examples(client: int, count: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(client)
    inputs = rng.normal(size=(count, 4)).astype(np.float32)
    return inputs, (inputs.sum(1) > 0).astype(np.int64)


TASK = sumus.Task(net, sumus.losses.cross_entropy)
PEOPLE = sumus.Population(range(4), lambda client: examples(client, 9 + 5 * client))
OF_BEFORE = "15204fb62b42e0275278d5cb7833408ab71f024cab5eae537a7cd62d5150185b"
GROUPS = {"*.bias": {"weight_decay": 0.0}, "2.weight": {"lr_factor": 3.0}}


def by_torch(rate: Any, make: Any, groups: Any) -> dict[str, torch.Tensor]:
    """A client's two full-batch passes of three local steps' rates, by an optimizer of torch with groups of parameters."""
    model, (inputs, targets) = net(), map(torch.from_numpy, examples(0))
    named = dict(model.named_parameters())
    optimizer = make([{"params": [named[name]], **options} for name, options in groups.items()])
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(1, 7):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * rate(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


CASES: dict[str, tuple[Any, Any, Any]] = {
    "sgd": (
        sumus.sgd(schedules.warmup(0.2, 4), steps=6, momentum=0.9, weight_decay=0.1, leaves=GROUPS),
        lambda step: min(1.0, step / 4),
        lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1),
    ),
    "nesterov": (
        sumus.sgd(
            schedules.local_decay(0.2, 0.7), steps=6, momentum=0.9, nesterov=True, weight_decay=0.1, leaves=GROUPS
        ),
        lambda step: 0.7 ** (step - 1),
        lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "adam": (
        sumus.adam(schedules.local_decay(schedules.warmup(0.2, 3), 0.9), steps=6, weight_decay=0.1, leaves=GROUPS),
        lambda step: min(1.0, step / 3) * 0.9 ** (step - 1),
        lambda groups: torch.optim.Adam(groups, weight_decay=0.1),
    ),
    "adamw": (
        sumus.adamw(0.2, steps=6, weight_decay=0.1, leaves=GROUPS),
        lambda step: 1.0,
        lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_torch_does_it_with_groups_of_parameters(name: str) -> None:
    work, rate, make = CASES[name]
    lr = {"0.weight": {"lr": 0.2}, "2.weight": {"lr": 0.6}}
    lr |= {bias: {"lr": 0.2, "weight_decay": 0.0} for bias in ("0.bias", "2.bias")}
    wanted = by_torch(rate, make, lr)
    alone = sumus.simulate(TASK, sumus.fedavg(work), {0: examples(0)}, 1, compute="autograd")
    for leaf, values in wanted.items():
        assert torch.allclose(alone.model[leaf], values, atol=2e-5), leaf


EVERYTHING = sumus.sgd(
    schedules.warmup(0.2, 4), epochs=2, batch_size=5, weight_decay=0.1, drop_last=True, leaves=GROUPS
)


def test_executors_agree_and_the_wire_gives_the_same_bits(tmp_path: Path) -> None:
    def run(rounds: int = 3, **options: Any) -> sumus.History:
        pacing = sumus.Pacing(3)
        return simulated(TASK, sumus.fedavg(EVERYTHING), PEOPLE, rounds, pacing=pacing, **options)

    plain = run(executor="autograd")
    for name in ("sequential", "vectorized:2"):
        other = run(executor=name)
        assert not other.notes
        assert all(torch.allclose(other.model[leaf], plain.model[leaf], atol=1e-5) for leaf in plain.model)
    assert run(executor="autograd", through="wire").model_sha256 == plain.model_sha256
    run(1, executor="autograd", out=tmp_path)
    assert run(executor="autograd", out=tmp_path).model_sha256 == plain.model_sha256


@pytest.mark.parametrize(
    ("examples", "work", "sizes"),
    [
        (22, sumus.sgd(0.1, batch_size=5, epochs=2, drop_last=True), [5] * 8),
        (22, sumus.sgd(0.1, batch_size=5, epochs=2), [5, 5, 5, 5, 2] * 2),
        (22, sumus.sgd(0.1, batch_size=5, steps=6, drop_last=True), [5] * 6),
        (20, sumus.sgd(0.1, batch_size=5, drop_last=True), [5] * 4),
        (3, sumus.sgd(0.1, batch_size=5, epochs=2, drop_last=True), [3, 3]),  # less than one batch: all of it
        (5, sumus.adam(0.1, batch_size=5, drop_last=True), [5]),
        (9, sumus.adamw(0.1, batch_size=5, epochs=3, drop_last=True), [5] * 3),
    ],
)
def test_drop_last_leaves_out_what_fills_no_batch(examples: int, work: sumus.ClientWork, sizes: list[int]) -> None:
    batches = list(work.batches(examples, np.random.default_rng(0)))
    found = [examples if isinstance(rows, slice) else len(rows) for rows in batches]
    assert found == sizes
    assert work.step_count(examples) == len(sizes)
    passes = [rows for rows in batches if not isinstance(rows, slice)]
    if len(passes) > 1 and not work.steps:
        a_pass = np.concatenate(passes[: examples // 5])
        assert len(set(a_pass.tolist())) == len(a_pass)  # nothing twice in a pass


def test_plans_of_before_keep_their_ids() -> None:
    """Written by the version before these options."""
    plan = sumus.Plan(TASK, sumus.fedavg(sumus.sgd(0.1, batch_size=4, epochs=2)), sumus.Pacing(4))
    assert '"drop_last"' not in plan.to_json()
    assert '"leaves":[' in plan.to_json()  # the task's
    assert plan.algorithm.client == sumus.sgd(0.1, batch_size=4, epochs=2, drop_last=False, leaves={})
    assert plan.id == OF_BEFORE


def test_they_travel_in_a_plan() -> None:
    plan = sumus.Plan(TASK, sumus.fedavg(EVERYTHING), sumus.Pacing(4))
    again = sumus.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.algorithm.client.groups == EVERYTHING.groups
    assert again.algorithm.client.lr.factor(2) == 0.5
    assert "custom-name" not in dict(plan.violations("deployed"))


@pytest.mark.parametrize(
    ("make", "rule", "said"),
    [
        (lambda: sumus.sgd(0.1, leaves={"*": {}}), "leaf-options", "give the values that differ"),
        (lambda: sumus.sgd(0.1, leaves={"*": {"lr": 3.0}}), "leaf-options", "'lr_factor', 'weight_decay'"),
        (lambda: sumus.sgd(0.1, leaves={"*": 3.0}), "leaf-options", "give the values that differ"),
        (lambda: sumus.adam(0.1, leaves={"*": {"lr_factor": 0}}), "positive", "lr_factor"),
        (lambda: sumus.adam(0.1, leaves={"*": {"weight_decay": -1.0}}), "positive", "weight_decay"),
        (lambda: sumus.sgd(0.1, drop_last=True), "positive", "needs batch_size="),
        (lambda: sumus.sgd(0.1, leaves=["*"]), "wrong-type", "leaves="),
        (lambda: schedules.warmup(0.1, 0), "positive", "steps=0"),
        (lambda: schedules.local_decay(0.1, 1.5), "positive", "decay=1.5"),
        (
            lambda: plan_of({"3.weight": {"lr_factor": 2.0}}),
            "leaf-options",
            "matches no trained leaf; the model trains 0.weight",
        ),
        (
            lambda: plan_of({"0.*": {"lr_factor": 2.0}, "*.bias": {"weight_decay": 0.0}}),
            "leaf-options",
            "both match `0.bias`",
        ),
        (lambda: sumus.scaffold(sumus.sgd(0.1, leaves=GROUPS)), "control-needs-sgd", "one rate"),
        (lambda: sumus.fednova(sumus.sgd(0.1, leaves=GROUPS)), "normalized-needs-sgd", "one rate"),
        (
            lambda: sumus.fednova(sumus.sgd(schedules.warmup(0.1, 3))),
            "normalized-needs-sgd",
            "schedules within a round",
        ),
    ],
    ids=range(14),
)
def test_what_does_not_go_together_is_refused(make: Any, rule: str, said: str) -> None:
    with pytest.raises(sumus.PlanError, match=said) as raised:
        make()
    assert raised.value.rule == rule


def plan_of(leaves: Any) -> sumus.Plan:
    return sumus.Plan(TASK, sumus.fedavg(sumus.sgd(0.1, leaves=leaves)), sumus.Pacing(4))


def test_a_frozen_leaf_is_no_trained_leaf() -> None:
    frozen = dataclasses.replace(TASK, leaves={"0.*": "frozen"})
    work = sumus.sgd(0.1, leaves={"0.*": {"lr_factor": 2.0}})
    with pytest.raises(sumus.PlanError, match="matches no trained leaf"):
        sumus.Plan(frozen, sumus.fedavg(work), sumus.Pacing(4))
    personal = dataclasses.replace(TASK, leaves={"2.*": "personal"})
    sumus.simulate(personal, sumus.fedavg(sumus.sgd(0.1, leaves={"2.*": {"lr_factor": 9.0}})), PEOPLE, 1)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1.0, "much"])
def test_an_own_rate_within_a_round_that_is_no_number_is_named(factor: Any) -> None:
    own = schedules.Schedule(at=lambda number: 0.1, within=lambda step: factor)
    with pytest.raises(sumus.UsageError, match=r"client \d: .*within must return a number|the factor of local step 1"):
        sumus.simulate(TASK, sumus.fedavg(sumus.sgd(own)), PEOPLE, 1, compute="autograd")


def test_scaffold_divides_by_the_rates_that_it_took() -> None:
    """With a rate of zero in every later step it is the work of one step."""
    first = schedules.Schedule(at=lambda number: 0.1, within=lambda step: float(step == 1))
    one, many = sumus.sgd(0.1, steps=1), sumus.sgd(first, steps=4)
    states = [sumus.MemoryClientStates() for _ in range(2)]
    for work, kept in zip((one, many), states, strict=True):
        sumus.simulate(TASK, sumus.scaffold(work), PEOPLE, 1, compute="autograd", out=sumus.Output(client_states=kept))
    for leaf, values in states[0].get("1")["control"].items():
        assert np.allclose(values, states[1].get("1")["control"][leaf], atol=1e-5)
