"""A client's examples as tensors, checked: whatever is wrong with them is said before a step is taken."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sumus.errors import DataError, TaskError, said
from sumus.metrics import IGNORED
from sumus.task import Data, Task

CACHE_BYTES = 64 * 2**20


class ExampleReader:
    """Reads, prepares and checks clients' examples for one task; keeps the first 64 MiB of them (`_Kept`).

    dtype: the model's floating dtype, which floating inputs and targets are given.
    data: the schema; taken from the first client where the task declares none.
    """

    def __init__(self, task: Task, dtype: torch.dtype, device: torch.device) -> None:
        self.task = task
        self.data: Data | None = task.data
        self._dtype = dtype
        self._device = device
        self._kept = _Kept(CACHE_BYTES, device)

    def read(self, population: Mapping[Any, Any], client: Any) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of a client on the device, one row an example. Not to be written to: the next read gives them."""
        where = (id(population), client)
        pair = self._kept.get(where)
        if pair is None:
            pair = self.convert(client, population[client])
            self._kept.put(where, pair)
        return pair

    def convert(self, client: object, examples: Any) -> tuple[Tensor, Tensor]:
        """Prepare and check one client's examples."""
        inputs, targets = as_pair(client, examples)
        if self.task.prepare is not None:
            try:
                inputs, targets = self.task.prepare(inputs, targets)
            except Exception as error:
                raise DataError(client, f"prepare failed: {type(error).__name__}: {error}") from error
        inputs, targets = self._tensor(client, "inputs", inputs), self._tensor(client, "targets", targets)
        if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
            raise DataError(
                client,
                f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} do not have one row an example: "
                "give arrays of equal length",
            )
        if len(inputs) == 0:
            raise DataError(client, "it has no examples; leave empty clients out of the population")
        if self.data is not None:
            self.check(client, inputs, targets, self.data)
        return inputs.to(self._device), targets.to(self._device)

    def learn_schema(self, client: object, inputs: Tensor, targets: Tensor, classes: int | None) -> Data:
        """Take these examples as what all examples look like; `classes` where the loss wants class targets."""
        data = self.task.data or Data(
            tuple(inputs.shape[1:]), _dtype_name(inputs), tuple(targets.shape[1:]), _dtype_name(targets)
        )
        self.data = dataclasses.replace(data, classes=data.classes or classes)
        self.check(client, inputs, targets, self.data)
        return self.data

    def check(self, client: object, inputs: Tensor, targets: Tensor, data: Data) -> None:
        """Raise DataError where examples are not as the schema says."""
        for name, tensor, shape, dtype in (
            ("inputs", inputs, data.inputs, data.inputs_dtype),
            ("targets", targets, data.targets, data.targets_dtype),
        ):
            if tuple(tensor.shape[1:]) != tuple(shape) or _dtype_name(tensor) != dtype:
                raise DataError(
                    client,
                    f"its {name} are {_dtype_name(tensor)} of shape {tuple(tensor.shape[1:])} an example, and the task's are "
                    f"{dtype} of shape {tuple(shape)}; mend the data, or prepare= of the task",
                )
        if data.classes is not None and targets.is_floating_point():
            shape = tuple(targets.shape[1:])
            remedy = "give classes as whole numbers"
            if shape == (data.classes,):
                remedy = "give the number of each example's class: targets.argmax(1), if they are one-hot"
            raise DataError(
                client,
                f"its targets are {_dtype_name(targets)} of shape {shape} an example (the first is {_shown(targets[0])}), and "
                f"the task's loss takes classes, whole numbers from 0 to {data.classes - 1}: {remedy}",
            )
        if data.classes is not None:
            wrong = (targets != IGNORED) & ((targets < 0) | (targets >= data.classes))
            if bool(wrong.any()):
                row = int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0])
                raise DataError(
                    client,
                    f"the label {int(targets[wrong][0])} of example {row} is out of range: the model has {data.classes} "
                    f"classes, 0 to {data.classes - 1}; mend the label, or widen the model's output",
                )

    def _tensor(self, client: object, name: str, values: Any) -> Tensor:
        if (reason := _no_array(values)) is not None:
            raise DataError(client, f"its {name} are {reason}")
        try:  # a copy: the caller may use its array again
            tensor = values.detach().clone() if isinstance(values, Tensor) else torch.from_numpy(_own_array(values))
        except Exception as error:
            raise DataError(client, f"its {name} are no array: {error}; give numpy arrays or tensors") from error
        if tensor.is_complex():
            raise DataError(client, f"its {name} are complex; give real numbers")
        if tensor.is_floating_point():
            if not bool(torch.isfinite(tensor).all()):
                row = int((~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero()[0])
                raise DataError(
                    client, f"its {name} hold a NaN or an infinity at example {row}; clean them in prepare= of the task"
                )
            return tensor.to(self._dtype)
        return tensor.to(torch.int64) if tensor.dtype not in (torch.uint8, torch.bool) or name == "targets" else tensor


def as_pair(client: object, examples: Any) -> tuple[Any, Any]:
    """A client's examples as (inputs, targets): as given, or a data set of pairs, read and stacked."""
    if isinstance(examples, tuple | list) and len(examples) == 2 and not _is_list_of_pairs(examples):
        return examples[0], examples[1]
    if hasattr(examples, "__getitem__") and hasattr(examples, "__len__") and not isinstance(examples, Mapping):
        try:
            rows = [examples[index] for index in range(len(examples))]
            if rows and isinstance(rows[0], Mapping):
                names = ", ".join(repr(name) for name in list(rows[0])[:8])
                raise TypeError(f"it gives dicts of {names}: name the columns, as in Population.from_hugging_face")
            inputs = torch.stack([torch.as_tensor(row[0]) for row in rows]) if rows else torch.zeros(0)
            targets = torch.stack([torch.as_tensor(row[1]) for row in rows]) if rows else torch.zeros(0)
            return inputs, targets
        except Exception as error:
            raise DataError(client, f"its data set does not give (input, target) pairs: {error}") from error
    raise DataError(
        client,
        f"its examples are a {type(examples).__name__}; give (inputs, targets), or a torch Dataset of such pairs",
    )


def _no_array(values: Any) -> str | None:
    """Why values are no array of numbers, and what to give; None where nothing is wrong as far as this looks."""
    if isinstance(values, Mapping):
        names = ", ".join(repr(name) for name in list(values)[:8])
        return f"a dict of {names}, and a model is given one array: stack them into one, in prepare= or before"
    if isinstance(values, Tensor):
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
    """Which columns of a table keep the table from being an array of numbers; None where all of them are such."""
    kinds = {str(name): getattr(dtype, "kind", "O") for name, dtype in table.dtypes.items()}
    odd = [name for name, kind in kinds.items() if kind not in "iuf"]
    if not odd or set(kinds.values()) == {"b"}:
        return None
    column = next(name for name in table.columns if str(name) == odd[0])
    return (
        f"a table whose column {odd[0]!r} is {table.dtypes[column]}, beside numbers: convert it, such as "
        f"table.astype({{{odd[0]!r}: 'float32'}}), or leave it out"
    )


def _shown(target: Tensor) -> str:
    """A target in a few characters."""
    return f"{target.tolist()!s:.40}"


def _own_array(values: Any) -> Any:
    array = np.array(values.to_numpy() if hasattr(values, "to_numpy") else values, order="C")
    if array.dtype.kind in "OSUMm":
        first = next(iter(array.ravel().tolist()), None)
        raise TypeError(f"they hold {type(first).__name__}, such as {first!r:.60}, and no numbers")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _is_list_of_pairs(examples: Any) -> bool:
    return isinstance(examples, list) and all(isinstance(row, tuple) and len(row) == 2 for row in examples)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).rpartition(".")[2]


def describe_call(error: Exception, inputs: Tensor, targets: Tensor) -> TaskError:
    """What to tell the user when the model or the loss itself raised."""
    given = (
        f"inputs {tuple(inputs.shape)} {_dtype_name(inputs)} and targets {tuple(targets.shape)} {_dtype_name(targets)}"
    )
    return TaskError(f"the model or its loss failed on {given}: {said(error)}; {_remedy(error, targets)}")


def _remedy(error: Exception, targets: Tensor) -> str:
    """What to do about an error of the model or its loss, as far as the error tells."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "memory ran out: lower batch_size= of the client's work, or take a smaller model"
    if targets.dtype == torch.int64 and ("long" in text or "int64" in text):
        return "a loss of real numbers takes real targets: give them as float32, or convert them in prepare="
    return "try them on one batch alone, or convert the data in prepare="


class _Kept:
    """Examples in one block of memory: of those that came first, as many as it takes. What is kept stays where it is.

    Kept one by one on the heap, the small examples of many clients would land in the holes that each client's gradients
    leave, the next gradients would no longer fit there, and the heap would grow by a model a client.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._capacity = capacity
        self._device = device
        self._block: Tensor | None = None
        self._used = 0
        self._pairs: dict[object, tuple[Tensor, Tensor]] = {}

    def get(self, where: object) -> tuple[Tensor, Tensor] | None:
        """What was put there, or None. Not a copy."""
        return self._pairs.get(where)

    def put(self, where: object, pair: tuple[Tensor, Tensor]) -> None:
        """Keep a copy, if there is room."""
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
