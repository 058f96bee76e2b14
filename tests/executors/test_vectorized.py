"""How the vectorized executor deals clients to stacks, pads their batches and cuts their steps; and when it does not stack."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sumus
from sumus.errors import TaskError
from sumus.executors import vectorized
from sumus.executors.executor import ClientAssignment, Trained
from sumus.executors.sequential import SequentialExecutor
from sumus.executors.vectorized import VectorizedExecutor, _padded, _runs, _width
from sumus.rng import key
from sumus.training import losses
from sumus.training.program import Program
from sumus.training.rewrite import NotCapturable
from sumus.work import ClientWork

FEATURES, CLASSES, BATCH = 5, 3, 4
WORK = sumus.sgd(0.1, epochs=1, batch_size=BATCH, momentum=0.9)

SIZES = st.lists(st.integers(1, 40), max_size=30)
STACKS = st.sampled_from([1, 2, 4, 8])


class Looking(nn.Module):
    """Looks at values, and so cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(inputs / inputs.abs().max().item())


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, CLASSES))


def program_of(model: Callable[[], nn.Module] = with_dropout, loss: Any = losses.cross_entropy) -> Program:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return model().double()

    return Program(sumus.Task(make, loss))


def executor_of(
    stack: int, work: ClientWork = WORK, model: Callable[[], nn.Module] = with_dropout
) -> VectorizedExecutor:
    return VectorizedExecutor(program_of(model), work, stack)


PROGRAM = program_of()


def dealt(sizes: Sequence[int], stack: int, batch_size: int | None = BATCH) -> list[list[int]]:
    return VectorizedExecutor(PROGRAM, sumus.sgd(0.1, batch_size=batch_size), stack).groups(sizes)


def clients_of(*sizes: int, most_steps: Iterable[int | None] | None = None) -> list[ClientAssignment]:
    draw = torch.Generator().manual_seed(0)
    limits = list(most_steps or [None] * len(sizes))
    return [
        ClientAssignment(
            f"{number}: {count}",
            torch.randn(count, FEATURES, generator=draw, dtype=torch.float64),
            torch.randint(0, CLASSES, (count,), generator=draw),
            {},
            key(number),
            most,
        )
        for number, (count, most) in enumerate(zip(sizes, limits, strict=True))
    ]


def trained_by(executor: Any, clients: Sequence[ClientAssignment], round_number: int = 0) -> dict[str, Trained]:
    broadcast = {"params": dict(executor.program.initial)}
    return {one.client: one for one in executor.run(broadcast, round_number, clients)}


def by_autograd(clients: Sequence[ClientAssignment], work: ClientWork = WORK, **options: Any) -> dict[str, Trained]:
    return trained_by(SequentialExecutor(program_of(**options), work), clients)


def bits(results: Mapping[str, Trained]) -> Any:
    return {
        who: ({name: leaf.tobytes() for name, leaf in one.parts["params"].items()}, one.metrics)
        for who, one in results.items()
    }


def assert_same(ours: Mapping[str, Trained], theirs: Mapping[str, Trained]) -> None:
    assert ours.keys() == theirs.keys()
    for who, wanted in theirs.items():
        for name, leaf in wanted.parts["params"].items():
            np.testing.assert_allclose(
                ours[who].parts["params"][name], leaf, rtol=0, atol=1e-9, err_msg=f"{who} {name}"
            )
        (total, seen), (loss, count) = ours[who].metrics["loss"], wanted.metrics["loss"]
        assert (seen, ours[who].examples) == (count, wanted.examples)
        assert total == pytest.approx(loss, rel=0, abs=1e-9)


# ── who trains together ──────────────────────────────────────────────────────────────────────────────────────────────


@given(sizes=SIZES, stack=STACKS)
def test_clients_are_dealt_by_size_and_of_one_size_in_their_order(sizes: list[int], stack: int) -> None:
    order = [position for group in dealt(sizes, stack) for position in group]
    assert order == sorted(range(len(sizes)), key=lambda position: -sizes[position])


@given(sizes=SIZES, stack=STACKS)
def test_where_all_have_a_whole_batch_every_stack_but_the_last_is_full(sizes: list[int], stack: int) -> None:
    groups = dealt([BATCH + size for size in sizes], stack)
    assert all(len(group) == stack for group in groups[:-1])
    assert all(1 <= len(group) <= stack for group in groups[-1:])


@given(sizes=SIZES, stack=STACKS, batch_size=st.sampled_from([None, 1, 4, 16]))
def test_in_a_stack_no_longest_batch_is_more_than_twice_anothers(
    sizes: list[int], stack: int, batch_size: int | None
) -> None:
    """And a stack that is not full is followed by a client whose is."""
    groups = [
        [min(sizes[position], batch_size or sizes[position]) for position in group]
        for group in dealt(sizes, stack, batch_size)
    ]
    assert all(group[0] <= 2 * group[-1] and len(group) <= stack for group in groups)
    for group, following in pairwise(groups):
        assert len(group) == stack or group[0] > 2 * following[0]


@given(sizes=SIZES, stack=STACKS, seed=st.integers(0, 99))
def test_stacks_are_of_the_same_sizes_in_whatever_order_clients_come(sizes: list[int], stack: int, seed: int) -> None:
    mixed = [sizes[place] for place in np.random.default_rng(seed).permutation(len(sizes))]
    assert [[sizes[p] for p in group] for group in dealt(sizes, stack)] == [
        [mixed[p] for p in group] for group in dealt(mixed, stack)
    ]


def test_results_come_stack_by_stack_the_largest_first() -> None:
    executor = executor_of(2)
    assert list(trained_by(executor, clients_of(5, 9, 3, 12, 4))) == ["3: 12", "1: 9", "0: 5", "4: 4", "2: 3"]


def test_of_no_clients_nothing_comes() -> None:
    assert trained_by(executor_of(4), []) == {}


# ── runs, widths, padding ────────────────────────────────────────────────────────────────────────────────────────────


@given(active=st.integers(0, 3000))
def test_runs_are_falling_powers_of_two_and_together_everyone(active: int) -> None:
    runs = list(_runs(active))
    lengths = [last - first for first, last in runs]
    assert [first for first, _ in runs] == [sum(lengths[:place]) for place in range(len(lengths))]
    assert sum(lengths) == active
    assert all(length.bit_count() == 1 for length in lengths)
    assert lengths == sorted(set(lengths), reverse=True)


@given(rows=st.integers(1, 5000), room=st.none() | st.integers(0, 100))
def test_a_width_holds_the_rows_and_is_at_most_half_more(rows: int, room: int | None) -> None:
    most = None if room is None else rows + room
    assert rows <= _width(rows, most) <= min(1.5 * rows + 1, most or 10_000)


def test_there_are_few_widths() -> None:
    assert [_width(rows, None) for rows in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert len({_width(rows, None) for rows in range(1, 1025)}) == 20
    assert {_width(rows, 32) for rows in range(25, 33)} == {32}
    assert {_width(rows, 20) for rows in range(17, 21)} == {20}


@st.composite
def dealt_batches(draw: st.DrawFn) -> tuple[list[list[np.ndarray]], list[int], int | None]:
    """Batches of some clients, those with the most steps first; their examples; and the most rows of a batch."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    counts = sorted((draw(st.integers(1, 4)) for _ in sizes), reverse=True)
    most = draw(st.none() | st.integers(1, 9))
    batches = [
        [np.array(draw(st.permutations(range(size)))[: draw(st.integers(1, most or size))]) for _ in range(count)]
        for size, count in zip(sizes, counts, strict=True)
    ]
    return batches, sizes, most


@given(dealt_batches())
def test_padding_is_a_row_of_the_same_batch_that_does_not_count(
    case: tuple[list[list[np.ndarray]], list[int], int | None],
) -> None:
    batches, sizes, most = case
    index, mask = _padded(batches, sizes, most)
    width = _width(max(len(rows) for each in batches for rows in each), most)
    assert index.shape == mask.shape == (len(batches[0]), len(batches), width)
    for client, each in enumerate(batches):
        offset = sum(sizes[:client])
        for step in range(len(batches[0])):
            rows = each[step] if step < len(each) else []
            for place in range(width):
                assert mask[step, client, place] == (place < len(rows))
                if len(rows):
                    assert index[step, client, place] == offset + (rows[place] if place < len(rows) else rows[0])


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "steps",
    [(1, 1, 1, 1), (3, 3, 3, 3), (4, 1, 1, 1), (1, 2, 4, 3), (2, 0, 3, 1), (4, 4, 4, 1)],
)
def test_clients_of_a_stack_may_take_different_numbers_of_steps(steps: tuple[int, ...]) -> None:
    """From one stack to one client, as the others end; 0: one that takes none."""
    clients = clients_of(16, 16, 16, 15, most_steps=steps)
    executor = executor_of(4)
    found = trained_by(executor, clients)
    assert executor.refused is None
    assert_same(found, by_autograd(clients))
    for one, taken in zip(clients, steps, strict=True):
        assert (found[one.client].metrics["loss"][1] > 0) == (taken > 0)


def test_stragglers_stop_where_they_do_alone() -> None:
    clients = clients_of(16, 13, 9, 9, 16, most_steps=(2, None, 1, None, 3))
    assert_same(trained_by(executor_of(4), clients), by_autograd(clients))


@pytest.mark.parametrize("sizes", [(7,), (5, 5), (9, 7, 6, 5), (9, 4, 2, 1)])
def test_a_batch_may_be_a_whole_client(sizes: tuple[int, ...]) -> None:
    work, clients = sumus.sgd(0.1, epochs=3, momentum=0.9), clients_of(*sizes)
    executor = executor_of(4, work)
    assert_same(trained_by(executor, clients), by_autograd(clients, work))
    assert executor.refused is None


def test_a_client_trains_the_same_whoever_its_batches_are_padded_for() -> None:
    clients = clients_of(8, 7, 6, 5)
    together, alone = trained_by(executor_of(4), clients), executor_of(4)
    for one in clients:
        assert_same(trained_by(alone, [one]), {one.client: together[one.client]})


def test_whoever_fails_is_named() -> None:
    with pytest.raises(TaskError) as error:
        trained_by(VectorizedExecutor(program_of(loss=lambda outputs, targets: outputs), WORK, 2), clients_of(8, 9))
    assert "client '1: 9'" in str(error.value)


def test_a_loss_without_a_gradient_is_refused_as_by_autograd() -> None:
    program = program_of(loss=lambda outputs, targets: losses.cross_entropy(outputs.detach(), targets))
    with pytest.raises(TaskError, match="the loss does not depend on the model's parameters"):
        trained_by(VectorizedExecutor(program, WORK, 2), clients_of(8, 9))


# ── graphs and memory, used again ────────────────────────────────────────────────────────────────────────────────────


def test_one_graph_serves_all_full_stacks_and_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int | None, int]] = []

    def counted(program: Any, work: Any, inputs: Tensor, targets: Tensor, stack: int | None) -> Any:
        shapes.append((stack, len(inputs)))
        return capture(program, work, inputs, targets, stack)

    capture = vectorized.capture
    monkeypatch.setattr(vectorized, "capture", counted)
    executor = executor_of(2)
    for number in range(3):
        trained_by(executor, clients_of(8, 8, 4, 4, 4, 4), number)
    assert shapes == [(2, 4)]
    trained_by(executor, clients_of(8, 6, 3))
    assert sorted(shapes) == [(1, 3), (2, 4)]


def test_memory_is_used_again_by_stacks_and_rounds_and_shows_nothing_of_those_before() -> None:
    executor = executor_of(2)
    first = trained_by(executor, clients_of(9, 8, 7, 6, 5))
    kept, where = bits(first), {name: tensor.data_ptr() for name, tensor in executor._memory.items()}
    second = trained_by(executor, clients_of(6, 9, 4))
    assert bits(first) == kept
    assert {name: tensor.data_ptr() for name, tensor in executor._memory.items()} == where
    assert bits(second) == bits(trained_by(executor_of(2), clients_of(6, 9, 4)))
    assert bits(trained_by(executor, clients_of(9, 8, 7, 6, 5))) == kept


def test_a_first_stack_may_be_smaller_than_a_later_one() -> None:
    executor = executor_of(4)
    for sizes in ((8,), (8, 8, 8), (8, 8), (9, 8, 7, 6)):
        clients = clients_of(*sizes)
        assert_same(trained_by(executor, clients), by_autograd(clients))


# ── what is not stacked ──────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_captured_trains_one_by_one_with_autograds_bits_and_the_reason() -> None:
    clients = clients_of(9, 5, 8)
    executor = executor_of(2, model=Looking)
    assert executor.refused is None
    assert bits(trained_by(executor, clients)) == bits(by_autograd(clients, model=Looking))
    assert executor.refused is not None
    assert "its forward depends on the values of tensors" in executor.refused


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (4, 4), (2, 3)])
def test_a_stack_of_which_one_graph_is_refused_begins_again_by_autograd(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the runs that its steps are cut into, and after however many steps."""

    def refusing(program: Any, work: Any, inputs: Tensor, targets: Tensor, stack: int | None) -> Any:
        if (stack, len(inputs)) == shape:
            raise NotCapturable(f"not {shape}")
        return capture(program, work, inputs, targets, stack)

    capture = vectorized.capture
    monkeypatch.setattr(vectorized, "capture", refusing)
    clients = clients_of(16, 12, 12, 8, 3, 2)
    executor, wanted = executor_of(4), by_autograd(clients)
    found = trained_by(executor, clients)
    assert executor.refused == f"not {shape}"
    assert_same(found, wanted)
    alone = ["4: 3", "5: 2"] if shape == (2, 3) else ["0: 16", "1: 12", "2: 12", "3: 8"]
    assert bits({who: found[who] for who in alone}) == bits({who: wanted[who] for who in alone})
