"""Whatever a caller asks, in whatever order: with the owner's policy closed, no answer depends on the owner's numbers.

Random programs run at two workers that differ in nothing but these numbers; every byte of every answer is the same. One that is
open tells them apart, so the programs do reach what must be hidden.
"""

from typing import Any, Literal

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sumus.virtual.messages import (
    Ask,
    Asked,
    Backward,
    Call,
    Fetch,
    Gradient,
    Items,
    Learn,
    Made,
    MadeSeveral,
    Offered,
    Ref,
    Said,
    Send,
    SetGradient,
    Slice,
    read,
    write,
)
from sumus.virtual.policy import Policy
from sumus.virtual.workbench import Workbench

ONE = {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "i": torch.tensor([0, 1]), "b": torch.tensor([True, False])}
TWO = {"x": torch.tensor([[5.0, -2.0], [0.0, 0.5]]), "i": torch.tensor([1, 9]), "b": torch.tensor([False, False])}
PUBLIC = [torch.ones(2, 2), torch.arange(4.0).reshape(2, 2), torch.tensor([1, 0]), torch.zeros(2)]

OPERATIONS = (
    *(
        "add",
        "mul",
        "sub",
        "maximum",
        "matmul",
        "gather",
        "linear",
        "mse_loss",
        "nll_loss",
        "embedding",
        "lerp_",
        "addcmul_",
    ),
    *(
        "add_",
        "copy_",
        "mul_",
        "masked_fill_",
        "sum",
        "view",
        "t",
        "detach",
        "clone",
        "zeros_like",
        "max",
        "argmax",
        "relu_",
    ),
    *("floor_divide", "getitem", "setitem", "cat", "where", "batch_norm", "cross_entropy", "eq", "to", "contiguous"),
)
Step = tuple[str, int, int, int, bool]
STEPS = st.tuples(
    st.sampled_from(
        [*OPERATIONS, "learn", "backward", "backward from", "gradient", "gradient", "set gradient", "fetch", "fetch"]
    ),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(0, 30),
    st.booleans(),
)


def asked(step: Step, ids: list[int]) -> Ask:
    """What a step asks for, with the tensors that there are."""
    name, *which, flag = step
    first, second, third = (Ref(ids[-1 - each % len(ids)]) for each in which)
    match name:
        case "learn":
            return Learn(first.id, flag)
        case "backward":
            return Backward(first.id, None, keep=True)
        case "backward from":
            return Backward(first.id, second.id, keep=flag)
        case "gradient":
            return Gradient(first.id)
        case "set gradient":
            return SetGradient(first.id, second.id)
        case "fetch":
            return Fetch(first.id)
        case "sum" | "t" | "detach" | "clone" | "zeros_like" | "argmax" | "relu_" | "contiguous":
            return Call(name, (first,), graph=flag)
        case "max":
            return Call(name, (first, 0), graph=flag)
        case "view":
            return Call(name, (first, Items((-1,))), graph=flag)
        case "to":
            return Call(name, (first,), graph=flag)
        case "getitem":
            return Call(name, (first, second if flag else Slice(0, 1)))
        case "setitem":
            return Call(name, (first, second if flag else 0, third), graph=False)
        case "cat":
            return Call(name, (Items((first, second)),), graph=flag)
        case "gather":
            return Call(name, (first, 0, second), graph=flag)
        case "masked_fill_":
            return Call(name, (first, second, 0.5), graph=False)
        case "batch_norm":
            return Call(name, (first, second, third, None, None, flag))
        case "lerp_" | "addcmul_" | "where":
            return Call(name, (first, second, 0.5 if name == "lerp_" else third), graph=flag)
        case _:
            return Call(name, (first, second), graph=flag)


def transcript(own: dict[str, Tensor], steps: list[Step], fetch: Literal["none", "all"] = "none") -> list[bytes]:
    """Every answer's bytes."""
    bench = Workbench({name: tensor.clone() for name, tensor in own.items()}, Policy(fetch=fetch))
    answers: list[bytes] = []
    ids: list[int] = []

    def ask(what: Ask, tensor: Any = None) -> None:
        answers.append(bench.answer(write(Asked(len(answers), what), tensor)))
        said = read(Said, answers[-1])[0].answer
        made = said.made if isinstance(said, MadeSeveral) else (said,) if isinstance(said, Made) else ()
        ids.extend(each.id for each in made if each.id not in ids)

    for tensor in PUBLIC:
        ask(Send(tensor.is_floating_point() and tensor.dim() == 2), tensor.numpy())
    for name in own:
        ask(Offered(name))
    for step in steps:
        ask(asked(step, ids))
    for number in list(ids):
        ask(Gradient(number))
    for number in list(ids):
        ask(Fetch(number))
    assert all(torch.equal(bench._offered[name], tensor) for name, tensor in own.items())  # pyright: ignore[reportPrivateUsage]
    return answers


@settings(max_examples=max(300, settings().max_examples))
@given(st.lists(STEPS, max_size=25))
def test_no_answer_depends_on_private_numbers(steps: list[Step]) -> None:
    assert transcript(ONE, steps) == transcript(TWO, steps)


@given(st.lists(STEPS, max_size=5))
def test_an_open_worker_tells_them_apart(steps: list[Step]) -> None:
    assert transcript(ONE, steps, "all") != transcript(TWO, steps, "all")
