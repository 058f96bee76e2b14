"""Reads checkpoints: files and folders that hold the values of a model by name. No code of a checkpoint is run.

    values = read_checkpoint(Path("bert-base/"))
    values["embeddings.weight"]                 SavedTensor(tensor, file)

| path | what it is |
|---|---|
| a file `*.safetensors` | tensors by name |
| a folder | Hugging Face's form: `model.safetensors` or `pytorch_model.bin`, or the index of several such files |
| any other file | a file of `torch.save`, read with `weights_only=True` |
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sumus.errors import ExperimentError, unread

FOLDERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The files of a folder in Hugging Face's form. The first one that exists is read."""

INSIDE = ("state_dict", "model_state_dict", "model")
"""The names under which training loops put a state dict beside other things, such as an optimizer's state."""


@dataclass(frozen=True)
class SavedTensor:
    """One tensor of a checkpoint.

    Attributes:
        tensor: The tensor, on the CPU.
        file: The file that holds the tensor.
    """

    tensor: Tensor
    file: Path


def read_checkpoint(path: Path) -> dict[str, SavedTensor]:
    """Read all tensors of a checkpoint.

    Raises:
        ExperimentError: A file is missing, damaged or of an unknown form, or holds Python objects.
    """
    if not path.is_dir():
        return _read_file(path)
    for name in FOLDERS:
        if (path / name).exists():
            return _read_index(path / name) if name.endswith(".json") else _read_file(path / name)
    raise ExperimentError(f"{path} holds no checkpoint: there is no {', '.join(FOLDERS[:-1])} or {FOLDERS[-1]} in it")


def _read_index(index: Path) -> dict[str, SavedTensor]:
    """Read the files that an index names. All of them must exist before the first one is read."""
    try:
        shards = cast(Any, json.loads(index.read_text(encoding="utf-8")))["weight_map"]
        file_of = {str(name): str(file) for name, file in shards.items()}
    except OSError as error:
        raise _unreadable(index, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExperimentError(
            f"{index} is no index of a checkpoint: it has no `weight_map` of names and files"
        ) from error
    for name in sorted(set(file_of.values())):
        if Path(name).name != name:
            raise ExperimentError(f"{index} names the file {name}: all files of a checkpoint must be in its own folder")
        if not (index.parent / name).is_file():
            missing = sorted(leaf for leaf, file in file_of.items() if file == name)
            raise ExperimentError(
                f"{index.parent / name} is missing: {index.name} says that it holds {len(missing)} of the values, such as "
                f"`{missing[0]}`. Complete the download"
            )
    values: dict[str, SavedTensor] = {}
    for name in sorted(set(file_of.values())):
        shard = _read_file(index.parent / name)
        wanted = [leaf for leaf, file in file_of.items() if file == name]
        for leaf in wanted:
            if leaf not in shard:
                raise ExperimentError(f"{index.parent / name} has no `{leaf}`, although {index.name} says so")
            values[leaf] = shard[leaf]
    return values


def _read_file(path: Path) -> dict[str, SavedTensor]:
    """Read a file of safetensors or of `torch.save`."""
    if not path.is_file():
        raise ExperimentError(f"{path} cannot be read: there is no such file or folder")
    read = load_file if path.suffix == ".safetensors" else _read_torch
    try:
        return {name: SavedTensor(tensor, path) for name, tensor in read(path).items()}
    except ExperimentError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise ExperimentError(f"{path} is not a complete file of safetensors: {unread(error)}") from error


def _read_torch(path: Path) -> Mapping[str, Tensor]:
    """Read a file of `torch.save`: a state dict, or a dict with the state dict under one of the names of `INSIDE`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about forms of pickle: what cannot be read is refused below
            saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ExperimentError(
            f"{path} is not a file of torch.save, or holds Python objects, which could run code when they are read: save only "
            "the values, torch.save(net.state_dict(), FILE)"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ExperimentError(f"{path} is not a complete file of torch.save: {unread(error)}") from error
    if _is_state(saved):
        return saved
    inside = [name for name in INSIDE if isinstance(saved, Mapping) and _is_state(cast(Any, saved).get(name))]
    if len(inside) == 1:
        return cast(Any, saved)[inside[0]]
    raise ExperimentError(
        f"{path} holds {_kind(saved)}: give a file of a state dict, or of a dict that has exactly one state dict under "
        f"{', '.join(map(repr, INSIDE[:-1]))} or {INSIDE[-1]!r}"
    )


def _is_state(value: Any) -> bool:
    """Return whether a value is a state dict: a dict that has only tensors, and at least one."""
    if not isinstance(value, Mapping) or not value:
        return False
    entries = cast(Mapping[Any, Any], value)
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in entries.items())


def _kind(saved: Any) -> str:
    """Describe what a file holds."""
    if isinstance(saved, Mapping):
        names = [str(name) for name in cast(Mapping[Any, Any], saved)]
        return f"a dict of {', '.join(names[:6])}{', …' if len(names) > 6 else ''}" if names else "an empty dict"
    return f"a {type(saved).__name__}"


def _unreadable(path: Path, error: OSError) -> ExperimentError:
    return ExperimentError(f"{path} cannot be read: {unread(error)}")
