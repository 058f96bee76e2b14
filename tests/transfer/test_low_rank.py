"""Adapters: they change nothing at first, only they are trained and travel, and merged they are the layer that they made."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sumus
from sumus import transfer


def text_net() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def wave_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2, padding_mode="circular"),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv1d(8, 8, 3, stride=2, dilation=2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def picture_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 5, padding="same"), nn.Conv2d(8, 4, 3, stride=2))


def shaken(net: Any) -> Any:
    """The same net with other values in all trained leaves."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    return net


CASES = [
    (text_net, ["0", "1"], lambda: torch.randint(0, 20, (4, 5))),
    (wave_net, ["*"], lambda: torch.randn(4, 3, 30)),
    (picture_net, ["*"], lambda: torch.randn(2, 3, 9, 9)),
]


@pytest.mark.parametrize(("make", "targets", "draw"), CASES)
def test_the_merged_layers_compute_what_the_adapters_do(make: Any, targets: list[str], draw: Any) -> None:
    plain, inputs = make(), draw()
    small = transfer.adapters(copy.deepcopy(plain), 1, targets, freeze_a=False, alpha=2.0)
    assert torch.equal(small(inputs), plain(inputs))
    trained = shaken(small)(inputs)
    whole = transfer.merged(small)
    assert not torch.allclose(trained, plain(inputs), atol=1e-2)
    torch.testing.assert_close(whole(inputs), trained)
    assert [type(layer) for layer in whole.modules()] == [type(layer) for layer in plain.modules()]
    assert list(whole.state_dict()) == list(plain.state_dict())
    assert all(parameter.requires_grad for parameter in whole.parameters())
    again = pickle.loads(pickle.dumps(small))  # a process gets a module so
    assert torch.equal(again(inputs), trained)


def test_the_product_is_that_of_the_paper() -> None:
    layer: Any = shaken(transfer.adapters(nn.Sequential(nn.Linear(6, 5)), 2, "0", freeze_a=False, alpha=6.0))[0]
    x = torch.randn(4, 6)
    by_hand = x @ layer.weight.T + layer.bias + 3.0 * (x @ layer.lora_a.T) @ layer.lora_b.T
    torch.testing.assert_close(layer(x), by_hand)


def test_a_is_the_same_in_every_process_and_has_the_usual_size() -> None:
    torch.manual_seed(1)
    one: Any = transfer.adapters(nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 300)), 40, "*")
    torch.manual_seed(2)
    other: Any = transfer.adapters(nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 300)), 40, "*")
    assert torch.equal(one[0].lora_a, other[0].lora_a)
    assert not torch.equal(one[0].lora_a[:, :300], one[1].lora_a)
    deviation = float(one[0].lora_a.std())
    expected = nn.init.kaiming_uniform_(torch.empty(400, 400), a=5**0.5).std()
    assert deviation == pytest.approx(float(expected), rel=0.02)
    assert not one[0].lora_b.any()


def person(number: int) -> tuple[Any, Any]:
    inputs = np.random.default_rng(number).normal(size=(12, 3, 30)).astype("float32")
    return inputs, (inputs[:, 0].mean(1) > 0).astype("int64")


def small_waves() -> nn.Module:
    return transfer.adapters(wave_net(), 1, "*", train="6.bias")


def test_only_the_adapters_are_trained_and_travel_in_every_executor() -> None:
    task = sumus.Task(small_waves, sumus.losses.cross_entropy, leaves=transfer.adapter_leaves(small_waves()))
    people = sumus.Population(range(4), load=person)
    first = small_waves().state_dict()
    models = [
        sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=0.5, batch_size=4)), people, rounds=2, compute=how)
        for how in ("autograd", sumus.Compute(through="wire"), "vectorized:2")
    ]
    for name, leaf in models[0].model.items():
        moved = name.endswith("lora_b") or name == "6.bias"
        assert np.array_equal(leaf, first[name].numpy()) != moved
        assert np.array_equal(leaf, models[1].model[name])
        np.testing.assert_allclose(leaf, models[2].model[name], atol=1e-5)
    numbers = sum(leaf.numel() for name, leaf in first.items() if name.endswith("lora_b")) + 2
    assert models[0].rounds[0].traffic.up // len(people) < 4 * numbers + 2_000
    assert models[0].notes == ()


def test_roles_name_exactly_the_trained_leaves() -> None:
    net = nn.ModuleDict({"a[0]": nn.Linear(3, 3), "a0": nn.Linear(3, 3)})
    transfer.adapters(net, 1, "a0")
    net["a[0]"].weight.requires_grad_(True)
    roles = transfer.adapter_leaves(net)
    assert roles == {"*": "frozen", "a[[]0].weight": "shared", "a0.lora_b": "shared"}
    described = sumus.Task(net, sumus.losses.cross_entropy, leaves=roles)
    assert described is not None
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(sumus.TaskError, match="there is nothing to train"):
        transfer.adapter_leaves(net)


def tied() -> nn.Module:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    net[1].weight = net[0].weight  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return net


@pytest.mark.parametrize(
    ("net", "rank", "targets", "options", "said"),
    [
        (text_net(), 0, "*", {}, "give a rank of at least 1"),
        (text_net(), 2, "*", {"alpha": -1.0}, "an alpha above 0"),
        (text_net(), 3, "3", {}, "rank=3 is no low rank for `3`, whose weight has the rank 3"),
        (text_net(), 2, "conv.*", {}, "matches no Linear, Conv1d, Conv2d or Embedding: give a pattern of 0, 1, 3"),
        (nn.Sequential(nn.GRU(3, 3)), 1, "*", {}, "these; the module has none"),
        (text_net(), 2, [], {}, "matches no Linear"),
        (text_net(), 1, "*", {"train": "head"}, r"train='head' matches no parameter and no layer: give .* 0.weight"),
        (tied(), 1, "1", {}, "`0.weight` and `1.weight` are one tensor"),
        (nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), 1, "*", {}, "a convolution in groups"),
        (nn.TransformerEncoderLayer(8, 2), 2, "self_attn.*", {}, "matches no Linear"),
        (small_waves(), 1, "6", {}, "have adapters already; use `merged` first"),
    ],
)
def test_what_cannot_have_an_adapter_is_refused_and_stays_as_it_is(
    net: nn.Module, rank: int, targets: Any, options: dict[str, Any], said: str
) -> None:
    before = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    with pytest.raises(sumus.TaskError, match=said):
        transfer.adapters(net, rank, targets, **options)
    assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == before


def test_a_model_of_peft_is_trained_as_it_is() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), peft.LoraConfig(r=2, target_modules=["0"])
    )
    roles = transfer.adapter_leaves(model)
    assert {name.split(".")[-3] for name, role in roles.items() if role == "shared"} == {"lora_A", "lora_B"}
    task = sumus.Task(model, sumus.losses.cross_entropy, leaves=roles)
    people = sumus.Population(range(2), load=lambda n: (np.ones((4, 4), "float32"), np.array([0, 1, 0, n])))
    assert sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=0.1)), people, rounds=1).rounds
