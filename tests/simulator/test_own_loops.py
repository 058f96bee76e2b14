"""Client work by code of the user's own: one model in this process, in several, through the wire, over HTTP, and resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sumus
from sumus.experiment import Experiment
from sumus.operations.service import Storage
from sumus.own_loop import ClientRound
from tests import own_loops
from tests.server.test_same_model import ROUNDS, over_the_network
from tests.simulator.test_wire import PEOPLE, UNSEEN, net, same

TASK = sumus.Task(net, sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, name="own-loops")
ALGORITHM = sumus.fedadam(
    sumus.client(own_loops.train, own_loops.evaluate), 0.1, update=sumus.chain(sumus.clip_by_global_norm(1.0))
)


def experiment(rounds: int = ROUNDS, algorithm: sumus.Algorithm = ALGORITHM) -> Experiment:
    plan = sumus.Plan(TASK, algorithm, sumus.Pacing(len(PEOPLE)), 2, trusts_devices=True)
    return Experiment(plan, PEOPLE, rounds, sumus.Evaluation(unseen=UNSEEN, seen=2), seed=3)


@pytest.fixture(scope="module")
def alone() -> sumus.History:
    """The run of one process."""
    return sumus.run(experiment(), compute=sumus.Compute(workers=1))


@pytest.mark.parametrize(
    "compute",
    [sumus.Compute(workers=3), sumus.Compute(through="wire"), sumus.Compute(executor="vectorized:4")],
    ids=["three processes", "through the wire", "another executor"],
)
def test_it_is_one_model_whatever_computes_it(alone: sumus.History, compute: sumus.Compute) -> None:
    assert same(sumus.run(experiment(), compute=compute), alone)
    assert alone.notes == ()


def test_it_is_the_same_model_on_devices_over_http(alone: sumus.History) -> None:
    assert over_the_network(experiment(), Storage()) == alone.model_sha256


def test_a_resumed_run_gives_the_same_model(alone: sumus.History, tmp_path: Path) -> None:
    first = sumus.run(experiment(1), out=str(tmp_path))
    assert first.model_sha256 != alone.model_sha256
    assert same(sumus.run(experiment(), out=str(tmp_path)), alone)


def test_a_run_that_failed_goes_on_once_the_code_is_mended(alone: sumus.History, tmp_path: Path) -> None:
    out = sumus.Output(str(tmp_path))
    with pytest.raises(sumus.TaskError, match=r"client \d: `.*train` failed: OSError: the disk is full"):
        sumus.run(experiment(algorithm=replace(ALGORITHM, client=broken())), out=out)
    assert same(sumus.run(experiment(), out=out), alone)


def broken() -> sumus.ClientWork:
    """Return the same work, as a plan names it, with code that fails in the second round."""

    def train(state: Any, examples: Any, about: ClientRound) -> Any:
        if about.number == 1:
            raise OSError("the disk is full")
        return own_loops.train(state, examples, about)

    work = sumus.client(own_loops.train, own_loops.evaluate)
    assert work.loop is not None
    functions = {**work.loop.functions, "train": train}
    object.__setattr__(work, "loop", replace(work.loop, functions=functions))
    return work
