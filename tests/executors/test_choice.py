"""The probe: which executor it picks and why, that it remembers, and that what cannot be vectorized says so in one line."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sumus
from sumus.errors import ExperimentError
from sumus.executors import choice as choices
from sumus.executors.choice import AUTOGRAD, ExecutorChoice, ExecutorChosen, RunLength, checked, choose, processes
from sumus.executors.executor import ClientAssignment
from sumus.executors.recall import Recall
from sumus.rng import key
from sumus.training.program import Program
from sumus.types import Broadcast

LONG = 10**6
"""Steps of a run that is worth a probe."""
WORK = sumus.sgd(lr=0.1, batch_size=4)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing timed once."""
    monkeypatch.setattr(choices, "_REPEATS", 1)
    monkeypatch.setitem(choices.STACKS, "cpu", (4, 16))


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs - inputs.mean(0))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) if inputs.sum() > 0 else -self.layer(inputs)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(inputs)


class Sampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs[:, torch.randperm(6)])


def program_of(model: Callable[[], nn.Module]) -> Program:
    return Program(sumus.Task(model, sumus.losses.cross_entropy))


def clients(count: int = 20) -> list[ClientAssignment]:
    draw = torch.Generator().manual_seed(0)
    sizes = [3 + 5 * position % 11 for position in range(count)]
    return [
        ClientAssignment(
            who, torch.randn(n, 6, generator=draw), torch.randint(0, 3, (n,), generator=draw), {}, key(who)
        )
        for who, n in enumerate(sizes)
    ]


def first_of(most: int) -> list[ClientAssignment]:
    return clients()[:most]


def broadcast_of(program: Program) -> Broadcast:
    return sumus.fedavg(WORK).start(program.initial_shared, program.description).broadcast


def chosen(program: Program, steps: int = LONG, recall: Recall | None = None) -> ExecutorChosen:
    return choose(program, WORK, first_of, broadcast_of(program), RunLength(steps, 1e5), recall or Recall(None))


@pytest.mark.parametrize("text", ["autograd", "sequential", "sequential+onednn", "vectorized:1", "vectorized:64"])
def test_a_choice_is_its_name(text: str) -> None:
    assert str(ExecutorChoice.parse(text)) == text


def test_a_stack_has_a_size_by_default() -> None:
    assert ExecutorChoice.parse("vectorized") == ExecutorChoice("vectorized", 16)


@pytest.mark.parametrize(
    "text",
    [
        "fast",
        "vectorized:3",
        "vectorized:0",
        "vectorized:x",
        "sequential:4",
        "",
        "autograd:",
        "vectorized:",
        "vectorized:-4",
        "vectorized:٤",
        None,
        7,
        True,
    ],
)
def test_an_unknown_executor_is_refused_with_those_that_are_known(text: object) -> None:
    with pytest.raises(ExperimentError, match="vectorized:K"):
        ExecutorChoice.parse(text)


def test_the_fastest_is_chosen_and_all_speeds_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {
        "autograd": 2e-4,
        "sequential": 1e-4,
        "sequential+onednn": 4e-4,
        "vectorized:4": 5e-5,
        "vectorized:16": 8e-5,
    }
    monkeypatch.setattr(choices._Probe, "_time", lambda self, choice: took[str(choice)])
    found = chosen(program_of(dense))
    assert found.choice == ExecutorChoice("vectorized", 4)
    assert found.seconds == 5e-5
    assert found.reason == (
        "times autograd's speed: sequential 2.00, sequential+onednn 0.50, vectorized:4 4.00, vectorized:16 2.50"
    )


def test_every_executor_is_timed_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "BUDGET", 60.0)
    found = chosen(program_of(dense))
    assert found.seconds is not None
    assert all(f"{name} " in found.reason for name in ("sequential", "sequential+onednn", "vectorized:4"))


def test_a_probe_stops_when_its_time_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "BUDGET", 0.0)
    monkeypatch.setattr(choices, "SHARE", 0.0)
    found = chosen(program_of(dense), steps=30_000)
    assert "the other executors were not tried, for lack of time" in found.reason


def test_a_short_run_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_Probe", None)  # it would fail
    found = chosen(program_of(dense), steps=100)
    assert found == ExecutorChosen(AUTOGRAD, "the run is too short to probe")


def test_what_is_too_short_does_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices.time, "perf_counter", lambda: pytest.fail("it looked at the clock"))
    assert chosen(program_of(dense), steps=100).choice == AUTOGRAD


def test_a_probe_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recall, program = Recall(tmp_path / "cache" / "executors.json"), program_of(dense)
    first = chosen(program, recall=recall)
    monkeypatch.setattr(choices._Probe, "run", None)
    again = chosen(program, recall=recall)
    assert again.choice == first.choice
    assert again.reason == f"{first.reason}; probed before on this machine"


def test_another_step_is_probed_anew(tmp_path: Path) -> None:
    recall, program = Recall(tmp_path / "executors.json"), program_of(dense)
    chosen(program, recall=recall)
    for other in (sumus.sgd(lr=0.1, batch_size=8), sumus.adam(lr=0.1, batch_size=4)):
        found = choose(program, other, first_of, broadcast_of(program), RunLength(LONG, 1e5), recall)
        assert "probed before" not in found.reason
    assert "probed before" not in chosen(program_of(lambda: nn.Sequential(*dense(), nn.ReLU())), recall=recall).reason


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"x": 1}', b"\xff", b'{"somewhere": {"choice": 5, "reason": "", "seconds": 1.0}}']
)
def test_a_broken_memory_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "executors.json"
    path.write_bytes(content)
    recall = Recall(path)
    assert recall.get("somewhere") is None
    recall.put("somewhere", {"choice": "autograd", "reason": "", "seconds": 1.0})
    assert recall.get("somewhere") == {"choice": "autograd", "reason": "", "seconds": 1.0}


def test_a_memory_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recall = Recall(tmp_path / "file" / "executors.json")
    recall.put("somewhere", {"choice": "autograd", "reason": "", "seconds": 1.0})
    assert recall.get("somewhere") is None


@functools.cache
def kept() -> list[int]:
    """What no walk sees: a value in a cache of Python's own."""
    return [0]


class Unseen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = dense()

    def forward(self, inputs: Tensor) -> Tensor:
        kept()[0] += 1
        return self.inner(inputs) * (1 + 0.1 * kept()[0])


REFUSED = {
    "state that is not seen": (Unseen, "sequential", "the code keeps state that sumus does not see"),
    "batch statistics": (
        normed,
        "vectorized",
        "changes, in place, tensors that it did not make, such as batch statistics",
    ),
    "a mean over the batch": (Centred, "vectorized", "examples of a batch influence each other"),
    "a branch": (Branching, "sequential", "depends on the values of tensors"),
    "a counter": (Counting, "sequential", "changes its own attribute `calls`"),
    "its own order": (Sampling, "sequential", "random operator `aten.randperm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stacked_trains_sequentially_and_says_why(name: str) -> None:
    model, word, why = REFUSED[name]
    program = program_of(model)
    found = chosen(program)
    assert found.choice.kind != "vectorized"
    assert f"not {word}: " in found.reason
    assert why in found.reason
    asked = checked(ExecutorChoice("vectorized", 4), program, WORK, clients(), broadcast_of(program))
    assert asked.choice.kind != "vectorized"
    assert asked.reason.startswith("not vectorized:4: ")
    assert why in asked.reason
    assert "\n" not in found.reason + asked.reason


def test_what_was_asked_for_is_given_where_it_can_be() -> None:
    program = program_of(dense)
    for choice in (AUTOGRAD, ExecutorChoice("sequential"), ExecutorChoice("vectorized", 4)):
        found = checked(choice, program, WORK, clients(), broadcast_of(program))
        assert found == ExecutorChosen(choice, "as requested")


def test_a_run_is_as_long_as_its_steps_and_their_arithmetic() -> None:
    run = RunLength.of(program_of(dense), WORK, clients(1)[0], clients=100)
    assert run == RunLength(100, 3 * 3 * 2 * (6 * 16 + 16 * 3))  # one step of three examples; three passes; 2 a product
    assert run.seconds == pytest.approx(100 * (3e-4 + run.flops / 5e10))
    assert run.seconds_with(ExecutorChosen(AUTOGRAD, "", 0.5)) == 50.0
    assert run.seconds_with(ExecutorChosen(AUTOGRAD, "")) == run.seconds


def test_processes_are_started_where_they_save_more_than_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert processes(seconds=1000.0, clients=100, device="cpu") == choices.MOST_PROCESSES
    assert processes(seconds=1000.0, clients=3, device="cpu") == 3
    assert processes(seconds=5.0, clients=100, device="cpu") == 1
    assert processes(seconds=1000.0, clients=1, device="cpu") == 1
    assert processes(seconds=1000.0, clients=100, device="cuda") == 1


def test_a_probe_leaves_no_trace_in_the_model_or_the_generator() -> None:
    program = program_of(lambda: nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3)))
    before = dict(program.initial)
    state = torch.get_rng_state()
    chosen(program)
    assert torch.equal(torch.get_rng_state(), state)
    assert all((program.initial[name] == value).all() for name, value in before.items())


def test_the_first_clients_may_be_fewer_than_a_stack() -> None:
    program = program_of(dense)
    found = choose(
        program, WORK, lambda most: clients(2)[:most], broadcast_of(program), RunLength(LONG, 1e5), Recall(None)
    )
    assert found.choice.stack <= 2


def test_a_chosen_executor_is_picklable() -> None:
    import pickle

    choice = ExecutorChoice("vectorized", 8)
    make = pickle.loads(pickle.dumps(choice.executor))
    assert make(program_of(dense), WORK).stack == 8
    assert dataclasses.asdict(choice) == {"kind": "vectorized", "stack": 8}
