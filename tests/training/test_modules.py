"""Modules as people make them: wrapped, uncopyable, with constants. Each trains under its own names, or is refused in words."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sumus

INPUTS = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
PEOPLE = {who: (INPUTS, (INPUTS.sum(1) > 0).astype("int64")) for who in range(2)}


def run(net: Any, out: Path | None = None, **options: Any) -> sumus.History:
    task = sumus.Task(net, options.pop("loss", sumus.losses.cross_entropy), **options)
    return sumus.simulate(
        task, sumus.fedavg(sumus.sgd(lr=0.1)), PEOPLE, rounds=1, out=sumus.Output(out, progress=False)
    )


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def two_layers(wrap: Callable[[nn.Module], Any]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Linear(4, 3)), nn.ReLU(), wrap(nn.Sequential(wrap(nn.Linear(3, 2)))))


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, lambda module: compiled(nn.DataParallel(module))])
def test_wrappers_leave_no_prefix_and_change_no_bit(wrap: Callable[[nn.Module], Any]) -> None:
    for plain, wrapped in (
        (linear, lambda: wrap(linear())),
        (lambda: two_layers(lambda module: module), lambda: two_layers(wrap)),
        (linear(), wrap(linear())),
    ):
        wanted, found = run(plain), run(wrapped)
        assert list(found.model) == list(wanted.model)
        assert found.model_sha256 == wanted.model_sha256
        made = plain if isinstance(plain, nn.Module) else plain()
        made.load_state_dict(found.model)


def test_the_users_own_wrapped_module_stays_as_it_is() -> None:
    module = two_layers(compiled)
    before = list(module.state_dict())
    run(module)
    assert list(module.state_dict()) == before


def test_leaves_of_a_wrapped_module_go_by_their_own_names() -> None:
    history = run(lambda: two_layers(compiled), leaves={"0.*": "frozen"})
    torch.testing.assert_close(history.model["0.weight"], two_layers(lambda module: module).state_dict()["0.weight"])


# ── modules that cannot be copied ────────────────────────────────────────────────────────────────────────────────────


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)
        self.lock = threading.Lock()


class Remembering(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)
        self.doubled = self.weight * 2  # no leaf of autograd's, which torch does not copy


class Streaming(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)
        self.stream = (number for number in range(3))


@pytest.mark.parametrize("net", [Locked, Remembering, Streaming])
def test_what_cannot_be_copied_trains_where_a_callable_makes_it_anew(net: type[nn.Module]) -> None:
    assert list(run(net).model) == ["weight", "bias"]


@pytest.mark.parametrize("net", [Locked, Remembering, Streaming])
def test_what_cannot_be_copied_and_is_the_users_own_is_refused(net: type[nn.Module]) -> None:
    module = net()
    for given in (module, lambda: module):
        with pytest.raises(sumus.TaskError, match="cannot be copied .*a callable that makes a new module"):
            run(given)


# ── constants, and what is no leaf ───────────────────────────────────────────────────────────────────────────────────


def with_buffer(value: Tensor) -> Callable[[], nn.Module]:
    class Holding(nn.Linear):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(4, 2)
            self.register_buffer("constant", value.clone())

    return Holding


CONSTANTS = {
    "a mask": torch.full((4, 4), -torch.inf).triu(1),
    "an upper end": torch.tensor([1.0, torch.inf]),
    "a hole": torch.tensor([1.0, torch.nan]),
    "a rotation": torch.polar(torch.ones(4), torch.arange(4.0)),
}


@pytest.mark.parametrize("what", CONSTANTS)
def test_a_constant_that_no_mean_holds_is_refused_with_the_remedy_and_trains_when_frozen(
    what: str, tmp_path: Path
) -> None:
    net = with_buffer(CONSTANTS[what])
    with pytest.raises(sumus.TaskError, match=r'`constant` .*leaves=\{"constant": "frozen"\}'):
        run(net)
    history = run(net, leaves={"constant": "frozen"}, out=tmp_path)
    assert torch.equal(history.model["constant"].nan_to_num(), CONSTANTS[what].nan_to_num())
    assert torch.equal(history.model["weight"], run(linear).model["weight"])


def test_personal_leaves_may_be_infinite() -> None:
    assert len(run(with_buffer(CONSTANTS["an upper end"]), leaves={"constant": "personal"}).rounds) == 1


class Stateful(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


class StatefulTensor(Stateful):
    def get_extra_state(self) -> Any:
        return torch.zeros(3)


NO_LEAVES: dict[str, tuple[Any, str]] = {
    "extra state": (Stateful, "get_extra_state"),
    "extra state that is a tensor": (StatefulTensor, "get_extra_state"),
    "extra state inside": (lambda: nn.Sequential(Stateful()), "0._extra_state"),
    "sparse": (with_buffer(torch.eye(4).to_sparse()), "sparse_coo.*to_dense"),
    "compressed rows": (lambda: with_buffer(torch.eye(4).to_sparse_csr())(), "sparse_csr.*to_dense"),
    "quantized": (with_buffer(torch.ones(3).to(torch.float8_e4m3fn)), "float8_e4m3fn: train the model before"),
    "without values": (lambda: nn.Linear(4, 2, device="meta"), "meta device"),
    "without a shape": (lambda: nn.LazyLinear(2), "initialize lazy layers first"),
    "complex and personal": (with_buffer(CONSTANTS["a rotation"]), "complex64"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("what", NO_LEAVES)
def test_what_is_no_leaf_is_named_with_the_remedy(what: str) -> None:
    net, words = NO_LEAVES[what]
    with pytest.raises(sumus.TaskError, match=words):
        run(net)


def test_a_frozen_complex_leaf_that_no_file_holds_is_refused_before_training() -> None:
    with pytest.raises(sumus.TaskError, match="complex128.*convert"):
        run(with_buffer(torch.ones(4, dtype=torch.complex128)), leaves={"constant": "frozen"})


# ── several outputs ──────────────────────────────────────────────────────────────────────────────────────────────────


class Several(nn.Module):
    def __init__(self, pack: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.pack = nn.Linear(4, 2), nn.Linear(4, 3), pack

    def forward(self, inputs: Tensor) -> Any:
        return self.pack(self.a(inputs), self.b(inputs))


def first_of(outputs: Any) -> Tensor:
    return next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]


@pytest.mark.parametrize(
    ("pack", "shapes"),
    [
        (lambda a, b: (a, b), ((2,), (3,))),
        (lambda a, b: [a, (b, None)], ((2,), ((3,), None))),
        (lambda a, b: {"a": a, "b": b}, {"a": (2,), "b": (3,)}),
        (lambda a, b: OrderedDict(logits=a, hidden_states=(b,)), {"logits": (2,), "hidden_states": ((3,),)}),
        (lambda a, b: a, (2,)),
    ],
)
def test_check_takes_models_with_several_outputs(pack: Callable[..., Any], shapes: Any) -> None:
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return sumus.losses.cross_entropy(outputs if isinstance(outputs, Tensor) else first_of(outputs), targets)

    task = sumus.Task(lambda: Several(pack), loss)
    plan = sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.1)), sumus.Pacing(cohort=2))
    assert sumus.check(plan, PEOPLE).model.outputs == shapes


def test_check_takes_outputs_of_hugging_face() -> None:
    modeling = pytest.importorskip("transformers.modeling_outputs")
    net = lambda: Several(lambda a, b: modeling.SequenceClassifierOutput(logits=a, hidden_states=(b,)))  # noqa: E731
    task = sumus.Task(net, lambda outputs, targets: sumus.losses.cross_entropy(outputs.logits, targets))
    plan = sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.1)), sumus.Pacing(cohort=2))
    assert sumus.check(plan, PEOPLE).model.outputs == {"logits": (2,), "hidden_states": ((3,),)}


def test_a_loss_of_one_output_says_which_there_are() -> None:
    with pytest.raises(
        sumus.TaskError, match="the model returns a dict of a, b, but loss `cross_entropy` takes one tensor"
    ):
        run(lambda: Several(lambda a, b: {"a": a, "b": b}))
