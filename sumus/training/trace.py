"""The local step as one functional graph of plain aten operators, without autograd and without in-place operators.

A device without torch can train with this graph.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch.func import functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from sumus.errors import TaskError
from sumus.training.noise import dropout_gradient
from sumus.training.observed import observe
from sumus.training.program import Program
from sumus.training.step import local_step, step_values
from sumus.work import ClientWork


@dataclass(frozen=True)
class StepGraph:
    """A traced step.

    Its arguments are those of `sumus.training.step`, with a `mask` (B,) that is 0 for rows that pad a short batch. Its
    results are params/LEAF, rule/LEAF/SLOT, buffers/LEAF and loss. Batch statistics (BatchNorm) include the padding:
    use whole batches for such models.

    Attributes:
        graph: The graph.
        inputs: The names of its arguments, in order.
        outputs: The names of its results, in order.
    """

    graph: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on named values."""
        results = self.graph(*(values[name] for name in self.inputs))
        return dict(zip(self.outputs, results, strict=True))

    @property
    def operators(self) -> set[str]:
        """The names of the aten operators in the graph."""
        return {str(node.target) for node in self.graph.graph.nodes if node.op == "call_function"}


def trace_step(program: Program, work: ClientWork, inputs: Tensor, targets: Tensor) -> StepGraph:
    """Trace the graph of one step for batches of this shape.

    Raises:
        PlanError: The user's own code trains the clients.
        TaskError: The step does more than a graph can hold.
    """
    work.expect_steps("a program for a phone")
    seen = observe(program, inputs, targets)
    if seen.alone is not None:
        raise TaskError(f"the step cannot be traced: {seen.alone}")
    dtype = next(iter(program.trained.values())).dtype
    values = {**step_values(program, work, inputs, targets), "mask": torch.ones(len(inputs), dtype=dtype)}
    names, outputs = list(values), []

    def step(*args: Tensor) -> list[Tensor]:
        results = local_step(program, work, dict(zip(names, args, strict=True)))
        outputs[:] = results
        return list(results.values())

    program.module.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), enable_python_dispatcher():
            first = make_fx(step, decomposition_table=_decompositions())(*values.values())
            functional: Callable[..., Any] = functionalize(first, remove="mutations_and_views")
            graph = make_fx(functional)(*values.values())
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return StepGraph(graph, tuple(names), tuple(outputs))


def _decompositions() -> Any:
    """Return torch's decompositions, with a gradient of dropout that uses the same factors as its values
    (`sumus.training.noise`)."""
    return {**core_aten_decompositions(), torch.ops.aten.native_dropout_backward.default: dropout_gradient}
