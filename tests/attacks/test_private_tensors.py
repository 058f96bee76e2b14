"""A caller with a token wants the owner's numbers, or the owner's machine, by calls that the policy allows.

With `fetch="none"` a caller got a private tensor bit for bit: its numbers became the gradient of a gradient, which nobody had
marked as private. A caller read private numbers bit by bit: whether a number fits a dtype, and whether a label is ignored,
decided on an error. A caller took more memory and time than the policy allows: gradients and temporary memory were not
counted, tensors that were part of their own history never went, and one operation could take hours.
"""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumus.virtual import Policy, VirtualWorker, WorkerRefused, get, send
from sumus.virtual.messages import Call, Items, RefusalAnswer, Value, WorkerAnswer, WorkerRequest, read, write
from sumus.virtual.policy import Policy as OwnersPolicy
from sumus.virtual.workbench import Workbench

SECRET = torch.tensor([[0.25, -3.0], [7.5, 1e-3]])


def owner(policy: Policy | None = None, **tensors: Tensor) -> VirtualWorker:
    """A worker whose owner has a secret, and lets nobody fetch it."""
    return VirtualWorker("owner", {"x": SECRET.clone(), **tensors}, policy or Policy())


def leaked(what: Callable[[], Any]) -> bool:
    """Whether a caller gets the secret by a call; whatever else it is refused for is a failure of the test."""
    try:
        return torch.equal(what().reshape(SECRET.shape), SECRET)
    except WorkerRefused as no:
        if no.code != "private":
            raise
        return False


def fails(what: Callable[[], Any]) -> bool:
    """Whether a call is refused."""
    try:
        what()
    except WorkerRefused:
        return True
    return False


# ── privacy by handle ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_gradient_of_a_gradient_is_private() -> None:
    worker = owner()
    p = send(torch.zeros(2, 2, requires_grad=True), worker)
    p.sum().backward()
    g = p.grad
    g.requires_grad_(True)
    (g * worker["x"]).sum().backward()
    for way in (worker["x"].get, lambda: g.grad.get(), lambda: p.grad.grad.get()):
        assert not leaked(way)


def test_a_gradient_that_was_set_is_private_by_every_handle() -> None:
    worker = owner()
    p, other = (send(torch.zeros(2, 2, requires_grad=True), worker) for _ in range(2))
    p.sum().backward()
    p.grad.requires_grad_(True)
    p.grad.grad = worker["x"] * 1
    other.sum().backward()  # now p.grad is asked for anew
    assert p.grad.grad is None or not leaked(lambda: p.grad.grad.get())


def test_a_gradient_that_a_caller_has_lent_its_memory_is_private() -> None:
    worker = owner()
    p, mine = send(torch.zeros(2, 2, requires_grad=True), worker), send(torch.zeros(2, 2), worker)
    row = mine.view(4)
    p.grad = mine
    (p * worker["x"]).sum().backward()
    for way in (mine.get, row.get, lambda: p.grad.get()):
        assert not leaked(way)


def test_a_leaf_that_only_a_graph_holds_keeps_its_gradient_private() -> None:
    worker = owner()
    p = send(torch.zeros(2, 2, requires_grad=True), worker)
    p.sum().backward()
    g = p.grad
    (p * worker["x"]).sum().backward()
    del p
    gc.collect()
    assert not leaked((g - 1).get)
    assert not leaked(g.get)


def test_public_tensors_stay_public_beside_private_ones() -> None:
    """The control: gradients of what is the caller's own may be fetched, also if a private tensor was in use."""
    worker = owner()
    p = send(torch.zeros(2, 2, requires_grad=True), worker)
    p.sum().backward()
    g = p.grad
    assert p.grad is g
    worker["x"] * g
    assert get(g).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    p.grad = send(torch.eye(2), worker)
    (p * 2).sum().backward()
    assert get(p.grad).tolist() == [[3.0, 2.0], [2.0, 3.0]]


def test_a_public_row_of_a_private_table_is_public_and_the_table_is_not() -> None:
    table = np.arange(6.0).reshape(3, 2)
    for both in ({"table": table, "row": table[0]}, dict(zip(("table", "row"), (torch.ones(3, 2),) * 2, strict=True))):
        worker = VirtualWorker("owner", both, Policy(public=["row"]))  # type: ignore[arg-type]
        get(worker["row"] * 1)
        with pytest.raises(WorkerRefused, match="depends on the owner's data"):
            get(worker["table"] * 1)


# ── numbers that decide on an error ──────────────────────────────────────────────────────────────────────────────────

FITS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "masked_fill_": lambda half, number: half.masked_fill_(half == 0, number),
    "fill_": lambda half, number: half.fill_(number),
    "setitem": lambda half, number: half.__setitem__(half == 0, number),
    "setitem by name": lambda half, number: half.__setitem__((half == 0, ...), number[None]),
    "full_like": lambda half, number: torch.full_like(half, number),  # type: ignore[call-overload]
    "addcmul": lambda half, number: torch.addcmul(half, half, half, value=number),  # type: ignore[call-overload]
    "addcdiv_": lambda half, number: half.addcdiv_(half, half, value=number),  # type: ignore[call-overload]
    "clamp": lambda half, number: torch.clamp(half, min=number, max=1),  # type: ignore[call-overload]
    "to a whole number": lambda half, number: half.to(torch.int8).masked_fill_(half == 0, number),
}


@pytest.mark.parametrize("how", FITS)
def test_whether_a_private_number_fits_is_not_told(how: str) -> None:
    """On the code before, forty steps of bisection gave a float: the largest number that still fits is known."""

    def refused(number: float) -> bool:
        worker = owner(number=torch.tensor(number, dtype=torch.float64))
        return fails(lambda: FITS[how](send(torch.zeros(3, dtype=torch.float16), worker), worker["number"]))

    assert len({refused(number) for number in (0.0, 1.0, 65_504.0, 1e5, 1e300, -1e300)}) == 1


def test_private_numbers_may_still_be_filled_in() -> None:
    """The control: the same bits as here."""
    worker = VirtualWorker("owner", {"number": torch.tensor(0.3, dtype=torch.float64)}, Policy(fetch="all"))
    for dtype in (torch.float16, torch.float32, torch.int64):
        here, there = (torch.arange(3).to(dtype), send(torch.arange(3).to(dtype), worker))
        here.masked_fill_(here == 0, torch.tensor(0.3, dtype=torch.float64))
        there.masked_fill_(there == 0, worker["number"])
        assert torch.equal(get(there), here)
        assert torch.equal(get(there.fill_(worker["number"])), here.fill_(torch.tensor(0.3, dtype=torch.float64)))
        there[0] = worker["number"]


@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss])
@pytest.mark.parametrize("shape", [(1, 0), (1, 0, 2)])
def test_whether_a_label_is_the_ignored_one_is_not_told(loss: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    """Without any class every label is out of range but the ignored one: one question for each label that it may be."""

    def refused(label: int) -> bool:
        labels = torch.full((1, *shape[2:]), label)
        worker = owner(labels=labels)
        return fails(lambda: loss(send(torch.zeros(shape), worker), worker["labels"], ignore_index=3))

    assert len({refused(label) for label in (-1, 0, 3, 4)}) == 1


def test_labels_may_still_be_ignored() -> None:
    """The control: the same bits as here."""
    labels, scores = torch.tensor([2, 3, 0]), torch.randn(3, 3)
    worker = VirtualWorker("owner", {"labels": labels}, Policy(fetch="all"))
    there = F.cross_entropy(send(scores, worker), worker["labels"], ignore_index=3)
    assert torch.equal(get(there), F.cross_entropy(scores, labels, ignore_index=3))


def test_an_operation_that_private_numbers_make_fail_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else may fail because of numbers: the kernel here does, and nothing but NaN comes of it."""
    from dataclasses import replace

    from sumus.virtual.operations import OPERATIONS

    def picky(input: Tensor) -> Tensor:
        if not input.is_meta and (input > 5).any():
            raise RuntimeError(f"{input.max()} is too much")
        return torch.exp(input)

    monkeypatch.setitem(OPERATIONS, "exp", replace(OPERATIONS["exp"], function=picky, closed=picky))
    worker = VirtualWorker("owner", {"x": SECRET.clone()}, Policy(fetch="all"))
    p = send(torch.ones(2, 2, requires_grad=True), worker)
    unknown = (p * worker["x"]).exp()
    assert get(unknown).isnan().all()
    unknown.sum().backward()
    assert get(p.grad).isnan().all()
    with pytest.raises(WorkerRefused, match="is too much"):
        send(torch.tensor(6.0), worker).exp()


# ── memory and time ──────────────────────────────────────────────────────────────────────────────────────────────────


def itself(w: Tensor) -> None:
    """A tensor that is part of its own history."""
    x = send(torch.zeros(1000), w.worker)  # type: ignore[attr-defined]
    x.add_(w.sum() * x)


def itself_as_a_view(w: Tensor) -> None:
    x = send(torch.zeros(1000), w.worker)  # type: ignore[attr-defined]
    x.add_(w.sum() * x.view(-1))


def its_gradient(w: Tensor) -> None:
    leaf = send(torch.ones(1000, requires_grad=True), w.worker)  # type: ignore[attr-defined]
    leaf.grad = leaf * w


def a_leaf_of_its_own(w: Tensor) -> None:
    leaf = send(torch.ones(1000, requires_grad=True), w.worker)  # type: ignore[attr-defined]
    doubled = leaf * 2
    leaf.requires_grad_(False)
    with pytest.raises(WorkerRefused, match=r"a tensor that has required a gradient: clone\(\) it first"):
        leaf.add_(doubled)


@pytest.mark.parametrize("cycle", [itself, itself_as_a_view, its_gradient, a_leaf_of_its_own])
def test_what_holds_itself_comes_back(cycle: Callable[[Tensor], None]) -> None:
    worker = owner(Policy(held=200_000))
    w = send(torch.ones(1000, requires_grad=True), worker)
    before = worker.held()
    for _ in range(50):
        cycle(w)
    gc.collect()
    assert worker.held() == before


def test_a_caller_that_is_forgotten_leaves_nothing_behind() -> None:
    """Without a collection of garbage: a bench that referred to itself kept all its tensors until then."""
    import weakref

    gc.collect()
    gc.disable()
    try:
        bench = Workbench({"x": SECRET}, OwnersPolicy())
        gone = weakref.ref(bench)
        del bench
        assert gone() is None
    finally:
        gc.enable()


def test_gradients_are_held_too_even_if_their_leaf_has_no_pointer() -> None:
    worker = owner()
    leaf = send(torch.ones(1000, requires_grad=True), worker)
    total = leaf.view(-1).sum()
    del leaf
    gc.collect()
    before = worker.held().bytes
    total.backward(retain_graph=True)
    assert worker.held().bytes >= before + 4000


TOO_MUCH: dict[str, Callable[[VirtualWorker], Any]] = {
    "columns": lambda w: F.conv2d(
        send(torch.ones(1, 1, 64, 64, dtype=torch.float64), w), send(torch.ones(1, 1, 24, 24, dtype=torch.float64), w)
    ),
    "conversion": lambda w: send(torch.ones(400_000, dtype=torch.int8), w).sum(dtype=torch.float64),
    "backward": lambda w: send(torch.ones(1, requires_grad=True), w).expand(250_000).square().sum().backward(),
    "saved": lambda w: F.gelu(F.gelu(F.gelu(send(torch.ones(125_000, requires_grad=True), w)))),
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_memory_that_an_operation_needs_on_the_way_is_within_the_limit(what: str) -> None:
    with pytest.raises(WorkerRefused, match="including memory for this request") as caught:
        TOO_MUCH[what](owner(Policy(held=2 * 2**20)))
    assert caught.value.code == "too_many"
    TOO_MUCH[what](owner(Policy(held=2**26)))


TOO_LONG: dict[str, Callable[[VirtualWorker], Any]] = {
    "windows": lambda w: F.max_pool2d(send(torch.ones(1, 1, 200, 200), w), 100, 1),
    "averages": lambda w: F.avg_pool2d(send(torch.ones(1, 1, 200, 200), w), (100, 100), 1),
    "kernel": lambda w: F.conv2d(send(torch.ones(1, 1, 200, 200), w), send(torch.ones(1, 1, 100, 100), w)),
    "product": lambda w: (
        send(torch.ones(1, dtype=torch.int64), w).expand(400, 400)
        @ send(torch.ones(1, dtype=torch.int64), w).expand(400, 400)
    ),
}


@pytest.mark.parametrize("what", TOO_LONG)
def test_what_would_take_too_long_is_not_begun(what: str) -> None:
    with pytest.raises(WorkerRefused, match="s, but a request may take at most 0.01 s: split the work"):
        TOO_LONG[what](owner(Policy(seconds=0.01)))


def test_a_backward_pass_is_one_request() -> None:
    worker = owner(Policy(seconds=0.01))
    y = send(torch.ones(1000, requires_grad=True), worker)
    for _ in range(1000):
        y = y * 1.5
    with pytest.raises(WorkerRefused, match="this may take"):
        y.sum().backward()


def test_an_honest_program_is_within_the_limits() -> None:
    """The control: a convolutional network of some size learns under the default policy."""
    worker = owner(Policy(fetch="parameters"), pictures=torch.rand(32, 3, 32, 32), labels=torch.arange(32) % 10)
    model = send(
        nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8192, 10),
        ),
        worker,
    )
    steps = torch.optim.Adam(model.parameters(), lr=0.01)
    F.cross_entropy(model(worker["pictures"]), worker["labels"]).backward()
    steps.step()
    assert get(model)[0].weight.isfinite().all()


def test_a_shape_that_no_memory_holds_is_refused() -> None:
    worker = owner()
    x = send(torch.ones(1, 1), worker)
    for shape in ((2**40, 2**40), (2**31, 2**33), (2**62, 4)):
        with pytest.raises(WorkerRefused):
            x.expand(shape)
    with pytest.raises(WorkerRefused, match="at most 64 are supported here"):
        x.view([1] * 65)


def test_lists_in_lists_are_no_defect() -> None:
    deep: Value = 1
    for _ in range(400):
        deep = Items((deep,))
    said, _ = read(WorkerAnswer, Workbench({}, Policy()).answer(write(WorkerRequest(1, Call("relu", (deep,))))))
    assert isinstance(said.answer, RefusalAnswer)
    assert said.answer.code == "malformed"


def test_a_view_without_history_is_no_defect_once_its_base_has_one() -> None:
    worker = owner()
    w, x = send(torch.ones(2, requires_grad=True), worker), send(torch.ones(2), worker)
    with torch.no_grad():
        view = x.view(2, 1)
    x.add_(w)
    assert get(view + 1).tolist() == [[3.0], [3.0]]
