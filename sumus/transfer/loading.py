"""Puts the values of a checkpoint into a module. Either everything fits and is taken, or nothing is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from sumus.errors import TaskError
from sumus.text import many
from sumus.transfer.checkpoints import SavedTensor, read_checkpoint

SHOWN = 4
"""How many names a summary shows of a list."""


@dataclass(frozen=True)
class Loaded:
    """What a module got from a checkpoint. `print` shows a summary.

    Attributes:
        taken: The module's leaves that now have the checkpoint's values.
        missing: The module's leaves that the checkpoint does not have. They keep their values.
        unused: The checkpoint's names that no leaf of the module has.
        misshapen: The module's leaves that have another shape than in the checkpoint, with (the checkpoint's shape, the module's
            shape). They keep their values.
    """

    taken: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __str__(self) -> str:
        shapes = [f"{name} ({theirs}, not {mine})" for name, (theirs, mine) in self.misshapen.items()]
        lists = {"missing": self.missing, "unused": self.unused, "misshapen": shapes}
        counted = [f"taken: {many(len(self.taken), 'leaf', 'leaves')}"]
        return "; ".join(counted + [f"{what}: {_some(names)}" for what, names in lists.items() if names])


def load(
    module: nn.Module,
    path: str | Path,
    rename: Mapping[str, str | None] = MappingProxyType({}),
    skip_misshapen: bool = False,
) -> Loaded:
    """Give a module the values of a checkpoint, by name.

    Args:
        module: The module whose leaves change.
        path: A safetensors file, a folder in Hugging Face's form, or a file of `torch.save` with a state dict. No code that
            the file may hold is run.
        rename: The beginning of a name in the checkpoint → the beginning of the module's name, such as `{"bert.": "encoder."}`;
            None leaves these values out. The longest beginning that matches decides.
        skip_misshapen: Whether a leaf of another shape keeps its values, such as the head of other classes, instead of being
            refused.

    Returns:
        The leaves that were taken, and those that were not.

    Raises:
        ExperimentError: The checkpoint is missing, damaged, or holds Python objects. The module has not changed.
        TaskError: A leaf has another shape, a value is not finite, two values go to one leaf, or no value fits. The module
            has not changed.
    """
    path = Path(path)
    given = read_checkpoint(path)
    own = module.state_dict()
    chosen, unused = _chosen(given, rename, own)
    misshapen = {
        name: (tuple(value.tensor.shape), tuple(own[name].shape))
        for name, value in chosen.items()
        if value.tensor.shape != own[name].shape
    }
    if misshapen and not skip_misshapen:
        name, (theirs, mine) = next(iter(misshapen.items()))
        others = f", as {many(len(misshapen) - 1, 'other leaf', 'other leaves')}" if len(misshapen) > 1 else ""
        raise TaskError(
            f"`{name}` has the shape {theirs} in {chosen[name].file}, and {mine} in the module{others}: give "
            "skip_misshapen=True to keep the module's own values there, or rename= with None to leave them out"
        )
    fitting = {name: value for name, value in chosen.items() if name not in misshapen}
    if not fitting:
        raise TaskError(_nothing_fits(path, given, own))
    _expect_usable(fitting, own)
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value.tensor)
    filled = {_place(own[name]) for name in (*fitting, *misshapen)}
    missing = tuple(name for name, leaf in own.items() if _place(leaf) not in filled)
    return Loaded(tuple(fitting), missing, tuple(unused), MappingProxyType(misshapen))


def _chosen(
    given: Mapping[str, SavedTensor], rename: Mapping[str, str | None], own: Mapping[str, Tensor]
) -> tuple[dict[str, SavedTensor], list[str]]:
    """Return the values by the module's names, and the checkpoint's names that the module does not have."""
    chosen: dict[str, SavedTensor] = {}
    origin: dict[str, str] = {}
    unused: list[str] = []
    used: set[str] = set()
    for theirs, value in given.items():
        begin = max((each for each in rename if theirs.startswith(each)), key=len, default=None)
        used |= {begin} if begin is not None else set()
        new = "" if begin is None else rename[begin]
        name = theirs if begin is None else None if new is None else new + theirs.removeprefix(begin)
        if name is None or name not in own:
            unused.append(theirs)
        elif name in chosen:
            raise TaskError(f"`{origin[name]}` and `{theirs}` of the checkpoint both go to `{name}`: correct rename=")
        else:
            chosen[name], origin[name] = value, theirs
    if idle := sorted(set(rename) - used):
        raise TaskError(
            f"rename= has {idle[0]!r}, but no name in the checkpoint begins with that; it has {_some(given)}"
        )
    return chosen, unused


def _expect_usable(values: Mapping[str, SavedTensor], own: Mapping[str, Tensor]) -> None:
    """Refuse values that no model can begin with, and two different values of one tensor with several names."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, value in values.items():
        tensor, mine = value.tensor, own[name]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TaskError(f"`{name}` holds NaN or infinity in {value.file}: nothing was taken")
        if tensor.is_complex() != mine.is_complex() or (tensor.is_floating_point() and not mine.is_floating_point()):
            raise TaskError(
                f"`{name}` has the dtype {_dtype(tensor)} in {value.file}, and {_dtype(mine)} in the module: leave it out with "
                "rename="
            )
        other = first.setdefault(_place(mine), name)
        if other != name and not torch.equal(values[other].tensor, tensor):
            raise TaskError(
                f"`{other}` and `{name}` are one tensor in the module, and have different values in {value.file}: leave one of "
                "them out with rename="
            )


def _place(leaf: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Return what two names of one tensor have in common."""
    return leaf.data_ptr(), leaf.shape, leaf.stride()


def _nothing_fits(path: Path, given: Mapping[str, SavedTensor], own: Mapping[str, Tensor]) -> str:
    """Say that no name fits, and propose a `rename=` with which names fit, if one can be found."""
    why = f"no value of {path} fits: it has {_some(given)}; the module has {_some(own)}"
    for theirs in given:
        for mine in own:
            ends = theirs.split("."), mine.split(".")
            common = 0
            while common < min(map(len, ends)) and ends[0][-1 - common] == ends[1][-1 - common]:
                common += 1
            if common > 1 and given[theirs].tensor.shape == own[mine].shape:
                old, new = (".".join(end[:-common]) + "." * (len(end) > common) for end in ends)
                if old != new:
                    return f"{why}. Is it rename={{{old!r}: {new!r}}}?"
    return f"{why}. Give rename="


def _some(names: Mapping[str, object] | tuple[str, ...] | list[str]) -> str:
    """Return the first few names of a list."""
    first = list(names)[:SHOWN]
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(first) + rest if first else "nothing"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).rpartition(".")[2]
