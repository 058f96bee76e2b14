"""One local step as a pure function of named values: gradient, correction, clipping and optimizer together.

Executors capture this function for one client or a stack of clients (`sumus.training.graph`). Phones get it as plain
operators (`sumus.training.trace`). Its rules are those of `sumus.work`.
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
    """Return the name of a leaf among a step's values."""
    return f"params/{leaf}" if leaf in program.trained else f"buffers/{leaf}"


def step_values(program: Program, work: ClientWork, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the arguments of a step by name: the program's present values, a fresh optimizer, and a client's first
    state.

    The names are params/LEAF, rule/LEAF/SLOT, buffers/LEAF, broadcast/NAME/LEAF, state/NAME/LEAF, inputs, targets, lr
    and step. `lr` and `step` (from 1) are float64 scalars: in single precision 1 − β₂^step would lose four of seven
    digits.
    """
    values = {f"params/{name}": tensor.detach().clone() for name, tensor in program.trained.items()}
    for name, tensor in program.trained.items():
        for slot, state in enumerate(work.rule_of(name).init(tensor.detach())):
            values[f"rule/{name}/{slot}"] = torch.as_tensor(state).clone()  # a tensor in two slots is copied for each
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
    """Return the values after a step, by name: params, rule and buffers, and the mean `loss` before the step.

    Args:
        program: The model.
        work: The client's work.
        values: The values from `step_values`, optionally with a `mask` (B,). Rows whose mask is 0 pad a short batch, and
            do not count. Batch statistics (BatchNorm) still include the padding.
        functional: Whether to differentiate by `torch.func`, which is needed under `vmap`; if not, by autograd, which keeps
            fused kernels whole.
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
    # a scalar leaf has taken the dtype of lr
    results = {name: value.to(values[name].dtype) for name, value in results.items()}
    results |= {f"buffers/{name}": buffer for name, buffer in buffers.items()}
    return results | {"loss": loss.detach()}
