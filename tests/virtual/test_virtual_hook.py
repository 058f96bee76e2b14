"""The spelling of PySyft 0.2, on request: its listings run, give what plain torch gives, and torch is as it was afterwards."""

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim

import sumus.virtual as sy
from sumus.errors import UsageError
from sumus.virtual import Pointer, PointerError, Policy, WorkerRefused

CLASSES = (torch.Tensor, nn.Module, nn.Parameter)


def attributes() -> list[dict[str, Any]]:
    """What these classes hold and inherit; but for an empty dict that Python makes where annotations are asked for."""
    return [
        dict(vars(kind)) | {f"inherited {n}": getattr(kind, n, None) for n in dir(kind) if n != "__annotations__"}
        for kind in CLASSES
    ]


@pytest.fixture
def hook() -> Iterator[sy.TorchHook]:
    before = attributes()
    hooked = sy.TorchHook(torch)
    yield hooked
    hooked.unhook()
    assert attributes() == before


def losses_of(
    step: Callable[[nn.Module, optim.Optimizer, Any, Any], float], make: Any, sets: Any
) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = make(model.parameters())  # before anything is sent
    return [step(model, optimizer, data, target) for _ in range(10) for data, target in sets], model


DATA = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
TARGET = torch.tensor([[0.0], [0.0], [1.0], [1.0]], requires_grad=True)


def here(model: nn.Module, optimizer: optim.Optimizer, data: Any, target: Any) -> float:
    optimizer.zero_grad()
    loss = ((model(data) - target) ** 2).sum()
    loss.backward()
    optimizer.step()
    return loss.item()


def there(model: Any, optimizer: optim.Optimizer, data: Any, target: Any) -> float:
    model.send(data.location)
    optimizer.zero_grad()
    loss: Any = ((model(data) - target) ** 2).sum()
    loss.backward()
    optimizer.step()
    model.get()
    return loss.get().item()


def test_a_listing_of_that_time_gives_the_losses_of_plain_torch() -> None:
    """As published, with its import line changed."""
    before = attributes()
    hook = sy.TorchHook(torch)
    bob = sy.VirtualWorker(hook, id="bob")
    alice = sy.VirtualWorker(hook, id="alice")

    data = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1.0]], requires_grad=True)
    target = torch.tensor([[0], [0], [1], [1.0]], requires_grad=True)
    torch.manual_seed(0)
    model: Any = nn.Linear(2, 1)
    start = copy.deepcopy(model)

    data_bob: Any = data[0:2]
    target_bob: Any = target[0:2]
    data_alice: Any = data[2:]
    target_alice: Any = target[2:]
    data_bob = data_bob.send(bob)
    data_alice = data_alice.send(alice)
    target_bob = target_bob.send(bob)
    target_alice = target_alice.send(alice)
    datasets = [(data_bob, target_bob), (data_alice, target_alice)]
    opt = optim.SGD(params=model.parameters(), lr=0.1)
    losses: list[float] = []

    def train() -> None:
        for _ in range(10):
            for data, target in datasets:
                model.send(data.location)
                opt.zero_grad()
                pred = model(data)
                loss = ((pred - target) ** 2).sum()
                loss.backward()
                opt.step()
                model.get()
                losses.append(float(loss.get().data))

    train()
    hook.unhook()
    assert attributes() == before

    plain = optim.SGD(params=start.parameters(), lr=0.1)
    wanted = [here(start, plain, *pair) for _ in range(10) for pair in ((data[:2], target[:2]), (data[2:], target[2:]))]
    assert losses == wanted
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), start.parameters(), strict=True))
    assert type(model.weight) is nn.Parameter


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: optim.SGD(parameters, lr=0.1),
        lambda parameters: optim.SGD(parameters, lr=0.1, weight_decay=0.05),
        lambda parameters: optim.SGD([{"params": list(parameters), "lr": 0.2}], lr=0.1, foreach=False),
    ],
    ids=["sgd", "decay", "groups"],
)
def test_an_optimizer_made_before_steps_at_each_worker(hook: sy.TorchHook, make: Any) -> None:
    workers = [sy.VirtualWorker(hook, id=name) for name in ("bob", "alice")]
    halves = [(DATA[:2], TARGET[:2]), (DATA[2:], TARGET[2:])]
    sent: Any = [tuple(each.send(w) for each in half) for half, w in zip(halves, workers, strict=True)]  # pyright: ignore[reportAttributeAccessIssue]
    away, trained = losses_of(there, make, sent)
    plain, wanted = losses_of(here, make, halves)
    assert away == plain
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), wanted.parameters(), strict=True))


@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, lr=0.1, momentum=0.9), lambda p: optim.Adam(p, lr=0.1)])
def test_momentum_at_one_worker_is_that_of_plain_torch(hook: sy.TorchHook, make: Any) -> None:
    """The model goes once, and comes back once."""
    bob = sy.VirtualWorker(hook, id="bob")
    data, target = DATA.send(bob), TARGET.send(bob)  # pyright: ignore[reportAttributeAccessIssue]
    torch.manual_seed(0)
    model: Any = nn.Linear(2, 1)
    plain = copy.deepcopy(model)
    optimizer, other = make(model.parameters()), make(plain.parameters())
    model.send(bob)
    for _ in range(5):
        optimizer.zero_grad()
        ((model(data) - target) ** 2).sum().backward()
        optimizer.step()
        here(plain, other, DATA, TARGET)
    model.get()
    assert torch.allclose(model.weight, plain.weight, atol=1e-6)


def test_momentum_that_is_elsewhere_is_said_and_not_mixed_up(hook: sy.TorchHook) -> None:
    bob, alice = (sy.VirtualWorker(hook, id=name) for name in ("bob", "alice"))
    sets: Any = [(DATA.send(w), TARGET.send(w)) for w in (bob, alice)]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(PointerError, match="one tensor is at 'bob', but another is at 'alice'|is at"):
        losses_of(there, lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9), sets)


def test_parameters_stay_the_objects_that_they_are(hook: sy.TorchHook) -> None:
    bob, alice = (sy.VirtualWorker(hook, id=name) for name in ("bob", "alice"))
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1, bias=False))
    model[2].weight.requires_grad_(False)
    tied = model[0].weight
    model.register_parameter("again", tied)
    numbers = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    objects = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert model.send(bob) is model
    assert model.location is bob
    assert {id(tensor) for tensor in (*model.parameters(), *model.buffers())} == objects
    assert isinstance(model[0].weight, Pointer)
    assert isinstance(model[0].weight, nn.Parameter)
    assert model.again is model[0].weight
    assert bob.held().tensors == 8
    assert model.move(alice) is model
    assert (model.location, bob.held().tensors, alice.held().tensors) == (alice, 0, 8)
    assert model.get() is model
    assert {id(tensor) for tensor in (*model.parameters(), *model.buffers())} == objects
    assert all(torch.equal(leaf, numbers[name]) for name, leaf in model.state_dict().items())
    assert [leaf.requires_grad for leaf in model.parameters()] == [True, True, True, True, False]
    assert type(model[1].running_mean) is torch.Tensor
    gc.collect()
    assert alice.held().tensors == 0


def test_a_gradient_goes_along(hook: sy.TorchHook) -> None:
    """So that what is not zeroed adds up, as in plain torch."""
    bob = sy.VirtualWorker(hook, id="bob")
    model: Any = nn.Linear(2, 1)
    model(DATA).sum().backward()
    once = model.weight.grad.clone()
    model.send(bob)
    model(DATA.send(bob)).sum().backward()  # pyright: ignore[reportAttributeAccessIssue]
    model.get()
    assert torch.equal(model.weight.grad, 2 * once)
    model(DATA).sum().backward()
    assert torch.equal(model.weight.grad, 3 * once)


def test_tensors_are_sent_moved_and_fetched(hook: sy.TorchHook) -> None:
    bob, alice = (sy.VirtualWorker(hook, id=name) for name in ("bob", "alice"))
    x: Any = torch.tensor([1.0, 2.0])
    pointer = x.send(bob)
    assert (pointer.location, pointer.location.id, x.tolist()) == (bob, "bob", [1.0, 2.0])
    assert (pointer + pointer).move(alice).location is alice
    assert (pointer * 2).get().tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda x, bob: x.get(), "is already in this process"),
        (lambda x, bob: x.move(bob), "is already in this process"),
        (lambda x, bob: x.location, "not at a worker"),
        (lambda x, bob: x.send(bob).send(bob), "already at 'bob'"),
        (lambda x, bob: x.send(bob, bob), "one worker, not 2"),
        (lambda x, bob: x.send("bob"), "is not a worker"),
        (lambda x, bob: nn.Linear(1, 1).get(), "is already in this process"),  # pyright: ignore[reportCallIssue]
        (lambda x, bob: nn.Linear(1, 1).move(bob), "is already in this process"),  # pyright: ignore[reportCallIssue]
        (lambda x, bob: nn.Linear(1, 1).send(bob).send(bob), "already at a worker"),  # pyright: ignore[reportCallIssue]
        (lambda x, bob: nn.Linear(1, 1).send("bob"), "is not a worker"),  # pyright: ignore[reportCallIssue]
        (lambda x, bob: nn.Tanh().location, "no parameters"),
    ],
    ids=range(11),
)
def test_what_cannot_be_is_said(hook: sy.TorchHook, do: Any, said: str) -> None:
    with pytest.raises(PointerError, match=said):
        do(torch.ones(2), sy.VirtualWorker(hook, id="bob"))


# ── what is private stays ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fetch", ["none", "parameters"])
def test_what_a_worker_keeps_is_not_fetched_by_these_names(hook: sy.TorchHook, fetch: Any) -> None:
    own = {"data": DATA.detach(), "target": TARGET.detach()}
    carol, bob = sy.VirtualWorker(hook, own, Policy(fetch=fetch), id="carol"), sy.VirtualWorker(hook, id="bob")
    model: Any = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    model.send(carol)
    loss: Any = ((model(carol["data"]) - carol["target"]) ** 2).sum()
    loss.backward()
    optimizer.step()
    refused: list[Callable[[], object]] = [
        loss.get, lambda: carol["data"].get(), lambda: loss.move(bob), lambda: model.weight.grad.get()
    ]  # fmt: skip
    if fetch == "none":
        refused += [model.get, lambda: model.move(bob)]
    for ask in refused:
        with pytest.raises(WorkerRefused) as error:
            ask()
        assert error.value.code == "private"
        assert model.location is carol  # as it was
    if fetch == "parameters":
        model.get()
        assert not torch.equal(model.weight, before)
        assert model.weight.grad is None  # it was kept


def test_a_model_that_a_worker_does_not_take_stays_here(hook: sy.TorchHook) -> None:
    small = sy.VirtualWorker(hook, None, Policy(largest=64), id="small")
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 50))
    with pytest.raises(WorkerRefused):
        model.send(small)
    assert not any(isinstance(leaf, Pointer) for leaf in model.parameters())
    assert model(DATA).shape == (4, 50)


# ── hooks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_torch_is_not_touched_without_a_hook() -> None:
    assert not any(hasattr(kind, name) for kind in CLASSES for name in ("send", "move", "location"))
    with pytest.raises(AttributeError):
        torch.ones(1).send  # pyright: ignore[reportAttributeAccessIssue]


def test_a_second_hook_is_the_same_one() -> None:
    before = attributes()
    first, second = sy.TorchHook(torch), sy.TorchHook(torch)
    first.unhook()
    assert attributes() == before
    second.unhook()
    assert attributes() == before


def test_what_a_class_or_a_model_calls_so_itself_is_kept() -> None:
    class Sender(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.location = nn.Linear(2, 1)
            self.move = 3

        def send(self, word: str) -> str:
            return word

    nn.Module.get = lambda self: "own"  # pyright: ignore[reportAttributeAccessIssue]
    try:
        hook = sy.TorchHook(torch)
        model = Sender()
        assert (model.send("x"), model.move) == ("x", 3)
        assert isinstance(model.location, nn.Linear)
        hook.unhook()
        assert nn.Linear(1, 1).get() == "own"  # pyright: ignore[reportCallIssue]
    finally:
        del nn.Module.get  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_away_when_it_is_unhooked_is_fetched_by_the_new_names() -> None:
    hook = sy.TorchHook(torch)
    bob = sy.VirtualWorker(hook, id="bob")
    model: Any = nn.Linear(2, 1)
    numbers = model.weight.detach().clone()
    model.send(bob)
    hook.unhook()
    assert torch.equal(sy.get(model).weight, numbers)


def test_names_of_workers_are_given_once() -> None:
    hook = sy.TorchHook(torch)
    hook.unhook()
    assert sy.VirtualWorker(hook, id="worker1").name == sy.VirtualWorker("worker1").id == "worker1"
    for wrong in (lambda: sy.VirtualWorker(hook), lambda: sy.VirtualWorker("a", id="b"), lambda: sy.VirtualWorker(3)):  # pyright: ignore[reportArgumentType]
        with pytest.raises(UsageError, match="give one name"):
            wrong()
    with pytest.raises(UsageError, match="give torch, the module"):
        sy.TorchHook("torch")  # pyright: ignore[reportArgumentType]
