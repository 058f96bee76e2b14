"""A checkpoint goes into a module by name: what was taken is said, and if anything is wrong, nothing is taken."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sumus
from sumus import transfer


class Net(nn.Module):
    """A body, a tied output, and a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(4, classes)


def values(net: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """The state of another net, whose tied tensors have a copy under each name."""
    torch.manual_seed(1)
    return {name: leaf.clone() for name, leaf in (net or Net()).state_dict().items()}


def loaded(path: Path, **options: Any) -> tuple[Net, transfer.Loaded]:
    torch.manual_seed(2)
    net = Net()
    return net, transfer.load(net, path, **options)


def refused(path: Path, said: str, net: nn.Module | None = None, **options: Any) -> None:
    """Loading is refused in these words, and the module has the values of before."""
    net = net or Net()
    before = values(net)
    with pytest.raises(sumus.UsageError, match=said):
        transfer.load(net, path, **options)
    assert all(torch.equal(leaf, before[name]) for name, leaf in net.state_dict().items())


def as_safetensors(folder: Path, given: dict[str, torch.Tensor]) -> Path:
    save_file(given, folder / "one.safetensors")
    return folder / "one.safetensors"


def as_folder(folder: Path, given: dict[str, torch.Tensor]) -> Path:
    save_file(given, folder / "model.safetensors")
    return folder


def as_shards(folder: Path, given: dict[str, torch.Tensor]) -> Path:
    names = sorted(given)
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: given[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def as_torch(folder: Path, given: dict[str, torch.Tensor]) -> Path:
    torch.save(given, folder / "net.pt")
    return folder / "net.pt"


def as_training_state(folder: Path, given: dict[str, torch.Tensor]) -> Path:
    torch.save({"epoch": 3, "state_dict": given, "optimizer": {"lr": 0.1}}, folder / "net.ckpt")
    return folder / "net.ckpt"


def as_bin_folder(folder: Path, given: dict[str, torch.Tensor]) -> Path:
    torch.save(given, folder / "pytorch_model.bin")
    return folder


FORMS: tuple[Callable[[Path, dict[str, torch.Tensor]], Path], ...] = (
    as_safetensors,
    as_folder,
    as_shards,
    as_torch,
    as_training_state,
    as_bin_folder,
)


@pytest.mark.parametrize("write", FORMS)
def test_every_form_of_a_checkpoint_gives_the_same_module(
    write: Callable[[Path, dict[str, torch.Tensor]], Path], tmp_path: Path
) -> None:
    given = values()
    net, report = loaded(write(tmp_path, given))
    assert all(torch.equal(leaf, given[name]) for name, leaf in net.state_dict().items())
    assert set(report.taken) == set(given)
    assert (report.missing, report.unused, dict(report.misshapen)) == ((), (), {})


def test_what_was_not_taken_is_reported(tmp_path: Path) -> None:
    given = values(Net(classes=5))
    given["encoder.0.weight"] = given.pop("body.0.weight")
    given["extra"] = torch.zeros(1)
    del given["out.weight"]  # one name of a tensor with two is enough
    torch.manual_seed(2)
    own = Net().head.weight.clone()
    net, report = loaded(as_safetensors(tmp_path, given), rename={"encoder.": "body."}, skip_misshapen=True)
    assert torch.equal(net.state_dict()["body.0.weight"], given["encoder.0.weight"])
    assert torch.equal(net.out.weight, given["embed.weight"])
    assert torch.equal(net.head.weight, own)
    assert report.unused == ("extra",)
    assert report.missing == ()
    assert report.misshapen == {"head.bias": ((5,), (3,)), "head.weight": ((5, 4), (3, 4))}
    assert str(report) == (
        "taken: 8 leaves; unused: extra; misshapen: head.bias ((5,), not (3,)), head.weight ((5, 4), not (3, 4))"
    )


def test_a_beginning_may_be_left_out_and_the_longest_one_decides(tmp_path: Path) -> None:
    given = {f"net.{name}": leaf for name, leaf in values(Net(classes=5)).items()}
    _, report = loaded(as_safetensors(tmp_path, given), rename={"net.": "", "net.head.": None})
    assert report.missing == ("head.weight", "head.bias")
    assert report.unused == ("net.head.bias", "net.head.weight")


def test_half_precision_goes_into_floats(tmp_path: Path) -> None:
    given = {name: leaf.half() if leaf.is_floating_point() else leaf for name, leaf in values().items()}
    net, _ = loaded(as_safetensors(tmp_path, given))
    assert torch.equal(net.head.weight, given["head.weight"].float())


@pytest.mark.parametrize(
    ("change", "said", "options"),
    [
        (
            {"head.weight": torch.zeros(5, 4)},
            r"`head.weight` has the shape \(5, 4\) in .*one.safetensors, and \(3, 4\)",
            {},
        ),
        (
            {"head.weight": torch.full((3, 4), torch.nan)},
            "`head.weight` holds NaN or infinity in .*nothing was taken",
            {},
        ),
        ({"head.weight": torch.full((3, 4), torch.inf)}, "NaN or infinity", {}),
        ({"embed.weight": torch.ones(7, 4)}, "`embed.weight` and `out.weight` are one tensor in the module", {}),
        ({"body.1.num_batches_tracked": torch.tensor(0.5)}, "has the dtype float32 in .*, and int64 in the module", {}),
        ({"top.weight": torch.zeros(3, 4)}, "both go to `head.weight`: correct rename=", {"rename": {"top.": "head."}}),
        ({}, "rename= has 'bert.', but no name in the checkpoint begins with that", {"rename": {"bert.": ""}}),
    ],
)
def test_if_one_value_is_wrong_nothing_is_taken(
    change: dict[str, torch.Tensor], said: str, options: dict[str, Any], tmp_path: Path
) -> None:
    refused(as_safetensors(tmp_path, {**values(), **change}), said, **options)


def test_if_no_name_fits_a_renaming_is_proposed(tmp_path: Path) -> None:
    given = as_safetensors(tmp_path, {f"model.{name}": leaf for name, leaf in values().items()})
    refused(given, r"no value of .* fits: .* Is it rename=\{'model.': ''\}\?")
    refused(as_safetensors(tmp_path, {"x": torch.zeros(2)}), r"it has x; the module has .* Give rename=")


class Ran:
    """Leaves a file where it was unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"state_dict": values(), "more": Ran(mark)}, tmp_path / "net.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Ran(mark)))
    for name in ("net.pt", "plain.bin"):
        refused(tmp_path / name, "holds Python objects, which could run code .*: save only the values")
    assert not mark.exists()


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    folder = as_shards(tmp_path, values())
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    refused(folder, "model-00002-of-00002.safetensors is not a complete file of safetensors")
    save_file({"other": torch.zeros(1)}, shard)
    refused(folder, "model-00002-of-00002.safetensors has no `.*`, although model.safetensors.index.json says so")
    shard.unlink()
    refused(folder, "model-00002-of-00002.safetensors is missing: .* holds 5 of the values, such as `.*`. Complete the")
    index = folder / "model.safetensors.index.json"
    for text, said in (
        ("{", "is no index of a checkpoint"),
        ('{"weight_map": [1]}', "is no index of a checkpoint"),
        ('{"weight_map": {"a": "../elsewhere"}}', "must be in its own folder"),
    ):
        index.write_text(text)
        refused(folder, said)
    index.unlink()
    refused(folder, "holds no checkpoint: there is no model.safetensors, .* in it")
    refused(folder / "nothing.pt", "there is no such file or folder")
    cut = as_torch(tmp_path, values())
    cut.write_bytes(cut.read_bytes()[:-200])
    refused(cut, "is not a complete file of torch.save")
    torch.save([1, 2], cut)
    refused(cut, "holds a list: give a file of a state dict")
    torch.save({"model": values(), "state_dict": values()}, cut)
    refused(cut, "holds a dict of model, state_dict: give a file")
