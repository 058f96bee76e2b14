"""Edges in the simulator: adding changes nothing, and sites do rounds of their own, wherever their clients train."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sumus
from sumus.errors import ExperimentError
from sumus.executors.choice import ExecutorChoice
from sumus.rng import key
from sumus.simulator.processes.share import ClientJob, Sums
from sumus.site import Site
from sumus.training.program import one_thread
from tests.simulating import doors
from tests.simulator.conftest import told
from tests.simulator.test_share import trainer

Make = Callable[..., sumus.Experiment]


def behind(made: sumus.Experiment, groups: Any = 3, rounds: int = 1) -> sumus.Experiment:
    return replace(made, plan=replace(made.plan, edges=sumus.Edges(rounds)), edge_groups=groups)


def test_edges_that_add_give_the_model_that_there_is_without_them(experiment: Make) -> None:
    plain, through = sumus.run(experiment()), sumus.run(behind(experiment()))
    assert through.model_sha256 == plain.model_sha256
    assert {record.traffic.above for record in plain.rounds} == {0}
    assert all(record.traffic.above for record in through.rounds)


def test_what_edges_send_up_is_a_sum_each_however_many_clients_they_have(experiment: Make) -> None:
    made = experiment(pacing=sumus.Pacing(10))
    sizes = {groups: sumus.run(behind(made, groups)).rounds[0].traffic.above for groups in (1, 5, 10)}
    assert sizes[5] == 5 * sizes[1]
    assert sizes[10] == 10 * sizes[1]
    numbers = 6 * 8 + 8 + 8 * 2 + 2
    assert sizes[1] == 8 * numbers, "of floats, eight bytes each"


def test_a_site_is_its_clients_trained_round_after_round_on_its_own_model(experiment: Make) -> None:
    """The same from its parts: trainer, site and sum."""
    made = behind(experiment(rounds=1, pacing=sumus.Pacing(10)), groups=lambda client: client % 2, rounds=3)
    history = sumus.run(made, compute=sumus.Compute(executor="sequential", workers=1))
    one = trainer(made, ExecutorChoice.parse("sequential").executor)
    plan = one._setting.plan
    state = plan.algorithm.start(one.program.initial_shared, plan.description)
    public = key(0, "round", 0, "public")
    total = Sums()
    for parity in (0, 1):
        site = Site.of(plan.algorithm, plan.description, plan.sums, public, state.broadcast)
        for done in range(3):
            own = Sums()
            errands = [[ClientJob(client, again=done)] for client in range(parity, 10, 2)]
            with one_thread():
                assert len(list(one.train(0, site.seed_now, site.at, errands, own))) == 5
            site = site.after(own[0].total)
        total[0].add(site.total(5))
    combined = plan.algorithm.combine(total[0].total, plan.description, plan.sums, public, 10)
    model = plan.algorithm.release(plan.algorithm.step(combined, state, plan.description))
    assert all(np.array_equal(leaf, history.model[name].numpy()) for name, leaf in model.items())


@pytest.mark.parametrize("options", [{"workers": 2}, {"executor": "vectorized:4"}, {"workers": 3}], ids=str)
def test_sites_are_the_same_wherever_clients_train(experiment: Make, options: dict[str, Any]) -> None:
    made = behind(experiment(), rounds=2)
    plain = sumus.run(made, compute=sumus.Compute(executor=options.get("executor", "sequential"), workers=1))
    assert told(sumus.run(made, **doors({"executor": "sequential", **options}))) == told(plain)


def test_a_run_with_sites_goes_on_from_its_checkpoint_and_not_with_others(experiment: Make, tmp_path: Path) -> None:
    whole = sumus.run(behind(experiment(rounds=4), rounds=2))
    sumus.run(behind(experiment(rounds=2), rounds=2), out=tmp_path)
    with pytest.raises(ExperimentError):
        sumus.run(behind(experiment(rounds=4), groups=2, rounds=2), out=tmp_path)
    assert sumus.run(behind(experiment(rounds=4), rounds=2), out=tmp_path).model_sha256 == whole.model_sha256


def test_a_fleet_takes_as_often_the_time_as_sites_have_rounds(experiment: Make) -> None:
    ends = {}
    for rounds in (1, 3):
        made = replace(behind(experiment(), rounds=rounds), fleet=sumus.Fleet(seconds=60))
        ends[rounds] = sumus.run(made).rounds[-1].at
    assert ends[3] == pytest.approx(3 * ends[1], rel=0.05)


def test_a_rounds_record_is_of_its_clients_and_not_of_their_rounds(experiment: Make) -> None:
    record = sumus.run(behind(experiment(rounds=1, pacing=sumus.Pacing(10)), rounds=3)).rounds[0]
    assert (record.clients, record.examples) == (10, 240)


def test_clients_that_have_no_time_for_all_take_their_share_of_steps_in_each_round(experiment: Make) -> None:
    made = replace(behind(experiment(), rounds=2), fleet=sumus.Fleet(stragglers=1.0))
    assert len(sumus.run(made).rounds) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"edge_groups": -1}, "give from 1 to 10"),
        ({"edge_groups": 11}, "give from 1 to 10"),
        ({"edge_groups": "three"}, "edge_groups="),
    ],
)
def test_sites_that_cannot_be_are_refused(experiment: Make, change: dict[str, Any], said: str) -> None:
    with pytest.raises(sumus.SumusError, match=said):
        replace(experiment(), **change)


def test_a_plan_with_sites_and_none_there_is_refused(experiment: Make) -> None:
    made = experiment()
    with pytest.raises(
        ExperimentError, match=r"2 rounds of their own, but there are no edges: give edge_groups= \(--edge-groups\)"
    ):
        replace(made, plan=replace(made.plan, edges=sumus.Edges(2)))


def test_through_the_wire_there_are_no_sites(experiment: Make) -> None:
    with pytest.raises(ExperimentError, match="this plan's edges run rounds of their own"):
        sumus.run(behind(experiment(), rounds=2), compute=sumus.Compute(through="wire"))
