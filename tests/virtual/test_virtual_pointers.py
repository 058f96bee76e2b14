"""A pointer is a tensor to torch, knows its shape, and says what to do where numbers are asked of it."""

import copy
import gc
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sumus.errors import SumusError, UsageError
from sumus.virtual import Pointer, PointerError, Policy, VirtualWorker, WorkerRefused, get, move, send


@pytest.fixture
def alice() -> VirtualWorker:
    return VirtualWorker("alice")


@pytest.fixture
def bob() -> VirtualWorker:
    return VirtualWorker("bob")


def trips(worker: VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is sent to a worker from now on."""
    sent: list[bytes] = []
    exchange = worker._exchange  # pyright: ignore[reportPrivateUsage]

    def counting(body: bytes, most: int) -> bytes:
        sent.append(body)
        return exchange(body, most)

    monkeypatch.setattr(worker, "_exchange", counting)
    return sent


def test_what_is_sent_comes_back(alice: VirtualWorker) -> None:
    for tensor in (torch.tensor(3.0), torch.ones(2, 0), torch.eye(2, dtype=torch.int8), torch.tensor([True, False])):
        again = get(send(tensor, alice))
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(again, tensor)
    assert get(send(torch.ones(2, requires_grad=True), alice)).requires_grad
    assert get(send(torch.eye(3).t()[1:], alice)).tolist() == torch.eye(3)[1:].tolist()


def test_shape_and_dtype_are_known_here(alice: VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    x = send(torch.ones(2, 3), alice)
    sent = trips(alice, monkeypatch)
    assert (x.shape, x.dtype, x.ndim, len(x), x.size(1), x.dim(), x.numel()) == ((2, 3), torch.float32, 2, 2, 3, 2, 6)
    assert x.device.type == "cpu"
    assert x.is_floating_point()
    assert isinstance(x, torch.Tensor)
    assert repr(x) == str(x) == f"{x}" == "Pointer(float32[2, 3] at 'alice')"
    assert x in {x: 1}
    assert not sent


def test_its_text_says_that_it_learns(alice: VirtualWorker) -> None:
    assert repr(send(torch.ones(2, requires_grad=True), alice)) == "Pointer(float32[2] at 'alice', requires_grad=True)"


@pytest.mark.parametrize(
    "ask",
    [
        float,
        int,
        bool,
        complex,
        np.asarray,
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: 1.0 in x,
        lambda x: [0, 1, 2][x],
        lambda x: f"{x:.3f}",
        lambda x: "yes" if x > 0 else "no",
        lambda x: torch.ones(3)[x : x + 1],
    ],
)
def test_numbers_are_fetched_first(alice: VirtualWorker, ask: Any) -> None:
    with pytest.raises(PointerError, match=r"needs numbers, but they are at 'alice'.*\.get\(\)"):
        ask(send(torch.tensor(1), alice))


def test_a_tensor_that_is_here_is_sent_first(alice: VirtualWorker) -> None:
    x, w = send(torch.ones(2), alice), send(torch.ones(2, 2), alice)
    for mixed in (
        lambda: x + torch.ones(2),
        lambda: torch.ones(2) + x,
        lambda: nn.functional.linear(torch.ones(2), w),
        lambda: torch.cat([x, torch.ones(2)]),
        lambda: x.backward(torch.ones(2)),
    ):
        with pytest.raises(
            PointerError,
            match=r"is in this process, but another is at 'alice': send the first one, with sumus\.virtual\.send",
        ):
            mixed()


def test_tensors_of_two_workers_are_brought_together_first(alice: VirtualWorker, bob: VirtualWorker) -> None:
    x, y = send(torch.ones(2), alice), send(torch.ones(2), bob)
    with pytest.raises(PointerError, match=r"one tensor is at 'alice', but another is at 'bob'.*sumus\.virtual\.move"):
        x + y
    assert (x + move(y, alice)).get().tolist() == [2.0, 2.0]


def test_what_no_worker_can_do_is_refused_here(alice: VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    x = send(torch.eye(2), alice)
    sent = trips(alice, monkeypatch)
    for unknown in (torch.linalg.svd, torch.nonzero, lambda x: x.apply_(abs), lambda x: torch.autograd.grad(x, x)):
        with pytest.raises(
            PointerError, match=r"does not work on tensors at a worker: fetch the tensor with \.get\(\)"
        ):
            unknown(x)
    with pytest.raises(PointerError, match="does not take"):
        torch.add(x, x, out=x)
    with pytest.raises(PointerError, match="cannot be sent"):
        nn.functional.softmax(x, dim=object())  # type: ignore[arg-type]
    with pytest.raises(PointerError, match="a worker computes on its CPU"):
        x.to("cuda")
    with pytest.raises(PointerError, match="cannot be replaced"):
        x.data = x
    with pytest.raises(PointerError, match="cannot be used from a file"):
        pickle.dumps(x)
    assert not sent


def test_what_torch_cannot_do_is_said_in_its_words(alice: VirtualWorker) -> None:
    x = send(torch.ones(2, 3), alice)
    for wrong, why in (
        (lambda: x @ x, r"'alice' refuses: matmul: .*(\[2, 3\] X \[2, 3\]|2x3 and 2x3)"),
        (lambda: x.sum(dim=5), "Dimension out of range"),
        (lambda: x.view(4), "view: shape"),
        (lambda: x.backward(), "backward: element 0 of tensors does not require grad"),
        (lambda: (x > 0).requires_grad_(), "requires_grad: only Tensors of floating point"),
        (
            lambda: x[send(torch.tensor([True, False]), alice)],
            "shape of the result would depend on numbers in a tensor",
        ),
        (lambda: x.sum(send(torch.tensor(0), alice)), "`dim` of sum must be a number here, not a tensor"),
    ):
        with pytest.raises(WorkerRefused, match=why):
            wrong()


def test_a_leaf_is_not_changed_while_it_learns(alice: VirtualWorker) -> None:
    w = send(torch.ones(2, requires_grad=True), alice)
    with pytest.raises(
        WorkerRefused, match="a leaf Variable that requires grad is being used in an in-place operation"
    ):
        w.add_(1)


def test_who_is_no_worker_is_told_how_to_make_one(alice: VirtualWorker) -> None:
    for worker in ("bob", None, VirtualWorker):
        with pytest.raises(PointerError, match=r"is not a worker: make one with sumus\.virtual\.VirtualWorker\(name\)"):
            send(torch.ones(2), worker)  # type: ignore[call-overload]
    with pytest.raises(PointerError, match="a list cannot be sent"):
        send([1.0], alice)  # type: ignore[call-overload]
    with pytest.raises(PointerError, match="this Tensor is already in this process"):
        get(torch.ones(2))
    with pytest.raises(PointerError, match=r"is already at 'alice': use sumus\.virtual\.move"):
        send(send(torch.ones(2), alice), alice)
    with pytest.raises(PointerError, match="is already at a worker"):
        send(send(nn.Linear(1, 1), alice), alice)
    with pytest.raises(PointerError, match="is already in this process"):
        get(nn.Linear(1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_what_does_not_travel_is_refused(alice: VirtualWorker, dtype: torch.dtype) -> None:
    with pytest.raises(PointerError, match="cannot be sent: use one of float64"):
        send(torch.ones(2, dtype=dtype), alice)


def test_in_place_gives_the_same_pointer(alice: VirtualWorker) -> None:
    x = before = send(torch.ones(2), alice)
    x += 1
    assert x is before
    x[0] = 7
    assert x.mul_(2) is before
    assert x.get().tolist() == [14.0, 4.0]


def test_a_model_moves_from_worker_to_worker(alice: VirtualWorker, bob: VirtualWorker) -> None:
    model = nn.Linear(2, 1)
    there = move(send(model, alice), bob)
    assert {leaf.worker for leaf in there.parameters()} == {bob}  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(get(there).weight, model.weight)
    back = move(there, alice)
    assert {leaf.worker.name for leaf in back.parameters()} == {"alice"}  # pyright: ignore[reportAttributeAccessIssue]


def test_a_deep_copy_is_another_tensor_there(alice: VirtualWorker) -> None:
    model = send(nn.Linear(2, 1), alice)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.weight.zero_()
    assert isinstance(copied.weight, nn.Parameter)
    assert copied.weight.requires_grad
    assert get(model).weight.any()
    assert not get(copied).weight.any()


# ── what is let go of ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pointer_that_is_let_go_of_is_deleted_there(alice: VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = send(torch.ones(4), alice)
    for _ in range(10):
        kept = kept + 1
    gc.collect()
    sent = trips(alice, monkeypatch)
    held = alice.held()
    assert (held.tensors, held.bytes) == (1, 16)
    assert len(sent) == 1, "deleted with that request, not each with its own"
    del kept
    gc.collect()
    assert (alice.held().tensors, alice.held().bytes) == (0, 0)


def test_what_autograd_keeps_is_counted_and_goes_with_its_graph(alice: VirtualWorker) -> None:
    w = send(torch.ones(1000, requires_grad=True), alice)
    alone = alice.held().bytes
    loss = ((w * 2) * (w + 1)).sum()
    gc.collect()
    assert alice.held().tensors == 2
    assert alice.held().bytes > alone + 8000
    del loss
    gc.collect()
    assert alice.held().bytes == alone


def test_a_view_counts_as_the_memory_that_it_keeps(alice: VirtualWorker) -> None:
    x = send(torch.ones(1000), alice)
    one = x[0]
    assert alice.held().bytes == 4000
    del x
    gc.collect()
    assert alice.held().bytes == 4000
    del one
    gc.collect()
    assert alice.held().bytes == 0


def test_pointers_that_outlive_their_worker_say_so(alice: VirtualWorker) -> None:
    x = send(torch.ones(2), alice)
    alice.close()
    with pytest.raises(PointerError, match="worker 'alice' is closed, and its tensors are deleted"):
        x + 1
    del x
    gc.collect()


def test_the_interpreter_ends_quietly_with_pointers_left() -> None:
    code = """
import torch
from torch import nn
from sumus.virtual import VirtualWorker, send
alice = VirtualWorker("alice")
model = send(nn.Linear(2, 1), alice)
kept = [model(send(torch.ones(3, 2), alice)).sum()]
kept[0].backward()
kept.append(kept)
print("done")
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


def test_refusals_are_errors_of_ours(alice: VirtualWorker) -> None:
    assert issubclass(PointerError, UsageError)
    assert issubclass(WorkerRefused, UsageError)
    with pytest.raises(WorkerRefused) as caught:
        alice["inputs"]
    assert (caught.value.worker, caught.value.code) == ("alice", "unknown_name")
    assert (
        str(caught.value)
        == "worker 'alice' refuses: the owner offers no tensor 'inputs'; the tensors on offer are: none"
    )
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.code) == (WorkerRefused, str(caught.value), "unknown_name")
    assert isinstance(again, SumusError)


def test_importing_it_is_light() -> None:
    code = "import sys, sumus.virtual, sumus.cli; print('torch' in sys.modules, dir(sumus.virtual)[0])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "ARITHMETIC"]


def test_every_name_of_the_package_resolves() -> None:
    import sumus.virtual

    for name in sumus.virtual.__all__:
        assert getattr(sumus.virtual, name) is not None
    assert sumus.virtual.Pointer is Pointer
    assert sumus.virtual.Policy is Policy
    with pytest.raises(AttributeError, match="'sumus.virtual' has no attribute 'hook'"):
        sumus.virtual.hook  # pyright: ignore[reportAttributeAccessIssue]
