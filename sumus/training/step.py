"""One local step as a pure function of named values: gradient, correction, clipping and optimizer together.

Executors capture it as it runs here, alone or over a stack of clients (`sumus.training.graph`); phones get it in plain
operators (`sumus.training.trace`). The rules in it are those of `sumus.work`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from sumus.training.program import Program, dense
from sumus.tree import nested, unnested
from sumus.types import Tensors
from sumus.work import ClientWork, apply_gradients


def path_of(program: Program, leaf: str) -> str:
    """The name of a leaf among a step's values."""
    return f"params/{leaf}" if leaf in program.trained else f"buffers/{leaf}"


def step_values(program: Program, work: ClientWork, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Arguments of a step, by name: the program's present values, a fresh optimizer, a client's first state.

    params/LEAF, rule/LEAF/SLOT, buffers/LEAF, broadcast/NAME/LEAF, state/NAME/LEAF, inputs, targets, lr, step. `lr` and
    `step` (from 1) are float64 scalars: in single precision 1 − β₂^step would lose four of seven digits.
    """
    values = {f"params/{name}": tensor.detach().clone() for name, tensor in program.trained.items()}
    for name, tensor in program.trained.items():
        for slot, state in enumerate(work.rule_of(name).init(tensor.detach())):
            values[f"rule/{name}/{slot}"] = torch.as_tensor(state).clone()  # one tensor in two slots is two
    buffers = {name: tensor for name, tensor in program.tensors.items() if name not in program.trained}
    values |= {f"buffers/{name}": tensor.detach().clone() for name, tensor in buffers.items()}
    shared = program.widened(program.shared)
    broadcast = {
        part: {name: leaf * (part == "params") for name, leaf in shared.items()} for part in work.rules.receives
    }
    for kind, trees in (("broadcast", broadcast), ("state", work.rules.init(shared))):
        values |= {f"{kind}/{path}": torch.as_tensor(leaf).clone() for path, leaf in unnested(trees).items()}
    values |= {"inputs": inputs, "targets": targets}
    return values | {"lr": torch.tensor(0.1, dtype=torch.float64), "step": torch.tensor(1.0, dtype=torch.float64)}


def local_step(
    program: Program, work: ClientWork, values: Mapping[str, Tensor], functional: bool = False
) -> dict[str, Tensor]:
    """The values after a step, by name: params, rule and buffers, and the mean `loss` before it.

    values: those of `step_values`; with a `mask` (B,), rows where it is 0 pad a short batch and do not count. A model with
    batch statistics (BatchNorm) sees them all the same.
    functional: differentiate by `torch.func`, as under `vmap`; else by autograd, which keeps fused kernels whole.
    """
    params = {name: values[f"params/{name}"].detach() for name in program.trained}
    buffers = {name: values[f"buffers/{name}"].clone() for name in program.tensors if f"buffers/{name}" in values}
    rules = {name: tuple(values[key] for key in values if key.startswith(f"rule/{name}/")) for name in program.trained}
    broadcast, own = (
        nested({path.removeprefix(kind): values[path] for path in values if path.startswith(kind)})
        for kind in ("broadcast/", "state/")
    )

    def mean_loss(leaves: Tensors) -> Tensor:
        outputs = functional_call(program.module, {**leaves, **buffers}, (values["inputs"],), tie_weights=True)
        losses = program.task.loss(outputs, values["targets"])
        if "mask" not in values:
            return losses.mean()
        return (losses * values["mask"]).sum() / values["mask"].sum().clamp(min=1.0)

    if functional:
        grads, loss = grad_and_value(mean_loss)(params)
    else:
        with torch.enable_grad():
            leaves = {name: param.requires_grad_() for name, param in params.items()}
            loss = mean_loss(leaves)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            grads = dict(zip(leaves, map(dense, found), strict=True))
    plain = {name: param.detach() for name, param in params.items()}
    moved, states = apply_gradients(work, plain, grads, rules, broadcast, own, values["lr"], values["step"])
    results = {f"params/{name}": param for name, param in moved.items()}
    results |= {f"rule/{name}/{slot}": s for name, slots in states.items() for slot, s in enumerate(slots)}
    results = {name: value.to(values[name].dtype) for name, value in results.items()}  # a scalar leaf takes lr's dtype
    results |= {f"buffers/{name}": buffer for name, buffer in buffers.items()}
    return results | {"loss": loss.detach()}
