"""A program: a task bound to torch, with one module that is made once and then reused for every client."""

import copy
import dataclasses
import math
import re
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from sumus.errors import ExperimentError, SumusError, TaskError, at_client, said
from sumus.metrics import SeveralSums
from sumus.task import Data, Leaf, Task
from sumus.training.examples import ExampleReader, describe_call
from sumus.training.hidden import HiddenState, generators_seeded, tied_to_itself
from sumus.types import Array, Tree

EVALUATION_BATCH = 512
_Norm = nn.modules.batchnorm._NormBase


class Program:
    """One module of a task on one device. Changing one of its tensors in place changes the module.

    Args:
        task: The task.
        device: Where torch computes: cpu, cuda or cuda:NUMBER.
        seed: The seed of the leaves' initial values, if the task makes its module anew.

    Attributes:
        initial: Every leaf's initial value (numpy).
        shared: The tensors of shared leaves that have a gradient, by leaf.
        buffers: The tensors of shared leaves without a gradient.
        personal: The tensors of personal leaves, which are never sent.
        trained: The tensors of all leaves with a gradient.
        hidden: The state that the code keeps outside the leaves.
        moved: The paths of hidden state that has changed, and the findings of a witness (`sumus.executors.witness`).
        observed: The observed behaviour of the code (`sumus.training.observed`); None before the code was tried.
    """

    def __init__(self, task: Task, device: Any = "cpu", seed: int = 0) -> None:
        self.task = task
        device = str(device)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise TaskError(f"device {device!r} is not known: give cpu, cuda or cuda:NUMBER")
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise TaskError("device 'cuda' was requested, but torch finds no GPU; leave it out to use the CPU")
        with seeded(seed):
            module = task.make_model()
        self.module = _own(task, module, seed).to(self.device)
        self.description = task.describe(self.module)
        state: Mapping[str, Tensor] = self.module.state_dict(keep_vars=True)
        self.leaves: dict[str, Leaf] = {leaf.name: leaf for leaf in self.description.leaves}
        self.tensors = {name: state[name] for name in self.leaves}
        for name, leaf in self.leaves.items():
            if self.tensors[name].requires_grad and not leaf.trained:
                self.tensors[name].requires_grad_(False)
        for name, leaf in self.leaves.items():
            if leaf.role == "shared":
                _expect_finite(name, self.tensors[name])
        self.initial: Tree = {name: self._to_numpy(name, tensor) for name, tensor in self.tensors.items()}
        self.shared = {name: self.tensors[name] for name in self.description.trained_layout}
        self.buffers = {name: self.tensors[name] for name in self.description.buffer_layout}
        self.personal = {name: self.tensors[name] for name, leaf in self.leaves.items() if leaf.role == "personal"}
        self.trained = {name: self.tensors[name] for name, leaf in self.leaves.items() if leaf.trained}
        self._restored = [  # integer counters and similar leaves get the server's values back after training
            (tensor, tensor.detach().clone())
            for name, tensor in self.tensors.items()
            if self.leaves[name].role == "frozen" and name not in dict(self.module.named_parameters())
        ]
        self._counters = [
            (name, tensor, value)
            for (tensor, value), name in ((pair, _name_in(self.tensors, pair[0])) for pair in self._restored)
            if _is_computed_with(self.module, name, tensor)
        ]
        self._frozen = {
            name: (tensor, tensor._version, _sum_of(tensor))
            for name, tensor in self.module.named_parameters()
            if name in self.leaves and self.leaves[name].role == "frozen"
        }
        self.hidden = HiddenState(_code_of(task, self.module), self.tensors.values())
        self._parts: dict[tuple[str, int], tuple[object, HiddenState]] = {}
        self._restoring: set[tuple[str, int]] = set()
        self.moved: dict[str, None] = {}
        self.observed: Any = None
        floating = next((t.dtype for t in self.trained.values()), torch.get_default_dtype())
        self.reader = ExampleReader(task, floating, self.device)

    @property
    def initial_shared(self) -> dict[str, Array]:
        """Return the model that the first round broadcasts, with its buffers."""
        return {name: self.initial[name] for name in (*self.shared, *self.buffers)}

    @property
    def initial_personal(self) -> dict[str, Tensor]:
        """Return a client's personal leaves before its first training."""
        return self.tensors_of({name: self.initial[name] for name in self.personal})

    def tensors_of(self, tree: Tree) -> dict[str, Tensor]:
        """Return a tree as tensors on the device: first in the precision of the module, then widened to the dtype of
        their sum."""
        return {name: self.widen(name, self._to_tensor(name, leaf)) for name, leaf in tree.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the module."""
        if not tensors:
            return
        for name, tensor, value in self._counters:
            if not torch.equal(tensor, value):
                self.moved[f"model.{name}"] = None
        with torch.no_grad():
            torch._foreach_copy_([self.tensors[name] for name in tensors], list(tensors.values()))
            for tensor, value in self._restored:
                tensor.copy_(value)

    def look_at(self, name: str, part: object, restores: bool = False) -> None:
        """Also watch the state of a part of the algorithm. `moved` names its changes by this name.

        Args:
            name: The name.
            part: The part.
            restores: Whether the state is restored before each client, like the state of the model's code. False for code that
                a server calls as well.
        """
        if (name, id(part)) not in self._parts:
            self._parts[name, id(part)] = part, HiddenState({name: part}, self.tensors.values() if restores else ())
            if restores:
                self._restoring.add((name, id(part)))

    def changed(self) -> list[str]:
        """Return the paths outside the leaves that have changed since this program was made, or since the last
        `begin_anew`."""
        return [
            path
            for hidden in (self.hidden, *(hidden for _, hidden in self._parts.values()))
            for path in hidden.changed()
        ]

    def begin_anew(self, whole: bool = False) -> None:
        """Restore the state that the code keeps outside the leaves to its value when this program was made.

        Every client and every measurement begins with this call. `moved` gains the paths that had changed.

        Args:
            whole: Whether large arrays and long containers are compared in any case, and not only occasionally.

        Raises:
            TaskError: A frozen parameter has changed, or a change cannot be undone.
        """
        whole = self.hidden.is_due() or whole
        if changed := self.hidden.changed(whole):
            self.moved |= dict.fromkeys(changed)
            try:
                self.expect_own_tensors()
            finally:
                self.hidden.restore(whole)
        if self.hidden.refused is not None:  # raise it again if a device retries
            raise TaskError(str(self.hidden.refused))
        for (name, own), (part, hidden) in self._parts.items():
            restores = (name, own) in self._restoring
            if changed := hidden.changed(whole or not restores):
                self.moved |= dict.fromkeys(changed)
                if restores:
                    with suppress(TaskError):  # the rest is restored, and the witness sees what is not
                        hidden.restore(whole)
                else:
                    self._parts[name, own] = part, HiddenState({name: part})
        self.expect_frozen()
        _expect_same_roles(self.tensors, self.leaves)

    def end(self) -> None:
        """Restore the hidden state for the last time, so that the next run with the same code begins in the same state."""
        for own in self._restoring:
            with suppress(TaskError):
                self._parts[own][1].end()
        self.hidden.end(logs=self.observed is not None and not self.observed.acts)

    def expect_frozen(self, before: Mapping[str, Tensor] | None = None) -> None:
        """Raise TaskError if the code changed a frozen parameter, compared with the values `before` or, if None, by version."""
        for name, (tensor, version, kept) in self._frozen.items():
            is_same = tensor._version == version or _sum_of(tensor) == kept
            if not (is_same if before is None else _same_numbers(tensor, before[name])):
                raise TaskError(
                    f"`{name}` is a frozen parameter, but the code changes it while it trains: it would be different in each "
                    "process, and would not be sent. Make it a buffer (register_buffer), which is averaged like running "
                    f'statistics; or keep a separate one at each client, with leaves={{"{name}": "personal"}}'
                )
            self._frozen[name] = tensor, tensor._version, kept

    def widened(self, names: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the module's present values of these leaves, detached, in the dtype in which they are summed. They are
        not copies."""
        return {name: self.widen(name, self.tensors[name].detach()) for name in names}

    def expect_own_tensors(self) -> None:
        """Raise TaskError if the module has replaced its leaves by other tensors, since these would never be sent."""
        state = self.module.state_dict(keep_vars=True)
        for name, tensor in self.tensors.items():
            if state.get(name) is not tensor:
                raise TaskError(
                    f"forward binds `{name}` to a new tensor: write into the existing one, as in self.{name}.copy_(...)"
                )

    def losses(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs, and the loss of each example `(B,)`.

        Raises:
            TaskError: The user's code raised an exception.
        """
        try:
            outputs = self.module(inputs)
            losses = self.task.loss(outputs, targets)
        except SumusError:
            raise
        except Exception as error:
            raise describe_call(error, inputs, targets) from error
        if not isinstance(losses, Tensor) or losses.shape != inputs.shape[:1]:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise TaskError(
                f"loss `{self.description.loss}` returned {got} for a batch of {len(inputs)}, but it must return one "
                f"value per example, shape ({len(inputs)},): use reduction='none', or average over everything but "
                "the first dimension"
            )
        return outputs, losses

    def learn_schema(self, client: object, inputs: Tensor, targets: Tensor) -> Data:
        """Try the model on a client's first examples, and make their schema the schema of all data."""
        few, few_targets = inputs[:2].clone(), targets[:2].clone()
        self.begin_anew()
        self.module.eval()
        with torch.no_grad(), at_client(client):
            classes = _classes(self, few, few_targets)
            data = self.reader.learn_schema(client, inputs, targets, classes)
            self.evaluate(few, few_targets)
        return data

    def evaluate(
        self, inputs: Tensor, targets: Tensor, batch_size: int = EVALUATION_BATCH
    ) -> dict[str, tuple[float, int]]:
        """Return the sums of the loss and of every metric over these examples, with the module as it is.

        Args:
            inputs: One row for each example.
            targets: One row for each example.
            batch_size: The most examples in one call of the model, the loss and the metrics.

        Returns:
            (sum, count) by the name of the metric, or "loss". A sum is NaN if one of its values is NaN.
        """
        totals: dict[str, tuple[float, int]] = {}
        self.begin_anew()
        self.module.eval()
        with torch.no_grad(), seeded(0), generators_seeded(0):  # independent of earlier measurements
            for start in range(0, len(inputs), batch_size):  # copies, since forward may change its input
                rows = slice(start, start + batch_size)
                batch, labels = inputs[rows].clone(), targets[rows].clone()
                outputs, losses = self.losses(batch, labels)
                _add(totals, ("loss",), losses)
                for name, metric in self.task.metrics.items():
                    names = metric.names(name) if isinstance(metric, SeveralSums) else (name,)
                    _add(totals, names, _measured(name, metric, outputs, labels))
        for name, (total, count) in totals.items():
            if not count and total:
                raise TaskError(
                    f"metric {name!r} returned sums of {total:g}, but all its counts are 0: count the values that are added"
                )
        return totals

    def depends_on_batch(self, inputs: Tensor, targets: Tensor) -> bool:
        """Return whether the loss or a metric of some examples changes if they are measured together instead of
        separately."""
        if len(inputs) < 2:
            return False
        with seeded(0):
            together, again, apart = (self.evaluate(inputs, targets, size) for size in (len(inputs), len(inputs), 1))
        if self.hidden.changed():  # then the code keeps state, and another note reports that
            return False
        return together == again and any(  # otherwise it draws numbers, and gives other results each time
            not math.isclose(total, apart[name][0], rel_tol=1e-3, abs_tol=1e-5 * max(1, count))
            for name, (total, count) in together.items()
            if math.isfinite(total) and math.isfinite(apart[name][0])
        )

    def outputs(self, inputs: Any) -> Any:
        """Return the model's output for inputs: a tensor `(B, ...)`, or another value that its forward returns."""
        self.begin_anew()
        self.module.eval()
        with torch.no_grad():
            return self.module(torch.as_tensor(inputs).to(self.device))

    def predict(self, inputs: Any) -> Tensor:
        """Return the outputs as a device would return them: `(B, ...)` on the CPU. Raise TaskError if they are not one tensor."""
        outputs = self.outputs(inputs)
        if not isinstance(outputs, Tensor):
            raise TaskError(
                f"the model returns {_named(outputs)}, but a prediction must be one tensor: let forward return a tensor in "
                "evaluation (`if not self.training`), or wrap the model in a module that does"
            )
        return outputs.cpu()

    def state_dict(self, shared: Tree) -> dict[str, Tensor]:
        """Return a state dict for the user's model: these shared leaves, the initial values of all others, and
        every name of a tied tensor."""
        state: dict[str, Tensor] = {}
        for name, leaf in self.leaves.items():
            value = self._to_tensor(name, shared.get(name, self.initial[name])).cpu()
            state |= dict.fromkeys((name, *leaf.aliases), value)
        return state

    def _to_tensor(self, name: str, leaf: Array) -> Tensor:
        return torch.as_tensor(np.array(leaf)).to(self.device, self.tensors[name].dtype)

    def widen(self, name: str, tensor: Tensor) -> Tensor:
        """Return a leaf's tensor in the dtype in which the leaf is summed."""
        return tensor.to(getattr(torch, self.leaves[name].sum_dtype))

    def _to_numpy(self, name: str, tensor: Tensor) -> Array:
        return self.widen(name, tensor.detach()).cpu().numpy().copy()


def _classes(program: Program, inputs: Tensor, targets: Tensor) -> int | None:
    """Return the number of classes that the model scores; None if the loss takes no classes."""
    axis = getattr(program.task.loss, "class_axis", None)
    if axis is None:
        return None
    try:
        outputs = program.module(inputs)
        if isinstance(outputs, Tensor) and outputs.dim():
            if not targets.is_floating_point():  # the reader refuses floats, and names the number of classes
                program.task.loss(outputs, torch.zeros_like(targets))  # check only the shapes, so labels are zeros
            return int(outputs.shape[axis])
    except SumusError:
        raise
    except Exception as error:
        raise describe_call(error, inputs, targets) from error
    raise TaskError(
        f"the model returns {_named(outputs)}, but loss `{program.description.loss}` takes one tensor of scores: choose "
        "one of the outputs in a loss of your own, such as loss=lambda outputs, targets: "
        "losses.cross_entropy(outputs[0], targets)"
    )


def _measured(name: str, metric: Any, outputs: Tensor, targets: Tensor) -> Any:
    """Return a metric's result for a batch: one value for each example, or a pair (sums, counts).

    Raises:
        TaskError: The metric fails, or returns something else.
    """
    try:
        value = metric(outputs, targets)
    except SumusError as error:
        raise TaskError(f"metric {name!r}: {error}") from error
    except Exception as error:
        raise TaskError(f"metric {name!r} failed: {type(error).__name__}: {error}") from error
    given = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    wanted = (*targets.shape[:1], len(metric.slots)) if isinstance(metric, SeveralSums) else targets.shape[:1]
    for tensor in given:
        if not isinstance(tensor, Tensor) or tensor.shape != wanted or tensor.is_complex():
            got = f"{_kind(tensor)}{tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TaskError(
                f"metric {name!r} returned {got} for a batch of {len(targets)}; return one real value per example, or a pair "
                "(sums, counts) with one sum and one count per example"
            )
    if len(given) == 2:
        counts = given[1].double()
        if bool((wrong := ~((counts >= 0) & (counts == counts.round()) & counts.isfinite())).any()):
            raise TaskError(
                f"metric {name!r} counts {float(counts[wrong][0]):g} predictions for an example, but such a count "
                "must be a whole "
                "number of at least 0: to weight examples, give whole numbers as weights, such as hundredths"
            )
    return value


def _add(totals: dict[str, tuple[float, int]], names: Sequence[str], value: Any) -> None:
    """Add a batch's values, or its (sums, counts), to the totals of these names. If there are several names, each has a
    column."""
    sums, counts = value if isinstance(value, tuple) else (value, torch.ones_like(value, dtype=torch.int64))
    added = (
        [column.sum().item()] if len(names) == 1 else column.sum(0).tolist()
        for column in (sums.double(), counts.long())
    )
    for name, total, count in zip(names, *added, strict=True):
        before, counted = totals.get(name, (0.0, 0))
        totals[name] = (before + total, counted + count)


def dense(grad: Tensor) -> Tensor:
    """Return a gradient in dense form. The gradient of an embedding may list only the rows that it changes."""
    return grad if grad.layout is torch.strided else grad.to_dense()


def _kind(tensor: Tensor) -> str:
    return "complex numbers of shape " if tensor.is_complex() else ""


def _own(task: Task, module: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a module, since a callable may return the user's own module.

    If a module cannot be copied, or a copy would lose something, the module is made once more. The result must then be a
    new module.
    """
    why, cause = tied_to_itself(module), None
    if why is None:
        try:
            return _copied(module)
        except Exception as error:
            why, cause = f"the model cannot be copied ({said(error)})", error
    with seeded(seed):
        again = task.make_model()
    held = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    if again is not module and not any(id(tensor) in held for tensor in (*again.parameters(), *again.buffers())):
        return again
    raise TaskError(
        f"{why}: give model= a callable that makes a new module at each call, such as model=lambda: Net()"
    ) from cause


def _copied(module: nn.Module) -> nn.Module:
    """Return a deep copy with the attributes that a user gave to parameters. torch's own copy leaves these out."""
    memo: dict[int, Any] = {}
    own = copy.deepcopy(module, memo)
    copies = dict(own.named_parameters())
    for name, parameter in module.named_parameters():
        if vars(parameter):
            vars(copies[name]).update(copy.deepcopy(vars(parameter), memo))
    return own


def _code_of(task: Task, module: nn.Module) -> dict[str, object]:
    """Return the user's code that runs while clients train, by its kind."""
    metrics = {f"metric {name}": metric for name, metric in task.metrics.items()}
    return {"model": module, "loss": task.loss, **metrics}


def _name_in(tensors: Mapping[str, Tensor], wanted: Tensor) -> str:
    return next(name for name, tensor in tensors.items() if tensor is wanted)


def _expect_same_roles(tensors: Mapping[str, Tensor], leaves: Mapping[str, Leaf]) -> None:
    """Refuse code that changes which leaves have a gradient.

    Raises:
        TaskError: The code has changed whether a leaf has a gradient.
    """
    for name, tensor in tensors.items():
        if tensor.requires_grad is not leaves[name].trained:
            raise TaskError(
                f"the code switches requires_grad of `{name}` while it trains, but a leaf must have the same role in "
                "all rounds: give the role by leaves=; to keep a leaf constant for some steps, use a factor of 0 in forward"
            )


def _is_computed_with(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Return whether an integer buffer may change what a layer computes. A counter of torch's own layers does not."""
    return not tensor.is_floating_point() and not tensor.is_complex() and not _only_counts(module, name)


def _only_counts(module: nn.Module, name: str) -> bool:
    """Return whether a buffer is the counter of one of torch's layers that computes nothing from it."""
    path, _, own = name.rpartition(".")
    layer = module.get_submodule(path)
    return own == "num_batches_tracked" and isinstance(layer, _Norm) and layer.momentum is not None


def _sum_of(tensor: Tensor) -> int:
    """Return a checksum over the bits of a tensor."""
    numbers: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return zlib.crc32(numbers)


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach(), other) or _sum_of(one) == _sum_of(other)


def _expect_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity in a leaf that is averaged, since their average is meaningless."""
    odd = tensor.detach()[~torch.isfinite(tensor.detach())]
    if odd.numel():
        raise TaskError(
            f"leaf `{name}` holds {float(odd[0])} before the first round, but shared leaves are averaged: if it is a "
            f'constant, such as a mask, pass leaves={{"{name}": "frozen"}}, or register_buffer(..., persistent=False); if '
            "not, correct the model"
        )


def expect_gradients(what: str) -> None:
    """Refuse to train if torch is set to compute no gradients.

    Args:
        what: The call that needs gradients, for the error.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ExperimentError(
            f"gradients are off: {what} was called inside torch.no_grad() or torch.inference_mode(), or after "
            "torch.set_grad_enabled(False); call it outside"
        )


def shapes_of(outputs: Any) -> Any:
    """Return the shape of one example's part of a model's output. For several outputs, the shapes are in the same
    tuple, list or mapping."""
    if isinstance(outputs, Tensor):
        return tuple(outputs.shape[1:])
    if isinstance(outputs, Mapping):
        return {name: shapes_of(value) for name, value in cast(Mapping[str, Any], outputs).items()}
    if isinstance(outputs, tuple | list):
        return tuple(map(shapes_of, cast(Sequence[Any], outputs)))
    if dataclasses.is_dataclass(outputs):
        return {field.name: shapes_of(getattr(outputs, field.name)) for field in dataclasses.fields(outputs)}
    return None if outputs is None else type(outputs).__name__


def _named(outputs: Any) -> str:
    """Describe a model's output in words."""
    if isinstance(outputs, Tensor):
        return f"a tensor of shape {tuple(outputs.shape)}"
    keys = f" of {', '.join(map(str, cast(Mapping[str, Any], outputs)))}" if isinstance(outputs, Mapping) else ""
    return f"a {type(outputs).__name__}{keys}"


def model_bytes(state: Mapping[str, Tensor]) -> bytes:
    """Encode a state dict as safetensors. Each name gets a copy of its own, even if names share a tensor."""
    return save({name: tensor.clone().contiguous() for name, tensor in state.items()})


@contextmanager
def seeded(seed: int) -> Generator[None, None, None]:
    """Set torch's global random generators from a seed, and restore them afterwards; also those of GPUs that are in
    use.

    `torch.manual_seed` is not used: for every GPU that is not in use, it queues a call together with a stack trace. This
    is slow, and the queue would grow with every client.
    """
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def one_thread() -> Generator[None, None, None]:
    """Let torch use one thread: small models run faster with one, and sums inside kernels keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
