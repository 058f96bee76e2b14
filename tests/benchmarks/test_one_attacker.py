"""One dishonest person in the demo: each attack is as strong as the first hop allows, and no stronger. Few rounds, one seed."""

import importlib.util
from typing import Any

import numpy as np
import pytest

from benchmarks import one_attacker
from benchmarks.one_attacker import CONTROL, DIRECTIONS, HONEST, MISSING, OneAttacker
from sumus.aggregate import Update
from sumus.errors import BeyondBoundError
from sumus.executors.executor import Trained
from sumus.rng import generator
from sumus.types import Tree
from sumus.update.clip import global_norm

needs_seglearn = pytest.mark.skipif(importlib.util.find_spec("seglearn") is None, reason="needs seglearn")
ROUNDS, ATTACKER = 3, 3


def reports(plan: Any, people: OneAttacker) -> dict[Any, Trained]:
    """What each of the seven people sends of a long, random update."""
    (layout,) = plan.first_hop.layouts
    rng = generator(0, "updates")
    trees: list[Tree] = [
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in layout} for _ in people
    ]
    trained = [Trained(who, {"params": tree}, 100, {}, {}) for who, tree in zip(people, trees, strict=True)]
    return {one.client: one for one in people.sent(iter(trained))}


@needs_seglearn
@pytest.mark.parametrize("attack", [name for name in DIRECTIONS if name != CONTROL])
def test_the_attackers_update_is_the_longest_that_the_first_hop_counts(attack: str) -> None:
    demo = one_attacker.experiment(attack, seed=ATTACKER - 1)
    hop, clip, people = demo.plan.for_devices().first_hop, demo.plan.influence.length, demo.population
    assert isinstance(people, OneAttacker)
    assert people.attackers == {ATTACKER}
    assert clip is not None
    sent = reports(demo.plan, people)
    for who, one in sent.items():
        assert global_norm(one.parts["params"]) == pytest.approx(clip, rel=1e-6)
        total = hop.count_in(Update(who, one.parts, one.examples, {}))
        assert int(total.weights["params"]) <= demo.plan.example_cap, "whatever number of examples a device names"
    longer = {name: leaf * np.float32(1.001) for name, leaf in sent[ATTACKER].parts["params"].items()}
    with pytest.raises(BeyondBoundError, match="clip it on the device"):
        hop.count_in(Update(ATTACKER, {"params": longer}, 100, {}))


@needs_seglearn
def test_the_first_hop_refuses_what_the_control_sends() -> None:
    control, demo = one_attacker.experiment(CONTROL, seed=ATTACKER - 1), one_attacker.experiment(HONEST, seed=0)
    assert isinstance(control.population, OneAttacker)
    one = reports(control.plan, control.population)[ATTACKER]
    with pytest.raises(BeyondBoundError):
        demo.plan.for_devices().first_hop.count_in(Update(ATTACKER, one.parts, one.examples, {}))


@needs_seglearn
def test_one_attacker_does_not_stop_the_demo_and_one_that_nobody_checks_does() -> None:
    attacked, unchecked = (one_attacker.one_run((name, 0, ROUNDS)) for name in ("sign flip", CONTROL))
    assert unchecked < 0.25 < attacked


@needs_seglearn
def test_an_attackers_run_is_compared_with_the_same_person_missing() -> None:
    missing = one_attacker.experiment(MISSING, seed=ATTACKER - 1)
    assert sorted(missing.population) == [1, 2, 4, 5, 6, 7]
    assert missing.plan.pacing.cohort == 6


def test_differences_are_in_points_with_the_worst_seed_beside_the_mean() -> None:
    figures = {HONEST: [0.9, 0.8], MISSING: [0.85, 0.86], "sign flip": [0.88, 0.79]}
    assert one_attacker.rows(figures) == [
        [HONEST, "0.850 (0.800 to 0.900)", "", ""],
        [MISSING, "0.855 (0.850 to 0.860)", "+0.5 (worst -5.0)", ""],
        ["sign flip", "0.835 (0.790 to 0.880)", "-1.5 (worst -2.0)", "-2.0 (worst -7.0)"],
    ]
