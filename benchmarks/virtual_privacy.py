"""Random programs at a virtual worker, run twice with different private numbers: the answers must be the same, byte for
byte.

    python -m benchmarks.virtual_privacy                      20,000 programs of 30 operations
    python -m benchmarks.virtual_privacy --programs 500
    python -m benchmarks.virtual_privacy --planted labels     with a leak, which must be found: exit status 1

A program mixes all operations of the list with setting gradients, backward passes and fetching, on private and public
tensors of several dtypes and shapes. With `fetch="none"`, all bytes of all answers are compared: results, shapes,
errors, memory in use. With `fetch="parameters"`, only the numbers of private tensors that the caller sent may differ.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sumus.virtual import gradients, operations, workbench
from sumus.virtual.calls import OperationCalls
from sumus.virtual.graph import Survey
from sumus.virtual.messages import (
    Ask,
    Backward,
    Call,
    CountHeld,
    Dtype,
    EllipsisIndex,
    FetchTensor,
    Gradient,
    Items,
    NotFinite,
    Ref,
    RefusalAnswer,
    SendTensor,
    SetGradient,
    SetRequiresGrad,
    Slice,
    TensorMade,
    TensorsMade,
    UseOffered,
    WorkerAnswer,
    WorkerRequest,
    read,
    write,
)
from sumus.virtual.operations import OPERATIONS, Operation
from sumus.virtual.outline import BoundCall, Outline
from sumus.virtual.policy import Policy
from sumus.virtual.refusal import RequestRefused
from sumus.virtual.workbench import Workbench

OPERATIONS_EACH, DRAWS = 30, 16
"""Operations of a program, and the number of bytes that decide on one."""
BYTES = OPERATIONS_EACH * DRAWS

HUGE, NAN = 1e30, float("nan")
ONE = {
    "x": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "d": torch.tensor([[0.5, 0.25], [1.0, 0.0]], dtype=torch.float64),
    "h": torch.tensor([0.5, 1.0], dtype=torch.float16),
    "i": torch.tensor([0, 1]),
    "j": torch.tensor([-100, -100]),
    "b": torch.tensor([True, False]),
    "s": torch.tensor(1.0, dtype=torch.float64),
    "n": torch.tensor(1),
    "e": torch.zeros(0, 2),
}
TWO = {
    "x": torch.tensor([[HUGE, -2.0], [0.0, NAN]]),
    "d": torch.tensor([[-1.0, HUGE], [float("inf"), 7.0]], dtype=torch.float64),
    "h": torch.tensor([6e4, float("-inf")], dtype=torch.float16),
    "i": torch.tensor([-1, 9]),
    "j": torch.tensor([-100, 1]),
    "b": torch.tensor([False, False]),
    "s": torch.tensor(1e300, dtype=torch.float64),
    "n": torch.tensor(-(2**63)),
    "e": torch.zeros(0, 2),
}
"""Private numbers of two owners: of the same shapes, and as different as possible."""
PUBLIC = [
    torch.ones(2, 2),
    torch.arange(4.0).reshape(2, 2),
    torch.tensor([1, 0]),
    torch.zeros(2, 0),
    torch.tensor([[1, 2], [3, 4]], dtype=torch.int8),
    torch.tensor([True, True]),
    torch.tensor([0.5, 2.0], dtype=torch.float16),
    torch.tensor(0.5),
]

OTHERS = ("learn", "backward", "backward from", "gradient", "set gradient", "fetch", "fetch", "count")
NAMES = (*sorted(OPERATIONS), *OTHERS * 6)
"""What a step may be. The steps that are no operations are together as frequent as 48 operations."""
NUMBERS: dict[str, Sequence[Any]] = {
    "dim": (0, 1, -1, None, 5),
    "dims": (Items((1, 0)), Items((0,))),
    "shape": (Items((-1,)), Items((2, 2)), Items((1, 2)), Items((2, -1))),
    "index": (0, 1, Slice(0, 1), EllipsisIndex(), Items((0, 1)), Items((Slice(), 0))),
    "dtype": (Dtype("float32"), Dtype("float64"), Dtype("float16"), Dtype("int8"), None),
    "reduction": ("mean", "none", "sum"),
    "ignore_index": (-100, 0, 1),
    "normalized_shape": (Items((2,)), Items((2, 2))),
    "kernel_size": (1, 2),
    "training": (True, False),
}
"""The values of an argument that is no tensor, by its name; `ANY` for other arguments."""
ANY: tuple[Any, ...] = (0, 1, -1, 2, 0.5, True, None, 1e30, NotFinite("nan"), "none", Dtype("int64"))

WANTED: dict[str, Callable[[TensorMade], bool]] = {
    "mask": lambda made: made.dtype == "bool",
    "condition": lambda made: made.dtype == "bool",
    "value": lambda made: made.shape == (),
    "index": lambda made: made.dtype in ("int64", "bool"),
    "cross_entropy target": lambda made: made.dtype == "int64",
    "nll_loss target": lambda made: made.dtype == "int64",
    "embedding input": lambda made: made.dtype == "int64",
}
"""Which tensors fit an argument, by its name, or by its operation's name and its name."""

T = TypeVar("T")


@dataclass
class Program:
    """Steps that bytes decide on.

    Attributes:
        drawn: Bytes, without end.
        names: What a step may be.
        there: The tensors at the worker, the newest last.
    """

    drawn: Iterator[int]
    names: Sequence[str]
    there: list[TensorMade] = field(default_factory=list[TensorMade])

    def ask(self) -> Ask:
        """Return the next step."""
        name = self.one_of(self.names)
        first, second = self.tensor(), self.tensor()
        match name:
            case "learn":
                return SetRequiresGrad(first.id, self.one_of((True, True, False)))
            case "backward":
                return Backward(first.id, None, keep=self.one_of((True, False)))
            case "backward from":
                return Backward(first.id, second.id, keep=self.one_of((True, False)))
            case "gradient":
                return Gradient(first.id)
            case "set gradient":
                return SetGradient(first.id, self.one_of((second.id, second.id, None)))
            case "fetch":
                return FetchTensor(first.id)
            case "count":
                return CountHeld()
            case _:
                return self.call(OPERATIONS[name])

    def call(self, operation: Operation) -> Call:
        """Return a call with arguments that mostly fit."""
        optional = 0 if operation.name in ("add_", "mul_", "copy_") else next(self.drawn) % 3
        arguments = [
            self.argument(operation, name) for name in operation.takes[: max(2, len(operation.takes) - optional)]
        ]
        named = {name: self.argument(operation, name) for name in sorted(operation.named) if next(self.drawn) % 3 == 0}
        return Call(operation.name, tuple(arguments), named, graph=next(self.drawn) % 3 != 0)

    def argument(self, operation: Operation, name: str) -> Any:
        """Return a tensor if the argument may be one, else a number; and rarely something that is not allowed."""
        luck = next(self.drawn)
        if name == "tensors":
            return Items((self.tensor(), self.tensor()))
        if (name in operation.tensors and luck % 8) or luck == 255:
            wanted = WANTED.get(f"{operation.name} {name}", WANTED.get(name))
            return self.tensor(wanted if luck % 4 else None)
        return self.one_of(NUMBERS.get(name, ANY))

    def tensor(self, wanted: Callable[[TensorMade], bool] | None = None) -> Ref:
        """Return one of the tensors, or of the wanted ones; more often a new one."""
        among = self.there if wanted is None else [made for made in self.there if wanted(made)]
        luck = next(self.drawn)
        return Ref(among[-1 - (luck // 2) % min(len(among), 8 if luck % 2 else len(among))].id)

    def one_of(self, several: Sequence[T]) -> T:
        """Choose one of several values."""
        return several[(next(self.drawn) * 256 + next(self.drawn)) % len(several)]


def bytes_for_ever(program: bytes) -> Iterator[int]:
    """Yield the bytes of a program, and zeros after them."""
    yield from program
    while True:
        yield 0


@dataclass
class Transcript:
    """What a worker answered.

    Attributes:
        answers: The bytes of every answer.
        done: The number of calls that were done.
        asked: The number of all calls.
    """

    answers: list[bytes] = field(default_factory=list[bytes])
    done: int = 0
    asked: int = 0


def transcript(
    own: dict[str, Tensor], program: bytes, fetch: Literal["none", "parameters", "all"], names: Sequence[str] = NAMES
) -> Transcript:
    """Run a program at a worker whose owner has these numbers, and then ask for all gradients and all tensors."""
    bench = Workbench({name: tensor.clone() for name, tensor in own.items()}, Policy(fetch=fetch))
    found = Transcript()
    steps = Program(bytes_for_ever(program), names)

    def ask(what: Ask, tensor: Any = None) -> None:
        body = bench.answer(write(WorkerRequest(len(found.answers), what), tensor))
        said, behind = read(WorkerAnswer, body)
        answer = said.answer
        assert not (isinstance(answer, RefusalAnswer) and answer.code == "failed"), (what, answer)
        told = isinstance(what, FetchTensor) and fetch == "parameters"
        found.answers.append(write(said) + len(behind).to_bytes(8) if told else body)
        found.asked += isinstance(what, Call)
        found.done += isinstance(what, Call) and not isinstance(answer, RefusalAnswer)
        made = answer.made if isinstance(answer, TensorsMade) else (answer,) if isinstance(answer, TensorMade) else ()
        known = {each.id for each in steps.there}
        steps.there.extend(each for each in made if each.id not in known)

    for tensor in PUBLIC:
        ask(SendTensor(tensor.dtype == torch.float32), tensor.numpy())
    for name in own:
        ask(UseOffered(name))
    for _ in range(OPERATIONS_EACH):
        ask(steps.ask())
    for made in list(steps.there):
        ask(Gradient(made.id))
    for made in list(steps.there):
        ask(FetchTensor(made.id))
    ask(CountHeld())
    unchanged = all(torch.equal(bench.held.offered[name].nan_to_num(), own[name].nan_to_num()) for name in own)
    assert unchanged, "the owner's tensors have changed"
    return found


# ── leaks that must be found ─────────────────────────────────────────────────────────────────────────────────────────


_FILLS = ("fill_", "masked_fill_", "setitem")


def _unmarked(bench: Workbench, ask: SetGradient, body: bytes) -> Any:
    """Set a gradient that is a copy, without marking it as private."""
    said = gradients.set_gradient(bench.held, ask)
    kept = bench.held.of(ask.id)
    if kept.tensor.grad is not None:
        kept.tensor.grad, kept.gradient = kept.tensor.grad.clone(), None
    return said


def _told(self: OperationCalls, call: BoundCall, outline: Outline) -> list[Tensor]:
    """Return the results of a call on private tensors, and let its failure be told."""
    try:
        return call.results(closed=True)
    except Exception as error:
        raise RequestRefused("impossible", str(error)) from error


def _without_stand_in(indices: Tensor, size: int, ignored: int | None = None) -> tuple[Tensor, Tensor]:
    """Work as before: 0 replaces a wrong label, even if there is no class 0."""
    wrong = (indices < 0) | (indices >= size)
    if ignored is not None:
        wrong = wrong & (indices != ignored)
    return indices.masked_fill(wrong, 0), wrong.any()


@contextmanager
def failures_told() -> Iterator[None]:
    """Neither try calls on private tensors with blanks, nor hide their failures."""
    with (
        patch.object(OperationCalls, "_tried", lambda self, call, results: results),
        patch.object(OperationCalls, "_computed", _told),
    ):
        yield


@dataclass(frozen=True)
class Leak:
    """A leak that a worker once had, to be planted.

    Attributes:
        plant: Makes the patches that bring it back.
        names: What the steps of programs then are, so that the leak is found soon.
    """

    plant: Callable[[], Sequence[AbstractContextManager[Any]]]
    names: Sequence[str]


_GRADIENTS = ("mul", "add", "sum", "learn", "backward", "backward from", "gradient", "set gradient", "zeros_like")
PLANTED: dict[str, Leak] = {
    # Gradients were private by their handles, and so a gradient's gradient was public.
    "gradients": Leak(lambda: [patch.object(gradients, "survey", lambda root: Survey())], _GRADIENTS),
    # A gradient that was set was not private.
    "set-gradient": Leak(
        lambda: [patch.dict(workbench._DOES, {SetGradient: _unmarked})],  # pyright: ignore[reportPrivateUsage]
        _GRADIENTS,
    ),
    # Whether a private number fits a dtype was told.
    "scalars": Leak(
        lambda: [
            failures_told(),
            patch.dict(
                OPERATIONS, {name: replace(OPERATIONS[name], closed=OPERATIONS[name].function) for name in _FILLS}
            ),
        ],
        (*_FILLS, "to", "gt", "clone"),
    ),
    # Whether all labels are ignored was told, by scores without a class.
    "labels": Leak(
        lambda: [failures_told(), patch.object(operations, "_in_range", _without_stand_in)],
        ("cross_entropy", "nll_loss", "clone", "detach"),
    ),
}


@contextmanager
def planted(leak: str | None) -> Iterator[None]:
    """Let workers have a leak. leak: a key of `PLANTED`, or None for none."""
    with ExitStack() as stack:
        for change in PLANTED[leak].plant() if leak is not None else ():
            stack.enter_context(change)
        yield


def _defect(words: str, *arguments: Any, **named: Any) -> None:
    """Count an error in a worker's log as a failure too: an operation that private numbers make fail, or a defect."""
    raise AssertionError(words % arguments)


def look(programs: int, leak: str | None = None, derandomize: bool = False) -> Transcript:
    """Run random programs.

    Args:
        programs: The number of programs.
        leak: The planted leak, a key of `PLANTED`.
        derandomize: Run the same programs each time.

    Returns:
        The numbers of calls that were done and asked, over all programs.

    Raises:
        TellsApart: A program told the owners apart.
    """
    total = Transcript()
    names = NAMES if leak is None else PLANTED[leak].names

    @settings(
        max_examples=programs,
        database=None,
        deadline=None,
        derandomize=derandomize,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.binary(min_size=BYTES, max_size=BYTES))
    def run(program: bytes) -> None:
        fetch: Literal["none", "parameters"] = "parameters" if sum(program) % 2 else "none"
        one, two = transcript(ONE, program, fetch, names), transcript(TWO, program, fetch, names)
        total.done += one.done
        total.asked += one.asked
        if one.answers != two.answers:
            raise TellsApart(program, fetch, one.answers, two.answers)

    with planted(leak), patch.object(workbench.LOG, "error", _defect):
        run()
    return total


class TellsApart(AssertionError):
    """A program's answers depend on private numbers."""

    def __init__(self, program: bytes, fetch: str, one: list[bytes], two: list[bytes]) -> None:
        at = next(at for at, (first, second) in enumerate(zip(one, two, strict=False)) if first != second)
        super().__init__(
            f"under fetch={fetch!r} answer {at} differs:\n{one[at]!r:.300}\n{two[at]!r:.300}\n{program.hex()}"
        )


def main() -> None:
    """Run the campaign; exit status 1 if a program told the owners apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=20_000)
    parser.add_argument("--planted", choices=sorted(PLANTED))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began = time.monotonic()
    try:
        total = look(args.programs, args.planted)
    except TellsApart as found:
        raise SystemExit(f"two owners with different private numbers were told apart: {found}") from None
    print(
        f"{args.programs} programs of {OPERATIONS_EACH} operations: no answer told two owners apart; {total.done} of "
        f"{total.asked} calls were done, the others refused alike; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
