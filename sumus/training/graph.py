"""Captures the local step as a graph of kernels: for one client, or for a stack of clients that step together.

    graph = capture(program, work, inputs, targets, stack=8)
    losses = graph(state, inputs, targets, mask, lr, step, noise)       `state` is changed in place

Capturing runs the step once and records the calls of torch's kernels, so that no Python code of the module and no
autograd is left. Then the graph is rewritten (`sumus.training.rewrite`). For a stack, the same step runs under
`torch.func.vmap`: dense layers become batched products. A step is refused if it depends on the values of tensors, or on
Python's or numpy's random numbers.
"""

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import vmap
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from sumus.errors import UsageError
from sumus.training import rewrite
from sumus.training.hidden import generators, put_generators, which
from sumus.training.noise import NoiseShape
from sumus.training.program import Program
from sumus.training.rewrite import NotCapturable
from sumus.training.step import local_step, step_values
from sumus.work import ClientWork

_LONGEST = 120
_STATE = ("params/", "rule/", "buffers/", "broadcast/", "state/")


@dataclass(frozen=True)
class LocalGraph:
    """A captured step.

    Attributes:
        module: The graph.
        names: The names of the state that it takes.
        others: The names of its other arguments.
        draws: The shapes of the random numbers among the other arguments, each for one client.
        stack: The number of clients in the stack; None for one client without a stack.
    """

    module: GraphModule
    names: tuple[str, ...]
    others: tuple[str, ...]
    draws: tuple[NoiseShape, ...]
    stack: int | None

    def __call__(
        self,
        state: Sequence[Tensor],
        inputs: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        lr: float,
        step: int,
        noise: Sequence[Tensor] = (),
    ) -> Tensor:
        """Take a step. The tensors of `state` are changed in place.

        Args:
            state: Tensors in the order of `names`.
            inputs: Rows of a batch, `(B, ...)`; for a stack `(K, B, ...)`. They may be changed.
            targets: The targets of the rows, in the same form.
            mask: For a stack, `(K, B)`: 1 for rows that count, 0 for padding.
            lr: The learning rate.
            step: The step's number, from 1.
            noise: What `noise` returns for this step.

        Returns:
            The mean loss before the step, for each client.
        """
        given: dict[str, Any] = {"inputs": inputs, "targets": targets, "mask": mask, "negative_lr": -lr}
        given |= {f"noise_{number}": drawn for number, drawn in enumerate(noise)}
        if "lr" in self.others:
            given["lr"] = torch.tensor(lr, dtype=torch.float64)
        if "step" in self.others:
            given["step"] = torch.tensor(float(step), dtype=torch.float64)
        with torch.enable_grad():  # fused recurrent kernels then keep the values for their backward pass
            (loss,) = self.module.forward(*state, *(given[name] for name in self.others))
        return loss

    def noise(self, keys: Sequence[bytes], step: int, device: torch.device) -> list[Tensor]:
        """Return the numbers that these clients' random operators draw in a step, each `(K, ...)`; without a stack, the
        numbers of one client."""
        drawn = [np.stack([draw.numbers(key, step, call) for key in keys]) for call, draw in enumerate(self.draws)]
        return [torch.from_numpy(each if self.stack else each[0]).to(device) for each in drawn]


def capture(
    program: Program,
    work: ClientWork,
    inputs: Tensor,
    targets: Tensor,
    stack: int | None = None,
    onednn: bool = False,
) -> LocalGraph:
    """Capture the graph of one step.

    Args:
        program: The model.
        work: The client's work.
        inputs: A batch `(B, ...)`. The graph is for batches of this shape.
        targets: The targets of the batch.
        stack: The number of clients that step together, with a mask; None for one client.
        onednn: Whether matrix products use oneDNN's inner product.

    Raises:
        NotCapturable: The step cannot be captured; the error gives the reason.
    """
    recording = _record(program, work, inputs, targets, stack)
    graph, arguments = recording.module.graph, recording.arguments
    rewrite.simplify(graph)
    draws = rewrite.stand_in_noise(graph, stack)
    if draws and stack is not None:
        longer = _record(program, work, _one_row_more(inputs), _one_row_more(targets), stack).module.graph
        _expect_rows_first(draws, rewrite.stand_in_noise(longer, stack), len(inputs))
    rewrite.fuse_bias(graph)
    rewrite.fuse_cross_entropy(graph)
    if program.device.type == "cpu":
        rewrite.pool_channels_last(graph)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        negative_lr = graph.placeholder("negative_lr")
    places = {name: place for place, name in enumerate(recording.outputs)}
    state = {node: places[name] for name, node in arguments.items() if name in places}
    rewrite.update_in_place(graph, state, arguments["lr"], negative_lr)
    rewrite.simplify(graph)
    if onednn:
        rewrite.multiply_by_onednn(graph)
    named = {node: name for name, node in arguments.items()}
    used = [named.get(node, node.name) for node in _used_arguments(graph)]
    graph.lint()
    recording.module.recompile()
    names = tuple(name for name in used if name.startswith(_STATE))
    return LocalGraph(recording.module, names, tuple(used[len(names) :]), tuple(draws), stack)


def _used_arguments(graph: Graph) -> list[Node]:
    """Return a graph's arguments, after removing those that nothing uses."""
    for node in [node for node in graph.nodes if node.op == "placeholder" and not node.users]:
        graph.erase_node(node)
    return [node for node in graph.nodes if node.op == "placeholder"]


def is_stacked(name: str, program: Program) -> bool:
    """Return whether each client of a stack has its own value of an argument."""
    if name.startswith("buffers/"):
        return program.leaves[name.removeprefix("buffers/")].role != "frozen"
    return name.startswith(("params/", "rule/", "state/")) or name in ("inputs", "targets", "mask")


@dataclass(frozen=True)
class _Recording:
    """A recorded step.

    Attributes:
        module: The graph.
        arguments: The graph's arguments, by name.
        outputs: The names of its results.
    """

    module: GraphModule
    arguments: dict[str, Node]
    outputs: Sequence[str]


def _record(program: Program, work: ClientWork, inputs: Tensor, targets: Tensor, stack: int | None) -> _Recording:
    """Run the step once, and record the calls of the kernels."""
    values = {name: value.to(program.device) for name, value in step_values(program, work, inputs, targets).items()}
    lr, step = (values.pop(name).cpu() for name in ("lr", "step"))
    values["inputs"], values["targets"] = inputs.clone(), targets.clone()
    if stack is not None:
        values["mask"] = torch.ones(len(inputs), dtype=next(iter(program.trained.values())).dtype).to(program.device)
    values |= {"lr": lr, "step": step}
    outputs: list[str] = []

    def one(*args: Tensor) -> list[Tensor]:
        results = local_step(program, work, dict(zip(values, args, strict=True)), functional=stack is not None)
        outputs[:] = [name for name in results if stack is None or name == "loss" or is_stacked(name, program)]
        return [results[name] for name in outputs]

    run: Any = one
    given = list(values.values())
    dims = [0 if stack is not None and is_stacked(name, program) else None for name in values]
    if stack is not None:
        run = vmap(one, in_dims=tuple(dims), randomness="different")
        pairs = zip(given, dims, strict=True)
        given = [value if dim is None else value.expand(stack, *value.shape).clone() for value, dim in pairs]
    program.module.train()
    backends = [SDPBackend.MATH] if stack is not None else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with leaving_no_trace(program), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            _run_without_values(program, work, values)
            with torch.backends.mkldnn.flags(enabled=stack is None), sdpa_kernel(backends):
                module = make_fx(run)(*given)
        except Exception as error:
            raise NotCapturable(_reason(error)) from error
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    common = [node for node, dim in zip(nodes, dims, strict=True) if dim is None] if stack is not None else []
    rewrite.expect_capturable(module.graph, common)
    return _Recording(module, dict(zip(values, nodes, strict=True)), outputs)


def _one_row_more(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows[:1]])


def _expect_rows_first(draws: Sequence[NoiseShape], longer: Sequence[NoiseShape], rows: int) -> None:
    """Refuse random numbers if the padding of a batch would change the numbers of its other rows.

    Args:
        draws: The noise that is drawn for a batch.
        longer: The noise that is drawn for a batch with one more row.
        rows: The number of rows in the shorter batch.
    """

    def is_unmoved(draw: NoiseShape, other: NoiseShape) -> bool:
        grown = draw.shape == (rows, *draw.shape[1:]) and other.shape == (rows + 1, *draw.shape[1:])
        return grown or draw.shape == other.shape

    if len(draws) != len(longer) or not all(map(is_unmoved, draws, longer)):
        raise NotCapturable(
            "it draws random numbers whose first dimension is not the rows of the batch, so the padding of a short batch "
            "would change them"
        )


@contextmanager
def leaving_no_trace(program: Program) -> Generator[None, None, None]:
    """After the block, restore the state that the code keeps outside the leaves, and Python's and numpy's generators.

    Raises:
        NotCapturable: The block changed any of them.
    """
    program.begin_anew()
    stood = generators()
    try:
        yield
    finally:
        changed, moved = program.changed(), generators() != stood
        program.begin_anew()
        put_generators(stood)
    if moved:
        raise NotCapturable("it draws random numbers from Python's or numpy's generator: use torch's")
    if changed:
        raise NotCapturable(which(changed[0]))


def _run_without_values(program: Program, work: ClientWork, values: Mapping[str, Tensor]) -> None:
    """Run the step on tensors without values. Code that reads a value fails here."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        local_step(program, work, {name: mode.from_tensor(value) for name, value in values.items()})


def _reason(error: Exception) -> str:
    if isinstance(error, UsageError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the cause of a rule's error; if training fails too, that error names the rule
    text = str(error).strip().partition("\n")[0]
    looked = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
    if looked or any(word in str(error) for word in ("data-dependent", ".item()", "value out of a tracing tensor")):
        return "its forward depends on the values of tensors (by an `if`, .item(), or a shape that depends on them)"
    if "mutat" in str(error):
        return rewrite.OWN_TENSORS
    return f"{type(error).__name__}: {text if len(text) < _LONGEST else text[:_LONGEST] + '…'}"
