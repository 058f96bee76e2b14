"""The sequential executor against oracles: what one can compute by hand in torch, it must give.

Sums are fixed point. With so few clients and the weights used here the plan's sums have f = 40 fraction bits, or as many
as the overflow rule leaves, so a mean of updates is off by at most 2^−(f+1) a leaf entry and round. That is the tolerance
where float64 models are compared; float32 models get a few units in their last place.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sumus
from sumus.algorithm import Algorithm
from sumus.errors import UsageError
from sumus.executors.executor import ClientAssignment, Executor, Trained
from sumus.executors.sequential import SequentialExecutor
from sumus.fixed_point import FixedPoint
from sumus.optimizers import ServerState
from sumus.rng import generator, key
from sumus.training import losses
from sumus.training.program import Program
from sumus.types import Broadcast, Tree
from sumus.work import ClientRules, ClientWork, LocalRun, no_state, send_difference, zeros_as

Clients = Mapping[str, tuple[Tensor, Tensor]]

FEATURES, CLASSES = 5, 3


# ── what is trained, and the round that the simulator runs, by hand ──────────────────────────────────────────────────


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(FEATURES, CLASSES).double()


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def with_statistics() -> nn.Module:
    """momentum=None averages over all batches seen, and so depends on the integer counter."""
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(8, momentum=None)
    return nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES)).double()


def some(count: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=draw, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(0, CLASSES, (count,), generator=draw)


def task(model: Callable[[], nn.Module] = mlp, **options: Any) -> sumus.Task:
    return sumus.Task(model, losses.cross_entropy, **options)


def program_of(model: Callable[[], nn.Module] = mlp, **options: Any) -> Program:
    return Program(task(model, **options))


def trained_by(
    program: Program,
    work: ClientWork,
    clients: Clients,
    *,
    broadcast: Broadcast | None = None,
    round_number: int = 0,
    states: Mapping[str, Mapping[str, Tree]] | None = None,
    most_steps: int | None = None,
) -> dict[str, Trained]:
    assignments = [
        ClientAssignment(who, *examples, (states or {}).get(who, {}), key(round_number, who), most_steps)
        for who, examples in clients.items()
    ]
    executor: Executor = SequentialExecutor(program, work)
    return {t.client: t for t in executor.run(broadcast or first_of(program), round_number, assignments)}


def first_of(program: Program) -> Broadcast:
    """The first broadcast: the initial model."""
    return sumus.fedavg(sumus.sgd(0.1)).start(program.initial_shared, program.description).broadcast


def rounds_of(
    program: Program, algorithm: Algorithm, clients: Clients, rounds: int = 1, sums: FixedPoint | None = None
) -> Tree:
    """The model after some rounds with everyone."""
    sums = sums or FixedPoint.fit(len(clients), max_weight=64)
    state: ServerState = algorithm.start(program.initial_shared, program.description)
    hop = algorithm.first_hop(program.description, sums)
    for number in range(rounds):
        total = sumus.RunningSum()
        for who, result in trained_by(
            program, algorithm.client, clients, broadcast=state.broadcast, round_number=number
        ).items():
            update = algorithm.report(who, result.parts, result.examples, result.metrics, b"", generator(who))
            hop.count_in(update, into=total)
        combined = algorithm.combine(total.total, program.description, sums, b"", len(clients))
        state = algorithm.step(combined, state, program.description)
    return algorithm.release(state)


def by_torch(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    clip: float | None = None,
) -> dict[str, np.ndarray]:
    """The module's state after a step on each batch."""
    module.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(inputs), targets).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


def close(ours: Mapping[str, Any], theirs: Mapping[str, Any], atol: float, rtol: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=atol, err_msg=name)


def bits(trained: Trained) -> Any:
    trees = {**trained.parts, **trained.state}
    return {part: {n: leaf.tobytes() for n, leaf in tree.items()} for part, tree in trees.items()}, trained.metrics


# ── oracles ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", [linear, mlp])
def test_a_round_of_one_client_with_one_full_batch_is_a_step_of_torchs_sgd(model: Callable[[], nn.Module]) -> None:
    alone = {"alice": some(20, seed=0)}
    ours = rounds_of(program_of(model), sumus.fedavg(sumus.sgd(0.5)), alone, sums=FixedPoint(40, 256.0, 64, 1))
    module = model()
    theirs = by_torch(module, torch.optim.SGD(module.parameters(), 0.5), [alone["alice"]])
    close(ours, theirs, atol=2.0**-40)


@pytest.mark.parametrize("model", [linear, mlp])
def test_equal_clients_with_one_full_batch_each_are_centralised_sgd_on_their_union(
    model: Callable[[], nn.Module],
) -> None:
    """Five rounds; each adds at most 2^−(f+1), and a step of size 0.5 keeps earlier ones from growing much."""
    clients = {str(number): some(12, seed=number) for number in range(6)}
    sums = FixedPoint.fit(6, max_weight=12)
    ours = rounds_of(program_of(model), sumus.fedsgd(0.5), clients, rounds=5, sums=sums)
    union = tuple(torch.cat([examples[side] for examples in clients.values()]) for side in (0, 1))
    module = model()
    theirs = by_torch(module, torch.optim.SGD(module.parameters(), 0.5), [union] * 5)  # pyright: ignore[reportArgumentType]
    close(ours, theirs, atol=20 * 2.0**-sums.fraction_bits)


def test_unequal_clients_weigh_by_their_examples_and_so_are_the_union_too() -> None:
    clients = {str(number): some(4 * number + 3, seed=number) for number in range(4)}
    ours = rounds_of(program_of(), sumus.fedsgd(0.5), clients, sums=FixedPoint(38, 256.0, 64, 4))
    union = tuple(torch.cat([examples[side] for examples in clients.values()]) for side in (0, 1))
    module = mlp()
    close(ours, by_torch(module, torch.optim.SGD(module.parameters(), 0.5), [union]), atol=2.0**-38)  # pyright: ignore


OPTIMIZERS: dict[str, tuple[ClientWork, Callable[[Any], torch.optim.Optimizer], float | None]] = {
    "sgd": (sumus.sgd(0.2, steps=4), lambda p: torch.optim.SGD(p, 0.2), None),
    "momentum": (sumus.sgd(0.2, steps=4, momentum=0.9), lambda p: torch.optim.SGD(p, 0.2, 0.9), None),
    "nesterov with decay": (
        sumus.sgd(0.2, steps=4, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.2, 0.9, nesterov=True, weight_decay=0.01),
        None,
    ),
    "adam": (sumus.adam(0.01, steps=4), lambda p: torch.optim.Adam(p, 0.01), None),
    "adamw": (
        sumus.adamw(0.01, steps=4, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        None,
    ),
    "clipped": (sumus.sgd(0.2, steps=4, clip_norm=0.05), lambda p: torch.optim.SGD(p, 0.2), 0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_several_local_steps_are_those_of_torchs_optimizer(name: str) -> None:
    """Where gradients are clipped, torch adds 1e-6 to the norm that it divides by; else only the last places differ."""
    work, make, clip = OPTIMIZERS[name]
    examples = some(20, seed=3)
    program = program_of()
    sent = trained_by(program, work, {"alice": examples})["alice"].parts["params"]
    module = mlp()
    theirs = by_torch(module, make(module.parameters()), [examples] * 4, clip)
    ours = {leaf: program.initial[leaf] - sent[leaf] for leaf in sent}
    close(ours, theirs, atol=1e-13 if clip is None else 1e-5)


def test_batches_follow_the_work_and_examples_are_counted() -> None:
    result = trained_by(program_of(), sumus.sgd(0.1, epochs=3, batch_size=8), {"alice": some(20, 0)})["alice"]
    assert result.examples == 20
    assert result.metrics["loss"][1] == 60


def test_the_rate_is_that_of_the_round() -> None:
    clients, program = {"alice": some(9, 0)}, program_of(linear)
    work = sumus.sgd(sumus.schedules.steps(0.4, (5,), factor=0.5))
    early, late = (
        trained_by(program, work, clients, round_number=number)["alice"].parts["params"]["weight"] for number in (4, 5)
    )
    np.testing.assert_allclose(late, early / 2, rtol=1e-12)


# ── the fused path ───────────────────────────────────────────────────────────────────────────────────────────────────


def identity(grads: Any, params: Any, broadcast: Any, state: Any) -> Any:
    """No correction, but not the one that the executor recognises: this forces the generic path."""
    return grads


FUSED = {
    "plain": sumus.sgd(0.1, epochs=2, batch_size=7),
    "momentum": sumus.sgd(0.1, epochs=2, batch_size=7, momentum=0.9),
    "nesterov": sumus.sgd(0.1, epochs=2, batch_size=7, momentum=0.9, nesterov=True),
    "decay": sumus.sgd(0.1, epochs=2, batch_size=7, weight_decay=0.05),
    "momentum, decay": sumus.sgd(0.1, epochs=2, batch_size=7, momentum=0.5, weight_decay=0.05),
    "nesterov, decay, clip": sumus.sgd(
        0.1, epochs=2, batch_size=7, momentum=0.9, nesterov=True, weight_decay=0.05, clip_norm=0.1
    ),
    "clip": sumus.sgd(0.1, epochs=2, batch_size=7, clip_norm=0.1),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_sgd_is_the_generic_rule(name: str) -> None:
    generic = dataclasses.replace(FUSED[name], rules=dataclasses.replace(FUSED[name].rules, correct=identity))
    program, clients = program_of(leaves={"2.bias": "personal"}), {"alice": some(20, 0), "bob": some(9, 1)}
    assert SequentialExecutor(program, FUSED[name])._fused_sgd({}, 0.1) is not None
    assert SequentialExecutor(program, generic)._fused_sgd({}, 0.1) is None
    fast, slow = (trained_by(program, work, clients) for work in (FUSED[name], generic))
    for who in clients:
        close(fast[who].parts["params"], slow[who].parts["params"], atol=1e-15, rtol=1e-12)
        close(fast[who].state["personal"], slow[who].state["personal"], atol=1e-15, rtol=1e-12)


def test_adam_is_not_fused() -> None:
    assert SequentialExecutor(program_of(), sumus.adam(0.1))._fused_sgd({}, 0.1) is None


# ── leaves ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("work", [sumus.sgd(0.5, steps=3, weight_decay=0.1), sumus.adamw(0.1, steps=3)])
def test_frozen_leaves_never_move(work: ClientWork) -> None:
    program = program_of(leaves={"0.*": "frozen"})
    before = {name: program.tensors[name].clone() for name in ("0.weight", "0.bias")}
    sent = trained_by(program, work, {"alice": some(20, 0)})["alice"].parts["params"]
    assert sorted(sent) == ["2.bias", "2.weight"]
    assert all(torch.equal(program.tensors[name], value) for name, value in before.items())
    assert all(np.abs(leaf).max() > 0 for leaf in sent.values())


def test_personal_leaves_are_trained_kept_by_their_client_and_not_sent() -> None:
    program, work = program_of(leaves={"2.*": "personal"}), sumus.sgd(0.5, steps=3)
    clients = {"alice": some(20, 0), "bob": some(20, 1)}
    first = trained_by(program, work, clients)
    for result in first.values():
        assert sorted(result.parts["params"]) == ["0.bias", "0.weight"]
        assert sorted(result.state["personal"]) == ["2.bias", "2.weight"]
        assert not np.array_equal(result.state["personal"]["2.weight"], program.initial["2.weight"])
    alice, bob = (first[who].state["personal"]["2.weight"] for who in clients)
    assert not np.array_equal(alice, bob)

    states = {who: result.state for who, result in first.items()}
    second = trained_by(program, sumus.sgd(1e-9), clients, states=states)
    for who in clients:
        np.testing.assert_allclose(
            second[who].state["personal"]["2.weight"], states[who]["personal"]["2.weight"], atol=1e-8
        )


def test_a_newcomer_begins_with_the_initial_personal_leaves_whoever_trained_before() -> None:
    program, work = program_of(leaves={"2.*": "personal"}), sumus.sgd(0.5, steps=3)
    clients = {"alice": some(20, 0), "bob": some(20, 1)}
    alone = trained_by(program_of(leaves={"2.*": "personal"}), work, {"bob": clients["bob"]})["bob"]
    assert bits(trained_by(program, work, clients)["bob"]) == bits(alone)


def test_personal_leaves_and_their_model_are_trained_as_one() -> None:
    """Where they stay does not change the client's own steps."""
    clients = {"alice": some(20, 0)}
    work = sumus.sgd(0.5, steps=3, momentum=0.9)
    whole = trained_by(program_of(), work, clients)["alice"].parts["params"]
    program = program_of(leaves={"2.*": "personal"})
    split = trained_by(program, work, clients)["alice"]
    own = {name: program.initial[name] - leaf for name, leaf in split.state["personal"].items()}
    close({**split.parts["params"], **own}, whole, atol=0)


def test_running_statistics_are_averaged_like_weights() -> None:
    program = program_of(with_statistics)
    clients = {"alice": some(30, 0), "bob": some(10, 1)}
    work = sumus.sgd(0.1, steps=2)
    ours = rounds_of(program, sumus.fedavg(work), clients, sums=FixedPoint(40, 256.0, 64, 2))
    ends = {}
    for who, examples in clients.items():
        module = with_statistics()
        ends[who] = by_torch(module, torch.optim.SGD(module.parameters(), 0.1), [examples] * 2)
    assert "1.num_batches_tracked" not in ours
    for name in ("1.running_mean", "1.running_var", "0.weight"):
        np.testing.assert_allclose(ours[name], 0.75 * ends["alice"][name] + 0.25 * ends["bob"][name], atol=1e-11)


def test_statistics_are_a_part_of_their_own_from_broadcast_to_model() -> None:
    program = program_of(with_statistics)
    statistics = {"1.running_mean", "1.running_var"}
    assert set(program.buffers) == statistics
    assert set(program.shared) == set(program.trained) == set(program.initial_shared) - statistics
    first = first_of(program)
    assert (set(first["params"]), set(first["buffers"])) == (set(program.shared), statistics)
    start = {**first, "buffers": {name: leaf + 2.0 for name, leaf in first["buffers"].items()}}
    sent = trained_by(program, sumus.sgd(0.1), {"alice": some(30, 0)}, broadcast=start)["alice"].parts
    assert (set(sent["params"]), set(sent["buffers"])) == (set(program.shared), statistics)
    for name, leaf in sent["buffers"].items():
        held = program.tensors[name].numpy()
        assert np.array_equal(leaf, start["buffers"][name] - held)
        assert np.abs(leaf).max() > 0


def test_personal_statistics_stay_with_their_client() -> None:
    program = program_of(with_statistics, leaves={"1.running_*": "personal"})
    result = trained_by(program, sumus.sgd(0.1), {"alice": some(30, 0)})["alice"]
    assert set(result.parts) == {"params"}
    assert set(result.state["personal"]) == {"1.running_mean", "1.running_var"}


def test_no_rule_of_the_client_sees_statistics() -> None:
    seen: list[set[str]] = []

    def correct(grads: Any, params: Any, broadcast: Any, state: Any) -> Any:
        seen.extend([set(broadcast), set(grads), set(params), set(broadcast["params"])])
        return grads

    def finish(broadcast: Any, params: Any, state: Any, done: LocalRun) -> Any:
        seen.extend([set(broadcast), set(params), set(broadcast["params"])])
        return send_difference(broadcast, params, state, done)

    program = program_of(with_statistics)
    work = dataclasses.replace(sumus.sgd(0.1), rules=ClientRules(correct=correct, finish=finish))
    parts = trained_by(program, work, {"alice": some(30, 0)})["alice"].parts
    names = {"params"}, set(program.shared)
    assert all(found in names for found in seen)
    assert len(seen) == 7
    assert set(parts) == {"params", "buffers"}


def test_counters_are_restored_before_every_client() -> None:
    program, work = program_of(with_statistics), sumus.sgd(0.1, steps=3)
    clients = {"alice": some(30, 0), "bob": some(10, 1)}
    together = trained_by(program, work, clients)["bob"]
    alone = trained_by(program_of(with_statistics), work, {"bob": clients["bob"]})["bob"]
    assert bits(together) == bits(alone)
    program.load(program.tensors_of(program.initial_shared))
    assert int(program.tensors["1.num_batches_tracked"]) == 0


def test_frozen_statistics_are_restored_too() -> None:
    program = program_of(with_statistics, leaves={"1.running_*": "frozen"})
    sent = trained_by(program, sumus.sgd(0.1, steps=3), {"alice": some(30, 0)})["alice"].parts
    assert set(sent) == {"params"}
    assert "1.running_mean" not in sent["params"]
    program.load(program.tensors_of(program.initial_shared))
    assert not program.tensors["1.running_mean"].any()


def test_tied_weights_move_as_one_and_are_sent_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(FEATURES, FEATURES, bias=False).double()
            self.outer = nn.Linear(FEATURES, FEATURES, bias=False).double()
            self.outer.weight = self.inner.weight

        def forward(self, inputs: Tensor) -> Tensor:
            return self.outer(torch.tanh(self.inner(inputs)))

    program, examples = program_of(Tied), some(20, 0)
    sent = trained_by(program, sumus.sgd(0.3, steps=2), {"alice": examples})["alice"].parts["params"]
    module = Tied()
    theirs = by_torch(module, torch.optim.SGD(module.parameters(), 0.3), [examples] * 2)
    close(
        {"inner.weight": program.initial["inner.weight"] - sent["inner.weight"]},
        {"inner.weight": theirs["inner.weight"]},
        1e-14,
    )
    state = program.state_dict(program.initial_shared)
    assert sorted(state) == ["inner.weight", "outer.weight"]
    module.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_send_single_precision(dtype: torch.dtype) -> None:
    """What is sent is exactly the difference of two half-precision numbers."""
    program = program_of(lambda: mlp().to(dtype))
    sent = trained_by(program, sumus.sgd(0.5), {"alice": some(20, 0, dtype)})["alice"].parts["params"]
    for name, leaf in sent.items():
        assert leaf.dtype == np.float32
        held = program.tensors[name].detach().float().numpy()
        assert np.array_equal(leaf, program.initial[name] - held)
    assert any(np.abs(leaf).max() > 0 for leaf in sent.values())


# ── what an algorithm brings of its own ──────────────────────────────────────────────────────────────────────────────


FROM_ZERO = zeros_as("first")


def returning(
    parts: Callable[..., Any],
    state: Callable[..., Any] = lambda *args: {},
    init: Callable[..., Any] = FROM_ZERO,
) -> ClientWork:
    """SGD whose `finish` gives these."""
    return dataclasses.replace(
        sumus.sgd(0.1, steps=3), rules=ClientRules(finish=lambda *args: (parts(*args), state(*args)), init=init)
    )


def test_a_state_begins_with_init_and_goes_on_with_what_was_kept() -> None:
    """init sees the shared leaves of the client's first broadcast; a newcomer begins so in any round."""
    seen: list[Mapping[str, Mapping[str, Tensor]]] = []

    def correct(grads: Any, params: Any, broadcast: Any, state: Any) -> Any:
        seen.append(state)
        return grads

    def finish(broadcast: Any, params: Any, state: Any, done: LocalRun) -> Any:
        return {"params": {}}, {"anchor": {name: leaf + 1 for name, leaf in state["anchor"].items()}}

    work = dataclasses.replace(
        sumus.sgd(0.1),
        rules=ClientRules(correct=correct, finish=finish, init=lambda params: {"anchor": dict(params)}),
    )
    program, clients = program_of(with_statistics, leaves={"3.*": "personal"}), {"alice": some(20, 0)}
    first = trained_by(program, work, clients)["alice"].state
    later = {**first_of(program), "params": {name: leaf * 9 for name, leaf in first_of(program)["params"].items()}}
    second = trained_by(program, work, {**clients, "bob": some(9, 1)}, broadcast=later, states={"alice": first})
    close(first["anchor"], {name: program.initial[name] + 1 for name in program.shared}, atol=0)
    close(second["alice"].state["anchor"], {name: program.initial[name] + 2 for name in program.shared}, atol=0)
    close(second["bob"].state["anchor"], {name: program.initial[name] * 9 + 1 for name in program.shared}, atol=0)
    assert [set(state) for state in seen] == [{"anchor"}] * 3


def test_a_state_without_a_first_state_is_refused() -> None:
    """Else it would be lost, or missing in the first round: nothing would show in the second."""
    work = returning(lambda *_: {"params": {}}, lambda *_: {"b": {}, "a": {"": 1.0}}, init=no_state)
    with pytest.raises(UsageError, match=r"custom\(\) returned the state \['a', 'b'\].*: give it init="):
        trained_by(program_of(), work, {"alice": some(20, 0)})


@pytest.mark.parametrize("leaves", [{}, {"2.*": "personal"}])
def test_the_name_of_personal_leaves_is_taken(leaves: Mapping[str, Any]) -> None:
    work = returning(lambda *_: {"params": {}}, lambda *_: {"personal": {"2.bias": torch.zeros(CLASSES)}})
    with pytest.raises(UsageError, match="reserved name 'personal'"):
        trained_by(program_of(leaves=leaves), work, {"alice": some(20, 0)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_control_keeps_its_own_dtype_and_bits_whatever_the_model_is_in(dtype: torch.dtype) -> None:
    """A broadcast or a state that is not the model's: single precision would lose its last bits in a bfloat16 model."""
    program = program_of(lambda: mlp().to(dtype))
    precise = {name: np.full(leaf.shape, 1 + 2.0**-20, np.float32) for name, leaf in program.initial.items()}
    other = {"anything": np.array([1 / 3, 2**40 + 1]), "more": np.array(7, np.int32)}
    work = returning(lambda broadcast, *_: {"params": broadcast["control"]}, lambda b, p, state, done: state)
    result = trained_by(
        program,
        work,
        {"alice": some(20, 0, dtype)},
        broadcast={**first_of(program), "control": precise},
        states={"alice": {"control": precise, "other": other}},
    )["alice"]
    for given, came in (
        (precise, result.parts["params"]),
        (precise, result.state["control"]),
        (other, result.state["other"]),
    ):
        assert {n: (leaf.dtype, leaf.tobytes()) for n, leaf in came.items()} == {
            n: (leaf.dtype, leaf.tobytes()) for n, leaf in given.items()
        }


def test_numbers_may_be_sent_and_kept() -> None:
    def parts(broadcast: Any, params: Any, state: Any, done: LocalRun) -> Any:
        return {"params": {}, "steps": {"": done.steps}, "norm": {"": params["0.bias"].square().sum()}}

    def state(*_: Any) -> Any:
        return {"rounds": {"": 1.5}}

    result = trained_by(program_of(), returning(parts, state), {"alice": some(20, 0)})["alice"]
    numbers = result.parts["steps"][""], result.parts["norm"][""], result.state["rounds"][""]
    assert [(type(number), number.dtype.name, number.shape) for number in numbers] == [(np.ndarray, "float64", ())] * 3
    assert (float(numbers[0]), float(numbers[2])) == (3.0, 1.5)


def test_finish_learns_what_the_local_run_was() -> None:
    runs: list[LocalRun] = []

    def finish(broadcast: Any, params: Any, state: Any, done: LocalRun) -> Any:
        runs.append(done)
        return send_difference(broadcast, params, state, done)

    schedule = sumus.schedules.steps(0.4, (5,), factor=0.5)
    work = dataclasses.replace(sumus.sgd(schedule, epochs=3, batch_size=8), rules=ClientRules(finish=finish))
    trained_by(program_of(), work, {"alice": some(20, 0)}, round_number=6)
    assert runs == [LocalRun(steps=9, lr=0.2, examples=20)]


@pytest.mark.parametrize("work", [sumus.sgd(0.1, epochs=3, batch_size=8), sumus.adam(0.1, epochs=3, batch_size=8)])
def test_a_client_without_time_stops_after_its_most_steps(work: ClientWork) -> None:
    """What it did until then is what a shorter work would have done, and finish learns how far it came."""
    runs: list[LocalRun] = []

    def finish(broadcast: Any, params: Any, state: Any, done: LocalRun) -> Any:
        runs.append(done)
        return send_difference(broadcast, params, state, done)

    work = dataclasses.replace(work, rules=dataclasses.replace(work.rules, finish=finish))
    clients, program = {"alice": some(20, 0)}, program_of()
    for most, steps, seen in ((1, 1, 8), (4, 4, 8 + 8 + 4 + 8), (9, 9, 60), (50, 9, 60)):
        part = trained_by(program, work, clients, most_steps=most)["alice"]
        short = trained_by(program, dataclasses.replace(work, epochs=None, steps=steps), clients)["alice"]
        assert bits(part) == bits(short)
        assert (runs[-2].steps, runs[-1].steps, part.metrics["loss"][1], part.examples) == (steps, steps, seen, 20)


@pytest.mark.parametrize("batch_size", [None, 8, 1])
@pytest.mark.parametrize("model", [linear, mlp])
def test_the_gradient_at_the_broadcast_model_is_that_of_the_mean_over_all_examples(
    model: Callable[[], nn.Module], batch_size: int | None
) -> None:
    """20 examples in batches of 8: a mean of the batches' means would weigh the last four double."""
    program, examples = program_of(model), some(20, 0)
    sent = {name: leaf + 0.5 for name, leaf in program.initial_shared.items()}
    module = model()
    module.load_state_dict({name: torch.from_numpy(leaf) for name, leaf in sent.items()})
    nn.functional.cross_entropy(module(examples[0]), examples[1]).backward()
    ours = gradient_of(program, sumus.sgd(0.3, epochs=2, batch_size=batch_size), examples, {"params": sent})
    close(ours, {name: param.grad for name, param in module.named_parameters()}, atol=1e-15)


def gradient_of(
    program: Program, work: ClientWork, examples: tuple[Tensor, Tensor], broadcast: Broadcast, state: Any = None
) -> Mapping[str, Tensor]:
    found: list[Any] = []

    def finish(broadcast: Any, params: Any, state: Any, done: LocalRun) -> Any:
        found.append(done.gradient)
        return send_difference(broadcast, params, state, done)

    work = dataclasses.replace(work, rules=dataclasses.replace(work.rules, finish=finish, needs_gradient=True))
    trained_by(program, work, {"alice": examples}, broadcast=broadcast, states={"alice": state or {}})
    return found[0]


def test_the_gradient_is_of_shared_leaves_beside_the_clients_own_personal_ones() -> None:
    program, examples = program_of(leaves={"2.*": "personal", "0.bias": "frozen"}), some(20, 0)
    own = {name: program.initial[name] * 3 for name in program.personal}
    ours = gradient_of(program, sumus.sgd(0.3, batch_size=8), examples, first_of(program), {"personal": own})
    module = mlp()
    module.load_state_dict({name: torch.from_numpy({**program.initial, **own}[name]) for name in program.initial})
    nn.functional.cross_entropy(module(examples[0]), examples[1]).backward()
    close(ours, {"0.weight": module.get_parameter("0.weight").grad}, atol=1e-15)


@pytest.mark.parametrize("leaves", [{}, {"1.running_*": "personal"}, {"1.running_*": "frozen"}])
def test_the_pass_for_the_gradient_leaves_no_trace(leaves: Mapping[str, Any]) -> None:
    """Statistics, their counter, which sets how fast they move, and the model are as they were sent when training begins."""
    program, clients = program_of(with_statistics, leaves=leaves), {"alice": some(20, 0), "bob": some(11, 1)}
    broadcast = first_of(program)
    if "buffers" in broadcast:
        broadcast = {**broadcast, "buffers": {name: leaf + 2 for name, leaf in broadcast["buffers"].items()}}
    work = sumus.sgd(0.1, epochs=2, batch_size=8, momentum=0.9)
    plain, asked = (
        trained_by(
            program,
            dataclasses.replace(work, rules=dataclasses.replace(work.rules, needs_gradient=needs)),
            clients,
            broadcast=broadcast,
        )
        for needs in (False, True)
    )
    for who in clients:
        assert bits(plain[who]) == bits(asked[who])


def test_states_that_are_views_of_the_model_stay_as_they_are_when_the_next_client_trains() -> None:
    work = returning(lambda b, p, *_: {"params": {}}, lambda b, params, *_: {"head": {"w": params["2.weight"][1:]}})
    clients = {"alice": some(20, 0), "bob": some(20, 1)}
    together = trained_by(program_of(), work, clients)["alice"].state["head"]["w"]
    alone = trained_by(program_of(), work, {"alice": clients["alice"]})["alice"].state["head"]["w"]
    assert np.array_equal(together, alone)


# ── nobody's result depends on the others ────────────────────────────────────────────────────────────────────────────


def dropping() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))


@pytest.mark.parametrize("leaves", [{}, {"3.*": "personal"}])
def test_the_order_of_clients_changes_nobodys_result(leaves: Mapping[str, Any]) -> None:
    """With dropout, shuffling, statistics and personal leaves: every bit is the same."""
    clients = {
        str(count): some(count, count, torch.float32) for count in (15, 18, 19, 22)
    }  # no batch of one: statistics
    work = sumus.sgd(0.1, epochs=2, batch_size=4, momentum=0.9)
    program = program_of(dropping, leaves=leaves)
    forth = trained_by(program, work, clients)
    back = trained_by(program, work, dict(reversed(list(clients.items()))))
    alone = {who: trained_by(program, work, {who: examples})[who] for who, examples in clients.items()}
    for who in clients:
        assert bits(forth[who]) == bits(back[who]) == bits(alone[who])


def test_rounds_and_clients_have_randomness_of_their_own() -> None:
    examples, program, work = some(15, 0, torch.float32), program_of(dropping), sumus.sgd(0.1, batch_size=4)
    one = trained_by(program, work, {"a": examples, "b": examples})
    later = trained_by(program, work, {"a": examples}, round_number=1)
    assert bits(one["a"]) != bits(one["b"])
    assert bits(one["a"]) != bits(later["a"])


def test_all_randomness_comes_from_the_key() -> None:
    """Neither the client's name, nor the round, nor torch's own state is in it."""
    examples, program, work = some(15, 0, torch.float32), program_of(dropping), sumus.sgd(0.1, batch_size=4)
    executor = SequentialExecutor(program, work)

    def result(who: Any, number: int, own: bytes) -> Any:
        torch.manual_seed(number)
        (trained,) = executor.run(first_of(program), number, [ClientAssignment(who, *examples, {}, own)])
        return bits(trained)

    assert result("a", 0, key("x")) == result(7, 3, key("x")) != result("a", 0, key("y"))


def test_training_leaves_torchs_own_randomness_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    trained_by(program_of(dropping), sumus.sgd(0.1), {"a": some(15, 0, torch.float32)})
    assert torch.equal(torch.random.get_rng_state(), before)


def test_results_stay_as_they_are_when_the_next_client_trains() -> None:
    program, work = program_of(leaves={"2.*": "personal"}), sumus.sgd(0.5, steps=2)
    clients = {"alice": some(20, 0), "bob": some(20, 1)}
    assignments = [ClientAssignment(who, *examples, {}, key(who)) for who, examples in clients.items()]
    results = iter(SequentialExecutor(program, work).run(first_of(program), 0, assignments))
    alice = next(results)
    before = copy.deepcopy(bits(alice))
    next(results)
    assert bits(alice) == before


# ── on a GPU ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch sees")
@pytest.mark.parametrize("work", [sumus.sgd(0.1, epochs=2, batch_size=8, momentum=0.9), sumus.adam(0.01, steps=3)])
def test_a_gpu_takes_the_steps_of_the_cpu(work: ClientWork) -> None:
    """In float64, where the two differ only by the order of sums."""
    examples = some(20, 0)
    on_cpu = trained_by(program_of(), work, {"alice": examples})["alice"]
    program = Program(task(), device="cuda")
    on_gpu = trained_by(program, work, {"alice": (examples[0].cuda(), examples[1].cuda())})["alice"]
    close(on_gpu.parts["params"], on_cpu.parts["params"], atol=1e-12)
