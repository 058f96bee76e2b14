"""The first client, trained again, gives the same bits; where it does not, the run says so, and nothing else changes."""

import ctypes
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sumus
from sumus.aggregate import BUFFERS
from sumus.executors.executor import ClientAssignment, Trained
from sumus.executors.sequential import SequentialExecutor
from sumus.executors.witness import OTHER_NUMBERS, Witness, digest_of, examples_of, notes_of
from sumus.rng import key
from sumus.training.program import Program
from sumus.types import Broadcast
from tests.simulating import simulated

AGAIN = "the same client gave different numbers when it was trained again"
READ = "gives different examples each time it is read"
STEPS = 2
"""Of each client in a round."""
WORK = sumus.sgd(lr=0.2, batch_size=2)
People = dict[int, tuple[Any, Any]]
Count = Callable[[], int]

MEMORY: list[Any] = []
"""Counters that code reaches by their addresses alone."""


def people(count: int) -> People:
    rng = np.random.default_rng(0)
    return {i: (rng.normal(size=(4, 3)).astype("float32"), rng.integers(0, 2, 4)) for i in range(count)}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def run(
    loss: Any = sumus.losses.cross_entropy, algorithm: Any = None, model: Any = net, clients: int = 4, **options: Any
) -> sumus.History:
    given: dict[str, Any] = {"rounds": 3, "progress": False, "executor": "autograd", **options}
    task = sumus.Task(model, loss, **given.pop("task", {}))
    return simulated(task, algorithm or sumus.fedavg(WORK), given.pop("people", None) or people(clients), **given)


# ── counters that no walk can see ────────────────────────────────────────────────────────────────────────────────────


def by_address(folder: Path) -> Count:
    MEMORY.append(ctypes.c_long(0))
    address = ctypes.addressof(MEMORY[-1])

    def count() -> int:
        held = ctypes.c_long.from_address(address)
        held.value += 1
        return held.value

    return count


def in_a_file(folder: Path) -> Count:
    path = str(folder / "calls")

    def count() -> int:
        with open(path, "a+") as file:
            file.write(".")
            return file.tell()

    return count


def on_an_installed_package(folder: Path) -> Count:
    def count() -> int:
        nn.Linear.sumus_test_calls = getattr(nn.Linear, "sumus_test_calls", 0) + 1  # type: ignore[attr-defined]
        return nn.Linear.sumus_test_calls  # type: ignore[attr-defined]

    return count


COUNTERS = (by_address, in_a_file, on_an_installed_package)


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nn.Linear, "sumus_test_calls", 0, raising=False)
    yield
    MEMORY.clear()


def growing(count: Count, after: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss with a factor that grows with its calls."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return sumus.losses.cross_entropy(outputs, targets) * (1 + 0.05 * max(0, count() - after))

    return loss


@pytest.mark.parametrize("make", COUNTERS)
def test_a_hidden_counter_gets_a_note(make: Callable[[Path], Count], tmp_path: Path) -> None:
    (note,) = run(growing(make(tmp_path))).notes
    assert note.startswith(AGAIN)
    assert all(word in note for word in ("order of clients", "float buffer", "personal"))


def test_a_counter_that_acts_late_gets_a_note_through_the_wire_too(tmp_path: Path) -> None:
    late = 12 * STEPS  # after the probe, and in the third round
    ways: list[dict[str, Any]] = [{}, {"through": "wire"}]
    for how in ways:
        assert [note[: len(AGAIN)] for note in run(growing(by_address(tmp_path), late), rounds=5, **how).notes] == [
            AGAIN
        ]
        assert run(growing(by_address(tmp_path), 10**6), rounds=5, **how).notes == ()


def test_what_another_process_hides_is_said(tmp_path: Path) -> None:
    """Here nothing is hidden: only the other process's witness can tell."""
    home, count = os.getpid(), in_a_file(tmp_path)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        late = 0 if os.getpid() == home else max(0, count() - 3 * STEPS)
        return sumus.losses.cross_entropy(outputs, targets) * (1 + late)

    notes = run(loss, clients=6, rounds=4, workers=2).notes
    assert [note[: len(AGAIN)] for note in notes] == [AGAIN]


def test_code_that_fails_later_gets_a_note(tmp_path: Path) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if (tmp_path / "stop").exists():
            raise RuntimeError("no more")
        return sumus.losses.cross_entropy(outputs, targets)

    program, assignments = program_and_work(sumus.Task(net, loss), 1)
    witness = Witness(program)
    list(witness.run(SequentialExecutor(program, WORK), broadcast_of(program), 0, assignments))
    (tmp_path / "stop").touch()
    witness.look()
    assert list(program.moved) == [OTHER_NUMBERS]


# ── data that change ─────────────────────────────────────────────────────────────────────────────────────────────────


class Moving(dict[int, Any]):
    """Clients that give other examples after so many times."""

    def __init__(self, pairs: People, stays: int) -> None:
        super().__init__(pairs)
        self.stays = stays
        self.times = dict.fromkeys(pairs, 0)

    def __getitem__(self, client: int) -> Any:
        inputs, targets = super().__getitem__(client)
        self.times[client] += 1
        return inputs + (self.times[client] > self.stays), targets


@pytest.mark.parametrize(
    ("how", "times"),
    [
        ({}, 2),
        ({"executor": "sequential"}, 2),
        ({"executor": "vectorized:2"}, 2),
        ({"through": "wire"}, 5),  # a device reads its examples in each round
    ],
    ids=str,
)
def test_examples_that_change_late_are_said_and_once(how: dict[str, Any], times: int) -> None:
    (note,) = run(people=Moving(people(3), times), **how).notes
    assert note.startswith(f"client 0 {READ}")


def test_a_random_preparation_is_said_once() -> None:
    def prepare(inputs: Any, targets: Any) -> Any:
        return inputs + np.float32(random.random()), targets

    (note,) = run(task={"prepare": prepare}).notes
    assert READ in note


def test_other_examples_are_one_note_whoever_found_them() -> None:
    moved = [examples_of(0), "model.calls", examples_of(3), "model.steps", OTHER_NUMBERS]
    notes = notes_of(moved, most=1)
    assert [READ in note for note in notes] == [True, False, False]
    assert [AGAIN in note for note in notes] == [False, True, False]
    assert notes[2].startswith("`model.calls` changes")


def test_what_the_walk_found_in_the_work_is_not_said_twice() -> None:
    calls, plain = [0], WORK.optimizer

    def update(param: Any, *rest: Any) -> Any:
        calls[0] += 1
        after, *state = plain.update(param, *rest)
        return after * (1 - 1e-4 * calls[0]), *state

    (note,) = run(algorithm=sumus.fedavg(replace(WORK, optimizer=replace(plain, update=update)))).notes
    assert "`work" in note
    assert AGAIN not in note


# ── where nothing is hidden ──────────────────────────────────────────────────────────────────────────────────────────


class Drawing(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), *layers), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


CONTROLS: dict[str, dict[str, Any]] = {
    "stateless": {},
    "dropout": {"model": lambda: Drawing(nn.Dropout(0.5))},
    "batch norm": {"model": lambda: Drawing(nn.BatchNorm1d(4))},
    "personal head": {"model": Drawing, "task": {"leaves": {"head.*": "personal"}}},
    "scaffold": {"algorithm": sumus.scaffold(WORK)},
    "feddyn": {"algorithm": sumus.feddyn(WORK, 0.1)},
    "captured": {"executor": "sequential"},
    "vectorized": {"executor": "vectorized:2"},
    "two processes": {"workers": 2, "clients": 6},
}


@pytest.mark.parametrize("name", CONTROLS)
def test_the_bits_are_the_same_without_a_witness(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    history = run(**CONTROLS[name])
    assert history.notes == ()

    def plain(self: Witness, executor: Any, broadcast: Any, number: int, assignments: Any) -> Iterator[Trained]:
        return executor.run(broadcast, number, assignments)

    monkeypatch.setattr(Witness, "run", plain)
    without = run(**CONTROLS[name])
    assert (history.model_sha256, history.notes) == (without.model_sha256, without.notes)
    numbers = [
        (record.loss, record.metrics, record.traffic.up, record.traffic.down, record.clients)
        for record in history.rounds
    ]
    assert numbers == [
        (record.loss, record.metrics, record.traffic.up, record.traffic.down, record.clients)
        for record in without.rounds
    ]


class Counting(SequentialExecutor):
    trained = 0

    def run(
        self, broadcast: Broadcast, round_number: int, assignments: Iterable[ClientAssignment]
    ) -> Iterator[Trained]:
        for trained in super().run(broadcast, round_number, assignments):
            self.trained += 1
            yield trained


def program_and_work(task: sumus.Task, count: int) -> tuple[Program, list[ClientAssignment]]:
    program = Program(task)
    pairs = people(min(count, 5))
    read = [program.reader.convert(client, pairs[client]) for client in pairs]
    return program, [ClientAssignment(at, *read[at % len(read)], {}, key("test", at)) for at in range(count)]


def broadcast_of(program: Program) -> Broadcast:
    trees = {"params": program.shared, BUFFERS: program.buffers}
    return {part: {name: program.initial[name].copy() for name in names} for part, names in trees.items() if names}


@pytest.mark.parametrize(("clients", "more"), [(100, 3), (99, 1), (5, 1)])
def test_how_often_it_is_trained_again(clients: int, more: int) -> None:
    program, assignments = program_and_work(sumus.Task(net, sumus.losses.cross_entropy), clients)
    executor, witness = Counting(program, WORK), Witness(program, clients)
    for at, assignment in enumerate(assignments):
        list(witness.run(executor, broadcast_of(program), at, [assignment]))
    witness.look()
    witness.look()  # nothing was trained since
    assert (executor.trained, program.moved) == (clients + more, {})


LOG: list[float] = []


def logged(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = sumus.losses.cross_entropy(outputs, targets)
    LOG.append(float(losses.detach().sum()))
    return losses


def test_a_repeated_training_leaves_no_trace() -> None:
    program, assignments = program_and_work(sumus.Task(lambda: Drawing(nn.Dropout(0.5), nn.BatchNorm1d(4)), logged), 3)
    broadcast = broadcast_of(program)
    assert set(broadcast) == {"params", BUFFERS}
    witness = Witness(program)
    done = list(witness.run(SequentialExecutor(program, WORK), broadcast, 0, assignments))
    program.module.eval()
    program.begin_anew()

    def standing() -> Any:
        leaves = {name: tensor.detach().numpy().tobytes() for name, tensor in program.tensors.items()}
        modes = [part.training for part in program.module.modules()]
        drawn = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()
        return leaves, modes, drawn, list(LOG), list(map(digest_of, done))

    before = standing()
    for tree in broadcast.values():  # whatever a server does with its own arrays
        for leaf in tree.values():
            leaf += 1
    witness.look()
    assert standing() == before
    assert OTHER_NUMBERS not in program.moved


def test_a_log_of_the_users_gets_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    written = list[list[float]]()
    for look in (Witness.look, lambda witness: None):
        LOG.clear()
        monkeypatch.setattr(Witness, "look", look)
        run(logged)
        written.append(list(LOG))
    assert len(written[0]) >= 3 * 4 * STEPS
    assert written[0] == written[1]
