"""Kept examples: the first, whole, in a fixed room, and nothing that a task does changes them."""

import numpy as np
import pytest
import torch

import sumus
from sumus.training.examples import _Kept


def pair(number: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((rows, 3), float(number)), torch.full((rows,), number)


def test_what_is_kept_stays_as_it_was() -> None:
    kept = _Kept(4096, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    for number in range(100):
        rows = int(torch.randint(1, 30, (), generator=draw))
        kept.put(number, pair(number, rows))
        for other in range(number + 1):
            found = kept.get(other)
            if found is not None:
                assert (found[0] == other).all()
                assert (found[1] == other).all()
                assert len(found[0]) == len(found[1])
    assert [kept.get(number) is not None for number in range(4)] == [True] * 4
    assert kept.get(99) is None


def test_what_has_no_room_is_not_kept_and_what_has_is() -> None:
    kept = _Kept(256, torch.device("cpu"))
    kept.put("large", pair(2, 100))
    kept.put("small", pair(1, 2))
    assert kept.get("large") is None
    assert kept.get("small") is not None


class InPlace(torch.nn.Module):
    """Writes to its inputs."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = torch.nn.Linear(3, 2)
        self.in_place = in_place

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.dense(inputs.mul_(2.0) if self.in_place else inputs * 2.0)


@pytest.mark.parametrize("batch_size", [2, None])
@pytest.mark.parametrize("executor", ["autograd", "sequential", "vectorized:2"])
def test_a_task_that_writes_to_its_examples_changes_none(executor: str, batch_size: int | None) -> None:
    def simulated(in_place: bool) -> dict[str, torch.Tensor]:
        def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            targets = targets.mul_(3.0) if in_place else targets * 3.0
            return (outputs.sum(1) - targets) ** 2

        rng = np.random.default_rng(0)
        people = {
            name: (rng.normal(size=(rows, 3)).astype("f4"), rng.normal(size=rows).astype("f4"))
            for name, rows in (("a", 5), ("b", 4), ("c", 3))
        }
        task = sumus.Task(lambda: InPlace(in_place), loss)
        algorithm = sumus.fedavg(sumus.sgd(lr=0.01, epochs=2, batch_size=batch_size))
        return sumus.simulate(
            task,
            algorithm,
            people,
            3,
            evaluate=sumus.Evaluation(seen=3),
            compute=executor,
            out=sumus.Output(progress=False),
        ).model

    torch.testing.assert_close(simulated(in_place=True), simulated(in_place=False))
