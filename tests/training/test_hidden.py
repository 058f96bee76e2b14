"""What code keeps outside a model's leaves is found, put back, and said; what cannot be put back is refused."""

import collections
import contextvars
import copy
import enum
import functools
import itertools
import multiprocessing
import os
import queue
import random
import sys
import types
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sumus
from sumus.training.hidden import HiddenState, tied_to_itself
from tests.simulating import simulated

CALLS = 0
KEPT: list[int] = []
LARGE = {number: number for number in range(20_000)}


class Counting:
    of_all = 0

    def __init__(self) -> None:
        self.calls = 0
        self.recent = collections.deque[int](maxlen=3)
        self.seen = {0}
        self.center = torch.zeros(2)
        self.array = np.zeros(2)
        self.told = {"a": 1}
        self.draws = np.random.default_rng(0)
        self.held = types.SimpleNamespace(step=0)

    def step(self) -> int:
        self.calls += 1
        return self.calls


def counter() -> Callable[[], int]:
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


def add_to_global() -> None:
    global CALLS
    CALLS += 1


def add_to_list(one: int = 1, seen: list[int] = KEPT) -> None:
    seen.append(one)


def function_attribute() -> None:
    function_attribute.calls = getattr(function_attribute, "calls", 0) + 1  # pyright: ignore[reportFunctionMemberAccess]


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


class SlotNamedByText:
    __slots__ = "calls"

    def __init__(self) -> None:
        self.calls = 0


class PrivateSlot:
    __slots__ = ("__calls",)

    def __init__(self) -> None:
        self.__calls = 0

    def step(self) -> None:
        self.__calls += 1


class OwnList(list[Any]):
    calls = 0


class OwnDict(dict[str, Any]):
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    def __setitem__(self, key: str, value: Any) -> None:
        self.calls += 1
        super().__setitem__(key, value)


class OwnSet(set[Any]):
    pass


class OwnOrder(collections.OrderedDict[str, Any]):
    pass


class OwnDeque(collections.deque[Any]):
    pass


class Key:
    pass


class Kind(enum.Enum):
    ONE = "one"


ONE_KEY = Key()
VARIABLE = contextvars.ContextVar[int]("VARIABLE", default=0)


def two_keys() -> collections.OrderedDict[str, int]:
    return collections.OrderedDict(a=1, b=2)


def to_environment() -> None:
    os.environ["SUMUS_TEST_HIDDEN"] = "1"


class Iterating:
    """A user's own iterator: its attributes are where it stands."""

    def __init__(self) -> None:
        self.at = 0

    def __next__(self) -> int:
        self.at += 1
        return self.at


def sparse_one() -> Tensor:
    return torch.tensor([[0.0, 1.0], [0.0, 0.0]]).to_sparse()


def by(change: Callable[[Counting], object]) -> tuple[Any, Callable[[Any], object]]:
    return Counting(), change


CHANGES: dict[str, tuple[Any, Callable[[Any], object], str]] = {
    "an attribute": (*by(lambda c: c.step()), "loss.calls"),
    "a new attribute": (*by(lambda c: setattr(c, "more", 1)), "loss.more"),
    "an attribute that goes": (*by(lambda c: delattr(c, "calls")), "loss.calls"),
    "a deque": (*by(lambda c: c.recent.append(1)), "loss.recent"),
    "a set": (*by(lambda c: c.seen.add(1)), "loss.seen"),
    "a mapping": (*by(lambda c: c.told.update(a=2)), "loss.told"),
    "a tensor": (*by(lambda c: c.center.add_(1)), "loss.center"),
    "a tensor through .data": (*by(lambda c: c.center.data.add_(1)), "loss.center"),
    "an array": (*by(lambda c: c.array.__iadd__(1)), "loss.array"),
    "a generator of numbers": (*by(lambda c: c.draws.random()), "loss.draws"),
    "a namespace": (*by(lambda c: setattr(c.held, "step", 1)), "loss.held.step"),
    "a class": (*by(lambda c: setattr(Counting, "of_all", 1)), "Counting.of_all"),
    "a bound method's object": (Counting().step, lambda step: step(), "loss.calls"),
    "an enclosed variable": (counter(), lambda count: count(), "loss.calls"),
    "a global": (add_to_global, lambda add: add(), f"{__name__}.CALLS"),
    "a default": (add_to_list, lambda add: add(), "loss"),
    "a function's attribute": (function_attribute, lambda f: f(), "loss.calls"),
    "slots": (Slotted(), lambda s: s(), "loss.calls"),
    "an iterator's attributes": ([Iterating()], lambda held: next(held[0]), "loss[0].at"),
    "Python's generator": ([random.Random(0)], lambda held: held[0].random(), "loss[0]"),
    "torch's generator": ([torch.Generator()], lambda held: torch.rand(1, generator=held[0]), "loss[0]"),
    "a slot named by a text": (SlotNamedByText(), lambda s: setattr(s, "calls", 1), "loss.calls"),
    "a private slot": (PrivateSlot(), lambda s: s.step(), "loss._PrivateSlot__calls"),
    "a list's attribute": (OwnList([1]), lambda held: setattr(held, "calls", 1), "loss.calls"),
    "a list of its own class": (OwnList([1]), lambda held: held.append(1), "loss"),
    "a mapping's slot": (OwnDict(), lambda held: setattr(held, "calls", 7), "loss.calls"),
    "a set's attribute": (OwnSet(), lambda held: setattr(held, "calls", 1), "loss.calls"),
    "a deque's attribute": (OwnDeque(), lambda held: setattr(held, "calls", 1), "loss.calls"),
    "an ordered mapping's attribute": (OwnOrder(), lambda held: setattr(held, "calls", 1), "loss.calls"),
    "an order": (two_keys(), lambda held: held.move_to_end("a"), "loss"),
    "an object in a set": ({Iterating()}, lambda held: next(*held), "loss{...}.at"),
    "an object in a mapping": ({"a name": Iterating()}, lambda held: next(held["a name"]), "loss[...].at"),
    "a member of an enumeration": (lambda: Kind.ONE, lambda _: setattr(Kind.ONE, "calls", 1), "Kind.ONE.calls"),
    "a tensor's attribute": ([torch.zeros(2)], lambda held: setattr(held[0], "calls", 1), "loss[0].calls"),
    "an array of objects": ([np.array([0, None])], lambda held: held[0].__setitem__(0, 1), "loss[0]"),
    "a sparse tensor": ([torch.eye(2).to_sparse()], lambda held: held[0]._values().add_(1), "loss[0]"),
    "a sparse tensor's places": ([torch.eye(2).to_sparse()], lambda held: held[0].add_(sparse_one()), "loss[0]"),
    "a queue": ([queue.Queue[int]()], lambda held: held[0].queue.append(1), "loss[0].queue"),
    "weak keys": (
        [weakref.WeakKeyDictionary({ONE_KEY: 0})],
        lambda held: held[0].__setitem__(ONE_KEY, 1),
        "loss[0].data",
    ),
    "an object behind weak values": (
        [weakref.WeakValueDictionary({0: ONE_KEY})],
        lambda held: setattr(held[0][0], "calls", 1),
        "loss[0].data[...].calls",
    ),
    "a context variable": ([VARIABLE], lambda held: held[0].set(VARIABLE.get() + 1), "loss[0]"),
    "a number of processes": (
        [multiprocessing.Value("i", 0)],
        lambda held: setattr(held[0], "value", 1),
        "loss[0]._obj",
    ),
    "numbers of processes": ([multiprocessing.RawArray("d", 2)], lambda held: held[0].__setitem__(0, 1), "loss[0]"),
    "a view of memory": (
        [memoryview(bytearray(2))],
        lambda held: held[0].__setitem__(0, held[0][0] ^ 1),
        "loss[0]",
    ),
    "the environment": (to_environment, lambda to: to(), "os.environ"),
    "a large array": ([np.zeros((200, 100))], lambda held: held[0].__setitem__((0, 0), 1), "loss[0]"),
    "a large tensor through .data": ([torch.zeros(200, 100)], lambda held: held[0].data[0].add_(1), "loss[0]"),
    "a large tensor through an array": ([torch.zeros(200, 100)], lambda held: held[0].numpy().fill(1), "loss[0]"),
    "a very large array": ([np.zeros(2**20)], lambda held: held[0].__setitem__(-1, 1), "loss[0]"),
    "a long mapping": ([dict.fromkeys(range(10_001), 0)], lambda held: held[0].update({5: 1}), "loss[0]"),
    "a long list": ([[0] * 10_001], lambda held: held[0].__setitem__(5, 1), "loss[0]"),
    "bytes": ([bytearray(b"ab")], lambda held: held[0].append(1), "loss[0]"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_is_found_and_put_back(what: str) -> None:
    value, change, path = CHANGES[what]
    hidden = HiddenState({"loss": value})
    assert hidden.changed() == []
    for _ in range(2):  # the same again after it was put back
        change(value)
        assert hidden.changed() == [path]
        assert hidden.restore() == [path]
        assert hidden.changed() == []


def examples() -> list[Tensor]:
    return [torch.zeros(1)] * 3


MOVING = [
    *(itertools.cycle([1, 2]), itertools.count(), iter([1, 2, 3]), (n for n in range(3)), iter({1: 2, 3: 4})),
    *(map(abs, itertools.count()), zip([1, 2], [3, 4], strict=True), filter(None, [1, 2]), enumerate("ab")),
    *(reversed([1, 2]), iter(torch.utils.data.DataLoader(examples()))),  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize("moving", MOVING, ids=lambda moving: type(moving).__name__)
def test_what_cannot_be_put_back_is_refused_once_it_moves(moving: Any) -> None:
    hidden = HiddenState({"loss": [moving]})
    assert hidden.restore() == []
    next(moving)
    with pytest.raises(sumus.TaskError, match=r"`loss\[0\]` is a \w+ that advances while clients train"):
        hidden.restore()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_compressed_rows_and_columns_are_put_back() -> None:
    for held in (torch.eye(2).to_sparse_csr(), torch.eye(2).to_sparse_csc()):
        hidden = HiddenState({"loss": [held]})
        held.values().add_(1)
        assert hidden.restore() == ["loss[0]"]
        assert torch.equal(held.to_dense(), torch.eye(2))


def test_what_does_not_show_where_it_stands_is_refused_at_once() -> None:
    def growing() -> Generator[float, None, None]:
        size = [1.0]
        while True:
            size[0] += 0.5
            yield size[0]

    begun = growing()
    next(begun)
    for iterator in (begun, map(abs, begun)):
        with pytest.raises(sumus.TaskError, match=r"`loss\[0\]` is a \w+ whose position cannot be read"):
            HiddenState({"loss": [iterator]}).restore()


def test_what_a_module_keeps_is_found_where_the_code_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "kept_package" / "deep"
    inside.mkdir(parents=True)
    for folder in (inside.parent, inside):
        (folder / "__init__.py").touch()
    (inside / "kept.py").write_text("CALLS = 0\ndef step():\n    global CALLS\n    CALLS += 1\n")
    (inside / "relative.py").write_text("def step():\n    from . import kept\n    kept.CALLS += 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def by_module() -> None:
        import kept_package.deep.kept  # pyright: ignore

        kept_package.deep.kept.CALLS += 1

    def by_name() -> None:
        from kept_package.deep import kept as other  # pyright: ignore

        other.CALLS += 1

    def by_function() -> None:
        from kept_package.deep.kept import step  # pyright: ignore

        step()

    def from_there() -> None:
        from kept_package.deep.relative import step  # pyright: ignore

        step()

    try:
        for code in (by_module, by_name, by_function, from_there):
            hidden = HiddenState({"loss": code})
            code()
            assert hidden.restore() == ["kept_package.deep.kept.CALLS"], code.__name__
        import kept_package.deep.kept as package  # pyright: ignore

        assert package.CALLS == 0
    finally:
        for name in [name for name in sys.modules if name.startswith("kept_package")]:
            del sys.modules[name]


def test_what_is_large_is_compared_at_first_and_at_powers_of_two_and_what_began_unseen_is_refused() -> None:
    bank = np.zeros(2**20)
    hidden = HiddenState({"loss": [bank]})
    due = [hidden.is_due() for _ in range(40)]
    assert [at + 1 for at, now in enumerate(due) if now] == [*range(1, 9), 16, 32]
    assert hidden.changed(whole=False) == []
    bank[3] = 1
    assert hidden.changed(whole=False) == [], "not looked at"
    with pytest.raises(sumus.TaskError, match=r"`loss\[0\]` changed .* too large .* clients may have begun"):
        hidden.restore()
    assert bank[3] == 0
    bank[3] = 1
    assert hidden.restore(whole=False) == ["loss[0]"], "from now on it is compared each time"


def test_what_a_long_container_holds_deep_inside_is_refused_if_it_changes() -> None:
    both: list[Any] = [{at: [0] for at in range(10_001)}, [[torch.zeros(1)] for _ in range(10_001)]]
    for held in both:
        hidden = HiddenState({"loss": [held]})
        assert hidden.restore() == []
        held[7][0] += 1
        with pytest.raises(sumus.TaskError, match=r"the content of `loss\[0\]` changes .* too large"):
            hidden.restore()


def test_equal_numbers_and_what_a_property_keeps_are_no_change() -> None:
    class Known:
        def __init__(self) -> None:
            self.number, self.odd = 1000.5, float("nan")

    known = Known()
    hidden = HiddenState({"loss": known})
    known.number, known.odd = float("1000.5"), float("nan")
    assert hidden.changed() == []


def test_long_mappings_that_stay_and_libraries_are_not_looked_into() -> None:
    assert HiddenState({"loss": lambda: LARGE}).changed() == []
    assert HiddenState({"loss": lambda: np.linalg}).digest == HiddenState({"loss": lambda: np.linalg}).digest


def test_a_digest_shows_what_another_process_would_see_otherwise() -> None:
    def of(number: float) -> str:
        return HiddenState({"loss": lambda: number}).digest

    assert of(1.0) == of(1.0) != of(2.0)


LOGS: dict[str, tuple[Any, Callable[[Any, int], object], Any]] = {
    "list": ([], lambda log, number: log.append(number), [0, 1, 2]),
    "set": ({7}, lambda log, number: log.update({number, 1}), {7, 0, 1, 2}),
    "deque": (collections.deque([7]), lambda log, number: log.append(number), collections.deque([7, 0, 1, 2])),
    "last two": (
        collections.deque[int](maxlen=2),
        lambda log, number: log.append(number),
        collections.deque([1, 2]),
    ),
    "dict": ({"x": 7}, lambda log, number: log.update({number: number}), {"x": 7, 0: 0, 1: 1, 2: 2}),
    "ordered": (
        collections.OrderedDict(x=7),
        lambda log, number: log.update({number: number}),
        collections.OrderedDict([("x", 7), (0, 0), (1, 1), (2, 2)]),
    ),
    "bytes": (bytearray(b"x"), lambda log, number: log.append(number), bytearray(b"x\0\1\2")),
}


@pytest.mark.parametrize("kind", LOGS)
def test_a_log_is_whole_at_the_end_and_as_before_for_each_client(kind: str) -> None:
    given, add, whole = LOGS[kind]
    log, before = copy.copy(given), copy.copy(given)
    hidden = HiddenState({"loss": [log]})
    for number in range(3):
        add(log, number)
        assert hidden.restore() == ["loss[0]"], "the container, and no key of it"
        assert log == before
    hidden.end()
    assert log == whole


@pytest.mark.parametrize("kind", LOGS)
def test_a_log_gets_nothing_of_a_run_that_is_only_looked_at(kind: str) -> None:
    given, add, whole = LOGS[kind]
    log = copy.copy(given)
    hidden = HiddenState({"loss": [log]})
    for number in range(3):
        with hidden.keeping_logs():
            add(log, number + 10)
            hidden.restore()
        add(log, number)
        hidden.restore()
    hidden.end()
    assert log == whole


def test_what_code_changes_besides_adding_is_no_log() -> None:
    for log, change in (({"x": 1}, lambda log: log.update(x=2, y=1)), ({1}, lambda log: (log.clear(), log.add(2)))):
        hidden, before = HiddenState({"loss": [log]}), copy.copy(log)
        change(log)
        hidden.end()
        assert log == before


# ── copies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def hooked(module: nn.Module) -> None:
    module[0].weight.register_hook(lambda grad: 0 * grad)  # pyright: ignore


def around(module: Any) -> None:
    module.gain = lambda: module[0].weight.sum()


def forward_hook(module: Any) -> None:
    module.register_forward_hook(lambda layer, inputs, outputs: outputs * module[0].bias.sum())


def by_default(module: Any) -> None:
    def gain(weight: Tensor = module[0].weight) -> Tensor:
        return weight.sum()

    module.gain = gain


TIED = [hooked, around, forward_hook, by_default]


@pytest.mark.parametrize("tie", TIED)
def test_a_model_whose_copy_would_be_another_is_made_anew_or_refused(tie: Callable[[Any], None]) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 2))
        tie(module)
        return module

    given = make()
    assert tied_to_itself(given) is not None
    with pytest.raises(sumus.TaskError, match="a callable that makes a new module at each call"):
        run(given)
    history = run(make)
    if tie is hooked:
        assert torch.equal(history.model["0.weight"], given.state_dict()["0.weight"])
        assert not torch.equal(history.model["0.bias"], given.state_dict()["0.bias"])


def test_an_attribute_of_a_parameter_is_in_the_copy_too() -> None:
    def gained(m: Any, inputs: Tensor) -> Tensor:
        return inputs * m.out.weight.gain * m.out.weight.owner.factor

    def make() -> nn.Module:
        module = With(gained, factor=3.0)
        module.out.weight.gain = 2.0  # pyright: ignore
        module.out.weight.owner = module  # pyright: ignore
        return module

    plain = With(lambda m, x: x * 6.0)
    assert run(make()).notes == run(make).notes == ()
    assert run(make()).model_sha256 == run(make, through="wire").model_sha256 == run(plain).model_sha256


def test_a_hook_that_would_never_run_is_refused() -> None:
    module = nn.Linear(4, 2)
    module.weight.register_post_accumulate_grad_hook(lambda tensor: None)
    with pytest.raises(
        sumus.TaskError, match="`weight` has a hook of register_post_accumulate_grad_hook.*register_hook"
    ):
        run(module)


PEOPLE = {who: (np.eye(4, dtype="float32"), np.array([0, 1, 0, 1])) for who in range(3)}


def run(net: Any, loss: Any = sumus.losses.cross_entropy, **options: Any) -> sumus.History:
    given = {"rounds": 2, "progress": False, "executor": "autograd", **options}
    leaves = given.pop("leaves", {})
    work = sumus.fedavg(sumus.sgd(lr=0.1, batch_size=2))
    return simulated(sumus.Task(net, loss, leaves=leaves), work, PEOPLE, **given)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


class With(nn.Module):
    """A layer, and what a test adds."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **more: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out, self.own = nn.Linear(4, 2), forward
        for name, value in more.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.own(self, inputs))


def moved(name: str) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            getattr(m, name).mul_(0.9).add_(inputs.mean(0), alpha=0.1)
        return inputs + getattr(m, name)

    return forward


def frozen() -> nn.Module:
    return With(moved("prototype"), prototype=nn.Parameter(torch.ones(4), requires_grad=False))


def test_a_frozen_parameter_that_moves_is_refused_and_both_remedies_work() -> None:
    with pytest.raises(sumus.TaskError, match=r"`prototype` is a frozen parameter.*register_buffer.*personal"):
        run(frozen)
    for net, leaves in (
        (lambda: With(moved("prototype"), prototype=torch.ones(4)), {}),
        (frozen, {"prototype": "personal"}),
    ):
        one, two = run(net, leaves=leaves), run(net, leaves=leaves, through="wire")
        assert one.notes == two.notes == ()
        assert one.model_sha256 == two.model_sha256


class ScaledLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return sumus.losses.cross_entropy(outputs, targets) * self.log_scale.exp()


def on_demand(m: Any, inputs: Tensor) -> Tensor:
    if not hasattr(m, "late"):
        m.late = nn.Linear(4, 4)
    return m.late(inputs)


ELSEWHERE = nn.Linear(4, 4)
UNTRAINED: dict[str, tuple[Any, Any, str]] = {
    "a loss's parameter": (lambda: With(lambda m, x: x), ScaledLoss(), "loss.log_scale"),
    "a layer on demand": (lambda: With(on_demand), sumus.losses.cross_entropy, "model.late"),
    "a layer in a list": (
        lambda: With(lambda m, x: m.layers[0](x), layers=[nn.Linear(4, 4)]),
        sumus.losses.cross_entropy,
        "model.layers",
    ),
    "a global layer": (lambda: With(lambda m, x: ELSEWHERE(x)), sumus.losses.cross_entropy, "ELSEWHERE"),
    "a plain tensor": (
        lambda: With(lambda m, x: x * m.scales[0], scales=[torch.ones(4, requires_grad=True)]),
        sumus.losses.cross_entropy,
        "model.scales",
    ),
}


@pytest.mark.parametrize("what", UNTRAINED)
def test_a_parameter_that_nobody_sends_is_refused(what: str) -> None:
    net, loss, path = UNTRAINED[what]
    with pytest.raises(sumus.TaskError, match=rf"`\S*{path}.* is not a leaf of the model: no step trains it.*__init__"):
        run(net, loss)


def test_inputs_that_ask_for_a_gradient_are_no_parameter() -> None:
    assert run(lambda: With(lambda m, x: x.clone().requires_grad_())).notes == ()


def test_a_frozen_network_inside_a_loss_is_no_state() -> None:
    judge = nn.Linear(2, 2).requires_grad_(False)
    assert run(lambda: With(lambda m, x: x), lambda o, t: sumus.losses.cross_entropy(judge(o), t)).notes == ()


def test_requires_grad_that_the_code_switches_is_refused() -> None:
    def thawing(m: Any, inputs: Tensor) -> Tensor:
        m.held.weight.requires_grad_(True)
        return inputs + m.held(inputs)

    with pytest.raises(sumus.TaskError, match="switches requires_grad of `held.weight`"):
        run(lambda: With(thawing, held=nn.Linear(4, 4).requires_grad_(False)))


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out, self.calls = nn.Linear(4, 2), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.out(inputs) * (1.0 + 0.1 * self.calls)


@pytest.mark.filterwarnings("ignore:.torch.jit.script", "ignore:The .grad attribute")
def test_what_a_scripted_module_counts_is_seen() -> None:
    one, two = (run(lambda: torch.jit.script(Scripted()), **way) for way in ({}, {"through": "wire"}))  # pyright: ignore
    assert one.model_sha256 == two.model_sha256
    assert one.notes[0].startswith("`model.calls` changes while the code runs")
    assert run(lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 2)))).notes == ()  # pyright: ignore


# ── buffers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def unit(m: Any, inputs: Tensor) -> Tensor:
    if m.training:
        with torch.no_grad():
            m.kept.copy_(nn.functional.normalize(m.kept + 0.1 * inputs.mean(0), dim=0))
    return inputs + m.kept


def queued(m: Any, inputs: Tensor) -> Tensor:
    if m.training:
        m.kept.copy_(torch.cat([inputs, m.kept])[: len(m.kept)])
    return inputs + m.kept.mean(0)


def flagged(m: Any, inputs: Tensor) -> Tensor:
    if m.training and not m.kept:
        m.kept.fill_(1.0)
    return inputs * (1 + m.kept)


def nearest(m: Any, inputs: Tensor) -> Tensor:
    """A codebook whose codes are means of what was nearest to them: two averages, and their quotient."""
    which = torch.cdist(inputs, m.kept).argmin(1)
    if m.training:
        one = nn.functional.one_hot(which, len(m.kept)).float()
        with torch.no_grad():
            m.counts.lerp_(one.sum(0), 0.1)
            m.sums.lerp_(one.T @ inputs, 0.1)
            m.kept.copy_(m.sums / m.counts[:, None])
    return inputs + m.kept[which]


def largest(m: Any, inputs: Tensor) -> Tensor:
    if m.training:
        m.kept.copy_(torch.maximum(m.kept, inputs.abs().amax(0)))
    return inputs / (1 + m.kept)


UNAVERAGED: dict[str, Callable[[], nn.Module]] = {
    "a unit vector": lambda: With(unit, kept=torch.tensor([1.0, 0.0, 0.0, 0.0])),
    "a queue": lambda: With(queued, kept=torch.ones(16, 4)),
    "a flag": lambda: With(flagged, kept=torch.zeros(())),
    "a codebook": lambda: With(nearest, kept=torch.eye(3, 4), counts=torch.ones(3), sums=torch.eye(3, 4)),
    "a largest value": lambda: With(largest, kept=torch.full((4,), 0.5)),
}


@pytest.mark.parametrize("what", UNAVERAGED)
def test_a_buffer_whose_mean_is_none_is_refused_unless_asked_for(what: str) -> None:
    net = UNAVERAGED[what]
    with pytest.raises(
        sumus.TaskError, match=r"the buffer `\w+` .*a mean of several clients' buffers.*\"personal\".*\"shared\""
    ):
        run(net)
    for role in ("personal", "shared"):
        names = [name for name, _ in net().named_buffers()]
        assert run(net, leaves=dict.fromkeys(names, role)).notes == ()


def running(m: Any, inputs: Tensor) -> Tensor:
    if m.training:
        with torch.no_grad():
            m.mean.lerp_(inputs.mean(0), 0.1)
            m.variance.lerp_(inputs.var(0), 0.1)
            m.seen.add_(len(inputs))
    return (inputs - m.mean) / (m.variance + 1e-5).sqrt()


def of_one_class(m: Any, inputs: Tensor) -> Tensor:
    if m.training:
        m.kept[0] = 0.9 * m.kept[0] + 0.1 * inputs.mean(0)
    return inputs + m.kept[0]


AVERAGED: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)),
    "statistics of one's own": lambda: With(running, mean=torch.zeros(4), variance=torch.ones(4), seen=torch.zeros(())),
    "a constant": lambda: With(lambda m, x: x * m.kept, kept=torch.ones(4)),
    "a teacher in a buffer": lambda: With(moved("kept"), kept=torch.ones(4)),
    "a mean of one class": lambda: With(of_one_class, kept=torch.ones(3, 4)),
}


@pytest.mark.parametrize("what", AVERAGED)
def test_statistics_are_averaged_without_a_word(what: str) -> None:
    assert run(AVERAGED[what]).notes == ()


def spectral(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 2))


class Exact(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / torch.linalg.matrix_norm(weight.flatten(1), 2)


def exactly(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", Exact())
    return layer


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_spectral_norm_is_refused_and_its_remedy_has_the_right_norm(wrap: Callable[[nn.Module], nn.Module]) -> None:
    for leaves in ({}, {"*_u": "personal", "*_v": "personal"}, {"*_u": "frozen", "*_v": "frozen"}):
        with pytest.raises(sumus.TaskError, match=r"spectral norm.*torch\.linalg\.matrix_norm"):
            run(spectral(wrap), leaves=leaves)
    model = spectral(exactly)()
    model.load_state_dict(run(spectral(exactly)).model)
    assert float(torch.linalg.matrix_norm(model[0].weight.detach(), 2)) == pytest.approx(1.0)  # pyright: ignore


def test_a_spectral_norm_of_a_layer_that_is_frozen_whole_stays_right() -> None:
    assert run(spectral(nn.utils.parametrizations.spectral_norm), leaves={"0.*": "frozen"}).notes == ()


def test_whole_numbers_that_move_are_said_and_those_of_batch_norm_are_not() -> None:
    def counted(m: Any, inputs: Tensor) -> Tensor:
        m.steps.add_(1)
        return inputs * (1 + 0.1 * m.steps)

    (note,) = run(lambda: With(counted, steps=torch.zeros((), dtype=torch.long))).notes
    assert "`model.steps` changes while the code runs" in note
    (note,) = run(lambda: nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2))).notes
    assert "num_batches_tracked" in note


# ── one result everywhere ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_loss_that_counts_gives_one_model_in_every_way_and_runs_alike_again() -> None:
    count = counter()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return sumus.losses.cross_entropy(outputs, targets) * (1 + 0.1 * count())

    ways = [{}, {"executor": "sequential"}, {"executor": "vectorized:2"}, {"through": "wire"}, {}]
    histories = [run(lambda: With(lambda m, x: x), loss, **way) for way in ways]
    assert len({history.model_sha256 for history in histories}) == 1
    assert all(any("calls` changes while the code runs" in note for note in history.notes) for history in histories)
    assert "trained by autograd, not sequential: its steps change `loss.count.calls`" in histories[1].notes[0]


@functools.cache
def unseen() -> list[bool]:
    """What the walk does not see: a value in a cache of Python's own."""
    return [False]


@pytest.mark.parametrize("way", [{}, {"through": "wire"}])
@pytest.mark.parametrize("after", [5, 18])
def test_a_large_array_that_begins_to_change_late_is_refused_or_said_at_the_end(
    way: dict[str, Any], after: int
) -> None:
    bank = np.zeros(2**20)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        bank[0] += float(unseen()[0])
        return sumus.losses.cross_entropy(outputs, targets) * (1 + 0.01 * bank[0])

    def switch(outcome: Any) -> None:
        unseen()[0] = outcome.round >= after

    unseen()[0], said = False, ""
    try:
        said = " ".join(run(lambda: With(lambda m, x: x), loss, rounds=20, after_round=switch, **way).notes)
    except sumus.SumusError as error:
        said = str(error)
    assert "`loss.bank` changed while clients trained, but it is too large to be compared before each client" in said
    assert not bank.any(), "it is put back all the same"


def test_pythons_and_numpys_numbers_are_keyed_as_torchs_are() -> None:
    def noisy(m: Any, inputs: Tensor) -> Tensor:
        return inputs * (random.random() + float(np.random.random()))

    ways = [{}, {}, {"through": "wire"}, {"executor": "sequential"}]
    stood = random.getstate()
    assert len({run(lambda: With(noisy), **way).model_sha256 for way in ways}) == 1
    assert random.getstate() == stood


def test_what_a_part_of_the_algorithm_keeps_is_said() -> None:
    count = counter()

    def scaled(tree: Any, context: Any) -> Any:
        return {name: leaf / count() for name, leaf in tree.items()}

    work = sumus.fedavg(sumus.sgd(lr=0.1), update=sumus.Transform(apply=scaled))
    task = sumus.Task(lambda: With(lambda m, x: x), sumus.losses.cross_entropy)
    (note,) = sumus.simulate(task, work, PEOPLE, rounds=1, out=sumus.Output(progress=False)).notes
    assert note.startswith("`update.apply.count.calls` changes while the code runs")


def test_check_says_what_is_kept() -> None:
    count = counter()
    task = sumus.Task(lambda: With(lambda m, x: x), lambda o, t: sumus.losses.cross_entropy(o, t) * count())
    report = sumus.check(sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.1)), sumus.Pacing(3)), PEOPLE)
    assert [note.partition(" ")[0] for note in report.notes] == ["`loss.count.calls`"]
    assert count() == 1, "it is left as it was"
