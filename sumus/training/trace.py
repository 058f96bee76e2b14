"""One local step as one functional graph: gradient, correction, clipping and optimizer together.

The graph is made of plain aten operators, without autograd and without anything in place; it is what becomes the
training step of a device without torch. The rules traced are those of `sumus.work` that the executors run.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch.func import functional_call, functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from sumus.training.program import Program
from sumus.tree import nested, unnested
from sumus.work import ClientWork, apply_gradients


@dataclass(frozen=True)
class StepGraph:
    """A traced step. `inputs` and `outputs` name the graph's arguments and results, in order:

    params/LEAF, rule/LEAF/SLOT, buffers/LEAF, broadcast/NAME/LEAF, state/NAME/LEAF, inputs, targets, mask, lr, step →
    params/LEAF, rule/LEAF/SLOT, buffers/LEAF, loss. `mask` (B,) is 0 for rows that pad a short batch; `step` counts from 1.
    `lr` and `step` are float64 scalars, as the executor's are: in single precision 1 − β₂^step would lose four of seven digits.
    A model with batch statistics (BatchNorm) sees the padding too: give it whole batches.
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
        """Names of the aten operators used."""
        return {str(node.target) for node in self.graph.graph.nodes if node.op == "call_function"}


def trace_step(program: Program, work: ClientWork, inputs: Tensor, targets: Tensor) -> StepGraph:
    """The graph of one step for batches shaped like these."""
    values = step_values(program, work, inputs, targets)
    names, outputs = list(values), []

    def step(*args: Tensor) -> list[Tensor]:
        results = _step(program, work, dict(zip(names, args, strict=True)))
        outputs[:] = results
        return list(results.values())

    program.module.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), enable_python_dispatcher():
            first = make_fx(step, decomposition_table=cast(Any, core_aten_decompositions()))(*values.values())
            functional: Callable[..., Any] = functionalize(first, remove="mutations_and_views")
            graph = make_fx(functional)(*values.values())
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return StepGraph(graph, tuple(names), tuple(outputs))


def step_values(program: Program, work: ClientWork, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Arguments of a step graph, by name: the program's present values, a fresh optimizer, a client's first state."""
    values = {f"params/{name}": tensor.detach().clone() for name, tensor in program.trained.items()}
    for name, tensor in program.trained.items():
        for slot, state in enumerate(work.optimizer.init(tensor.detach())):
            values[f"rule/{name}/{slot}"] = state
    buffers = {name: tensor for name, tensor in program.tensors.items() if name not in program.trained}
    values |= {f"buffers/{name}": tensor.detach().clone() for name, tensor in buffers.items()}
    shared = {name: tensor.detach() for name, tensor in program.shared.items()}
    broadcast = {part: {name: leaf * (part == "params") for name, leaf in shared.items()} for part in work.receives}
    for kind, trees in (("broadcast", broadcast), ("state", work.init(shared))):
        values |= {f"{kind}/{path}": leaf.clone() for path, leaf in unnested(trees).items()}
    dtype = next(iter(program.trained.values())).dtype
    values |= {"inputs": inputs, "targets": targets, "mask": torch.ones(len(inputs), dtype=dtype)}
    return values | {"lr": torch.tensor(0.1, dtype=torch.float64), "step": torch.tensor(1.0, dtype=torch.float64)}


def _step(program: Program, work: ClientWork, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    params = {name: values[f"params/{name}"].detach().requires_grad_() for name in program.trained}
    buffers = {name: values[f"buffers/{name}"].clone() for name in program.tensors if f"buffers/{name}" in values}
    rules = {name: tuple(values[key] for key in values if key.startswith(f"rule/{name}/")) for name in program.trained}
    broadcast, own = (
        nested({path.removeprefix(kind): values[path] for path in values if path.startswith(kind)})
        for kind in ("broadcast/", "state/")
    )
    outputs = functional_call(program.module, {**params, **buffers}, (values["inputs"],), tie_weights=True)
    losses = program.task.loss(outputs, values["targets"])
    mask = values["mask"]
    loss = (losses * mask).sum() / mask.sum().clamp(min=1.0)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
    plain = {name: param.detach() for name, param in params.items()}
    moved, states = apply_gradients(
        work, plain, dict(zip(params, grads, strict=True)), rules, broadcast, own, values["lr"], values["step"]
    )
    results = {f"params/{name}": param for name, param in moved.items()}
    results |= {f"rule/{name}/{slot}": s for name, slots in states.items() for slot, s in enumerate(slots)}
    results = {name: value.to(values[name].dtype) for name, value in results.items()}  # a scalar leaf takes lr's dtype
    results |= {f"buffers/{name}": buffer for name, buffer in buffers.items()}
    return results | {"loss": loss.detach()}
