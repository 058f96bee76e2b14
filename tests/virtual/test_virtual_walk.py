"""All operations of the list, with private tensors in every place: what comes out is private, or does not depend on numbers.

The calls are those of the parity cases. In each, every argument and every pair of arguments becomes private in turn, once as a
tensor of the same shape and once as a single number. Workers that differ in nothing but these numbers give the same bytes.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from sumus.virtual import EVERYTHING, VirtualWorker, send
from sumus.virtual.messages import (
    Ask,
    Backward,
    Call,
    FetchTensor,
    Gradient,
    Items,
    Ref,
    RefusalAnswer,
    SendTensor,
    TensorMade,
    TensorsMade,
    UseOffered,
    WorkerAnswer,
    WorkerRequest,
    read,
    write,
)
from sumus.virtual.policy import Policy
from sumus.virtual.workbench import Workbench
from tests.virtual.test_virtual_parity import CASES

FLOATS = [0.0, 1.0, -1.0, 0.5, 2.0, 1e30, -1e30, 7e4, float("inf"), float("nan")]
"""What private numbers may be: nothing special, and whatever a kernel may stumble over."""
WHOLES = [0, 1, -1, 2, 7, -100, -(2**63), 2**63 - 1]
NUMBERS = 4
"""Sets of private numbers that are compared."""


@dataclass(frozen=True)
class Recorded:
    """A call of a parity case. tensors: by the number that the call has for them."""

    call: Call
    tensors: dict[int, Tensor]


def recorded(name: str) -> list[Recorded]:
    """The calls of an operation in its parity cases."""
    found: list[Recorded] = []
    for function, arguments in CASES[name]:
        alice = VirtualWorker("alice")
        ask = alice.ask

        def listening(what: Any, *rest: Any, alice: VirtualWorker = alice, ask: Any = ask) -> Any:
            if isinstance(what, Call) and what.operation == name:
                assert alice._bench is not None  # pyright: ignore[reportPrivateUsage]
                kept = alice._bench.held.tensors  # pyright: ignore[reportPrivateUsage]
                found.append(Recorded(what, {at: kept[at].tensor.detach().clone() for at in refs(what)}))
            return ask(what, *rest)

        alice.ask = listening  # type: ignore[method-assign]
        function(*[send(each, alice) for each in arguments])
    return found


def refs(call: Call) -> list[int]:
    """Numbers of the tensors of a call."""

    def within(value: Any) -> Iterator[int]:
        if isinstance(value, Ref):
            yield value.id
        elif isinstance(value, Items):
            for each in value.items:
                yield from within(each)

    return [at for value in (*call.arguments, *call.named.values()) for at in within(value)]


def places(call: Call) -> Iterator[tuple[Call, list[int]]]:
    """The call with a further tensor, of number 0, in the place of each argument; and what it replaced."""
    for at in range(len(call.arguments)):
        arguments = (*call.arguments[:at], Ref(0), *call.arguments[at + 1 :])
        yield msgspec.structs.replace(call, arguments=arguments), refs(Call("", (call.arguments[at],)))
    for name, value in call.named.items():
        yield msgspec.structs.replace(call, named={**call.named, name: Ref(0)}), refs(Call("", (value,)))


def numbers(like: Tensor, seed: int) -> Tensor:
    """Private numbers, others for each seed."""
    random = torch.Generator().manual_seed(seed)
    if like.dtype == torch.bool:
        return torch.randint(0, 2, like.shape, generator=random).bool()
    values = torch.tensor(FLOATS if like.is_floating_point() else WHOLES).to(like.dtype)
    chosen = torch.randint(0, len(values), like.shape, generator=random)
    return values[torch.full_like(chosen, seed % len(values)) if seed < NUMBERS // 2 else chosen]


def transcript(call: Call, public: dict[int, Tensor], private: dict[int, Tensor], learn: bool) -> list[bytes]:
    """Every answer to a call, to the backward pass from its result, and to fetching whatever there is then."""
    own = {str(at): tensor for at, tensor in private.items()}
    bench = Workbench({name: tensor.clone() for name, tensor in own.items()}, Policy())
    answers: list[bytes] = []

    def ask(what: Ask, tensor: Any = None) -> Any:
        answers.append(bench.answer(write(WorkerRequest(len(answers), what), tensor)))
        return read(WorkerAnswer, answers[-1])[0].answer

    there: dict[int, int] = {}
    for at, tensor in public.items():
        there[at] = ask(SendTensor(learn and tensor.is_floating_point()), tensor.numpy()).id
    for at in private:
        there[at] = ask(Call("clone", (Ref(ask(UseOffered(str(at))).id),))).id
    said = ask(renumbered(call, there))
    assert not (isinstance(said, RefusalAnswer) and said.code == "failed"), said.detail
    made = said.made if isinstance(said, TensorsMade) else (said,) if isinstance(said, TensorMade) else ()
    for each in made:
        assert ask(FetchTensor(each.id)).code == "private"
    if made and made[0].learns:
        ones = ask(SendTensor(), torch.ones(made[0].shape, dtype=getattr(torch, made[0].dtype)).numpy())
        ask(Backward(made[0].id, ones.id, keep=True))
        ask(Backward(made[0].id, ones.id))
        ask(Backward(made[0].id, ones.id))
        for at in public:
            gradient = ask(Gradient(there[at]))
            if isinstance(gradient, TensorMade):
                assert ask(FetchTensor(gradient.id)).code == "private"
    for at in there.values():
        ask(FetchTensor(at))
    return answers


def renumbered(call: Call, there: dict[int, int]) -> Call:
    def other(value: Any) -> Any:
        if isinstance(value, Ref):
            return Ref(there[value.id])
        return (
            msgspec.structs.replace(value, items=tuple(map(other, value.items))) if isinstance(value, Items) else value
        )

    named = {name: other(value) for name, value in call.named.items()}
    return msgspec.structs.replace(call, arguments=tuple(map(other, call.arguments)), named=named)


def same_for_all(call: Call, tensors: dict[int, Tensor], private: dict[int, Tensor], learn: bool = True) -> None:
    public = {at: tensor for at, tensor in tensors.items() if at not in private}
    said = [
        transcript(call, public, {at: numbers(like, seed) for at, like in private.items()}, learn)
        for seed in range(NUMBERS)
    ]
    assert all(each == said[0] for each in said), (call, list(private))


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_what_comes_of_private_tensors_is_private_and_its_form_does_not_depend_on_them(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for each in recorded(name):
        call, tensors = (
            renumbered(each.call, {at: at + 1 for at in each.tensors}),
            {at + 1: tensor for at, tensor in each.tensors.items()},
        )
        for which in itertools.chain(*(itertools.combinations(tensors, many) for many in (1, 2))):
            same_for_all(call, tensors, {at: tensors[at] for at in which})
        for changed, _ in places(call):
            for single in (torch.zeros(()), torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.float64)):
                kept = {at: tensor for at, tensor in tensors.items() if at in refs(changed)}
                same_for_all(changed, {**kept, 0: single}, {0: single}, learn=False)
    assert not caplog.records, "no operation fails because of private numbers: what closes it is in the table"
