"""A client's examples as tensors. All checks are made before the first training step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sumus.columns import first_changed, numbers_of, where
from sumus.errors import DataError, TaskError, said
from sumus.metrics import IGNORED
from sumus.task import Data, Task

CACHE_BYTES = 64 * 2**20


class ExampleReader:
    """Reads, prepares and checks clients' examples for one task. The first 64 MiB of examples are kept in memory
    (`_Kept`).

    Attributes:
        task: The task.
        data: The schema of the examples. If the task declares none, it is taken from the first client.
    """

    def __init__(self, task: Task, dtype: torch.dtype, device: torch.device) -> None:
        self.task = task
        self.data: Data | None = task.data
        self._dtype = dtype
        self._device = device
        self._kept = _Kept(CACHE_BYTES, device)

    def read(self, population: Mapping[Any, Any], client: Any) -> tuple[Tensor, Tensor]:
        """Return a client's (inputs, targets) on the device, with one row for each example. The caller must not write
        to them, since the next read may return the same tensors."""
        where = (id(population), client)
        pair = self._kept.get(where)
        if pair is None:
            pair = self.convert(client, population[client])
            self._kept.put(where, pair)
        return pair

    def convert(self, client: object, examples: Any) -> tuple[Tensor, Tensor]:
        """Prepare and check one client's examples.

        Raises:
            DataError: The examples are wrong.
        """
        inputs, targets = as_pair(client, examples)
        if self.task.prepare is not None:
            try:
                prepared = self.task.prepare(inputs, targets)
            except Exception as error:
                raise DataError(client, f"prepare failed: {type(error).__name__}: {error}") from error
            if not isinstance(prepared, tuple | list) or len(prepared) != 2:
                raise DataError(
                    client, f"prepare returned a {_named(prepared)}; it must return a pair (inputs, targets)"
                )
            inputs, targets = prepared
        inputs, targets = self._tensor(client, "inputs", inputs), self._tensor(client, "targets", targets)
        if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
            raise DataError(
                client,
                f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} do not have one row per example: "
                "give arrays of equal length",
            )
        if len(inputs) == 0:
            raise DataError(client, "it has no examples; leave empty clients out of the population")
        if self.data is not None:
            self.check(client, inputs, targets, self.data)
        return inputs.to(self._device), targets.to(self._device)

    def reads_alike(self, population: Mapping[Any, Any], client: Any) -> bool:
        """Return whether a client's examples are the same if they are read a second time."""
        pairs = zip(self.read(population, client), self.convert(client, population[client]), strict=True)
        return all(torch.equal(one, other) for one, other in pairs)

    def learn_schema(self, client: object, inputs: Tensor, targets: Tensor, classes: int | None) -> Data:
        """Make the shapes and dtypes of these examples the schema of all examples. `classes` is the number of classes, if
        the loss takes classes as targets."""
        data = self.task.data or Data(
            tuple(inputs.shape[1:]), _dtype_name(inputs), tuple(targets.shape[1:]), _dtype_name(targets)
        )
        self.data = dataclasses.replace(data, classes=data.classes or classes)
        self.check(client, inputs, targets, self.data)
        return self.data

    def check(self, client: object, inputs: Tensor, targets: Tensor, data: Data) -> None:
        """Check examples against the schema.

        Raises:
            DataError: The examples do not fit the schema.
        """
        for name, tensor, shape, dtype in (
            ("inputs", inputs, data.inputs, data.inputs_dtype),
            ("targets", targets, data.targets, data.targets_dtype),
        ):
            if tuple(tensor.shape[1:]) != tuple(shape) or _dtype_name(tensor) != dtype:
                raise DataError(
                    client,
                    f"its {name} are {_dtype_name(tensor)} of shape {tuple(tensor.shape[1:])} per example, but the task's are "
                    f"{dtype} of shape {tuple(shape)}; correct the data, or the task's prepare=",
                )
        if data.classes is not None and targets.is_floating_point():
            shape = tuple(targets.shape[1:])
            remedy = "give classes as whole numbers"
            if shape == (data.classes,):
                remedy = "give the number of each example's class: targets.argmax(1), if they are one-hot"
            raise DataError(
                client,
                f"its targets are {_dtype_name(targets)} of shape {shape} per example (the first is {_shown(targets[0])}), "
                f"but the task's loss takes classes, whole numbers from 0 to {data.classes - 1}: {remedy}",
            )
        if data.classes is not None:
            wrong = (targets != IGNORED) & ((targets < 0) | (targets >= data.classes))
            if bool(wrong.any()):
                row = _first_row(wrong)
                raise DataError(
                    client,
                    f"the label {int(targets[wrong][0])} of example {row} is out of range: the model has {data.classes} "
                    f"classes, 0 to {data.classes - 1}; correct the label, or widen the model's output",
                )

    def _tensor(self, client: object, name: str, values: Any) -> Tensor:
        if values is None:
            raise DataError(client, f"it has no {name}: give (inputs, targets), with one row per example in each")
        if (reason := _no_array(values)) is not None:
            raise DataError(client, f"its {name} are {reason}")
        try:  # a copy, since the caller may use its array again
            tensor = values.detach().clone() if isinstance(values, Tensor) else torch.from_numpy(_own_array(values))
        except ValueError as error:
            raise DataError(client, f"its {name} cannot be read: {error}") from error
        except Exception as error:
            raise DataError(client, f"its {name} are not an array: {error}; give numpy arrays or tensors") from error
        if tensor.is_complex():
            raise DataError(client, f"its {name} are complex; give real numbers")
        if not tensor.is_floating_point():
            if tensor.dtype == torch.uint64 and bool((tensor.view(torch.int64) < 0).any()):
                row = _first_row(tensor.view(torch.int64) < 0)
                raise DataError(
                    client,
                    f"its {name} hold 2^63 or more at example {row}, which int64 cannot hold: scale them in prepare=",
                )
            keeps = tensor.dtype in (torch.uint8, torch.bool) and name == "inputs"
            return self._in_range(client, name, tensor if keeps else tensor.to(torch.int64))
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(
                client,
                f"its {name} hold a NaN or an infinity at {_place(~torch.isfinite(tensor))}; clean them in prepare= of the task",
            )
        return self._in_range(client, name, self._narrowed(client, name, tensor))

    def _narrowed(self, client: object, name: str, tensor: Tensor) -> Tensor:
        """Convert floats to the model's precision. Refuse numbers outside its range, and large integers that would
        change."""
        narrow, said = tensor.to(self._dtype), str(self._dtype).rpartition(".")[2]
        if not bool((fits := torch.isfinite(narrow)).all()):
            row = _first_row(~fits)
            raise DataError(
                client,
                f"its {name} at example {row} are outside the range of the model's {said}: scale them in prepare=",
            )
        if tensor.dtype != self._dtype and tensor.dtype == torch.float64:
            place = first_changed(tensor.numpy(force=True), narrow.double().numpy(force=True))
            if place is not None:
                raise DataError(
                    client,
                    f"its {name} hold {tensor[place].item():.0f} at {where(place)}, which the model's {said} rounds to "
                    f"{narrow[place].item():.0f}: scale them in prepare=, or leave out a column that holds only row ids",
                )
        return narrow

    def _in_range(self, client: object, name: str, tensor: Tensor) -> Tensor:
        """Refuse targets outside the loss's range, which is 0 to 1 for losses of two classes."""
        limits = getattr(self.task.loss, "target_range", None)
        if name != "targets" or limits is None:
            return tensor
        low, high = limits
        if bool((wrong := (tensor < low) | (tensor > high)).any()):
            raise DataError(
                client,
                f"the target {tensor[wrong][0].item():g} of example {_first_row(wrong)} is out of range: the loss "
                f"takes targets from {low:g} to {high:g}; correct the target, or the task's prepare=",
            )
        return tensor


def as_pair(client: object, examples: Any) -> tuple[Any, Any]:
    """Return a client's examples as (inputs, targets). A data set of pairs is read and stacked."""
    if isinstance(examples, tuple | list) and len(examples) == 2 and not _is_list_of_pairs(examples):
        if isinstance(examples, list) and not _are_two_columns(examples):
            raise DataError(
                client,
                "its examples are a list of two items, which could be two examples or (inputs, targets): give a tuple "
                "(inputs, targets)",
            )
        return examples[0], examples[1]
    if hasattr(examples, "dtype") or hasattr(examples, "iloc"):
        raise DataError(
            client, f"its examples are one {type(examples).__name__}, without targets; give a tuple (inputs, targets)"
        )
    if hasattr(examples, "__getitem__") and hasattr(examples, "__len__") and not isinstance(examples, Mapping):
        try:
            rows = [_pair_of(index, examples[index]) for index in range(len(examples))]
            return _stacked([row[0] for row in rows]), _stacked([row[1] for row in rows])
        except Exception as error:
            raise DataError(client, f"its data set does not give (input, target) pairs: {error}") from error
    raise DataError(
        client,
        f"its examples are a {type(examples).__name__}; give (inputs, targets), or a torch Dataset of such pairs",
    )


def _pair_of(number: int, item: Any) -> tuple[Any, Any]:
    """Return an item of a data set as (input, target)."""
    if isinstance(item, Mapping):
        raise ValueError(
            f"item {number} is a dict of {_keys(item)}: name the columns, as in Population.from_hugging_face"
        )
    if not isinstance(item, tuple | list) or len(item) != 2 or item[1] is None:
        raise ValueError(f"item {number} is a {_named(item)}; give (input, target)")
    if isinstance(item, list) and all(isinstance(one, int | float) for one in item):
        raise ValueError(
            f"item {number} is a list of two numbers, which could be only an input: give a tuple (input, target)"
        )
    return item[0], item[1]


def _stacked(rows: list[Any]) -> Tensor:
    """Stack the inputs or targets of items into one tensor with the same values."""
    for number, row in enumerate(rows):
        if (reason := _no_array(row)) is not None:
            raise ValueError(f"item {number} is {reason}")
    tensors = [row if isinstance(row, Tensor) else torch.from_numpy(_own_array(row)) for row in rows]
    if not tensors:
        return torch.zeros(0)
    for number, tensor in enumerate(tensors):
        if (tensor.dtype == torch.bool) != (tensors[0].dtype == torch.bool):
            raise ValueError(
                f"item {number} is {_dtype_name(tensor)}, but item 0 is {_dtype_name(tensors[0])}: use one dtype for all"
            )
    whole = torch.stack(tensors)
    for number, (tensor, kept) in enumerate(zip(tensors, whole, strict=True)):
        if tensor.dtype != whole.dtype and not bool((kept.to(tensor.dtype) == tensor).all()):
            raise ValueError(
                f"item {number} is {_dtype_name(tensor)}, and its numbers would be rounded in {_dtype_name(whole)}, the "
                "common dtype of all items: use one dtype for all"
            )
    return whole


def _no_array(values: Any) -> str | None:
    """Return why values are not an array of numbers, and what to pass instead; None if these checks find nothing wrong."""
    if isinstance(values, Mapping):
        return (
            f"a dict of {_keys(values)}, but a model takes one array: stack them into one array, in prepare= or before"
        )
    if isinstance(values, Tensor):
        if type(values).__name__ == "MaskedTensor":
            return "a masked tensor: leave masked entries out, or fill them"
        if values.is_nested:
            return "a nested tensor: pad the rows to one length"
        if values.layout is not torch.strided:
            return f"{str(values.layout).rpartition('.')[2]}: give a dense tensor (values.to_dense())"
        if values.is_quantized:
            return "quantized: give values.dequantize()"
        return "on the meta device, without values: give values" if values.is_meta else None
    if hasattr(values, "toarray"):
        return f"a sparse {type(values).__name__}: give a dense array (values.toarray())"
    if hasattr(values, "columns") and hasattr(values, "dtypes"):
        return _mixed_columns(values)
    return None


def _mixed_columns(table: Any) -> str | None:
    """Describe the column and row because of which a table is not an array of numbers; None if no column prevents
    this."""
    kinds = [getattr(dtype, "kind", "O") for dtype in table.dtypes]
    odd = next((place for place, kind in enumerate(kinds) if kind not in "iuf"), None)
    if odd is None or set(kinds) == {"b"}:
        return None
    name, found = table.columns[odd], ""
    try:
        numbers_of(table.iloc[:, odd])
    except ValueError as error:
        found = f" ({error})"
    return (
        f"a table whose column {name!r} is {table.dtypes.iloc[odd]}{found}, not a numeric dtype: convert it, for "
        f"example with table.astype({{{name!r}: 'float32'}}), or leave it out"
    )


def _keys(values: Mapping[Any, Any]) -> str:
    """Return the first keys of a dict, for errors."""
    return ", ".join(repr(name) for name in list(values)[:8])


def _shown(target: Tensor) -> str:
    """Return a target as a short text."""
    return f"{target.tolist()!s:.40}"


def _own_array(values: Any) -> Any:
    array = np.array(numbers_of(values), order="C")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _first_row(wrong: Tensor) -> int:
    """Return the index of the first example with a wrong value."""
    return int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0]) if wrong.dim() else 0


def _place(wrong: Tensor) -> str:
    """Describe the first example with a wrong value, and the column if there are columns."""
    row = _first_row(wrong)
    return f"example {row}" + (f", column {int(wrong[row].nonzero()[0])}" if wrong.dim() == 2 else "")


def _are_two_columns(examples: list[Any]) -> bool:
    """Return whether a list of two items is (inputs, targets): two arrays of different shapes, which cannot both be examples."""
    one, other = (getattr(column, "shape", None) for column in examples)
    return bool(one) and bool(other) and tuple(one) != tuple(other)


def _named(value: Any) -> str:
    """Describe a value, for errors."""
    return type(value).__name__ + (f" of {len(value)}" if isinstance(value, tuple | list) else "")


def _is_list_of_pairs(examples: Any) -> bool:
    return isinstance(examples, list) and all(isinstance(row, tuple) and len(row) == 2 for row in examples)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).rpartition(".")[2]


def describe_call(error: Exception, inputs: Tensor, targets: Tensor) -> TaskError:
    """Return the error for the user if the model or the loss raised an exception."""
    given = (
        f"inputs {tuple(inputs.shape)} {_dtype_name(inputs)} and targets {tuple(targets.shape)} {_dtype_name(targets)}"
    )
    return TaskError(f"the model or its loss failed on {given}: {said(error)}; {_remedy(error, targets)}")


def _remedy(error: Exception, targets: Tensor) -> str:
    """Suggest a remedy for an error of the model or its loss, as far as the error's text shows one."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "memory ran out: lower batch_size= of the client's work, or use a smaller model"
    if targets.dtype == torch.int64 and ("long" in text or "int64" in text):
        return "a loss for real numbers takes real targets: give them as float32, or convert them in prepare="
    if "more than 1 value per channel" in text:
        return (
            "BatchNorm cannot train on a batch of one example: choose a batch_size= with which no client has a last batch "
            "of one example, or use another norm, such as GroupNorm"
        )
    return "try the model and its loss on one batch alone, or convert the data in prepare="


class _Kept:
    """A cache of examples in one block of memory. It keeps the first examples, as many as fit, and never moves
    them.

    If the small examples of many clients were kept one by one on the heap, they would fill the gaps that each client's
    gradients leave. The next gradients would no longer fit into the gaps, and the heap would grow by a model for each client.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._capacity = capacity
        self._device = device
        self._block: Tensor | None = None
        self._used = 0
        self._pairs: dict[object, tuple[Tensor, Tensor]] = {}

    def get(self, where: object) -> tuple[Tensor, Tensor] | None:
        """Return the examples that are stored under a key, or None. They are not copied."""
        return self._pairs.get(where)

    def put(self, where: object, pair: tuple[Tensor, Tensor]) -> None:
        """Store a copy of the examples, if it fits."""
        sizes = [_aligned(tensor.nelement() * tensor.element_size()) for tensor in pair]
        if self._used + sum(sizes) > self._capacity:
            return
        if self._block is None:
            self._block = torch.empty(self._capacity, dtype=torch.uint8, device=self._device)
        kept: list[Tensor] = []
        for tensor, size in zip(pair, sizes, strict=True):
            room = self._block[self._used : self._used + tensor.nelement() * tensor.element_size()]
            kept.append(room.view(tensor.dtype).view(tensor.shape).copy_(tensor))
            self._used += size
        self._pairs[where] = (kept[0], kept[1])


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
