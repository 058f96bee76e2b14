"""What an owner's policy lets callers do, and what leaves: nothing that depends on private data, unless the owner says so."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sumus
from sumus.virtual import ARITHMETIC, EVERYTHING, Policy, VirtualWorker, WorkerRefused, get, move, send, workbench
from sumus.virtual.messages import (
    Call,
    CountHeld,
    Ref,
    RefusalAnswer,
    UseOffered,
    WorkerAnswer,
    WorkerRequest,
    read,
    write,
)
from sumus.virtual.workbench import Workbench

OWN = {
    "inputs": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "targets": torch.tensor([[1.0], [0.0]]),
    "labels": torch.tensor([0, 9]),
    "words": torch.tensor([7.0, 8.0]),
    "zero": torch.tensor(0),
}


def carol(**policy: Any) -> VirtualWorker:
    return VirtualWorker("carol", {name: tensor.clone() for name, tensor in OWN.items()}, Policy(**policy))


def private(what: Tensor) -> bool:
    """Whether a tensor may not be fetched."""
    code = ""
    try:
        get(what)
    except WorkerRefused as no:
        code = no.code
    assert code in ("", "private")
    return code == "private"


# ── what depends on private data ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "derive",
    [
        lambda x, mine: x,
        lambda x, mine: x + 0,
        lambda x, mine: x * 0,
        lambda x, mine: x[0, 0],
        lambda x, mine: x.sum(),
        lambda x, mine: mine @ x,
        lambda x, mine: torch.cat([mine, x]),
        lambda x, mine: x.detach().clone().t(),
        lambda x, mine: torch.zeros_like(x),
        lambda x, mine: torch.where(x > 2, mine, mine),
        lambda x, mine: x.argmax(1),
        lambda x, mine: x.max(1).indices,
        lambda x, mine: mine.clone().copy_(x),
        lambda x, mine: F.linear(mine, mine, x[0]),
        lambda x, mine: F.mse_loss(mine, x),
        lambda x, mine: torch.add(mine, mine, alpha=1).clamp(min=x),
    ],
)
def test_what_is_computed_from_private_data_is_private(derive: Callable[..., Tensor]) -> None:
    worker = carol()
    mine = send(torch.eye(2), worker)
    assert private(derive(worker["inputs"], mine))
    assert not private(mine + 1)


def test_what_changes_in_place_becomes_private_with_all_that_shares_its_memory() -> None:
    worker = carol()
    mine = send(torch.zeros(2, 2), worker)
    row, copied, seen = mine[0], mine.clone(), mine.view(4)
    mine[1].add_(worker["inputs"][1])
    assert [private(each) for each in (mine, row, seen)] == [True, True, True]
    assert not private(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda mine, x: mine.add_(x),
        lambda mine, x: mine.copy_(x),
        lambda mine, x: mine.__setitem__(0, x[0]),
        lambda mine, x: mine.masked_fill_(x > 1, 0.0),
        lambda mine, x: mine.lerp_(x, 0.5),
        lambda mine, x: mine.addcmul_(mine, x),
        lambda mine, x: mine.clamp_(min=x),
    ],
)
def test_every_change_in_place_counts(change: Callable[..., Any]) -> None:
    worker = carol()
    mine = send(torch.zeros(2, 2), worker)
    change(mine, worker["inputs"])
    assert private(mine)


def test_gradients_of_a_private_loss_are_private() -> None:
    worker = carol()
    w, other = (send(torch.ones(2, 1, requires_grad=True), worker) for _ in range(2))
    (worker["inputs"] @ w).sum().backward()
    (other * 2).sum().backward()
    assert private(w.grad)
    assert not private(other.grad)
    assert not private(w), "it has not been changed"
    with torch.no_grad():
        w.sub_(w.grad)
    assert private(w)


def test_a_gradient_that_is_added_to_becomes_private_too() -> None:
    worker = carol()
    w = send(torch.ones(2, 1, requires_grad=True), worker)
    w.sum().backward()
    first = w.grad
    assert not private(first)
    (worker["inputs"] @ w).sum().backward()
    assert private(w.grad)
    assert private(first), "torch adds in place, so the pointer from before sees it"


def test_a_private_gradient_given_to_backward_counts() -> None:
    worker = carol()
    w = send(torch.ones(2, 2, requires_grad=True), worker)
    (w * 1).backward(worker["inputs"])
    assert private(w.grad)


def test_a_gradient_that_is_set_counts() -> None:
    worker = carol()
    w = send(torch.ones(2, 2, requires_grad=True), worker)
    w.grad = worker["inputs"] * 1
    assert private(w.grad)
    w.grad = send(torch.ones(2, 2), worker)
    assert not private(w.grad)
    w.grad.add_(worker["inputs"])
    w._gradient = (-1, None)  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]  # asked for anew
    assert private(w.grad)


def test_running_statistics_count() -> None:
    worker = carol()
    norm = send(nn.BatchNorm1d(2), worker)
    norm(worker["inputs"])
    assert private(norm.running_mean)  # pyright: ignore[reportArgumentType]
    assert private(norm.running_var)  # pyright: ignore[reportArgumentType]
    assert not private(norm.num_batches_tracked)  # pyright: ignore[reportArgumentType]


def test_no_gradient_flows_through_statistics_that_have_changed_since() -> None:
    """In torch they change without a trace, and a gradient would be computed with what they have become."""
    worker = carol()
    mean, var = send(torch.zeros(2), worker), send(torch.ones(2), worker)
    x = send(torch.ones(2, 2, requires_grad=True), worker)
    loss = F.batch_norm(x, mean, var).sum()
    F.batch_norm(worker["inputs"], mean, var, training=True)
    with pytest.raises(WorkerRefused, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_leaves_by_way_of_another_worker() -> None:
    with pytest.raises(WorkerRefused, match="depends on the owner's data"):
        move(carol()["inputs"], VirtualWorker("alice"))


# ── what may be fetched ──────────────────────────────────────────────────────────────────────────────────────────────


def trained(worker: VirtualWorker) -> tuple[nn.Module, Tensor]:
    model = send(nn.Linear(2, 1), worker)
    steps = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = F.mse_loss(model(worker["inputs"]), worker["targets"])
    loss.backward()
    steps.step()
    return model, loss


def test_by_default_not_even_a_trained_model() -> None:
    model, loss = trained(carol())
    assert private(loss)
    with pytest.raises(WorkerRefused, match="it may be fetched only if the owner's policy allows it"):
        get(model)


def test_a_trained_model_where_the_owner_says_so() -> None:
    worker = carol(fetch="parameters")
    model, loss = trained(worker)
    assert get(model).weight.shape == (1, 2)
    for kept in (loss, model.weight.grad, model.weight * 1, model.weight[0], worker["inputs"]):
        assert private(kept)
    with pytest.raises(WorkerRefused, match="only a model that you sent and trained may be fetched"):
        get(loss)


def test_everything_where_the_owner_says_so() -> None:
    worker = carol(fetch="all")
    model, loss = trained(worker)
    get(model)
    assert get(loss).item() > 0
    assert torch.equal(get(worker["inputs"]), OWN["inputs"])


def test_single_tensors_may_be_public() -> None:
    worker = carol(public=["words"])
    assert get(worker["words"] * 2).tolist() == [14.0, 16.0]
    assert private(worker["inputs"])


# ── what fails because of numbers ────────────────────────────────────────────────────────────────────────────────────


def test_whether_private_numbers_make_a_loss_fail_is_not_told() -> None:
    worker = carol(fetch="all")
    scores = send(torch.zeros(2, 3, requires_grad=True), worker)
    for loss in (F.nll_loss, F.cross_entropy):
        value = loss(scores, worker["labels"])  # there is a label 9, of three
        assert get(value).isnan()
        value.backward()
        assert get(scores.grad).isnan().any()
        scores.grad = None
    assert get(F.embedding(worker["labels"], send(torch.zeros(3, 2), worker))).isnan().all()
    assert get(F.binary_cross_entropy(worker["inputs"], send(torch.zeros(2, 2), worker))).isnan()
    with pytest.raises(WorkerRefused, match="Target 9 is out of bounds"):
        F.nll_loss(send(torch.zeros(2, 3), worker), send(OWN["labels"], worker))


def test_where_they_do_not_fail_they_give_the_same_bits() -> None:
    own = {
        "words": torch.tensor([1, 0, 2]),
        "targets": torch.tensor([0, 2, -100]),
        "shares": torch.tensor([0.0, 0.3, 1.0]),
    }
    worker = VirtualWorker("carol", own, Policy(fetch="all"))
    scores, chances = torch.randn(3, 3, requires_grad=True), torch.tensor([0.2, 0.9, 1.0], requires_grad=True)
    for loss, leaf, name in (
        (F.cross_entropy, scores, "targets"),
        (lambda x, y: F.nll_loss(x, y, reduction="none").sum(), scores, "targets"),
        (lambda x, y: F.embedding(y, x).square().sum(), scores, "words"),
        (F.binary_cross_entropy, chances, "shares"),
        (F.cross_entropy, chances, "shares"),
    ):
        here, there = leaf.detach().clone().requires_grad_(), send(leaf, worker)
        values = loss(here, own[name]), loss(there, worker[name])
        for value in values:
            value.backward()
        assert torch.equal(get(values[1]), values[0])
        assert torch.equal(get(there.grad), here.grad)  # pyright: ignore[reportArgumentType]


def test_private_numbers_are_no_index() -> None:
    worker = carol(fetch="all")
    mine, labels = send(torch.zeros(2, 3), worker), worker["labels"]
    for told in (
        lambda: mine[labels],
        lambda: mine[:, labels],
        lambda: mine.__setitem__(labels, 1.0),
        lambda: mine.gather(1, labels[:, None]),
        lambda: labels // worker["zero"],
        lambda: labels % (worker["zero"] + 1),
    ):
        with pytest.raises(WorkerRefused, match="an error would reveal the data: use a tensor that you sent") as caught:
            told()
        assert caught.value.code == "private"
    assert get(worker["inputs"][send(torch.tensor([1, 1]), worker)]).tolist() == [[3.0, 4.0]] * 2
    assert get(worker["inputs"] % 2).tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_what_is_wrong_with_shapes_is_told() -> None:
    worker = carol()
    with pytest.raises(WorkerRefused, match="nll_loss: .*batch"):
        F.nll_loss(send(torch.zeros(5, 3), worker), worker["labels"])
    with pytest.raises(WorkerRefused, match="matmul"):
        worker["inputs"] @ worker["inputs"][:1]
    w = send(torch.ones(2, 2, requires_grad=True), worker)
    with pytest.raises(WorkerRefused, match="leaf Variable"):
        w.add_(worker["inputs"])


def test_no_shape_depends_on_numbers() -> None:
    worker = carol()
    x, zero = worker["inputs"], worker["zero"]
    for shape in (
        lambda: x[x > 1],
        lambda: x[zero > 0],
        lambda: x.sum(zero),
        lambda: x.flatten(zero),
        lambda: x.reshape(zero),
        lambda: x.expand(2, zero, 2),
        lambda: F.adaptive_avg_pool2d(x[None], zero),
        lambda: torch.where(x > 1),
    ):
        with pytest.raises(WorkerRefused) as caught:
            shape()
        assert caught.value.code in ("impossible", "not_allowed", "private")


# ── the owner's data stay as they are ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x.view(4).zero_(),
        lambda x: x[0].fill_(1),
        lambda x: x.detach().t().mul_(2),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: F.batch_norm(x, x[0], x[1], training=True),
        lambda x: F.batch_norm(x, running_mean=x[0], running_var=x[1], training=True),
    ],
)
def test_the_owners_tensors_are_not_changed(change: Callable[..., Any]) -> None:
    own = {"inputs": OWN["inputs"].clone()}
    worker = VirtualWorker("carol", own, Policy(fetch="all"))
    with pytest.raises(WorkerRefused, match=r"would change one of the owner's tensors: clone\(\) it first"):
        change(worker["inputs"])
    assert torch.equal(own["inputs"], OWN["inputs"])


def test_nor_by_way_of_gradients() -> None:
    own = {"inputs": OWN["inputs"].clone()}
    worker = VirtualWorker("carol", own, Policy(fetch="all"))
    w = send(torch.ones(2, 2, requires_grad=True), worker)
    with pytest.raises(WorkerRefused, match="backward.. would add to one of the owner's tensors"):
        w.grad = worker["inputs"]
    for _ in range(3):  # torch may take what it is given for the gradient itself, and add to it
        w.view(4).backward(worker["inputs"].view(4))
        w.backward(worker["inputs"])
    assert torch.equal(own["inputs"], OWN["inputs"])
    learning = worker["inputs"].requires_grad_()
    (learning * 2).sum().backward()
    assert not own["inputs"].requires_grad
    assert own["inputs"].grad is None


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_operation_outside_the_list_is_refused() -> None:
    worker = VirtualWorker("alice", policy=Policy(operations=ARITHMETIC))
    x = send(torch.ones(2), worker)
    assert (x * 2 + 1).sum().get().item() == 6.0
    with pytest.raises(
        WorkerRefused, match="'alice' refuses: the operation 'exp' is not one of those that this worker allows"
    ):
        x.exp()


@pytest.mark.parametrize("name", ["eval", "__class__", "save", "torch.add", "add ", "getattr", ""])
def test_a_name_that_is_not_in_the_table_is_nothing(name: str) -> None:
    bench = Workbench(OWN, Policy())
    bench.answer(write(WorkerRequest(1, UseOffered("inputs"))))
    said, _ = read(WorkerAnswer, bench.answer(write(WorkerRequest(2, Call(name, (Ref(0),))))))
    assert isinstance(said.answer, RefusalAnswer)
    assert said.answer.code == "not_allowed"


@pytest.mark.parametrize("named", ["out", "inplace", "device", "generator", "layout"])
def test_an_argument_that_is_not_in_the_table_is_nothing(named: str) -> None:
    bench = Workbench(OWN, Policy())
    bench.answer(write(WorkerRequest(1, UseOffered("inputs"))))
    said, _ = read(WorkerAnswer, bench.answer(write(WorkerRequest(2, Call("relu", (Ref(0),), {named: Ref(0)})))))
    assert isinstance(said.answer, RefusalAnswer)
    assert said.answer.code == "not_allowed"
    assert "relu takes only input" in said.answer.detail


LARGE: dict[str, Callable[[Any], Any]] = {
    "broadcast": lambda x: x[:, None] + x,
    "by name": lambda x: torch.add(input=x[:, None], other=x),
    "outer": lambda x: torch.outer(x, x),
    "product": lambda x: x[:, None] @ x[None],
    "none inside": lambda x: x[:0].reshape(0, 1).expand(0, 10_000).sum(0),
    "expand": lambda x: x.expand(1000, 100),
    "repeat": lambda x: x.repeat(1000),
    "stack": lambda x: torch.stack([x] * 200),
    "index": lambda x: x[send(torch.zeros(10_000, dtype=torch.int64), x.worker)],
    "padding": lambda x: F.conv1d(x.reshape(1, 1, 100), x[:1].reshape(1, 1, 1), padding=10_000),
    "pooling": lambda x: F.adaptive_avg_pool2d(x.reshape(1, 10, 10), (200, 200)),
    "embedding": lambda x: F.embedding(send(torch.zeros(200, dtype=torch.int64), x.worker), x.reshape(1, 100)),
    "dtype": lambda x: x.expand(80, 100).double(),
}


@pytest.mark.parametrize("how", LARGE)
def test_a_tensor_over_the_limit_is_refused_before_it_is_there(how: str) -> None:
    worker = VirtualWorker("alice", policy=Policy(largest=35_000))
    x = send(torch.ones(100), worker)
    with pytest.raises(WorkerRefused, match="at most 35000 are allowed here: split the work") as caught:
        LARGE[how](x)
    assert caught.value.code == "too_large"


def test_a_tensor_over_the_limit_is_not_taken() -> None:
    worker = VirtualWorker("alice", policy=Policy(largest=400))
    send(torch.ones(100), worker)
    with pytest.raises(WorkerRefused, match="the tensor has 404 bytes, but at most 400 are allowed here"):
        send(torch.ones(101), worker)


def test_tensors_are_counted() -> None:
    worker = VirtualWorker("alice", policy=Policy(tensors=3))
    held = [send(torch.ones(1), worker) for _ in range(3)]
    with pytest.raises(WorkerRefused, match="you hold 3 tensors here, the maximum: delete pointers"):
        held[0] + 1
    assert held[0].add_(1).get().item() == 2.0, "that makes none"
    del held[1:]
    gc.collect()
    held[0] + 1


def test_bytes_are_counted() -> None:
    worker = VirtualWorker("alice", policy=Policy(held=14_000))
    x = send(torch.ones(1000), worker)
    views = [x[:5] for _ in range(100)]
    y = x + 1
    with pytest.raises(WorkerRefused, match="you would hold more than 14000 bytes here"):
        x + 2
    del y, views
    gc.collect()
    x + 2


def test_a_graph_without_end_is_counted() -> None:
    worker = VirtualWorker("alice", policy=Policy(held=100_000))
    x = send(torch.ones(1, requires_grad=True), worker)

    def on_and_on() -> None:
        y = x
        for _ in range(1000):
            y = y * 1.5

    with pytest.raises(WorkerRefused, match="you would hold more than 100000 bytes here"):
        on_and_on()
    gc.collect()
    assert (x * 2).get().item() == 2.0


def test_what_is_refused_leaves_nothing_behind() -> None:
    worker = VirtualWorker("alice", policy=Policy(held=5000))
    x = send(torch.ones(500), worker)
    before = worker.held()
    for _ in range(20):
        with pytest.raises(WorkerRefused):
            x.reshape(1, 500).max(0)  # the first of two results would fit
    assert worker.held() == before


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_is_done_once() -> None:
    bench = Workbench({"x": torch.ones(1)}, Policy(fetch="all"))
    bench.answer(write(WorkerRequest(1, UseOffered("x"))))
    made = bench.answer(write(WorkerRequest(2, Call("clone", (Ref(0),)))))
    assert bench.answer(write(WorkerRequest(2, Call("clone", (Ref(0),))))) == made
    added = write(WorkerRequest(3, Call("add_", (Ref(1), 1.0))))
    assert bench.answer(added) == bench.answer(added)
    assert bench.held.of(1).tensor.tolist() == [2.0]
    said, _ = read(WorkerAnswer, bench.answer(write(WorkerRequest(1, CountHeld()))))
    assert said.answer == RefusalAnswer("replayed", "this request is older than one that was answered: connect again")


def test_a_defect_is_no_news_to_the_caller(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    bench = Workbench({}, Policy())
    monkeypatch.setitem(workbench._DOES, CountHeld, lambda bench, ask, behind: 1 // 0)  # pyright: ignore[reportPrivateUsage]
    said, _ = read(WorkerAnswer, bench.answer(write(WorkerRequest(1, CountHeld()))))
    assert said.answer == RefusalAnswer("failed", "the worker has a defect: ask its owner for the traceback in its log")
    assert "ZeroDivisionError" in caplog.text


# ── the policy itself ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_policy_is_a_value() -> None:
    assert Policy() == Policy(operations=EVERYTHING)
    assert hash(Policy(operations=["add", "mul"])) == hash(Policy(operations=("mul", "add")))
    assert ARITHMETIC < EVERYTHING


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"operations": ["add", "save"]}, "there is no operation 'save'"),
        ({"operations": "add"}, r"takes a list of names: write \['add'\]"),
        ({"public": "x"}, "takes a list of names"),
        ({"fetch": "some"}, 'give "none", "parameters" or "all"'),
        ({"largest": 0}, "must be a number of at least 1"),
        ({"idle_s": 0.0}, "must be a number above 0"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(sumus.UsageError, match=why):
        Policy(**wrong)


def test_what_cannot_be_offered_is_refused() -> None:
    assert get(VirtualWorker("a", {"x": np.ones(2)}, Policy(fetch="all"))["x"]).tolist() == [1.0, 1.0]  # type: ignore[dict-item]
    with pytest.raises(
        sumus.UsageError, match="a worker offers CPU tensors or arrays by name, but 'x' is not one: it is a list"
    ):
        VirtualWorker("a", {"x": [1.0]})  # type: ignore[dict-item]
    with pytest.raises(sumus.UsageError, match="the tensor 'x' has the dtype torch.bfloat16"):
        VirtualWorker("a", {"x": torch.ones(2, dtype=torch.bfloat16)})
