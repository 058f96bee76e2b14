"""A task's manifest: which leaves a model has, who owns them, and in which precision they are added."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from sumus.errors import TaskError
from sumus.task import Data, Description, Leaf, Task


class Net(nn.Module):
    """A body with statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)


class Tied(nn.Module):
    """A decoder that is its encoder, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(5, 3)
        self.decoder = nn.Linear(3, 5, bias=False)
        self.decoder.weight = self.encoder.weight


def per_example(outputs: Any, targets: Any) -> Any:
    return (outputs - targets).square().sum(1)


def leaves(model: Any, roles: Mapping[str, Any] | None = None) -> dict[str, Leaf]:
    return {leaf.name: leaf for leaf in Task(model, per_example, leaves=roles or {}).description.leaves}


def roles(model: Any, patterns: Mapping[str, Any]) -> dict[str, str]:
    return {name: leaf.role for name, leaf in leaves(model, patterns).items()}


# ── roles ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_that_floats_is_shared_and_parameters_are_trained() -> None:
    found = leaves(Net)
    assert {name for name, leaf in found.items() if leaf.role == "shared"} == set(found) - {"norm.num_batches_tracked"}
    assert {name for name, leaf in found.items() if leaf.trained} == {
        "body.weight", "body.bias", "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip
    assert found["body.weight"].shape == (3, 4)
    assert found["norm.running_mean"] == Leaf("norm.running_mean", (3,), "float32", "shared", trained=False)


def test_integer_buffers_are_frozen_whatever_the_patterns_say() -> None:
    for patterns in ({}, {"norm.*": "personal"}, {"*": "shared"}):
        counter = leaves(Net, patterns)["norm.num_batches_tracked"]
        assert (counter.role, counter.trained, counter.dtype) == ("frozen", False, "int64")


def test_patterns_give_leaves_to_the_client_or_freeze_them() -> None:
    found = leaves(Net, {"head.*": "personal", "body.*": "frozen"})
    assert {(leaf.role, leaf.trained) for name, leaf in found.items() if name.startswith("head.")} == {
        ("personal", True)
    }
    assert {(leaf.role, leaf.trained) for name, leaf in found.items() if name.startswith("body.")} == {
        ("frozen", False)
    }
    assert found["norm.weight"].role == "shared"


def test_the_last_pattern_that_matches_decides() -> None:
    assert roles(Net, {"*": "frozen", "head.*": "shared"})["head.bias"] == "shared"
    assert roles(Net, {"head.*": "personal", "*.weight": "shared"})["head.weight"] == "shared"
    assert roles(Net, {"head.*": "personal", "*.weight": "shared"})["head.bias"] == "personal"


def test_running_statistics_may_stay_with_the_client() -> None:
    found = leaves(Net, {"norm.running_*": "personal"})
    assert (found["norm.running_mean"].role, found["norm.running_mean"].trained) == ("personal", False)


def test_parameters_without_a_gradient_are_frozen() -> None:
    model = Net()
    model.body.requires_grad_(False)
    found = leaves(model, {"head.*": "personal"})
    assert (found["body.weight"].role, found["body.weight"].trained) == ("frozen", False)
    assert found["norm.weight"].trained


def test_a_pattern_that_matches_nothing_is_refused_by_name() -> None:
    with pytest.raises(TaskError, match=r"'tail\.\*', which matches no leaf; the model has body\.weight"):
        leaves(Net, {"head.*": "personal", "tail.*": "frozen"})


def test_a_parameter_without_a_gradient_may_be_personal_and_never_shared() -> None:
    model = Net()
    model.body.requires_grad_(False)
    found = leaves(model, {"body.*": "personal"})
    assert {(leaf.role, leaf.trained) for name, leaf in found.items() if name.startswith("body.")} == {
        ("personal", False)
    }
    assert roles(model, {"body.*": "frozen"})["body.weight"] == "frozen"
    for patterns in (
        {"body.*": "shared"},
        {"*": "shared"},
        {"*": "personal", "body.bias": "shared", "head.*": "shared"},
    ):
        with pytest.raises(TaskError, match=r"names `body\.(weight|bias)`, which has requires_grad=False"):
            leaves(model, patterns)


@pytest.mark.parametrize("role", ["shared", "personal"])
@pytest.mark.parametrize("pattern", ["norm.num_batches_tracked", "*tracked"])
def test_a_counter_is_neither_shared_nor_personal(role: str, pattern: str) -> None:
    with pytest.raises(TaskError, match="names `norm.num_batches_tracked`, which is int64 and can be neither"):
        leaves(Net, {pattern: role})
    assert roles(Net, {pattern: "frozen"})["norm.num_batches_tracked"] == "frozen"


@pytest.mark.parametrize(
    "patterns",
    [
        {"head.*": "personal", "*": "shared"},
        {"head.bias": "frozen", "head.*": "personal"},
        {"head.*": "personal", "h*": "frozen"},
    ],
)
def test_a_pattern_that_others_overrule_everywhere_is_refused(patterns: Mapping[str, Any]) -> None:
    with pytest.raises(TaskError, match=r"\{'head.*: .*\} has no effect: later patterns match all of its leaves"):
        leaves(Net, patterns)


def test_names_of_one_tensor_have_one_role() -> None:
    def net() -> nn.Module:
        return nn.ModuleDict({"tied": Tied(), "own": nn.Linear(2, 2)})

    with pytest.raises(
        TaskError, match="`tied.encoder.weight` 'frozen', `tied.decoder.weight` 'personal', but these are names of one"
    ):
        leaves(net, {"*encoder*": "frozen", "*decoder*": "personal"})
    for patterns in ({"*encoder*": "personal"}, {"*decoder*": "personal"}, {"tied.*": "personal"}):
        assert roles(net, patterns)["tied.encoder.weight"] == "personal"


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(
        TaskError, match=r"leaves\['head.\*'\] is 'private'; it must be one of shared, personal, frozen"
    ):
        leaves(Net, {"head.*": "private"})


@pytest.mark.parametrize("patterns", [{"*": "frozen"}, {"*": "personal"}, {"*.weight": "frozen", "*.bias": "frozen"}])
def test_a_task_with_nothing_to_learn_together_is_refused(patterns: Mapping[str, Any]) -> None:
    with pytest.raises(TaskError, match="no leaf is both shared and trained"):
        leaves(Net, patterns)


# ── tied weights ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tied_weights_are_one_leaf_with_two_names() -> None:
    (leaf,) = leaves(Tied).values()
    assert leaf == Leaf("encoder.weight", (5, 3), "float32", "shared", trained=True, aliases=("decoder.weight",))


def test_a_pattern_may_use_any_of_a_tied_leafs_names() -> None:
    class Both(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    assert roles(Both, {"decoder.*": "personal"})["encoder.weight"] == "personal"
    assert roles(Both, {"encoder.*": "frozen"})["encoder.weight"] == "frozen"


def test_equal_values_are_not_tied() -> None:
    model = Net()
    nn.init.zeros_(model.body.bias)
    nn.init.zeros_(model.norm.bias)
    assert all(leaf.aliases == () for leaf in leaves(model).values())


# ── dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dtype", "summed"),
    [(torch.float16, "float32"), (torch.bfloat16, "float32"), (torch.float32, "float32"), (torch.float64, "float64")],
)
def test_half_precision_is_added_in_single(dtype: torch.dtype, summed: str) -> None:
    leaf = leaves(lambda: nn.Linear(2, 2).to(dtype))["weight"]
    assert (leaf.dtype, leaf.sum_dtype, leaf.role) == (str(dtype).removeprefix("torch."), summed, "shared")


def test_complex_leaves_are_refused_by_name() -> None:
    with pytest.raises(TaskError, match="leaf `weight` is complex64"):
        leaves(lambda: nn.Linear(2, 2, dtype=torch.complex64))


# ── models, losses, metrics ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_is_a_module_or_makes_one() -> None:
    module = Net()
    assert Task(module, per_example).make_model() is module
    task = Task(Net, per_example)
    assert isinstance(task.make_model(), Net)
    assert task.make_model() is not task.make_model()


@pytest.mark.parametrize("model", [None, 7, "Net"])
def test_a_model_that_makes_nothing_is_refused(model: Any) -> None:
    with pytest.raises(TaskError, match=r"^model= takes an nn\.Module"):
        Task(model, per_example)
    with pytest.raises(TaskError, match=r"^model= made a .*; it must make an nn\.Module"):
        Task(lambda: model, per_example).description


def test_a_loss_must_be_a_function_and_no_metric_may_take_its_name() -> None:
    with pytest.raises(TaskError, match="loss="):
        Task(Net, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TaskError, match="'loss'"):
        Task(Net, per_example, metrics={"loss": per_example})


# ── the fingerprint ──────────────────────────────────────────────────────────────────────────────────────────────────

DATA = Data((4,), "float32", (), "int64", classes=2)
DESCRIPTION = Task(Net, per_example, data=DATA).description


def test_a_description_holds_everything_but_the_code() -> None:
    assert (DESCRIPTION.name, DESCRIPTION.loss, DESCRIPTION.metrics) == ("task", "per_example", ())
    assert DESCRIPTION.trained_layout == {
        "body.weight": (3, 4), "body.bias": (3,), "norm.weight": (3,), "norm.bias": (3,),
        "head.weight": (2, 3), "head.bias": (2,),
    }  # fmt: skip
    assert DESCRIPTION.buffer_layout == {"norm.running_mean": (3,), "norm.running_var": (3,)}
    assert [leaf.name for leaf in DESCRIPTION.named("frozen")] == ["norm.num_batches_tracked"]


def test_layouts_hold_shared_leaves_alone() -> None:
    split = Task(Net, per_example, leaves={"head.*": "personal", "norm.running_*": "personal", "body.*": "frozen"})
    assert sorted(split.description.trained_layout) == ["norm.bias", "norm.weight"]
    assert split.description.buffer_layout == {}


def test_leaves_and_data_make_the_fingerprint() -> None:
    others: dict[str, Description] = {
        "another role": Task(Net, per_example, leaves={"head.*": "personal"}, data=DATA).description,
        "another shape": Task(lambda: nn.Linear(4, 2), per_example, data=DATA).description,
        "another dtype": Task(lambda: Net().double(), per_example, data=DATA).description,
        "other data": Task(Net, per_example, data=dataclasses.replace(DATA, classes=3)).description,
        "unknown data": Task(Net, per_example).description,
    }
    prints = {what: other.fingerprint for what, other in others.items()} | {"itself": DESCRIPTION.fingerprint}
    assert len(set(prints.values())) == len(prints)


def test_names_of_task_loss_and_metrics_do_not() -> None:
    renamed = Task(Net, nn.MSELoss(reduction="none"), {"m": per_example}, data=DATA, name="digits").description
    assert renamed != DESCRIPTION
    assert renamed.fingerprint == DESCRIPTION.fingerprint


# ── buffers that stay positive ───────────────────────────────────────────────────────────────────────────────────────


class Spread(nn.Module):
    """A hand-written norm that keeps a spread, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(3))
        self.register_buffer("middle", torch.zeros(3))
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))


def test_running_variances_and_named_buffers_stay_positive() -> None:
    assert Task(Spread, per_example).description.positive == ("layers.1.running_var",)
    named = Task(Spread, per_example, positive=("sp*",)).description
    assert named.positive == ("spread", "layers.1.running_var")
    assert named.fingerprint == Task(Spread, per_example).description.fingerprint
    assert Task(nn.BatchNorm1d(3), per_example).description.positive == ("running_var",)


def test_only_averaged_buffers_stay_positive() -> None:
    for role in ("personal", "frozen"):
        assert Task(Spread, per_example, leaves={"*running_*": role}).description.positive == ()
    with pytest.raises(TaskError, match="matches no averaged buffer; the model has spread, middle"):
        Task(Spread, per_example, positive=("layers.0.*",)).description
