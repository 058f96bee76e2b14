"""Arguments as people pass them: numbers of numpy and torch are numbers; anything else is refused in words before a round."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

import sumus
from sumus.aggregate import Part
from sumus.site import Edges
from tests.simulating import simulated

INPUTS = np.zeros((6, 4), "float32")
LABELS = np.zeros(6, "int64")
PEOPLE: dict[Any, Any] = dict.fromkeys(range(3), (INPUTS, LABELS))
TASK = sumus.Task(lambda: nn.Linear(4, 2), sumus.losses.cross_entropy)
ALGORITHM = sumus.fedavg(sumus.sgd(lr=0.1))


def go(people: Any = PEOPLE, **options: Any) -> sumus.History:
    return simulated(TASK, ALGORITHM, people, **{"rounds": 1, "progress": False, **options})


def plan(**options: Any) -> sumus.Plan:
    return sumus.Plan(TASK, ALGORITHM, sumus.Pacing(cohort=2), **options)


WHOLE = [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)]


@pytest.mark.parametrize("number", WHOLE, ids=lambda number: type(number).__name__)
@pytest.mark.parametrize("name", ["seed", "rounds", "workers", "checkpoint_every", "edge_groups"])
def test_whole_numbers_of_numpy_and_torch_are_numbers(name: str, number: Any) -> None:
    options = {name: 1 if name == "workers" else number}
    wanted = {name: 1 if name == "workers" else 2}
    assert go(**options).model_sha256 == go(**wanted).model_sha256


@pytest.mark.parametrize(
    "made",
    [
        lambda n: sumus.Pacing(cohort=n(3), separation=n(1), most_rounds=n(2), over_select=n(1.5), deadline=n(60)),
        lambda n: sumus.Pacing(cohort=n(3), concurrency=n(5), most_stale=n(2), checkins=n(3.5)),
        lambda n: sumus.Evaluation(central=0, every=n(2), seen=n(3)),
        lambda n: sumus.Fleet(lost=n(0.5), seconds=n(3), spread=n(2.0), hours=n(8)),
        lambda n: Edges(rounds=n(2)),
        lambda n: Part("params", bound=n(2.0), cap=n(5)),
        lambda n: sumus.sgd(lr=n(0.1), epochs=n(2), batch_size=n(4), clip_norm=n(1.0)).spec,
        lambda n: plan(min_contributors=n(3)).id,
    ],
)
def test_values_hold_pythons_numbers(made: Callable[[Any], Any]) -> None:
    def numpys(value: float) -> Any:
        return np.int64(value) if isinstance(value, int) else np.float64(value)

    def plain(value: float) -> Any:
        return value

    assert repr(made(numpys)) == repr(made(plain))


def test_a_device_of_torch_is_a_device() -> None:
    assert go(device=torch.device("cpu")).model_sha256 == go().model_sha256


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "seed=None": (lambda _: go(seed=None), "seed= takes an int"),
    "seed='3'": (lambda _: go(seed="3"), "seed= takes an int"),
    "seed=3.5": (lambda _: go(seed=np.float64(3.5)), "seed= takes an int"),
    "seed=2**70": (lambda _: go(seed=2**70), "must fit into 64 bits"),
    "rounds=2.5": (lambda _: go(rounds=2.5), "rounds= takes an int"),
    "rounds='2'": (lambda _: go(rounds="2"), "rounds= takes an int"),
    "a function as population": (lambda _: go(lambda who: PEOPLE[who]), r"a function.*sumus.Population\(ids, load\)"),
    "a list as population": (lambda _: go(list(PEOPLE.items())), "population= takes a mapping.* not a list"),
    "a function as progress": (lambda _: go(progress=print), "progress="),
    "a number as out": (lambda _: go(out=3), "out=3: give a folder"),
    "client_states of another kind": (lambda _: go(client_states=[1]), "client_states="),
    "through": (lambda _: go(through="the wire"), "through='the wire': give one of memory, wire"),
    "checkpoint_every=None": (lambda _: go(checkpoint_every=None), "checkpoint_every= takes an int"),
    "device=None": (lambda _: go(device=None), "device 'None' is not known"),
    "workers=2.5": (lambda _: go(workers=np.float64(2.5)), "workers=2.5"),
    "evaluate=True": (lambda _: go(evaluate=True), "evaluate= takes an? Evaluation"),
    "a surrogate as id": (lambda _: go({"\udc80": PEOPLE[0]}), "cannot be encoded as UTF-8"),
    "an id that is no key": (lambda _: sumus.Population([[1], [2]], load=print), "cannot be hashed"),
    "pairs that are none": (lambda _: sumus.Population.from_pairs([1, 2]), "from_pairs takes"),  # pyright: ignore
    "torch's sparse inputs": (
        lambda _: go({0: (torch.eye(6).to_sparse(), LABELS)}),
        "client 0: its inputs are sparse_coo",
    ),
    "compressed rows": (
        lambda _: go({0: (torch.eye(6).to_sparse_csr(), LABELS)}),
        "client 0: its inputs are sparse_csr",
    ),
    "scipy's sparse inputs": (
        lambda _: go({0: (sparse.csr_matrix(np.eye(6)), LABELS)}),
        r"client 0: .*values.toarray\(\)",
    ),
    "inputs without values": (lambda _: go({0: (torch.zeros(6, 4, device="meta"), LABELS)}), "client 0: .*meta device"),
    "sites that fail": (
        lambda _: go(edge_groups=lambda who: 1 // who),
        "client 0: the function of edge_groups= failed: ZeroDivision",
    ),
    "sites that are no keys": (
        lambda _: go(edge_groups=lambda who: [who]),
        "client 0: the function of edge_groups= failed: TypeError",
    ),
    "check of something else": (lambda _: sumus.check(TASK, PEOPLE), r"check\(\) takes a Plan"),  # pyright: ignore
    "check of nobody": (lambda _: sumus.check(plan(), {}), "the population is empty"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_such_argument_is_refused_in_words(what: str, tmp_path: Path) -> None:
    call, words = REFUSED[what]
    with pytest.raises(sumus.SumusError, match=words):
        call(tmp_path)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
@pytest.mark.parametrize("call", [go, lambda: sumus.check(plan(), PEOPLE)])
def test_gradients_that_are_off_are_said_to_be_off(call: Callable[[], Any], mode: Callable[[], Any]) -> None:
    with mode(), pytest.raises(sumus.ExperimentError, match="gradients are off"):
        call()


@pytest.mark.parametrize(
    "pacing",
    [
        sumus.Pacing(cohort=1, most_rounds=1),
        sumus.Pacing(cohort=1, separation=4),
        sumus.Pacing(cohort=2, separation=2),
        sumus.Pacing(cohort=3, most_rounds=5),
        sumus.Pacing(cohort=1, concurrency=2, most_rounds=1),
    ],
    ids=repr,
)
def test_rounds_that_so_few_clients_cannot_give_are_refused_before_the_first(pacing: sumus.Pacing) -> None:
    with pytest.raises(sumus.ExperimentError, match="never ends") as error:
        go(rounds=6, pacing=pacing)
    assert len(error.value.history.rounds) == 0
    assert len(go(rounds=1, pacing=pacing).rounds) == 1


def test_a_run_that_may_end_at_its_target_is_not_refused() -> None:
    measured = sumus.Evaluation(central=(INPUTS, LABELS), target={"loss": 10.0})
    assert len(go(rounds=6, pacing=sumus.Pacing(cohort=1, most_rounds=1), evaluate=measured).rounds) == 1
